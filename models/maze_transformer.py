"""The baseline maze solver: a transformer over the cells of a maze, once through, or looped over itself.

    model = MazeTransformer(MazeTransformerConfig(maze_size=12, validity_mask=True))
    model(passages, start, goal, candidates)["scores"]                       # [B, N * N, K, J]
    model(passages, start, goal, candidates, labels=labels)["loss"].backward()

With `loops` above 1 it is the control of PoH-HRM (models/poh.py): the same refinements, and no routing. `legacy` is
torch's post-norm encoder, which the original used.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

from dataclasses import dataclass

from torch import Tensor, nn

from models.maze_layers import MOST_REFINEMENTS, SIZES, Block, MazeConfig, MazeModel, Refiner


@dataclass(frozen=True, kw_only=True)
class MazeTransformerConfig(MazeConfig):
    loops: int = 1  # times the stack refines its own output

    def problems(self) -> list[str]:
        found = super().problems()
        if not 1 <= self.loops <= MOST_REFINEMENTS:
            found.append(f"loops must be 1 to {MOST_REFINEMENTS}, not {self.loops}")
        if self.legacy and self.loops > 1:
            found.append(f"the original had no looped baseline: loops must be 1 with legacy, not {self.loops}")
        return found


# Parameters: 0.1M, 0.5M, 2.5M, 12.9M, 42.9M and 101.2M.
PRESETS = {name: MazeTransformerConfig(maze_size=16, **size) for name, size in SIZES.items()}


class MazeTransformer(MazeModel):
    config: MazeTransformerConfig

    def __init__(self, config: MazeTransformerConfig):
        super().__init__(config)
        c = config
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(c.d_model, c.num_heads, c.d_ff, c.dropout, batch_first=True)
            if c.legacy
            else Block(c)
            for _ in range(c.num_layers)
        )
        self.refiner = Refiner(c.d_model, c.loops) if c.loops > 1 else None
        self.init_weights()

    def encode(self, x: Tensor) -> tuple[Tensor, dict]:
        if self.refiner is None:
            return self._stack(x, 0), {}
        return self.refiner(x, self._stack)[0], {}

    def _stack(self, h: Tensor, step: int) -> Tensor:
        for block in self.blocks:
            h = self.run(block, h)
        return h
