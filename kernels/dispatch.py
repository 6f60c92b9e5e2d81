"""What every fused op shares: which backend a call runs on, how a Triton kernel is launched, and what was launched.

TENFOLD_KERNELS=auto     Triton on CUDA and ROCm devices, the PyTorch fallback elsewhere (default)
TENFOLD_KERNELS=torch    the PyTorch fallback
TENFOLD_KERNELS=triton   the Triton kernel, or an error: never a silent fallback

The choice is read at every call, in the op's body, which no compiler traces. TRITON_INTERPRET=1, which Triton itself
reads when a kernel is defined, lets TENFOLD_KERNELS=triton run the kernels on CPU tensors.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER_MULTIPROCESSORS = 132  # of an H100 and an H200: what launchers plan for where there is no GPU to ask

log = logging.getLogger("kernels")
launches: Counter[str] = Counter()  # Triton launches of this process, by op
running_on: dict[str, str] = {}  # op: the backend of its last call


class Launch(NamedTuple):
    """A launch that `recording` kept: of `kernel`, on `grid`, with the arguments it would have had by name."""

    op: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


_recorded: list[Launch] | None = None


def backend(op: str, device: str) -> str:
    """Name the backend that `op` runs on now for tensors on `device`: "triton" or "torch".

    Raises:
        ValueError: TENFOLD_KERNELS is not one of auto, triton, torch.
        RuntimeError: TENFOLD_KERNELS=triton, and Triton does not run here.
    """
    choice = os.environ.get("TENFOLD_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"TENFOLD_KERNELS={choice!r} names no backend: use auto, triton or torch")
    possible = has_triton() and (device == "cuda" or (device == "cpu" and INTERPRETED))
    if choice == "triton" and not possible:
        raise RuntimeError(
            f"TENFOLD_KERNELS=triton, but Triton cannot run {op} on a {device} tensor here: it needs the triton "
            "package and a CUDA or ROCm device, or TRITON_INTERPRET=1 before Python starts; or set TENFOLD_KERNELS=auto"
        )
    chosen = "triton" if possible and (choice == "triton" or (choice == "auto" and device == "cuda")) else "torch"
    if running_on.get(op) != chosen:
        running_on[op] = chosen
        log.info("%s runs on %s (%s tensors)", op, "Triton" if chosen == "triton" else "PyTorch", device)
    return chosen


@lru_cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def fused_op(name: str, launcher: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Define the op `tenfold::name`: the decorated function is its PyTorch fallback and gives the schema.

    `launcher`, "module:function" in `kernels.gpu` with the same signature, is its Triton kernel on CUDA and ROCm; the
    module is imported when first needed, so that `import kernels` works without Triton.
    """
    op, (module, function) = re.sub("_(fwd|bwd|with_gradients)$", "", name), launcher.split(":")

    def define(fallback: Callable) -> torch.library.CustomOpDef:
        @wraps(fallback)
        def run(*args: Any, **kwargs: Any) -> Any:
            device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            if backend(op, device) == "torch":
                return fallback(*args, **kwargs)
            return getattr(importlib.import_module(f"kernels.gpu.{module}"), function)(*args, **kwargs)

        schema = torch.library.infer_schema(fallback, mutates_args=())
        return torch.library.custom_op(f"tenfold::{name}", run, mutates_args=(), schema=schema)

    return define


def launch(
    op: str, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 2, **constants: Any
) -> None:
    """Run a Triton kernel where its first tensor lies, and count it for `op`; an empty grid launches nothing.

    Args:
        args: the kernel's arguments in order, up to its constexprs.
        constants: its constexprs by name.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _recorded is not None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        _recorded.append(Launch(op, kernel, grid, arguments, options))
        return
    launches[op] += 1
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments are on
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Keep launches in place of running them: what `kernels.aot` compiles is what the launchers would launch."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs `device` runs at once, at the least; an H200's where it is not a GPU."""
    if device.type != "cuda":
        return HOPPER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
