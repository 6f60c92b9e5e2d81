"""SIGTERM, SIGINT and SIGUSR1 become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, ClassVar

# A launcher may restart a job that ends so (EX_TEMPFAIL of sysexits.h); through `accelerate launch` it arrives as 1.
EXIT_INTERRUPTED = 75
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """While entered, remembers that a signal came instead of dying of it."""

    # Came when a run was at its end, and found nothing to stop: it is for the script's next run.
    unheeded: ClassVar[str | None] = None

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received, Signals.unheeded = Signals.unheeded, None
        self._before = {number: signal.signal(number, self._remember) for number in NUMBERS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            Signals.unheeded = self.received

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
