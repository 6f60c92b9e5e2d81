"""The head's loss on a GPU: logits from cuBLAS in chunks of rows, their gradient written over them by one kernel.

Three matmuls a chunk and one read, re-read and write of its logits between them; the weight's gradient adds up in fp32
inside its matmul. The loss alone, for narrow hidden states, comes from a matmul that keeps no logits at all: a row's
logits cost 2 * D operations each and 6 bytes of traffic, so that below D ~ 800 an H200 waits for the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunked_head import TRITON, add_matmul, chunk_rows, padded_classes
from kernels.dispatch import launch, multiprocessors

FUSED_D = 800
MAX_BLOCK = 2048  # logits of a program at a time
LOWEST = tl.constexpr(-3e38)  # where a maximum begins: finite, for exp(-inf - -inf) is NaN


# ------------------------------------------------------------------------------------------------------ Triton kernels


@triton.jit
def class_of(y, classes):
    """Targets in 32 bits, half the registers of 64; -1 for one that is no class."""
    return tl.where((y >= 0) & (y < classes), y, -1).to(tl.int32)


@triton.jit
def finished(z, cols, inside, bias, softcap, WIDE: tl.constexpr):
    """Logits as the matmul left them -> with bias and cap; -inf where not `inside`, after the cap, which bounds."""
    z = z.to(WIDE)
    if bias is not None:
        z += tl.load(bias + cols, mask=inside, other=0.0).to(WIDE)
    if softcap is not None:
        s = tl.cast(softcap, WIDE)
        z = s - 2 * s / (1 + tl.exp(z * (2 / s)))  # s * tanh(z / s)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _folded(z, peak, partition):
    """Take z [R, B] into the running maximum and sum of exponentials [R] (Milakov and Gimelshein, arXiv 1805.02867)."""
    higher = tl.maximum(peak, tl.max(z, 1))
    return higher, partition * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)


@triton.jit
def row_sums(
    logits,  # [R] places where rows begin
    keep,  # [R]; other rows are not read
    bias,
    peak,
    partition,
    padded,
    classes,
    softcap,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """A pass over logits that takes them into `peak` and `partition`; beside these, with SMOOTHING, their sum."""
    total = tl.zeros_like(partition)
    for start in range(0, padded, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        raw = tl.load(logits[:, None] + cols, mask=keep[:, None] & (cols < padded), other=0.0)
        z = finished(raw, cols, cols < classes, bias, softcap, WIDE)
        peak, partition = _folded(z, peak, partition)
        if SMOOTHING:
            total += tl.sum(tl.where(cols < classes, z, 0.0), 1)
    return peak, partition, total


@triton.jit
def write_gradient(
    logits,  # [R] places where rows begin
    inside,  # [R]; other rows are not there
    keep,  # [R]; the gradient of other rows is 0
    y,  # [R], -1 where it is none of these classes
    lse,
    bias,
    padded,
    classes,
    a,  # label_smoothing
    spread,  # a / V
    z_loss_weight,
    softcap,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A pass that turns logits into the gradient of nll + z_loss_weight * lse^2, zeros past the last class."""
    slope = 1 + 2 * tl.cast(z_loss_weight, WIDE) * lse  # of that with respect to lse
    for start in range(0, padded, BLOCK):
        cols = (start + tl.arange(0, BLOCK))[None, :]
        raw = tl.load(logits[:, None] + cols, mask=keep[:, None] & (cols < padded), other=0.0)
        z = finished(raw, cols, cols < classes, bias, softcap, WIDE)
        dz = slope[:, None] * tl.exp(z - lse[:, None]) - spread - tl.where(cols == y[:, None], 1 - a, 0.0)
        if softcap is not None:
            tanh = z * (1 / tl.cast(softcap, WIDE))
            dz *= 1 - tanh * tanh
        dz = tl.where(keep[:, None] & (cols < classes), dz, 0.0)  # rounded once, at the store
        tl.store(logits[:, None] + cols, dz, mask=inside[:, None] & (cols < padded))


@triton.jit(do_not_specialize=["num_rows"])
def linear_cross_entropy_bwd_kernel(
    logits,  # [C, padded]; with GRADIENT they become the gradient of the total
    target,  # [C]
    bias,  # [V] or None
    nll,  # [C]
    square,  # [C], lse^2
    num_rows,
    row_stride,
    padded,  # columns; those past the last class are written as zeros
    classes,
    label_smoothing,
    z_loss_weight,
    softcap,  # or None
    ignore_index,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y = tl.load(target + rows, mask=rows < num_rows, other=ignore_index)
    keep = y != ignore_index  # other rows are not read: their loss and gradient are 0, whatever they hold
    y = class_of(y, classes)
    logits += rows * row_stride
    raw_y = tl.load(logits + y, mask=keep & (y >= 0), other=0.0)
    z_y = finished(raw_y, y, y >= 0, bias, softcap, WIDE)  # -inf for a target that is no class
    peak, partition = tl.full([ROWS], LOWEST, WIDE), tl.zeros([ROWS], WIDE)
    peak, partition, total = row_sums(
        logits, keep, bias, peak, partition, padded, classes, softcap, BLOCK, WIDE, SMOOTHING
    )
    lse = peak + tl.log(partition)
    a = tl.cast(label_smoothing, WIDE)
    losses = lse - (1 - a) * z_y
    if SMOOTHING:
        losses -= a / classes * total
    tl.store(nll + rows, tl.where(keep, losses, 0.0), mask=rows < num_rows)
    tl.store(square + rows, tl.where(keep, lse * lse, 0.0), mask=rows < num_rows)
    if GRADIENT:
        tl.debug_barrier()  # every warp has read z_y before one of them writes over it
        inside, spread = rows < num_rows, a / classes
        write_gradient(
            logits, inside, keep, y, lse, bias, padded, classes, a, spread, z_loss_weight, softcap, BLOCK, WIDE
        )


@triton.jit(do_not_specialize=["num_rows", "split_classes"])
def linear_cross_entropy_fwd_kernel(
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V] or None
    target,  # [N]
    lse,  # [S, N], of one split of the vocabulary; so the next two
    z_y,  # [S, N], 0 where the target lies in another split
    total,  # [S, N], sum of the logits
    num_rows,
    classes,
    width,
    split_classes,
    softcap,  # or None
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    first_row, first_class = tl.program_id(0) * BLOCK_N, tl.program_id(1) * split_classes
    rows, dims = first_row + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    y = class_of(tl.load(target + rows, mask=rows < num_rows, other=-1), classes)
    # Past the end the last row and class are read again: cheaper than a mask. Offsets inside a tile fit 32 bits.
    hidden += tl.cast(first_row, tl.int64) * width
    x_offsets = (tl.minimum(rows, num_rows - 1) - first_row)[:, None] * width + dims[None, :]  # [N, D]
    peak, partition = tl.full([BLOCK_N], LOWEST, WIDE), tl.zeros([BLOCK_N], WIDE)
    chosen, z_sum = tl.zeros([BLOCK_N], WIDE), tl.zeros([BLOCK_N], WIDE)
    for start in range(first_class, tl.minimum(first_class + split_classes, classes), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        w_tile = weight + tl.cast(start, tl.int64) * width
        w_offsets = (tl.minimum(cols, classes - 1) - start)[None, :] * width + dims[:, None]  # [D, V]
        z = tl.zeros([BLOCK_N, BLOCK_V], WIDE)
        for d in range(0, width, BLOCK_D):
            inside = d + dims < width
            x = tl.load(hidden + d + x_offsets, mask=inside[None, :], other=0.0)
            w = tl.load(w_tile + d + w_offsets, mask=inside[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee", out_dtype=WIDE)
        z = finished(z, cols[None, :], (cols < classes)[None, :], bias, softcap, WIDE)
        peak, partition = _folded(z, peak, partition)
        chosen += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
        if SMOOTHING:
            z_sum += tl.sum(tl.where((cols < classes)[None, :], z, 0.0), 1)
    places = tl.program_id(1).to(tl.int64) * num_rows + rows
    tl.store(lse + places, peak + tl.log(partition), mask=rows < num_rows)
    tl.store(z_y + places, chosen, mask=rows < num_rows)
    tl.store(total + places, z_sum, mask=rows < num_rows)


# ----------------------------------------------------------------------------------------------------------- launchers


def loss_only(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """-> sum of nll, sum of lse^2."""
    sums = fused_loss if hidden.dtype.itemsize == 2 and hidden.shape[1] <= FUSED_D else chunked_loss
    return sums(hidden, weight, bias, target, label_smoothing, softcap, ignore_index)


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """`loss_only` without logits in memory. The vocabulary is split where rows alone would leave the GPU idle."""
    (num_rows, width), classes = hidden.shape, weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow = hidden.dtype.itemsize == 2
    block_n, block_v, block_d = (128, 64, 64) if narrow else (32, 32, 32)
    row_blocks, class_blocks = triton.cdiv(num_rows, block_n), triton.cdiv(classes, block_v)
    splits = min(class_blocks, triton.cdiv(2 * multiprocessors(hidden.device), max(row_blocks, 1)))
    split_classes = triton.cdiv(class_blocks, splits) * block_v
    splits = triton.cdiv(classes, split_classes)  # none of them empty
    lse, z_y, total = (hidden.new_empty((splits, num_rows), dtype=wide) for _ in range(3))
    hidden, weight, target = hidden.contiguous(), weight.to(hidden.dtype).contiguous(), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(
        "linear_cross_entropy",
        linear_cross_entropy_fwd_kernel,
        (row_blocks, splits),
        *(hidden, weight, bias, target, lse, z_y, total, num_rows, classes, width, split_classes),
        softcap,
        num_warps=8 if narrow else 4,
        num_stages=3,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        BLOCK_D=block_d,
        WIDE=triton_dtype(wide),
        SMOOTHING=label_smoothing > 0,
    )
    lse, z_y, total = lse.logsumexp(0), z_y.sum(0), total.sum(0)
    nll = lse - (1 - label_smoothing) * z_y
    if label_smoothing:
        nll -= label_smoothing / classes * total
    nll = nll.masked_fill((target < 0) | (target >= classes), float("inf"))  # a target that is no class
    ignored = target == ignore_index
    return nll.masked_fill(ignored, 0).sum(), lse.square().masked_fill(ignored, 0).sum()


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """`loss_only` by way of cuBLAS, a chunk of logits at a time."""
    wants = [False, False, False]
    options = label_smoothing, 0.0, softcap, ignore_index
    return loss_and_gradients(hidden, weight, bias, target, *options, wants)[1:3]


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    ignore_index: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> total, sum of nll, sum of lse^2, and the gradients of total: d_hidden, d_weight, d_bias."""
    (num_rows, _), classes = hidden.shape, weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, target = weight.to(hidden.dtype), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    d_hidden = hidden.new_empty(hidden.shape if wants[0] else 0)
    first = hidden.new_empty if num_rows else hidden.new_zeros  # the first chunk writes, the others add
    d_weight = first(weight.shape if wants[1] else 0, dtype=wide)
    d_bias = hidden.new_zeros(classes if wants[2] else 0, dtype=wide)
    nll, square = (hidden.new_empty(num_rows, dtype=wide) for _ in range(2))
    padded = padded_classes(classes)
    chunk = chunk_rows(num_rows, padded * hidden.dtype.itemsize, TRITON)
    logits = hidden.new_empty((min(chunk, num_rows), padded))
    block = min(triton.next_power_of_2(padded), MAX_BLOCK)
    block_rows = MAX_BLOCK // block
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        x = hidden[rows].masked_fill((target[rows] == ignore_index).unsqueeze(1), 0)  # it may hold NaN
        z = logits[: len(x)]
        dz = z[:, :classes]
        torch.mm(x, weight.t(), out=dz)
        launch(
            "linear_cross_entropy",
            linear_cross_entropy_bwd_kernel,
            (triton.cdiv(len(x), block_rows),),
            *(z, target[rows], bias, nll[rows], square[rows], len(x), padded, padded, classes),
            *(label_smoothing, z_loss_weight, softcap, ignore_index),
            num_warps=4,
            ROWS=block_rows,
            BLOCK=block,
            WIDE=triton_dtype(wide),
            SMOOTHING=label_smoothing > 0,
            GRADIENT=any(wants),
        )
        if wants[0]:
            torch.mm(dz, weight, out=d_hidden[rows])
        if wants[1]:
            add_matmul(d_weight, dz.t(), x, first=start == 0)
        if wants[2]:
            d_bias.add_(dz.sum(0, dtype=wide))
    nll, square = nll.sum(), square.sum()
    return nll + z_loss_weight * square, nll, square, d_hidden, d_weight, d_bias


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
