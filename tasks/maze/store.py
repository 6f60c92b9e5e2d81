"""Mazes made once: the sets that take long lie in the cache, and the published test sets are known by their hash."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from tasks.cache import cache_folder, kept_in, renamed
from tasks.maze.frozen import TEST_HASHES
from tasks.maze.generate import VERSION, Suite, sample
from tasks.maze.grid import Mazes
from tasks.reading import read_arrays

KEPT_FROM = 1000  # mazes: fewer are made again faster than anyone notices, hard30's apart


def digest(mazes: Mazes) -> str:
    """SHA-256 over passages, starts and goals, maze by maze: a prefix of the mazes has a hash of its own."""
    ends = torch.stack([mazes.start, mazes.goal], 1).numpy().astype("<i4")
    rows = np.concatenate([mazes.passages.flatten(1).numpy(), ends.view(np.uint8)], 1)
    return hashlib.sha256(rows.tobytes()).hexdigest()


def load(suite: Suite, split: str, count: int) -> tuple[Mazes, Tensor]:
    """The first `count` mazes of a split and the steps to their goals, from the cache where they are there.

    Raises:
        OSError: the cache's folder cannot be written.
        RuntimeError: mazes of a published test set are not what they were, so that scores would not compare.
    """
    if count < KEPT_FROM and suite.kind != "hard30":
        return verified(suite, split, *sample(suite, split, torch.arange(count)))
    name = f"{suite.name}-min{suite.min_path}-braid{suite.braid}-{split}-{count}-v{VERSION}.npz"
    file = cache_folder() / "mazes" / name
    with kept_in(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)  # first: a disk that refuses should do so before the work
        if (kept := _read(file)) is not None:
            return verified(suite, split, *kept)
        mazes, steps = sample(suite, split, torch.arange(count))
        with renamed(file) as temporary, temporary.open("wb") as stream:
            arrays = {name: value.numpy() for name, value in mazes._asdict().items()}
            np.savez_compressed(stream, **arrays, steps=steps.numpy(), sha256=np.array(digest(mazes)))
    return verified(suite, split, mazes, steps)


def _read(file) -> tuple[Mazes, Tensor] | None:
    """What was kept, or None where it is not there or not what was written: it is then made again."""
    if not file.exists():
        return None
    try:
        *arrays, written = read_arrays(file, (*Mazes._fields, "steps", "sha256"))
        *fields, steps = map(torch.from_numpy, arrays)
        intact = digest(Mazes(*fields)) == str(written)
    except ValueError:
        return None
    return (Mazes(*fields), steps) if intact else None


def verified(suite: Suite, split: str, mazes: Mazes, steps: Tensor) -> tuple[Mazes, Tensor]:
    """The same, once the first of them are known to be those of the published test set."""
    published = TEST_HASHES.get((suite.name, suite.min_path, suite.braid)) if split == "test" else None
    if published is not None:
        count, wanted = published
        if len(steps) >= count and digest(mazes.take(torch.arange(count))) != wanted:
            raise RuntimeError(
                f"the first {count:,} test mazes of {suite.name} are not the published ones, so scores on them would "
                "compare with nobody's: the generator has changed without its VERSION, or this torch rounds otherwise"
            )
    return mazes, steps
