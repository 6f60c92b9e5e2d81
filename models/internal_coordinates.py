"""Bonds, angles and dihedrals of a molecule, and the way back, with the volume that the change of coordinates costs.

A z-matrix has a row (atom, bonded to, angle to, dihedral to) for each atom but the first, to which row 0 is bonded.
What a row cannot have yet is -1: row 0 has a bond alone, row 1 no dihedral. Over all N - 1 bonds and N - 2 angles,

    dx = Π r² Π sin θ · dr dθ dφ · d(place) d(orientation)

and `log_volume` is the logarithm of that factor. The dihedral of an atom may be to one that hangs on the same atom.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Frame(NamedTuple):
    """Where a molecule stands: x = origin + (x in the standard frame) @ axes."""

    origin: Tensor  # [B, 3] nm
    axes: Tensor  # [B, 3, 3], a rotation


class Internal(NamedTuple):
    bonds: Tensor  # [B, N - 1] nm
    angles: Tensor  # [B, N - 2] rad, in (0, π)
    dihedrals: Tensor  # [B, N - 3] rad, in [-π, π], with the sign of IUPAC
    log_volume: Tensor  # [B]


def wrap(angle: Tensor) -> Tensor:
    """rad -> rad in [-π, π]."""
    return angle - 2 * torch.pi * torch.round(angle / (2 * torch.pi))


def zmatrix_problems(zmatrix: Sequence[Sequence[int]]) -> list[str]:
    """One sentence for each row that cannot be."""
    if len(zmatrix) < 3 or any(len(row) != 4 for row in zmatrix):
        return ["zmatrix needs at least 3 rows (atom, bonded to, angle to, dihedral to), for 4 atoms"]
    placed, found = [zmatrix[0][1]], []
    for i, (atom, *others) in enumerate(zmatrix):
        known, missing = others[: i + 1], others[i + 1 :]
        if atom in placed or not set(known) <= set(placed) or len(set(known)) < len(known) or set(missing) - {-1}:
            found.append(f"row {i} of zmatrix, {(atom, *others)}, must place a new atom by {len(known)} placed ones")
        placed.append(atom)
    if not found and sorted(placed) != list(range(len(placed))):
        found.append(f"zmatrix must place the atoms 0 … {len(placed) - 1}, not {sorted(placed)}")
    return found


def depths(zmatrix: Sequence[Sequence[int]], columns: int) -> list[int]:
    """By atom: how many atoms one after the other must be placed before it, going by its first `columns` references."""
    depth = {zmatrix[0][1]: 0}
    for atom, *others in zmatrix:
        depth[atom] = 1 + max(depth[other] for other in others[:columns] if other >= 0)
    return [depth[atom] for atom in range(len(depth))]


class InternalCoordinates(nn.Module):
    """x <-> (r, θ, φ), to rounding. Raises ValueError for a z-matrix that cannot be."""

    atoms: Tensor
    first_three: Tensor
    rank: Tensor

    def __init__(self, zmatrix: Sequence[Sequence[int]]):
        super().__init__()
        if problems := zmatrix_problems(zmatrix):
            raise ValueError("; ".join(problems))
        depth = depths(zmatrix, 3)
        # Atoms of one depth are placed at once: 4 steps for alanine dipeptide in place of 19.
        steps: dict[int, list[int]] = {}
        for row in range(2, len(zmatrix)):
            steps.setdefault(depth[zmatrix[row][0]], []).append(row)
        order = [zmatrix[0][1], zmatrix[0][0], zmatrix[1][0]]  # as they are placed
        for _, rows in sorted(steps.items()):
            order += [zmatrix[row][0] for row in rows]
        rank = {atom: k for k, atom in enumerate(order)}
        self._index("atoms", [list(column) for column in zip(*zmatrix, strict=True)])  # [4, N - 1]
        self._index("first_three", order[:3])
        self._index("rank", [rank[atom] for atom in range(len(order))])
        self.num_steps = len(steps)
        for k, (_, rows) in enumerate(sorted(steps.items())):
            self._index(f"rows{k}", [row - 2 for row in rows])
            self._index(f"references{k}", [rank[zmatrix[row][c]] for c in (1, 2, 3) for row in rows])
        # Row 1 hangs on either of the two atoms before it.
        self.second_on_first = zmatrix[1][1] == zmatrix[0][1]

    def _index(self, name: str, values: list) -> None:
        self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, x: Tensor) -> Internal:
        """x [B, N, 3] nm, float32 or float64."""
        i, j, k, last = (
            x[:, column] for column in (self.atoms[0], self.atoms[1], self.atoms[2, 1:], self.atoms[3, 2:])
        )
        bond = i - j  # [B, N - 1, 3]
        bonds = bond.norm(dim=-1)
        axis = k - j[:, 1:]
        normal = torch.linalg.cross(bond[:, 1:], axis)
        # Not the arc cosine, which loses half its digits near 0 and π.
        angles = torch.atan2(normal.norm(dim=-1), (bond[:, 1:] * axis).sum(-1))
        axis, normal, bond = axis[:, 1:], normal[:, 1:], bond[:, 2:]
        other = torch.linalg.cross(axis, last - k[:, 1:])
        sine = -(bond * other).sum(-1) * axis.norm(dim=-1)
        dihedrals = torch.atan2(sine, -(normal * other).sum(-1))
        return Internal(bonds, angles, dihedrals, self.log_volume(bonds, angles))

    @staticmethod
    def log_volume(bonds: Tensor, angles: Tensor) -> Tensor:
        """[B]; -inf where a bond or an angle is none: no conformation has such coordinates."""
        value = 2 * bonds.log().sum(-1) + angles.sin().log().sum(-1)
        possible = (bonds > 0).all(-1) & ((angles > 0) & (angles < torch.pi)).all(-1)
        return torch.where(possible, value, -torch.inf)

    def frame(self, x: Tensor) -> Frame:
        """x [B, N, 3] -> where the first three atoms stand."""
        first, second, third = x.index_select(1, self.first_three).unbind(1)
        e1 = nn.functional.normalize(second - first, dim=-1)
        e3 = nn.functional.normalize(torch.linalg.cross(e1, third - first), dim=-1)
        return Frame(first, torch.stack([e1, torch.linalg.cross(e3, e1), e3], 1))

    def inverse(
        self, bonds: Tensor, angles: Tensor, dihedrals: Tensor, frame: Frame | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> x [B, N, 3] nm, log_volume [B]. Without a frame the first atom is at 0, the second on the x axis, and the
        third in the xy plane with y > 0."""
        x = self._root(bonds, angles)
        # Polar about the line from the bonded atom to the next: (cos θ, sin θ cos φ, sin θ sin φ).
        theta = angles[:, 1:]
        radial = bonds[:, 2:] * theta.sin()
        local = torch.stack([bonds[:, 2:] * theta.cos(), radial * dihedrals.cos(), radial * dihedrals.sin()], -1)
        for step in range(self.num_steps):
            rows, references = getattr(self, f"rows{step}"), getattr(self, f"references{step}")
            j, k, last = x.index_select(1, references).unflatten(1, (3, -1)).unbind(1)  # [B, n, 3]
            e = nn.functional.normalize(k - j, dim=-1)
            n = nn.functional.normalize(torch.linalg.cross(e, last - k), dim=-1)
            a, b, c = local.index_select(1, rows).unsqueeze(-1).unbind(2)
            x = torch.cat([x, j + a * e + b * torch.linalg.cross(n, e) - c * n], 1)
        x = x.index_select(1, self.rank)
        if frame is not None:
            x = frame.origin.unsqueeze(1) + x @ frame.axes
        return x, self.log_volume(bonds, angles)

    def _root(self, bonds: Tensor, angles: Tensor) -> Tensor:
        """The first three atoms, [B, 3, 3]."""
        r1, r2, theta = bonds[:, 0], bonds[:, 1], angles[:, 0]
        zero = torch.zeros_like(r1)
        along, up = r2 * theta.cos(), r2 * theta.sin()
        along = along if self.second_on_first else r1 - along
        return torch.stack([zero, zero, zero, r1, zero, zero, along, up, zero], -1).unflatten(-1, (3, 3))
