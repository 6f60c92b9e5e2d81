"""PoH-HRM, pointer over heads: a transformer that refines its output R times and weighs its attention heads anew.

In each block a controller with two states looks at the tokens and says how much each head counts. Its fast state moves
at every refinement r, its slow one at every T-th, and both live through all R, gradient included:

    y = norm(x);  u = W_in mean_tokens(y)
    z_H <- LN(GRU_H(u, z_H))                   where r is a multiple of T
    z_L <- LN(GRU_L([u; z_H], z_L))
    a = softmax(W_r (z_L + W_mix z_H) / τ)     over the H heads; only the k largest where route_mode is topk
    x <- x + W_O concat_h(H γ_h a_h head_h(y)) so that equal weights a_h = 1 / H are plain attention
    x <- x + MLP(norm(x))

Controls: `routing` "uniform" has no controller, "frozen" one that stays as it was drawn.

`legacy` is what the original computed. Its gates scale groups of channels behind W_O and weaken attention H-fold, its
controllers start from zero in every call, so that T does nothing, and their slow half never learns.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.maze_layers import MOST_REFINEMENTS, SIZES, Block, MazeConfig, MazeModel, Refiner

LEGACY_POSITIONS = 512  # rows of a table of the stack's own, whatever the maze's size


@dataclass(frozen=True, kw_only=True)
class PoHConfig(MazeConfig):
    R: int = 4  # refinements
    T: int = 4  # refinements from one move of the slow state to the next
    routing: str = "learned"  # or the controls: "uniform", "frozen"
    route_per: str = "maze"  # or "token": each has states and weights of its own
    route_mode: str = "soft"  # or "topk"
    route_topk: int = 2
    route_temp: float = 2.0
    route_ent_weight: float = 0.0  # above 0 sharpens the routing, below 0 evens it out
    halting: bool = False
    ponder_weight: float = 0.01

    def problems(self) -> list[str]:
        found = super().problems()
        choices = {
            "routing": ("learned", "uniform", "frozen"),
            "route_per": ("maze", "token"),
            "route_mode": ("soft", "topk"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not 1 <= self.R <= MOST_REFINEMENTS:
            found.append(f"R must be 1 to {MOST_REFINEMENTS}, not {self.R}")
        if self.T < 1:
            found.append(f"T must be at least 1, not {self.T}")
        if self.d_model < 2:
            found.append(f"d_model must be at least 2 for a controller of half of it, not {self.d_model}")
        if self.route_mode == "topk" and not 2 <= self.route_topk <= self.num_heads:
            # Of a single head the weight is 1 whatever the router says: it would never learn.
            found.append(f"route_topk must be one of 2 … {self.num_heads} heads, not {self.route_topk}")
        if self.routing != "uniform" and self.num_heads < 2:
            found.append("there is nothing to route among with num_heads 1")
        if not 0 < self.route_temp < math.inf:
            found.append(f"route_temp must be a finite number above 0, not {self.route_temp}")
        for name in ("route_ent_weight", "ponder_weight"):
            if not math.isfinite(getattr(self, name)):
                found.append(f"{name} must be a finite number, not {getattr(self, name)}")
        if self.legacy and (self.halting or self.routing != "learned" or self.route_per != "maze"):
            found.append("legacy has no halting, and learned routing per maze only")
        if self.legacy and self.maze_size**2 > LEGACY_POSITIONS:
            found.append(f"legacy has {LEGACY_POSITIONS} positions, too few for maze_size {self.maze_size}")
        return found


# Before parity (models/parity.py) cuts them to the parameters or FLOPs of the baseline of that name.
PRESETS = {name: PoHConfig(maze_size=16, **size) for name, size in SIZES.items()}

State = tuple[Tensor, Tensor]  # fast and slow, [rows, D / 2]


def head_weights(logits: Tensor, config: PoHConfig) -> tuple[Tensor, Tensor]:
    """logits [..., H] -> weights that sum to 1, and their entropy in nats, [...]."""
    logits = logits / config.route_temp
    if config.route_mode == "topk":
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(config.route_topk).indices, True)
        logits = logits.masked_fill(~kept, -math.inf)
    weights = logits.softmax(-1)
    # 0 log 0 is 0, and its gradient must not be -inf * 0.
    log_weights = logits.log_softmax(-1).masked_fill(logits == -math.inf, 0)
    return weights, -(weights * log_weights).sum(-1)


class Controller(nn.Module):
    """Two recurrent states, in fp32 or better, and the head weights that they ask for."""

    def __init__(self, config: PoHConfig):
        super().__init__()
        self.config = config
        width = config.d_model // 2
        self.input = nn.Linear(config.d_model, width)
        self.fast = nn.GRUCell(2 * width, width)
        self.slow = nn.GRUCell(width, width)
        self.fast_norm, self.slow_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.router = nn.Linear(width, config.num_heads)
        self.mix = nn.Linear(width, width, bias=False)
        # Learned and not 0: where T >= R the slow state moves once, and from 0 its recurrent weights would not learn.
        # As large as the norms keep the states.
        self.start = None if config.legacy else nn.Parameter(torch.randn(2, width))

    def forward(self, y: Tensor, step: int, state: State | None) -> tuple[Tensor, Tensor, State]:
        """y [B, n, D], refinement 0 …, state of the last -> weights [B, 1 or n, H], entropy [B, 1 or n], state."""
        with torch.autocast(y.device.type, enabled=False):
            y = y.mean(1, keepdim=True) if self.config.route_per == "maze" else y
            u = self.input(y.to(self.input.weight.dtype)).flatten(0, 1)  # [rows, D / 2]
            if state is None:
                start = u.new_zeros(2, u.shape[1]) if self.start is None else self.start
                fast, slow = start.unsqueeze(1).expand(-1, len(u), -1)
            else:
                fast, slow = state
            if step % self.config.T == 0:
                slow = self.slow_norm(self.slow(u, slow))
            if self.config.legacy:
                slow = slow.detach()
            fast = self.fast_norm(self.fast(torch.cat([u, slow], 1), fast))
            logits = self.router(fast + self.mix(slow))
            weights, entropy = head_weights(logits.unflatten(0, y.shape[:2]), self.config)
        return weights, entropy, (fast, slow)


class PoHBlock(Block):
    def __init__(self, config: PoHConfig):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(config.num_heads))
        self.controller = None if config.routing == "uniform" else Controller(config)
        if self.controller is not None and config.routing == "frozen":
            self.controller.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, x: Tensor, step: int, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """x [B, n, D] -> x, entropy of the routing [B, 1 or n], state of the controller."""
        y = self.attention_norm(x)
        gate, entropy = self.gain.view(1, 1, -1), None
        if self.controller is not None:
            weights, entropy, state = self.controller(y, step, state)
            gate = gate * len(self.gain) * weights
        x = x + self.dropout(self.attention(y, gate))
        return x + self.dropout(self.mlp(self.mlp_norm(x))), entropy, state


class LegacyPoHBlock(nn.Module):
    def __init__(self, config: PoHConfig):
        super().__init__()
        d, self.num_heads = config.d_model, config.num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, config.num_heads, config.dropout, batch_first=True)
        self.up, self.down = nn.Linear(d, config.d_ff, bias=False), nn.Linear(config.d_ff, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.gain = nn.Parameter(torch.ones(config.num_heads))
        self.controller = Controller(config)

    def forward(self, x: Tensor, step: int, state: State | None) -> tuple[Tensor, Tensor, None]:
        y = self.attention_norm(x)
        weights, entropy, _ = self.controller(y, 0, None)  # whatever the step and state are
        attended = self.attention(y, y, y, need_weights=False)[0].unflatten(-1, (self.num_heads, -1))
        gated = attended * (self.gain * weights).unsqueeze(-1)
        x = x + self.dropout(gated.flatten(-2))
        y = self.down(self.dropout(self.up(self.mlp_norm(x)).relu()))
        return x + self.dropout(y), entropy.detach(), None


@torch.no_grad()
def routing_weights(model: "PoH", passages: Tensor, start: Tensor, goal: Tensor) -> Tensor:
    """What each block's controller gives each head at each refinement, [blocks, R, B, 1 or n, H]; not for "uniform"."""
    controllers = [module for module in model.modules() if isinstance(module, Controller)]
    seen: list[Tensor] = []
    hooks = [c.register_forward_hook(lambda module, inputs, out: seen.append(out[0])) for c in controllers]
    model.encode(model.embedding(passages, start, goal))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).unflatten(0, (model.config.R, len(controllers))).transpose(0, 1).float()


class PoH(MazeModel):
    """The solver. `entropy_scale` is a factor on route_ent_weight, for a schedule to fill in: `scale.fill_(0.5)`."""

    config: PoHConfig
    entropy_scale: Tensor

    def __init__(self, config: PoHConfig):
        super().__init__(config)
        block = LegacyPoHBlock if config.legacy else PoHBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.refiner = Refiner(config.d_model, config.R, config.halting)
        self.stack_place = nn.Embedding(LEGACY_POSITIONS, config.d_model) if config.legacy else None
        # In checkpoints only where it has a say: a resumed run goes on with the scale that it had.
        self.register_buffer("entropy_scale", torch.ones(()), persistent=config.route_ent_weight != 0)
        self.init_weights()

    def encode(self, x: Tensor) -> tuple[Tensor, dict]:
        states: list[State | None] = [None] * len(self.blocks)
        entropies = []

        def stack(h: Tensor, step: int) -> Tensor:
            if self.stack_place is not None:
                h = h + self.stack_place.weight[: h.shape[1]]
            for i, block in enumerate(self.blocks):
                h, entropy, states[i] = self.run(block, h, step, states[i])
                entropies.append(entropy)
            return h

        h, ponder = self.refiner(x, stack)
        extras: dict[str, tuple[float | Tensor, Tensor]] = {}
        if self.config.routing != "uniform":
            weight = self.config.route_ent_weight * self.entropy_scale
            extras["route_entropy"] = weight, torch.stack(entropies).mean(0)
        if ponder is not None:
            extras["ponder_loss"] = self.config.ponder_weight, ponder
        return h, extras
