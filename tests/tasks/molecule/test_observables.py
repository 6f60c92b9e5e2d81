from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tasks.molecule.estimates import Z95, estimate, over_groups, resamples, student, tau_int
from tasks.molecule.observables import (
    acceptance_across,
    acceptance_and_validity,
    acceptance_bound,
    bar,
    dihedral,
    ensemble_slope,
    k_hat,
    kish,
    log_ratio,
    max_weight,
    overlap,
    pair_means,
    swap_scores,
)
from tasks.molecule.system import beta

COLD, HOT = beta(300.0), beta(450.0)


def gaussian(gap: float, groups: int = 8, frames: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratios of an exact map whose Δ is Gaussian: by the identity of the validity test its variance is twice the
    mean, with the other sign."""
    normal = np.random.default_rng(seed).standard_normal((2, groups, frames))
    return tuple(math.sqrt(gap) * normal - gap / 2)


def wells(
    k_cold: float, k_hot: float, scale: float, groups: int = 8, frames: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratios of x -> scale · x between exact samples of k_cold x²/2 and k_hot x²/2 (three dimensions, energies in
    units of kT)."""
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((groups, frames, 3)) / math.sqrt(k) for k in (k_cold, k_hot))
    energy = lambda k, z: k * np.square(z).sum(-1) / 2
    logdet = 3 * math.log(scale)
    forward = log_ratio(1, energy(k_cold, x), 1, energy(k_hot, x * scale), logdet)
    return forward, log_ratio(1, energy(k_hot, y), 1, energy(k_cold, y / scale), -logdet)


# ---- swaps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.07, 0.543, 4.79])
def test_scores_of_a_gaussian_ratio_are_known(gap):
    scores = swap_scores(*gaussian(gap))
    assert scores["gap"] == pytest.approx(gap, abs=4 * scores["gap_se"])
    assert scores["kl_forward"] + scores["kl_inverse"] == pytest.approx(scores["gap"])
    assert scores["acceptance_low"] < math.erfc(math.sqrt(gap) / 2) < scores["acceptance_high"]
    assert scores["acceptance_bound"] < scores["acceptance"]
    assert abs(scores["validity"]) < 4 * scores["validity_se"]
    if gap < 1:  # the variance of the weights is finite but, at 4.79, far from being seen
        assert scores["ess_forward"] == pytest.approx(math.exp(-gap), rel=0.05)
        assert scores["ess_inverse"] == pytest.approx(math.exp(-gap), rel=0.05)


def test_the_bound_is_that_of_the_formula():
    assert acceptance_bound(0.543) == pytest.approx(0.503, abs=5e-4)
    assert acceptance_bound(4.79) == pytest.approx(0.0153, abs=2e-4)
    for gap in (1e-9, 0.07, 1.0, 20.0):
        u = 1 - acceptance_bound(gap)
        assert 2 * u * math.atanh(u) == pytest.approx(gap, rel=1e-4)
    assert acceptance_bound(0.0) == acceptance_bound(-0.01) == 1.0
    assert acceptance_bound(math.inf) == 0.0


def test_the_bound_is_reached_where_all_pairs_are_alike():
    """Δ = ±d, with the odds exp d that the validity identity asks for: Jensen's inequality is an equality."""
    d = 0.8
    share = 1 / (1 + math.exp(-d))  # of the pairs with -d
    gap, acceptance = d * (2 * share - 1), share * math.exp(-d) + 1 - share
    assert acceptance_bound(gap) == pytest.approx(acceptance, rel=1e-9)


def test_sorted_sums_are_those_of_the_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    forward, inverse = 3 * rng.standard_normal((3, 17)), 3 * rng.standard_normal((2, 23)) - 1
    forward[0, :4], inverse[1, :4] = [-np.inf, 700, -800, 0.5], [-np.inf, -0.5, -700, 900]  # ties, and what overflows
    accepted, signed = pair_means(forward, inverse)
    with np.errstate(over="ignore"):
        for g, h in np.ndindex(3, 2):
            delta = forward[g][:, None] + inverse[h]
            chance = np.minimum(1, np.exp(delta))
            assert accepted[g, h] == pytest.approx(chance.mean(), rel=1e-13)
            assert signed[g, h] == pytest.approx((chance * np.sign(delta)).mean(), rel=1e-12)


@pytest.mark.parametrize("error", [0.3, -0.3])
def test_validity_sees_a_log_determinant_that_is_off(error):
    forward, inverse = gaussian(0.543)
    _, exact = acceptance_and_validity(forward, inverse)
    _, off = acceptance_and_validity(forward + error, inverse + error)
    assert exact.low < 0 < exact.high
    assert off.value * math.copysign(1, error) > 0.14 and abs(off.value) > 20 * off.error


def test_an_exact_map_between_two_wells_is_always_accepted_and_others_are_valid():
    exact = swap_scores(*wells(1.0, 0.25, scale=2.0))
    assert exact["gap"] == pytest.approx(0, abs=1e-12) and exact["acceptance"] == pytest.approx(1, abs=1e-12)
    assert exact["ess_forward"] == pytest.approx(1) and exact["k_hat"] == 0.0
    plain = swap_scores(*wells(1.0, 0.25, scale=1.0))
    assert plain["gap"] > 0.5 and abs(plain["validity"]) < 3 * plain["validity_se"]
    assert plain["acceptance_bound"] < plain["acceptance_high"] < 0.75


def test_bar_finds_the_free_energy_difference_of_two_wells():
    """f_B - f_A = 3/2 ln(k_B / k_A), whatever the map; exactly so with the exact map."""
    truth = 1.5 * math.log(0.25)
    assert bar(*wells(1.0, 0.25, scale=2.0)).value == pytest.approx(truth, abs=1e-12)
    plain = bar(*wells(1.0, 0.25, scale=1.0))
    assert plain.low < truth < plain.high and 0.003 < plain.error < 0.05
    forward, inverse = wells(1.0, 0.25, scale=1.3)
    uneven = bar(forward[:, :300], inverse)
    assert uneven.low < truth < uneven.high
    torn = np.where(
        np.arange(2000) < 2, [[-1e200], *[[-np.inf]] * 7], forward
    )  # as the rest is not, it does not matter
    assert bar(torn, inverse).value == pytest.approx(bar(forward, inverse).value, abs=5e-3)
    one_sided = -np.log(np.exp(forward).mean())  # exponential averaging, which must agree
    assert one_sided == pytest.approx(truth, abs=0.05)


def test_errors_are_how_far_the_numbers_vary():
    found = []
    for seed in range(80):
        forward, inverse = gaussian(1.0, frames=50, seed=seed)
        found.append((*acceptance_and_validity(forward, inverse), bar(forward, inverse)))
    values, errors = (np.array([[of[k] for of in row] for row in found]) for k in (0, 1))
    np.testing.assert_allclose(errors.mean(axis=0), values.std(axis=0, ddof=1), rtol=0.25)


def test_frames_that_a_map_tears_apart_are_never_accepted():
    energy, mapped = np.zeros(4), np.array([1.0, np.nan, np.inf, 1e300])
    ratio = log_ratio(COLD, energy, HOT, mapped, np.array([0.5, 0, 0, 0]))
    assert ratio[0] == pytest.approx(0.5 - HOT) and np.isneginf(ratio[1:3]).all()
    scores = swap_scores(ratio[None], np.zeros((1, 3)))
    assert scores["acceptance"] == pytest.approx(0.25) and scores["gap"] > 1e299 and scores["acceptance_bound"] == 0
    with pytest.raises(ValueError, match="1 of 2 frames of the data have no finite energy"):
        log_ratio(COLD, np.array([0, np.nan]), HOT, energy[:2], 0.0)
    with pytest.raises(ValueError, match="2 of 4 forward log-ratios are NaN or"):
        swap_scores(np.array([[0, np.nan, np.inf, 0]]), np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"\[groups, frames\]"):
        swap_scores(np.zeros((2, 4)), np.zeros((3, 4)))


def test_scores_of_a_map_that_tears_all_frames_apart():
    nothing = swap_scores(np.full((2, 30), -np.inf), np.zeros((2, 30)))
    assert nothing["gap"] == np.inf and nothing["acceptance"] == nothing["ess_forward"] == 0
    assert nothing["max_weight"] == 1 and nothing["k_hat"] == np.inf and math.isnan(nothing["free_energy_difference"])


def test_acceptance_across_counts_the_pairs_between_a_basin_and_the_rest():
    rng = np.random.default_rng(2)
    forward, inverse = rng.standard_normal((2, 2, 30)) - 0.5
    cold, hot = rng.random((2, 2, 30)) < 0.3
    chance = np.minimum(1, np.exp(forward.ravel()[:, None] + inverse.ravel()))
    between = cold.ravel()[:, None] != hot.ravel()
    assert acceptance_across(forward, inverse, cold, hot) == pytest.approx(chance[between].mean())
    assert math.isnan(acceptance_across(forward, inverse, cold | True, hot | True))


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_kish_and_the_largest_weight():
    log_weights = np.log([[3.0, 1.0], [1.0, 1.0]])
    assert kish(log_weights) == pytest.approx(36 / (4 * 12)) and max_weight(log_weights) == pytest.approx(0.5)
    assert kish(np.full(10, 1e6)) == 1.0
    assert kish(np.array([0, *[-np.inf] * 9])) == pytest.approx(0.1)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_is_the_shape_of_a_pareto_tail(shape):
    """exp(shape · Exponential) has a tail of exactly that shape."""
    draws = np.random.default_rng(3).exponential(size=(10, 4000))
    found = [k_hat(shape * draw) for draw in draws]
    assert np.mean(found) == pytest.approx(shape, abs=0.06)


def test_k_hat_of_weights_without_a_heavy_tail():
    rng = np.random.default_rng(4)
    assert k_hat(np.log(rng.random(4000))) < -0.5
    few = [
        k_hat(np.log(rng.random(100))) for _ in range(50)
    ]  # 20 in the tail: -0.9 as fitted, were it not for the prior
    assert np.mean(few) == pytest.approx((20 * -0.9 + 10 * 0.5) / 30, abs=0.07)
    assert k_hat(np.zeros(100)) == 0.0
    assert math.isnan(k_hat(rng.standard_normal(24)))
    assert k_hat(np.concatenate([np.zeros(99), [50.0]])) > 0.7


# ---- energies and torsions -------------------------------------------------------------------------------------------


def canonical(temperature: float, seed: int) -> np.ndarray:
    """Energies of 30 harmonic degrees of freedom, [groups, frames] in kJ/mol."""
    return np.random.default_rng(seed).gamma(15, 1 / beta(temperature), (8, 1000))


def test_the_ensemble_check_knows_the_temperatures():
    right = ensemble_slope(canonical(300, 5), canonical(450, 6))
    assert right.low < -(COLD - HOT) < right.high and right.error < 0.01
    wrong = ensemble_slope(canonical(300, 5), canonical(500, 6))
    assert abs(wrong.value + (COLD - HOT)) > 4 * wrong.error


def test_overlap_of_histograms():
    flat = np.linspace(0, 1, 1001)
    assert overlap(flat, flat) == 1.0
    assert overlap(flat, flat + 0.5) == pytest.approx(0.5, abs=0.01)
    assert overlap(flat, np.where(flat < 0.1, 1e9, flat)) == pytest.approx(0.9, abs=0.01)


def test_dihedral_is_positive_clockwise():
    """Newman projection: from the front atom, the far bond is turned clockwise by the angle."""
    for degrees in (-179.0, -60.0, 0.0, 35.0, 180.0):
        angle = math.radians(degrees)
        # Seen along +z, from below, x to the right and y down: clockwise is from x to y.
        x = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [math.cos(angle), math.sin(angle), 1]]) * 0.15
        assert dihedral(x, (0, 1, 2, 3)).item() == pytest.approx(angle, abs=1e-6)
        assert dihedral(x[[3, 2, 1, 0]], (0, 1, 2, 3)).item() == pytest.approx(angle, abs=1e-6)


def test_dihedral_is_that_of_mdtraj():
    mdtraj = pytest.importorskip("mdtraj")
    x = torch.randn(50, 6, 3, generator=torch.Generator().manual_seed(7))
    trajectory = mdtraj.Trajectory(x.numpy(), None)
    theirs = mdtraj.compute_dihedrals(trajectory, [[4, 0, 5, 2]], opt=False)[:, 0]
    np.testing.assert_allclose(dihedral(x, (4, 0, 5, 2)).numpy(), theirs, atol=1e-5)


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 12])
def test_intervals_of_few_groups_cover_the_truth(groups):
    draws = np.random.default_rng(8).standard_normal((300, groups))
    inside = [found.low < 0 < found.high for found in map(over_groups, draws)]
    assert 0.91 < np.mean(inside) < 0.99
    plain = [np.quantile(resamples(groups)[1:] @ draw / groups, [0.025, 0.975]) for draw in draws]
    assert np.mean([low < 0 < high for low, high in plain]) < np.mean(inside) - 0.02


def test_groups_not_frames_are_resampled():
    """Frames that repeat each other 50 times say no more than one of them: a bootstrap over them believes otherwise."""
    means = np.random.default_rng(9).standard_normal(10)
    frames = np.repeat(means, 50)
    by_group, by_frame = over_groups(means), over_groups(frames)
    assert by_group.error == pytest.approx(means.std(ddof=1) / math.sqrt(10), rel=0.1)
    assert by_group.high - by_group.low > 6 * (by_frame.high - by_frame.low)


def test_one_group_knows_no_interval():
    found = over_groups(np.array([1.5]))
    assert found.value == 1.5 and np.isnan(found[1:]).all()
    assert math.isnan(swap_scores(*gaussian(0.5, groups=1))["gap_se"])


def test_an_interval_may_end_at_infinity():
    samples = np.concatenate([[[2.0, np.inf]], np.full((900, 2), 2.0), np.full((100, 2), np.inf)])
    found = estimate(samples, 5)
    assert found.low.tolist() == [2.0, np.inf] and found.high.tolist() == [np.inf, np.inf]


def test_students_quantiles():
    for degrees, quantile in ((1, 12.706), (9, 2.262), (10, 2.2281), (30, 2.0423), (10_000, Z95)):
        assert student(degrees) == pytest.approx(quantile, abs=3e-3)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_tau_int_of_an_autoregressive_series(memory):
    """τ = (1 + a) / (1 - a) / 2 for x_t = a x_{t-1} + noise."""
    rng = np.random.default_rng(10)
    noise = rng.standard_normal((8, 4000)) * math.sqrt(1 - memory**2)
    x = np.empty_like(noise)
    x[:, 0] = rng.standard_normal(8)
    for t in range(1, 4000):
        x[:, t] = memory * x[:, t - 1] + noise[:, t]
    truth = (1 + memory) / (1 - memory) / 2
    assert tau_int(x) == pytest.approx(truth, rel=0.12)
    assert tau_int(np.exp(1j * 0.1 * x)) == pytest.approx(truth, rel=0.15)


def test_tau_int_sees_what_moves_only_between_groups():
    """The autocorrelations are of the whole, and of series that end where they end: no end follows on a beginning."""
    walks = np.cumsum(np.random.default_rng(12).standard_normal((3, 40)), axis=1)
    centred = walks - walks.mean()
    lags = np.array([(centred[:, : 40 - t] * centred[:, t:]).mean() for t in range(40)])
    tau = np.cumsum(lags / lags[0]) - 0.5
    assert tau_int(walks) == pytest.approx(next((x for t, x in enumerate(tau) if t >= 5 * x), tau[-1]))
    stuck = np.sign(np.arange(8) - 3.5)[:, None] + 0.1 * np.random.default_rng(11).standard_normal((8, 500))
    assert tau_int(stuck) > 50
    assert tau_int(np.ones((2, 10))) == 0.5
