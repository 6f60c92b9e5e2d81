"""What benchmarks/ops.py measures: of each op the shapes, the inputs, the truth, the peers, and the work to be done.

The truth ("gold") is the op's reference on the same inputs in float64, its output and gradients, nowhere sampled: the
head's adds up over chunks of rows, for all its logits would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import ops_peers as peers
from benchmarks.ops_peers import Function, Gold, Peer

ENERGY_WEIGHT = 0.02
MAX_LOOP = 4096  # positions that a loop in Python is timed at
GOLD_LOGITS = 1 << 27  # of a chunk: 1 GiB in float64, and backward holds a few of it
BF16, FP32 = torch.bfloat16, torch.float32

Inputs = tuple[list[Tensor], list[Tensor]]  # leaves, which are differentiated, and fixed ones


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    output: tuple[int, ...]  # its shape; () is a loss, whose gradient is 1
    gold: Gold
    peers: dict[str, Peer]
    work: dict[str, tuple[float, float]]  # mode: (FLOPs, bytes) that any algorithm needs, of modes that have a bound
    captured: bool = True  # short on a GPU: timed as a CUDA graph over several sets of inputs, lest they stay in L2

    def label(self) -> dict[str, str]:
        return {"op": self.op, "shape": self.shape, "dtype": str(self.dtype).removeprefix("torch.")}


def differentiate(
    function: Function, leaves: list[Tensor], fixed: list[Tensor], upstream: Tensor | None
) -> list[Tensor]:
    """The output and the gradients of all leaves, given the gradient of the output (None: of a 0-d loss, 1)."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = function(*leaves, *fixed)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def by_autograd(function: Function) -> Gold:
    return lambda leaves, fixed, upstream: differentiate(function, leaves, fixed, upstream)


def elementwise(forward: float, backward: float) -> dict[str, tuple[float, float]]:
    """The work of an op that is bound by the bytes that its forward and its backward must move."""
    bounds = {"no grad": forward, "forward": forward, "backward": backward, "full": forward + backward}
    return {mode: (0.0, moved) for mode, moved in bounds.items()}


# ------------------------------------------------------------------------------------------------- linear_cross_entropy


def head_gold(label_smoothing: float) -> Gold:
    def gold(leaves: list[Tensor], fixed: list[Tensor], upstream: Tensor | None) -> list[Tensor]:
        hidden, weight, *energy = leaves
        (target,) = fixed
        count = (target != -100).sum()
        loss, d_hidden, d_weight = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        rows = max(1, GOLD_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)

            def part(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
                options = {"label_smoothing": label_smoothing, "num_items": count}
                return kernels.linear_cross_entropy_reference(h, w, y, **options).loss

            value, d_hidden[chunk], d_part = differentiate(part, [hidden[chunk], weight], [target[chunk]], None)
            loss += value
            d_weight += d_part
        for e in energy:
            loss += ENERGY_WEIGHT * e
        return [loss, d_hidden, d_weight, *(torch.full_like(e, ENERGY_WEIGHT) for e in energy)]

    return gold


def linear_cross_entropy(
    device: str, N: int, D: int, V: int, dtype: torch.dtype = BF16, smoothing: float = 0.0, ignored: float = 0.0
) -> Case:
    """With smoothing comes an energy too, a leaf of its own, which peers add outside."""

    def make() -> Inputs:
        weight = (torch.randn(V, D, device=device) * D**-0.5).to(dtype)
        target = torch.randint(V, (N,), device=device)
        hidden = 4 * weight[target] + torch.randn(N, D, device=device).to(
            dtype
        )  # a softmax with a peak, as in training
        target.masked_fill_(torch.rand(N, device=device) < ignored, -100)
        return [hidden, weight, *([torch.rand((), device=device)] if smoothing else [])], [target]

    def run(h: Tensor, w: Tensor, *rest: Tensor, lean: bool = False) -> Tensor:
        *energy, y = rest
        options = {"energy": energy[0], "energy_weight": ENERGY_WEIGHT} if energy else {}
        return kernels.linear_cross_entropy(h, w, y, label_smoothing=smoothing, lean=lean, **options).loss

    def beside_energy(peer: Peer) -> Peer:
        return replace(peer, run=lambda h, w, e, y: peer.run(h, w, y) + ENERGY_WEIGHT * e)

    def matmuls(h: Tensor, w: Tensor, *rest: Tensor) -> None:
        logits = h @ w.T
        logits @ w
        logits.T @ h

    others = peers.head_peers(smoothing, device, head_gold(0.0))
    options = (f", label smoothing {smoothing}, energy" if smoothing else "") + (
        f", {ignored:.0%} ignored" if ignored else ""
    )
    return Case(
        "linear_cross_entropy",
        f"N {N}, D {D}, V {V}{options}",
        dtype,
        make,
        (),
        head_gold(smoothing),
        {name: beside_energy(peer) if smoothing else peer for name, peer in others.items()}
        | peers.ours(run)
        | peers.ours_lean(partial(run, lean=True), device)
        | {"ceiling: the three matmuls": Peer(matmuls, checked=False)},
        {
            "no grad": (2.0 * N * D * V, 0),
            "full": (6.0 * N * D * V, 0),
        },  # where its backward is taken is a peer's choice
        captured=False,
    )


# ------------------------------------------------------------------------------------------------- masked_cross_entropy


def masked_recipe(x: Tensor, valid: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(x.float().masked_fill(~valid, -1e4), y, label_smoothing=label_smoothing)


def masked_exactly(x: Tensor, valid: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """The smoothing mass on valid classes alone, which F.cross_entropy cannot."""
    log_probs = torch.log_softmax(x.float().masked_fill(~valid, -math.inf), dim=-1)
    hit = log_probs.gather(1, y.unsqueeze(1)).squeeze(1)
    smooth = log_probs.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)
    return -((1 - label_smoothing) * hit + label_smoothing * smooth).mean()


def masked_cross_entropy(device: str, N: int, C: int, dtype: torch.dtype = BF16, smoothing: float = 0.0) -> Case:
    def make() -> Inputs:
        target = torch.randint(C, (N,), device=device)
        valid = (torch.rand(N, C, device=device) < 0.5).scatter(1, target.unsqueeze(1), True)
        return [torch.randn(N, C, device=device).to(dtype)], [valid, target]

    def gold(label_smoothing: float) -> Gold:
        return by_autograd(lambda *x: kernels.masked_cross_entropy_reference(*x, label_smoothing=label_smoothing))

    table = peers.eager_and_compiled(lambda *x: masked_exactly(*x, smoothing))
    table["masked_fill(-1e4)"] = Peer(lambda *x: masked_recipe(*x, smoothing))
    unsmoothed = {
        "Liger after masked_fill": Peer(lambda x, m, y: peers.liger_loss(x.masked_fill(~m, -1e4), y), "liger_kernel"),
        "quack after masked_fill": Peer(lambda x, m, y: peers.quack_loss(x.masked_fill(~m, -1e4), y), "quack"),
    }
    if smoothing:
        unsmoothed["masked_fill(-1e4), no smoothing"] = Peer(masked_recipe)
        easier = {"gold": gold(0.0), "note": "no smoothing over valid classes alone: an easier loss"}
        unsmoothed = {name: replace(peer, **easier) for name, peer in unsmoothed.items()}
    read = N * C * (dtype.itemsize + 1) + N * 8
    return Case(
        "masked_cross_entropy",
        f"N {N}, C {C}" + (f", label smoothing {smoothing}" if smoothing else ""),
        dtype,
        make,
        (),
        gold(smoothing),
        table | unsmoothed | peers.ours(lambda *x: kernels.masked_cross_entropy(*x, label_smoothing=smoothing)),
        elementwise(read + N * 8, read + N * C * dtype.itemsize + N * 4),
    )


# ----------------------------------------------------------------------------------------------- neighbor_cross_entropy


def neighbor_cross_entropy(device: str, R: int, D: int, V: int, J: int, dtype: torch.dtype = BF16) -> Case:
    def make() -> Inputs:
        candidates = torch.rand(R, V, device=device).topk(J, dim=1).indices
        slot = torch.randint(J, (R, 1), device=device)
        is_target = torch.zeros_like(candidates, dtype=torch.bool).scatter(1, slot, True)
        valid = torch.zeros(R, V, dtype=torch.bool, device=device).scatter(1, candidates, True)
        shapes = ((R, D, 1.0), (V, D, D**-0.5))
        hidden, weight = ((torch.randn(n, d, device=device) * scale).to(dtype) for n, d, scale in shapes)
        bias = torch.zeros(V, dtype=dtype, device=device)
        return [hidden, weight, bias], [candidates, is_target, valid, candidates.gather(1, slot).squeeze(1)]

    def full(
        h: Tensor, w: Tensor, b: Tensor, candidates: Tensor, is_target: Tensor, valid: Tensor, y: Tensor
    ) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b).float().masked_fill(~valid, -1e4), y)

    def gather(h: Tensor, w: Tensor, b: Tensor, candidates: Tensor, is_target: Tensor, *rest: Tensor) -> Tensor:
        scores = torch.einsum("rd,rjd->rj", h, w[candidates]) + b[candidates]
        return F.cross_entropy(scores.float(), is_target.int().argmax(1))

    table = peers.eager_and_compiled(gather)
    table |= {f"full logits, {name}": peer for name, peer in peers.eager_and_compiled(full).items()}
    hidden, head, rows = R * D * dtype.itemsize, V * (D + 1) * dtype.itemsize, R * J * 9
    return Case(
        "neighbor_cross_entropy",
        f"R {R}, D {D}, V {V}, J {J}",
        dtype,
        make,
        (),
        by_autograd(lambda *x: kernels.neighbor_cross_entropy_reference(*x[:5]).loss),
        table | peers.ours(lambda *x: kernels.neighbor_cross_entropy(*x[:5]).loss),
        elementwise(hidden + head + rows, 2 * (hidden + head) + rows),
    )


# ----------------------------------------------------------------------------------------------------------- eigen_scan


def real_scan(beta: Tensor, log_rho: Tensor, omega: Tensor) -> Tensor:
    signal = beta.chunk(2, dim=-1)[0]
    real = torch.cat([signal, torch.zeros_like(signal)], dim=-1)
    return kernels.eigen_scan_reference(real, log_rho, 0 * omega).states


def eigen_scan(device: str, B: int, T: int, K: int, dtype: torch.dtype = BF16, per_position: bool = False) -> Case:
    def make() -> Inputs:
        decay = (B, T, K) if per_position else (K,)
        log_rho, omega = -0.2 * torch.rand(decay, device=device) - 1e-3, math.pi * torch.rand(decay, device=device)
        return [torch.randn(B, T, 2 * K, device=device).to(dtype), log_rho, omega], []

    def reference(*x: Tensor) -> Tensor:
        return kernels.eigen_scan_reference(*x).states

    fft = peers.eager_and_compiled(peers.fft_scan)
    table = {
        name.replace("torch eager", "FFT").replace("torch.compile", "FFT, torch.compile"): p for name, p in fft.items()
    }
    if per_position:
        table = {name: replace(p, missing="a convolution has one decay for all positions") for name, p in table.items()}
    too_long = f"{T} positions, some 20 launches each: minutes" if T > MAX_LOOP else None
    table["loop over positions"] = Peer(reference, captured=False, missing=too_long)
    state, decay = 2 * B * T * K * dtype.itemsize, 2 * B * T * K * 4 * per_position
    return Case(
        "eigen_scan",
        f"B {B}, T {T}, K {K}" + (", decay per position" if per_position else ""),
        dtype,
        make,
        (B, T, 2 * K),
        by_autograd(reference),
        table | peers.scan_peers(by_autograd(real_scan)) | peers.ours(lambda *x: kernels.eigen_scan(*x).states),
        elementwise(2 * state + decay, 3 * state + 2 * decay),
    )


# ------------------------------------------------------------------------------------------------------ multiscale_pool


def multiscale_pool(
    device: str,
    B: int,
    T: int,
    D: int,
    mode: str = "hold",
    scales: tuple[int, ...] = (1, 2, 4, 8),
    dtype: torch.dtype = BF16,
) -> Case:
    def make() -> Inputs:
        return [torch.randn(B, T, D, device=device).to(dtype), torch.rand(len(scales), device=device)], []

    recipe = peers.pooled_and_held if mode == "hold" else peers.padded_and_pooled
    table = peers.eager_and_compiled(lambda x, w: recipe(x, w, scales))
    table["FLA mean_pooling"] = Peer(
        lambda x, w: peers.fla_pooled_and_held(x, w, scales),
        "fla",
        missing=None if mode == "hold" else "it pools blocks, not windows",
    )
    moved = B * T * D * dtype.itemsize
    return Case(
        "multiscale_pool",
        f"B {B}, T {T}, D {D}, scales {' '.join(map(str, scales))}, {mode}",
        dtype,
        make,
        (B, T, D),
        by_autograd(lambda x, w: kernels.multiscale_pool_reference(x, scales, weights=w, mode=mode)),
        table | peers.ours(lambda x, w: kernels.multiscale_pool(x, scales, weights=w, mode=mode)),
        elementwise(2 * moved, 3 * moved),
    )


OPS = {
    op.__name__: op
    for op in (linear_cross_entropy, eigen_scan, masked_cross_entropy, neighbor_cross_entropy, multiscale_pool)
}

# The first of each are the ones with an aim. Heads of Llama 3 8B, Gemma 2 2B and of small models.
SHAPES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "cuda": {
        "linear_cross_entropy": [
            {"N": 4096, "D": 4096, "V": 128256},
            {"N": 8192, "D": 2304, "V": 256000},
            {"N": 32768, "D": 512, "V": 50304, "smoothing": 0.1, "ignored": 0.3},
            {"N": 32768, "D": 512, "V": 50304},
            {"N": 2048, "D": 4096, "V": 128256},
            {"N": 16384, "D": 768, "V": 50304},
            {"N": 8192, "D": 1024, "V": 32000},
            {"N": 65536, "D": 2048, "V": 32000},
        ],
        "eigen_scan": [
            {"B": 16, "T": 4096, "K": 1024},
            {"B": 16, "T": 4096, "K": 1024, "dtype": FP32},
            {"B": 4, "T": 32768, "K": 256},
            {"B": 8, "T": 2048, "K": 1024},
            {"B": 8, "T": 2048, "K": 1024, "per_position": True},
            {"B": 1, "T": 65536, "K": 1024, "dtype": FP32},
        ],
        "masked_cross_entropy": [
            {"N": 49152, "C": 900},
            {"N": 49152, "C": 900, "smoothing": 0.1},
            {"N": 262144, "C": 4},
            {"N": 49152, "C": 144, "smoothing": 0.1},
            {"N": 262144, "C": 64},
            {"N": 8192, "C": 4096},
        ],
        "neighbor_cross_entropy": [
            {"R": 49152, "D": 128, "V": 900, "J": 4},
            {"R": 49152, "D": 256, "V": 900, "J": 4},
            {"R": 49152, "D": 256, "V": 900, "J": 24},
        ],
        "multiscale_pool": [
            {"B": 16, "T": 4096, "D": 1024},
            {"B": 16, "T": 4096, "D": 1024, "mode": "trailing"},
            {"B": 8, "T": 8192, "D": 2048, "scales": (1, 2, 4, 8, 16)},
            {"B": 8, "T": 2048, "D": 1024, "dtype": FP32},
        ],
    },
    "cpu": {
        "linear_cross_entropy": [
            {"N": 2048, "D": 512, "V": 50304, "dtype": FP32, "smoothing": 0.1},
            {"N": 2048, "D": 512, "V": 50304, "smoothing": 0.1},
            {"N": 8192, "D": 512, "V": 50304, "dtype": FP32, "smoothing": 0.1},
            {"N": 8192, "D": 512, "V": 50304, "smoothing": 0.1},
        ],
        "eigen_scan": [
            {"B": 8, "T": 2048, "K": 128, "dtype": FP32},
            {"B": 8, "T": 2048, "K": 128, "dtype": FP32, "per_position": True},
        ],
        "masked_cross_entropy": [
            {"N": 49152, "C": 900, "dtype": FP32, "smoothing": 0.1},
            {"N": 49152, "C": 900, "dtype": FP32},
        ],
        "neighbor_cross_entropy": [{"R": 8192, "D": 256, "V": 900, "J": 4, "dtype": FP32}],
        "multiscale_pool": [
            {"B": 8, "T": 512, "D": 256, "dtype": FP32},
            {"B": 8, "T": 512, "D": 256, "mode": "trailing", "dtype": FP32},
        ],
    },
    "tiny": {
        "linear_cross_entropy": [
            {"N": 48, "D": 16, "V": 131, "dtype": FP32},
            {"N": 48, "D": 16, "V": 131, "dtype": FP32, "smoothing": 0.1, "ignored": 0.3},
        ],
        "eigen_scan": [{"B": 2, "T": 17, "K": 3, "dtype": FP32}],
        "masked_cross_entropy": [{"N": 65, "C": 9, "dtype": FP32, "smoothing": 0.1}],
        "neighbor_cross_entropy": [{"R": 33, "D": 8, "V": 25, "J": 4, "dtype": FP32}],
        "multiscale_pool": [{"B": 2, "T": 19, "D": 6, "mode": mode, "dtype": FP32} for mode in ("hold", "trailing")],
    },
}


def cases(op: str, device: str, tiny: bool = False) -> list[Case]:
    """What is measured of `op`, in order of value. Nothing is allocated yet."""
    return [OPS[op](device, **shape) for shape in SHAPES["tiny" if tiny else device][op]]
