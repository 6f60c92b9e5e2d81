"""Answers from a model, token by token, that are always rectangles of 1 … 30 cells each way.

The first EOL fixes the width; from then on EOL comes at that width and nowhere else, and EOS only at the beginning of a
row. What a model would rather say is masked, so that its log-probabilities are those of the distribution over grids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, PAD
from tasks.arc.tokens import (
    BOS,
    EOL,
    EOS,
    IGNORE_INDEX,
    LEGACY_VOCAB_SIZE,
    SEP,
    VOCAB_SIZE,
    Batch,
    colours_at,
)


def allowed(row: Tensor, column: Tensor, width: Tensor, max_size: int = MAX_SIZE) -> Tensor:
    """bool [..., 16]: what can be said at a place, int64 [...] each; `width` is read in all rows but the first."""
    first = row == 0
    colour = (row < max_size) & (column < torch.where(first, max_size, width))
    row_ends = torch.where(first, column > 0, column == width)
    out = torch.zeros(*row.shape, VOCAB_SIZE, dtype=torch.bool, device=row.device)
    out[..., :NUM_COLOURS] = colour.unsqueeze(-1)
    out[..., EOL] = row_ends
    out[..., EOS] = ~first & (column == 0)
    return out


def constrained(logits: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities [..., V] over what is allowed, -inf elsewhere. Logits that are no finite number stay possible
    where nothing better is, so that a model that has broken down still says something allowed."""
    logits = torch.nan_to_num(logits.float(), nan=torch.finfo(torch.float32).min)
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


class Rectangle:
    """How far B answers have come. `row` and `column`, int64 [B], are the place of what comes next."""

    def __init__(self, batch: int, max_size: int = MAX_SIZE, device: torch.device | None = None) -> None:
        if not 1 <= max_size <= MAX_SIZE:
            raise ValueError(f"max_size={max_size}: a grid has 1 to {MAX_SIZE} cells each way")
        self.max_size = max_size
        self.row, self.column, self.width = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)

    def allowed(self) -> Tensor:
        """bool [B, 16]; PAD alone where an answer is finished."""
        return _or_pad(allowed(self.row, self.column, self.width, self.max_size), self.finished)

    def push(self, tokens: Tensor) -> None:
        """Go on by what was said, int64 [B]."""
        row_ends = tokens == EOL
        self.finished = self.finished | (tokens == EOS)
        self.width = torch.where(row_ends, self.column, self.width)
        self.row = self.row + row_ends
        self.column = torch.where(row_ends, 0, self.column + (tokens < NUM_COLOURS))


class KnownShape:
    """`Rectangle` for the legacy vocabulary, which has no way to say where a row or a grid ends: it has to be told."""

    def __init__(self, height: Tensor, width: Tensor) -> None:
        self.height, self.width = height, width
        self.row, self.column = torch.zeros_like(height), torch.zeros_like(width)
        self.finished = torch.zeros_like(height, dtype=torch.bool)

    def allowed(self) -> Tensor:
        """bool [B, 11]."""
        colours = torch.arange(LEGACY_VOCAB_SIZE, device=self.row.device) < NUM_COLOURS
        return _or_pad(colours.repeat(len(self.row), 1), self.finished)

    def push(self, tokens: Tensor) -> None:
        cell = self.row * self.width + self.column + (tokens < NUM_COLOURS)
        self.row, self.column = cell // self.width, cell % self.width
        self.finished = self.row == self.height


def _or_pad(allowed: Tensor, finished: Tensor) -> Tensor:
    pad = torch.arange(allowed.shape[-1], device=allowed.device) == PAD
    return torch.where(finished.unsqueeze(-1), pad, allowed)


@torch.no_grad()
def decode(
    model: Any,
    prompt: Batch,
    *,
    max_size: int = MAX_SIZE,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    shape: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Canvases uint8 [B, 30, 30], and how probable the constrained model finds them: natural logarithms, fp32 [B].

    Args:
        model: `model.begin(**prompt)` opens a session; `session.step(tokens, here=, ahead=)` -> logits [B, V].
        temperature: 0 takes the most probable token at each step, 1 draws from the model's distribution.
        shape: heights and widths, int64 [B]: for a model of the legacy vocabulary, and no other.
    """
    first = next(iter(prompt.values()))
    rectangle = Rectangle(len(first), max_size, first.device) if shape is None else KnownShape(*shape)
    tokens, here = _last_said(prompt, legacy=shape is not None)
    session = model.begin(**prompt)
    log_prob = torch.zeros(len(first), device=first.device)
    said = []
    while not rectangle.finished.all():
        place = (rectangle.row, rectangle.column)
        log_probs = constrained(session.step(tokens, here=here, ahead=place), rectangle.allowed())
        if temperature:
            tokens = torch.multinomial((log_probs / temperature).softmax(-1), 1, generator=generator).squeeze(1)
        else:
            tokens = log_probs.argmax(-1)
        log_prob += log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        rectangle.push(tokens)
        said.append((tokens, *place))
        here = place
    return colours_at(*(torch.stack(parts, 1) for parts in zip(*said, strict=True))), log_prob


def _last_said(prompt: Batch, *, legacy: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What comes before an answer, BOS or the last SEP, int64 [B], and its row and column."""
    if "source" in prompt:
        start = torch.full_like(prompt["source"][:, 0], BOS)
        return start, (torch.zeros_like(start), torch.zeros_like(start))
    t = torch.arange(prompt["tokens"].shape[1], device=prompt["tokens"].device)
    # PAD separates grids in the legacy vocabulary: the last SEP is what follows the last colour.
    last = torch.where(prompt["tokens"] != PAD, t, 0).amax(1, keepdim=True) + legacy
    row, column = (prompt[name].gather(1, last).squeeze(1) for name in ("rows", "columns"))
    return torch.full_like(row, PAD if legacy else SEP), (row, column)


@torch.no_grad()
def score(model: Any, batch: Batch, max_size: int = MAX_SIZE) -> Tensor:
    """How probable the constrained model finds the answers in a batch that has labels: fp32 [B], as `decode` says.

    A model whose sessions rule out more than its forward, as colours that nothing has shown, says a little less here.
    """
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**given)["logits"], batch["labels"]  # [B, T, V]
    shift = 0 if "source" in batch else -1  # a decoder's places are those of its tokens, not of what they announce
    row, column = (batch[name].roll(shift, 1) for name in ("rows", "columns"))
    width = torch.where(labels == EOL, column, 0).amax(1, keepdim=True).expand_as(column)
    counted = labels != IGNORE_INDEX
    possible = allowed(row, column, width, max_size) | ~counted.unsqueeze(-1)
    chosen = constrained(logits, possible).gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(~counted, 0).sum(1)
