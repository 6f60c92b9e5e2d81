"""Steps that would do harm: a loss or gradient that is not finite, or a loss far above its recent run."""

from __future__ import annotations

import torch
from torch import Tensor

# Steps that the running median looks back over, and how many of them it needs before it judges.
WINDOW, ENOUGH = 128, 32
# A spike lies this many standard deviations (1.4826 MAD, the normal's) above the median; a MAD below 2 % of the median
# counts as 2 %, or a converged loss would make every wiggle a spike. One below 0.5 % of the highest median so far
# counts as that: when a task is nearly solved, a batch with one answer wrong lies 100 medians above the others, and it
# is what there is left to learn from (of 1,257 steps on an ARC skill, every second was skipped from the 590th on).
DEVIATIONS, LEAST_MAD, LEAST_OF_HIGHEST = 12.0, 0.02, 0.005
# After this many bad steps in a row skipping helps no more: the weights or the data are broken.
PATIENCE = 20


class TrainingBroken(RuntimeError):
    """Training cannot go on; the message says what was seen and which checkpoint is sound."""


def _median(values: Tensor, count: Tensor) -> Tensor:
    """Lower median of the `count` finite ones of `values` [N], 0-d (MPS has no nanmedian)."""
    ascending = torch.where(values.isfinite(), values, torch.inf).sort().values
    return ascending.gather(0, ((count - 1) // 2).clamp(min=0)[None])[0]


class Guard:
    """Judges each step on the device; nothing is read on the host until the loop asks."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.full((WINDOW,), float("nan"), device=device)
        self.highest = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)

    def verdict(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """0-d float32: 1 where `step` must not reach the weights. loss and norm: 0-d, the same on every process."""
        loss = loss.float()
        count = self.losses.isfinite().sum()
        median = _median(self.losses, count)
        enough = count >= ENOUGH
        self.highest = torch.where(enough, torch.maximum(self.highest, median.abs()), self.highest)
        least = torch.maximum(LEAST_MAD * median.abs(), LEAST_OF_HIGHEST * self.highest)
        mad = torch.maximum(_median((self.losses - median).abs(), count), least)
        spike = enough & (loss > median + DEVIATIONS * 1.4826 * mad)
        bad = spike | ~loss.isfinite() | ~norm.isfinite()
        # Into the window goes every finite loss: a level that stays high is news once, not a spike for ever.
        self.losses[step % WINDOW] = torch.where(loss.isfinite(), loss, torch.nan)
        bad = bad.float()
        self.streak = (self.streak + 1) * bad
        return bad

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.cpu(), "highest": self.highest.cpu(), "streak": self.streak.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses = state["losses"].to(self.losses.device)
        self.highest = state["highest"].to(self.highest.device)
        self.streak = state["streak"].to(self.streak.device)
