"""What a trained TEN remembers and for how long: its eigenvalues read as half-lives in tokens, dead weight counted.

    for group in spectrum(model):
        print(group.layer, group.scale, group.context, len(group.dead))

The contribution of an eigenstate is the root mean square that it adds to its mixer's output, the gate left open, when
the tokens are white noise of unit variance after their norm (whose gain is folded into W_in):

    a_k = |W_in,k| γ_k / sqrt(s (1 - ρ_k²))                      root mean square of c_k; a mean of s tokens has 1/s
    contribution_k = a_k ‖W_out,h R_h e_k‖ / rms_h               rms_h: of head h after R, what its norm divides by

A state is dead where this is below a thousandth of the median of its layer. It is a duplicate of an earlier one of its
head and scale where both answer a token alike: the correlation of λ_i^n and λ_j^n over n = 0, 1, … is sqrt(1 - d²) with
d = |λ_i - λ_j| / |1 - λ_i λ̄_j|, and d is below 0.05 for λ_j or for its conjugate, with which a state can do the same.
Unlike |λ_i - λ_j|, d does not take all slow states for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from models.eigenstates import EigenstateMixer
from models.hten import group_sizes
from models.ten import TEN, Block

DEAD = 1e-3  # of the layer's median contribution
SAME = 0.05  # d above: a correlation of 0.9987
FADED = 0.01


class ScaleSpectrum(NamedTuple):
    """The eigenstates of one layer and scale. Lists have an entry for each of them; memories are in tokens.

    `context` is the time after which a tenth of the states still holds more than 1 % of what it was given, and
    `weighted_context` the time after which the states that still do make up a tenth of the squared contributions.
    `dead` and `duplicates` hold positions in the lists. A selective layer is described at rest, that is for a token
    whose features are all zero.
    """

    layer: int
    scale: int
    head: list[int]
    magnitude: list[float]  # ρ, of a step over `scale` tokens
    phase: list[float]  # ω of such a step, in radians
    half_life: list[float]
    contribution: list[float]
    context: float
    weighted_context: float
    dead: list[int]
    duplicates: list[int]


@torch.no_grad()
def spectrum(model: TEN) -> list[ScaleSpectrum]:
    """Layer by layer, scale by scale; computed in float64 on the CPU from the weights alone."""
    return [
        group
        for layer, block in enumerate(cast(Iterable[Block], model.blocks))
        for group in _layer_spectrum(layer, block.mixer, block.mixer_norm.weight)
    ]


def _layer_spectrum(layer: int, mixer: EigenstateMixer, gain: Tensor) -> list[ScaleSpectrum]:
    config = mixer.config
    log_rho, omega, gamma = (x.double().cpu() for x in mixer.eigenvalues())  # [K]
    sizes = group_sizes(config.num_eigenstates, len(config.hten_scales))
    scale = torch.tensor(config.hten_scales).repeat_interleave(torch.tensor(sizes))  # [K]
    head = torch.arange(config.num_eigenstates) // (config.num_eigenstates // config.num_heads)
    power = _input_power(mixer, gain) * gamma.square() / (-torch.expm1(2 * log_rho) * scale)  # [K], of c_k
    contribution = _contribution(mixer, power)
    fading = scale / -log_rho  # tokens in which a state shrinks by e
    eigenvalue = torch.polar(log_rho.exp(), omega)
    groups = []
    for states in torch.arange(config.num_eigenstates).split(sizes):
        share = contribution[states].square()
        groups.append(
            ScaleSpectrum(
                layer=layer,
                scale=int(scale[states[0]]),
                head=head[states].tolist(),
                magnitude=log_rho[states].exp().tolist(),
                phase=omega[states].tolist(),
                half_life=(math.log(2) * fading[states]).tolist(),
                contribution=contribution[states].tolist(),
                context=_slowest_tenth(-math.log(FADED) * fading[states], torch.ones_like(share)),
                weighted_context=_slowest_tenth(-math.log(FADED) * fading[states], share),
                dead=(contribution[states] < DEAD * contribution.median()).nonzero().flatten().tolist(),
                duplicates=_duplicates(eigenvalue[states], head[states]),
            )
        )
    return groups


def _input_power(mixer: EigenstateMixer, gain: Tensor) -> Tensor:
    """Mean of |W_in x|² for white x, without γ: [K]."""
    weight = mixer.in_proj.weight.double().cpu() * gain.double().cpu()  # [2K, D]
    return weight.square().sum(1).unflatten(0, (2, -1)).sum(0)


def _contribution(mixer: EigenstateMixer, power: Tensor) -> Tensor:
    """Root mean square in the mixer's output of states with mean squares `power`, [K] -> [K]."""
    resonance = mixer.resonance.double().cpu()  # [H, K/H, K/H]
    per_head = power.unflatten(0, (len(resonance), -1))  # [H, K/H]
    # Half of a state's power is in its real part and half in its imaginary one, and the norm divides by their mean.
    rms = (torch.einsum("hij,hj->hi", resonance.square(), per_head).mean(-1) / 2).sqrt()  # [H]
    readout = mixer.out_proj.weight.double().cpu().unflatten(1, (len(resonance), 2, -1))  # [D, H, 2, K/H]
    column = torch.einsum("dhci,hij->dhcj", readout, resonance).square().sum((0, 2))  # [H, K/H]
    return (per_head * column / 2).sqrt().div(rms.clamp(min=torch.finfo(rms.dtype).tiny)[:, None]).flatten()


def _slowest_tenth(memory: Tensor, weight: Tensor) -> float:
    """The largest memory that states of at least a tenth of all weight reach."""
    memory, order = memory.sort(descending=True)
    reached = weight[order].cumsum(0) >= 0.1 * weight.sum()
    return memory[reached.nonzero()[0, 0]].item()


def _duplicates(eigenvalue: Tensor, head: Tensor) -> list[int]:
    """Positions of states that answer as an earlier one of their head does."""
    one, other = eigenvalue[:, None], eigenvalue[None]
    distance = torch.minimum(*((one - x).abs() / (1 - one * x.conj()).abs() for x in (other, other.conj())))
    alike = (distance < SAME) & (head[:, None] == head[None])
    return alike.tril(-1).any(1).nonzero().flatten().tolist()
