"""Triton kernels of `masked_log_softmax` and `masked_cross_entropy`: a launch each for forward and backward.

A program takes BLOCK_R whole rows; up to 1024 classes are one tile, more are walked with a running maximum.
Tiles are loaded whole and masked in registers: a load that the mask decides on would be one element wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch, multiprocessors

MAX_BLOCK_C = 1024
TILE = 4096  # elements of a program's tile, 32 a thread
COUNTS = ["rows", "x_n1", "x_n2", "v_n1", "v_n2"]  # vary from batch to batch


@triton.jit
def _row_offsets(rows, n1, n2, s0, s1, s2, ROW: tl.constexpr):
    """Where rows start, [BLOCK_R]: ROW apart if that is known, else by three leading dimensions [.., n1, n2]."""
    if ROW >= 0:
        offsets = rows * ROW
    else:
        rest = rows // n2
        offsets = (rest // n1) * s0 + (rest % n1) * s1 + (rows % n2) * s2
    return offsets


@triton.jit
def _load(pointer, rows, inside, start, other, C: tl.constexpr, CLASS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile [BLOCK_R, BLOCK_C] of the classes from `start` on."""
    cols = start + tl.arange(0, BLOCK_C)
    here = inside[:, None] & (cols < C)[None, :]
    return tl.load(pointer + (rows[:, None] + cols.to(tl.int64)[None, :] * CLASS), mask=here, other=other)


@triton.jit
def _store(pointer, value, rows, inside, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """To a contiguous [rows, C]."""
    cols = start + tl.arange(0, BLOCK_C)
    here = inside[:, None] & (cols < C)[None, :]
    tl.store(pointer + (rows[:, None] * C + cols[None, :]), value.to(pointer.dtype.element_ty), mask=here)


@triton.jit
def _accumulate(top, exps, x):
    """Maximum of each row so far and the sum of exp(x - maximum); NaN, which tl.max may drop, shows in the sum."""
    highest = tl.maximum(top, tl.max(x, 1))
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    exps = exps * tl.exp(top - origin) + tl.sum(tl.exp(x - origin[:, None]), 1)
    return highest, exps


@triton.jit
def _finish(top, exps):
    return tl.where(top == float("-inf"), 0.0, top), tl.log(exps)


@triton.jit(do_not_specialize=COUNTS)
def masked_log_softmax_fwd_kernel(
    log_probs,  # [rows, C]
    x,  # [rows, C]
    valid,  # [rows, C] bool
    rows,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    v_n1, v_n2, v_s0, v_s1, v_s2,
    X_ROW: tl.constexpr, X_CLASS: tl.constexpr, V_ROW: tl.constexpr, V_CLASS: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    x_rows = _row_offsets(r, x_n1, x_n2, x_s0, x_s1, x_s2, X_ROW)
    v_rows = _row_offsets(r, v_n1, v_n2, v_s0, v_s1, v_s2, V_ROW)
    top, exps = tl.full([BLOCK_R], float("-inf"), WIDE), tl.zeros([BLOCK_R], WIDE)
    for start in range(0, C, BLOCK_C):
        tile = _load(x, x_rows, inside, start, 0.0, C, X_CLASS, BLOCK_C).to(WIDE)
        ok = _load(valid, v_rows, inside, start, 0, C, V_CLASS, BLOCK_C) != 0
        tile = tl.where(ok, tile, float("-inf"))
        top, exps = _accumulate(top, exps, tile)
        if C <= BLOCK_C:
            top, log_sum = _finish(top, exps)
            log_sum = tl.where(tl.max(ok.to(tl.int32), 1) > 0, log_sum, 0.0)  # no valid class: -inf, not NaN
            _store(log_probs, tile - top[:, None] - log_sum[:, None], r, inside, start, C, BLOCK_C)
    if C > BLOCK_C:
        top, log_sum = _finish(top, exps)
        for start in range(0, C, BLOCK_C):
            tile = _load(x, x_rows, inside, start, 0.0, C, X_CLASS, BLOCK_C).to(WIDE)
            ok = _load(valid, v_rows, inside, start, 0, C, V_CLASS, BLOCK_C) != 0
            value = tl.where(ok, tile - top[:, None] - log_sum[:, None], float("-inf"))
            _store(log_probs, value, r, inside, start, C, BLOCK_C)


@triton.jit(do_not_specialize=[*COUNTS, "g_n1", "g_n2"])
def masked_log_softmax_bwd_kernel(
    d_x,  # [rows, C]
    grad,  # [rows, C]
    x,  # [rows, C]
    valid,  # [rows, C] bool
    rows,
    g_n1, g_n2, g_s0, g_s1, g_s2,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    v_n1, v_n2, v_s0, v_s1, v_s2,
    G_ROW: tl.constexpr, G_CLASS: tl.constexpr,
    X_ROW: tl.constexpr, X_CLASS: tl.constexpr, V_ROW: tl.constexpr, V_CLASS: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    g_rows = _row_offsets(r, g_n1, g_n2, g_s0, g_s1, g_s2, G_ROW)
    x_rows = _row_offsets(r, x_n1, x_n2, x_s0, x_s1, x_s2, X_ROW)
    v_rows = _row_offsets(r, v_n1, v_n2, v_s0, v_s1, v_s2, V_ROW)
    top, exps = tl.full([BLOCK_R], float("-inf"), WIDE), tl.zeros([BLOCK_R], WIDE)
    total = tl.zeros([BLOCK_R], WIDE)
    for start in range(0, C, BLOCK_C):
        ok = _load(valid, v_rows, inside, start, 0, C, V_CLASS, BLOCK_C) != 0
        tile = _load(x, x_rows, inside, start, 0.0, C, X_CLASS, BLOCK_C).to(WIDE)
        tile = tl.where(ok, tile, float("-inf"))
        g = tl.where(ok, _load(grad, g_rows, inside, start, 0.0, C, G_CLASS, BLOCK_C).to(WIDE), 0.0)
        top, exps = _accumulate(top, exps, tile)
        total += tl.sum(g, 1)
        if C <= BLOCK_C:
            top, log_sum = _finish(top, exps)
            probs = tl.exp(tile - top[:, None] - log_sum[:, None])
            _store(d_x, tl.where(ok, g - probs * total[:, None], 0.0), r, inside, start, C, BLOCK_C)
    if C > BLOCK_C:
        top, log_sum = _finish(top, exps)
        for start in range(0, C, BLOCK_C):
            ok = _load(valid, v_rows, inside, start, 0, C, V_CLASS, BLOCK_C) != 0
            tile = _load(x, x_rows, inside, start, 0.0, C, X_CLASS, BLOCK_C).to(WIDE)
            g = _load(grad, g_rows, inside, start, 0.0, C, G_CLASS, BLOCK_C).to(WIDE)
            probs = tl.exp(tile - top[:, None] - log_sum[:, None])
            _store(d_x, tl.where(ok, g - probs * total[:, None], 0.0), r, inside, start, C, BLOCK_C)


@triton.jit(do_not_specialize=COUNTS)
def masked_cross_entropy_fwd_kernel(
    loss, counted, lse,  # [rows]
    x,  # [rows, C]
    valid,  # [rows, C] bool
    target,  # [rows]
    smoothing,
    ignore_index,
    rows,
    y_stride,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    v_n1, v_n2, v_s0, v_s1, v_s2,
    X_ROW: tl.constexpr, X_CLASS: tl.constexpr, V_ROW: tl.constexpr, V_CLASS: tl.constexpr, SMOOTHED: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    x_rows = _row_offsets(r, x_n1, x_n2, x_s0, x_s1, x_s2, X_ROW)
    v_rows = _row_offsets(r, v_n1, v_n2, v_s0, v_s1, v_s2, V_ROW)
    y = tl.load(target + r * y_stride, mask=inside, other=0).to(tl.int64)
    seen = inside & (y != ignore_index)
    tl.device_assert(~seen | ((y >= 0) & (y < C)), "a target is neither a class nor ignore_index")
    seen = seen & (y >= 0) & (y < C)
    counts = tl.load(valid + v_rows + y * V_CLASS, mask=seen, other=0) != 0
    wanted = tl.load(x + x_rows + y * X_CLASS, mask=counts, other=0.0).to(WIDE)
    top, exps = tl.full([BLOCK_R], float("-inf"), WIDE), tl.zeros([BLOCK_R], WIDE)
    total, classes = tl.zeros([BLOCK_R], WIDE), tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, C, BLOCK_C):
        tile = _load(x, x_rows, inside, start, 0.0, C, X_CLASS, BLOCK_C).to(WIDE)
        ok = _load(valid, v_rows, inside, start, 0, C, V_CLASS, BLOCK_C) != 0
        top, exps = _accumulate(top, exps, tl.where(ok, tile, float("-inf")))
        if SMOOTHED:
            total += tl.sum(tl.where(ok, tile, 0.0), 1)
            classes += tl.sum(ok.to(tl.int32), 1)
    top, log_sum = _finish(top, exps)
    value = log_sum + (top - wanted)
    if SMOOTHED:
        mean = total / tl.where(counts, classes, 1).to(WIDE)
        value = log_sum + (1 - smoothing) * (top - wanted) + smoothing * (top - mean)
    tl.store(loss + r, tl.where(counts, value, 0.0), mask=inside)
    tl.store(counted + r, counts, mask=inside)
    tl.store(lse + r, tl.where(counts, top + log_sum, 0.0), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def masked_cross_entropy_bwd_kernel(
    d_x,  # [rows, C]
    grad,  # [rows]
    x,  # [rows, C]
    valid,  # [rows, C] bool
    target, counted, lse,  # [rows]
    smoothing,
    rows,
    g_stride,
    y_stride,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    v_n1, v_n2, v_s0, v_s1, v_s2,
    X_ROW: tl.constexpr, X_CLASS: tl.constexpr, V_ROW: tl.constexpr, V_CLASS: tl.constexpr, SMOOTHED: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    counts = tl.load(counted + r, mask=inside, other=0) != 0
    x_rows = _row_offsets(r, x_n1, x_n2, x_s0, x_s1, x_s2, X_ROW)
    v_rows = _row_offsets(r, v_n1, v_n2, v_s0, v_s1, v_s2, V_ROW)
    g = tl.load(grad + r * g_stride, mask=counts, other=0.0).to(WIDE)
    y = tl.load(target + r * y_stride, mask=counts, other=-1).to(tl.int64)
    shift = tl.load(lse + r, mask=counts, other=0.0)
    classes = tl.zeros([BLOCK_R], tl.int32)
    if SMOOTHED and C > BLOCK_C:
        for start in range(0, C, BLOCK_C):
            classes += tl.sum(_load(valid, v_rows, counts, start, 0, C, V_CLASS, BLOCK_C).to(tl.int32), 1)
    for start in range(0, C, BLOCK_C):
        ok = _load(valid, v_rows, counts, start, 0, C, V_CLASS, BLOCK_C) != 0
        d = tl.exp(_load(x, x_rows, counts, start, 0.0, C, X_CLASS, BLOCK_C).to(WIDE) - shift[:, None])
        hit = (start + tl.arange(0, BLOCK_C))[None, :] == y[:, None]
        if SMOOTHED:
            if C <= BLOCK_C:
                classes = tl.sum(ok.to(tl.int32), 1)
            d -= (smoothing / tl.maximum(classes, 1).to(WIDE))[:, None]
        d = tl.where(hit, d - (1 - smoothing), d)
        _store(d_x, tl.where(ok, d * g[:, None], 0.0), r, inside, start, C, BLOCK_C)


# ---------------------------------------------------------------------------------------------------------- launchers


class Rows(NamedTuple):
    """How the rows of a tensor [R, ..., C] lie: `row` apart, or (-1) at `strides` of three leading dimensions."""

    tensor: Tensor
    shape: tuple[int, int]  # the last two of the three
    strides: tuple[int, int, int]
    row: int
    classes: int  # stride along C

    @property
    def runtime(self) -> tuple[int, ...]:
        return *self.shape, *self.strides


def _rows(tensor: Tensor) -> Rows:
    """Merge the leading dimensions that lie one in the other; only a tensor where more than three stay is copied."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size != 1:
            fits = merged and merged[-1][1] == size * stride
            merged[-1:] = [(merged[-1][0] * size, stride)] if fits else [*merged[-1:], (size, stride)]
    if len(merged) > 3:
        return _rows(tensor.contiguous())
    row = merged[0][1] if len(merged) == 1 else -1 if merged else 0
    (_, stride_0), (size_1, stride_1), (size_2, stride_2) = [(1, 0)] * (3 - len(merged)) + merged
    return Rows(tensor, (size_1, size_2), (stride_0, stride_1, stride_2), row, tensor.stride(-1))


def _launch(op: str, kernel: Any, logits: Tensor, *args: Any, **constants: Any) -> None:
    """The rest of a kernel's arguments, from the shape of the logits."""
    classes = logits.shape[-1]
    rows = logits.numel() // classes
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(classes))
    tile = TILE if classes <= MAX_BLOCK_C else TILE // 2  # the online loop keeps sums beside it: sm_80 spilled at 4096
    block_r = min(256, tile // block_c)
    while block_r > 1 and triton.cdiv(rows, block_r) < multiprocessors(logits.device):
        block_r //= 2
    wide = tl.float64 if logits.dtype == torch.float64 else tl.float32
    constants |= {"C": classes, "BLOCK_R": block_r, "BLOCK_C": block_c, "WIDE": wide}
    launch(op, kernel, (triton.cdiv(rows, block_r),), *args, num_warps=4, **constants)


def _constants(x: Rows, valid: Rows) -> dict[str, int]:
    return {"X_ROW": x.row, "X_CLASS": x.classes, "V_ROW": valid.row, "V_CLASS": valid.classes}


def log_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    log_probs, x, v = logits.new_empty(logits.shape), _rows(logits), _rows(valid)
    args = log_probs, x.tensor, v.tensor, logits.shape[:-1].numel(), *x.runtime, *v.runtime
    _launch("masked_log_softmax", masked_log_softmax_fwd_kernel, logits, *args, **_constants(x, v))
    return log_probs


def log_softmax_backward(grad: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    d_logits, g, x, v = logits.new_empty(logits.shape), _rows(grad), _rows(logits), _rows(valid)
    args = d_logits, g.tensor, x.tensor, v.tensor, logits.shape[:-1].numel(), *g.runtime, *x.runtime, *v.runtime
    constants = {"G_ROW": g.row, "G_CLASS": g.classes} | _constants(x, v)
    _launch("masked_log_softmax", masked_log_softmax_bwd_kernel, logits, *args, **constants)
    return d_logits


def cross_entropy(
    logits: Tensor, valid: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss, lse = (logits.new_empty(target.shape, dtype=wide) for _ in range(2))
    counted = target.new_empty(target.shape, dtype=torch.bool)
    x, v, y = _rows(logits), _rows(valid), target.reshape(-1)
    args = loss, counted, lse, x.tensor, v.tensor, y, label_smoothing, ignore_index, y.numel(), y.stride(0)
    constants = _constants(x, v) | {"SMOOTHED": label_smoothing > 0}
    _launch("masked_cross_entropy", masked_cross_entropy_fwd_kernel, logits, *args, *x.runtime, *v.runtime, **constants)
    return loss, counted, lse


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, valid: Tensor, target: Tensor, counted: Tensor, lse: Tensor, label_smoothing: float
) -> Tensor:
    d_logits, x, v = logits.new_empty(logits.shape), _rows(logits), _rows(valid)
    g, y = grad.reshape(-1), target.reshape(-1)
    args = d_logits, g, x.tensor, v.tensor, y, counted, lse, label_smoothing, y.numel(), g.stride(0), y.stride(0)
    constants = _constants(x, v) | {"SMOOTHED": label_smoothing > 0}
    _launch("masked_cross_entropy", masked_cross_entropy_bwd_kernel, logits, *args, *x.runtime, *v.runtime, **constants)
    return d_logits
