"""Walks through a batch of mazes: where a policy of one move per cell ends, and what walkers with a memory do.

A policy that gives every cell one move is a map of cells to cells with the goal as a fixed point. Composing it with
itself says where every cell ends after 2, 4, 8, ... steps, so that whether and when the goal is reached takes about
log2(N^2) gathers, and is exactly what walking step by step finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tasks import random
from tasks.maze.grid import Mazes, exits, marked, neighbors


class Walk(NamedTuple):
    """success: bool [B], the goal was reached. length: int64 [B], the steps that were taken, up to the goal."""

    success: Tensor
    length: Tensor


def next_cells(mazes: Mazes, move: Tensor) -> Tensor:
    """The cell each move leads to: int64 [B, N * N]; a move into a wall stays, and so does the goal.

    Args:
        move: int64 [B, N * N], directions 0..3.
    """
    size, device = mazes.size, move.device
    cells = torch.arange(size * size, device=device)
    open_ = exits(mazes.passages.flatten(1)).gather(2, move.unsqueeze(2)).squeeze(2)
    ahead = neighbors(size, device)[cells, move]
    stays = ~open_ | (cells == mazes.goal.unsqueeze(1))
    return torch.where(stays, cells, ahead)


def follow(mazes: Mazes, move: Tensor) -> Walk:
    """Where a policy of one move per cell leads from the start: by pointer doubling.

    Args:
        move: int64 [B, N * N], directions 0..3; one into a wall stays where it is for ever.
    """
    ahead, cells = next_cells(mazes, move), torch.arange(mazes.size**2, device=move.device)
    length = (cells != mazes.goal.unsqueeze(1)).long().expand_as(ahead)  # to where `ahead` leads
    for _ in range((mazes.size**2 - 1).bit_length()):  # 2^k >= N^2 - 1 steps: whoever gets there has got there
        length = length + length.gather(1, ahead)
        ahead = ahead.gather(1, ahead)
    start = mazes.start.unsqueeze(1)
    return Walk(ahead.gather(1, start).squeeze(1) == mazes.goal, length.gather(1, start).squeeze(1))


def visited(mazes: Mazes, move: Tensor) -> Tensor:
    """bool [B, N, N]: the cells that such a policy enters, the start included; by pointer doubling as well."""
    ahead = next_cells(mazes, move)
    cells = marked(mazes.start.unsqueeze(1), mazes.size).flatten(1)
    for _ in range((mazes.size**2 - 1).bit_length()):
        cells = cells | marked(ahead.where(cells, -1), mazes.size).flatten(1)
        ahead = ahead.gather(1, ahead)
    return cells.view_as(mazes.passages)


def walk(
    mazes: Mazes,
    scores: Callable[[Mazes, Tensor, Tensor], Tensor],
    *,
    max_steps: int | None = None,
    revisits: bool = True,
    memory: bool = True,
) -> Walk:
    """Step by step, the scores asked anew at every step for the mazes that are still on their way.

    Args:
        scores: (the mazes that are left, their cell now int64 [b], their row in the batch int64 [b]) -> float [b, 4]
            for the four directions. Directions into walls are never taken.
        max_steps: N * N by default.
        revisits: False leaves out cells already seen wherever another exit is left.
        memory: False says that scores depend on the cell alone: who comes back to one circles for ever, and is let go.
    """
    size, device = mazes.size, mazes.start.device
    rows, cell = torch.arange(len(mazes.start), device=device), mazes.start.clone()
    length = torch.zeros_like(cell)
    seen = torch.zeros(len(cell), size * size, dtype=torch.bool, device=device)
    open_, near = exits(mazes.passages.flatten(1)), neighbors(size, device)
    for _ in range(max_steps or size * size):
        left = cell[rows] != mazes.goal[rows]
        if not memory:
            left &= ~seen[rows, cell[rows]]
        rows = rows[left]
        if not len(rows):
            break
        here = cell[rows]
        seen[rows, here] = True
        possible = open_[rows, here]
        if not revisits:
            fresh = possible & ~seen[rows].gather(1, near[here].clamp(min=0))
            possible = torch.where(fresh.any(1, keepdim=True), fresh, possible)
        value = scores(mazes.take(rows), here, rows).masked_fill(~possible, -torch.inf)
        ahead = near[here, value.argmax(1)]
        cell[rows] = torch.where(possible.any(1), ahead, here)
        length[rows] += 1
    return Walk(cell == mazes.goal, length)


def said(mazes: Mazes, cells: Tensor) -> tuple[Walk, Tensor]:
    """Where a way leads that was said as a whole, and the share of its steps that are no passages, float [B].

    Args:
        cells: int64 [B, L], the cell after each step, -1 behind the last. What comes after a step that is no passage,
            or after the goal, is not walked.
    """
    here = torch.cat([mazes.start.unsqueeze(1), cells[:, :-1]], 1).clamp(min=0)
    open_ = exits(mazes.passages.flatten(1).gather(1, here))
    passage = (open_ & (neighbors(mazes.size, cells.device)[here] == cells.unsqueeze(2))).any(2)
    reached = (cells == mazes.goal.unsqueeze(1)) & passage.cumprod(1).bool()
    walked = Walk(reached.any(1), reached.byte().argmax(1) + 1)
    return walked, ((cells >= 0) & ~passage).sum(1) / (cells >= 0).sum(1)


# ---- floors and ceilings ---------------------------------------------------------------------------------------------


def random_scores(key: Tensor, stream: int) -> Callable[[Mazes, Tensor, Tensor], Tensor]:
    """A walker that draws its next cell; `key` [B], one for each maze."""
    counter = iter(range(stream << 20, (stream + 1) << 20))
    return lambda mazes, cell, rows: random.integers(key[rows], 4, 1 << 20, next(counter)).float()


def manhattan_scores(mazes: Mazes, cell: Tensor, rows: Tensor) -> Tensor:
    """Towards the goal as the crow flies, down or up before sideways."""
    size = mazes.size
    ahead = neighbors(size, cell.device)[cell]  # [b, 4]
    goal = mazes.goal.unsqueeze(1)
    far = (ahead // size - goal // size).abs() + (ahead % size - goal % size).abs()
    return -far.float().masked_fill(ahead < 0, torch.inf)


def wall_follower(mazes: Mazes) -> Walk:
    """Keeps its left hand on the wall: left of where it looks if it can, else ahead, else right, else back.

    Starts looking up. In a perfect maze it reaches every cell within 2 (N^2 - 1) steps.
    """
    turns = torch.tensor([[2, 0, 3, 1], [3, 1, 2, 0], [1, 2, 0, 3], [0, 3, 1, 2]], device=mazes.start.device)
    facing = torch.zeros_like(mazes.start)
    open_ = exits(mazes.passages.flatten(1))
    rank = torch.arange(4, 0, -1, device=mazes.start.device)

    def scores(left: Mazes, cell: Tensor, rows: Tensor) -> Tensor:
        tried = turns[facing[rows]]  # [b, 4] directions, best first
        chosen = (open_[rows, cell].gather(1, tried) * rank).argmax(1, keepdim=True)
        facing[rows] = tried.gather(1, chosen).squeeze(1)
        return torch.zeros(len(rows), 4, device=cell.device).scatter(1, facing[rows].unsqueeze(1), 1.0)

    return walk(mazes, scores, max_steps=4 * mazes.size**2)
