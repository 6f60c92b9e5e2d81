"""Exp -1: one sequence of tokens, read and continued (530 thousand parameters).

accelerate launch train/decoder_only.py                             # the original's recipe on our fourteen skills
accelerate launch train/decoder_only.py --max_minutes 10 --preset tenfold --context_pairs 2 --position rope2d
accelerate launch train/decoder_only.py --legacy_vocab --loss_on_input --data tasks/   # its vocabulary and loss
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from models.arc_decoder import PRESETS, ArcDecoder, ArcDecoderConfig
from train.arc import ArcRun, main


@dataclass(frozen=True, kw_only=True)
class DecoderOnlyRun(ArcRun):
    """Flags of train/decoder_only.py. Without demonstrations it can only learn rules by heart."""

    experiment: ClassVar[str] = "exp_-1_decoder_only"
    kind: ClassVar[str] = "decoder_only"

    context_pairs: int = 0
    # rope: by place in the sequence; rope2d: by row and column.
    position: Literal["rope", "rope2d"] = "rope"
    # The original's 11 classes, which have no end of rows or grids: answers then get their shape told.
    legacy_vocab: bool = False
    # Learn to continue the question too, as the original did.
    loss_on_input: bool = False

    def shape(self) -> ArcDecoderConfig:
        preset = PRESETS["legacy" if self.legacy_vocab else "trial69"]
        if self.tiny:
            preset = dataclasses.replace(PRESETS["tiny"], vocab_size=preset.vocab_size)
        return dataclasses.replace(preset, position=self.position, **({} if self.dropout else {"dropout": 0.0}))

    def build(self) -> ArcDecoder:
        return ArcDecoder(self.shape())

    @property
    def legacy(self) -> bool:
        return self.legacy_vocab


if __name__ == "__main__":
    main(DecoderOnlyRun)
