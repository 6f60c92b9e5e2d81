"""The maze task: what a training loop needs to train and score a model that names the next cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tasks.maze.distance import shortest_path
from tasks.maze.files import MazeFiles, load_from
from tasks.maze.generate import VERSION, Suite
from tasks.maze.grid import NUM_SYMMETRIES, Mazes, codes, marked, neighbors, symmetric, symmetric_cells
from tasks.maze.rollout import walk
from tasks.maze.score import fork_floor, policy_scores, walk_scores
from tasks.maze.targets import MAX_HORIZON, candidates_and_labels, moves_to_score

Predict = Callable[[dict[str, Any]], dict[str, Tensor]]


class MazeData:
    """The first `count` mazes of a split; with `augment` each in its eight symmetries.

    Item i is maze i // 8 in symmetry i % 8 then, and maze i otherwise: its maze and the steps to its goal.
    """

    def __init__(self, source: Suite | MazeFiles, split: str, count: int, *, augment: bool = False) -> None:
        self.mazes, self.steps = load_from(source, split, count)
        self.copies = NUM_SYMMETRIES if augment else 1

    def __len__(self) -> int:
        return len(self.steps) * self.copies

    def __getitem__(self, i: int) -> tuple[Mazes, Tensor]:
        row, which = slice(i // self.copies, i // self.copies + 1), i % self.copies
        return symmetric(self.mazes.take(row), which), symmetric_cells(self.steps[row], which)


class MazeTask:
    """Mazes of a suite or of files, and the scores of `tasks.maze.score` on those set aside for validation.

    `rows` says at which cells a model is taught: "all" that have a way to the goal, or those on the "path" alone.

    Attributes: `train`, `val` (`MazeData`), `num_mazes` to learn from, `info`, which identifies them.
    Raises ValueError for counts, horizons or rows that cannot be, and what `tasks.maze.store.load` raises.
    """

    monitor, mode, item_name = "fork_accuracy", "max", "cells"
    scores: tuple[str, ...] = (
        "success",
        "optimal",
        "within_5_percent",
        "spl",
        "success_unmasked",
        "exact_grid",
        "fork_accuracy",
        "illegal_moves",
    )

    def __init__(
        self,
        source: Suite | MazeFiles,
        *,
        train: int = 1000,
        val: int = 256,
        horizons: int = 1,
        rows: str = "all",
        augment: bool = False,
        eval_batch_size: int = 64,
    ) -> None:
        for name, value in (("train", train), ("val", val), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
        if not 1 <= horizons <= MAX_HORIZON:
            raise ValueError(f"horizons={horizons}: a model can be asked for 1 to {MAX_HORIZON} steps ahead")
        if rows not in ("all", "path"):
            raise ValueError(f"rows={rows!r}: 'all' cells with a way to the goal, or those on the 'path'")
        self.source, self.horizons, self.rows, self.eval_batch_size = source, horizons, rows, eval_batch_size
        self.train = MazeData(source, "train", train, augment=augment)
        self.val = MazeData(source, "val", val)
        self.info = {"task": f"mazes v{VERSION}", **source.info}
        self.num_mazes = len(self.train)  # what an epoch goes over
        self.info |= {"train": len(self.train.steps), "val": len(self.val.steps), "augment": augment}

    def collate(self, items: list[tuple[Mazes, Tensor]]) -> dict[str, Tensor]:
        """Maze and questions: passages uint8 [B, N, N], start, goal [B], candidates and labels [B, N * N, K, J]."""
        mazes = Mazes(*(torch.cat(parts) for parts in zip(*(maze for maze, _ in items), strict=True)))
        steps = torch.cat([steps for _, steps in items])
        candidates, labels = candidates_and_labels(mazes, steps, self.horizons)
        if self.rows == "path":
            on_path = marked(shortest_path(mazes, steps), mazes.size).flatten(1)
            labels &= on_path[..., None, None]
        return {**mazes._asdict(), "candidates": candidates, "labels": labels}

    @staticmethod
    def num_items(batch: dict[str, Tensor]) -> Tensor:
        """Cells that are taught something."""
        return batch["labels"][:, :, 0].any(-1).sum()

    def outcomes(
        self,
        predict: Predict,
        mazes: Mazes,
        steps: Tensor,
        answers: Tensor | None = None,
        *,
        show_walls: bool = True,
    ) -> dict[str, Tensor]:
        """Scores of one forward, per maze [B], on the CPU; `answers` as `score.grid_scores` has them.

        Without `show_walls` the model sees a grid without walls, while the scores go by the walls that there are.
        """
        seen = mazes if show_walls else without_walls(mazes)
        return policy_scores(mazes, steps, moves(predict, seen, self.horizons).cpu(), answers)

    def evaluate(self, predict: Any) -> dict[str, float]:
        """Means over the validation mazes of `outcomes`."""
        count, size = len(self.val), self.eval_batch_size
        sums: dict[str, Tensor] = {}
        for i in predict.share(-(-count // size)):
            rows = slice(i * size, (i + 1) * size)
            scores = self.outcomes(predict, self.val.mazes.take(rows), self.val.steps[rows])
            for name, value in scores.items():
                known = value.isfinite()
                sums[name] = sums.get(name, 0) + value[known].double().sum()
                sums[f"{name} known"] = sums.get(f"{name} known", 0) + known.sum()
        names = [name for name in self.scores for name in (name, f"{name} known")]
        totals = predict.total({name: sums.get(name, 0.0) for name in names})
        return {name: totals[name] / max(totals[f"{name} known"], 1) for name in self.scores}

    def baselines(self) -> dict[str, float]:
        """The fork accuracy of random exits on the validation mazes."""
        return {"random": fork_floor(self.val.mazes, self.val.steps).nanmean().item()}


def without_walls(mazes: Mazes) -> Mazes:
    """The same starts and goals on a grid whose cells are all joined."""
    joined = codes(neighbors(mazes.size, mazes.start.device) >= 0).view(1, mazes.size, mazes.size)
    return Mazes(joined.expand_as(mazes.passages), mazes.start, mazes.goal)


def moves(predict: Predict, mazes: Mazes, horizons: int = 1) -> Tensor:
    """What a model that looks `horizons` steps ahead thinks of the four directions: float [B, N * N, 4]."""
    answers = predict({**mazes._asdict(), "candidates": moves_to_score(mazes, horizons)})["scores"]
    return answers[:, :, 0, :4].float()


def decoded(predict: Predict, mazes: Mazes, steps: Tensor, horizons: int = 1) -> dict[str, Tensor]:
    """Scores of other ways to walk by a model's moves, per maze [B].

    no_revisits_ takes one forward for each maze, and leaves out cells already seen where another exit is left;
    reencode_ asks anew at every step, with the present cell for the start; reencode_no_revisits_ does both, as the
    original did, but sees walls.
    """

    def anew(left: Mazes, cell: Tensor, rows: Tensor) -> Tensor:
        answers = moves(predict, left._replace(start=cell), horizons).to(cell.device)
        return answers[torch.arange(len(cell), device=cell.device), cell]

    once = moves(predict, mazes, horizons).to(steps.device)
    walks = {
        "no_revisits": walk(mazes, lambda left, cell, rows: once[rows, cell], revisits=False),
        "reencode": walk(mazes, anew, memory=False),
        "reencode_no_revisits": walk(mazes, anew, revisits=False),
    }
    return {f"{n}_{name}": v for n, walked in walks.items() for name, v in walk_scores(mazes, steps, walked).items()}
