"""The way from start to goal as a sequence with some of it hidden: MLM-U (arXiv 2412.05117), on our mazes.

Every cell of a way is hidden independently, at a rate that is drawn uniformly for each maze; the maze itself is always
to be seen, and what is hidden is to be named. A way is then said step by step, and scored as a walk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks import random
from tasks.maze.distance import shortest_path
from tasks.maze.files import MazeFiles
from tasks.maze.generate import Suite
from tasks.maze.grid import Mazes, marked
from tasks.maze.rollout import random_scores, said, walk
from tasks.maze.score import grid_scores, walk_scores
from tasks.maze.task import MazeData, MazeTask, Predict, without_walls

MASKINGS = 64  # of each maze, before one comes again: each is an item, so that an item is always the same
IGNORED = -100


def hidden(items: Tensor, length: int) -> Tensor:
    """bool [B, length]: what is hidden in each of the items int64 [B], at a rate of the item's own."""
    key = random.keys(items)
    return random.integers(key, length, 1 << 31, stream=2) < random.integers(key, 1, 1 << 31, stream=1)


class MaskedPaths:
    """Item i is maze i // MASKINGS of the data and the number i, by which its way is masked."""

    def __init__(self, data: MazeData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data) * MASKINGS

    def __getitem__(self, i: int) -> tuple[Mazes, Tensor, int]:
        return *self.data[i // MASKINGS], i


class PathTask(MazeTask):
    """Ways with hidden cells, of the same mazes as `MazeTask`, and the same scores of the ways that a model says."""

    monitor, item_name = "success", "hidden cells"
    scores = ("success", "optimal", "within_5_percent", "spl", "exact_grid", "illegal_moves")

    def __init__(self, source: Suite | MazeFiles, **settings: Any) -> None:
        super().__init__(source, **settings)
        self.train = MaskedPaths(self.train)

    def collate(self, items: list[tuple[Mazes, Tensor, int]]) -> dict[str, Tensor]:
        """passages uint8 [B, N, N], start, goal [B], path int64 [B, L]: the cell after each step, -1 where it is hidden
        and behind the goal; labels [B, L], the hidden cells, -100 elsewhere."""
        mazes = Mazes(*(torch.cat(parts) for parts in zip(*(maze for maze, _, _ in items), strict=True)))
        way = shortest_path(mazes, torch.cat([steps for _, steps, _ in items]))[:, 1:]
        mask = hidden(torch.tensor([i for _, _, i in items]), way.shape[1])
        return {
            **mazes._asdict(),
            "path": way.masked_fill(mask, -1),
            "labels": way.where(mask & (way >= 0), IGNORED),
        }

    @staticmethod
    def num_items(batch: dict[str, Tensor]) -> Tensor:
        """Hidden cells."""
        return (batch["labels"] != IGNORED).sum()

    def outcomes(
        self,
        predict: Predict,
        mazes: Mazes,
        steps: Tensor,
        answers: Tensor | None = None,
        *,
        show_walls: bool = True,
    ) -> dict[str, Tensor]:
        """Scores of the said ways, per maze [B]. Nothing keeps a model from naming a cell that no passage leads to:
        there the walk ends, and illegal_moves is the share of such steps. So success is success_unmasked too."""
        way = predict((mazes if show_walls else without_walls(mazes))._asdict())["path"].cpu()
        walked, illegal = said(mazes, way)
        marks = marked(torch.cat([mazes.start.unsqueeze(1), way], 1), mazes.size)
        scores = walk_scores(mazes, steps, walked)
        scores |= grid_scores(mazes, steps, marks & walked.success.view(-1, 1, 1), answers)
        return {**scores, "success_unmasked": scores["success"], "illegal_moves": illegal}

    def baselines(self) -> dict[str, float]:
        """How often random exits lead to the goal of the validation mazes within N * N steps."""
        key = random.keys(torch.arange(len(self.val.steps)))
        return {"random": walk(self.val.mazes, random_scores(key, 1)).success.float().mean().item()}
