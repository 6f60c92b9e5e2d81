"""The folder a run keeps everything in: who may write there, what it says about itself, and how files arrive whole."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch

from train.engine.config import ConfigError, TrainingConfig, changed_settings

ROOT = Path(__file__).resolve().parents[2]


def write_whole(path: Path, text: str) -> None:
    """The file is either as it was or all there: temporary name, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def default_run_dir() -> Path:
    """runs/<script>/<time stamp>, below the current folder."""
    return Path("runs") / Path(sys.argv[0]).stem / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


class RunFolder:
    """One run's folder, held by an OS lock that dies with its process. Only process 0 makes one."""

    def __init__(self, path: Path, config: TrainingConfig) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
            (path / "plots").mkdir(exist_ok=True)
            (path / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--run_dir {path} cannot be written: {error.strerror}; give a folder of yours"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is training in {path}; wait for it or give another --run_dir"
            ) from error
        try:
            self._check_settings(config)
        except ConfigError:
            self.release()
            raise
        # A loader worker that outlives a killed run by a few seconds must not hold its lock.
        os.register_at_fork(after_in_child=self._lock.close)

    def _check_settings(self, config: TrainingConfig) -> None:
        file = self.path / "config.json"
        if not (self.finished or any((self.path / "checkpoints").glob("step-*"))):
            write_json(file, config.to_dict())  # a new folder, or a run that left nothing to go on from
            return
        if config.resume != "auto":
            raise ConfigError(
                f"{self.path} already holds a run; --resume auto goes on with it, or give another --run_dir"
            )
        if changed := changed_settings(read_json(file), config.to_dict()):
            raise ConfigError(
                f"{self.path} was begun with other settings ({'; '.join(changed)}); resume with the same, "
                "or give a new --run_dir"
            )

    def release(self) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        return (self.path / "results.json").exists()

    def describe(self, **facts: Any) -> None:
        """Write run.json anew, `facts` over what it said before."""
        file = self.path / "run.json"
        before = read_json(file) if file.exists() else {"started": now(), **provenance()}
        write_json(file, {**before, **facts, "updated": now()})


def is_held(path: Path) -> bool:
    """Whether a living process trains in the run folder."""
    try:
        with (path / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    """The command that gives this run again, as `accelerate launch` takes it."""
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join(["accelerate", "launch", str(script), *sys.argv[1:]])


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # An installed copy outside a checkout has no commit; run.json then says null.
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Command, commit and versions, for run.json."""
    status = _git("status", "--porcelain")
    return {
        "command": command_line(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
        },
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
    }
