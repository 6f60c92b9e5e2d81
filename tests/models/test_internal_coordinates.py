"""Bonds, angles and dihedrals: there and back to rounding, with the volume that autograd finds."""

import math

import pytest
import torch

from models.internal_coordinates import InternalCoordinates, wrap
from tests.models.tiny_molecules import COORDINATES, SYSTEM, frames, jacobian, rotations

# The second row hangs on the root's other end, the fourth dihedral is to an atom that hangs on the same one.
BRANCHED = ((1, 0, -1, -1), (2, 0, 1, -1), (3, 2, 0, 1), (5, 2, 0, 3), (4, 3, 2, 5))


@pytest.mark.parametrize("zmatrix", [SYSTEM.zmatrix, BRANCHED])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_there_and_back(zmatrix, dtype, error):
    coordinates = InternalCoordinates(zmatrix)
    x = frames()[:, : len(zmatrix) + 1].to(dtype)
    internal = coordinates(x)
    back, log_volume = coordinates.inverse(*internal[:3], coordinates.frame(x))
    assert (back - x).abs().max() < error
    assert torch.equal(log_volume, internal.log_volume)
    standard, _ = coordinates.inverse(*internal[:3])
    first, second, third = standard[:, zmatrix[0][1]], standard[:, zmatrix[0][0]], standard[:, zmatrix[1][0]]
    assert not first.any() and not second[:, 1:].any() and not third[:, 2].any()
    assert (second[:, 0] > 0).all() and (third[:, 1] > 0).all()


def test_the_sign_of_a_dihedral_is_that_of_iupac():
    """Looking from the second atom to the third, the last one is clockwise of the first."""
    angle = torch.tensor([0.3, 2.0, -1.0, 3.1], dtype=torch.float64)
    x = torch.zeros(4, 4, 3, dtype=torch.float64)
    x[:, 3, 0], x[:, 0, 2], x[:, 0, 0], x[:, 0, 1], x[:, 1, 2] = 1, 1, angle.cos(), angle.sin(), 1
    # Atom 3 at (1, 0, 0) hangs on 2 at 0; 1 is above 2, and 0 hangs on 1.
    coordinates = InternalCoordinates(((1, 0, -1, -1), (2, 1, 0, -1), (3, 2, 1, 0)))
    torch.testing.assert_close(coordinates(x).dihedrals[:, 0], angle)
    torch.testing.assert_close(coordinates(x).angles, torch.full((4, 2), math.pi / 2, dtype=torch.float64))
    mirrored = x * torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(coordinates(mirrored).dihedrals[:, 0], -angle)


def test_they_do_not_see_where_a_molecule_is():
    x = frames()
    moved = x @ rotations(len(x), torch.Generator().manual_seed(5)) + 3.0
    for here, there in zip(COORDINATES(x), COORDINATES(moved), strict=True):
        torch.testing.assert_close(wrap(here - there), torch.zeros_like(here), atol=1e-10, rtol=0)


def volume_error(coordinates: InternalCoordinates, x: torch.Tensor) -> float:
    """By how much log_volume differs between frames other than the determinant of d(x) / d(q, place, orientation)."""
    *q, log_volume = coordinates(x)
    sizes = [part.shape[1] for part in q]
    errors = []
    for row, value in zip(torch.cat(q, 1), log_volume, strict=True):
        by_shape = jacobian(lambda q: coordinates.inverse(*q.split(sizes, 1))[0].flatten(1), row)
        standard, _ = coordinates.inverse(*row[None].split(sizes, 1))
        axes = torch.eye(3, dtype=x.dtype)
        by_turn = torch.linalg.cross(axes[:, None], standard.expand(3, -1, -1)).flatten(1).T
        by_place = axes.repeat(x.shape[1], 1)
        errors.append(torch.linalg.slogdet(torch.cat([by_shape, by_turn, by_place], 1))[1] - value)
    errors = torch.stack(errors)
    return (errors - errors[0]).abs().max().item()


def test_the_volume_is_that_of_the_whole_jacobian(monkeypatch):
    assert volume_error(COORDINATES, frames(4)) < 1e-8
    without_angles = staticmethod(lambda bonds, angles: 2 * bonds.log().sum(-1))
    monkeypatch.setattr(InternalCoordinates, "log_volume", without_angles)
    assert volume_error(COORDINATES, frames(4)) > 0.1


@pytest.mark.parametrize(("part", "value"), [(0, -0.1), (0, 0.0), (1, -0.1), (1, math.pi + 0.1)])
def test_what_is_no_shape_has_no_volume(part, value):
    q = list(COORDINATES(frames(2))[:3])
    q[part] = q[part].clone()
    q[part][0, 3] = value
    _, log_volume = COORDINATES.inverse(*q)
    assert log_volume[0] == -math.inf and log_volume[1].isfinite()


@pytest.mark.parametrize(
    "zmatrix",
    [
        ((1, 0, -1, -1), (2, 1, 0, -1)),
        ((1, 0, -1, -1), (2, 1, 0, -1), (3, 2, 1, 4)),  # by an atom that is not placed yet
        ((1, 0, -1, -1), (2, 1, 0, -1), (3, 2, 1, 1)),  # twice by the same
        ((1, 0, -1, -1), (2, 1, 0, -1), (2, 1, 0, 2)),  # an atom again
        ((1, 0, -1, -1), (2, 1, 0, -1), (5, 2, 1, 0)),  # not all atoms
        ((1, 0, -1, -1), (2, 1, -1, -1), (3, 2, 1, 0)),
    ],
)
def test_a_z_matrix_that_cannot_be_is_refused(zmatrix):
    with pytest.raises(ValueError, match="zmatrix"):
        InternalCoordinates(zmatrix)
