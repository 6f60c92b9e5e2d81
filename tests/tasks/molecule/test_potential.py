from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tasks.molecule.potential import FLOOR, Potential
from tasks.molecule.system import load_system

SYSTEM = load_system()
POTENTIAL = Potential(SYSTEM)
PARTS = {
    "HarmonicBondForce": "bonds",
    "HarmonicAngleForce": "angles",
    "PeriodicTorsionForce": "torsions",
    "NonbondedForce": "nonbonded",
    "CustomGBForce": "born",
}


def conformations(count, spread=0.01, dtype=torch.float64, seed=0):
    noise = np.random.default_rng(seed).normal(size=(count, SYSTEM.num_atoms, 3))
    return torch.from_numpy(SYSTEM.positions + spread * noise).to(dtype)


def approaching(distances, first=0, second=21):
    """The last atom, brought to distances in nm from the first, from outside."""
    x = torch.from_numpy(SYSTEM.positions).repeat(len(distances), 1, 1)
    away = x[:, first] - x.mean(1)
    away /= away.norm(dim=-1, keepdim=True)
    x[:, second] = x[:, first] + torch.tensor(distances, dtype=x.dtype)[:, None] * away
    return x


# ---- against OpenMM --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openmm_frames():
    """Frames [n, N, 3] of all kinds, and their energies by part and forces on OpenMM's Reference platform."""
    openmm = pytest.importorskip("openmm")
    from tasks.molecule import derive

    system = derive.force_field_system(derive.build()[0])
    for group, force in enumerate(system.getForces()):
        force.setForceGroup(group)
    frames = [SYSTEM.positions, *conformations(2, 0.02).numpy(), *approaching([0.2, 0.1, 0.05, 0.02]).numpy()]
    for temperature in (300, 450, 1000):
        integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 1e-3)
        integrator.setRandomNumberSeed(temperature)
        hot = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        hot.setPositions(SYSTEM.positions)
        hot.setVelocitiesToTemperature(2 * temperature, temperature)
        integrator.step(50)
        frames.append(hot.getState(getPositions=True).getPositions(asNumpy=True)._value)
    context, energies, forces = derive.context_of(system, frames[0]), [], []
    for frame in frames:
        context.setPositions(frame)
        parts = [context.getState(getEnergy=True, groups={group}) for group in range(len(PARTS))]
        energies.append([part.getPotentialEnergy()._value for part in parts])
        forces.append(context.getState(getForces=True).getForces(asNumpy=True)._value)
    names = [PARTS[type(force).__name__] for force in system.getForces()]
    return torch.tensor(np.array(frames)), dict(zip(names, np.transpose(energies), strict=True)), np.array(forces)


def force_error(potential, x, forces):
    return np.linalg.norm(potential.energy_and_forces(x)[1].numpy() - forces) / np.linalg.norm(forces)


def test_every_part_and_force_is_openmms(openmm_frames):
    x, parts, forces = openmm_frames
    for name, energy in POTENTIAL.terms(x).items():
        np.testing.assert_allclose(energy.numpy(), parts[name], rtol=1e-9, atol=1e-6, err_msg=name)
    energy, ours = POTENTIAL.energy_and_forces(x)
    np.testing.assert_allclose(energy.numpy(), sum(parts.values()), rtol=1e-6)
    error = np.linalg.norm(ours.numpy() - forces, axis=(1, 2)) / np.linalg.norm(forces, axis=(1, 2))
    assert error[1:].max() < 1e-9
    assert np.abs(ours[0].numpy() - forces[0]).max() < 1e-6  # at the minimum, where there is little to divide by


@pytest.mark.parametrize("name", ["charges", "sigma", "epsilon"])
def test_a_parameter_off_by_a_thousandth_shows(openmm_frames, name):
    x, parts, _ = openmm_frames
    off = dataclasses.replace(SYSTEM, **{name: getattr(SYSTEM, name) * 1.001})
    wrong = Potential(off)(x).numpy() / sum(parts.values()) - 1
    assert np.abs(wrong).max() > 1e-5


def test_float32_is_near_enough_for_dynamics(openmm_frames):
    x, parts, forces = openmm_frames
    fine = np.abs(sum(parts.values())) < 1e4
    energy, ours = POTENTIAL.energy_and_forces(x.float())
    assert energy.dtype == ours.dtype == torch.float32
    np.testing.assert_allclose(energy[fine].numpy(), sum(parts.values())[fine], atol=5e-3)
    assert np.linalg.norm(ours[fine].numpy() - forces[fine]) < 1e-5 * np.linalg.norm(forces[fine])


# ---- by itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [conformations(3, 0.005), approaching([0.07, 0.03])], ids=["moved", "clashed"])
def test_the_forces_are_the_gradient(x):
    """By central differences of every coordinate, and through autograd."""
    x = x.clone().requires_grad_()
    energy, forces = POTENTIAL.energy_and_forces(x)
    (gradient,) = torch.autograd.grad(POTENTIAL(x).sum(), x)
    assert torch.equal(gradient, -forces) and not energy.requires_grad and not forces.requires_grad
    step = 1e-6 * torch.eye(x[0].numel(), dtype=x.dtype).view(-1, 1, *x.shape[1:])  # [3 N, 1, N, 3]
    difference = (POTENTIAL(x + step) - POTENTIAL(x - step)) / 2e-6
    scale = forces.abs().amax((1, 2))
    assert ((difference.T.view_as(forces) + forces).abs().amax((1, 2)) < 1e-6 * scale).all()
    weight = torch.tensor([2.0, *[0.0] * (len(x) - 1)], dtype=x.dtype)
    (weighted,) = torch.autograd.grad((weight * POTENTIAL(x)).sum(), x)
    assert torch.equal(weighted[0], -2 * forces[0]) and not weighted[1:].any()


def test_a_second_derivative_is_refused_rather_than_wrong():
    x = conformations(1).requires_grad_()
    (gradient,) = torch.autograd.grad(POTENTIAL(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_turning_mirroring_and_moving_the_molecule_does_so_to_the_forces_and_leaves_the_energy():
    x = conformations(4)
    normals = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.28, 0.96]], dtype=x.dtype)
    for mirrors in (normals[:1], normals):
        turn = torch.eye(3, dtype=x.dtype)
        for normal in mirrors:
            turn = turn - 2 * torch.outer(turn @ normal, normal)
        energy, forces = POTENTIAL.energy_and_forces(x)
        moved_energy, moved_forces = POTENTIAL.energy_and_forces(x @ turn + 3.0)
        torch.testing.assert_close(moved_energy, energy, rtol=1e-10, atol=0)
        torch.testing.assert_close(moved_forces, forces @ turn, rtol=1e-8, atol=1e-8)
    torque = torch.linalg.cross(x, forces).sum(1)
    assert max(forces.sum(1).abs().max(), torque.abs().max()) < 1e-10 * forces.abs().max()


def test_a_conformation_does_not_see_its_batch():
    x = conformations(150)  # more than a chunk
    energy, forces = POTENTIAL.energy_and_forces(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9)
    shuffled = POTENTIAL.energy_and_forces(x[order])
    close(shuffled[0], energy[order])
    close(shuffled[1], forces[order])
    close(POTENTIAL(x.view(3, 50, 22, 3)), energy.view(3, 50))
    close(POTENTIAL(x[7]), energy[7])
    close(sum(POTENTIAL.terms(x[:5]).values()), energy[:5])
    assert POTENTIAL(x[:0]).shape == (0,)
    poisoned = x.clone()
    poisoned[3, 5] = torch.nan
    assert POTENTIAL(poisoned).isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clash_costs_more_the_nearer_it_is_and_never_overflows(dtype):
    x = approaching([0.15, 0.1, 0.05, 0.03, 0.02, FLOOR]).to(dtype)
    energy, forces = POTENTIAL.energy_and_forces(x)
    assert (energy.diff() > 0).all()
    assert energy.isfinite().all() and forces.isfinite().all()
    everywhere = torch.zeros(2, 22, 3, dtype=dtype)
    everywhere[1] = x[0, :1]
    energy, forces = POTENTIAL.energy_and_forces(torch.cat([everywhere, approaching([1e-4, 0.0]).to(dtype)]))
    assert energy.isfinite().all() and forces.isfinite().all()
    assert energy[:2].min() > 1e6


@pytest.mark.parametrize("x", [torch.zeros(4, 21, 3), torch.zeros(22, 3, dtype=torch.int64), torch.zeros(66)])
def test_what_is_no_conformation_is_refused(x):
    with pytest.raises(ValueError, match=r"takes float32 or float64 \[..., 22, 3\] in nm"):
        POTENTIAL(x)


def test_radii_beyond_the_formula_are_refused():
    with pytest.raises(ValueError, match="scaled radius"):
        Potential(dataclasses.replace(SYSTEM, gb=SYSTEM.gb._replace(scale=SYSTEM.gb.scale * 1.5)))
