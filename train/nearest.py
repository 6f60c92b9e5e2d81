"""What was meant by a name that is not known. It imports next to nothing: a sweep's workers do without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence about `name`: the nearest of `known` in brackets, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
