"""Every op against its peers: the same tensors, one process, the peers taking turns, the error beside the time.

    python benchmarks/ops.py                                  # all ops, small shapes, CPU
    python benchmarks/ops.py --device cuda --csv ops.csv
    python benchmarks/ops.py --op linear_cross_entropy --op eigen_scan

Times are of forward and backward together, in milliseconds. The error is max |result - gold| / max |gold| over the loss or
output and every gradient, gold being the op's reference in float64. A peer whose error is too large gets no time.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels

MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SECONDS_PER_OP = 12
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass
class Peer:
    """`run` returns what is compared with gold; None for a ceiling, which computes no result, and for a missing peer."""

    name: str
    run: Callable[[], tuple[Tensor, ...] | None]
    missing: str = ""
    times: list[float] = field(default_factory=list)
    error: float | None = None


@dataclass
class Case:
    op: str
    shape: str
    dtype: torch.dtype
    gold: tuple[Tensor, ...]
    peers: list[Peer]


def gradients(output: Tensor, inputs: list[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return output.detach(), *torch.autograd.grad(output, inputs, upstream)


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


# --------------------------------------------------------------------------------------------------------------- cases


def linear_cross_entropy(device: str) -> Case:
    rows, d_model, classes = (4096, 1024, 50304) if device == "cuda" else (1024, 512, 16384)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = (torch.randn(classes, d_model, device=device) * d_model**-0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    noise = torch.randn(rows, d_model, device=device).to(dtype)
    hidden = (4 * weight.detach()[target] + noise).requires_grad_()  # a softmax with a peak, as in training
    inputs = [hidden, weight]

    def ceiling() -> None:
        with torch.no_grad():
            logits = hidden @ weight.T
            logits @ weight
            logits.T @ hidden

    def chunked() -> tuple[Tensor, ...]:
        options = torch.nn.LinearCrossEntropyOptions()
        return gradients(F.linear_cross_entropy(hidden, weight, target, options=options), inputs)

    gold_inputs = doubled(*inputs)
    return Case(
        "linear_cross_entropy",
        f"N {rows}, D {d_model}, V {classes}",
        dtype,
        gradients(kernels.linear_cross_entropy_reference(*gold_inputs, target).loss, gold_inputs),
        [
            Peer("full logits", lambda: gradients(F.cross_entropy(F.linear(hidden, weight).float(), target), inputs)),
            Peer(
                "F.linear_cross_entropy",
                chunked,
                missing="" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none",
            ),
            Peer("tenfold", lambda: gradients(kernels.linear_cross_entropy(hidden, weight, target).loss, inputs)),
            Peer("ceiling: the three matmuls alone", ceiling),
        ],
    )


def masked_cross_entropy(device: str) -> Case:
    rows, classes = (49152, 900) if device == "cuda" else (8192, 900)
    logits = torch.randn(rows, classes, device=device, requires_grad=True)
    target = torch.randint(classes, (rows,), device=device)
    valid = (torch.rand(rows, classes, device=device) < 0.5).scatter(1, target.unsqueeze(1), True)

    def recipe(label_smoothing: float) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(logits.masked_fill(~valid, -1e4), target, label_smoothing=label_smoothing)
        return gradients(loss, [logits])

    def ours() -> tuple[Tensor, ...]:
        return gradients(kernels.masked_cross_entropy(logits, valid, target, label_smoothing=0.1), [logits])

    gold_logits = doubled(logits)
    gold = kernels.masked_cross_entropy_reference(*gold_logits, valid, target, label_smoothing=0.1)
    return Case(
        "masked_cross_entropy",
        f"N {rows}, C {classes}, label smoothing 0.1",
        torch.float32,
        gradients(gold, gold_logits),
        [
            Peer("masked_fill(-1e4), F.cross_entropy", lambda: recipe(0.1)),
            Peer("the same without smoothing, speed only", lambda: recipe(0.0) and None),
            Peer("tenfold", ours),
        ],
    )


def neighbor_cross_entropy(device: str) -> Case:
    rows, d_model, classes = (262144, 256, 900) if device == "cuda" else (8192, 256, 900)
    hidden = torch.randn(rows, d_model, device=device, requires_grad=True)
    weight = (torch.randn(classes, d_model, device=device) * d_model**-0.5).requires_grad_()
    bias = torch.zeros(classes, device=device, requires_grad=True)
    candidates = torch.rand(rows, classes, device=device).topk(4, dim=1).indices
    slot = torch.randint(4, (rows, 1), device=device)
    target = torch.zeros_like(candidates, dtype=torch.bool).scatter(1, slot, True)
    label, inputs = candidates.gather(1, slot).squeeze(1), [hidden, weight, bias]
    valid = torch.zeros(rows, classes, dtype=torch.bool, device=device).scatter(1, candidates, True)

    def full_logits() -> tuple[Tensor, ...]:
        logits = F.linear(hidden, weight, bias).masked_fill(~valid, -1e4)
        return gradients(F.cross_entropy(logits, label), inputs)

    gold_inputs = doubled(*inputs)
    return Case(
        "neighbor_cross_entropy",
        f"R {rows}, D {d_model}, V {classes}, J 4",
        torch.float32,
        gradients(kernels.neighbor_cross_entropy_reference(*gold_inputs, candidates, target).loss, gold_inputs),
        [
            Peer("full logits, masked_fill(-1e4)", full_logits),
            Peer(
                "tenfold", lambda: gradients(kernels.neighbor_cross_entropy(*inputs, candidates, target).loss, inputs)
            ),
        ],
    )


def eigen_scan(device: str) -> Case:
    batch, length, states = (16, 4096, 1024) if device == "cuda" else (4, 512, 64)
    beta = torch.randn(batch, length, 2 * states, device=device, requires_grad=True)
    log_rho = (-torch.rand(states, device=device) * 0.2 - 1e-3).requires_grad_()
    omega = (torch.rand(states, device=device) * math.pi).requires_grad_()
    inputs, upstream = [beta, log_rho, omega], torch.randn(batch, length, 2 * states, device=device)

    def fft() -> tuple[Tensor, ...]:
        position = torch.arange(length, device=device).unsqueeze(1)
        powers = torch.exp(position * torch.complex(log_rho, omega))
        signal = torch.complex(*beta.chunk(2, dim=-1))
        product = torch.fft.fft(signal, 2 * length, dim=1) * torch.fft.fft(powers, 2 * length, dim=0)
        state = torch.fft.ifft(product, dim=1)[:, :length]
        return gradients(torch.cat([state.real, state.imag], dim=-1), inputs, upstream)

    gold_inputs = doubled(*inputs)
    return Case(
        "eigen_scan",
        f"B {batch}, T {length}, K {states}",
        torch.float32,
        gradients(kernels.eigen_scan_reference(*gold_inputs).states, gold_inputs, upstream.double()),
        [
            Peer("FFT", fft),
            Peer(
                "loop over positions", lambda: gradients(kernels.eigen_scan_reference(*inputs).states, inputs, upstream)
            ),
            Peer("tenfold", lambda: gradients(kernels.eigen_scan(*inputs).states, inputs, upstream)),
        ],
    )


def multiscale_pool(device: str) -> Case:
    batch, length, d_model = (16, 4096, 1024) if device == "cuda" else (8, 512, 256)
    scales = (1, 2, 4, 8)
    x = torch.randn(batch, length, d_model, device=device, requires_grad=True)
    weights = torch.rand(len(scales), device=device, requires_grad=True)
    inputs, upstream = [x, weights], torch.randn(batch, length, d_model, device=device)

    def interpolate() -> tuple[Tensor, ...]:
        y = torch.zeros_like(x)
        for scale, weight in zip(scales, weights, strict=True):
            blocks = F.avg_pool1d(x.transpose(1, 2), scale)
            held = F.interpolate(blocks, scale_factor=scale, mode="nearest")
            y = y + weight * F.pad(held, (scale - 1, 0))[..., :length].transpose(1, 2)  # shown once it is complete
        return gradients(y, inputs, upstream)

    def ours() -> tuple[Tensor, ...]:
        return gradients(kernels.multiscale_pool(x, scales, weights=weights, mode="hold"), inputs, upstream)

    gold_inputs = doubled(*inputs)
    gold = kernels.multiscale_pool_reference(gold_inputs[0], scales, weights=gold_inputs[1], mode="hold")
    return Case(
        "multiscale_pool",
        f"B {batch}, T {length}, D {d_model}, scales {scales}, hold",
        torch.float32,
        gradients(gold, gold_inputs, upstream.double()),
        [Peer("pool, interpolate, shift", interpolate), Peer("tenfold", ours)],
    )


CASES = {
    case.__name__: case
    for case in (linear_cross_entropy, masked_cross_entropy, neighbor_cross_entropy, eigen_scan, multiscale_pool)
}


# -------------------------------------------------------------------------------------------------------- measurement


def max_error(result: tuple[Tensor, ...], gold: tuple[Tensor, ...]) -> float:
    errors = [(r - g).abs().max() / g.abs().max() for r, g in zip(result, gold, strict=True)]
    return torch.stack(errors).max().item()


def measure(case: Case, device: str) -> None:
    """Fill in error and times. The first run of each peer, the one that is checked, is its warm-up too."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    running = [peer for peer in case.peers if not peer.missing]
    for peer in running:
        result = peer.run()
        if result is not None:
            peer.error = max_error(result, case.gold)
    running = [peer for peer in running if peer.error is None or peer.error <= MAX_ERROR[case.dtype]]
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > SECONDS_PER_OP:
            break
        for peer in running:
            synchronize()
            begin = time.perf_counter()
            peer.run()
            synchronize()
            peer.times.append(1e3 * (time.perf_counter() - begin))


def rows(case: Case) -> Iterator[dict[str, str]]:
    for peer in case.peers:
        row = {"op": case.op, "peer": peer.name, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
        row |= dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), "-")
        row["error"] = "-" if peer.error is None else f"{peer.error:.1e}"
        row["runs"], row["note"] = str(len(peer.times)), peer.missing and f"n/a: {peer.missing}"
        if peer.times:
            fifths = statistics.quantiles(peer.times, n=5, method="inclusive")
            times = statistics.median(peer.times), fifths[0], fifths[3]
            row |= {key: f"{value:.2f}" for key, value in zip(("median_ms", "p20_ms", "p80_ms"), times, strict=True)}
        elif not peer.missing:
            row["note"] = "wrong result, not timed"
        yield row


def machine(device: str) -> dict[str, str]:
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = models[0] if models else name
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": name,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "commit": commit or "unknown",
        "command": shlex.join(["python", *sys.argv]),
    }


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
        measure(case, arguments.device)
        for row in rows(case):
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
