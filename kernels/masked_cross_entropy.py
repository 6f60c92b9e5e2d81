"""Log-softmax and cross-entropy over the valid classes only.

With S the valid classes of a row, y its target and a the label smoothing:

    lse  = log sum_{c in S} exp(x_c)
    loss = lse - (1 - a) * x_y - a / |S| * sum_{c in S} x_c
    dx_c = softmax_S(x)_c - (1 - a) * [c = y] - a / |S|     for c in S, 0 elsewhere

The usual recipe fills invalid slots with -1e4 and smooths over all C classes (Szegedy et al., arXiv 1512.00567), which
adds a * (C - |S|) / C * 1e4 to the loss. Here the smoothing mass stays on the valid classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import fused_op

CHUNK_ELEMENTS = 1 << 18  # a thread's, 1 MiB in fp32: all passes over a piece and its mask find it in cache
LOG2_E = math.log2(math.e)
INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
MANTISSA_BITS = {torch.float32: 23, torch.float64: 52}


# ---------------------------------------------------------------------------------------------------- PyTorch fallback
#
# The time goes to branches and to fresh memory, not to arithmetic. On one core of an Ice Lake, with a random mask,
# torch.where and masked_fill mispredict a branch per element and take 3.8 ns where bit operations take 0.4; torch.exp
# takes 10 ns for a result that underflows, exp2 always 0.3. So masks act on bits, in buffers that stay in cache.


def _cuts(shape: torch.Size, limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut [R, ..., C] into whole rows, at most `limit` elements together; broadcast masks stay so."""
    rows = limit // max(1, math.prod(shape[1:]))
    for start in range(0, shape[0], max(1, rows)):
        outer = slice(start, start + max(1, rows))
        if rows or len(shape) == 2:
            yield (outer,)
        else:
            yield from ((outer, *inner) for inner in _cuts(shape[1:], limit))


def _pieces(logits: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Cuts of the logits, each with two buffers of its shape, fp32 or better and as wide an integer, shared by all."""
    wide = _wide(logits)
    limit = CHUNK_ELEMENTS * torch.get_num_threads()
    size = min(logits.numel(), max(limit, logits.shape[-1]))
    floats, integers = (logits.new_empty(size, dtype=dtype) for dtype in (wide, INTEGER[wide]))
    for piece in _cuts(logits.shape, limit):
        shape = logits[piece].shape
        x, ones = (buffer[: math.prod(shape)].view(shape) for buffer in (floats, integers))
        yield piece, x, ones


def _select(x: Tensor, ones: Tensor, out: Tensor) -> Tensor:
    """x in the dtype of `out`, and 0 in place of what it holds, be it NaN, where `ones` has no bits."""
    torch.bitwise_and(x.to(out.dtype).view(ones.dtype), ones, out=out.view(ones.dtype))
    return out


def _valid_only(logits: Tensor, valid: Tensor, x: Tensor, ones: Tensor) -> Tensor:
    """Fill x with the logits, -inf where invalid: its sign and exponent bits. `ones` gets all bits where valid."""
    _select(logits, ones.copy_(valid.view(torch.int8).neg()), out=x)
    x.view(ones.dtype).bitwise_or_(ones.bitwise_not().bitwise_left_shift_(MANTISSA_BITS[x.dtype]))
    return x


def _classes(valid: Tensor) -> Tensor:
    """The number of valid classes of each row, [..., 1]; a third of the time of a sum over bool."""
    return valid.view(torch.uint8).sum(-1, keepdim=True, dtype=torch.int32)


@fused_op("masked_log_softmax", "masked_cross_entropy:log_softmax")
def _log_softmax_fwd(logits: Tensor, valid: Tensor) -> Tensor:
    """logits, valid [R, ..., C] -> log_probs [R, ..., C]."""
    log_probs = logits.new_empty(logits.shape)
    for piece, x, ones in _pieces(logits):
        _valid_only(logits[piece], valid[piece], x, ones)
        x[..., :1].masked_fill_(_classes(valid[piece]) == 0, 0)  # a row of -inf alone would turn into NaN
        log_probs[piece] = torch.log_softmax(x, -1)
    log_probs[..., 0].masked_fill_(~valid[..., 0], -math.inf)
    return log_probs


@fused_op("masked_log_softmax_bwd", "masked_cross_entropy:log_softmax_backward")
def _log_softmax_bwd(grad: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    """grad [R, ..., C] of the log-probabilities -> gradient of the logits."""
    d_logits = logits.new_empty(logits.shape)
    for piece, x, ones in _pieces(logits):
        probs = torch.softmax(_valid_only(logits[piece], valid[piece], x, ones), -1)
        g = _select(grad[piece], ones, out=x)
        g.sub_(probs.mul_(g.sum(-1, keepdim=True)))
        d_logits[piece] = _select(g, ones, out=g)
    return d_logits


@fused_op("masked_cross_entropy", "masked_cross_entropy:cross_entropy")
def _cross_entropy_fwd(
    logits: Tensor, valid: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, valid [R, ..., C], target [R, ...] -> loss, counted, lse [R, ...].

    loss and lse are fp32 or better and 0 where `counted`, a bool, is false.
    """
    seen = target != ignore_index
    y = target.long().masked_fill(~seen, 0).unsqueeze(-1)
    counted = seen & valid.gather(-1, y).squeeze(-1)
    wanted = logits.gather(-1, y).to(_wide(logits))
    # Relative to the target's logit the greatest is at least 0, also if invalid slots hold 0.
    origin = wanted.masked_fill(wanted == -math.inf, 0)
    loss, lse = torch.empty_like(origin), torch.empty_like(origin)
    for piece, x, ones in _pieces(logits):
        ones.copy_(valid[piece].view(torch.int8).neg())
        torch.sub(logits[piece].to(x.dtype), origin[piece], out=x)
        top = _select(x, ones, out=x).amax(-1, keepdim=True)
        if label_smoothing:
            mean = x.sum(-1, keepdim=True).div_(_classes(valid[piece]))
        torch.add(top * -LOG2_E, x, alpha=LOG2_E, out=x).exp2_()
        log_sum = _select(x, ones, out=x).sum(-1, keepdim=True).log_().add_(top)
        lse[piece] = log_sum + origin[piece]
        loss[piece] = log_sum - (1 - label_smoothing) * (wanted[piece] - origin[piece])
        if label_smoothing:
            loss[piece] -= label_smoothing * mean
    loss, lse = (t.squeeze(-1).masked_fill_(~counted, 0) for t in (loss, lse))
    return loss, counted, lse


@fused_op("masked_cross_entropy_bwd", "masked_cross_entropy:cross_entropy_backward")
def _cross_entropy_bwd(
    grad: Tensor, logits: Tensor, valid: Tensor, target: Tensor, counted: Tensor, lse: Tensor, label_smoothing: float
) -> Tensor:
    """grad [R, ...] of the row losses -> gradient of the logits, rounded to their dtype once."""
    d_logits = logits.new_empty(logits.shape)
    grad, sign, minus_lse = (
        grad.unsqueeze(-1),
        counted.view(torch.int8).neg().unsqueeze(-1),
        lse.unsqueeze(-1) * -LOG2_E,
    )
    y = target.long().masked_fill(~counted, 0).unsqueeze(-1)
    for piece, x, ones in _pieces(logits):
        d_x = d_logits[piece] if d_logits.dtype == x.dtype else x
        torch.add(minus_lse[piece], logits[piece].to(x.dtype), alpha=LOG2_E, out=d_x).exp2_()
        if label_smoothing:
            d_x.sub_(label_smoothing / _classes(valid[piece]).to(x.dtype))
        d_x.scatter_add_(-1, y[piece], x.new_full((), label_smoothing - 1).expand(y[piece].shape))
        ones.copy_(valid[piece].view(torch.int8) * sign[piece])
        _select(d_x.mul_(grad[piece]), ones, out=d_x)
        if d_x is x:
            d_logits[piece] = x
    return d_logits


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


@_log_softmax_fwd.register_fake
def _(logits: Tensor, valid: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@_log_softmax_bwd.register_fake
def _(grad: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@_cross_entropy_fwd.register_fake
def _(
    logits: Tensor, valid: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse = (logits.new_empty(target.shape, dtype=_wide(logits)) for _ in range(2))
    return loss, target.new_empty(target.shape, dtype=torch.bool), lse


@_cross_entropy_bwd.register_fake
def _(
    grad: Tensor, logits: Tensor, valid: Tensor, target: Tensor, counted: Tensor, lse: Tensor, label_smoothing: float
) -> Tensor:
    return logits.new_empty(logits.shape)


# ------------------------------------------------------------------------------------------------------- autograd glue


def _log_softmax_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _log_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _log_softmax_bwd(grad, *ctx.saved_tensors), None


def _cross_entropy_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, valid, target, ctx.label_smoothing, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, valid, target, *output[1:])


def _cross_entropy_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _cross_entropy_bwd(grad, *ctx.saved_tensors, ctx.label_smoothing), None, None, None, None


_log_softmax_fwd.register_autograd(_log_softmax_backward, setup_context=_log_softmax_context)
_cross_entropy_fwd.register_autograd(_cross_entropy_backward, setup_context=_cross_entropy_context)
# The cross-entropy needs no such rule: it reads low-precision logits, works in fp32 and returns fp32.
for _device in ("cpu", "cuda"):
    _log_softmax_fwd.register_autocast(_device, torch.float32)


# ---------------------------------------------------------------------------------------------------- public functions


def masked_log_softmax(logits: Tensor, valid: Tensor, *, dim: int = -1) -> Tensor:
    """Log-softmax of each row over its valid classes.

    Args:
        logits: [..., C] floating; the classes are along `dim`. The arithmetic is fp32 or better.
        valid: bool, broadcastable to `logits`.

    Returns:
        log_probs [..., C] in the dtype of `logits` (fp32 under autocast): -inf where invalid. A row with no valid class
        is all -inf and has zero gradient. What an invalid slot holds, even NaN, never shows; NaN in a valid one does.

    Raises:
        TypeError, ValueError: wrong dtype, a `valid` that does not broadcast, no classes.
        RuntimeError: when differentiated twice.
    """
    valid = _checked_mask(logits, valid)
    if logits.dim() == 1:
        return _log_softmax_fwd(logits[None], valid[None])[0]
    return _log_softmax_fwd(logits.movedim(dim, -1), valid.movedim(dim, -1)).movedim(-1, dim)


def masked_log_softmax_reference(logits: Tensor, valid: Tensor, *, dim: int = -1) -> Tensor:
    """`masked_log_softmax` in plain differentiable PyTorch and in the caller's dtype: the truth for tests."""
    valid = _checked_mask(logits, valid)
    any_valid = valid.any(dim, keepdim=True)
    x = logits.masked_fill(~valid, -math.inf).masked_fill(~any_valid, 0)  # a row of -inf alone would be NaN
    return torch.log_softmax(x, dim).masked_fill(~valid, -math.inf)


def masked_cross_entropy(
    logits: Tensor,
    valid: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of each row over its valid classes, label smoothing spread over the valid classes only.

    A row is counted unless its target is `ignore_index`, its target is itself invalid, or it has no valid class. A row
    that is not counted has loss 0 and gradient 0, whatever it holds.

    Args:
        logits: [..., C] floating. The arithmetic is fp32 or better.
        valid: bool, broadcastable to `logits`.
        target: [...] integer.
        label_smoothing: a in [0, 1]; each valid class gets a / (number of valid classes).
        weight: broadcastable to `target`, a factor on each row's loss. Differentiable.
        reduction: "mean" is sum(weight * loss) / num_items, "sum", or "none" for [...].
        num_items: the divisor of "mean": a 0-d integer tensor or an int, at least 1 is used. Default: the counted rows.

    Returns:
        The loss in fp32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: wrong dtype, shape or option.
        RuntimeError: a target outside 0..C-1 that is not `ignore_index` (from torch.gather; the Triton kernels don't
            count such a row, or stop at it when compiled with device assertions), or differentiated twice.
    """
    valid = _checked_mask(logits, valid)
    _check_target(logits, target, label_smoothing)
    rows = logits, valid, target
    if target.dim() == 0:
        rows = logits[None], valid[None], target[None]
    losses, counted, _ = (t.reshape(target.shape) for t in _cross_entropy_fwd(*rows, label_smoothing, ignore_index))
    return reduce_rows(losses, counted, weight=weight, reduction=reduction, num_items=num_items)


def masked_cross_entropy_reference(
    logits: Tensor,
    valid: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | int | None = None,
) -> Tensor:
    """`masked_cross_entropy` in plain differentiable PyTorch and in the caller's dtype: the truth for tests."""
    valid = _checked_mask(logits, valid)
    y = target.long().masked_fill(target == ignore_index, 0).unsqueeze(-1)
    counted = (target != ignore_index) & valid.gather(-1, y).squeeze(-1)
    x = logits.masked_fill(~counted.unsqueeze(-1), 0)
    log_probs = torch.log_softmax(x.masked_fill(~valid, -math.inf), -1).masked_fill(~valid, 0)
    smooth = log_probs.sum(-1) / valid.sum(-1).clamp(min=1)
    losses = -(1 - label_smoothing) * log_probs.gather(-1, y).squeeze(-1) - label_smoothing * smooth
    return reduce_rows(
        losses.masked_fill(~counted, 0), counted, weight=weight, reduction=reduction, num_items=num_items
    )


def reduce_rows(
    losses: Tensor, counted: Tensor, *, weight: Tensor | None, reduction: str, num_items: Tensor | int | None
) -> Tensor:
    """Weight and reduce row losses [...] that are 0 where not `counted`, and stay so even if the weight is NaN."""
    if weight is not None:
        losses = (losses * weight).masked_fill(~counted, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / item_count(num_items, counted)
    raise ValueError(f"reduction={reduction!r}: use 'mean', 'sum' or 'none'")


def item_count(num_items: Tensor | int | None, counted: Tensor) -> Tensor | int:
    """The divisor of a mean, at least 1: `num_items`, or the number of `counted` rows. Never reads the device."""
    if num_items is None:
        return counted.sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        if num_items.dim() or num_items.is_floating_point():
            raise TypeError(f"num_items must be a 0-d integer tensor, got {num_items.dtype} {list(num_items.shape)}")
        return num_items.clamp(min=1)
    if num_items < 0:
        raise ValueError(f"num_items={num_items}: a count of items cannot be negative")
    return max(num_items, 1)


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}: it must lie in [0, 1]")


def check_integer(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")


def _checked_mask(logits: Tensor, valid: Tensor) -> Tensor:
    """`valid` expanded to the shape of `logits`, without a copy."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits {list(logits.shape)} have no classes: expected [..., C] with C >= 1")
    fits = all(v in (1, c) for v, c in zip(reversed(valid.shape), reversed(logits.shape), strict=False))
    if valid.dim() > logits.dim() or not fits:
        raise ValueError(f"valid {list(valid.shape)} does not broadcast to logits {list(logits.shape)}")
    return valid.expand(logits.shape)


def _check_target(logits: Tensor, target: Tensor, label_smoothing: float) -> None:
    check_integer("target", target)
    check_label_smoothing(label_smoothing)
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target {list(target.shape)} must have the shape of logits {list(logits.shape)} without C")
