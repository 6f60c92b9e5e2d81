"""The folder that keeps what tasks make, so that only the first run of a setting pays for it."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`$TENFOLD_CACHE`, else `~/.cache/tenfold`."""
    return Path(os.environ.get("TENFOLD_CACHE") or "~/.cache/tenfold").expanduser()


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """What a disk refuses becomes a sentence."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"Cannot keep data in {folder} ({error.strerror or error}): free space there, make it writable, "
            "or let the environment variable TENFOLD_CACHE name another folder."
        ) from error


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` when all went well and removed when not."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time; the others wait. The lock dies with its process."""
    with kept_in(file.parent):
        lock = file.open("a")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
