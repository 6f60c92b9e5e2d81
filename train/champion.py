"""Exp 3, the Champion: an encoder-decoder that takes the rule from demonstrations (1.72 million parameters).

accelerate launch train/champion.py                                 # the original's recipe on our fourteen skills
accelerate launch train/champion.py --preset tenfold --skills reflect upscale colour_map --max_minutes 60
accelerate launch train/champion.py --bridge concat_mlp --perminv table      # a summary of the rule, names of colours
accelerate launch train/champion.py --preset tenfold --data arc1-training --val_data arc1-evaluation --augment
python train/arc_solve.py evaluation.json -o submission.json --checkpoint runs/champion/RUN
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from models.arc_layers import match
from models.champion import PARAMETERS, PRESETS, Champion, ChampionConfig
from train.arc import ArcRun, main
from train.encoder_decoder import NO_DROPOUT


@dataclass(frozen=True, kw_only=True)
class ChampionRun(ArcRun):
    """Flags of train/champion.py."""

    experiment: ClassVar[str] = "exp_3_champion"
    tenfold: ClassVar[dict[str, Any]] = {"position": "borders", "rope2d": True}

    # trial69: 1.72 M parameters, whatever the bridge; small: 0.37 M, for a CPU.
    size: Literal["trial69", "small"] = "trial69"
    # How the demonstrations reach the answer. cross_attn: all their cells are attended to; film, concat_mlp: by one
    # vector of them; none: not at all.
    bridge: Literal["none", "concat_mlp", "film", "cross_attn"] = "cross_attn"
    # canonical: colours are told apart by the order of their first appearance, whatever they are called.
    perminv: Literal["table", "canonical"] = "canonical"
    # With canonical, colour 0 keeps its name: the background of most puzzles.
    fix_zero: bool = False
    # grid2d: by row and column; borders: learned, by row and column from either side; sinusoidal: by order.
    position: Literal["sinusoidal", "grid2d", "borders"] = "grid2d"
    # In attention, places are told by how far they are apart, too.
    rope2d: bool = False
    # Passes of the decoder, each shown what the one before would say.
    refine: int = 1

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.bridge == "none") != (self.context_pairs == 0):
            found.append(
                f"--bridge {self.bridge} with --context_pairs {self.context_pairs}: without demonstrations there is "
                "nothing to bridge, and without a bridge they are not seen; leave out both or neither"
            )
        return found

    def shape(self) -> ChampionConfig:
        flags = {
            name: getattr(self, name) for name in ("bridge", "perminv", "fix_zero", "position", "rope2d", "refine")
        }
        config = dataclasses.replace(
            PRESETS["tiny" if self.tiny else self.size], **flags, **({} if self.dropout else NO_DROPOUT)
        )
        return match(Champion, config, PARAMETERS) if config.d_model == ChampionConfig.d_model else config

    def build(self) -> Champion:
        return Champion(self.shape())


if __name__ == "__main__":
    main(ChampionRun)
