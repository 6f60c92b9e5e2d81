"""Triton kernels of `multiscale_pool`: one launch reads each row about once, whatever the number of scales.

A program takes BLOCK channels of one sequence and walks CHUNK positions, ROWS at a time, with all sums in registers.
What its first position has behind it is found by setting out early and storing nothing yet. trailing: windows of up to
ROWS positions come by doubling from the rows at hand and the few before; a longer one is walked again for every ROWS
positions. hold: the open block's sum and the last complete mean. Nothing is ever subtracted, so sums do not drift, and
a NaN leaves with its window.

Backward is the same walk from the other end of time: its position i is row T - 1 - i, and a window reaches the rows
that follow in the document. With p_s the gradient pooled so, dx = sum_s w_s p_s and dw_s = sum x p_s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch
from kernels.multiscale_pool import positions_since_start, wide_dtype

ROWS = 8


class Walk(NamedTuple):
    """The rows that a program walks over."""

    rows: tl.tensor  # [BLOCK] pointers to row 0
    stride: tl.tensor  # from row to row
    inside: tl.tensor  # [BLOCK] which channels there are
    length: tl.tensor
    ages: tl.tensor | None  # pointer to [T]: how many earlier rows of its document a row has; None: all that are there
    reaches: tl.tensor | None  # pointer to [T]: how many rows of its document a window that ends in a row can reach
    last: tl.tensor | None  # position i is row last - i, the walk is backward; None: it is row i


@triton.jit
def _load(walk, i, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """The rows at COUNT positions from i on, zero outside of the sequence."""
    rows = ()
    for j in tl.static_range(COUNT):
        t = i + j if walk.last is None else walk.last - i - j
        exists = walk.inside & (t >= 0) & (t < walk.length)
        rows += (tl.load(walk.rows + t.to(tl.int64) * walk.stride, mask=exists, other=0).to(WIDE),)
    return rows


@triton.jit
def _ages(walk, i, COUNT: tl.constexpr):
    """(ages, reaches) of COUNT positions from i on."""
    ages, reaches = (), ()
    for j in tl.static_range(COUNT):
        t = i + j if walk.last is None else walk.last - i - j
        if walk.ages is None:
            ages += (t,)
            reaches += (t,)  # not asked for: zeros beyond both ends do all there is to do
        else:
            exists = (t >= 0) & (t < walk.length)
            ages += (tl.load(walk.ages + t, mask=exists, other=0),)
            reaches += (tl.load(walk.reaches + t, mask=exists, other=0),)
    return ages, reaches


@triton.jit
def _over_count(rows, ages, SCALE: tl.constexpr):
    """Each row over how many there are in the trailing window that ends in a row of its age."""
    out = ()
    for j in tl.static_range(len(rows)):
        out += (rows[j] * (1.0 / tl.maximum(tl.minimum(ages[j] + 1, SCALE), 1).to(rows[j].dtype)),)
    return out


# ---- trailing ------------------------------------------------------------------------------------------------------


@triton.jit
def _plus_shifted(walk, total, power, reaches, SHIFT: tl.constexpr):
    """total[j] + power[j - SHIFT]; the first SHIFT entries, which no window needs, stay as they are."""
    out = total[:SHIFT]
    for j in tl.static_range(SHIFT, len(total)):
        other = power[j - SHIFT]
        out += (total[j] + (other if walk.ages is None else tl.where(reaches[j] >= SHIFT, other, 0.0)),)
    return out


@triton.jit
def _near_windows(walk, rows, reaches, SCALE: tl.constexpr):
    """For each of `rows` the sum of the last SCALE < 16, put together from sums over 1, 2, 4 and 8."""
    power, total = rows, rows
    for bit in tl.static_range(4):
        if (SCALE >> bit) & 1 and SCALE % (1 << bit):
            total = _plus_shifted(walk, total, power, reaches, SCALE % (1 << bit))
        elif (SCALE >> bit) & 1:
            total = power
        if SCALE >> (bit + 1):
            power = _plus_shifted(walk, power, power, reaches, 1 << bit)
    return total


@triton.jit
def _behind(walk, i, k, reach, SCALE: tl.constexpr, WIDE: tl.constexpr):
    """The row k positions before i as windows count it, zero if it is of another document than i."""
    row = _load(walk, i - k, 1, WIDE)
    if walk.last is not None:
        row = _over_count(row, _ages(walk, i - k, 1)[0], SCALE)
    return row[0] if walk.ages is None else tl.where(reach >= k, row[0], 0.0)


@triton.jit
def _far_windows(walk, rows, reaches, i, SCALE: tl.constexpr):
    """As `_near_windows`, of SCALE >= len(rows), for position i and the next ones: back over what all of them share,
    on to where one after the other begins, and ahead over the rows after i.
    """
    count: tl.constexpr = len(rows)
    back, backs = rows[0], ()
    for k in range(1, tl.minimum(SCALE - count, i) + 1):
        back += _behind(walk, i, k, reaches[0], SCALE, rows[0].dtype)
    for j in tl.static_range(count):
        if j > 0:
            back += _behind(walk, i, SCALE - count + j, reaches[0], SCALE, rows[0].dtype)
        backs += (back,)
    ahead, out = rows[1], (backs[count - 1],)
    for j in tl.static_range(1, count):
        behind = backs[count - 1 - j]
        if walk.ages is not None:
            behind = tl.where(reaches[j] >= j, behind, 0.0)
        if j > 1:
            ahead = rows[j] + (ahead if walk.ages is None else tl.where(reaches[j] >= 1, ahead, 0.0))
        out += (ahead + behind,)
    return out


@triton.jit
def _trailing(walk, rows, ages, reaches, i, SCALE: tl.constexpr, HALO: tl.constexpr):
    """The means at rows[HALO:], which are those from position i on; reversed, what the means' gradients add up to."""
    if walk.last is not None:
        rows = _over_count(rows, ages, SCALE)
    if len(rows) - HALO >= SCALE:
        sums = _near_windows(walk, rows, reaches, SCALE)[HALO:]
    else:
        sums = _far_windows(walk, rows[HALO:], reaches[HALO:], i, SCALE)
    return _over_count(sums, ages[HALO:], SCALE) if walk.last is None else sums


# ---- hold ----------------------------------------------------------------------------------------------------------


@triton.jit
def _hold(walk, rows, ages, reaches, total, held, SCALE: tl.constexpr):
    """What each row holds, after an open block's sum and the last mean; reversed, what those that hold it add up to."""
    out = ()
    for j in tl.static_range(len(rows)):
        if walk.ages is not None:
            total, held = tl.where(reaches[j] > 0, total, 0.0), tl.where(reaches[j] > 0, held, 0.0)
        total += rows[j]
        ends = (ages[j] + 1) % SCALE == 0
        held = tl.where(ends, total * (1.0 / SCALE), held)
        total = tl.where(ends, 0.0, total)
        out += (held,)
    return out, total, held


# ---- the walk ------------------------------------------------------------------------------------------------------


@triton.jit
def _plus_weighted(mixed, pooled, weight):
    out = ()
    for j in tl.static_range(len(pooled)):
        out += (pooled[j] * weight if len(mixed) == 0 else mixed[j] + pooled[j] * weight,)
    return out


@triton.jit
def _plus_product(total, rows, pooled):
    for j in tl.static_range(len(pooled)):
        # Rows of a block that never completes pool exactly 0, and what x has there is seen by nobody.
        total += tl.where(pooled[j] == 0, 0.0, rows[j] * pooled[j])
    return total


@triton.jit
def _store(out, i, first, rows):
    for j in tl.static_range(len(rows)):
        t = i + j if out.last is None else out.last - i - j
        here = out.inside & (i >= first) & (t >= 0) & (t < out.length)
        tl.store(out.rows + t.to(tl.int64) * out.stride, rows[j], mask=here)


@triton.jit
def _pool(
    walk, out, x, weights, first,
    SCALES: tl.constexpr, START: tl.constexpr, HOLD: tl.constexpr, HALO: tl.constexpr, EARLY: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pool the CHUNK positions from `first` on, at as many scales from SCALES[START] on as there are weights, and mix
    them into out -> for each of these scales the sum of x times the pooled.
    """
    S: tl.constexpr = len(weights)
    zero = tl.zeros(walk.inside.shape, WIDE)
    products, state = (zero,) * S, (zero,) * (2 * S if HOLD else HALO)
    for i in range(tl.maximum(first - EARLY, 0), tl.minimum(first + CHUNK, walk.length), ROWS):
        mixed, now, added = (), (), ()
        rows = _load(walk, i, ROWS, WIDE)
        ages, reaches = _ages(walk, i - HALO, HALO + ROWS)
        if x is not None:  # zero before `first`: another program's
            others = _load(x, tl.where(i < first, -ROWS, i), ROWS, WIDE)
        for s in tl.static_range(S):
            if HOLD:
                pooled, total, held = _hold(
                    walk, rows, ages, reaches, state[2 * s], state[2 * s + 1], SCALES[START + s]
                )
                now += (total, held)
            else:
                pooled = _trailing(walk, state + rows, ages, reaches, i, SCALES[START + s], HALO)
            mixed = _plus_weighted(mixed, pooled, weights[s])
            if x is not None:
                added += (_plus_product(products[s], others, pooled),)
        state = now if HOLD else (state + rows)[ROWS:]
        products = products if x is None else added
        _store(out, i, first, mixed)
    return products


@triton.jit
def _place(width, chunks, blocks, COUNT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its sequence, chunk and channels, which of these exist, and their group of COUNT."""
    program = tl.program_id(0).to(tl.int64)
    block, chunk = program % blocks, program // blocks
    group, block = block % COUNT, block // COUNT
    each, more = width // COUNT, width % COUNT
    low = tl.multiple_of(group * each + tl.minimum(group, more), ALIGNED)
    channels = low + block * BLOCK + tl.arange(0, BLOCK)
    high = tl.multiple_of(low + each + (group < more), ALIGNED)
    return chunk // chunks, (chunk % chunks).to(tl.int32), channels, channels < high, group


@triton.jit
def _weight(weights, s, width, channels, inside, BY_CHANNEL: tl.constexpr, WIDE: tl.constexpr):
    if BY_CHANNEL:
        return tl.load(weights + s * width + channels, mask=inside, other=0).to(WIDE)
    else:
        return tl.load(weights + s).to(WIDE)


@triton.jit(do_not_specialize=["length", "chunks"])
def multiscale_pool_fwd_kernel(
    x, weights, ages, y, stride_b, stride_t, stride_d, length, width, chunks, blocks,
    SCALES: tl.constexpr, HOLD: tl.constexpr, BY_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr, HALO: tl.constexpr,
    EARLY: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    count: tl.constexpr = len(SCALES) if weights is None else 1
    b, chunk, channels, inside, group = _place(width, chunks, blocks, count, ALIGNED, BLOCK)
    ages = None if ages is None else ages + b * length
    walk = Walk(x + b * stride_b + channels * stride_d, stride_t, inside, length, ages, ages, None)
    out = Walk(y + b * length * width + channels, width, inside, length, None, None, None)
    first = chunk * CHUNK
    if weights is None:
        one = tl.full((), 1, WIDE)
        for s in tl.static_range(count):
            if group == s:
                _pool(walk, out, None, (one,), first, SCALES, s, HOLD, HALO, EARLY, CHUNK, ROWS, WIDE)
    else:
        mix = ()
        for s in tl.static_range(len(SCALES)):
            mix += (_weight(weights, s, width, channels, inside, BY_CHANNEL, WIDE),)
        _pool(walk, out, None, mix, first, SCALES, 0, HOLD, HALO, EARLY, CHUNK, ROWS, WIDE)


@triton.jit(do_not_specialize=["length", "chunks"])
def multiscale_pool_bwd_kernel(
    grad, x, weights, ages, reaches, grad_x, partials,
    grad_b, grad_t, grad_d, x_b, x_t, x_d, length, width, chunks, blocks,
    SCALES: tl.constexpr, HOLD: tl.constexpr, BY_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr, HALO: tl.constexpr,
    EARLY: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_x; for the gradient of weights, sums of each program: partials [programs, S] or [B * chunks, S, D]."""
    count: tl.constexpr = len(SCALES) if weights is None else 1
    b, chunk, channels, inside, group = _place(width, chunks, blocks, count, ALIGNED, BLOCK)
    ages = None if ages is None else ages + b * length
    reaches = None if reaches is None else reaches + b * length
    walk = Walk(grad + b * grad_b + channels * grad_d, grad_t, inside, length, ages, reaches, length - 1)
    out = Walk(grad_x + b * length * width + channels, width, inside, length, None, None, length - 1)
    first = chunk * CHUNK
    if weights is None:
        one = tl.full((), 1, WIDE)
        for s in tl.static_range(count):
            if group == s:
                _pool(walk, out, None, (one,), first, SCALES, s, HOLD, HALO, EARLY, CHUNK, ROWS, WIDE)
    else:
        mix = ()
        for s in tl.static_range(len(SCALES)):
            mix += (_weight(weights, s, width, channels, inside, BY_CHANNEL, WIDE),)
        other = Walk(x + b * x_b + channels * x_d, x_t, inside, length, None, None, length - 1)
        products = _pool(walk, out, other, mix, first, SCALES, 0, HOLD, HALO, EARLY, CHUNK, ROWS, WIDE)
        for s in tl.static_range(len(SCALES)):
            if BY_CHANNEL:
                row = (b * chunks + chunk) * len(SCALES) + s
                tl.store(partials + row * width + channels, products[s], mask=inside)
            else:
                tl.store(partials + tl.program_id(0).to(tl.int64) * len(SCALES) + s, tl.sum(products[s]))


# ---- launchers -----------------------------------------------------------------------------------------------------


def chunk_length(early: int) -> int:
    """Positions of a program that sets out `early` ones before: at most an eighth is read twice."""
    return max(64, triton.next_power_of_2(8 * early))


def _plan(
    x: Tensor, weights: Tensor | None, scales: tuple[int, ...], mode: str, channels: int
) -> tuple[int, int, dict]:
    """Chunks of each sequence, blocks of its channels, and the constants of the kernels.

    `channels` for a program of one warp: 4 to a thread keep the forward, and 2 the backward, from spilling registers.
    """
    length, width = x.shape[1:]
    groups = len(scales) if weights is None else 1
    hold = mode == "hold"
    halo = 0 if hold else max([s for s in scales if s <= ROWS], default=1) - 1
    # A held mean is of the last complete block: at most 2 (s - 1) positions before the chunk, wherever blocks begin.
    early = triton.cdiv(2 * (max(scales) - 1) if hold else halo, ROWS) * ROWS
    chunk = min(chunk_length(early), triton.next_power_of_2(max(length, 1)))
    per_group = triton.cdiv(max(width, 1), groups)
    block = min(triton.next_power_of_2(per_group), channels)
    constants = {
        "SCALES": scales,
        "HOLD": hold,
        "BY_CHANNEL": weights is not None and weights.dim() == 2,
        "ALIGNED": 16 if width % (16 * groups) == 0 else 1,
        "HALO": halo,
        "EARLY": early,
        "CHUNK": chunk,
        "ROWS": ROWS,
        "BLOCK": block,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    return triton.cdiv(length, chunk), triton.cdiv(per_group, block) * groups, constants


def _ages_of(reset: Tensor) -> Tensor:
    return positions_since_start(reset, reset.shape[1], reset.device).int()


def forward(x: Tensor, weights: Tensor | None, reset: Tensor | None, scales: Sequence[int], mode: str) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks, blocks, constants = _plan(x, weights, tuple(scales), mode, channels=128)
    ages = None if reset is None else _ages_of(reset)
    weights = None if weights is None else weights.contiguous()
    sizes = *x.stride(), *x.shape[1:], chunks, blocks
    grid = (x.shape[0] * chunks * blocks,)
    launch("multiscale_pool", multiscale_pool_fwd_kernel, grid, x, weights, ages, y, *sizes, num_warps=1, **constants)
    return y


def backward(
    grad: Tensor, x: Tensor | None, weights: Tensor | None, reset: Tensor | None, scales: Sequence[int], mode: str
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    chunks, blocks, constants = _plan(grad, weights, tuple(scales), mode, channels=64)
    ages = reaches = partials = None
    if reset is not None:
        last = torch.cat([reset[:, 1:], torch.ones_like(reset[:, :1])], 1)
        ages, reaches = _ages_of(reset), _ages_of(last.flip(1)).flip(1)
    programs = grad.shape[0] * chunks * blocks
    if weights is not None:
        weights = weights.contiguous()
        shape = (programs, len(scales)) if weights.dim() == 1 else (grad.shape[0] * chunks, *weights.shape)
        partials = torch.empty(shape, dtype=wide_dtype(grad.dtype), device=grad.device)
    strides = *grad.stride(), *((0, 0, 0) if weights is None or x is None else x.stride())
    arguments = grad, x, weights, ages, reaches, grad_x, partials, *strides, *grad.shape[1:], chunks, blocks
    launch("multiscale_pool", multiscale_pool_bwd_kernel, (programs,), *arguments, num_warps=1, **constants)
    if weights is None or partials is None:
        return grad_x, grad.new_empty(0)
    return grad_x, partials.sum(0).to(weights.dtype)
