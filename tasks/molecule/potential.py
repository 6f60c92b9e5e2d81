"""The potential energy of a molecule and its forces: a batch of conformations at once, written out by hand.

    U = bonds + angles + torsions + Lennard-Jones and Coulomb + generalized Born solvent (OBC) + surface

Dynamics asks for the forces millions of times and autograd would build a graph each time, so the derivatives stand
beside the formulas. Conformations are the last dimension inside: an atom, a pair or an angle is a row, and every
operation runs over contiguous rows.

Pairs nearer than FLOOR count as FLOOR apart: float32 would overflow, and coincident atoms divide by zero. Their forces
still push, along whatever line is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tasks.molecule.system import System

FLOOR = 0.01  # nm, a tenth of the shortest bond; r^-14 is 1e28 there, inside float32
# Bytes of a row of conformations. On a CPU the temporaries of 512 float32 conformations stay in a core's caches.
ROW_CPU, ROW = 2048, 1 << 18
# glibc hands each freed block of over 128 KiB back, to be page-faulted anew by the next operation, until a larger block
# was freed once: then it keeps those up to that size (mallopt(3), M_MMAP_THRESHOLD). With 512 conformations this is
# 24,000 or 40,000 energies with forces a second.
KEPT = 1 << 24


class Tables(NamedTuple):
    """Indices, and parameters of one device and dtype with a last dimension of 1.

    Everything is a function of edges, x[head] - x[tail]: those of all P pairs, then those that an angle needs (two) and
    a torsion (three; each four atoms once, however many terms they have).
    """

    sizes: tuple[int, ...]  # edges: P, angles u and v, torsions ab, cb and cd
    heads: Tensor  # int [E]
    tails: Tensor
    bonds: Tensor  # int [n]: the bonds among the pairs
    series: Tensor  # int [m]: the torsion of each term
    bond_r0: Tensor
    bond_k: Tensor
    angle_theta0: Tensor
    angle_k: Tensor
    periodicity: Tensor  # [m, 1]
    phase: Tensor
    torsion_k: Tensor
    lj12: Tensor  # 4 ε σ^12 [P, 1]
    lj6: Tensor  # 4 ε σ^6
    coulomb: Tensor  # kJ/mol nm [P, 1]
    solvent: Tensor  # what solvent takes off a Coulomb interaction, kJ/mol nm [P, 1]
    solvent_self: Tensor  # half of that of an atom with itself [N, 1]
    rim: Tensor  # nm [2, P, 1]: the reduced radius of a pair's first and second atom
    screen: Tensor  # nm [2, P, 1]: the scaled radius of the other one
    reduced: Tensor  # ρ, nm [N, 1]: radius less offset
    radius: Tensor  # nm [N, 1]
    tanh1: Tensor  # α ρ / 2 [N, 1], by twice the Born integral
    tanh3: Tensor  # γ ρ³ / 8 [N, 1], by its cube
    surface: Tensor  # kJ/mol [N, 1], by (radius / B)^6


class Potential:
    """U(x) in kJ/mol of conformations x [..., N, 3] in nm, float32 or float64, on any device.

    A conformation that is not finite has an energy of NaN or infinity and leaves the others alone. On CUDA sums over
    pairs have no fixed order, so that last digits vary from call to call. Raises ValueError for another shape or dtype.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self._constants = _constants(system)
        self._tables: dict[tuple[torch.device, torch.dtype], Tables] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """U [...]. Its gradient is exact and comes with the value; there is no second derivative."""
        return _Energy.apply(x, self)

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U [...] and the forces -dU/dx [..., N, 3] in kJ/mol/nm, with no graph."""
        terms, forces = self._evaluate(x)
        return sum(terms.values()), forces

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of U [...] by name: bonds, angles, torsions, nonbonded, born. No graph."""
        return self._evaluate(x)[0]

    @torch.no_grad()
    def _evaluate(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tables = self._on(x)
        rows = x.reshape(-1, *x.shape[-2:]).permute(2, 1, 0)  # [3, N, B]
        chunk = (ROW_CPU if x.device.type == "cpu" else ROW) // x.element_size()
        parts = [_evaluate(part.contiguous(), tables) for part in rows.split(chunk, -1)]
        energies = {name: torch.cat([terms[name] for terms, _ in parts]).view(x.shape[:-2]) for name in parts[0][0]}
        forces = torch.cat([part for _, part in parts], -1)
        return energies, forces.permute(2, 1, 0).reshape(x.shape)

    def _on(self, x: Tensor) -> Tables:
        if x.shape[-2:] != (self.system.num_atoms, 3) or x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"positions of shape {list(x.shape)} and {x.dtype}: {self.system.name} takes float32 or float64 "
                f"[..., {self.system.num_atoms}, 3] in nm"
            )
        key = (x.device, x.dtype)
        if key not in self._tables:
            torch.empty(KEPT, dtype=torch.uint8)  # and freed at once
            moved = {
                name: table.to(x.dtype if table.is_floating_point() else table.dtype).to(x.device)
                for name, table in self._constants._asdict().items()
                if name != "sizes"
            }
            self._tables[key] = self._constants._replace(**moved)
        return self._tables[key]


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, potential: Potential) -> Tensor:
        energy, forces = potential.energy_and_forces(x)
        ctx.save_for_backward(forces)
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -grad[..., None, None] * forces, None


def _constants(system: System) -> Tables:
    """The tables in float64 on the CPU."""

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=float)).unsqueeze(-1)

    born, count = system.gb, system.num_atoms
    first, second = np.triu_indices(count, 1)
    charge = system.charges[first] * system.charges[second]
    sigma = (system.sigma[first] + system.sigma[second]) / 2
    epsilon = np.sqrt(system.epsilon[first] * system.epsilon[second])
    row = {pair: k for k, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True))}
    except_ = [row[tuple(sorted(pair))] for pair in system.exceptions.atoms.tolist()]
    screened = born.coulomb * (1 / born.solute_dielectric - 1 / born.solvent_dielectric)
    solvent = -screened * charge  # of all pairs: exceptions are none here
    charge[except_], sigma[except_] = system.exceptions.chargeprod, system.exceptions.sigma
    epsilon[except_] = system.exceptions.epsilon
    reduced = born.radius - born.offset
    screen = born.scale * reduced
    if screen.max() - reduced.min() > FLOOR:
        raise ValueError(
            f"a scaled radius of {screen.max():.3f} nm may hold an atom of {reduced.min():.3f} nm whole, of which the "
            "derivative of the Born integral here knows nothing"
        )
    quads, series = np.unique(system.torsions.atoms, axis=0, return_inverse=True)
    (one, vertex, other), (a, b, c, d) = system.angles.atoms.T, quads.T
    heads, tails = (first, one, other, a, c, c), (second, vertex, vertex, b, b, d)
    bonds = [row[tuple(sorted(pair))] for pair in system.bonds.atoms.tolist()]
    return Tables(
        tuple(map(len, heads)),
        *map(torch.from_numpy, (np.concatenate(heads), np.concatenate(tails), np.array(bonds), series.reshape(-1))),
        *map(column, (*system.bonds[1:], *system.angles[1:], *system.torsions[1:])),
        lj12=column(4 * epsilon * sigma**12),
        lj6=column(4 * epsilon * sigma**6),
        coulomb=column(system.coulomb * charge),
        solvent=column(solvent),
        solvent_self=column(-screened * system.charges**2 / 2),
        rim=column(np.stack([reduced[first], reduced[second]])),
        screen=column(np.stack([screen[second], screen[first]])),
        reduced=column(reduced),
        radius=column(born.radius),
        tanh1=column(born.alpha * reduced / 2),
        tanh3=column(born.gamma * reduced**3 / 8),
        surface=column(born.surface * (born.radius + born.probe) ** 2),
    )


# ---- the terms: each returns its energy [B] and leaves the derivatives by its edges [3, n, B] in their place ---------


def _evaluate(x: Tensor, tables: Tables) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of the energy [B] and forces [3, N, B] of x [3, N, B]."""
    edges = x.index_select(1, tables.heads).sub_(x.index_select(1, tables.tails))
    pairs, u, v, ab, cb, cd = edges.split(tables.sizes, 1)
    energies = _pairs(pairs, x.shape[1], tables)
    energies |= {"angles": _angles(u, v, tables), "torsions": _torsions(ab, cb, cd, tables)}
    forces = torch.zeros_like(x).index_add_(1, tables.heads, edges, alpha=-1).index_add_(1, tables.tails, edges)
    return energies, forces


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a, b, dim=0)


def _angles(u: Tensor, v: Tensor, tables: Tables) -> Tensor:
    normal, cosine = _cross(u, v), _dot(u, v)  # |u| |v| sin θ and cos θ
    sine = _dot(normal, normal).clamp_min_(FLOOR**6).sqrt_()
    bend = torch.atan2(sine, cosine) - tables.angle_theta0
    torque = tables.angle_k * bend
    energy = 0.5 * (torque * bend).sum(0)
    torque /= sine
    cosine *= torque
    by_u, by_v = cosine / _dot(u, u).clamp_min_(FLOOR**2), cosine / _dot(v, v).clamp_min_(FLOOR**2)
    across = torque * u
    u.mul_(by_u).sub_(torque * v)  # dθ/du = (u (u·v) / u² - v) / (|u| |v| sin θ)
    v.mul_(by_v).sub_(across)
    return energy


def _torsions(ab: Tensor, cb: Tensor, cd: Tensor, tables: Tables) -> Tensor:
    """With the gradient of Blondel and Karplus (1996), which is regular where sin φ is 0."""
    m, n = _cross(ab, cb), _cross(cb, cd)
    axis2 = _dot(cb, cb).clamp_min_(FLOOR**2)
    axis = axis2.sqrt()
    phi = torch.atan2(_dot(ab, n) * axis, _dot(m, n))
    angle = tables.periodicity * phi.index_select(0, tables.series) - tables.phase
    energy = (tables.torsion_k * (1 + torch.cos(angle))).sum(0)
    slope = tables.torsion_k * tables.periodicity * angle.sin_()  # -dU/dφ of each term, then of each torsion
    torque = torch.zeros_like(phi).index_add_(0, tables.series, slope).mul_(axis)
    along_ab, along_cd = _dot(ab, cb).div_(axis2), _dot(cd, cb).div_(axis2)
    torch.mul(-torque / _dot(m, m).clamp_min_(FLOOR**4), m, out=ab)
    torch.mul(-torque / _dot(n, n).clamp_min_(FLOOR**4), n, out=cd)
    torch.mul(along_ab, ab, out=cb).add_(along_cd * cd).neg_()
    return energy


def _pairs(d: Tensor, count: int, tables: Tables) -> dict[str, Tensor]:
    """Bonds, Lennard-Jones and Coulomb, and the solvent, which share the distances. `slope` gathers (dU/dr) / r.

    Written in place where the rows are many: the time goes to memory.
    """
    first, second = tables.heads[: d.shape[1]], tables.tails[: d.shape[1]]
    r2 = _dot(d, d).clamp_min_(FLOOR**2)  # [P, B]
    inverse = r2.rsqrt()
    r, inverse2 = r2 * inverse, inverse * inverse

    inverse6 = inverse2 * inverse2 * inverse2
    six, coulomb = tables.lj6 * inverse6, tables.coulomb * inverse
    twelve = inverse6.mul_(inverse6).mul_(tables.lj12)
    nonbonded = (twelve - six).add_(coulomb).sum(0)
    slope = six.sub_(twelve, alpha=2).mul_(6).sub_(coulomb).mul_(inverse2)

    stretch = r.index_select(0, tables.bonds) - tables.bond_r0
    pull = tables.bond_k * stretch
    slope.index_add_(0, tables.bonds, pull * inverse.index_select(0, tables.bonds))

    displaced, displaced_slope = _displaced(r, inverse, inverse2, tables)
    total = d.new_zeros(count, d.shape[2]).index_add_(0, first, displaced[0]).index_add_(0, second, displaced[1])
    square = total * total  # [N, B]
    tanh = torch.tanh(total * (tables.tanh1 + tables.tanh3 * square))
    born = 1 / (1 / tables.reduced - tanh / tables.radius)  # effective radius, nm
    born_slope = born * born * (1 - tanh * tanh) * (tables.tanh1 + 3 * tables.tanh3 * square) / tables.radius

    b_first, b_second = born.index_select(0, first), born.index_select(0, second)
    product = b_first * b_second
    reach = (r2 / product).mul_(0.25)
    decay = torch.exp(-reach)
    inverse_f = product.mul_(decay).add_(r2).rsqrt_()
    pair = tables.solvent * inverse_f
    twice = pair * inverse_f * inverse_f  # -2 dU/d(f²)
    decay_twice = decay.mul_(twice)
    slope -= twice.sub_(decay_twice, alpha=0.25)
    by_product = reach.add_(1).mul_(decay_twice).mul_(-0.5)
    own, surface = tables.solvent_self / born, tables.surface * (tables.radius / born) ** 6
    by_born = -(own + 6 * surface) / born
    by_born.index_add_(0, first, b_second.mul_(by_product)).index_add_(0, second, b_first.mul_(by_product))
    by_total = by_born * born_slope
    slope.addcmul_(by_total.index_select(0, first), displaced_slope[0])
    slope.addcmul_(by_total.index_select(0, second), displaced_slope[1])

    d.mul_(slope)
    solvent = pair.sum(0) + own.sum(0) + surface.sum(0)
    return {"bonds": 0.5 * (pull * stretch).sum(0), "nonbonded": nonbonded, "born": solvent}


def _displaced(r: Tensor, inverse: Tensor, inverse2: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Twice the Born integral of either atom of a pair over the other, and its slope (d/dr) / r, both [2, P, B].

    The formula is of Hawkins, Cramer and Truhlar (1995). The integral's derivatives by its limits `near` and `far`
    vanish, for there is nothing left to integrate at either.
    """
    far = r + tables.screen
    near = (r - tables.screen).abs_()
    near = torch.maximum(near, tables.rim, out=near).minimum(far)  # equal to `far` within the atom's rim: nothing
    inverse_far = far.reciprocal_()
    log = (near * inverse_far).log_().mul_(0.5 * inverse)
    inverse_near = near.reciprocal_()
    value = inverse_near - inverse_far
    squares = inverse_near.add_(inverse_far).mul_(value).mul_(0.25)
    ratio = (tables.screen * tables.screen * inverse2).mul_(squares)
    value.sub_((squares - ratio).mul_(r)).add_(log)
    return value, squares.add_(ratio).add_(log.mul_(inverse)).mul_(-inverse)
