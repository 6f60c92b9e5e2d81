"""What every script's `main` wraps around its set-up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from train.engine.guard import TrainingBroken
from train.engine.signals import Interrupted, ended_by_signals


@contextmanager
def sentences() -> Iterator[None]:
    """Settings, files, data and absent packages end the script with their sentence and status 2, not with a traceback;
    a signal, while no run is there to save itself, with a sentence and status 75.

    TENFOLD_TRACEBACK=1 shows where the sentence of an error came from.
    """
    try:
        with ended_by_signals():
            yield
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"interrupted by {stopped.signal} outside of training, where nothing is left half done; "
                "the same command goes on with what caches and --run_dir hold",
                file=sys.stderr,
            )
        raise
    except (ValueError, OSError, ImportError, TrainingBroken) as error:
        if os.environ.get("TENFOLD_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
