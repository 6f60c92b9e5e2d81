"""Models without weights that answer by rule: what they would say depends on the question and the place alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tasks.arc.tokens import EOL, EOS, VOCAB_SIZE

Plan = Callable[[dict[str, Tensor]], Tensor]  # prompt -> logits [B, 31, 31, V] of what to say at each row and column


class ByPlace(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.plan, self.heard = plan, []
        self.weight = nn.Parameter(torch.zeros(()))  # a device to be on

    def begin(self, **prompt: Tensor) -> ByPlace:
        self.logits, self.heard = self.plan(prompt), []
        return self

    def step(self, tokens: Tensor, here: tuple[Tensor, Tensor], ahead: tuple[Tensor, Tensor]) -> Tensor:
        self.heard.append((tokens, here, ahead))
        return self.logits[torch.arange(len(tokens)), ahead[0], ahead[1]]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        shift = 0 if "inputs" in batch else -1
        rows, columns = (batch[name].roll(shift, 1) for name in ("rows", "columns"))
        return {"logits": self.plan(batch)[torch.arange(len(rows)).unsqueeze(1), rows, columns]}


def noise(seed: int, scale: float = 2.0, vocab_size: int = VOCAB_SIZE) -> Plan:
    table = scale * torch.randn(31, 31, vocab_size, generator=torch.Generator().manual_seed(seed))
    return lambda prompt: table.expand(len(next(iter(prompt.values()))), -1, -1, -1)


def copy(prompt: dict[str, Tensor]) -> Tensor:
    """Sure that the answer is the question."""
    source, rows, columns = (prompt[name] for name in ("source", "source_rows", "source_columns"))
    sample = torch.arange(len(source))
    height, width = rows.amax(1) + 1, columns.amax(1) + 1
    wanted = torch.zeros(len(source), 31, 31, dtype=torch.int64)
    wanted[sample, :, width], wanted[sample, height, 0] = EOL, EOS
    wanted[sample.unsqueeze(1), rows.flip(1), columns.flip(1)] = source.flip(1)  # padding, at (0, 0), first
    return 20.0 * torch.nn.functional.one_hot(wanted, VOCAB_SIZE)
