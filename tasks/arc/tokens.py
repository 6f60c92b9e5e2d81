"""Grids as token sequences. A grid is read row by row; an answer says where its rows end and where it ends itself, so
that its shape is part of what has to be got right.

Each token has a place: a cell its row and column, the EOL of row r (r, w), and what ends an h x w grid (h, 0).
Everything is index arithmetic on canvases: the t-th token of a grid is in row t // (w + 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks import random
from tasks.arc.augment import Canvases
from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, PAD, Grid, Pair, shapes

SEP, EOL, EOS, BOS, MASK = 11, 12, 13, 14, 15  # after the colours 0 … 9 and PAD
VOCAB_SIZE = 16
LEGACY_VOCAB_SIZE = 11  # PAD is what separates grids, too; rows and grids have no ends, sequences no beginning
IGNORE_INDEX = -100
RESOLUTION = 1 << 20  # of random shares
KINDS = ("encoder_decoder", "decoder_only")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Encoding:
    """How episodes become batches.

    "encoder_decoder": the question's cells as a set with places, the answer as a sequence. "decoder_only": one sequence
    `BOS [input] SEP [output] SEP … [query] SEP [answer] EOS`, every row ended by EOL. `loss_on_input` labels all of it
    and not the answer alone. `legacy` is the original's vocabulary of 11, `[input] 10 [output] 10 … `, where 10 is
    never a target and so no shape can be said.
    """

    kind: str = "encoder_decoder"
    legacy: bool = False
    loss_on_input: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: it is one of {', '.join(KINDS)}")
        if self.kind != "decoder_only" and (self.legacy or self.loss_on_input):
            raise ValueError("the legacy vocabulary and the loss on the input are those of kind='decoder_only'")

    def batch(self, canvases: Canvases, offset: Tensor | None = None) -> Batch:
        """What a model is trained on. `offset` int64 [B, 2] is added to all rows and columns."""
        if self.kind == "decoder_only":
            batch = self._sequence(canvases.grids(), ending=EOS)
            batch["labels"] = self._labels(batch)
        else:
            batch = _question(canvases) | _answer(canvases.answer)
        return batch if offset is None else _moved(batch, offset)

    def prompt(self, canvases: Canvases) -> Batch:
        """What a model is asked: all that comes before the answer."""
        if self.kind == "decoder_only":
            return self._sequence(canvases.grids()[:, :-1], ending=SEP)
        return _question(canvases)

    def length(self, pairs: Sequence[Pair], count: int) -> int:
        """Of the longest sequence that `count` of these pairs, any one of them the question, make, however turned."""
        if self.kind == "encoder_decoder":
            return max(max(pair.input.size, _spoken(pair.output)) for pair in pairs)
        cost = (lambda grid: grid.size + 1) if self.legacy else _spoken
        costs = sorted((cost(pair.input) + cost(pair.output) for pair in pairs), reverse=True)
        return sum(costs[:count]) + (-1 if self.legacy else 1)

    def _sequence(self, grids: Tensor, ending: int) -> Batch:
        """All grids [B, G, N, N] one after another, SEP between them and `ending` at the end; absent ones skipped."""
        size, device = grids.shape[-1], grids.device
        lead, ends = (0, 0) if self.legacy else (1, 1)
        height, width = shapes(grids)  # [B, G]
        present = (height > 0).long()
        stops = lead + (height * (width + ends) + present).cumsum(1)
        starts = torch.cat([torch.full_like(stops[:, :1], lead), stops[:, :-1]], 1)
        t = torch.arange(bucket(int(stops[:, -1].max())), device=device).repeat(len(grids), 1)  # [B, L]
        which = torch.searchsorted(stops, t, right=True).clamp(max=grids.shape[1] - 1)
        h, w, start, number = (x.gather(1, which) for x in (height, width, starts, present.cumsum(1) - 1))
        row, column = (t - start) // (w + ends).clamp(min=1), (t - start) % (w + ends).clamp(min=1)
        cell = which * size * size + row.clamp(0, size - 1) * size + column.clamp(0, size - 1)
        tokens = grids.flatten(1).gather(1, cell).long()
        tokens = torch.where(column == w, EOL, tokens)
        end = torch.where(which == grids.shape[1] - 1, ending, SEP)
        tokens = torch.where(row == h, PAD if self.legacy else end, tokens)
        inside = (t >= lead) & (t < stops[:, -1:])
        tokens = tokens.where(inside, PAD)
        tokens[:, :lead] = BOS
        places = {"rows": row, "columns": column, "grids": number}
        return {"tokens": tokens} | {name: place.where(inside, 0) for name, place in places.items()}

    def _labels(self, batch: Batch) -> Tensor:
        """What each token is followed by, where that is to be learned."""
        following = {name: batch[name].roll(-1, 1) for name in ("tokens", "grids")}
        counted = following["tokens"] != PAD
        counted[:, -1] = False
        if not self.loss_on_input:
            counted &= following["grids"] == batch["grids"].amax(1, keepdim=True)
        return following["tokens"].where(counted, IGNORE_INDEX)


def bucket(length: int) -> int:
    """The next of 8, 16, 24, …, 64, 96, 128, 192, …, so that shapes are few: a compiled model compiles for each. Powers
    of two alone would be padding to 44 % for grids of 12 x 12."""
    if length <= 64:
        return -(-length // 8) * 8
    return next(n for k in itertools.count() for n in (64 << k, 96 << k) if n >= length)


def masked(batch: Batch, key: Tensor) -> Batch:
    """The batch with some of the answer's tokens hidden, by MASK, from who has to say the next: of each item a share
    that is uniform between none and all. Both are a function of its key, int64 [B].

    Told all that comes before, a model reads the rule off the answer's first row and has little to learn from
    demonstrations; what it must say of the answer alone it can only know from them.
    """
    name = "inputs" if "inputs" in batch else "tokens"
    tokens = batch[name]
    said = (tokens != PAD) & (tokens != BOS)
    if name == "tokens":
        said &= (batch["grids"] == batch["grids"].amax(1, keepdim=True)) & (batch["labels"].roll(1, 1) == tokens)
    share = random.integers(key, 1, RESOLUTION, stream=5)
    hidden = said & (random.integers(key, tokens.shape[1], RESOLUTION, stream=6) < share)
    return batch | {name: torch.where(hidden, MASK, tokens)}


def colours_at(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Canvases uint8 [B, 30, 30] with the colours among tokens [B, T] at their places."""
    cell = torch.where((tokens >= 0) & (tokens < NUM_COLOURS), rows * MAX_SIZE + columns, MAX_SIZE**2)
    flat = torch.full((len(tokens), MAX_SIZE**2 + 1), PAD, dtype=torch.uint8, device=tokens.device)
    return flat.scatter(1, cell, tokens.to(torch.uint8))[:, :-1].unflatten(1, (MAX_SIZE, MAX_SIZE))


# ---- encoder and decoder ---------------------------------------------------------------------------------------------


def _question(canvases: Canvases) -> Batch:
    source, rows, columns = _cells(canvases.query)
    demos, demo_rows, demo_columns = _cells(canvases.demos)
    batch = {"source": source, "source_rows": rows, "source_columns": columns}
    return batch | {"demos": demos, "demo_rows": demo_rows, "demo_columns": demo_columns}


def _cells(grids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, rows and columns of canvases [..., N, N], row by row: [..., M], cells PAD and places 0 behind the end."""
    height, width = shapes(grids)
    return _walk(grids, bucket(int((height * width).max()) if height.numel() else 1), ends=0)


def _answer(grids: Tensor) -> Batch:
    height, width = shapes(grids)
    stop = (height * (width + 1)).unsqueeze(1)  # [B, 1]
    length = bucket(int(stop.max()) + 1)
    tokens, rows, columns = _walk(grids, length, ends=1)
    t = torch.arange(length, device=grids.device)
    tokens, rows = torch.where(t == stop, EOS, tokens), torch.where(t == stop, height.unsqueeze(1), rows)
    inputs = torch.cat([torch.full_like(stop, BOS), tokens[:, :-1]], 1).where(t <= stop, PAD)
    return {"inputs": inputs, "rows": rows, "columns": columns, "labels": tokens.where(t <= stop, IGNORE_INDEX)}


def _walk(grids: Tensor, length: int, ends: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `length` tokens of canvases [..., N, N] with their rows and columns; `ends` = 1: EOL after each row."""
    size, t = grids.shape[-1], torch.arange(length, device=grids.device)
    height, width = (side.unsqueeze(-1) for side in shapes(grids))
    stride = (width + ends).clamp(min=1)
    row, column = t // stride, t % stride  # [..., length]
    cell = row.clamp(max=size - 1) * size + column.clamp(max=size - 1)
    tokens = torch.where(column == width, EOL, grids.flatten(-2).gather(-1, cell).long())
    inside = t < height * stride
    return tokens.where(inside, PAD), row.where(inside, 0), column.where(inside, 0)


def _moved(batch: Batch, offset: Tensor) -> Batch:
    """With all places but those of padding moved by offset [B, 2]."""
    moved = dict(batch)
    for tokens, prefix in (("source", "source_"), ("demos", "demo_"), ("inputs", ""), ("tokens", "")):
        if tokens in batch:
            here = batch[tokens] != PAD
            for axis, name in enumerate((f"{prefix}rows", f"{prefix}columns")):
                by = offset[:, axis].view(-1, *[1] * (here.dim() - 1))
                moved[name] = batch[name] + by * here
    return moved


def _spoken(grid: Grid) -> int:
    """Tokens of a grid with EOLs and its end, the longer way round."""
    return grid.size + max(grid.shape) + 1
