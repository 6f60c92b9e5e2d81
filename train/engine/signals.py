"""SIGTERM, SIGINT and SIGUSR1: in a run, a flag that the loop reads between steps; outside of one, the script's end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar, NamedTuple

# A launcher may restart a job that ends so (EX_TEMPFAIL of sysexits.h); through `accelerate launch` it arrives as 1.
EXIT_INTERRUPTED = 75
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(SystemExit):
    """A signal came where nothing is trained. It passes through the clean-up of what is being written."""

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_INTERRUPTED)
        self.signal = signal.Signals(number).name


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Around a script: the first signal raises Interrupted, later ones are too many; a run inside has its own way."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in NUMBERS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, end) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Agreed(NamedTuple):
    """What all processes know after the one small sum of a step."""

    bad: bool = False  # the verdict, where the host has to know it
    signal: bool = False
    late: bool = False


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
