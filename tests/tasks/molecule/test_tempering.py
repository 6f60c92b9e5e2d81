from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tasks.molecule.system import KB, beta
from tasks.molecule.tempering import RoundTrips, Tempering, propose_swap
from tests.tasks.molecule.wells import MASSES, Wells, not_normal, seeded

COLD, HOT = 300.0, 450.0
WELLS = Wells(2000.0, 40000.0)  # six degrees of freedom


def scaling(x, t_from, t_to):
    """The map that takes a harmonic well from one temperature to another exactly."""
    factor = math.sqrt(t_to / t_from)
    return factor * x, torch.full((len(x),), x[0].numel() * math.log(factor), dtype=x.dtype)


def bend(x, t_from, t_to):
    """Some invertible map, whose determinant is another at each place: x -> s sinh(c asinh(x / s))."""
    s, c = 0.05, (t_to / t_from) ** 0.4
    bent = c * (x / s).asinh()
    return s * bent.sinh(), (c * bent.cosh() / (1 + (x / s).square()).sqrt()).log().sum((-2, -1))


def forgetful(x, t_from, t_to):
    return scaling(x, t_from, t_to)[0], torch.zeros(len(x), dtype=x.dtype)


def exact_pairs(count, seed=0):
    x, y = (WELLS.sample(kelvin, (count,), seeded(seed + i)) for i, kelvin in enumerate((COLD, HOT)))
    return x, y, WELLS(x), WELLS(y)


def accepted(log_ratio):
    return float(log_ratio.clamp(max=0).exp().mean())


def expected_acceptance(steps=400):
    """Of plain swaps: E min(1, exp((b_A - b_B)(U_x - U_y))) for U of Gamma(3) in units of k T, by quadrature."""
    u = (np.arange(steps) + 0.5) * 30 / steps
    weight = u**2 * np.exp(-u) / 2 * 30 / steps
    ratio = beta(COLD) / beta(HOT)
    delta = (1 - 1 / ratio) * u[:, None] + (1 - ratio) * u[None]
    return float((weight[:, None] * weight * np.exp(np.minimum(delta, 0))).sum())


def test_plain_swaps_of_wells_are_accepted_as_theory_says():
    states = exact_pairs(20000)
    log_ratio = propose_swap(WELLS, *states, (COLD, HOT)).log_ratio
    assert log_ratio.dtype == torch.float64
    assert abs(accepted(log_ratio) - expected_acceptance()) < 0.01  # four standard errors
    assert abs(accepted(-log_ratio) - expected_acceptance()) > 0.1  # the original's sign
    # Detailed balance in the mean: a forward move is as frequent as its way back.
    assert abs(float((log_ratio.clamp(max=0).exp() * log_ratio.sign()).mean())) < 0.02


def test_the_scaling_map_always_swaps_wells():
    swap = propose_swap(WELLS, *exact_pairs(100), (COLD, HOT), scaling)
    assert swap.log_ratio.abs().max() < 1e-12
    # The control: one determinant forgotten is seen (of both it would not be: here they cancel).
    one_sided = lambda x, a, b: scaling(x, a, b) if b > a else forgetful(x, a, b)
    assert propose_swap(WELLS, *exact_pairs(100), (COLD, HOT), one_sided).log_ratio.min() > 1


@pytest.mark.parametrize("transport", [None, scaling, bend])
def test_a_swap_undoes_itself_and_its_ratio_is_antisymmetric(transport):
    x, y, *energies = exact_pairs(50)
    there = propose_swap(WELLS, x, y, *energies, (COLD, HOT), transport)
    back = propose_swap(WELLS, *there[1:], (COLD, HOT), transport)
    torch.testing.assert_close(back.cold, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(back.hot, y, rtol=0, atol=1e-14)
    torch.testing.assert_close(back.log_ratio, -there.log_ratio, rtol=0, atol=1e-11)
    torch.testing.assert_close(there.hot_energy, WELLS(there.hot), rtol=1e-12, atol=0)


def tempering(x, seed=0, kelvin=(COLD, HOT), potential=WELLS, **settings):
    settings = {"steps": 3, "dt": 0.005, "friction": 10.0} | settings
    return Tempering(potential, MASSES, kelvin, x, generator=seeded(seed), **settings)


@pytest.mark.parametrize(
    ("transport", "exact"),
    [(None, True), (scaling, True), (bend, True), (lambda x, a, b: (1.2 * x, scaling(x, a, b)[1]), False)],
    ids=["plain", "scaled", "bent", "control: no inverse"],
)
def test_tempering_keeps_exact_starts(transport, exact):
    kelvin = torch.tensor([COLD, HOT])
    run = tempering(WELLS.sample(kelvin, (1500, 2), seeded(5)), transport=transport)
    for _ in range(12):
        run.cycle()
    found = [
        not_normal(run.x[:, k, i], s) for k in (0, 1) for i, s in enumerate((KB * kelvin[k] / WELLS.stiffness).sqrt())
    ]
    assert (max(found) < 1.95) == exact
    torch.testing.assert_close(run.energies, WELLS(run.x), rtol=1e-12, atol=0)


def test_even_and_odd_pairs_take_turns_and_groups_stay_apart():
    kelvin = (300.0, 330.0, 360.0, 390.0)
    x = WELLS.sample(torch.tensor(kelvin), (2, 4), seeded())
    run = tempering(x, kelvin=kelvin, transport=scaling, steps=1)
    seen = []
    for _ in range(4):
        run.cycle()
        seen.append(run.labels[0].tolist())
    assert seen == [[1, 0, 3, 2], [1, 3, 0, 2], [3, 1, 2, 0], [3, 2, 1, 0]]  # the map is exact: every swap is taken
    np.testing.assert_allclose(run.acceptance, 1, atol=1e-9)
    apart = tempering(torch.cat([x[:1], torch.full_like(x[:1], 1e3)]), kelvin=kelvin, steps=1)
    apart.cycle()
    assert apart.x[0].abs().max() < 10 and apart.x[1].abs().min() > 100


def test_what_moves_gets_new_velocities_and_what_stays_keeps_its_own():
    run = tempering(WELLS.sample(torch.tensor([COLD, HOT]), (4000, 2), seeded(1)), steps=0)
    run.v = torch.full_like(run.v, 7.0)
    run.cycle()
    moved = run.labels[:, 0] == 1
    assert 0.2 < moved.double().mean() < 0.9
    assert (run.v[~moved] == 7).all()
    for place, kelvin in enumerate((COLD, HOT)):
        assert not_normal(run.v[moved, place, 1], math.sqrt(KB * kelvin / MASSES[1])) < 1.95


def test_energy_calls_are_those_that_were_made():
    class Counted(Wells):
        def __call__(self, x):
            self.calls += x.shape[:-2].numel()
            return super().__call__(x)

        def energy_and_forces(self, x):
            self.calls += x.shape[:-2].numel()
            return Wells.__call__(self, x), -self.stiffness * x

    for transport in (None, scaling):
        potential = Counted(2000.0, 40000.0)
        run = tempering(
            WELLS.sample(COLD, (5, 3), seeded()), kelvin=(300, 400, 500), potential=potential, transport=transport
        )
        for _ in range(3):
            run.cycle()
        assert run.energy_calls == potential.calls


def test_a_map_that_makes_no_numbers_is_refused_by_the_rule():
    run = tempering(
        WELLS.sample(COLD, (5, 2), seeded()), transport=lambda x, a, b: (x * torch.nan, torch.zeros(len(x)))
    )
    run.cycle()
    assert run.x.isfinite().all() and (run.labels == torch.arange(2)).all() and run.acceptance == 0


def test_round_trips_of_a_history_told_by_hand():
    places = ["abc", "bac", "bca", "cba", "cab", "acb", "abc", "bac", "abc"]
    history = torch.tensor([[["abc".index(replica) for replica in row]] for row in places])
    trips = RoundTrips(history[0])
    counts = []
    for labels in history[1:]:
        trips.visit(labels)
        counts.append(trips.count)
    # a is home at the sixth place, b at the eighth; c was hottest before it was ever coldest, and again at the end.
    assert counts == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("kelvin", "shape", "problem"),
    [
        ((450.0, 300.0), (2, 2), "coldest first"),
        ((300.0, 300.0), (2, 2), "coldest first"),
        ((300.0,), (2, 1), "two or more"),
        ((300.0, 450.0), (2, 3), r"\[groups, 2 temperatures, N, 3\]"),
    ],
)
def test_settings_that_cannot_be(kelvin, shape, problem):
    with pytest.raises(ValueError, match=problem):
        tempering(torch.zeros(*shape, 2, 3), kelvin=kelvin)
