"""Temporal Eigenstate Network: a causal language model whose memory is a bank of damped complex oscillators.

Every layer keeps K complex eigenstates. Each turns by a fixed angle and shrinks by a fixed factor per token, and is
pushed by a linear map of the token (S4D, arXiv 2206.11893; LRU, arXiv 2303.06349):

    c_t = λ c_{t-1} + γ (W_in x_t),      λ = ρ e^{iω},  |λ| < 1,  γ = sqrt(1 - ρ²)
    r_t = headwise RMSNorm(R [Re c_t; Im c_t])
    y_t = sigmoid(W_g x_t + b_g) * W_out r_t + D * x_t

so a token costs the same at any distance from the start, in training (one scan) and in generation (one step).

    model = TEN(PRESETS["nano"])
    model(input_ids)["logits"]                          # [B, T, V]
    model(input_ids, labels=labels)["loss"].backward()
    model.generate(prompt_ids, max_new_tokens=64, top_p=0.9)
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from TEN.__init__.

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import eigen_scan, linear_cross_entropy
from models.layers import MLP, ScaledLinear
from models.sampling import check_sampling, sample_token

IGNORE_INDEX = -100
NORM_EPS = 1e-6


@dataclass(frozen=True)
class TENConfig:
    """Shape and losses of a TEN; the defaults are the nano model. Raises one ValueError that lists every bad field."""

    vocab_size: int = 50257
    d_model: int = 512
    num_layers: int = 4
    num_eigenstates: int = 128  # complex states of a layer, over all heads and scales
    num_heads: int = 4
    d_ff: int = 1280
    max_seq_len: int = 512  # the longest memory at initialisation, in tokens; not a limit on the input
    hten_scales: tuple[int, ...] = (1,)
    hten_mode: str = "polyphase"
    energy_reg_weight: float = 0.01
    energy_mode: str = "state"  # "state": mean |c|² over states; "spectral": Σ ρ², the original's data-free proxy
    parameterization: str = "exponential"  # ρ = exp(-exp(ν)); "sigmoid": the original's ρ = 0.99 sigmoid(ν)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hten_scales", tuple(self.hten_scales))  # JSON and YAML bring a list
        sizes = ("vocab_size", "d_model", "num_layers", "num_eigenstates", "num_heads", "d_ff", "max_seq_len")
        choices = {
            "hten_mode": ("polyphase", "hold"),
            "energy_mode": ("state", "spectral"),
            "parameterization": ("exponential", "sigmoid"),
        }
        problems = [f"{n} must be at least 1, not {getattr(self, n)}" for n in sizes if getattr(self, n) < 1]
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.num_heads >= 1 and self.num_eigenstates % self.num_heads:
            problems.append(f"num_eigenstates {self.num_eigenstates} must be a multiple of num_heads {self.num_heads}")
        if not 0.0 <= self.energy_reg_weight < math.inf:
            problems.append(f"energy_reg_weight must be a finite number >= 0, not {self.energy_reg_weight}")
        if self.hten_scales != (1,):
            problems.append(f"hten_scales {self.hten_scales} asks for HTEN, which TEN does not compute: it takes (1,)")
        if problems:
            raise ValueError("TENConfig: " + "; ".join(problems))


PRESETS = {
    "nano": TENConfig(),  # 33.10M parameters
}


class Eigenvalues(nn.Module):
    """The K eigenvalues λ = ρ e^{iω} of one layer, with ρ < 1 by construction.

    exponential: ρ = exp(-exp(ν)) (LRU, arXiv 2303.06349). At initialisation the memory τ = -1 / ln ρ of every head's
        states is spread log-uniformly over 1 … max_seq_len tokens. Half of the states turn once per memory
        (ω = 2π / τ), so that position within the memory can be told; the other half take ω uniformly from [0, π].
        Larger angles are conjugates of these and would add nothing.
    sigmoid: ρ = 0.99 sigmoid(ν), ω = 2π k / K, the original's. Its memory ends at 99.5 tokens whatever ν learns, and
        begins at about one.

    ν and ω stay in fp32 when the model is cast to bf16 or fp16: bf16 would round ω = 2.7 to 2.703, three radians off
    after a thousand tokens.
    """

    def __init__(self, config: TENConfig):
        super().__init__()
        self.config = config
        self.nu = nn.Parameter(torch.empty(config.num_eigenstates))
        self.omega = nn.Parameter(torch.empty(config.num_eigenstates))

    @torch.no_grad()
    def init_special(self) -> None:
        config, device = self.config, self.nu.device
        num_states, num_heads = config.num_eigenstates, config.num_heads
        if config.parameterization == "sigmoid":
            self.nu.uniform_(-3.0, 0.0)
            self.omega.copy_(2 * math.pi / num_states * torch.arange(num_states, device=device))
            return
        per_head = num_states // num_heads
        stratum = torch.arange(per_head, device=device) + torch.rand(num_heads, per_head, device=device)  # [H, K/H]
        log_tau = math.log(config.max_seq_len) * (stratum / per_head).flatten()
        self.nu.copy_(-log_tau)
        once_per_memory = (2 * math.pi * torch.exp(-log_tau)).clamp(max=math.pi)
        anywhere = math.pi * torch.rand(num_states, device=device)
        self.omega.copy_(torch.where(torch.arange(num_states, device=device) % 2 == 0, once_per_memory, anywhere))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln ρ, ω and the input scale γ, each [K] in fp32 or better.

        γ = sqrt(1 - ρ²) gives white input the same state variance at every ρ, so the energy penalty does not tax long
        memory. The original had none: γ = 1 with "sigmoid".
        """
        dtype = torch.promote_types(self.nu.dtype, torch.float32)
        nu, omega = self.nu.to(dtype), self.omega.to(dtype)
        if self.config.parameterization == "sigmoid":
            log_rho = math.log(0.99) + F.logsigmoid(nu)
            return log_rho, omega, torch.ones_like(log_rho)
        log_rho = -torch.exp(nu)
        return log_rho, omega, torch.sqrt(-torch.expm1(2 * log_rho))

    def _apply(self, fn, recurse=True):
        def keep_precision(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            return tensor.to(cast.device) if torch.finfo(cast.dtype).bits < 32 else cast

        return super()._apply(keep_precision, recurse)


class EigenstateMixer(nn.Module):
    """Mixes over time: drives the eigenstates with the tokens and reads them out through the resonance blocks."""

    def __init__(self, config: TENConfig):
        super().__init__()
        num_states, num_heads = config.num_eigenstates, config.num_heads
        self.num_heads, self.energy_mode = num_heads, config.energy_mode
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
        """x [B, T, D], initial_state [B, 2K], reset and counted bool [B, T] -> y [B, T, D], state [B, 2K], energy.

        The energy is this layer's 0-d sum over the counted positions, None without `counted`.
        """
        log_rho, omega, gamma = self.eigenvalues()
        beta = self.in_proj(x, gamma.repeat(2))  # [B, T, 2K]
        state_energy = counted is not None and self.energy_mode == "state"
        states, final_state, energy = eigen_scan(
            beta,
            log_rho,
            omega,
            initial_state=initial_state,
            reset=reset,
            with_energy=state_energy,
            energy_mask=counted if state_energy else None,
        )
        y = torch.sigmoid(self.gate(x)) * self.out_proj(self.resonate(states)) + self.skip * x
        if state_energy:
            return y, final_state, energy.sum() / log_rho.numel()
        if counted is not None:
            return y, final_state, torch.exp(2 * log_rho).sum() * counted.sum()
        return y, final_state, None

    def resonate(self, states: Tensor) -> Tensor:
        """Couple the states of each head by its R and normalise the head: [B, T, 2K] -> [B, T, 2K], heads outermost.

        Without the norm R would be absorbed by W_out, and a gain after the norm would be as well, so there is none.
        """
        heads = states.unflatten(-1, (2, self.num_heads, -1))  # [B, T, 2, H, K/H]
        coupled = torch.einsum("btchi,hji->bthcj", heads, self.resonance)
        return F.rms_norm(coupled, coupled.shape[-2:], eps=NORM_EPS).flatten(2)


class Block(nn.Module):
    def __init__(self, config: TENConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mixer = EigenstateMixer(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = MLP(config.d_model, config.d_ff)

    def forward(
        self, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, final_state, energy = self.mixer(self.mixer_norm(x), initial_state, reset, counted)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), final_state, energy


class TEN(nn.Module, PyTorchModelHubMixin):
    """The language model. With `gradient_checkpointing = True` backward recomputes each block instead of storing it."""

    def __init__(self, config: TENConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter; call it after `to_empty` on a model that was built on the meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        # Last, so that the generic normal cannot overwrite them, as it did in the original.
        for module in self.modules():
            if isinstance(module, Eigenvalues | EigenstateMixer):
                module.init_special()

    def fp32_parameters(self) -> set[str]:
        """Names of the parameters to keep in fp32 and out of weight decay, and to train at a lower learning rate."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Eigenvalues)
            for name, _ in module.named_parameters()
        }

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
        reset: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        skip_output_projection: bool = False,
        logits_to_keep: int = 0,
    ) -> dict[str, Tensor] | Tensor:
        """Run the model over whole sequences.

        Args:
            input_ids: [B, T] int64, T >= 1.
            labels: [B, T] int64, the token that each position should predict; -100 is not counted.
            num_items: 0-d int64, what the losses are divided by; default the number of labels counted here.
            reset: [B, T] bool, true where a document starts: it sees nothing of what stands before.
            initial_state: [num_layers, B, 2 * num_eigenstates] fp32, the "state" of an earlier call.
            return_state: add "state", the state after the last position; gradients flow through it both ways.
            skip_output_projection: return the normalised hidden states [B, T, D] themselves, nothing else.
            logits_to_keep: logits for the last n positions only; 0 means all.

        Returns:
            Without labels {"logits": [B, T, V]}. With labels {"loss", "ce_loss", "energy_loss"}, 0-d, where loss =
            ce_loss + energy_reg_weight * energy_loss and only loss carries a gradient. energy_loss is the mean over
            layers of Σ |c|² / K per counted position, or with energy_mode "spectral" of Σ ρ², which comes to 8.03 at
            the original's initialisation.

        Raises:
            ValueError or TypeError for shapes, dtypes or combinations that do not fit.
        """
        self._check_inputs(input_ids, labels, reset, initial_state)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all) or a number of positions, not {logits_to_keep}")
        if skip_output_projection and (labels is not None or return_state):
            raise ValueError(
                "skip_output_projection returns the hidden states alone: leave out labels and return_state"
            )
        counted = None if labels is None else labels != IGNORE_INDEX
        hidden, state, energy = self._encode(input_ids, initial_state, reset, counted)
        if skip_output_projection:
            return hidden
        if labels is None:
            out = {"logits": F.linear(hidden[:, -logits_to_keep:], self.embedding.weight)}
        else:
            num_items = (counted.sum() if num_items is None else num_items).clamp(min=1)
            out = self._losses(hidden, labels, energy / num_items, num_items)
        return {**out, "state": state} if return_state else out

    def _encode(
        self, input_ids: Tensor, initial_state: Tensor | None, reset: Tensor | None, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed, run the blocks, normalise -> hidden [B, T, D], state [L, B, 2K], mean of the layers' energies."""
        x = self.embedding(input_ids)
        states, energies = [], []
        for i, block in enumerate(self.blocks):
            args = (x, None if initial_state is None else initial_state[i], reset, counted)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # No randomness in a block, hence no generator state to save.
                x, state, energy = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x, state, energy = block(*args)
            states.append(state)
            energies.append(energy)
        mean_energy = None if counted is None else torch.stack(energies).mean()
        return self.norm(x), torch.stack(states), mean_energy

    def _losses(self, hidden: Tensor, labels: Tensor, energy: Tensor, num_items: Tensor) -> dict[str, Tensor]:
        weight = self.config.energy_reg_weight
        parts = linear_cross_entropy(
            hidden,
            self.embedding.weight,
            labels,
            energy=energy if weight else None,  # unweighted, it is reported but costs no backward
            energy_weight=weight,
            ignore_index=IGNORE_INDEX,
            num_items=num_items,
        )
        return {"loss": parts.loss, "ce_loss": parts.ce_loss, "energy_loss": energy.detach()}

    def _check_inputs(
        self, input_ids: Tensor, labels: Tensor | None, reset: Tensor | None, initial_state: Tensor | None
    ) -> None:
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"input_ids must be [batch, time] with at least one position, not {list(shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be integer token ids, not {input_ids.dtype}")
        if labels is not None and tuple(labels.shape) != shape:
            raise ValueError(f"labels must have the shape of input_ids {list(shape)}, not {list(labels.shape)}")
        if reset is not None and (tuple(reset.shape) != shape or reset.dtype != torch.bool):
            raise ValueError(f"reset must be bool {list(shape)}, not {reset.dtype} {list(reset.shape)}")
        expected = (self.config.num_layers, shape[0], 2 * self.config.num_eigenstates)
        if initial_state is not None and tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state must be {list(expected)}, not {list(initial_state.shape)}")

    def compute_loss(self, inputs: Tensor, targets: Tensor, return_dict: bool = True) -> dict[str, Tensor] | Tensor:
        """The losses of `forward` with labels; the weighted loss alone if not `return_dict`.

        Under DDP, FSDP, DeepSpeed or torch.compile call the wrapper with labels instead: this method would bypass it.
        """
        losses = self(inputs, labels=targets)
        return losses if return_dict else losses["loss"]

    def prefill(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read [B, T] tokens at once -> logits [B, V] of the last position, state [num_layers, B, 2K]."""
        out = self(input_ids, initial_state=state, return_state=True, logits_to_keep=1)
        return out["logits"][:, -1], out["state"]

    def step(self, token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token per row, [B] -> logits [B, V] and the new state, at a cost that does not grow with time."""
        return self.prefill(token[:, None], state)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos_id: int | None = None,
    ) -> Tensor:
        """Continue [B, T] prompts of equal length -> [B, T + n], n <= max_new_tokens. Arguments as in `sample_token`.

        A row that has drawn `eos_id` repeats it; when all rows have, generation ends early.
        """
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        logits, state = self.prefill(input_ids)
        tokens = [input_ids]
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        while True:
            token = sample_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished |= token == eos_id
            tokens.append(token[:, None])
            if len(tokens) > max_new_tokens or (eos_id is not None and finished.all()):
                return torch.cat(tokens, dim=1)
            logits, state = self.step(token, state)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs):
        # The mixin's default leaves a weight that the file lacks at its random initial value.
        return super()._from_pretrained(strict=strict, **kwargs)
