"""What every script's `main` wraps around its set-up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from train.engine.guard import TrainingBroken


@contextmanager
def sentences() -> Iterator[None]:
    """Settings, files, data and absent packages end the script with their sentence and status 2, not with a traceback.

    TENFOLD_TRACEBACK=1 shows where the sentence came from.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, TrainingBroken) as error:
        if os.environ.get("TENFOLD_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
