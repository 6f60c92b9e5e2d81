from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tasks.molecule.dynamics import draw_velocities, flip, ghmc, hmc, langevin
from tasks.molecule.system import KB
from tests.tasks.molecule.wells import MASSES, Wells, not_normal, seeded

KELVIN = 300.0
WELLS = Wells(2000.0, 40000.0)  # the light particle has omega = 45 / ps, the heavy one 50 / ps: stable below 0.04 ps
STDS = (KB * KELVIN / WELLS.stiffness).sqrt().flatten().tolist()


def start(count, seed=0, dtype=torch.float64):
    generator = seeded(seed)
    x = WELLS.sample(KELVIN, (count,), generator).to(dtype)
    return x, draw_velocities(MASSES, KELVIN, (count,), generator, dtype), generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baoab_keeps_positions_exact_in_a_well_at_large_steps(dtype):
    """At omega dt = 1, where the error of other splittings is a quarter of the variance."""
    x, v, generator = start(1500, dtype=dtype)
    x, v = langevin(WELLS, MASSES, 3 * x, v, KELVIN, 60, dt=0.02, friction=20.0, generator=generator)
    assert x.dtype == dtype
    for atom, std in enumerate(STDS):
        assert not_normal(x[:, atom], std) < 1.95
    # The control: velocities, which BAOAB does not keep exact, are seen to be off by the same test.
    assert not_normal(v[:, 1], math.sqrt(KB * KELVIN / MASSES[1])) > 1.95


def test_velocities_take_up_each_conformations_own_temperature():
    kelvin = torch.tensor([300.0, 900.0])
    x, _, generator = start(4000)
    x = x.view(2000, 2, 2, 3)
    x, v = langevin(WELLS, MASSES, x, torch.zeros_like(x), kelvin, 60, dt=0.005, friction=20.0, generator=generator)
    found = (v.square() * torch.tensor(MASSES)[:, None]).mean((0, 2, 3)) / KB
    np.testing.assert_allclose(found, kelvin, rtol=0.045)  # three standard errors and a half
    np.testing.assert_allclose((2 * WELLS(x)).mean(0) / (6 * KB), kelvin, rtol=0.045)


def test_without_friction_energy_is_kept_to_second_order():
    x, v, generator = start(50)

    def drift(dt):
        y, w = langevin(WELLS, MASSES, x, v, KELVIN, round(0.2 / dt), dt=dt, friction=0.0, generator=generator)
        total = [WELLS(a) + (torch.tensor(MASSES)[:, None] * b.square()).sum((-2, -1)) / 2 for a, b in ((x, v), (y, w))]
        return (total[1] - total[0]).abs().mean()

    assert 3.6 < drift(0.002) / drift(0.001) < 4.4


def test_a_run_is_a_function_of_its_seed_and_leaves_its_arguments_alone():
    x, v, _ = start(3)
    before = x.clone(), v.clone()
    wells = Wells(2000.0, 40000.0)
    runs = [langevin(wells, MASSES, x, v, KELVIN, 20, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(x, before[0]) and torch.equal(v, before[1])
    assert wells.calls == 3 * 3 * 21


def test_a_step_that_is_too_long_is_named():
    x, v, generator = start(2)
    with pytest.raises(ValueError, match=r"not finite after 300 steps of dt=0\.1 ps: a smaller dt"):
        langevin(WELLS, MASSES, x, v, KELVIN, 300, dt=0.1, generator=generator)


@pytest.mark.parametrize("friction", [2.0, math.inf], ids=["ghmc", "mala"])
def test_metropolised_dynamics_is_exact_in_positions_and_velocities(friction):
    """At steps of which the heavy particle's leapfrog makes its variance a third too large, and many are refused."""
    x, v, generator = start(1500)
    x, v, acceptance = ghmc(WELLS, MASSES, x, v, KELVIN, 60, dt=0.02, friction=friction, generator=generator)
    assert acceptance.shape == (1500,) and 0.5 < acceptance.mean() < 0.85
    for atom, std in enumerate(STDS):
        assert not_normal(x[:, atom], std) < 1.95
        speed = math.sqrt(KB * KELVIN / MASSES[atom])
        assert not_normal(v[:, atom], speed) < 1.95
        together = (x[:, atom] * v[:, atom] / (std * speed)).flatten()  # mean 0, unless a refusal forgets to turn round
        assert abs(together.mean()) < 3.5 / len(together) ** 0.5


def test_ghmc_stays_where_a_trial_has_no_energy():
    class Wall(Wells):
        def energy_and_forces(self, x):
            energy, forces = super().energy_and_forces(x)
            return torch.where((x[..., 0, 0] > 0), energy, torch.nan), forces

    x, v, generator = start(500)
    x[:, 0, 0] = x[:, 0, 0].abs()
    x, _, _ = ghmc(Wall(2000.0, 40000.0), MASSES, x, v, KELVIN, 50, dt=0.01, generator=generator)
    assert (x[:, 0, 0] > 0).all()
    assert not_normal(x[:, 0, 1], STDS[0]) < 1.95


def test_maxwell_velocities():
    v = draw_velocities(MASSES, torch.tensor([300.0, 600.0]), (5000, 2), seeded())
    assert v.shape == (5000, 2, 2, 3) and v.dtype == torch.float32
    assert not_normal(v[:, 1, 1], math.sqrt(KB * 600 / 16)) < 1.95
    assert not_normal(v[:, 0, 0], math.sqrt(KB * 300 / 1)) < 1.95


def test_a_move_of_hybrid_monte_carlo_leaves_the_ensemble_as_it_is():
    x, _, generator = start(4000)
    control = x
    for _ in range(6):
        chance = {
            "noise": torch.randn(x.shape, generator=generator, dtype=x.dtype),
            "uniform": torch.rand(len(x), generator=generator, dtype=x.dtype),
        }
        x, energy, moved = hmc(WELLS, MASSES, x, KELVIN, 4, dt=0.02, **chance)
        assert torch.equal(energy, WELLS(x)) and 0.3 < moved.double().mean() < 0.9
        # What is never refused heats the wells up, and the same test sees it.
        control, _, taken = hmc(WELLS, MASSES, control, KELVIN, 4, dt=0.02, **chance | {"uniform": 0 * energy})
        assert taken.all()
    for atom, std in enumerate(STDS):
        assert not_normal(x[:, atom], std) < 1.95 < not_normal(control[:, atom], std)
    stuck, _, taken = hmc(WELLS, MASSES, x, KELVIN, 300, dt=0.1, **chance)  # velocities without bound
    assert not taken.any() and torch.equal(stuck, x)


AXIS, BEHIND = [1, 2], [3]  # of four atoms in a chain, the last turns
TRANS_CIS = 4.0  # kJ/mol


def chains(count):
    """Half of them trans, float64 [count, 4, 3], and an energy that is lower by TRANS_CIS where they are."""
    x = torch.tensor([[0.1, 1, 0], [0, 0, 0], [1.0, 0, 0], [1.2, -1, 0.3]], dtype=torch.float64).repeat(count, 1, 1)
    x[::2, 3, 1:] *= -1
    return x, lambda x: TRANS_CIS * (x[..., 3, 1] > 0).double()


@pytest.mark.parametrize(("kelvin", "tried"), [(300.0, 300.0), (900.0, 900.0), (900.0, 300.0)])
def test_half_turns_bring_either_state_to_its_weight(kelvin, tried):
    """The control: moves at another temperature give other weights."""
    x, energy = chains(4000)
    before, generator, at = x.clone(), seeded(), torch.full((1,), tried, dtype=torch.float64)
    u = energy(x)
    for _ in range(12):
        x, u, _ = flip(energy, x, u, at, AXIS, BEHIND, generator=generator)
    assert torch.equal(u, energy(x)) and torch.equal(x[:, :3], before[:, :3])
    weight = 1 / (1 + math.exp(TRANS_CIS / (KB * kelvin)))
    error = ((u > 0).double().mean().item() - weight) / math.sqrt(weight * (1 - weight) / len(x))
    assert (abs(error) < 3.5) == (kelvin == tried)


def test_a_half_turn_into_a_clash_is_refused():
    x, energy = chains(8)
    clashed = lambda x: energy(x) / 0  # infinite for cis, not a number for trans
    y, u, taken = flip(clashed, x, energy(x), torch.tensor([1e6]), AXIS, BEHIND, generator=seeded())
    assert not taken.any() and torch.equal(x, y) and torch.equal(u, energy(x))
