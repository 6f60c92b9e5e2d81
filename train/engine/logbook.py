"""Rows: made from the meter, shown on the bar, and sent to every place that keeps them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.engine.backend import Backend
from train.engine.config import TrainingConfig
from train.engine.metrics import Bar, JsonlFile, Meter, Row, TensorBoardFile, WandbRun, read_rows
from train.engine.record import Record, database_of
from train.engine.snapshot import Progress

if TYPE_CHECKING:
    from train.engine.trainer import Trainer

KERNELS = logging.getLogger("kernels")


class KernelLines(logging.Handler):
    """Shows what the fused ops log: which backend each of them runs on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"kernels     {record.getMessage()}")


class Logbook:
    """Process 0 writes; the others only take part in the sums."""

    def __init__(self, config: TrainingConfig, backend: Backend, item_name: str) -> None:
        self.config, self.backend = config, backend
        self.meter = Meter(backend.device)
        self.bar = Bar(shown=backend.is_main, item_name=item_name)
        self.trackers: list[Any] = []
        self._jsonl: JsonlFile | None = None
        self._record: Record | None = None
        self._opened = self._since = time.perf_counter()
        self._rows, self._items, self._steps, self._seconds = 0, 0.0, 0, 0.0
        self._last_step = 0
        self._earlier_seconds = 0.0
        self.rows_logged = 0  # by the run's earlier processes too, and those that a rewind cut off
        self._wandb: WandbRun | None = None
        self._kernel_lines = KernelLines(self.say)

    def say(self, *lines: str) -> None:
        for line in lines:
            self.bar.say(line)

    def open(self, run_dir: Path, progress: Progress) -> None:
        """Cut metrics.jsonl back to the checkpoint and open the trackers; what a killed run kept from them follows."""
        self._earlier_seconds, self._last_step = progress.seconds, progress.step
        self._opened = self._since = time.perf_counter()
        if not self.backend.is_main:
            return
        KERNELS.setLevel(logging.INFO)
        KERNELS.addHandler(self._kernel_lines)
        self._jsonl = JsonlFile(run_dir / "metrics.jsonl", progress.metrics_bytes)
        self.trackers.append(self._jsonl)
        kept, self.rows_logged = read_rows(self._jsonl.path), progress.rows_logged
        if self.config.wandb != "off":
            run = WandbRun(self.config, run_dir, progress.wandb_id, self.say)
            progress.wandb_id = run.id
            missing = max(0, self.rows_logged - run.num_rows)
            for row in kept[max(0, len(kept) - missing) :]:
                run.log(row)
            self.rows_logged = max(self.rows_logged, run.num_rows)
            self._wandb = run
            self.trackers.append(run)
        if self.config.tensorboard:
            board = TensorBoardFile(run_dir)
            for row in kept:
                board.log(row)
            self.trackers.append(board)
        if (record := self.enter_in_database(run_dir)) is not None:
            self.trackers.append(record)

    def enter_in_database(self, run_dir: Path) -> Record | None:
        """The run's part of the database, with all that its folder holds by now."""
        if (database := database_of(run_dir, self.config.db)) is not None:
            self._record = Record(database, run_dir, self.say)
        return self._record

    def cut_back(self, progress: Progress) -> None:
        """After a rewind: rows behind the checkpoint did not happen."""
        self._last_step, self._since = progress.step, time.perf_counter()
        if self._jsonl is not None:
            self._jsonl.cut_back(progress.metrics_bytes)
        if self._record is not None:
            self._record.cut_back(progress.step)

    @property
    def metrics_bytes(self) -> int:
        return self._jsonl.size if self._jsonl is not None else 0

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far, its earlier processes included."""
        return self._earlier_seconds + time.perf_counter() - self._opened

    @property
    def items_per_second(self) -> float | None:
        """Over all rows but the first, which pays for compilation and allocation; None where no step was made."""
        return self._items / self._seconds if self._seconds else None

    @property
    def items_per_step(self) -> float | None:
        return self._items / self._steps if self._steps else None

    def train_row(self, progress: Progress, lr: float) -> Row:
        """Means since the last row. Reads the device once."""
        values = self.meter.read(self.backend.sum)
        items, skipped = values.pop("items"), values.pop("skipped")
        seconds = time.perf_counter() - self._since
        steps = progress.step - self._last_step
        if self._rows == 1:
            self._items, self._steps, self._seconds = 0.0, 0, 0.0
        self._items, self._steps, self._seconds = self._items + items, self._steps + steps, self._seconds + seconds
        self._rows, self._last_step = self._rows + 1, progress.step
        progress.skipped_steps += skipped
        row = {"step": progress.step, "split": "train", **values, "skipped": skipped, "lr": lr}
        row |= {"items_per_second": items / seconds, "elapsed": self.elapsed}
        self._log(row)
        self.bar.show(row, progress.total_steps)
        self._since = time.perf_counter()
        return row

    def val_row(self, progress: Progress, scores: dict[str, float]) -> Row:
        row = {"step": progress.step, "split": "val", **scores, "elapsed": self.elapsed}
        self._log(row)
        self.say(f"validation  after step {row['step']}: " + " ".join(f"{k}={v:.4f}" for k, v in scores.items()))
        return row

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluations and saves: their time is not training's."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def _log(self, row: Row) -> None:
        self.rows_logged += 1
        for tracker in self.trackers:
            tracker.log(row)

    def complete(self) -> None:
        """At the end of a run, for nobody goes on with it: what W&B has lost of it."""
        if self._wandb is not None and self._jsonl is not None:
            self._wandb.complete(read_rows(self._jsonl.path))

    def close(self) -> None:
        self.bar.close()
        KERNELS.removeHandler(self._kernel_lines)
        with ExitStack() as closing:  # all of them, whatever becomes of one
            for tracker in reversed(self.trackers):
                closing.callback(tracker.close)
            self.trackers.clear()

    def conclude(self) -> None:
        """Tell the database how the run ended, once the run folder says so."""
        if self._record is not None:
            self._record.conclude()


def introduce(trainer: Trainer) -> None:
    """What is known before the first step, for run.json and for whoever watches."""
    backend, progress, threads = trainer.backend, trainer.progress, torch.get_num_threads()
    facts = {
        "state": "running",
        "precision": backend.precision,
        "precision_reason": backend.precision_reason,
        "device": str(backend.device),
        "launch": backend.name,
        "processes": backend.world_size,
        "threads": threads,
        "monitor": trainer.task.monitor,
        "mode": trainer.task.mode,
    }
    if trainer.folder is not None:
        trainer.folder.describe(**facts, **trainer.facts)
    trainer.book.say(
        f"run folder  {trainer.run_dir}",
        f"machine     {backend.world_size} process(es) on {backend.device}, {threads} threads each",
        f"precision   {backend.precision}: {backend.precision_reason}",
        f"data        {trainer.order.describe()}",
        *trainer.plan.lines(),
    )
    if progress.step:
        trainer.book.say(f"resumed     after step {progress.step} of {progress.total_steps or 'a number to come'}")
