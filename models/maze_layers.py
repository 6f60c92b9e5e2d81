"""What the maze models share: their input, attention layers, the refinement loop and the heads with their losses.

A cell is a token. It knows which of its four sides are open, where it is, and whether it is the start or the goal; and
for each horizon k a head says where a shortest way to the goal leads from there in k steps. In the original a token
knew only that it is a cell: the walls stand between cells, and never reached the model. `legacy=True` keeps that, and
the rest of the original's arithmetic, so that its numbers can be explained.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import neighbor_cross_entropy
from models.hub import HubModel
from models.layers import MLP

NORM_EPS = 1e-6
MOST_REFINEMENTS = 1000  # each keeps its activations: more is a slip, and only planning them would take hours
CANDIDATES = {1: 4, 2: 12, 3: 24}  # cells within k steps: 2k (k + 1)
ACT_THRESHOLD = 0.99
# Of rotary angles per cell: the slowest turns by about a radian over 100 cells (arXiv 2403.13298 takes 100 as well).
ROPE_BASE = 100.0

SIZES: dict[str, dict[str, Any]] = {
    "micro": {"d_model": 32, "num_heads": 2, "d_ff": 128, "num_layers": 4},  # for two CPU cores
    "tiny": {"d_model": 128, "num_heads": 4, "d_ff": 512, "num_layers": 2},
    "small": {"d_model": 256, "num_heads": 4, "d_ff": 1024, "num_layers": 3},
    "medium": {"d_model": 512, "num_heads": 8, "d_ff": 2048, "num_layers": 4},
    "large": {"d_model": 768, "num_heads": 12, "d_ff": 3072, "num_layers": 6},
    "xl": {"d_model": 1024, "num_heads": 16, "d_ff": 4096, "num_layers": 8},
}


@dataclass(frozen=True, kw_only=True)
class MazeConfig:
    """What every maze model has; the defaults are the original's at 12 x 12. Raises one ValueError for all faults."""

    maze_size: int = 12  # N of the N x N cells
    d_model: int = 384
    num_heads: int = 6
    d_ff: int = 1536
    num_layers: int = 4
    dropout: float = 0.1
    horizons: int = 1  # heads for 1 … k steps ahead
    maze_enc: bool = False  # a CNN's summary of the whole maze, added to every token
    validity_mask: bool = False  # cross-entropy over the candidates; else over all classes of a head
    label_smoothing: float = 0.1
    position: str = "table"  # a vector for each cell; or "rope2d": relative in attention and heads, for any size
    legacy: bool = False

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        sizes = ("maze_size", "d_model", "num_heads", "d_ff", "num_layers")
        found = [f"{n} must be at least 1, not {getattr(self, n)}" for n in sizes if getattr(self, n) < 1]
        if self.num_heads >= 1 and self.d_model % self.num_heads:
            found.append(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}")
        if self.horizons not in CANDIDATES:
            found.append(f"horizons must be 1, 2 or 3, not {self.horizons}")
        found += [
            f"{n} must lie in [0, 1), not {getattr(self, n)}"
            for n in ("dropout", "label_smoothing")
            if not 0 <= getattr(self, n) < 1
        ]
        if self.position not in ("table", "rope2d"):
            found.append(f"position must be table or rope2d, not {self.position!r}")
        elif self.position == "rope2d" and self.num_heads >= 1 and self.d_model // self.num_heads % 4:
            found.append(f"rope2d needs heads of a multiple of 4 channels, not {self.d_model // self.num_heads}")
        if self.legacy and self.position != "table":
            found.append(f"legacy has a table of positions, not {self.position!r}")
        return found

    def num_classes(self, horizon: int) -> int:
        """What the head of horizon 1 … chooses from: cells, or, with rope2d, offsets of up to k rows and columns."""
        return self.maze_size**2 if self.position == "table" else (2 * horizon + 1) ** 2

    @property
    def num_outputs(self) -> int:
        """Heads: the original asked one and the same for all horizons."""
        return 1 if self.legacy else self.horizons


# ---- input -----------------------------------------------------------------------------------------------------------


class MazeEncoder(nn.Module):
    """A CNN's summary of the maze. No BatchNorm: a loss must not depend on how a batch is split."""

    def __init__(self, in_channels: int, d_model: int):
        super().__init__()
        self.first = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.project = nn.Linear(32 * 4 * 4, d_model)

    def forward(self, maze: Tensor) -> Tensor:
        """maze [B, C, N, N] -> [B, 1, D], for all tokens."""
        y = F.relu(self.second(F.relu(self.first(maze))))
        return self.project(F.adaptive_avg_pool2d(y, 4).flatten(1)).unsqueeze(1)


class MazeEmbedding(nn.Module):
    """Sum of what each cell is: its exits, its place, start or not, goal or not."""

    def __init__(self, config: MazeConfig):
        super().__init__()
        d = config.d_model
        self.legacy = config.legacy
        self.cell = nn.Linear(1, d) if config.legacy else nn.Embedding(16, d)
        self.place = nn.Embedding(config.maze_size**2, d) if config.position == "table" else None
        self.start, self.goal = nn.Embedding(2, d), nn.Embedding(2, d)
        self.encoder = MazeEncoder(1 if config.legacy else 4, d) if config.maze_enc else None

    def forward(self, passages: Tensor, start: Tensor, goal: Tensor) -> Tensor:
        """passages uint8 [B, N, N], start and goal int64 [B] -> [B, N * N, D]."""
        cells = torch.arange(passages[0].numel(), device=passages.device)
        is_start, is_goal = ((cells == end.unsqueeze(1)).long() for end in (start, goal))
        if self.legacy:  # a picture of the cells that cannot be entered, hence of zeros: walls are between cells
            picture = torch.zeros_like(passages, dtype=self.cell.weight.dtype).unsqueeze(1)
            x = self.cell(picture.flatten(1).unsqueeze(2))
        else:
            directions = torch.arange(4, device=passages.device).view(4, 1, 1)
            picture = (passages.unsqueeze(1) >> directions & 1).to(self.cell.weight.dtype)  # [B, 4, N, N]
            x = self.cell(passages.flatten(1).long())
        x = x + self.start(is_start) + self.goal(is_goal)
        if self.place is not None:
            x = x + self.place(cells)
        if self.encoder is not None:
            x = x + self.encoder(picture)
        return x


# ---- layers ----------------------------------------------------------------------------------------------------------


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of channels by angles in proportion to the row (first half of them) and column: x [B, H, N * N, C]."""
    size, quarter = math.isqrt(x.shape[-2]), x.shape[-1] // 4
    rates = ROPE_BASE ** -(torch.arange(quarter, device=x.device) / quarter)
    angles = torch.arange(size, device=x.device).unsqueeze(1) * rates  # [N, C / 4]
    rows, columns = angles.repeat_interleave(size, 0), angles.repeat(size, 1)
    angles = torch.cat([rows, columns], -1)  # [N * N, C / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, config: MazeConfig):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.rotates = config.position == "rope2d"
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [B, n, D]; gate [B or 1, n or 1, H], a factor on what each head has gathered -> [B, n, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, n, C]
        if self.rotates:
            q, k = rotate(q), rotate(k)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        heads = heads.transpose(1, 2)  # [B, n, H, C]
        if gate is not None:
            heads = heads * gate.unsqueeze(-1).to(heads.dtype)
        return self.out(heads.flatten(2))


class Block(nn.Module):
    def __init__(self, config: MazeConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = MLP(config.d_model, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Refiner(nn.Module):
    """R times the same stack: h <- h + α (stack(h) - h), α learned from 0 (ReZero, arXiv 2003.04887).

    With `halting` a cell reads itself out in between: after each refinement it stops with a probability of its own,
    and its result is the mean over where it may have stopped (ACT, arXiv 1603.08983). All R are computed, so that is a
    matter of depth and not of time.
    """

    def __init__(self, d_model: int, steps: int, halting: bool = False):
        super().__init__()
        self.steps = steps
        self.alpha = nn.Parameter(torch.zeros(1))  # not 0-d: FSDP2 cannot shard that
        self.halt = nn.Linear(d_model, 1) if halting else None

    def forward(self, h: Tensor, stack: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor | None]:
        """h [B, n, D], stack (h, refinement 0 …) -> h, and with halting what pondering cost each cell, [B, n]."""
        if self.halt is None:
            for r in range(self.steps):
                h = h + self.alpha * (stack(h, r) - h)
            return h, None
        left = torch.ones(h.shape[:2], device=h.device)  # of a cell's probability, fp32
        ponder, out = torch.zeros_like(left), torch.zeros_like(h)
        for r in range(self.steps):
            h = h + self.alpha * (stack(h, r) - h)
            running = left > 0
            p = self.halt(h).squeeze(-1).float().sigmoid()
            stops = running & ((1 - left + p >= ACT_THRESHOLD) | (r == self.steps - 1))
            share = torch.where(stops, left, p * running)
            ponder = ponder + running + left * stops  # the steps taken, and the remainder at the last
            left = left - share
            out = out + share.unsqueeze(-1).to(h.dtype) * h
        return out, ponder


# ---- output ----------------------------------------------------------------------------------------------------------


def offset_classes(candidates: Tensor, size: int, horizon: int) -> Tensor:
    """Of cells [B, N * N, J], the offset from where they are seen, as a number below (2k + 1)^2; -1 stays."""
    here = torch.arange(size * size, device=candidates.device).view(1, -1, 1)
    rows = candidates // size - here // size + horizon
    columns = candidates % size - here % size + horizon
    return torch.where(candidates < 0, -1, rows * (2 * horizon + 1) + columns)


class HorizonHead(nn.Linear):
    """Scores of where to be k steps on. All that it does is in forward, where a sharded weight is whole."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        candidates: Tensor,
        labels: Tensor | None = None,
        *,
        masked: bool = False,
        label_smoothing: float = 0.0,
        num_items: Tensor | int = 1,
    ) -> Tensor:
        """hidden [R, D], candidates [R, J] -> scores [R, J]; with labels [R, J] the summed cross-entropy / num_items.

        masked: over the candidates, no other class being scored. Else over all of them, all sharing the smoothing.
        """
        if labels is not None and masked:
            return neighbor_cross_entropy(
                hidden, self.weight, self.bias, candidates, labels, label_smoothing=label_smoothing, num_items=num_items
            ).loss
        logits = super().forward(hidden)  # [R, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.gather(1, candidates.clamp(min=0))
        if labels is None:
            return scores.masked_fill(candidates < 0, -math.inf)
        true = labels & (candidates >= 0)
        hit = (scores * true).sum(1) / true.sum(1).clamp(min=1)
        losses = logits.logsumexp(1) - (1 - label_smoothing) * hit - label_smoothing * logits.mean(1)
        return losses.masked_fill(~true.any(1), 0).sum() / num_items


# ---- the model around it ---------------------------------------------------------------------------------------------


class MazeModel(HubModel):
    """Input, heads and losses; what lies between is a subclass's `encode`.

    With `gradient_checkpointing = True` backward recomputes each block instead of storing it.
    """

    def __init__(self, config: MazeConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = MazeEmbedding(config)
        self.norm = nn.Identity() if config.legacy else nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.heads = nn.ModuleList(
            HorizonHead(config.d_model, config.num_classes(k + 1)) for k in range(config.num_outputs)
        )

    def init_weights(self) -> None:
        """Redraw matrices and embeddings, but for `legacy`, which keeps torch's."""
        if self.config.legacy:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # One seed, 8 x 8 cells, 64 channels, 300 steps: 50 % of the forks right, and 44 or 45 % at 0.1, 0.5, 1.
                nn.init.normal_(module.weight, std=0.02)

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, tuple[float | Tensor, Tensor]]]:
        """x [B, n, D] -> hidden [B, n, D], and by name other parts of the loss: weight, value [B, n or 1] of cells."""
        raise NotImplementedError

    def run(self, block: nn.Module, *args: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def forward(
        self,
        passages: Tensor,
        start: Tensor,
        goal: Tensor,
        candidates: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Say for every cell where a shortest way to the goal leads.

        Args:
            passages: uint8 [B, N, N]: bit k of a cell is set if up, down, left, right (k = 0 … 3) is open.
            start, goal: int64 [B], row * N + column.
            candidates: int64 [B, N * N, K, J]: for horizon k the cells within k steps; -1 is an empty slot.
            labels: bool as candidates: those on a shortest way, k steps on. A row without one is not counted.
            num_items: 0-d int64, what the losses are divided by; default the cells with a label at horizon 1 here.

        Returns:
            Without labels {"scores": [B, N * N, K, J]}, -inf in empty slots. With labels 0-d "loss", "ce_loss" (its
            mean over the horizons) and the parts that the model adds; only loss carries a gradient.

        Raises:
            ValueError or TypeError for shapes, dtypes or sizes that do not fit.
        """
        self._check_mazes(passages, start, goal)
        self._check_questions(passages, candidates, labels)
        hidden, extras = self.encode(self.embedding(passages, start, goal))
        hidden = self.norm(hidden).flatten(0, 1)  # [B * n, D]
        classes = self._classes(candidates, passages.shape[-1])
        if labels is None:
            scores = [self._head(k)(hidden, classes[k]) for k in range(self.config.horizons)]
            return {"scores": torch.stack(scores, 1).view_as(candidates)}
        counted = (labels[:, :, 0] & (candidates[:, :, 0] >= 0)).any(-1)  # [B, n]
        num_items = (counted.sum() if num_items is None else num_items).clamp(min=1)
        ce = [
            self._head(k)(hidden, classes[k], labels[:, :, k].flatten(0, 1), num_items=num_items, **self._objective(k))
            for k in range(self.config.horizons)
        ]
        loss = torch.stack(ce).mean()
        losses = {"ce_loss": loss.detach()}
        for name, (weight, value) in extras.items():
            part = (value * counted).sum() / num_items
            losses[name] = part.detach()
            loss = loss + weight * part
        return {"loss": loss, **losses}

    def _head(self, k: int) -> HorizonHead:
        return cast(HorizonHead, self.heads[min(k, len(self.heads) - 1)])

    def _objective(self, k: int) -> dict[str, bool | float]:
        config = self.config
        masked = config.validity_mask and not (config.legacy and k > 0)  # it masked the next step only,
        smoothing = 0.0 if config.legacy and masked else config.label_smoothing  # and smoothed only what it did not
        return {"masked": masked, "label_smoothing": smoothing}

    def _classes(self, candidates: Tensor, size: int) -> list[Tensor]:
        """For each horizon the heads' classes of the candidates, [B * n, J]."""
        cells: Sequence[Tensor] = candidates.unbind(2)
        if self.config.position == "rope2d":
            cells = [offset_classes(c, size, k + 1) for k, c in enumerate(cells)]
        return [c.flatten(0, 1) for c in cells]

    def _check_mazes(self, passages: Tensor, start: Tensor, goal: Tensor) -> None:
        shape = tuple(passages.shape)
        if passages.dtype != torch.uint8 or len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"passages must be uint8 [batch, N, N], not {passages.dtype} {list(shape)}")
        size = self.config.maze_size
        if self.config.position == "table" and shape[1] != size:
            raise ValueError(
                f"a maze of {shape[1]} x {shape[1]} cells does not fit a model of {size} x {size}; take a model "
                "of that size, or one with position rope2d, which takes any"
            )
        for name, cell in (("start", start), ("goal", goal)):
            if cell.dtype != torch.int64 or tuple(cell.shape) != shape[:1]:
                raise ValueError(f"{name} must be int64 [{shape[0]}], not {cell.dtype} {list(cell.shape)}")

    def _check_questions(self, passages: Tensor, candidates: Tensor, labels: Tensor | None) -> None:
        expected = (len(passages), passages[0].numel(), self.config.horizons)
        if candidates.dtype != torch.int64 or candidates.dim() != 4 or tuple(candidates.shape[:3]) != expected:
            found = f"{candidates.dtype} {list(candidates.shape)}"
            raise ValueError(f"candidates must be int64 [{', '.join(map(str, expected))}, J], not {found}")
        if labels is not None and (labels.dtype != torch.bool or labels.shape != candidates.shape):
            raise ValueError(f"labels must be bool {list(candidates.shape)}, not {labels.dtype} {list(labels.shape)}")
