"""Ways to damage a sound file, and what a reader may then do: give what the file says, or refuse it in a sentence.

A refusal is one of REFUSALS exactly: UnicodeDecodeError and JSONDecodeError are ValueErrors too, of a reader's depths.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.engine import ConfigError

REFUSALS = {ValueError, ConfigError, OSError, FileNotFoundError}
VALUES = (
    None, True, 0, -1, 2, 10**12, 10**30, 1.5, float("nan"), float("inf"), 1e308, 5e-324, "", "x", "²", "\ud800", "\0",
    "--lr", "x" * 3000, [], {}, [[]], [None], {"a": 1}, [[1, 2], [3]],
)  # fmt: skip
BYTES = (b"", b"\0", b"\xff\xfe", b"\n", b"-1", b"nan", b"\xed\xa0\x80", b"[" * 100_000, b'"', b"9" * 5000, b"\xff" * 8)


def hostile(examples: int) -> Callable[[Callable], Callable]:
    """Some examples in CI, the same each time, and as a test of its own, marked slow, twenty times as many."""
    calm = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    def mark(test: Callable) -> Callable:
        more = settings(max_examples=20 * examples, **calm)(given(data=st.data())(test))
        setattr(sys.modules[test.__module__], f"{test.__name__}_at_length", pytest.mark.slow(more))
        return settings(max_examples=examples, derandomize=True, **calm)(given(data=st.data())(test))

    return mark


def accepts_or_refuses(read: Callable, *arguments: Any) -> None:
    try:
        read(*arguments)
    except Exception as error:
        assert type(error) in REFUSALS and str(error).strip(), f"{type(error).__name__} from the depths: {error}"


# ---- damage ----------------------------------------------------------------------------------------------------------


def places(value: Any, here: tuple = ()) -> list[tuple]:
    """Of everything inside a JSON value, the keys that lead there; of long lists the first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    return [here, *(place for key, of in inner for place in places(of, (*here, key)))]


def values() -> st.SearchStrategy:
    return st.sampled_from(VALUES).map(copy.deepcopy)  # or the second damage would be done to VALUES


def damaged(data: st.DataObject, value: Any) -> Any:
    """A JSON value with something in it replaced, renamed or gone, once or twice."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 2))):
        if not (inside := places(value)[1:]):
            return data.draw(values())
        *path, key = data.draw(st.sampled_from(inside))
        holder = value
        for step in path:
            holder = holder[step]
        what = data.draw(st.sampled_from(["replace"] * 5 + ["remove", "rename"]))
        old = holder.pop(key)
        if what == "rename" and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(["", "²", "\ud800", "x"]))] = old
        elif what == "replace" and isinstance(holder, dict):
            holder[key] = data.draw(values())
        elif what == "replace":
            holder.insert(key, data.draw(values()))
    return value


def damaged_bytes(data: st.DataObject, sound: bytes) -> bytes:
    """Cut off, overwritten, or with something between; more often in the first 256 bytes, where headers are."""
    found = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, min(255, len(found))) | st.integers(0, len(found)))
        what = data.draw(st.sampled_from(("cut", "insert", "overwrite", "flip")))
        if what == "cut":
            del found[place:]
        elif what == "flip" and place < len(found):
            found[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            junk = data.draw(st.sampled_from(BYTES))
            found[place : place + len(junk) * (what == "overwrite")] = junk
    return bytes(found)


def damaged_json(data: st.DataObject, value: Any) -> bytes:
    if data.draw(st.integers(0, 3)):
        return json.dumps(damaged(data, value)).encode()
    return damaged_bytes(data, json.dumps(value).encode())
