"""Alanine dipeptide in random shapes, small flows of it, and the Jacobian that their log-determinants answer for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.ic_transport import PRESETS, ICSplineTransport, ICTransportConfig
from models.internal_coordinates import InternalCoordinates
from models.transformer_flow import PRESETS as TRANSFORMER_PRESETS
from models.transformer_flow import ScalableTransformerFlow, TransformerFlowConfig
from models.transport import Transport
from tasks.molecule.system import load_system

SYSTEM = load_system()
COORDINATES = InternalCoordinates(SYSTEM.zmatrix)
SPREAD = (0.003, 0.06, 0.1)  # nm, rad, rad: of stiff bonds, angles and dihedrals at 300 K


def rotations(count: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64, generator=generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return q * torch.linalg.det(q)[:, None, None]


def frames(
    count: int = 16, *, seed: int = 0, hotter: float = 1.0, turning: float = torch.pi, cis: bool = False
) -> Tensor:
    """Shapes about the minimum, soft dihedrals turned by up to `turning`, anywhere in space: float64 [B, N, 3]. cis: of
    every two the second has its first peptide bond turned over, of every four the last two their second."""
    generator = torch.Generator().manual_seed(seed)
    minimum = COORDINATES(torch.as_tensor(SYSTEM.positions, dtype=torch.float64)[None])
    q = [
        part + hotter * spread * torch.randn(count, part.shape[1], dtype=torch.float64, generator=generator)
        for part, spread in zip(minimum[:3], SPREAD, strict=True)
    ]
    turned = turning * (2 * torch.rand(count, len(SYSTEM.soft), dtype=torch.float64, generator=generator) - 1)
    q[2][:, list(SYSTEM.soft)] += turned
    for bit, k in enumerate(SYSTEM.flips):
        q[2][:, k] += torch.pi * cis * (torch.arange(count) >> bit & 1)
    x, _ = COORDINATES.inverse(*q)
    return x @ rotations(count, generator) + torch.randn(count, 1, 3, dtype=torch.float64, generator=generator)


def build(kind: str, *, moved: float = 0.0, **options) -> Transport:
    """A small float64 flow that knows its means; `moved` is by how much its parameters are off their start."""
    torch.manual_seed(0)
    if kind == "ic":
        molecule = {"zmatrix": SYSTEM.zmatrix, "soft": SYSTEM.soft, "flips": SYSTEM.flips}
        model = ICSplineTransport(ICTransportConfig(**(molecule | PRESETS["tiny"] | options)))
    else:
        sizes = TRANSFORMER_PRESETS["tiny"] | {"num_atoms": SYSTEM.num_atoms}
        model = ScalableTransformerFlow(TransformerFlowConfig(**(sizes | options)))
    model = model.double()
    model.set_means(frames(64, seed=1, turning=0.5), frames(64, seed=2, hotter=1.3, turning=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved * torch.randn_like(parameter)
    return model


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a function of rows [B, n] -> [B, m] at x [n]: [m, n]. Row i of a batch of copies is asked for output i."""
    m = function(x[None]).shape[1]
    copies = x.repeat(m, 1).requires_grad_()
    (rows,) = torch.autograd.grad(function(copies).diagonal().sum(), copies)
    return rows
