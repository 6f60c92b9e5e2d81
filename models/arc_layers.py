"""What the ARC models share: tokens, where they stand, layers with a key/value cache, configs and their sizes."""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.hub import HubModel
from models.layers import rotate

# The vocabulary: ten colours, then these. It is tasks/arc/tokens.py's too; models and tasks do not import each other.
NUM_COLOURS = 10
PAD, SEP, EOL, EOS, BOS, MASK = range(10, 16)
VOCAB_SIZE = 16
IGNORE_INDEX = -100
ROPE2D_BASE = 100.0  # the slowest angle turns by a third of a radian over 30 rows
# Rows and columns 0 … 30 (a row's end stands behind its last cell, an answer's end below its last row).
NUM_PLACES = 31
SINUSOID_BASE = 10_000.0
TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class ArcConfig:
    """What every ARC model has. Raises one ValueError for all faults."""

    d_model: int
    num_heads: int = 4
    d_ff: int

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                found.append(f"{field.name} must be at least 1, not {value}")
            if field.name.endswith("dropout") and not 0 <= value < 1:
                found.append(f"{field.name} must lie in [0, 1), not {value}")
        if self.num_heads >= 1 and self.d_model % self.num_heads:
            found.append(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}")
        return found

    def not_one_of(self, name: str, allowed: Sequence[str]) -> list[str]:
        value = getattr(self, name)
        return [] if value in allowed else [f"{name} must be one of {', '.join(allowed)}, not {value!r}"]


# ---- places ----------------------------------------------------------------------------------------------------------


def sinusoids(positions: Tensor, channels: int) -> Tensor:
    """Positions [...] -> fp32 [..., channels]: sine and cosine in turn, at falling rates (arXiv 1706.03762)."""
    rates = SINUSOID_BASE ** -(torch.arange(0, channels, 2, device=positions.device) / channels)
    angles = positions.unsqueeze(-1) * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def grid2d(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Places [...] -> fp32 [..., channels]: half of them tell the row, half the column, whatever a grid's width."""
    table = sinusoids(torch.arange(NUM_PLACES, device=rows.device), channels // 2)
    return torch.cat([table[rows], table[columns]], -1)


class Borders(nn.Module):
    """A learned code for each row and column, counted from the first ones and, in a grid that is there, from the last.

    Mirrored places then have equal codes up to one linear map. Random codes are as far apart for neighbours as for
    anyone else, where the sines of places 0 … 10 differ in a few of their channels only.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.codes = nn.Embedding(2 * NUM_PLACES, d_model)
        self.far = nn.Linear(d_model, d_model)

    def forward(self, rows: Tensor, columns: Tensor, there: Tensor | None = None) -> Tensor:
        """Places [..., n] -> [..., n, D]. there: bool [..., n], which of them make up a whole grid."""
        near = self._near(rows, columns)
        if there is None:
            return near
        rows, columns = (place.where(there, 0).amax(-1, keepdim=True) - place for place in (rows, columns))
        return near + self.far(self._near(rows.clamp(min=0), columns.clamp(min=0)))

    def _near(self, rows: Tensor, columns: Tensor) -> Tensor:
        return (self.codes(rows) + self.codes(columns + NUM_PLACES)) * (self.codes.embedding_dim / 2) ** 0.5


# ---- layers ----------------------------------------------------------------------------------------------------------


Turn = tuple[Tensor, Tensor]  # cosines and sines of places, as `models.layers.rotate` takes them


class Placed(NamedTuple):
    """Tokens int64 [..., n] and where they stand."""

    tokens: Tensor
    rows: Tensor
    columns: Tensor


class Memory(NamedTuple):
    """What may be attended to: cells [B, m, D], which are there bool [B, 1, 1, m], where they are if that counts."""

    cells: Tensor
    there: Tensor
    turn: Turn | None = None


class Cache:
    """The keys and values [B, H, n, C] that an attention has seen in a session."""

    def __init__(self) -> None:
        self.length = 0
        self.kept: tuple[Tensor, ...] = ()  # with room behind `length`

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add n more -> all of them."""
        start, self.length = self.length, self.length + keys.shape[2]
        if not self.kept:
            self.kept = keys, values
        else:
            if self.length > self.kept[0].shape[2]:  # room for as many again, so that a step copies few
                self.kept = tuple(F.pad(old, (0, 0, 0, self.length)) for old in self.kept)
            for old, new in zip(self.kept, (keys, values), strict=True):
                old[:, :, start : self.length] = new
        return self.all()

    def all(self) -> tuple[Tensor, Tensor]:
        keys, values = (kept[:, :, : self.length] for kept in self.kept)
        return keys, values


class Attention(nn.Module):
    """Of tokens to themselves, or to a memory."""

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        turn: Turn | None = None,
        memory_turn: Turn | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x [B, n, D], memory [B, m, D] -> [B, n, D].

        Args:
            mask: bool, broadcastable to [B, H, n, m]: who may be looked at.
            turn: cosines and sines [B, 1, n, C / 2] that rotate x's queries and keys.
            memory_turn: the same for a memory's keys, [B, 1, m, C / 2].
            cache: makes x see what was seen before; a memory is read into it once.
        """
        queries = self._heads(self.query(x))
        if turn is not None:
            queries = rotate(queries, *turn)
        if memory is not None and cache is not None and cache.length:
            keys, values = cache.all()
        else:
            keys, values = map(self._heads, self.key_value(x if memory is None else memory).chunk(2, -1))
            own = turn if memory is None else memory_turn
            if own is not None:
                keys = rotate(keys, *own)
            if cache is not None:
                keys, values = cache.append(keys, values)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=rate, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, n, C]


class Layer(nn.Module):
    """Attention to itself, attention to each of some memories, an MLP; the norms come first (arXiv 2002.04745)."""

    def __init__(self, config: ArcConfig, dropout: float, memories: int = 0):
        super().__init__()
        d = config.d_model
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(1 + memories))
        self.attentions = nn.ModuleList(Attention(d, config.num_heads, dropout) for _ in range(1 + memories))
        self.mlp_norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, config.d_ff), nn.Linear(config.d_ff, d)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memories: Sequence[Memory] = (),
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        turn: Turn | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """x [B, n, D] -> [B, n, D]. Options as of `Attention`, of x to itself; turn is x's to memories too."""
        looks = [{"mask": mask, "causal": causal, "turn": turn}]
        looks += [{"memory": m.cells, "mask": m.there, "turn": turn, "memory_turn": m.turn} for m in memories]
        kept: Sequence[Cache | None] = [None] * len(looks) if caches is None else caches
        for norm, attention, look, cache in zip(self.norms, self.attentions, looks, kept, strict=True):
            x = x + self.dropout(attention(norm(x), **look, cache=cache))
        y = self.dropout(F.gelu(self.up(self.mlp_norm(x))))
        return x + self.dropout(self.down(y))

    def new_caches(self) -> list[Cache]:
        return [Cache() for _ in self.attentions]


# ---- the models ------------------------------------------------------------------------------------------------------


class ArcModel(HubModel):
    """With `gradient_checkpointing = True` backward recomputes each layer instead of storing it."""

    embedding: nn.Embedding

    def __init__(self, config: ArcConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False

    def init_weights(self) -> None:
        """Fill every parameter; call it after `to_empty` on a model that was built on the meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., D], of the size of a place."""
        return self.embedding(tokens) * self.config.d_model**0.5

    def run(self, layer: nn.Module, *args: Any, **options: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, **options, use_reentrant=False)
        return layer(*args, **options)


def check_integers(shape: Iterable[int], **tensors: Tensor) -> None:
    """Raises ValueError for the first tensor that is not int64 of this shape."""
    shape = list(shape)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or list(tensor.shape) != shape:
            raise ValueError(f"{name} must be int64 {shape}, not {tensor.dtype} {list(tensor.shape)}")


# ---- sizes -----------------------------------------------------------------------------------------------------------

C = TypeVar("C", bound=ArcConfig)


@functools.cache
def parameters(model: type[ArcModel], config: ArcConfig) -> int:
    """Of such a model. It is built, and later random numbers are as if it were not."""
    # On the meta device the first model takes torch some seconds of imports, more than small ones take here.
    with torch.random.fork_rng(devices=[]):
        return sum(p.numel() for p in model(config).parameters())


def match(model: type[ArcModel], config: C, target: int) -> C:
    """`config` with the d_ff, a multiple of 8, that brings the model within 1 % of `target` parameters.

    Raises ValueError where none does.
    """
    base, more = (parameters(model, dataclasses.replace(config, d_ff=d_ff)) for d_ff in (8, 16))  # type: ignore[arg-type]
    steps = round((target - base) / (more - base))  # the count is linear in d_ff
    found = base + steps * (more - base)
    if steps < 0 or abs(found - target) > TOLERANCE * target:
        raise ValueError(
            f"no d_ff brings {type(config).__name__} within {TOLERANCE:.0%} of {target:,} parameters: everything else "
            f"takes {base:,}; take another d_model {config.d_model}, or fewer layers"
        )
    return dataclasses.replace(config, d_ff=8 * (1 + steps))
