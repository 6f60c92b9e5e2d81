"""The eigenvalues of a TEN layer, and the mixer that drives its eigenstates with the tokens and reads them out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.hten import group_sizes, hten_scan
from models.layers import ScaledLinear

if TYPE_CHECKING:
    from models.ten import TENConfig

NORM_EPS = 1e-6


class Eigenvalues(nn.Module):
    """The K eigenvalues λ = ρ e^{iω} of one layer, with ρ < 1 by construction; a state of scale s steps over s tokens.

    exponential: ρ = exp(-exp(ν)) (LRU, arXiv 2303.06349). At initialisation the memory τ = -s / ln ρ of every head's
        states is spread log-uniformly over s … max_seq_len tokens. Half of the states turn once per memory
        (ω = 2π s / τ), so that position within the memory can be told; the other half take ω uniformly from [0, π].
        Larger angles are conjugates of these and would add nothing.
    sigmoid: ρ = 0.99 sigmoid(ν), ω = 2π k / K, the original's. Its memory ends at 99.5 steps whatever ν learns, and
        begins at about one.
    selective (exponential only): ρ_t = exp(-exp(ν) softplus(a_t)) and ω_t = ω + b_t, where [a_t, b_t] is a linear map
        of the token: the decay as in Mamba (arXiv 2312.00752), and a phase that any token can turn to anywhere, which
        is what tracks a state such as parity (Mamba-3, arXiv 2603.15569). It begins close to the fixed recurrence.

    All parameters stay in fp32 when the model is cast to bf16 or fp16: bf16 would round ω = 2.7 to 2.703, three radians
    off after a thousand tokens.
    """

    def __init__(self, config: TENConfig):
        super().__init__()
        self.config = config
        self.nu = nn.Parameter(torch.empty(config.num_eigenstates))
        self.omega = nn.Parameter(torch.empty(config.num_eigenstates))
        self.selection = nn.Linear(config.d_model, 2 * config.num_eigenstates) if config.selective else None

    @torch.no_grad()
    def init_special(self) -> None:
        config, device = self.config, self.nu.device
        num_states, num_heads, scales = config.num_eigenstates, config.num_heads, config.hten_scales
        if self.selection is not None:
            # Changes of 0.02 a token. From zeros parity was learned in 2 of 4 trials, from these in 4.
            nn.init.normal_(self.selection.weight, std=0.02 / math.sqrt(config.d_model))
            unchanged = torch.full_like(self.nu, math.log(math.e - 1)), torch.zeros_like(self.omega)
            self.selection.bias.copy_(torch.cat(unchanged))
        if config.parameterization == "sigmoid":
            self.nu.uniform_(-3.0, 0.0)
            self.omega.copy_(2 * math.pi / num_states * torch.arange(num_states, device=device))
            return
        per_head = num_states // num_heads
        stratum = torch.arange(per_head, device=device) + torch.rand(num_heads, per_head, device=device)  # [H, K/H]
        longest = [
            max(1.0, config.max_seq_len / scale)  # in steps
            for scale, size in zip(scales, group_sizes(num_states, len(scales)), strict=True)
            for _ in range(size)
        ]
        log_tau = torch.tensor(longest, device=device).log() * (stratum / per_head).flatten()
        self.nu.copy_(-log_tau)
        once_per_memory = (2 * math.pi * torch.exp(-log_tau)).clamp(max=math.pi)
        anywhere = math.pi * torch.rand(num_states, device=device)
        self.omega.copy_(torch.where(torch.arange(num_states, device=device) % 2 == 0, once_per_memory, anywhere))

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln ρ, ω and the input scale γ in fp32 or better: [K], or if selective [B, T, K] for x [B, T, D].

        Without x a selective layer gives the [K] of a token whose features are all zero. γ = sqrt(1 - ρ²) gives white
        input the same state variance at every ρ, so the energy penalty does not tax long memory; at a scale s the mean
        of s inputs has 1/s of it. The original had none: γ = 1 with "sigmoid".
        """
        dtype = torch.promote_types(self.nu.dtype, torch.float32)
        nu, omega = self.nu.to(dtype), self.omega.to(dtype)
        if self.config.parameterization == "sigmoid":
            log_rho = math.log(0.99) + F.logsigmoid(nu)
            return log_rho, omega, torch.ones_like(log_rho)
        log_rho = -torch.exp(nu)
        if self.selection is not None:
            with torch.autocast(nu.device.type, enabled=False):
                selected = self.selection.bias if x is None else self.selection(x.to(dtype))  # [..., 2K]
            rate, turn = selected.chunk(2, -1)
            log_rho, omega = log_rho * F.softplus(rate), omega + turn
        return log_rho, omega, torch.sqrt(-torch.expm1(2 * log_rho))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Eigenvalues:
        def keep_precision(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            return tensor.to(cast.device) if torch.finfo(cast.dtype).bits < 32 else cast

        return super()._apply(keep_precision, recurse)


class EigenstateMixer(nn.Module):
    """Mixes over time: drives the eigenstates with the tokens and reads them out through the resonance blocks."""

    def __init__(self, config: TENConfig):
        super().__init__()
        num_states, num_heads = config.num_eigenstates, config.num_heads
        self.config = config
        self.eigenvalues = Eigenvalues(config)
        self.in_proj = ScaledLinear(config.d_model, 2 * num_states)
        self.resonance = nn.Parameter(torch.empty(num_heads, num_states // num_heads, num_states // num_heads))
        self.gate = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(2 * num_states, config.d_model, bias=False)
        self.skip = nn.Parameter(torch.empty(config.d_model))

    @torch.no_grad()
    def init_special(self) -> None:
        size = self.resonance.shape[-1]
        noise = torch.randn_like(self.resonance)
        self.resonance.copy_(torch.eye(size, device=noise.device) + 0.01 / math.sqrt(size) * noise)
        # Gates nearly closed and no skip: the blocks begin close to the identity. After 250 steps on bytes the loss was
        # 1.68 with a bias of -2, 1.70 with -4, 1.80 with 0, and 1.89 with -2 and a skip of 1.
        nn.init.constant_(self.gate.bias, -2.0)
        nn.init.zeros_(self.skip)

    def forward(
        self, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, D], initial_state [B, state_size], reset and counted bool [B, T] -> y [B, T, D], state, energy.

        The energy is this layer's 0-d sum over the counted positions, None without `counted`.
        """
        config = self.config
        beta, log_rho, omega = self.drive(x)
        states, final_state, energy = hten_scan(
            beta,
            log_rho,
            omega,
            config.hten_scales,
            config.hten_mode,
            initial_state=initial_state,
            reset=reset,
            counted=counted if config.energy_mode == "state" else None,
        )
        y = torch.sigmoid(self.gate(x)) * self.out_proj(self.resonate(states)) + self.skip * x
        if energy is not None:
            return y, final_state, energy.sum() / config.num_eigenstates
        if counted is not None:
            return y, final_state, (torch.exp(2 * log_rho).sum(-1) * counted).sum()
        return y, final_state, None

    def drive(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `hten_scan` runs on: x [B, T, D] -> β = γ W_in x [B, T, 2K], ln ρ and ω, each [K] or [B, T, K]."""
        log_rho, omega, gamma = self.eigenvalues(x)
        return self.in_proj(x, torch.cat([gamma, gamma], -1)), log_rho, omega

    def resonate(self, states: Tensor) -> Tensor:
        """Couple the states of each head by its R and normalise the head: [B, T, 2K] -> [B, T, 2K], heads outermost.

        Without the norm R would be absorbed by W_out, and a gain after the norm would be as well, so there is none.
        """
        heads = states.unflatten(-1, (2, self.config.num_heads, -1))  # [B, T, 2, H, K/H]
        coupled = torch.einsum("btchi,hji->bthcj", heads, self.resonance)
        return F.rms_norm(coupled, coupled.shape[-2:], eps=NORM_EPS).flatten(2)
