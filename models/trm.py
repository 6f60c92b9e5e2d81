"""A tiny recursive model for mazes, after TRM (arXiv 2510.04871): one small stack thinks and answers, again and again.

    L_cycles times   z <- f(x + y + z)         the thought, from the maze x and the answer so far
    once             y <- f(y + z)             the answer

and that H_cycles times, of which only the last carries a gradient. It is the control for what recursion does without
routing and without a residual α.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.maze_layers import Block, MazeConfig, MazeModel


@dataclass(frozen=True, kw_only=True)
class TRMConfig(MazeConfig):
    num_layers: int = 2
    H_cycles: int = 3
    L_cycles: int = 4

    def problems(self) -> list[str]:
        found = super().problems()
        cycles = ("H_cycles", "L_cycles")
        found += [f"{n} must be at least 1, not {getattr(self, n)}" for n in cycles if getattr(self, n) < 1]
        if self.legacy:
            found.append("the original had no such model: leave out legacy")
        return found


class TRM(MazeModel):
    config: TRMConfig
    beginning: Tensor

    def __init__(self, config: TRMConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        # Of y and z: drawn once and kept, for no gradient reaches the first cycle.
        self.register_buffer("beginning", torch.randn(2, 1, 1, config.d_model))
        self.init_weights()

    def encode(self, x: Tensor) -> tuple[Tensor, dict]:
        y, z = self.beginning.to(x.dtype).expand(-1, *x.shape)
        for cycle in range(self.config.H_cycles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == self.config.H_cycles - 1):
                for _ in range(self.config.L_cycles):
                    z = self._stack(x + y + z)
                y = self._stack(y + z)
        return y, {}

    def _stack(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = self.run(block, h)
        return self.norm(h)  # or a state would grow with every cycle
