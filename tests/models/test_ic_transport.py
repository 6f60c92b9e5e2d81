"""ICSplineTransport: the √T map that it starts as, its circles, and what it leaves of a molecule."""

import math

import pytest
import torch

from models.internal_coordinates import wrap
from tasks.molecule.system import is_l
from tests.models.tiny_molecules import COORDINATES, SYSTEM, build, frames

SOFT = [20 + 21 + k for k in SYSTEM.soft]


def coordinates(x):
    """[B, 60] float64."""
    return torch.cat(COORDINATES(x)[:3], 1)


def difference(q, other):
    """Of coordinates, the short way round for dihedrals."""
    return torch.cat([(q - other)[:, :41], wrap((q - other)[:, 41:])], 1)


def moments(x):
    """Mean and deviation, by unit vectors for dihedrals."""
    q = coordinates(x)
    middle = torch.cat(
        [q[:, :41].mean(0), torch.view_as_complex(torch.stack([q.cos(), q.sin()], -1)).mean(0).angle()[41:]]
    )
    deviation = difference(q, middle)
    return middle + deviation.mean(0), deviation.std(0)


@pytest.mark.parametrize("num_couplings", [0, 4])
@pytest.mark.parametrize(("t_from", "t_to"), [(300.0, 450.0), (450.0, 300.0), (450.0, 600.0)])
def test_before_it_learns_it_is_the_square_root_map(num_couplings, t_from, t_to):
    model, x = build("ic", num_couplings=num_couplings), frames(seed=3)
    cold, hot = frames(64, seed=1, turning=0.5), frames(64, seed=2, hotter=1.3, turning=0.5)
    mean, drift = moments(cold)[0], difference(moments(hot)[0][None], moments(cold)[0][None])[0]
    source, target = (mean + (t - 300) / 150 * drift for t in (t_from, t_to))
    expected = target + math.sqrt(t_to / t_from) * difference(coordinates(x), source)
    expected[:, SOFT] = coordinates(x)[:, SOFT]
    y, logdet = model.transport(x, t_from, t_to)
    assert difference(coordinates(y), expected).abs().max() < 1e-10
    volume = COORDINATES(y).log_volume - COORDINATES(x).log_volume
    torch.testing.assert_close(logdet, volume + 55 / 2 * math.log(t_to / t_from))


def test_a_scale_of_the_data_in_place_of_the_square_root():
    model = build("ic", num_couplings=0)
    assert sum(p.numel() for p in model.parameters()) == 0
    cold, hot = frames(64, seed=1, turning=0.5), frames(64, seed=2, hotter=1.3, turning=0.5)
    model.set_means(cold, hot, fit_scale=True)
    (mean, deviation), (hot_mean, hot_deviation) = moments(cold), moments(hot)
    expected = hot_mean + hot_deviation / deviation * difference(coordinates(cold), mean)
    expected[:, SOFT] = coordinates(cold)[:, SOFT]
    assert difference(coordinates(model.transport(cold, 300.0, 450.0)[0]), expected).abs().max() < 1e-10


def test_the_hand_of_a_molecule_is_kept():
    model, x = build("ic", moved=0.05), frames(64, seed=3)
    y, logdet = model.transport(x, 300.0, 450.0)
    assert is_l(x).all() and is_l(y[logdet.isfinite()]).all() and logdet.isfinite().float().mean() > 0.9


@pytest.mark.parametrize("seam", [0.0, math.pi])
def test_a_soft_dihedral_goes_round_without_a_step(seam):
    """Two shapes just left and right of where a circle's ends meet are mapped to such two, with one slope."""
    model, x = build("ic", moved=0.05, num_couplings=8), frames(1, seed=3)
    q = COORDINATES(x)
    for k in SYSTEM.soft:
        images, slopes = [], []
        for side in (-1e-7, 1e-7):
            dihedrals = q.dihedrals.clone()
            dihedrals[:, k] = (seam + side) - 2 * math.pi * (seam + side > math.pi)
            shape, _ = COORDINATES.inverse(q.bonds, q.angles, dihedrals)
            y, logdet = model.transport(shape, 300.0, 450.0)
            images.append(coordinates(y))
            slopes.append(logdet)
        assert difference(*images).abs().max() < 1e-4
        torch.testing.assert_close(*slopes, atol=1e-4, rtol=0)


def test_a_dihedral_that_would_overtake_itself_has_no_image():
    """Half way round from its mean a stiff dihedral cannot be scaled up: it would land on the image of another."""
    model, x = build("ic"), frames(2, seed=3)
    q = COORDINATES(x)
    stiff = next(k for k in range(19) if k not in SYSTEM.soft + SYSTEM.flips)
    q.dihedrals[0, stiff] = wrap(model.mean[41 + stiff] + 3.0)
    shape, _ = COORDINATES.inverse(*q[:3])
    logdet = model.transport(shape, 300.0, 450.0)[1]
    assert logdet[0] == -math.inf and logdet[1].isfinite()
    assert model.transport(shape, 450.0, 300.0)[1].isfinite().all()


def test_a_peptide_bond_stays_trans_or_cis():
    """Its deviations from either state are scaled alike, and the couplings know which of them it is in."""
    model, (x, cis) = build("ic", num_couplings=0), (frames(8, seed=3, cis=cis) for cis in (False, True))
    (y, logdet), (y_cis, logdet_cis) = model.transport(x, 300.0, 450.0), model.transport(cis, 300.0, 450.0)
    turned = difference(coordinates(cis), coordinates(x))
    assert turned.abs().sum() == pytest.approx(8 * math.pi)
    assert difference(coordinates(y_cis), coordinates(y) + turned).abs().max() < 1e-6
    torch.testing.assert_close(logdet_cis - logdet, torch.zeros(8, dtype=torch.float64), atol=1e-9, rtol=0)
    model = build("ic", moved=0.05)
    y, y_cis = (coordinates(model.transport(shape, 300.0, 450.0)[0]) for shape in (x, cis))
    known = difference(y_cis, y + turned).abs().amax(1)
    assert (known[turned.abs().amax(1) < 1e-6] < 1e-6).all() and (known[turned.abs().amax(1) > 1] > 1e-3).all()


def test_a_peptide_bond_that_would_turn_over_has_no_image():
    model, x = build("ic"), frames(2, seed=3)
    q = COORDINATES(x)
    k = SYSTEM.flips[0]
    q.dihedrals[:, k] = wrap(model.mean[41 + k] + torch.tensor([1.5, 1.2]))  # by 1.22: 1.84 and 1.47
    shape, _ = COORDINATES.inverse(*q[:3])
    assert model.transport(shape, 300.0, 450.0)[1].isfinite().tolist() == [False, True]
    assert model.transport(shape, 450.0, 300.0)[1].isfinite().all()


def test_couplings_move_every_coordinate_by_others():
    model = build("ic", moved=0.05)
    moved = torch.cat([coupling.moved for coupling in model.couplings])
    assert torch.equal(moved.bincount(minlength=60), torch.full((60,), 2))
    z = torch.randn(1, 60, dtype=torch.float64, requires_grad=True)
    for coupling in model.couplings:
        (seen,) = torch.autograd.grad(coupling._knots(z, z.new_zeros(1, len(SYSTEM.flips)), 1.0).sum(), z)
        others = torch.ones(60, dtype=torch.bool)
        others[coupling.moved] = False
        assert torch.equal(seen[0] != 0, others)
