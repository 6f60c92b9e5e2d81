"""Triton kernels of `neighbor_cross_entropy`: one launch forward, one backward for the hidden state, one for the head.

A program gathers the candidates' rows of weight for several rows of hidden, [BLOCK_R, BLOCK_J, BLOCK_D] at a time. The
head's gradient takes no atomics: the backward kernel leaves dz of every (row, slot) pair with its class, a stable sort
brings the pairs of a class together, and each class is added up by programs of its own, in the order of the pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch, multiprocessors

OP = "neighbor_cross_entropy"
TILE = 4096  # elements of a program's tile, 32 a thread
BLOCK_PAIRS = 32
MAX_SPLITS = 64


@triton.jit
def _slots(candidates, target, r, inside, cs0, cs1, ts0, ts1, V, J: tl.constexpr, BLOCK_J: tl.constexpr):
    """Candidates [BLOCK_R, BLOCK_J], which of them are there, and which of those are targets."""
    j = tl.arange(0, BLOCK_J)
    here = inside[:, None] & (j < J)[None, :]
    c = tl.load(candidates + (r[:, None] * cs0 + j[None, :] * cs1), mask=here, other=-1).to(tl.int64)
    tl.device_assert(c < V, "a candidate is not below the number of classes")
    valid = (c >= 0) & (c < V)
    true = tl.load(target + (r[:, None] * ts0 + j[None, :] * ts1), mask=here, other=0) != 0
    return c, valid, true & valid


@triton.jit
def _gather(weight, c, valid, d, D: tl.constexpr, ws0, ws1):
    """Rows of weight, [BLOCK_R, BLOCK_J, BLOCK_D]; 0 in empty slots."""
    offsets = (c * ws0)[:, :, None] + (d.to(tl.int64) * ws1)[None, None, :]
    return tl.load(weight + offsets, mask=valid[:, :, None] & (d < D)[None, None, :], other=0.0)


@triton.jit(do_not_specialize=["rows"])
def neighbor_cross_entropy_fwd_kernel(
    loss, counted, argmax, correct,  # [rows]
    log_probs,  # [rows, J]
    hidden,  # [rows, D]
    weight,  # [V, D]
    bias,  # [V] or None
    candidates, target,  # [rows, J]
    smoothing,
    rows, V, hs0, hs1, ws0, ws1, bs, cs0, cs1, ts0, ts1,
    D: tl.constexpr, J: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    c, valid, true = _slots(candidates, target, r, inside, cs0, cs1, ts0, ts1, V, J, BLOCK_J)
    products = tl.zeros([BLOCK_R, BLOCK_J, BLOCK_D], WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(
            hidden + (r[:, None] * hs0 + d.to(tl.int64)[None, :] * hs1), inside[:, None] & (d < D)[None, :], 0.0
        )
        products += _gather(weight, c, valid, d, D, ws0, ws1).to(WIDE) * h.to(WIDE)[:, None, :]
    z = tl.sum(products, 2)
    if bias is not None:
        z += tl.load(bias + c * bs, mask=valid, other=0.0).to(WIDE)
    z = tl.where(valid, z, float("-inf"))
    top = tl.max(z, 1)
    origin = tl.where(top == float("-inf"), 0.0, top)
    logp = z - origin[:, None] - tl.log(tl.sum(tl.exp(z - origin[:, None]), 1))[:, None]
    targets, slots = tl.sum(true.to(tl.int32), 1), tl.sum(valid.to(tl.int32), 1)
    hit = tl.sum(tl.where(true, logp, 0.0), 1) / tl.maximum(targets, 1).to(WIDE)
    mean = tl.sum(tl.where(valid, logp, 0.0), 1) / tl.maximum(slots, 1).to(WIDE)
    value = tl.where(smoothing > 0, (smoothing - 1) * hit - smoothing * mean, -hit)
    best = tl.argmax(tl.where(z == z, z, float("inf")), 1)
    j = tl.arange(0, BLOCK_J)[None, :]
    won = tl.max((true & (j == best[:, None])).to(tl.int32), 1)
    tl.store(loss + r, tl.where(targets > 0, value, 0.0), mask=inside)
    tl.store(counted + r, targets > 0, mask=inside)
    tl.store(argmax + r, best.to(tl.int64), mask=inside)
    tl.store(correct + r, won > 0, mask=inside)
    tl.store(log_probs + (r[:, None] * J + j), tl.where(valid, logp, float("-inf")), mask=inside[:, None] & (j < J))


@triton.jit(do_not_specialize=["rows"])
def neighbor_cross_entropy_bwd_kernel(
    d_hidden,  # [rows, D] or None
    d_z,  # [rows, J] or None
    classes,  # [rows, J] int32, or None: of each pair the class that it adds to, V if none
    grad,  # [rows]
    weight,  # [V, D]
    candidates, target, log_probs,  # [rows, J]
    smoothing,
    rows, V, gs, ws0, ws1, cs0, cs1, ts0, ts1,
    D: tl.constexpr, J: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    c, valid, true = _slots(candidates, target, r, inside, cs0, cs1, ts0, ts1, V, J, BLOCK_J)
    targets, slots = tl.sum(true.to(tl.int32), 1), tl.sum(valid.to(tl.int32), 1)
    valid = valid & (targets > 0)[:, None]
    pairs = r[:, None] * J + tl.arange(0, BLOCK_J)[None, :]
    dz = tl.exp(tl.load(log_probs + pairs, mask=valid, other=0.0))
    dz -= tl.where(true, ((1 - smoothing) / tl.maximum(targets, 1).to(WIDE))[:, None], 0.0)
    dz -= (smoothing / tl.maximum(slots, 1).to(WIDE))[:, None]
    g = tl.load(grad + r * gs, mask=inside & (targets > 0), other=0.0).to(WIDE)
    dz = tl.where(valid, dz * g[:, None], 0.0)
    if d_z is not None:
        slot = inside[:, None] & (tl.arange(0, BLOCK_J) < J)[None, :]
        tl.store(d_z + pairs, dz, mask=slot)
        tl.store(classes + pairs, tl.where(valid, c, V).to(tl.int32), mask=slot)
    if d_hidden is not None:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            value = tl.sum(_gather(weight, c, valid, d, D, ws0, ws1).to(WIDE) * dz[:, :, None], 1)
            here = inside[:, None] & (d < D)[None, :]
            tl.store(d_hidden + (r[:, None] * D + d[None, :]), value.to(d_hidden.dtype.element_ty), mask=here)


@triton.jit
def neighbor_cross_entropy_head_kernel(
    d_weight,  # [splits, V, D] or None
    d_bias,  # [splits, V] or None
    hidden,  # [rows, D]
    d_z,  # [rows * J]
    pairs,  # [rows * J] int64, those of a class one after the other
    ends,  # [V + 1] int64: where the pairs of a class begin, and of the next
    V, hs0, hs1,
    D: tl.constexpr, J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    v, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(ends + v), tl.load(ends + v + 1)
    share = (end - begin + SPLITS - 1) // SPLITS
    begin, end = begin + split * share, tl.minimum(end, begin + (split + 1) * share)
    products, sums = tl.zeros([BLOCK_P, BLOCK_D], WIDE), tl.zeros([BLOCK_P], WIDE)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        pair = tl.load(pairs + p, mask=p < end, other=0)
        dz = tl.load(d_z + pair, mask=p < end, other=0.0)
        sums += dz
        if d_weight is not None:
            offsets = (pair // J)[:, None] * hs0 + d.to(tl.int64)[None, :] * hs1
            h = tl.load(hidden + offsets, mask=(p < end)[:, None] & (d < D)[None, :], other=0.0)
            products += dz[:, None] * h.to(WIDE)
    if d_weight is not None:
        value = tl.sum(products, 0).to(d_weight.dtype.element_ty)
        tl.store(d_weight + ((split * V + v) * D + d), value, mask=d < D)
    if d_bias is not None:
        first = tl.program_id(2) == 0
        tl.store(d_bias + split * V + v, tl.sum(sums, 0), mask=first)


# ---------------------------------------------------------------------------------------------------------- launchers


def _blocks(rows: int, slots: int, width: int, device: torch.device) -> dict[str, int]:
    block_j, block_d = triton.next_power_of_2(slots), min(64, triton.next_power_of_2(width))
    block_r = min(64, TILE // (block_j * block_d))
    while block_r > 1 and triton.cdiv(rows, block_r) < multiprocessors(device):
        block_r //= 2
    return {"D": width, "J": slots, "BLOCK_R": block_r, "BLOCK_J": block_j, "BLOCK_D": block_d}


def _triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, candidates: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    rows = candidates.shape[0]
    loss, log_probs = hidden.new_empty(rows, dtype=wide), hidden.new_empty(candidates.shape, dtype=wide)
    counted, correct = (candidates.new_empty(rows, dtype=torch.bool) for _ in range(2))
    argmax = candidates.new_empty(rows, dtype=torch.int64)
    blocks = _blocks(rows, candidates.shape[1], hidden.shape[1], hidden.device)
    outputs, inputs = (loss, counted, argmax, correct, log_probs), (hidden, weight, bias, candidates, target)
    strides = *hidden.stride(), *weight.stride(), *(bias.stride() if bias is not None else (0,))
    scalars = label_smoothing, rows, weight.shape[0], *strides, *candidates.stride(), *target.stride()
    grid, constants = (triton.cdiv(rows, blocks["BLOCK_R"]),), blocks | {"WIDE": _triton_type(wide)}
    launch(OP, neighbor_cross_entropy_fwd_kernel, grid, *outputs, *inputs, *scalars, num_warps=4, **constants)
    return outputs


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    target: Tensor,
    log_probs: Tensor,
    label_smoothing: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    head = wants[1] or wants[2]
    d_hidden = hidden.new_empty(hidden.shape if wants[0] else 0)
    d_z = log_probs.new_empty(candidates.shape if head else 0)
    classes = candidates.new_empty(d_z.shape, dtype=torch.int32)
    outputs = d_hidden if wants[0] else None, d_z if head else None, classes if head else None
    (rows, slots), width = candidates.shape, hidden.shape[1]
    blocks = _blocks(rows, slots, width, hidden.device)
    inputs = grad, weight, candidates, target, log_probs
    strides = *grad.stride(), *weight.stride(), *candidates.stride(), *target.stride()
    scalars = label_smoothing, hidden.shape[0], weight.shape[0], *strides
    grid, constants = (
        (triton.cdiv(hidden.shape[0], blocks["BLOCK_R"]),),
        blocks | {"WIDE": _triton_type(log_probs.dtype)},
    )
    launch(OP, neighbor_cross_entropy_bwd_kernel, grid, *outputs, *inputs, *scalars, num_warps=4, **constants)
    return d_hidden, *_head_gradients(hidden, weight, d_z, classes, wants)


def _head_gradients(
    hidden: Tensor, weight: Tensor, d_z: Tensor, classes: Tensor, wants: list[bool]
) -> tuple[Tensor, Tensor]:
    """d_weight, d_bias from dz of the pairs and the class of each; a class is split where classes are few."""
    (vocabulary, width), wide = weight.shape, d_z.dtype
    if not (wants[1] or wants[2]):
        return weight.new_empty(0), d_z.new_empty(0)
    ordered, pairs = torch.sort(classes.flatten(), stable=True)
    ends = torch.searchsorted(ordered, torch.arange(vocabulary + 1, dtype=torch.int32, device=ordered.device))
    block_d = min(64, triton.next_power_of_2(width))
    parts = triton.cdiv(width, block_d) if wants[1] else 1
    enough = 4 * multiprocessors(hidden.device) // (vocabulary * parts)  # programs for every multiprocessor
    splits = max(1, min(MAX_SPLITS, enough, pairs.numel() // (vocabulary * BLOCK_PAIRS)))
    d_weight = d_z.new_empty((splits, *weight.shape) if wants[1] else 0, dtype=weight.dtype if splits == 1 else wide)
    d_bias = d_z.new_empty((splits, vocabulary) if wants[2] else 0)
    outputs = d_weight if wants[1] else None, d_bias if wants[2] else None
    constants = {"D": width, "J": d_z.shape[1], "BLOCK_P": BLOCK_PAIRS, "BLOCK_D": block_d}
    constants |= {"SPLITS": splits, "WIDE": _triton_type(wide)}
    args = *outputs, hidden, d_z, pairs, ends, vocabulary, *hidden.stride()
    launch(OP, neighbor_cross_entropy_head_kernel, (vocabulary, splits, parts), *args, num_warps=4, **constants)
    d_weight, d_bias = ((t[0] if splits == 1 else t.sum(0)) if t.numel() else t for t in (d_weight, d_bias))
    return d_weight.to(weight.dtype), d_bias
