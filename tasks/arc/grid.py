"""Grids of colours, the pairs that demonstrate a rule, and the questions asked about it.

A puzzle is what the official files call a task: demonstrations and one or more test inputs. An episode is one question
of it: the demonstrations and a single query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_COLOURS = 10
MAX_SIZE = 30
PAD = 10  # in canvases and token sequences: nothing here

Grid = np.ndarray  # uint8 [H, W], 1 … 30 each way, colours 0 … 9


class Pair(NamedTuple):
    input: Grid
    output: Grid | None  # None where it is not known


class Puzzle(NamedTuple):
    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


class Episode(NamedTuple):
    id: str  # "<puzzle>/<number of the test input>" or "<skill>/<index>"
    demos: tuple[Pair, ...]
    query: Pair


def checked_grid(value: Any, where: str) -> Grid:
    """`value`, rows of colours, as a grid. Raises ValueError, beginning with `where` and naming the row or cell."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise ValueError(f"{where}: a grid is a list of rows, each a list of colours, not {_short(value)}")
    height, width = len(value), len(value[0])
    for r, row in enumerate(value):
        if len(row) != width:
            raise ValueError(f"{where}: row {r} has {len(row)} cells and row 0 has {width}; all rows must be as long")
    if not (1 <= height <= MAX_SIZE and 1 <= width <= MAX_SIZE):
        raise ValueError(f"{where}: {height} x {width} cells; a grid has 1 to {MAX_SIZE} each way")
    for r, row in enumerate(value):
        for c, colour in enumerate(row):
            if type(colour) is not int or not 0 <= colour < NUM_COLOURS:
                raise ValueError(f"{where}: cell ({r}, {c}) is {_short(colour)}; a colour is a whole number, 0 to 9")
    return np.array(value, dtype=np.uint8)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---- questions -------------------------------------------------------------------------------------------------------


def questions(puzzle: Puzzle) -> list[Episode]:
    """An episode for each test input."""
    return [Episode(f"{puzzle.id}/{i}", puzzle.train, pair) for i, pair in enumerate(puzzle.test)]


def leave_one_out(puzzle: Puzzle) -> list[Episode]:
    """An episode for each demonstration, shown the others: what can be learned from a puzzle without its answers."""
    demos = puzzle.train
    return [Episode(f"{puzzle.id}/demo{i}", demos[:i] + demos[i + 1 :], pair) for i, pair in enumerate(demos)]


# ---- identity --------------------------------------------------------------------------------------------------------


def grid_hash(grids: Iterable[Grid | None]) -> str:
    """SHA-256 of grids in order, shapes included."""
    digest = hashlib.sha256()
    for grid in grids:
        digest.update(b"?" if grid is None else bytes(grid.shape) + grid.tobytes())
    return digest.hexdigest()


def episode_hash(episode: Episode) -> str:
    return grid_hash(grid for pair in (*episode.demos, episode.query) for grid in pair)


# ---- canvases --------------------------------------------------------------------------------------------------------


def canvas(grid: Grid | None, size: int) -> Tensor:
    """uint8 [size, size], the grid in its top left corner and PAD around it; all PAD for None."""
    out = torch.full((size, size), PAD, dtype=torch.uint8)
    if grid is not None:
        out[: grid.shape[0], : grid.shape[1]] = torch.from_numpy(grid)
    return out


def from_canvas(canvas: Tensor) -> Grid:
    """The grid that a canvas [size, size] holds. Raises ValueError where it is not a rectangle in the corner."""
    cells = canvas.cpu().numpy()
    height, width = (cells[:, 0] != PAD).sum(), (cells[0] != PAD).sum()
    inside = np.zeros_like(cells, dtype=bool)
    inside[:height, :width] = True
    if not height or ((cells != PAD) != inside).any():
        raise ValueError("the canvas does not hold a rectangle in its top left corner")
    return cells[:height, :width].astype(np.uint8)


def shapes(canvases: Tensor) -> tuple[Tensor, Tensor]:
    """Height and width, int64 [...], of the grids on canvases [..., size, size]; 0 and 0 where there is none."""
    inside = canvases != PAD
    return inside[..., 0].sum(-1), inside[..., 0, :].sum(-1)
