from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.molecule.free_energy import (
    basin_free_energy,
    free_energy_error,
    plane,
    profile,
    total_variation,
)
from tasks.molecule.system import KB

GRID = (np.arange(3600) + 0.5) * (2 * math.pi / 3600) - math.pi
U = 4 * (1 - np.cos(GRID - 2.5)) + 2 * np.cos(2 * GRID)  # kJ/mol along the torsion: two basins, one of them at the seam
BINS = 36


def density(temperature: float) -> np.ndarray:
    p = np.exp(-U / (KB * temperature))
    return p / p.sum()


def sample(temperature: float, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Indices of GRID."""
    return np.random.default_rng(seed).choice(len(GRID), size=shape, p=density(temperature))


def exact(temperature: float) -> np.ndarray:
    return -KB * temperature * np.log(density(temperature).reshape(BINS, -1).sum(axis=1) * BINS)


def test_a_profile_is_that_of_its_density():
    found = profile(GRID[sample(300, (8, 5000), 0)], 300, bins=BINS)
    np.testing.assert_allclose(found.centers, GRID.reshape(BINS, -1).mean(axis=1))
    common = exact(300) < exact(300).min() + 8
    np.testing.assert_allclose(found.free_energy[common], exact(300)[common], atol=0.8)
    assert ((found.low <= found.free_energy) & (found.free_energy <= found.high)).all()
    uniform = profile(GRID[None], 300, bins=BINS)
    np.testing.assert_allclose(uniform.free_energy, 0, atol=1e-9)


def reweighted(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of 450 K, and what makes them ones of 300 K."""
    drawn = sample(450, (8, 2000), seed)
    return GRID[drawn], -U[drawn] * (1 / (KB * 300) - 1 / (KB * 450))


def test_bands_cover_the_truth_reweighted_or_not():
    covered = {"direct": [], "reweighted": [], "reweighted the wrong way": []}
    truth = exact(300)
    for seed in range(40):
        angles, log_weights = reweighted(seed)
        for name, args in (
            ("direct", (GRID[sample(300, (8, 2000), 1000 + seed)], 300)),
            ("reweighted", (angles, 300, log_weights)),
            ("reweighted the wrong way", (angles, 300, -log_weights)),
        ):
            found = profile(*args, bins=BINS)
            covered[name].append((found.low <= truth) & (truth <= found.high))
    assert 0.92 < np.mean(covered["direct"]) < 0.98
    assert 0.92 < np.mean(covered["reweighted"]) < 0.98
    assert np.mean(covered["reweighted the wrong way"]) < 0.4


def test_a_band_over_groups_is_wider_than_one_over_frames_where_frames_repeat():
    few = GRID[sample(300, (8, 40), 1)]
    repeated = np.repeat(few, 50, axis=1)
    by_group = profile(repeated, 300, bins=6)
    by_frame = profile(
        repeated.reshape(-1, 1)[np.random.default_rng(2).permutation(16000)].reshape(100, 160), 300, bins=6
    )
    np.testing.assert_allclose(by_group.free_energy, by_frame.free_energy)
    assert np.median((by_group.high - by_group.low) / (by_frame.high - by_frame.low)) > 4


def test_the_seam_is_no_place_of_its_own():
    angles = GRID[sample(300, (4, 500), 3)]
    turned = profile(angles + 2 * math.pi, 300, bins=BINS)
    np.testing.assert_array_equal(turned.free_energy, profile(angles, 300, bins=BINS).free_energy)
    at_the_seam = profile(np.array([[math.pi, -math.pi, math.pi - 1e-9]]), 300, bins=4).free_energy
    assert np.isfinite(at_the_seam).tolist() == [True, False, False, True]


def test_a_plane_has_the_profiles_as_its_margins():
    phi, psi = GRID[sample(300, (4, 2000), 4)], GRID[sample(450, (4, 2000), 5)]
    energy = plane(phi, psi, 300, bins=BINS)
    density = np.exp(-energy / (KB * 300)) / BINS**2
    assert density.sum() == pytest.approx(1)
    margin = -KB * 300 * np.log(density.sum(axis=1) * BINS)
    np.testing.assert_allclose(margin, profile(phi, 300, bins=BINS).free_energy)
    assert np.abs(margin - profile(psi, 300, bins=BINS).free_energy).max() > 0.5


def test_errors_of_a_profile_stop_at_the_limit():
    truth = np.array([0.0, 3.0, 14.0, 16.0])
    assert free_energy_error(np.array([0.5, 3.0, 12.0, 99.0]), truth) == (2.0, pytest.approx(2.5 / 3))
    assert free_energy_error(np.array([0.0, 3.0, np.inf, 0.0]), truth) == (1.0, pytest.approx(1 / 3))
    assert free_energy_error(truth - 5, truth - 5) == (0.0, 0.0)


def test_the_free_energy_of_a_basin():
    inside = np.abs(GRID - math.pi / 3) < math.pi / 3
    share = density(300)[inside].sum()
    truth = -KB * 300 * math.log(share / (1 - share))
    direct = basin_free_energy(GRID[sample(300, (8, 2000), 6)], 300)
    assert direct.low < truth < direct.high and direct.error < 0.1
    angles, log_weights = reweighted(7)
    assert basin_free_energy(angles, 300, log_weights).value == pytest.approx(truth, abs=0.3)
    nowhere = basin_free_energy(np.full((3, 10), -1.0), 300)
    assert nowhere.value == np.inf


def test_total_variation_on_the_torus():
    rng = np.random.default_rng(8)
    near = [rng.normal(math.pi, 0.1, (2, 3000)) for _ in range(2)]  # over the seam
    again = [angle - 2 * math.pi for angle in near]
    assert total_variation(near, again) == 0
    assert total_variation(near, [angle + 2 for angle in near]) == 1
    half = [np.where(np.arange(3000) < 1500, angle, angle + 2) for angle in near]
    assert total_variation(near, half, bins=10) == pytest.approx(0.5, abs=0.02)
    weights = np.where(np.arange(3000) < 1500, 0.0, -np.inf) + np.zeros((2, 1))
    kept = [angle[:, :1500] for angle in near]
    assert total_variation(half, kept, weights) == pytest.approx(0)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one each is due"):
        profile(np.zeros((2, 3)), 300, np.zeros(3))


def test_frames_without_an_angle_or_a_weight_are_left_out():
    angles = GRID[sample(300, (3, 200), 9)]
    torn = np.concatenate([angles, np.full((3, 5), np.nan), angles[:, :50] + 1], axis=1)
    log_weights = np.zeros_like(torn)
    log_weights[:, 205:] = -np.inf
    for found, kept in zip(profile(torn, 300, log_weights), profile(angles, 300), strict=True):
        np.testing.assert_array_equal(found, kept)
    basins = [basin_free_energy(angles, 300), basin_free_energy(torn, 300, log_weights)]
    assert basins[0] == basins[1]
    assert np.isinf(profile(angles, 300, np.full_like(angles, -np.inf)).free_energy).all()
