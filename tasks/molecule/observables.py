"""What swaps between two temperatures are worth, with errors: gap, acceptance, weights, and checks that catch mistakes.

A map T takes frames x of the cold ensemble A to the hot one, B; its inverse takes hot frames y to the cold one. All is
computed from the two log-ratios of `log_ratio`, each float64 [G, n] by independent group,

    forward a(x) = b_A U(x) - b_B U(Tx) + log|det dT/dx|,    inverse b(y) = b_B U(y) - b_A U(T⁻¹y) + log|det dT⁻¹/dy|

A swap of x and y is accepted with min(1, exp Δ), Δ = a(x) + b(y); exp a and exp b are also, but for a constant, the
importance weights of mapped frames. Everything here is NumPy in float64 but `dihedral`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.molecule.estimates import Estimate, estimate, over_groups, relative_weights, resamples

HALVINGS = 60  # of an interval: more than float64 can tell apart
TAIL_PRIOR = 10  # as many imagined weights of k-hat 0.5 steady a short tail (Vehtari et al., JMLR 2024, appendix G)


def dihedral(x: Tensor, atoms: Sequence[int]) -> Tensor:
    """Angle between the planes of the first and the last three of four atoms, in rad, (-π, π], float64 [...].

    x: nm [..., N, 3]. Seen along the middle bond, clockwise is positive (IUPAC 1970).
    """
    first, second, third, fourth = x.double()[..., list(atoms), :].unbind(-2)
    before, along, after = second - first, third - second, fourth - third
    left, right = torch.linalg.cross(before, along), torch.linalg.cross(along, after)
    return torch.atan2((before * right).sum(-1) * along.norm(dim=-1), (left * right).sum(-1))


# ---- swaps -----------------------------------------------------------------------------------------------------------


def log_ratio(
    beta_from: float, energy: np.ndarray, beta_to: float, mapped_energy: np.ndarray, logdet: np.ndarray | float
) -> np.ndarray:
    """a(x), or b(y) with the temperatures exchanged. Energies in kJ/mol, betas in mol/kJ.

    -inf where the mapped frame has no finite energy or no finite log-determinant: such a swap is never accepted, and
    the gap is infinite, as it is. Raises ValueError where a frame of the data has none.
    """
    energy, mapped_energy, logdet = (np.asarray(v, dtype=np.float64) for v in (energy, mapped_energy, logdet))
    if bad := int((~np.isfinite(energy)).sum()):
        raise ValueError(f"{bad} of {energy.size} frames of the data have no finite energy: they should be left out")
    with np.errstate(invalid="ignore"):
        ratio = beta_from * energy - beta_to * mapped_energy + logdet
    return np.where(np.isfinite(ratio), ratio, -np.inf)


def swap_scores(forward: np.ndarray, inverse: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Everything that the log-ratios [G, n] and [G, m] of a map say, by the names of results.json.

    Returns:
        gap (nats) and gap_se; its parts kl_forward and kl_inverse; free_energy_difference f_B - f_A (kT) and its _se;
        acceptance of all pairs of frames, its 95 % interval acceptance_low and _high, and acceptance_bound, below which
        it cannot be; validity and validity_se; ess_forward, ess_inverse, max_weight and k_hat, the worse of both ways.
    """
    forward, inverse = _checked(forward, inverse)
    gap = over_groups(gap_by_group(forward, inverse), seed)
    acceptance, validity = acceptance_and_validity(forward, inverse, seed)
    difference = bar(forward, inverse, seed)
    scores = {
        "gap": gap.value,
        "gap_se": gap.error,
        "kl_forward": -forward.mean() - difference.value,
        "kl_inverse": -inverse.mean() + difference.value,
        "free_energy_difference": difference.value,
        "free_energy_difference_se": difference.error,
        "acceptance": acceptance.value,
        "acceptance_low": max(0.0, acceptance.low),
        "acceptance_high": min(1.0, acceptance.high),
        "acceptance_bound": acceptance_bound(gap.value),
        "validity": validity.value,
        "validity_se": validity.error,
        "ess_forward": kish(forward),
        "ess_inverse": kish(inverse),
        "max_weight": max(max_weight(forward), max_weight(inverse)),
        "k_hat": max(k_hat(forward), k_hat(inverse)),
    }
    return {name: float(score) for name, score in scores.items()}


def gap_by_group(forward: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """-E[Δ] = KL(T#A ‖ B) + KL(T⁻¹#B ‖ A), nats, of each group: float64 [G]. Free energies cancel in it."""
    return -np.mean(forward, axis=1) - np.mean(inverse, axis=1)


def acceptance_bound(gap: float) -> float:
    """The least acceptance that a gap (nats) allows: 1 - u, where 2 u artanh u = gap.

    gap = E[d tanh(d/2)] and acceptance = 1 - E[tanh(d/2)] with d = |Δ|, and u -> 2 u artanh u is convex (Jensen).
    """
    low, high = max(gap, 0.0), max(gap, 0.0) + 0.56  # of d with d tanh(d/2) = gap: d - d tanh(d/2) is never above .557
    for _ in range(HALVINGS):
        d = (low + high) / 2
        low, high = (d, high) if d * math.tanh(d / 2) < gap else (low, d)
    return 1.0 if gap <= 0 else 1 - math.tanh(high / 2)


def pair_means(forward: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of min(1, exp Δ) and of min(1, exp Δ) · sign Δ over all pairs of a cold group and a hot one.

    forward [G, n], inverse [H, m] -> float64 [G, H] each. Sorted, the pairs that are accepted for certain are a matter
    of counting, and the others of a running sum: O(G n H log m), where all pairs would take O(G n H m).
    """
    accepted, signed = (np.empty((len(forward), len(inverse))) for _ in range(2))
    for h, group in enumerate(np.sort(inverse, axis=1)):
        uphill = np.searchsorted(group, -forward, side="left")  # [G, n] how many hot frames have Δ < 0
        certain = len(group) - uphill
        ties = np.searchsorted(group, -forward, side="right") - uphill
        running = np.concatenate([[-np.inf], np.logaddexp.accumulate(group)])
        with np.errstate(under="ignore"):
            chance = np.exp(forward + running[uphill])
        accepted[:, h] = (certain + chance).mean(axis=1) / len(group)
        signed[:, h] = (certain - ties - chance).mean(axis=1) / len(group)
    return accepted, signed


def acceptance_and_validity(forward: np.ndarray, inverse: np.ndarray, seed: int = 0) -> tuple[Estimate, Estimate]:
    """E[α] and E[α sign Δ], α = min(1, exp Δ), over all pairs of frames.

    The latter is 0 if the map is what it says: g(x, y) = (T⁻¹y, Tx) is an involution that takes Δ to -Δ, so that
    E[f(-Δ)] = E[exp(Δ) f(Δ)]. Log-determinants that are off by 0.3 each make it .27 at a gap of 0.54. Cold
    and hot groups are resampled together: those of one tempering run exchange frames.
    """
    weights = resamples(len(forward), seed)
    pairs = (np.einsum("rg,rg->r", weights @ means, weights) for means in pair_means(forward, inverse))
    acceptance, validity = (estimate(sums / len(forward) ** 2, len(forward)) for sums in pairs)
    return acceptance, validity


def acceptance_across(
    forward: np.ndarray, inverse: np.ndarray, cold_inside: np.ndarray, hot_inside: np.ndarray
) -> float:
    """Acceptance of the pairs of which one frame is inside a basin and the other is not (bool, as the log-ratios); NaN
    where there is no such pair. Most accepted swaps stay in a basin, which moves nothing between them."""
    total, count = 0.0, 0
    for inside in (True, False):
        cold, hot = forward[cold_inside == inside], inverse[hot_inside != inside]
        if cold.size and hot.size:
            total += pair_means(cold[None], hot[None])[0].item() * cold.size * hot.size
            count += cold.size * hot.size
    return total / count if count else math.nan


def bar(forward: np.ndarray, inverse: np.ndarray, seed: int = 0) -> Estimate:
    """f_B - f_A in kT by Bennett's acceptance ratio (J. Comput. Phys. 1976; with a map, Hahn and Then, PRE 2009).

    NaN where no frame of one side has a finite image.
    """
    offset = math.log(forward.size / inverse.size)
    nearest = sorted((-forward.max(), inverse.max()))
    if not np.isfinite(nearest).all():
        return Estimate(*[np.float64(np.nan)] * 4)
    margin = abs(offset) + math.log(2 * (forward.size + inverse.size))  # where one side outweighs all of the other
    low, high = nearest[0] - margin, nearest[1] + margin
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        excess = _fermi(offset - forward - middle).sum() - _fermi(middle - inverse - offset).sum()
        low, high = (middle, high) if excess < 0 else (low, middle)
    there, back = _fermi(offset - forward - high), _fermi(high - inverse - offset)
    slope = (there * (1 - there)).sum() + (back * (1 - back)).sum()
    # A resample's solution is within a Newton step of the whole sample's.
    steps = resamples(len(forward), seed) @ (there.sum(axis=1) - back.sum(axis=1)) / slope
    return estimate(high - steps, len(forward))


def _fermi(x: np.ndarray) -> np.ndarray:
    return (1 - np.tanh(x / 2)) / 2


def _checked(forward: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    forward, inverse = (np.asarray(r, dtype=np.float64) for r in (forward, inverse))
    if forward.ndim != 2 or inverse.ndim != 2 or len(forward) != len(inverse):
        raise ValueError(
            f"log-ratios have the shapes {forward.shape} and {inverse.shape}: [groups, frames], as many groups, are due"
        )
    for name, ratio in (("forward", forward), ("inverse", inverse)):
        if bad := int((np.isnan(ratio) | (ratio == np.inf)).sum()):
            raise ValueError(
                f"{bad} of {ratio.size} {name} log-ratios are NaN or +inf: use log_ratio, which makes them -inf"
            )
    return forward, inverse


# ---- weights ---------------------------------------------------------------------------------------------------------


def kish(log_weights: np.ndarray) -> float:
    """Effective sample size as a share of the samples, (Σw)² / (n Σw²). It does not see modes that no sample is in."""
    weights = relative_weights(log_weights)
    return float(weights.sum() ** 2 / (weights.size * np.square(weights).sum())) if weights.any() else 0.0


def max_weight(log_weights: np.ndarray) -> float:
    """The largest weight's share of them all; 1 where there is no weight at all."""
    return float(1 / max(1.0, relative_weights(log_weights).sum()))


def k_hat(log_weights: np.ndarray) -> float:
    """Shape of the generalised Pareto distribution that fits the largest weights: above 0.7 a weighted mean is not to
    be trusted, whatever its effective sample size says (Vehtari et al., JMLR 2024; fitted as by Zhang and Stephens,
    Technometrics 2009). 0 where the largest weights are equal; infinite where none is above 0; NaN of
    fewer than 25, whose tail is too short.
    """
    weights = np.sort(relative_weights(log_weights).ravel())
    if not weights.any():
        return math.inf
    tail = int(min(0.2 * weights.size, 3 * math.sqrt(weights.size)))
    if tail < 5:
        return math.nan
    excess = weights[-tail:] - weights[-tail - 1]
    if excess[-1] <= 1e-12:  # of the largest weight, 1
        return 0.0
    count = 30 + int(math.sqrt(tail))
    quarter = max(excess[(tail + 2) // 4 - 1], np.finfo(np.float64).tiny)
    theta = 1 / excess[-1] + (1 - np.sqrt(count / (np.arange(count) + 0.5))) / (3 * quarter)
    shape = np.log1p(-theta[:, None] * excess).mean(axis=1)
    log_likelihood = tail * (np.log(-theta / shape) - shape - 1)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    fitted = np.log1p(-(theta @ posterior / posterior.sum()) * excess).mean()
    return float((tail * fitted + TAIL_PRIOR * 0.5) / (tail + TAIL_PRIOR))


# ---- energies --------------------------------------------------------------------------------------------------------


def ensemble_slope(cold_energy: np.ndarray, hot_energy: np.ndarray, seed: int = 0) -> Estimate:
    """d ln(P_A / P_B) / dU in mol/kJ, which is -(b_A - b_B) if both are canonical (Shirts, JCTC 2013).

    Energies [G, n], kJ/mol, by group. The slope is the most likely one (logistic regression), so that no histogram has
    to be chosen.
    """
    cold, hot = np.asarray(cold_energy, dtype=np.float64), np.asarray(hot_energy, dtype=np.float64)
    energy = np.concatenate([cold, hot], axis=1)
    scale = energy.std()
    design = np.stack([np.ones_like(energy), (energy - energy.mean()) / scale], axis=-1)  # [G, n + m, 2]
    is_cold = np.arange(energy.shape[1]) < cold.shape[1]
    coefficients = np.zeros(2)
    for _ in range(30):  # Newton
        p = _fermi(-design @ coefficients)
        score = np.einsum("gnk,gn->gk", design, is_cold - p)
        information = np.einsum("gnk,gnl,gn->kl", design, design, p * (1 - p))
        coefficients = coefficients + np.linalg.solve(information, score.sum(axis=0))
    steps = resamples(len(cold), seed) @ np.linalg.solve(information, score.T).T  # of each resample, as in `bar`
    return estimate((coefficients + steps)[:, 1] / scale, len(cold))


def overlap(first: np.ndarray, second: np.ndarray, bins: int = 50) -> float:
    """Area that two histograms share, 0 to 1. The first's range sets the bins; what is outside it is not shared."""
    first, second = np.ravel(first), np.ravel(second)
    edges = np.linspace(first.min(), first.max(), bins + 1)
    shares = (np.histogram(values, edges)[0] / values.size for values in (first, second))
    return float(np.minimum(*shares).sum())
