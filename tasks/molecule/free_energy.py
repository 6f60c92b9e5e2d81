"""Free energies along torsions, with bands, and distances between them.

Angles are in rad, float [G, n] by independent group; the bins divide [-π, π) evenly and know nothing of the seam. With
log-weights, of the same shape, frames count as exp(log-weight): so frames that a map brought to another temperature,
or frames of the other temperature itself, give that temperature's free energies. Frames without an angle (NaN) are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tasks.molecule.estimates import Estimate, estimate, relative_weights, resamples
from tasks.molecule.system import KB

BINS = 60  # of 6 degrees along one torsion
BINS_OF_A_PLANE = 100  # each way, as in the literature's total variations (FAB, CMT)
LIMIT = 15.0  # kJ/mol above the minimum: what is rarer has no frames to tell it by
# The left-handed basin of φ, C7ax and αL. Not all of φ > 0: the extended basin reaches over ±180 degrees to there.
LEFT_HANDED = (0.0, 2 * math.pi / 3)


class Profile(NamedTuple):
    """F(φ) = -k_B T ln(2π p(φ)) in kJ/mol, [bins] each: 0 is the uniform distribution, infinity an empty bin. Absolute,
    so that two profiles are compared as they are; the 95 % band is from `low` to `high`."""

    centers: np.ndarray
    free_energy: np.ndarray
    low: np.ndarray
    high: np.ndarray


def profile(
    angles: np.ndarray, temperature: float, log_weights: np.ndarray | None = None, *, bins: int = BINS, seed: int = 0
) -> Profile:
    """Along one torsion, with its bootstrap band over the groups."""
    counts = _histograms([angles], log_weights, bins)  # [G, bins]
    found = estimate(_free_energy(resamples(len(counts), seed) @ counts, temperature), len(counts))
    return Profile((np.arange(bins) + 0.5) * (2 * math.pi / bins) - math.pi, found.value, found.low, found.high)


def plane(
    phi: np.ndarray,
    psi: np.ndarray,
    temperature: float,
    log_weights: np.ndarray | None = None,
    *,
    bins: int = BINS,
) -> np.ndarray:
    """F(φ, ψ) = -k_B T ln(4π² p) in kJ/mol, [bins, bins], φ first."""
    counts = _histograms([phi, psi], log_weights, bins).sum(axis=0)
    return _free_energy(counts, temperature).reshape(bins, bins)


def free_energy_error(found: np.ndarray, truth: np.ndarray, limit: float = LIMIT) -> tuple[float, float]:
    """The largest and the mean |ΔF| over the bins where the truth is less than `limit` kJ/mol above its minimum.

    What is found to be higher than the limit counts as the limit: an empty bin says no more than that.
    """
    there = truth - truth.min() < limit
    highest = truth.min() + limit
    difference = np.abs(np.minimum(found[there], highest) - truth[there])
    return float(difference.max()), float(difference.mean())


def in_basin(phi: np.ndarray, basin: tuple[float, float] = LEFT_HANDED) -> np.ndarray:
    """Which φ, in rad, lie in it: bool of their shape."""
    return (phi > basin[0]) & (phi < basin[1])


def basin_free_energy(
    phi: np.ndarray,
    temperature: float,
    log_weights: np.ndarray | None = None,
    *,
    basin: tuple[float, float] = LEFT_HANDED,
    seed: int = 0,
) -> Estimate:
    """F(basin) - F(elsewhere) in kJ/mol, infinite where no frame is in it."""
    inside = in_basin(phi, basin)
    weights = _weights([phi], log_weights)
    counts = np.stack([(weights * inside).sum(axis=1), (weights * ~inside).sum(axis=1)], axis=1)  # [G, 2]
    energies = _free_energy(resamples(len(counts), seed) @ counts, temperature)
    with np.errstate(invalid="ignore"):
        return estimate(energies[:, 0] - energies[:, 1], len(counts))


def total_variation(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    first_log_weights: np.ndarray | None = None,
    *,
    bins: int = BINS_OF_A_PLANE,
) -> float:
    """Half of ∫|p - q| between the histograms of two sets of (φ, ψ), 0 to 1. It falls slowly with the number of frames:
    the two halves of one data set say how far."""
    weighted = ((first, first_log_weights), (second, None))
    counts = (_histograms(angles, log_weights, bins).sum(axis=0) for angles, log_weights in weighted)
    p, q = (count / count.sum() for count in counts)
    return float(np.abs(p - q).sum() / 2)


def _free_energy(counts: np.ndarray, temperature: float) -> np.ndarray:
    """kJ/mol above the uniform distribution's, of counts [..., bins]; infinite where there are none."""
    total = counts.sum(axis=-1, keepdims=True)
    density = np.divide(counts * counts.shape[-1], total, out=np.zeros_like(counts), where=total > 0)
    with np.errstate(divide="ignore"):
        return -KB * temperature * np.log(density)


def _weights(angles: Sequence[np.ndarray], log_weights: np.ndarray | None) -> np.ndarray:
    """float64, of the shape of the angles; 0 where one is NaN."""
    known = np.isfinite(angles).all(axis=0)
    if log_weights is None:
        return known.astype(np.float64)
    if np.shape(log_weights) != known.shape:
        raise ValueError(
            f"log-weights have the shape {np.shape(log_weights)}, the angles {known.shape}: one each is due"
        )
    return relative_weights(log_weights) * known


def _histograms(angles: Sequence[np.ndarray], log_weights: np.ndarray | None, bins: int) -> np.ndarray:
    """Weighted counts of each group in the bins of one or more angles: float64 [G, bins ** len(angles)]."""
    weights = _weights(angles, log_weights)
    cell = np.zeros(weights.shape, dtype=np.int64)
    for angle in angles:
        cell = cell * bins + np.floor((np.nan_to_num(angle) / (2 * math.pi) + 0.5) * bins).astype(np.int64) % bins
    total = bins ** len(angles)
    cell += np.arange(len(cell))[:, None] * total
    return np.bincount(cell.ravel(), weights.ravel(), minlength=len(cell) * total).reshape(len(cell), total)
