"""Exp 0: an encoder of the question and a decoder of the answer, no demonstrations (928 thousand parameters).

accelerate launch train/encoder_decoder.py                          # the original's recipe on our fourteen skills
accelerate launch train/encoder_decoder.py --position grid2d --perminv canonical          # Exp 1, Exp 2
accelerate launch train/encoder_decoder.py --data arc1-training --val_data arc1-evaluation
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from models.arc_encoder_decoder import PRESETS, ArcEncoderDecoder, ArcEncoderDecoderConfig
from train.arc import ArcRun, main

NO_DROPOUT = {"embedding_dropout": 0.0, "encoder_dropout": 0.0, "decoder_dropout": 0.0}


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderRun(ArcRun):
    """Flags of train/encoder_decoder.py. It sees no demonstrations, and can only learn rules by heart."""

    experiment: ClassVar[str] = "exp_0_encoder_decoder"
    tenfold: ClassVar[dict[str, Any]] = {"position": "borders", "rope2d": True}

    context_pairs: int = 0
    # sinusoidal: by order in the sequence; grid2d: by row and column; borders: learned, and from either side.
    position: Literal["sinusoidal", "grid2d", "borders"] = "sinusoidal"
    # canonical: colours are told apart by the order of their first appearance, whatever they are called.
    perminv: Literal["table", "canonical"] = "table"
    # With canonical, colour 0 keeps its name: the background of most puzzles.
    fix_zero: bool = False
    # In attention, places are told by how far they are apart, too.
    rope2d: bool = False
    # Passes of the decoder, each shown what the one before would say.
    refine: int = 1

    def problems(self) -> list[str]:
        found = super().problems()
        if self.context_pairs:
            found.append(f"--context_pairs {self.context_pairs}: this model sees none; train/champion.py's does")
        return found

    def shape(self) -> ArcEncoderDecoderConfig:
        return dataclasses.replace(
            PRESETS["tiny" if self.tiny else "trial69"],
            position=self.position,
            perminv=self.perminv,
            fix_zero=self.fix_zero,
            rope2d=self.rope2d,
            refine=self.refine,
            **({} if self.dropout else NO_DROPOUT),
        )

    def build(self) -> ArcEncoderDecoder:
        return ArcEncoderDecoder(self.shape())


if __name__ == "__main__":
    main(EncoderDecoderRun)
