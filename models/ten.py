"""Temporal Eigenstate Network: a causal language model whose memory is a bank of damped complex oscillators.

Every layer keeps K complex eigenstates. Each turns by a fixed angle and shrinks by a fixed factor per token, and is
pushed by a linear map of the token (S4D, arXiv 2206.11893; LRU, arXiv 2303.06349):

    c_t = λ c_{t-1} + γ (W_in x_t),      λ = ρ e^{iω},  |λ| < 1,  γ = sqrt(1 - ρ²)
    r_t = headwise RMSNorm(R [Re c_t; Im c_t])
    y_t = sigmoid(W_g x_t + b_g) * W_out r_t + D * x_t

so a token costs the same at any distance from the start, in training (one scan) and in generation (one step). With
several `hten_scales` it is an HTEN: groups of eigenstates step over 2, 4, … tokens at once (models/hten.py).

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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_cross_entropy
from models.eigenstates import NORM_EPS, EigenstateMixer, Eigenvalues
from models.hten import state_size
from models.hub import HubModel
from models.layers import MLP
from models.sampling import check_sampling, sample_token

IGNORE_INDEX = -100


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
    hten_scales: tuple[int, ...] = (1,)  # tokens per step; the eigenstates are split over them
    hten_mode: str = "polyphase"  # how a scale above 1 steps, see models/hten.py
    selective: bool = False  # decay and phase that depend on the token
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
        if self.selective and self.parameterization != "exponential":
            problems.append(f"selective needs parameterization exponential, not {self.parameterization!r}")
        problems += self._scale_problems()
        if problems:
            raise ValueError("TENConfig: " + "; ".join(problems))

    @property
    def state_size(self) -> int:
        """Numbers that a layer carries over time for each row: 2 * num_eigenstates, more with several scales."""
        return state_size(self.num_eigenstates, self.hten_scales, self.hten_mode)

    def _scale_problems(self) -> list[str]:
        scales = self.hten_scales
        if not scales or any(not isinstance(s, int) or s < 1 for s in scales):
            return [f"hten_scales must be one or more whole numbers of at least 1, not {scales}"]
        problems = []
        if len(set(scales)) < len(scales):
            problems.append(f"hten_scales must differ from each other, not {scales}")
        if len(scales) > self.num_eigenstates:
            problems.append(f"hten_scales {scales} are more than the num_eigenstates {self.num_eigenstates} to split")
        return problems


# Parameters at this vocabulary: 33.1M, 85.9M, 180.6M, 321.5M, 523.4M and 1.208B.
PRESETS = {
    "nano": TENConfig(),
    "micro": TENConfig(d_model=768, num_layers=8, num_eigenstates=192, num_heads=6, d_ff=3072, max_seq_len=1024),
    "small": TENConfig(d_model=1024, num_layers=12, num_eigenstates=256, num_heads=8, d_ff=4224, max_seq_len=1024),
    "medium": TENConfig(d_model=1280, num_layers=16, num_eigenstates=320, num_heads=10, d_ff=4992, max_seq_len=1024),
    "large": TENConfig(
        d_model=1536,
        num_layers=18,
        num_eigenstates=384,
        num_heads=12,
        d_ff=6528,
        max_seq_len=1024,
        hten_scales=(1, 2, 4),
        energy_reg_weight=0.02,
    ),
    "xlarge": TENConfig(
        d_model=2048,
        num_layers=26,
        num_eigenstates=512,
        num_heads=16,
        d_ff=8320,
        max_seq_len=2048,
        hten_scales=(1, 2, 4, 8),
        energy_reg_weight=0.02,
    ),
}


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


class TEN(HubModel):
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
        """Names of the parameters to keep in fp32 and out of weight decay, and to train at a lower learning rate.

        ν and ω of every layer. What a selective layer computes from the token stays in fp32 as well, but learns at the
        full rate: at a tenth of it parity was learned in 0 of 4 trials, where the full one learned it in all.
        """
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Eigenvalues)
            for name in ("nu", "omega")
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
            initial_state: [num_layers, B, config.state_size] fp32, the "state" of an earlier call.
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
        if labels is None or counted is None or energy is None:  # all of them or none
            out = {"logits": F.linear(hidden[:, -logits_to_keep:], self.embedding.weight)}
        else:
            num_items = (counted.sum() if num_items is None else num_items).clamp(min=1)
            out = self._losses(hidden, labels, energy / num_items, num_items)
        return {**out, "state": state} if return_state else out

    def _encode(
        self, input_ids: Tensor, initial_state: Tensor | None, reset: Tensor | None, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed, run the blocks, normalise -> hidden [B, T, D], state [L, B, S], mean of the layers' energies."""
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
        expected = (self.config.num_layers, shape[0], self.config.state_size)
        if initial_state is not None and tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state must be {list(expected)}, not {list(initial_state.shape)}")

    def compute_loss(self, inputs: Tensor, targets: Tensor, return_dict: bool = True) -> dict[str, Tensor] | Tensor:
        """The losses of `forward` with labels; the weighted loss alone if not `return_dict`.

        Under DDP, FSDP, DeepSpeed or torch.compile call the wrapper with labels instead: this method would bypass it.
        """
        losses = self(inputs, labels=targets)
        return losses if return_dict else losses["loss"]

    def prefill(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read [B, T] tokens at once -> logits [B, V] of the last position, state [num_layers, B, state_size]."""
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
