"""What the maze scripts hang into a training: the test at its end, an annealed weight, and what the router does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.poh import PoH, routing_weights
from tasks.maze.files import MazeFiles, load_from
from tasks.maze.generate import Suite
from tasks.maze.grid import Mazes
from tasks.maze.paths import PathTask
from tasks.maze.task import decoded
from train.engine import Trainer
from train.engine.evaluation import aside
from train.engine.metrics import Row
from train.engine.run_folder import write_json
from train.maze_report import draw_routing

ROUTED_MAZES = 64  # of validation, of which the routing is read off
BATCH = 64


class EntropyAnneal:
    """Lets the weight of the routing's entropy fall in a line to 0 at the run's end."""

    def __call__(self, trainer: Trainer, row: Row) -> None:
        total = trainer.progress.total_steps
        if total is not None and hasattr(trainer.inner, "entropy_scale"):
            trainer.inner.entropy_scale.fill_(1 - row["step"] / total)


class Routing:
    """After every evaluation RUN/routing.json: of each block, refinement and head the mean weight over validation
    mazes, and its standard deviation over them; at the end plots/routing.png of it. A head that gets everything
    everywhere is a router that has collapsed; one that deviates nowhere doesn't look at the maze."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._usage: dict[str, Any] = {}

    def __call__(self, trainer: Trainer, row: Row) -> None:
        model = trainer.predict.whole()
        if model is None or not isinstance(model, PoH) or model.config.routing == "uniform":
            return
        val = trainer.task.val.mazes.take(slice(ROUTED_MAZES)).to(trainer.backend.device)
        with trainer.backend.autocast():
            weights = routing_weights(model, *val).mean(3)  # [blocks, refinements, B, H]
        usage = {"mean": weights.mean(2).tolist(), "deviation": weights.std(2, correction=0).tolist()}
        self._usage, self._file = {"step": row["step"], **usage}, trainer.run_dir / "routing.json"
        write_json(self._file, self._usage)
        largest = weights.mean((0, 1, 2)).max().item()
        trainer.report["routing"] = {"largest_mean_weight": largest, "if_even": 1 / weights.shape[-1]}

    def finish(self) -> None:
        if self._file is not None:
            draw_routing(self._file.parent / "plots" / "routing.png", self._usage)


class Test:
    """At the end, the test mazes, with walls and without: means into results.json, every maze into outcomes.npz.

    Of the first `rollouts` mazes also the other ways to walk (`tasks.maze.task.decoded`), NaN for the rest; and for
    each N of `sizes` mazes of perfect-N, under names that begin with sizeN_. A model that says whole ways has neither.
    """

    def __init__(
        self, source: Suite | MazeFiles, count: int, rollouts: int = 0, sizes: tuple[int, ...] = (), braid: float = 0.0
    ) -> None:
        self.mazes, self.steps = load_from(source, "test", count)
        self.answers = source.answers[:count] if isinstance(source, MazeFiles) else None
        self.rollouts, self.trainer, self.seconds_at_end = rollouts, None, 0.0
        self.sizes = {n: load_from(Suite(f"perfect-{n}", braid=braid), "test", count) for n in sizes}

    def __call__(self, trainer: Trainer, row: Row) -> None:
        if trainer is not self.trainer:
            few = slice(min(BATCH, len(self.steps)))
            started = time.perf_counter()
            trainer.task.outcomes(trainer.predict, self.mazes.take(few), self.steps[few])
            each = (time.perf_counter() - started) / few.stop
            larger = sum((n / self.mazes.size) ** 2 for n in self.sizes)
            # Two walks that ask anew at every step take about N^2 / 2 of them.
            self.seconds_at_end = each * ((2 + larger) * len(self.steps) + self.rollouts * self.mazes.size**2)
        self.trainer = trainer

    def finish(self) -> None:
        trainer = self.trainer
        with aside(trainer.predict.model):
            scores = {
                "test": self._scores(self.mazes, self.steps, self.answers),
                "walls_zeroed": self._scores(self.mazes, self.steps, self.answers, show_walls=False),
            }
            if not isinstance(trainer.task, PathTask):
                scores |= {f"size{n}": self._scores(*of) for n, of in self.sizes.items()}
                scores["test"] |= self._other_walks() if self.rollouts else {}
        trainer.report |= {part: {n: v.nanmean().item() for n, v in of.items()} for part, of in scores.items()}
        if trainer.folder is not None:
            names = {part: "" if part == "test" else f"{part}_" for part in scores}
            arrays = {f"{names[part]}{n}": v.numpy() for part, of in scores.items() for n, v in of.items()}
            np.savez_compressed(trainer.run_dir / "outcomes.npz", **arrays)

    def _scores(self, mazes: Mazes, steps: Tensor, answers: Tensor | None = None, **how: bool) -> dict[str, Tensor]:
        parts, trainer = [], self.trainer
        for rows in torch.arange(len(steps)).split(BATCH):
            own = None if answers is None else answers[rows]
            parts.append(trainer.task.outcomes(trainer.predict, mazes.take(rows), steps[rows], own, **how))
        return _joined(parts)

    def _other_walks(self) -> dict[str, Tensor]:
        """NaN behind the first `rollouts` mazes."""
        tried, rest = torch.arange(len(self.steps)).tensor_split([self.rollouts])
        predict, horizons = self.trainer.predict, self.trainer.task.horizons
        parts = [decoded(predict, self.mazes.take(r), self.steps[r], horizons) for r in tried.split(BATCH)]
        return _joined([*parts, {name: torch.full((len(rest),), torch.nan) for name in parts[0]}])


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
