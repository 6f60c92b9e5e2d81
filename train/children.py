"""Runs that sweep.py and compare.py start as processes of their own: what they are told, and how they are ended.

Nothing here needs torch: a sweep's worker starts in a fraction of a second.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TO_SAVE = 60.0  # seconds that a run has to save itself before it is killed


def environment() -> dict[str, str]:
    """Ours, and in it our packages, where they aren't installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """The folder of sweep.py or compare.py for this process alone, by a lock that dies with it. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = f"another {what}.py runs in {folder}; wait for it, or give another --{what}_dir"
            raise ValueError(said) from error
        yield


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """All that were started with --run_dir=RUN_DIR: a launcher, what it launched, loader workers."""
    flag = f"--run_dir={run_dir}"
    return [p for p in psutil.process_iter(["cmdline"]) if flag in (p.info["cmdline"] or ())]


def end(run_dir: Path) -> None:
    """End every process of a run; what trains saves itself first. A launcher may be gone before what it launched is."""
    processes = processes_of(run_dir)
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=TO_SAVE)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
