"""How a run that trains writes to the experiment database: seldom, in batches, and never in training's way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from train.engine.config import ConfigError
from train.engine.experiments import ExperimentDB
from train.engine.metrics import Row

SECONDS_BETWEEN_WRITES = 1.0


def database_of(run_dir: Path, db: str = "auto") -> Path | None:
    """Where --db puts a run: experiments.db in the topmost folder called runs above it, or beside it; None for off."""
    if db != "auto":
        return None if db == "off" else Path(db)
    above = Path(os.path.abspath(run_dir)).parents
    return next((folder for folder in reversed(above) if folder.name == "runs"), above[0]) / "experiments.db"


class Record:
    """A tracker: the run's part of the database.

    Rows gather and go out together. Where the database fails, that is said once, nothing more is tried while training
    goes on, and at the end metrics.jsonl is read whole.
    """

    def __init__(self, path: Path, run_dir: Path, say: Callable[[str], None]) -> None:
        self.path, self.run_dir, self.say = path, run_dir, say
        self._failed = False
        self._db: ExperimentDB | None = None
        self._rows: list[Row] = []
        self._written = time.monotonic()
        with self._or_say_so():
            self._db = ExperimentDB(path)
            self._run_id = self._db.import_run(run_dir)
            say(f"database    {path}, run {self._run_id}")

    @contextmanager
    def _or_say_so(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            if not self._failed:
                self.say(f"database    {error}")
            if self._db is not None:
                self._db.close()
            self._failed, self._db = True, None

    def log(self, row: Row) -> None:
        self._rows.append(row)
        if row["split"] == "val" or time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.close()

    def close(self) -> None:
        """Write what has gathered; `conclude` is the end."""
        if self._db is not None and self._rows:
            with self._or_say_so():
                self._db.log_metrics(self._run_id, self._rows)
        self._rows.clear()
        self._written = time.monotonic()

    def cut_back(self, step: int) -> None:
        self.close()
        if self._db is not None:
            with self._or_say_so():
                self._db.cut_back(self._run_id, step)

    def conclude(self) -> None:
        """How the run ended, and what files it left: both are in its folder by now. May be called again."""
        if self._db is not None:
            self._db.close()
        with self._or_say_so(), ExperimentDB(self.path) as self._db:
            self._db.import_run(self.run_dir, rows=self._failed)
