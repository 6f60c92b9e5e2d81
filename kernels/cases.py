"""The calls of the Triton launchers that are proven without a GPU: compiled for every card, and audited for traffic.

A function for each op, of a device and a floating dtype. On "meta" it gives the shapes of real runs, which
`kernels.aot` records and compiles; on "cpu" shapes that the interpreter gets through, for `kernels.traffic`. A case's
`minimum` names, kernel by kernel, the bytes that the chosen algorithm has to move: each input read and each output
written as often as the algorithm says, and not once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.chunked_head import padded_classes
from kernels.gpu import eigen_scan as scan
from kernels.gpu import lean_head as lean
from kernels.gpu import masked_cross_entropy as masked
from kernels.gpu import multiscale_pool as pool
from kernels.gpu import neighbor_cross_entropy as neighbor
from kernels.gpu.linear_cross_entropy import chunked_loss, fused_loss, loss_and_gradients


class Case(NamedTuple):
    config: str  # what is special about it, "" for the plain call
    run: Callable[[], object]  # calls launchers of kernels.gpu
    minimum: dict[str, int]  # kernel name: bytes


def floats(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype) if device == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def integers(device: str, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape) if device == "cpu" else torch.empty(shape, dtype=torch.int64, device=device)


def bits(device: str, *shape: int) -> Tensor:
    return torch.rand(shape) < 0.5 if device == "cpu" else torch.empty(shape, dtype=torch.bool, device=device)


def linear_cross_entropy(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """A row's logits, padding included, are read, read again for the gradient and written over."""
    real, size = device == "meta", dtype.itemsize
    rows, width = (4096, 768) if real else (16, 8)
    for config, classes, smoothing, z_weight, softcap in (
        ("", 50304 if real else 4992, 0.0, 0.0, None),
        ("everything, odd V", 50257 if real else 5003, 0.1, 1e-4, 30.0),
        ("small V", 300, 0.1, 0.0, None),
    ):
        inputs = floats(device, dtype, rows, width), floats(device, dtype, classes, width)
        bias = None if softcap is None else floats(device, dtype, classes)
        target = integers(device, classes, rows)
        logits, each_row = rows * padded_classes(classes) * size, 8 + size + 4 + 4  # target, its logit, nll, lse^2
        bias_pass = 0 if bias is None else rows * classes * size  # one row a program
        bias_y = 0 if bias is None else rows * size
        yield Case(
            config,
            partial(loss_and_gradients, *inputs, bias, target, smoothing, z_weight, softcap, -100, [True, True, True]),
            {"linear_cross_entropy_bwd_kernel": 3 * logits + rows * each_row + 2 * bias_pass + bias_y},
        )
        yield Case(
            f"{config} loss only".strip(),
            partial(chunked_loss, *inputs, bias, target, smoothing, softcap, -100),
            {"linear_cross_entropy_bwd_kernel": logits + rows * each_row + bias_pass + bias_y},
        )
        options, sums = (smoothing, z_weight, softcap, -100), 8 if smoothing else 0
        yield Case(
            f"{config} lean".strip(),
            partial(_lean_there_and_back, *inputs, bias, target, options),
            {  # one tile; its rows' lse and, where labels are smoothed, their sums are read and written
                "linear_cross_entropy_lean_fwd_kernel": logits + rows * (each_row + 4 + sums) + bias_pass + bias_y,
                "linear_cross_entropy_lean_bwd_kernel": 2 * logits + rows * (8 + 4) + bias_pass,
            },
        )
    rows, width, classes = (4096, 768, 50257) if real else (64, 64, 128)
    tile = 32  # in fp32, which only the audit asks for: a model in fp32 goes through cuBLAS
    inputs = floats(device, dtype, rows, width), floats(device, dtype, classes, width)
    target = integers(device, classes, rows)
    hidden, weight = rows * width * size * (classes // tile), classes * width * size * (rows // tile)
    minimum = {"linear_cross_entropy_fwd_kernel": hidden + weight + rows * (classes // tile) * (8 + 3 * 4)}
    yield Case("no logits", partial(fused_loss, *inputs, None, target, 0.0, None, -100), minimum)
    if real:
        bias = floats(device, dtype, classes)
        run = partial(fused_loss, *inputs, bias, target, 0.1, 30.0, -100)
        yield Case("no logits, everything", run, minimum)


def _lean_there_and_back(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: tuple[float, float, float | None, int]
) -> None:
    total, _, _, lse = lean.loss(hidden, weight, bias, target, *options)
    lean.gradients(total, hidden, weight, bias, target, lse, *options, [True, True, True])


def masked_log_softmax(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """More than 1024 classes are read twice."""
    real, size = device == "meta", dtype.itemsize
    for classes, rows in ((4, 262144 if real else 96), (900, 49152 if real else 9), (2500, 8192 if real else 3)):
        x, grad = (floats(device, dtype, rows, classes) for _ in range(2))
        valid, passes = bits(device, rows, classes), 1 if classes <= 1024 else 2
        yield Case(
            f"C={classes}",
            partial(_there_and_back, masked.log_softmax, masked.log_softmax_backward, grad, x, valid),
            {
                "masked_log_softmax_fwd_kernel": rows * classes * (passes * (size + 1) + size),
                "masked_log_softmax_bwd_kernel": rows * classes * (passes * (2 * size + 1) + size),
            },
        )


def masked_cross_entropy(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The backward smooths over the valid classes: if there are more than 1024 it counts them first."""
    real, size = device == "meta", dtype.itemsize
    for classes, rows in (
        (4, 262144 if real else 96),
        (144, 49152 if real else 32),
        (900, 49152 if real else 9),
        (2500, 8192 if real else 3),
    ):
        x, valid, grad = floats(device, dtype, rows, classes), bits(device, rows, classes), floats(device, dtype, rows)
        target = integers(device, classes, rows)
        if not real:
            valid.scatter_(1, target.unsqueeze(1), True)  # every row is counted
        for smoothing in (0.0, 0.1):
            masks = 2 if classes > 1024 and smoothing else 1
            yield Case(
                f"C={classes} smoothed" if smoothing else f"C={classes}",
                partial(_cross_entropy_there_and_back, grad.float(), x, valid, target, smoothing),
                {  # beside the classes a row's target; its logit and mask; loss, lse, counted | gradient, lse, counted
                    "masked_cross_entropy_fwd_kernel": rows * (classes * (size + 1) + 8 + size + 1 + 4 + 4 + 1),
                    "masked_cross_entropy_bwd_kernel": rows * (classes * (2 * size + masks) + 8 + 4 + 4 + 1),
                },
            )


def _there_and_back(forward: Callable, backward: Callable, grad: Tensor, *inputs: Tensor) -> None:
    forward(*inputs)
    backward(grad, *inputs)


def _cross_entropy_there_and_back(grad: Tensor, x: Tensor, valid: Tensor, target: Tensor, smoothing: float) -> None:
    _, counted, lse = masked.cross_entropy(x, valid, target, smoothing, -100)
    masked.cross_entropy_backward(grad, x, valid, target, counted, lse, smoothing)


def neighbor_cross_entropy(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every slot holds a candidate, and every row's first is a target."""
    real, size = device == "meta", dtype.itemsize
    for slots, rows, width, classes in ((4, 49152, 384, 900), (24, 16384, 512, 900)) if real else ((4, 48, 70, 30),):
        hidden, weight = floats(device, dtype, rows, width), floats(device, dtype, classes, width)
        bias, grad = floats(device, dtype, classes), floats(device, torch.float32, rows)
        candidates, target = integers(device, classes, rows, slots), bits(device, rows, slots)
        if not real:
            target[:, 0] = True
        gathered, parts = rows * slots * width * size, -(-width // 64)
        yield Case(
            f"J={slots}",
            partial(_neighbor_there_and_back, grad, hidden, weight, bias, candidates, target),
            {
                "neighbor_cross_entropy_fwd_kernel": gathered
                + rows * (width * size + slots * (8 + 1 + size + 4) + 4 + 1 + 8 + 1),
                "neighbor_cross_entropy_bwd_kernel": gathered + rows * (width * size + slots * (8 + 1 + 4 + 4 + 4) + 4),
                "neighbor_cross_entropy_head_kernel": gathered
                + rows * slots * parts * (8 + 4)
                + classes * (parts * 16 + width * size + 4),
            },
        )


def _neighbor_there_and_back(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, target: Tensor
) -> None:
    *_, log_probs = neighbor.forward(hidden, weight, bias, candidates, target, 0.1)
    neighbor.backward(grad, hidden, weight, candidates, target, log_probs, 0.1, [True, True, True])


def eigen_scan(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Input and output once, the input of all chunks but the last once more, and a row of 2K at the edges of chunks."""
    size, chunk, chunks = dtype.itemsize, 64, 2  # of the audit
    for config, batch, by_position, everything in (
        ("", 16, False, False),
        ("everything", 16, False, True),
        ("by position, everything", 16, True, True),
        ("one pass", 64, False, False),
    ):
        batch, length, width = (batch, 4096, 2048) if device == "meta" else (1, 70, 8)
        if device == "cpu" and config == "one pass":
            length, chunks = 20, 1
        edge, row, twice = 4 * width, size * width, (chunks - 1) * chunk
        shape = (batch, length, width // 2) if by_position else (width // 2,)
        x, y = (floats(device, dtype, batch, length, width) for _ in range(2))
        log_rho, omega = (-floats(device, torch.float32, *shape).abs() for _ in range(2))
        state, energy = floats(device, torch.float32, batch, width), floats(device, torch.float32, batch)
        reset, counted = bits(device, batch, length), bits(device, batch, length)
        masks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        sent: tuple[Tensor | None, Tensor | None] = (None, None)  # from the final state and the energy
        if everything:
            masks, sent = (state, reset, counted), (state, energy)
        # Of each position: decay and reset, and also what counts for the energy. Of each chunk: a decay [K].
        at, mask, of_chunk = edge * by_position + everything, int(everything), edge * (not by_position)
        carry = (2 * chunks - 1) * edge + of_chunk + mask * (edge + chunks - 1) + by_position * (chunks - 1) * edge
        ends = (chunks - 1) * (edge * (1 + by_position) + of_chunk + mask)
        fwd = length * (2 * row + at + mask) + chunks * (of_chunk + 4 * mask) + edge
        bwd = (
            (length - 1) * row
            + length * (2 * row + at + mask + edge * by_position)
            + chunks * (2 * of_chunk + mask * (row + 4))
            + edge
        )
        entering = edge * (chunks if chunks > 1 else mask)
        forward = {
            "eigen_scan_fwd_ends_kernel": twice * (row + at) + ends,
            "eigen_scan_carry_kernel": carry,
            "eigen_scan_fwd_kernel": fwd + entering,
        }
        backward = {
            "eigen_scan_bwd_ends_kernel": twice * (row + at + mask * (row + 1)) + ends + (chunks - 1) * 4 * mask,
            "eigen_scan_carry_kernel": carry,
            "eigen_scan_bwd_kernel": bwd + entering + edge * mask,
        }
        for name, run, minimum in (
            ("forward", partial(scan.forward, x, log_rho, omega, *masks, everything), forward),
            ("backward", partial(scan.backward, y, *sent, x, log_rho, omega, *masks), backward),
        ):
            minimum = {kernel: least for kernel, least in minimum.items() if chunks > 1 or kernel in list(minimum)[2:]}
            yield Case(f"{config} {name}".strip(), run, minimum)


def multiscale_pool(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Input and output once, and of each chunk but the first what its windows reach back to. (Scales above 8 are read
    s / 8 times more: not audited.)
    """
    real, size = device == "meta", dtype.itemsize
    for mode, scales, by_channel, with_reset in (
        ("trailing", (1, 2, 4, 8) if real else (1, 3), False, False),
        ("hold", (1, 2, 4, 8) if real else (1, 3), False, False),
        ("hold", (2, 8), None, True),
        ("trailing", (1, 4, 64) if real else (1, 4), True, True),
    ):
        batch, length, width = (16, 4096, 1024) if real else (1, 70 if by_channel is False else 20, 64)
        x, grad = (floats(device, dtype, batch, length, width) for _ in range(2))
        shape = (len(scales), width) if by_channel else (len(scales),)
        weights = None if by_channel is None else floats(device, torch.float32, *shape)
        reset = bits(device, batch, length) if with_reset else None
        chunks = -(-length // 64)
        again = (chunks - 1) * 8  # rows
        marks = 4 * 2 * length if with_reset else 0
        sums = 0 if weights is None else 2 * 4 * chunks * len(scales) * (width if by_channel else 1)
        minimum = {
            "multiscale_pool_fwd_kernel": batch * (size * width * (2 * length + again) + marks + sums // 2),
            "multiscale_pool_bwd_kernel": batch
            * (size * width * ((2 if weights is None else 3) * length + again) + marks + sums),
        }
        kind = {None: "groups", False: "weights", True: "weights by channel"}[by_channel]
        yield Case(
            f"{mode}, {kind}{', resets' * with_reset}",
            partial(_pool_there_and_back, grad, x, weights, reset, scales, mode),
            minimum,
        )


def _pool_there_and_back(
    grad: Tensor, x: Tensor, weights: Tensor | None, reset: Tensor | None, scales: tuple[int, ...], mode: str
) -> None:
    pool.forward(x, weights, reset, scales, mode)
    pool.backward(grad, x, weights, reset, scales, mode)


OPS: dict[str, Callable[[str, torch.dtype], Iterator[Case]]] = {
    "eigen_scan": eigen_scan,
    "linear_cross_entropy": linear_cross_entropy,
    "masked_log_softmax": masked_log_softmax,
    "masked_cross_entropy": masked_cross_entropy,
    "neighbor_cross_entropy": neighbor_cross_entropy,
    "multiscale_pool": multiscale_pool,
}
