"""Every op against its peers: the same tensors, one process, the peers taking turns, the error beside the time.

    python benchmarks/ops.py                                  # all ops, small shapes, CPU
    python benchmarks/ops.py --device cuda --csv ops.csv
    python benchmarks/ops.py --op linear_cross_entropy --op eigen_scan

Times are milliseconds of forward and backward together. The error is max |result - gold| / max |gold|, the largest over
the output and every gradient, gold being the op's reference in float64. A wrong result gets no time.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels

MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SECONDS_PER_OP = 8
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass
class Case:
    """`gold` and `peers` map the inputs to one output, which the harness differentiates; `unchecked` just run."""

    shape: str
    inputs: list[Tensor]
    gold: Callable[..., Tensor]
    peers: dict[str, Callable[..., Tensor]]
    unchecked: dict[str, Callable[[], object]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peer: why


# --------------------------------------------------------------------------------------------------------------- cases


def linear_cross_entropy(device: str) -> Case:
    N, D, V = (4096, 1024, 50304) if device == "cuda" else (1024, 512, 16384)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(dtype)
    target = torch.randint(V, (N,), device=device)
    hidden = 4 * weight[target] + torch.randn(N, D, device=device).to(dtype)  # a softmax with a peak, as in training

    def matmuls() -> None:
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden

    case = Case(
        f"N {N}, D {D}, V {V}",
        [hidden, weight],
        lambda h, w: kernels.linear_cross_entropy_reference(h, w, target).loss,
        {
            "full logits": lambda h, w: F.cross_entropy(F.linear(h, w).float(), target),
            "tenfold": lambda h, w: kernels.linear_cross_entropy(h, w, target).loss,
        },
        unchecked={"ceiling: the three matmuls alone": matmuls},
    )
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        case.peers["F.linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, target, options=chunked)
    else:
        case.missing["F.linear_cross_entropy"] = f"torch {torch.__version__} does not have it"
    return case


def masked_cross_entropy(device: str) -> Case:
    N, C = (49152, 900) if device == "cuda" else (8192, 900)
    logits = torch.randn(N, C, device=device)
    target = torch.randint(C, (N,), device=device)
    valid = (torch.rand(N, C, device=device) < 0.5).scatter(1, target.unsqueeze(1), True)

    def recipe(x: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(x.masked_fill(~valid, -1e4), target, label_smoothing=label_smoothing)

    leaf = logits.clone().requires_grad_()
    return Case(
        f"N {N}, C {C}, label smoothing 0.1",
        [logits],
        lambda x: kernels.masked_cross_entropy_reference(x, valid, target, label_smoothing=0.1),
        {
            "masked_fill(-1e4)": lambda x: recipe(x, 0.1),
            "tenfold": lambda x: kernels.masked_cross_entropy(x, valid, target, label_smoothing=0.1),
        },
        unchecked={"masked_fill(-1e4), no smoothing": lambda: torch.autograd.grad(recipe(leaf, 0.0), leaf)},
    )


def neighbor_cross_entropy(device: str) -> Case:
    R, D, V, J = (65536, 256, 900, 4) if device == "cuda" else (8192, 256, 900, 4)
    candidates = torch.rand(R, V, device=device).topk(J, dim=1).indices
    slot = torch.randint(J, (R, 1), device=device)
    target = torch.zeros_like(candidates, dtype=torch.bool).scatter(1, slot, True)
    label = candidates.gather(1, slot).squeeze(1)
    valid = torch.zeros(R, V, dtype=torch.bool, device=device).scatter(1, candidates, True)
    return Case(
        f"R {R}, D {D}, V {V}, J {J}",
        [torch.randn(R, D, device=device), torch.randn(V, D, device=device) * D**-0.5, torch.zeros(V, device=device)],
        lambda h, w, b: kernels.neighbor_cross_entropy_reference(h, w, b, candidates, target).loss,
        {
            "full logits": lambda h, w, b: F.cross_entropy(F.linear(h, w, b).masked_fill(~valid, -1e4), label),
            "tenfold": lambda h, w, b: kernels.neighbor_cross_entropy(h, w, b, candidates, target).loss,
        },
    )


def eigen_scan(device: str) -> Case:
    B, T, K = (8, 2048, 1024) if device == "cuda" else (8, 2048, 128)

    def fft(beta: Tensor, log_rho: Tensor, omega: Tensor) -> Tensor:
        powers = torch.exp(torch.arange(T, device=device).unsqueeze(1) * torch.complex(log_rho, omega))
        signal = torch.complex(*(half.contiguous() for half in beta.chunk(2, dim=-1)))
        product = torch.fft.fft(signal, 2 * T, dim=1) * torch.fft.fft(powers, 2 * T, dim=0)
        state = torch.fft.ifft(product, dim=1)[:, :T]
        return torch.cat([state.real, state.imag], dim=-1)

    log_rho, omega = -0.2 * torch.rand(K, device=device) - 1e-3, math.pi * torch.rand(K, device=device)
    return Case(
        f"B {B}, T {T}, K {K}",
        [torch.randn(B, T, 2 * K, device=device), log_rho, omega],
        lambda *x: kernels.eigen_scan_reference(*x).states,
        {
            "FFT": fft,
            "loop over positions": lambda *x: kernels.eigen_scan_reference(*x).states,
            "tenfold": lambda *x: kernels.eigen_scan(*x).states,
        },
    )


def multiscale_pool(device: str) -> Case:
    B, T, D = (8, 2048, 1024) if device == "cuda" else (8, 512, 256)
    scales = (1, 2, 4, 8)

    def interpolate(x: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for scale, weight in zip(scales, weights, strict=True):
            held = F.interpolate(F.avg_pool1d(x.transpose(1, 2), scale), scale_factor=scale)
            y = y + weight * F.pad(held, (scale - 1, 0))[..., :T].transpose(1, 2)  # a block shows once it is complete
        return y

    return Case(
        f"B {B}, T {T}, D {D}, scales {scales}, hold",
        [torch.randn(B, T, D, device=device), torch.rand(len(scales), device=device)],
        lambda x, w: kernels.multiscale_pool_reference(x, scales, weights=w, mode="hold"),
        {
            "pool, interpolate, shift": interpolate,
            "tenfold": lambda x, w: kernels.multiscale_pool(x, scales, weights=w, mode="hold"),
        },
    )


CASES = {
    case.__name__: case
    for case in (linear_cross_entropy, masked_cross_entropy, neighbor_cross_entropy, eigen_scan, multiscale_pool)
}


# -------------------------------------------------------------------------------------------------------- measurement


def differentiate(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """The output and the gradients of all inputs, given the gradient of the output (None: of a 0-d loss, 1)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def measure(case: Case, device: str) -> list[dict[str, str]]:
    """A row for each peer. Its first run, the one whose result is checked, is its warm-up too."""
    with torch.no_grad():
        output = case.gold(*case.inputs)
    upstream = torch.randn_like(output) if output.dim() else None
    gold = differentiate(case.gold, [x.double() for x in case.inputs], None if upstream is None else upstream.double())
    errors, running = {}, dict(case.unchecked)
    for name, peer in case.peers.items():
        results = differentiate(peer, case.inputs, upstream)
        errors[name] = max(((r - g).abs().max() / g.abs().max()).item() for r, g in zip(results, gold, strict=True))
        if errors[name] <= MAX_ERROR[case.inputs[0].dtype]:
            running[name] = lambda peer=peer: differentiate(peer, case.inputs, upstream)

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in running}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > SECONDS_PER_OP:
            break
        for name, run in running.items():
            synchronize()
            begin = time.perf_counter()
            run()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - begin))

    table = []
    for name in (*case.peers, *case.unchecked, *case.missing):
        row = {"peer": name, "median_ms": "-", "p20_ms": "-", "p80_ms": "-", "error": "-", "runs": "0", "note": ""}
        if name in errors:
            row["error"] = f"{errors[name]:.1e}"
        if name in running:
            fifths = statistics.quantiles(times[name], n=5, method="inclusive")
            values = {"median_ms": statistics.median(times[name]), "p20_ms": fifths[0], "p80_ms": fifths[3]}
            row |= {key: f"{value:.2f}" for key, value in values.items()} | {"runs": str(len(times[name]))}
        else:
            row["note"] = f"n/a: {case.missing[name]}" if name in case.missing else "wrong result, not timed"
        table.append(row)
    return table


def machine(device: str) -> dict[str, str]:
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    command, threads = shlex.join(["python", *sys.argv]), str(torch.get_num_threads())
    return {"machine": name, "torch": torch.__version__, "threads": threads, "commit": commit, "command": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=CASES, help="may be repeated; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    facts = machine(arguments.device)
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()), "\n")

    table = []
    for op in arguments.op or CASES:
        torch.manual_seed(0)
        case = CASES[op](arguments.device)
        about = {"op": op, "shape": case.shape, "dtype": str(case.inputs[0].dtype).removeprefix("torch.")}
        for row in measure(case, arguments.device):
            row = about | row
            if not table:
                print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print("| " + " | ".join(row.values()) + " |", flush=True)
            table.append(row | facts)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
