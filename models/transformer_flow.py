"""ScalableTransformerFlow: the original's autoregressive flow over scalar coordinates, with its defects mended.

    model = ScalableTransformerFlow(TransformerFlowConfig(num_atoms=22, **PRESETS["aa_300_450"]))
    model.set_means(cold, hot)
    model.transport(x, 300.0, 450.0)                        # y, log-determinant

A frame is moved to its centre and turned onto a reference (Kabsch). Aligned frames X fulfil six linear conditions,
Σ X_i = 0 and Σ ref_i × X_i = 0, so they have 3N - 6 coordinates u in an orthonormal basis, and with C = Σ X_i ref_iᵀ

    dx = det(tr C - C) du · d(place) d(orientation)     up to a constant;

the same matrix is positive definite where no other turn would be nearer to the reference. Each layer then is

    z_i <- z_i exp(s_i(z_<i)) + t_i(z_<i)

with |s| <= max_scale, and the next one goes through the coordinates the other way round.

In the original the coordinates were those of the laboratory and s was without bound. Dense matrices stood between the
layers, their log-determinants left out, which began as random rotations of the molecule: a loss of 10¹¹ at step 0.
Dropout made T⁻¹ another map than T was, and the inverse ran the transformer over all coordinates for each one of them.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.internal_coordinates import Frame
from models.transport import Block, Cache, Transport, TransportConfig


@dataclass(frozen=True, kw_only=True)
class TransformerFlowConfig(TransportConfig):
    num_atoms: int
    num_flows: int = 4
    max_scale: float = 1.0

    def problems(self) -> list[str]:
        found = super().problems() + self.below(4, "num_atoms") + self.below(0, "num_flows")
        if not self.max_scale > 0:
            found.append(f"max_scale must be above 0, not {self.max_scale}")
        return found


# Widths of the original's; temperatures are in the names.
PRESETS = {
    "aa_300_450": {"num_flows": 8, "d_model": 192, "num_heads": 8, "num_layers": 5},
    "aa_300_450_gpu": {"num_flows": 6, "d_model": 128, "num_heads": 8, "num_layers": 4},
    "aa_300_450_gpu_light": {"num_flows": 4, "d_model": 96, "num_heads": 4, "num_layers": 3},
    "aa_300_670": {"num_flows": 10, "d_model": 256, "num_heads": 8, "num_layers": 6, "t_hot": 670.0},
    "aa_300_1000": {"num_flows": 12, "d_model": 320, "num_heads": 8, "num_layers": 8, "t_hot": 1000.0},
    "tiny": {"num_flows": 2, "d_model": 16, "num_heads": 2, "num_layers": 1},
}


class AffineFlow(nn.Module):
    """z_i exp(s_i) + t_i, where s_i and t_i depend on the coordinates before i."""

    causal: Tensor

    def __init__(self, config: TransformerFlowConfig, size: int):
        super().__init__()
        d = config.d_model
        self.max_scale = config.max_scale
        self.embedding = nn.Linear(1, d)
        self.place = nn.Parameter(torch.randn(size, d))
        self.warmth = nn.Parameter(torch.zeros(2, d))  # by τ and τ²
        self.blocks = nn.ModuleList(Block(d, config.num_heads, 4 * d) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        later = torch.ones(size, size, dtype=torch.bool).triu(1)
        self.register_buffer("causal", torch.zeros(size, size).masked_fill(later, -torch.inf), persistent=False)

    def forward(self, z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """z [B, n] -> z, log-determinant [B]."""
        before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
        scale, shift = self._affine(before, slice(None), tau, None)
        return z * scale.exp() + shift, scale.sum(1)

    def inverse(self, z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """One coordinate after the other, each token through the blocks once."""
        caches = [Cache() for _ in self.blocks]
        known, logdet = [torch.zeros_like(z[:, :1])], torch.zeros_like(z[:, 0])
        for i in range(z.shape[1]):
            scale, shift = self._affine(known[-1], slice(i, i + 1), tau, caches)
            known.append((z[:, i : i + 1] - shift) * (-scale).exp())
            logdet = logdet - scale.squeeze(1)
        return torch.cat(known[1:], 1), logdet

    def _affine(self, before: Tensor, places: slice, tau: float, caches: list[Cache] | None) -> tuple[Tensor, Tensor]:
        """Of the coordinates at these places, [B, n] each, given the one before each."""
        h = self.embedding(before.unsqueeze(-1)) + self.place[places]
        h = h + (tau * self.warmth[0] + tau**2 * self.warmth[1])
        for i, block in enumerate(self.blocks):
            h = block(h, self.causal) if caches is None else block(h, cache=caches[i])
        scale, shift = (tau * self.head(self.norm(h))).unbind(-1)
        return self.max_scale * torch.tanh(scale / self.max_scale), shift


class ScalableTransformerFlow(Transport):
    config: TransformerFlowConfig
    reference: Tensor
    basis: Tensor
    mean: Tensor

    def __init__(self, config: TransformerFlowConfig):
        super().__init__(config)
        self.num_atoms = config.num_atoms
        size = 3 * config.num_atoms - 6
        self.flows = nn.ModuleList(AffineFlow(config, size) for _ in range(config.num_flows))
        self.register_buffer("reference", torch.eye(config.num_atoms, 3))
        self.register_buffer("basis", torch.zeros(3 * config.num_atoms, size))
        for name in ("mean", "unit"):
            self.register_buffer(name, torch.full((size,), torch.nan))

    @torch.no_grad()
    def set_means(self, cold: Tensor, hot: Tensor) -> None:
        """Take the reference, and means and deviations about it, from frames [n, N, 3] nm of both ends."""
        x = torch.cat([cold, hot]).to(self.unit.device, torch.float64)
        x = x - x.mean(1, keepdim=True)
        reference = x[0]
        for _ in range(3):  # to the mean of all that are aligned to it
            reference = (x @ kabsch(x, reference)).mean(0)
            reference = reference - reference.mean(0)
        turns = torch.eye(3).to(reference).unsqueeze(1)  # [3, 1, 3]
        turns = torch.linalg.cross(turns, reference.unsqueeze(0)).flatten(1)  # [3, 3N]
        shifts = torch.eye(3).to(reference).repeat(1, self.num_atoms)
        # The other columns of a complete QR are what its first six leave over: near the axes, so that a coordinate is
        # still mostly one atom's.
        basis = torch.linalg.qr(torch.cat([shifts, turns]).T, mode="complete").Q[:, 6:]
        u = (x @ kabsch(x, reference)).flatten(1) @ basis
        for name, value in (("reference", reference), ("basis", basis), ("mean", u.mean(0)), ("unit", u.std(0))):
            getattr(self, name).copy_(value)

    def chart(self, x: Tensor) -> tuple[Tensor, Frame, Tensor]:
        centre = x.mean(1)
        x = x - centre.unsqueeze(1)
        turn = kabsch(x, self.reference)
        x = x @ turn
        return x.flatten(1) @ self.basis, Frame(centre, turn.transpose(1, 2)), self._log_volume(x)

    def unchart(self, q: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        x = (q @ self.basis.T).unflatten(1, (-1, 3))
        return frame.origin.unsqueeze(1) + x @ frame.axes, self._log_volume(x)

    def _log_volume(self, x: Tensor) -> Tensor:
        c = x.transpose(1, 2) @ self.reference  # [B, 3, 3], symmetric
        m = c.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(3, dtype=c.dtype, device=c.device) - c
        # Positive definite by its leading minors; eigenvalues would raise where a row is NaN.
        second, third = m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0], torch.linalg.det(m)
        impossible = (m[:, 0, 0] <= 0) | (second <= 0) | (third <= 0)
        return torch.where(impossible, -torch.inf, third.log())

    def flow(self, q: Tensor, temperature: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        tau = math.log(temperature / self.config.t_cold) / math.log(self.config.t_hot / self.config.t_cold)
        z, logdet = (q - self.mean) / self.unit, torch.zeros_like(q[:, 0])
        flows = cast(Sequence[AffineFlow], self.flows)
        for flow in reversed(flows) if inverse else flows:
            if inverse:
                z, more = flow.inverse(z.flip(1), tau)
            else:
                z, more = flow(z, tau)
                z = z.flip(1)
            logdet = logdet + more
        return self.mean + z * self.unit, logdet


def kabsch(x: Tensor, reference: Tensor) -> Tensor:
    """Centred x [B, N, 3], reference [N, 3] -> the rotation [B, 3, 3] with the smallest |x @ rotation - reference|."""
    u, _, vh = torch.linalg.svd(x.transpose(1, 2) @ reference)
    mirrored = torch.det(u @ vh) < 0
    last = torch.where(mirrored, -1.0, 1.0)[:, None].to(x.dtype)
    return torch.cat([u[:, :, :2], u[:, :, 2:] * last.unsqueeze(1)], 2) @ vh
