"""Bytes that a Triton kernel loads and stores, counted in Triton's interpreter.

    TRITON_INTERPRET=1 python -m kernels.traffic            # JSON: [kernel, config, bytes, minimum]

A masked-out element moves nothing; one that is loaded twice counts twice, also where a cache would serve it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from kernels.cases import OPS
from kernels.dispatch import INTERPRETED


class Traffic(NamedTuple):
    kernel: str
    config: str
    moved: int  # bytes
    minimum: int  # bytes

    @property
    def ratio(self) -> float:
        return self.moved / self.minimum


@contextmanager
def bytes_moved() -> Iterator[Counter[str]]:
    """Count the bytes of the loads and stores of every kernel launched inside, by the kernel's name."""
    if not INTERPRETED:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    moved: Counter[str] = Counter()
    running: list[str] = []
    load, store, launch = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        GridExecutor.__call__,
    )

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        value = load(self, ptrs, mask, *rest)
        moved[running[-1]] += int(mask.data.sum()) * value.data.itemsize
        return value

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved[running[-1]] += int(mask.data.sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    def named_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(self.fn.__name__)
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.pop()

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(GridExecutor, "__call__", named_launch),
    ):
        yield moved


def audit(ops: list[str] | None = None) -> list[Traffic]:
    """Every case of `kernels.cases` in fp32: the bytes each kernel moved beside its minimum."""
    table = []
    for op in ops or OPS:
        torch.manual_seed(0)
        for case in OPS[op]("cpu", torch.float32):
            with bytes_moved() as moved:
                case.run()
            if set(moved) != set(case.minimum):
                raise ValueError(f"{op} {case.config}: {sorted(moved)} ran, minima are of {sorted(case.minimum)}")
            table += [Traffic(kernel, case.config, moved[kernel], case.minimum[kernel]) for kernel in moved]
    return table


if __name__ == "__main__":
    print(json.dumps(audit()))
