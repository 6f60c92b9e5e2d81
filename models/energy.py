"""How much the eigenstates of a TEN hold, beside what they could hold at most.

With E_t = Σ_k |c_k(t)|² over the states of one scale s and ρ the largest of their decays, the triangle inequality gives

    polyphase   sqrt(E_t) <= ρ sqrt(E_{t-s}) + ‖β̄_t‖,  E_{t-s} = 0 at the first s positions of a document
    hold        sqrt(E_t) <= ρ sqrt(E_{t-1}) + ‖β̄_t‖ where a block completes,  = sqrt(E_{t-1}) elsewhere

where β̄ is the mean that the scale is driven with, and, for a selective layer, ρ is that of position t. Equality needs
every state to be as slow as the slowest and every push to line up with its state.

The original's "Theorem 4", E_t <= E_0 + t B² where ‖β‖ <= B, is not true: an undamped state under a constant push
reaches t² B².
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import multiscale_pool
from models.eigenstates import EigenstateMixer
from models.hten import document_age, group_sizes, hten_scan, split_groups
from models.ten import TEN


class LayerEnergy(NamedTuple):
    """sqrt(E_t) of the states of one layer and scale, and its bound; both [B, T] in fp32 or better."""

    layer: int
    scale: int
    root: Tensor
    bound: Tensor

    @property
    def ratio(self) -> float:
        """The largest sqrt(E_t) / bound_t: never above 1 but for rounding. 0 where nothing has moved yet."""
        return (self.root / self.bound.clamp(min=torch.finfo(self.bound.dtype).tiny)).max().item()


@torch.no_grad()
def energy_bound(model: TEN, input_ids: Tensor, reset: Tensor | None = None) -> list[LayerEnergy]:
    """Run [B, T] tokens, bool `reset` at document starts -> energies and bounds, layer by layer, scale by scale.

    The states are computed in fp32 or better from the inputs that each layer gets in the model's own precision.
    """
    mixers = [module for module in model.modules() if isinstance(module, EigenstateMixer)]
    found: list[LayerEnergy] = []

    def measure(mixer: EigenstateMixer, args: tuple, output: tuple) -> None:
        found.extend(_layer_energy(mixers.index(mixer), mixer, args[0], reset))

    hooks = [mixer.register_forward_hook(measure) for mixer in mixers]
    try:
        model(input_ids, reset=reset, skip_output_projection=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _layer_energy(layer: int, mixer: EigenstateMixer, x: Tensor, reset: Tensor | None) -> list[LayerEnergy]:
    scales, mode = mixer.config.hten_scales, mixer.config.hten_mode
    beta, log_rho, omega = mixer.drive(x)
    beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
    states = hten_scan(beta, log_rho, omega, scales, mode, reset=reset).states
    age = document_age(reset, torch.zeros(len(x), dtype=torch.int64, device=x.device), x.shape[1])  # [B, T]
    groups = zip(
        scales,
        split_groups(states, len(scales)),
        split_groups(beta, len(scales)),
        log_rho.exp().split(group_sizes(log_rho.shape[-1], len(scales)), -1),
        strict=True,
    )
    energies = []
    for scale, c, pushes, rho in groups:
        root = c.norm(dim=-1)  # [B, T]
        back = scale if mode == "polyphase" else 1
        before = F.pad(root, (back, 0))[:, : root.shape[1]].masked_fill(age < back, 0)
        push = multiscale_pool(pushes, (scale,), reset=reset).norm(dim=-1)
        steps = (age + 1) % scale == 0 if mode == "hold" else torch.ones_like(age, dtype=torch.bool)
        bound = torch.where(steps, rho.amax(-1) * before + push, before)
        energies.append(LayerEnergy(layer, scale, root, bound))
    return energies
