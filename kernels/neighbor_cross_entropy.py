"""Cross-entropy of a linear head over a few candidate classes per row: scores J of the V classes and never the others.

With S the candidates of row i, O the targets among them, a the label smoothing:

    z_j  = <hidden_i, weight[candidate_j]> + bias[candidate_j]
    lse  = log sum_{j in S} exp(z_j)
    loss = lse - (1 - a) / |O| * sum_{j in O} z_j - a / |S| * sum_{j in S} z_j
    dz_j = softmax_S(z)_j - (1 - a) / |O| * [j in O] - a / |S|

In a maze, a cell has at most 4 neighbours among up to 900 cells: 4 D multiplications a row in place of 900 D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import fused_op
from kernels.masked_cross_entropy import check_integer, check_label_smoothing, reduce_rows

CHUNK_ELEMENTS = 1 << 20  # of the gathered rows of weight [r, J, D]
MAX_CANDIDATES = 24  # the cells within 3 steps


class NeighborCE(NamedTuple):
    """loss: 0-d. argmax [R]: the best candidate's slot, 0..J-1. correct [R] bool: that slot is a true target."""

    loss: Tensor
    argmax: Tensor
    correct: Tensor


# ---------------------------------------------------------------------------------------------------- PyTorch fallback


def _row_chunks(candidates: Tensor, width: int) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, candidates.shape[1] * width))
    for start in range(0, candidates.shape[0], rows):
        yield slice(start, start + rows)


def _lookup(candidates: Tensor) -> Tensor:
    """Indices to gather by: an empty slot repeats a candidate of its row, so that it reads nothing the row doesn't."""
    return torch.where(candidates < 0, candidates.amax(1, keepdim=True).clamp(min=0), candidates)


def _true_targets(candidates: Tensor, target: Tensor) -> Tensor:
    return target & (candidates >= 0)


def _is_true(true: Tensor, argmax: Tensor) -> Tensor:
    return true.gather(1, argmax.unsqueeze(1)).squeeze(1)


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


@fused_op("neighbor_cross_entropy", "neighbor_cross_entropy:forward")
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, candidates: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [R], counted [R] (a candidate is a target), argmax [R], correct [R], log_probs [R, J].

    The loss is 0 where not counted, and log_probs are -inf in empty slots.
    """
    wide, candidates = _wide(hidden, weight), candidates.long()
    scores = hidden.new_empty(candidates.shape, dtype=wide)
    for rows in _row_chunks(candidates, hidden.shape[1]):
        index = _lookup(candidates[rows])
        # Products and sums rather than a matmul: autocast would round those to bf16.
        scores[rows] = F.embedding(index, weight).to(wide).mul_(hidden[rows].to(wide).unsqueeze(1)).sum(-1)
        if bias is not None:
            scores[rows] += bias[index]
    valid, true = candidates >= 0, _true_targets(candidates, target)
    scores.masked_fill_(~valid, -math.inf)
    log_probs = torch.log_softmax(scores, -1).masked_fill(~valid, -math.inf)
    loss = (label_smoothing - 1) * log_probs.masked_fill(~true, 0).sum(-1) / true.sum(-1)
    if label_smoothing:
        loss -= label_smoothing * log_probs.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)
    counted, argmax = true.any(-1), scores.argmax(-1)
    return loss.masked_fill(~counted, 0), counted, argmax, _is_true(true, argmax), log_probs


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, candidates: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, rows = _wide(hidden, weight), candidates.shape[:1]
    counted, correct = (candidates.new_empty(rows, dtype=torch.bool) for _ in range(2))
    argmax = candidates.new_empty(rows, dtype=torch.int64)
    return hidden.new_empty(rows, dtype=wide), counted, argmax, correct, hidden.new_empty(candidates.shape, dtype=wide)


def _gradient_shapes(hidden: Tensor, weight: Tensor, wants: list[bool]) -> list[torch.Size | int]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [shape if wanted else 0 for shape, wanted in zip(shapes, wants, strict=True)]


@fused_op("neighbor_cross_entropy_bwd", "neighbor_cross_entropy:backward")
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    target: Tensor,
    log_probs: Tensor,
    label_smoothing: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [R] of the row losses -> d_hidden and d_weight in the dtypes of these, d_bias wide; empty if not wanted.

    index_add_ takes the rows in order on a CPU: the same bits each time. (On CUDA it uses atomics.)
    """
    wide, candidates = log_probs.dtype, candidates.long()
    d_hidden, d_weight, d_bias = (hidden.new_zeros(s, dtype=wide) for s in _gradient_shapes(hidden, weight, wants))
    for rows in _row_chunks(candidates, hidden.shape[1]):
        valid, true = candidates[rows] >= 0, _true_targets(candidates[rows], target[rows])
        counted = true.any(-1, keepdim=True)
        d_z = log_probs[rows].exp()
        d_z -= true * ((1 - label_smoothing) / true.sum(-1, keepdim=True, dtype=wide))
        if label_smoothing:
            d_z -= label_smoothing / valid.sum(-1, keepdim=True, dtype=wide)
        d_z = d_z.mul_(grad[rows].unsqueeze(-1)).masked_fill_(~(valid & counted), 0)
        index = _lookup(candidates[rows])
        if wants[0]:
            gathered = F.embedding(index, weight).to(wide).mul_(d_z.unsqueeze(-1))
            d_hidden[rows] = gathered.sum(1).masked_fill_(~counted, 0)
        if wants[1]:
            h = hidden[rows].to(wide).masked_fill(~counted, 0)
            d_weight.index_add_(0, index.flatten(), (d_z.unsqueeze(-1) * h.unsqueeze(1)).flatten(0, 1))
        if wants[2]:
            d_bias.index_add_(0, index.flatten(), d_z.flatten())
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias


@_backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    target: Tensor,
    log_probs: Tensor,
    label_smoothing: float,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    dtypes = hidden.dtype, weight.dtype, log_probs.dtype
    shapes = _gradient_shapes(hidden, weight, wants)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


# ------------------------------------------------------------------------------------------------------- autograd glue


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, candidates, target, ctx.label_smoothing = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, candidates, target, output[-1])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wants = list(ctx.needs_input_grad[:3])
    d_hidden, d_weight, d_bias = _backward_op(grad, *ctx.saved_tensors, ctx.label_smoothing, wants)
    gradients = d_hidden, d_weight, d_bias.to(ctx.bias_dtype or d_bias.dtype)
    return *(g if wanted else None for g, wanted in zip(gradients, wants, strict=True)), None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------- public functions


def neighbor_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> NeighborCE:
    """Cross-entropy over each row's candidates: `masked_cross_entropy` over logits [R, V] that are valid only there.

    A row is counted if a candidate is a target; a row that is not gives loss 0 and gradient 0, whatever it holds.

    Args:
        hidden: [R, D] floating.
        weight, bias: [V, D] and [V] or None, floating. All arithmetic is fp32 or better, under autocast too.
        candidates: [R, J] integer, J <= 24, the classes of a row, distinct; below 0 is an empty slot.
        target: [R, J] bool: the true candidates, equally likely. Ignored in empty slots.
        label_smoothing: a in [0, 1]; each candidate gets a / (number of candidates).
        row_weight: [R], a factor on each row's loss. Differentiable.
        num_items: the divisor: a 0-d integer tensor or an int, at least 1 is used. Default: the counted rows.

    Returns:
        NeighborCE(loss, argmax, correct): loss = sum(row_weight * row loss) / num_items in fp32 (float64 where an input
        is); argmax [R] int64, the slot of the best score (0 for a row without candidates); correct [R] bool, False for
        rows that are not counted.

    Raises:
        TypeError, ValueError: wrong dtype, shape or option.
        IndexError: a candidate >= V (from the lookup; the Triton kernels take it for an empty slot, or stop at it when
            compiled with device assertions).
        RuntimeError: when differentiated twice.
    """
    _check(hidden, weight, bias, candidates, target, row_weight, label_smoothing)
    losses, counted, argmax, correct, _ = _forward(hidden, weight, bias, candidates, target, label_smoothing)
    loss = reduce_rows(losses, counted, weight=row_weight, reduction="mean", num_items=num_items)
    return NeighborCE(loss, argmax, correct)


def neighbor_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> NeighborCE:
    """`neighbor_cross_entropy` in plain differentiable PyTorch and in the caller's dtype: the truth for tests."""
    _check(hidden, weight, bias, candidates, target, row_weight, label_smoothing)
    valid, true = candidates >= 0, _true_targets(candidates, target)
    counted = true.any(-1)
    index = _lookup(candidates.long())
    scores = (weight[index] * hidden.unsqueeze(1)).sum(-1)
    if bias is not None:
        scores = scores + bias[index]
    argmax = scores.detach().masked_fill(~valid, -math.inf).argmax(-1)
    kept = scores.masked_fill(~valid, -math.inf).masked_fill(~counted.unsqueeze(-1), 0)
    log_probs = torch.log_softmax(kept, -1)
    hit = log_probs.masked_fill(~true, 0).sum(-1) / true.sum(-1).clamp(min=1)
    smooth = log_probs.masked_fill(~valid, 0).sum(-1) / valid.sum(-1).clamp(min=1)
    losses = -(1 - label_smoothing) * hit - label_smoothing * smooth
    losses = losses.masked_fill(~counted, 0)
    loss = reduce_rows(losses, counted, weight=row_weight, reduction="mean", num_items=num_items)
    return NeighborCE(loss, argmax, _is_true(true, argmax))


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    label_smoothing: float,
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias), ("row_weight", row_weight)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    check_integer("candidates", candidates)
    check_label_smoothing(label_smoothing)
    if target.dtype != torch.bool:
        raise TypeError(f"target must be bool [R, J], got {target.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [R, D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} must be [V] for weight {list(weight.shape)}")
    rows = hidden.shape[0]
    if candidates.dim() != 2 or candidates.shape[0] != rows or not 1 <= candidates.shape[1] <= MAX_CANDIDATES:
        raise ValueError(f"candidates {list(candidates.shape)} must be [{rows}, J] with J in 1..{MAX_CANDIDATES}")
    if target.shape != candidates.shape:
        raise ValueError(f"target {list(target.shape)} must have the shape of candidates {list(candidates.shape)}")
    if row_weight is not None and row_weight.shape != (rows,):
        raise ValueError(f"row_weight {list(row_weight.shape)} must be [{rows}]")
