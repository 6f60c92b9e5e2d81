"""How sure one may be of a score, and that one model is better than another on the same mazes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z95 = 1.959964
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom, from 1
RESAMPLES = 10_000


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, JASA 1927)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return middle - half, middle + half


def over_seeds(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the half width of its 95 % t-interval; None for a single seed, which tells nothing of the others."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return x.item(), None
    quantile = STUDENT_975[len(x) - 2] if len(x) - 2 < len(STUDENT_975) else Z95
    return x.mean().item(), quantile * (x.std() / math.sqrt(len(x))).item()


def mcnemar(first: Tensor, second: Tensor) -> float:
    """The exact two-sided p-value that two policies, bool [B] each on the same mazes, do equally well."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_difference(first: Tensor, second: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean of first - second, float [seeds, mazes] each on the same mazes, and its 95 % bootstrap interval.

    Mazes are drawn together for both models; seeds are drawn for each on its own, for seed 0 of one has nothing to do
    with seed 0 of the other.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = first.double(), second.double()
    means = []
    for _ in range(RESAMPLES // 10):  # ten at a time: thousands of mazes would take gigabytes at once
        mazes = torch.randint(first.shape[1], (10, first.shape[1]), generator=generator)
        rows = [torch.randint(len(x), (10, len(x)), generator=generator) for x in (first, second)]
        drawn = [x[r].mean(1).gather(1, mazes).mean(1) for x, r in zip((first, second), rows, strict=True)]
        means.append(drawn[0] - drawn[1])
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (first.mean() - second.mean()).item(), low, high


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p-values of several questions asked of one experiment, corrected (Holm, Scand. J. Statist. 1979)."""
    corrected, worst = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = worst
    return {name: corrected[name] for name in p_values}
