"""The lean head on a GPU: tiles of logits from cuBLAS, and between its matmuls one kernel that takes a tile into the
rows' lse, in forward, and one that writes the gradient over it, in backward.

Each reads a tile once; its rows' lse, target's logit and sum are what the launches before it, of the classes before,
have left there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunked_head import padded_classes
from kernels.dispatch import launch
from kernels.gpu.linear_cross_entropy import (
    LOWEST,
    MAX_BLOCK,
    class_of,
    finished,
    row_sums,
    triton_dtype,
    write_gradient,
)
from kernels.lean_head import TRITON, Options, Tile, gradients_over_tiles, loss_over_tiles


@triton.jit(do_not_specialize=["num_rows", "first", "classes"])
def linear_cross_entropy_lean_fwd_kernel(
    logits,  # [R, padded]
    target,  # [R]
    bias,  # [C] or None
    lse,  # [R], of all classes so far
    z_y,  # [R], written if the target is here
    total,  # [R], sum of the logits so far
    num_rows,
    first,  # class
    classes,
    row_stride,
    padded,
    softcap,  # or None
    ignore_index,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y = tl.load(target + rows, mask=rows < num_rows, other=ignore_index)
    keep = y != ignore_index
    y = class_of(y - first, classes)
    here = keep & (y >= 0)
    logits += rows * row_stride
    raw_y = tl.load(logits + y, mask=here, other=0.0)
    tl.store(z_y + rows, finished(raw_y, y, here, bias, softcap, WIDE), mask=here)
    peak, partition = tl.full([ROWS], LOWEST, WIDE), tl.zeros([ROWS], WIDE)
    peak, partition, z_sum = row_sums(
        logits, keep, bias, peak, partition, padded, classes, softcap, BLOCK, WIDE, SMOOTHING
    )
    before = tl.load(lse + rows, mask=keep, other=0.0)  # not until now, or it spills too
    higher = tl.maximum(peak, before)
    partition = partition * tl.exp(peak - higher) + tl.exp(before - higher)
    tl.store(lse + rows, higher + tl.log(partition), mask=keep)
    if SMOOTHING:
        tl.store(total + rows, tl.load(total + rows, mask=keep, other=0.0) + z_sum, mask=keep)


@triton.jit(do_not_specialize=["num_rows", "first", "classes", "num_classes"])
def linear_cross_entropy_lean_bwd_kernel(
    logits,  # [R, padded], become the gradient of the total
    target,  # [R]
    bias,  # [C] or None
    lse,  # [R], of all classes
    num_rows,
    first,  # class
    classes,
    row_stride,
    padded,  # columns; those past the last class are written as zeros
    num_classes,  # of all chunks
    label_smoothing,
    z_loss_weight,
    softcap,  # or None
    ignore_index,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, a = rows < num_rows, tl.cast(label_smoothing, WIDE)
    y = tl.load(target + rows, mask=inside, other=ignore_index)
    keep = y != ignore_index
    write_gradient(
        logits + rows * row_stride,
        inside,
        keep,
        class_of(y - first, classes),
        tl.load(lse + rows, mask=keep, other=0.0),
        bias,
        padded,
        classes,
        a,
        a / num_classes,
        z_loss_weight,
        softcap,
        BLOCK,
        WIDE,
    )


def _launch(
    kernel: triton.JITFunction, tile: Tile, each_row: tuple, options: tuple, wide: torch.dtype, **constants: bool
) -> None:
    num_rows, classes = tile.z.shape
    padded = padded_classes(classes)
    block = min(triton.next_power_of_2(padded), MAX_BLOCK)
    rows = MAX_BLOCK // block
    launch(
        "linear_cross_entropy_lean",
        kernel,
        (triton.cdiv(num_rows, rows),),
        *(tile.z, tile.target, tile.bias, *each_row),
        *(num_rows, tile.classes.start, classes, tile.z.stride(0), padded),
        *options,
        num_warps=8,  # with 4, forward spills where there are smoothing, bias and cap
        ROWS=rows,
        BLOCK=block,
        WIDE=triton_dtype(wide),
        **constants,
    )


def _reduce(tile: Tile, options: Options, lse: Tensor, z_y: Tensor, z_sum: Tensor) -> None:
    rows, rest, smoothing = (lse, z_y, z_sum), (options.softcap, options.ignore_index), options.label_smoothing > 0
    _launch(linear_cross_entropy_lean_fwd_kernel, tile, rows, rest, lse.dtype, SMOOTHING=smoothing)


def _differentiate(tile: Tile, options: Options, num_classes: int, lse: Tensor) -> None:
    _launch(linear_cross_entropy_lean_bwd_kernel, tile, (lse,), (num_classes, *options), lse.dtype)


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> total, sum of nll, sum of lse^2, lse [N]."""
    options = Options(label_smoothing, z_loss_weight, softcap, ignore_index)
    arguments = hidden, weight, _contiguous(bias), target.contiguous()
    return loss_over_tiles(*arguments, options, TRITON, hidden.dtype, _reduce)


def gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    ignore_index: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> `grad` times the gradients of total: d_hidden, d_weight, d_bias."""
    options = Options(label_smoothing, z_loss_weight, softcap, ignore_index)
    arguments = grad, hidden, weight, _contiguous(bias), target.contiguous(), lse
    return gradients_over_tiles(*arguments, options, wants, TRITON, hidden.dtype, _differentiate)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
