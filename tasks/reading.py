"""Files of strangers: what they hold, or a ValueError in a sentence, however they are damaged."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def parsed(text: str | bytes, where: Path | str) -> Any:
    """What JSON says. Raises ValueError, beginning with `where`, for what is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: its brackets lie too deep in each other") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{where}: not JSON: {error}") from None


def read_arrays(source: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays of a folder of .npy files, or of an .npz file.

    Raises ValueError where one is damaged or not there, and OSError where the file is not, or not ours to read.
    """
    try:
        if source.is_dir():
            arrays = [np.load(source / f"{name}.npy") for name in names]
        else:
            with zipfile.ZipFile(source), np.load(source) as kept:  # np.load takes other files for something else
                arrays = [kept[name] for name in names]
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of numpy, zipfile, zlib and tokenize each has several words of its own for damage
        raise ValueError(f"{source}: it doesn't hold the arrays {', '.join(names)}, or they are damaged") from error
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise ValueError(f"{source}: it doesn't hold the arrays {', '.join(names)}, but archives under their names")
    return arrays
