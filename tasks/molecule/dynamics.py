"""Motion at a temperature: Langevin dynamics of many conformations in one tensor, and its Metropolised form.

A potential is anything with `energy_and_forces(x [..., N, 3]) -> (U [...], F [..., N, 3])`, in kJ/mol and kJ/mol/nm.
Lengths are in nm, times in ps, masses in amu and velocities in nm/ps: kJ/mol is amu nm^2/ps^2, so no factor is needed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.molecule.system import KB


def langevin(
    potential: Any,
    masses: np.ndarray,
    x: Tensor,
    v: Tensor,
    temperature: float | Tensor,
    steps: int,
    *,
    dt: float = 0.001,
    friction: float = 1.0,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """`steps` steps of BAOAB (Leimkuhler and Matthews 2013), the splitting whose positions are exact in a harmonic well
    at any stable `dt`, and off by O(dt^2) in general.

    Args:
        masses: [N] amu.
        x, v: [..., N, 3] positions and velocities, float32 or float64; they are left as they are.
        temperature: K, one for all or [...] broadcastable to the conformations.
        dt, friction: ps and 1/ps.

    Returns new x and v. Evaluates the potential steps + 1 times. Raises ValueError where positions stop being finite.
    """
    per_mass, thermal = _scales(masses, temperature, x)
    keep = math.exp(-friction * dt)
    kick = thermal * math.sqrt(-math.expm1(-2 * friction * dt))
    x, v, noise = x.clone(), v.clone(), torch.empty_like(x)
    forces = potential.energy_and_forces(x)[1]
    v.addcmul_(forces, per_mass, value=dt / 2)
    for _ in range(steps):
        x.add_(v, alpha=dt / 2)
        v.mul_(keep).addcmul_(kick, noise.normal_(generator=generator))
        x.add_(v, alpha=dt / 2)
        forces = potential.energy_and_forces(x)[1]
        v.addcmul_(forces, per_mass, value=dt)  # the half kick that ends this step and the one that begins the next
    v.addcmul_(forces, per_mass, value=-dt / 2)
    if not x.isfinite().all():
        raise ValueError(f"positions are not finite after {steps} steps of dt={dt} ps: a smaller dt is needed")
    return x, v


def ghmc(
    potential: Any,
    masses: np.ndarray,
    x: Tensor,
    v: Tensor,
    temperature: float | Tensor,
    steps: int,
    *,
    dt: float = 0.001,
    friction: float = 1.0,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Langevin dynamics without its error in dt: every step is a Metropolis proposal (generalised hybrid Monte Carlo,
    Horowitz 1991), and a rejected one turns the velocity round. `friction=math.inf` draws velocities anew each step,
    which is MALA with the masses as its metric.

    Arguments as in `langevin`; exact in float64, while float32 rounds the energies that it decides by. Returns new x
    and v, and the mean probability of acceptance [...].
    """
    per_mass, thermal = _scales(masses, temperature, x)
    beta = 1 / (KB * torch.as_tensor(temperature, dtype=x.dtype, device=x.device))
    keep = math.exp(-friction * dt)
    kick = thermal * math.sqrt(-math.expm1(-2 * friction * dt))
    energy, forces = potential.energy_and_forces(x)
    accepted = torch.zeros_like(energy)
    for _ in range(steps):
        noise = torch.empty_like(x).normal_(generator=generator)
        v = keep * v + kick * noise
        w = v + dt / 2 * per_mass * forces
        y = x + dt * w
        new_energy, new_forces = potential.energy_and_forces(y)
        w = w + dt / 2 * per_mass * new_forces
        kinetic = ((v.square() - w.square()) / (2 * per_mass)).sum((-2, -1))
        # A trial without an energy compares as false, and is refused.
        probability = (beta * (energy - new_energy + kinetic)).clamp(max=0).exp().nan_to_num(0.0)
        taken = torch.empty_like(energy).uniform_(generator=generator) < probability
        accepted += probability
        energy, rows = torch.where(taken, new_energy, energy), taken[..., None, None]
        x, v, forces = torch.where(rows, y, x), torch.where(rows, w, -v), torch.where(rows, new_forces, forces)
    return x, v, accepted / steps


def hmc(
    potential: Any,
    masses: np.ndarray,
    x: Tensor,
    temperature: float | Tensor,
    steps: int,
    *,
    dt: float = 0.001,
    noise: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One move of hybrid Monte Carlo (Duane et al. 1987): velocity Verlet from velocities drawn anew, taken or refused
    as a whole.

    Arguments as in `ghmc`, and what is random: standard normal `noise` [..., N, 3] and `uniform` [...] in [0, 1).
    Returns the new x, its energies [...] in kJ/mol, and which conformations moved, bool [...].
    """
    per_mass, thermal = _scales(masses, temperature, x)
    beta = 1 / (KB * torch.as_tensor(temperature, dtype=x.dtype, device=x.device))
    energy, forces = potential.energy_and_forces(x)
    v, y = thermal * noise, x.clone()
    w = v.addcmul(forces, per_mass, value=dt / 2)
    for _ in range(steps):
        y.add_(w, alpha=dt)
        new_energy, forces = potential.energy_and_forces(y)
        w.addcmul_(forces, per_mass, value=dt)
    w.addcmul_(forces, per_mass, value=-dt / 2)
    kinetic = ((v.square() - w.square()) / (2 * per_mass)).sum((-2, -1))
    taken = uniform < (beta * (energy - new_energy + kinetic)).exp()  # of an energy that is NaN never
    return torch.where(taken[..., None, None], y, x), torch.where(taken, new_energy, energy), taken


@torch.no_grad()
def flip(
    potential: Any,
    x: Tensor,
    energy: Tensor,
    temperature: Tensor,
    axis: list[int],
    behind: list[int],
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One move of Monte Carlo by half a turn about a bond, which leaves the ensemble of x unchanged: it is its own
    inverse and keeps volumes. At 1000 K a trans peptide bond becomes cis one time in 21, where dynamics needs
    nanoseconds.

    Args:
        x: [..., N, 3] nm.
        energy: U(x) [...] in kJ/mol, float64; temperature: K, broadcastable to it.
        axis, behind: the bond's two atoms, and those that turn.

    Returns new x, their energies, and whether the move was accepted, bool [...].
    """
    start, end = x[..., axis, :].unbind(-2)
    along = torch.nn.functional.normalize(end - start, dim=-1).unsqueeze(-2)
    arms = x[..., behind, :] - start.unsqueeze(-2)
    turned = x.clone()
    turned[..., behind, :] = start.unsqueeze(-2) + 2 * (arms * along).sum(-1, keepdim=True) * along - arms
    new = potential(turned.double())
    probability = ((energy - new) / (KB * temperature)).exp()
    taken = torch.rand(energy.shape, dtype=energy.dtype, device=x.device, generator=generator) < probability
    return torch.where(taken[..., None, None], turned, x), torch.where(taken, new, energy), taken


def draw_velocities(
    masses: np.ndarray,
    temperature: float | Tensor,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Maxwell's velocities in nm/ps: [*shape, N, 3], on the generator's device; temperature in K, broadcastable to
    `shape`."""
    v = torch.empty(*shape, len(masses), 3, dtype=dtype, device=generator.device).normal_(generator=generator)
    return v * _scales(masses, temperature, v)[1]


def _scales(masses: np.ndarray, temperature: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """1 / m [N, 1] and the thermal velocity sqrt(k T / m) [..., N, 1] of one degree of freedom."""
    per_mass = 1 / torch.as_tensor(masses, dtype=like.dtype, device=like.device).unsqueeze(-1)
    temperature = torch.as_tensor(temperature, dtype=like.dtype, device=like.device)[..., None, None]
    return per_mass, (KB * temperature * per_mass).sqrt()
