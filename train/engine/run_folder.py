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
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch

from train.engine.config import ConfigError, TrainingConfig, changed_settings

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"  # of a checkpoint: size and CRC-32 of each of its files
OUTDATED = ".outdated."  # before the name of a checkpoint that is being replaced by another of its step
KEPT = ("config.json", "run.json", "metrics.jsonl")  # of the run's own files, those that a checkpoint holds as well


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, or a folder that is no longer ours, as a sentence: errors of `write` do not name their file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """The file is either as it was or all there: temporary name, flush to disk, rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises ConfigError, which names the file, where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def kept(run_dir: Path, name: str) -> bytes | None:
    """One of KEPT as it was at the newest checkpoint that has it whole; None where none has."""
    for checkpoint in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            data = (checkpoint / "run" / name).read_bytes()
            if read_json(checkpoint / MANIFEST)[f"run/{name}"] == [len(data), zlib.crc32(data)]:
                return data
        except (OSError, ValueError, LookupError, TypeError):
            continue  # A damaged one, or of a version that kept none; `Checkpoints.newest` says what is wrong with it.
    return None


def begun(run_dir: Path | None, name: str) -> dict[str, Any]:
    """config.json or run.json of the run that goes on in a folder, {} where none does. Raises ConfigError.

    A checkpoint's word counts more than the file's, which may be damaged; it is mended once the folder is locked.
    """
    if run_dir is None:
        return {}
    if (data := kept(run_dir, name)) is not None:
        return json.loads(data)
    return read_json(run_dir / name) if (run_dir / name).exists() else {}


def weights_of(checkpoint: Path) -> Path:
    """The file of the weights that a checkpoint's scores are of: the averaged ones where it has them."""
    averaged = checkpoint / "ema.safetensors"
    return averaged if averaged.exists() else checkpoint / "model.safetensors"


def default_run_dir(name: str | None = None) -> Path:
    """runs/<name or script>/<time stamp>, below the current folder; further ones of the same second are numbered."""
    first = Path("runs") / (name or Path(sys.argv[0]).stem) / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folders = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in count(1))
    return next(folder for folder in folders if not folder.exists())


class RunFolder:
    """One run's folder, held by an OS lock that dies with its process. Only process 0 makes one.

    What is damaged of its files is named through `say`, set aside, and taken from the newest checkpoint.
    """

    def __init__(self, path: Path, config: TrainingConfig, say: Callable[[str], None] = print) -> None:
        self.path, self.say = path, say
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
        except OSError as error:  # of some network file systems
            raise ConfigError(f"{path} cannot be locked: {error.strerror}; give a --run_dir on another disk") from error
        try:
            self._mend()
            self._check_settings(config)
        except (ConfigError, OSError) as error:
            self.release()
            raise ConfigError(str(error)) from error
        # A loader worker that outlives a killed run by a few seconds must not hold its lock.
        os.register_at_fork(after_in_child=self._lock.close)

    def _mend(self) -> None:
        """Bring files back to what a checkpoint knows of them. Damage elsewhere is found where it is read."""
        for outdated in (self.path / "checkpoints").glob(f"{OUTDATED}*"):
            if not (sealed := outdated.with_name(outdated.name.removeprefix(OUTDATED))).exists():
                outdated.rename(sealed)  # killed between the two renames of a checkpoint
        whole: dict[str, Callable[[bytes, bytes], bool]] = {
            "config.json": bytes.__eq__,  # nothing writes it again
            "metrics.jsonl": bytes.startswith,  # nothing but additions
            "run.json": lambda found, known: _is_json(found),
        }
        for name in KEPT:
            file, known = self.path / name, kept(self.path, name)
            found = file.read_bytes() if file.exists() else b""
            if known is not None and not whole[name](found, known):
                self._set_aside(file, "taken from the newest checkpoint")
                write_whole(file, known.decode())
        results, about = self.path / "results.json", self.path / "run.json"
        if not results.exists():
            return
        crc = read_json(about).get("results_crc32") if about.exists() else None  # None: killed before it was noted
        if crc32(results) != crc if crc is not None else not _is_json(results.read_bytes()):
            if not any((self.path / "checkpoints").glob("step-*")):
                raise ConfigError(
                    f"{results} is damaged, and no checkpoint is left to make it of; give a new --run_dir"
                )
            self._set_aside(results, "made anew from the newest checkpoint")

    def _set_aside(self, file: Path, instead: str) -> None:
        aside = file.with_name(f"{file.name}.damaged")
        if file.exists():
            file.replace(aside)
        self.say(f"damaged     {file} is not as it was written and is {instead}; what was found is in {aside.name}")

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
        about = {**before, **facts, "updated": now()}
        about["results_crc32"] = crc32(self.path / "results.json") if about.get("state") == "finished" else None
        write_json(file, about)


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


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
