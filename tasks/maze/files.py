"""A user's own mazes in place of a suite: a folder of HRM's and TRM's format, or of the CSV that it is built from.

    FOLDER/train/all__inputs.npy, all__labels.npy, FOLDER/test/…      or      FOLDER/train.csv, FOLDER/test.csv

Such mazes are made of pixels, and a pixel of floor is a cell: a maze of 30 x 30 characters has 30 x 30 cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.maze.distance import distances
from tasks.maze.formats import read_csv, read_hrm
from tasks.maze.generate import Suite, canonical_hash
from tasks.maze.grid import Mazes, concatenate
from tasks.maze.store import digest, load


class MazeFiles:
    """The mazes of a folder, its last `val` training mazes set aside for validation.

    Attributes: `size`, N; `answers`, the cells that the test set's answers mark, bool [B, N, N]; `info`, which says
    what these mazes are, and how many of the test mazes, turned or mirrored, can be learned by heart from training.
    Raises OSError and ValueError for what cannot be read, and for too few mazes.
    """

    def __init__(self, folder: Path | str, val: int) -> None:
        folder = Path(folder)
        (train, _), (test, self.answers) = _read(folder, "train"), _read(folder, "test")
        if train.size != test.size:
            raise ValueError(
                f"{folder}: the training mazes are {train.size} x {train.size}, the test mazes {test.size} x "
                f"{test.size}; a table of scores is about mazes of one size"
            )
        rows = torch.arange(len(train.start))
        if val >= len(rows):
            raise ValueError(f"{folder}: of {len(rows)} training mazes {val} for validation leave none to learn from")
        self.size = train.size
        self._splits = {"train": train.take(rows[:-val]), "val": train.take(rows[-val:]), "test": test}
        leaked = torch.isin(canonical_hash(test), canonical_hash(train)).sum().item()
        self.info: dict[str, Any] = {"files": str(folder), "sha256": digest(concatenate([train, test]))}
        self.info["test_in_train"] = leaked

    def load(self, split: str, count: int) -> tuple[Mazes, Tensor]:
        """The first `count` mazes of a split, or all where there are fewer, and the steps to their goals."""
        mazes = self._splits[split].take(slice(count))
        return mazes, distances(mazes.passages, mazes.goal)


def _read(folder: Path, split: str) -> tuple[Mazes, Tensor]:
    if (folder / f"{split}.csv").exists():
        return read_csv(folder / f"{split}.csv")
    if (folder / split).is_dir():
        return read_hrm(folder, split)
    raise ValueError(f"{folder} has neither {split}.csv nor {split}/ with all__inputs.npy and all__labels.npy in it")


def load_from(source: Suite | MazeFiles, split: str, count: int) -> tuple[Mazes, Tensor]:
    """Mazes of a split and the steps to their goals, from files or from a suite."""
    return source.load(split, count) if isinstance(source, MazeFiles) else load(source, split, count)
