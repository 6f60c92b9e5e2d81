"""Which backend an op runs on, read from the environment at every call: in the op's body, which no compiler traces.

TENFOLD_KERNELS=auto     the fastest backend this build has for the op (default)
TENFOLD_KERNELS=torch    the PyTorch fallback
TENFOLD_KERNELS=triton   the Triton kernel, or an error: never a silent fallback
"""

from __future__ import annotations

import os


def backend(op: str) -> str:
    """Name the backend that `op` runs on now: always "torch" until the op has a Triton kernel.

    Raises:
        ValueError: TENFOLD_KERNELS is not one of auto, triton, torch.
        RuntimeError: TENFOLD_KERNELS=triton, and this build has no Triton kernel for `op`.
    """
    choice = os.environ.get("TENFOLD_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"TENFOLD_KERNELS={choice!r} names no backend: use auto, triton or torch")
    if choice == "triton":
        raise RuntimeError(f"this build has no Triton kernel for {op} yet: set TENFOLD_KERNELS to auto or torch")
    return "torch"
