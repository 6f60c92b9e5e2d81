"""Which number format a run trains in, chosen by what the machine is good at."""

from __future__ import annotations

import os
import time

import psutil
import torch

from train.engine.config import ConfigError

# bf16 must win by this much in matmuls to pay for its casts.
WORTHWHILE = 1.5


def use_all_cores() -> None:
    """`accelerate launch` starts plain runs with one thread; give each local process its share of the cores."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        cores = min(cores, len(os.sched_getaffinity(0)))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Best FLOP/s of a square matmul over repeated tries; its random numbers are its own."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    synchronize(device)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _possible(precision: str, device: torch.device) -> str:
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 needs a GPU and its loss scaler; on a CPU take --mixed_precision bf16, no or auto")
    return precision


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """(no | bf16 | fp16, the reason in words).

    Asked for by flag wins; then a launch config that names bf16 or fp16; then what is measured or known of the device.
    Raises ConfigError for fp16 on a CPU.
    """
    if asked != "auto":
        return _possible(asked, device), "asked for by --mixed_precision"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("bf16", "fp16"):
        return _possible(launched, device), "asked for by the launch config"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16", f"compute capability {major}.{minor} has bf16 tensor cores"
        return "fp16", f"compute capability {major}.{minor} has fp16 tensor cores but none for bf16"
    if device.type == "mps":
        return "no", "Apple GPUs before the M3 emulate bf16; ask for it with --mixed_precision bf16"
    fp32, bf16 = (matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    measured = f"measured here, bf16 matmuls run at {bf16 / 1e9:.0f} GFLOP/s against {fp32 / 1e9:.0f} in fp32"
    return ("bf16" if bf16 >= WORTHWHILE * fp32 else "no"), measured
