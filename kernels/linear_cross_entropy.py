"""The head of a language model and its loss in one op: projection, cross-entropy, energy; never [N, V] logits.

For row i with hidden state h, logits z = W h + b (with a soft cap s: s * tanh(z / s)), label smoothing a, target y:

    lse   = log sum_v exp(z_v)
    nll   = lse - (1 - a) * z_y - a / V * sum_v z_v
    total = nll + z_loss_weight * lse^2
    dz_v  = (1 + 2 * z_loss_weight * lse) * softmax(z)_v - (1 - a) * [v = y] - a / V

Rows are worked off in chunks, and the gradients of hidden, weight and bias are taken in the forward pass while the
chunk's logits exist, as in Liger Kernel (arXiv 2410.10989). The z-loss is PaLM's (arXiv 2204.02311), the soft cap
Gemma 2's (arXiv 2408.00118). The gradients kept are those of the sum over rows: the upstream gradient and 1 / num_items
multiply them in backward, in fp32, for a gradient of the size of 1 / num_items would vanish in fp16.
The lean mode, which takes its gradients in backward, is in `kernels/lean_head.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.chunked_head import ChunkedHead, sum_over_rows, workspace_bytes
from kernels.dispatch import fused_op
from kernels.lean_head import lean_loss, refuse_to_differentiate_twice
from kernels.masked_cross_entropy import check_integer, check_label_smoothing, item_count


class LossParts(NamedTuple):
    """0-d tensors. loss = ce_loss + energy_weight * energy_loss + z_loss_weight * z_loss; all but loss are detached."""

    loss: Tensor
    ce_loss: Tensor
    energy_loss: Tensor
    z_loss: Tensor


# ------------------------------------------------------------------------------------------------------------- the ops


@fused_op("linear_cross_entropy", "linear_cross_entropy:loss_only")
def _loss_only(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """-> sum of nll, sum of lse^2."""
    return sum_over_rows(hidden, target, ignore_index, ChunkedHead(hidden, weight, bias, label_smoothing, 0.0, softcap))


@_loss_only.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=wide), hidden.new_empty((), dtype=wide)


def _gradient_buffers(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden in the dtype of hidden; d_weight and d_bias, which add up over chunks, wide. Empty if not wanted."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape if wants[0] else 0),
        hidden.new_zeros(weight.shape if wants[1] else 0, dtype=wide),
        hidden.new_zeros(weight.shape[:1] if wants[2] else 0, dtype=wide),
    )


@fused_op("linear_cross_entropy_with_gradients", "linear_cross_entropy:loss_and_gradients")
def _loss_and_gradients(
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
    """-> total (differentiable), sum of nll, sum of lse^2, and the gradients of total: d_hidden, d_weight, d_bias."""
    gradients = _gradient_buffers(hidden, weight, bias, wants)
    places = (gradient if wanted else None for gradient, wanted in zip(gradients, wants, strict=True))
    head = ChunkedHead(hidden, weight, bias, label_smoothing, z_loss_weight, softcap)
    nll, square = sum_over_rows(hidden, target, ignore_index, head, *places)
    return nll + z_loss_weight * square, nll, square, *gradients


@_loss_and_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    ignore_index: int,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sums = (hidden.new_empty((), dtype=wide) for _ in range(3))
    return *sums, *_gradient_buffers(hidden, weight, bias, wants)


@register_flop_formula(torch.ops.tenfold.linear_cross_entropy)
def _(hidden_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of the projection, for torch.utils.flop_counter, which does not see into an op."""
    return 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.tenfold.linear_cross_entropy_with_gradients)
def _(hidden_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    *_, (wants_hidden, wants_weight, _) = args
    return 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1] * (1 + wants_hidden + wants_weight)


# For whoever adds up memory without computing, as the flop formulas are for FLOPs.
torch.ops.tenfold.linear_cross_entropy.default.workspace_bytes = (  # type: ignore[attr-defined]
    lambda hidden, weight, bias, target, label_smoothing, softcap, ignore_index: workspace_bytes(
        hidden, weight, softcap
    )
)
torch.ops.tenfold.linear_cross_entropy_with_gradients.default.workspace_bytes = (  # type: ignore[attr-defined]
    lambda hidden, weight, bias, target, label_smoothing, z_loss_weight, softcap, *rest: workspace_bytes(
        hidden, weight, softcap
    )
)


# ------------------------------------------------------------------------------------------------------- autograd glue


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, *_, ctx.wants = inputs
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_to_differentiate_twice()
    # As a tensor of one dimension the fp32 scale is not rounded to the dtype of d_hidden. With `out`, a GPU scales and
    # rounds in one pass: 3.2 GB less to move for a weight of 128256 x 4096.
    scaled = [
        torch.mul(gradient, grad.view(1), out=torch.empty_like(gradient, dtype=dtype)) if wanted else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    ]
    return *scaled, None, None, None, None, None, None


_loss_and_gradients.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------- public functions


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    energy: Tensor | None = None,
    energy_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    lean: bool = False,
) -> LossParts:
    """Cross-entropy of `hidden @ weight.T + bias` plus energy and z-loss, without ever holding the logits of all rows.

    Keep it outside activation checkpointing, for its gradients exist after forward and a recomputation would take them
    twice; unless it is lean, which a recomputation costs one matmul more.

    Args:
        hidden: [..., D] floating. Its dtype is that of the matmuls; under autocast, autocast's dtype is.
        weight: [V, D] in any floating dtype, best kept in fp32: it is cast inside, and its gradient adds up in fp32.
        target: [...] integer in 0..V-1, or `ignore_index`. Ignored rows give loss 0 and gradient 0, whatever they hold.
        bias: [V].
        energy: differentiable 0-d tensor, already divided by `num_items`; its gradient flows through `loss`.
        label_smoothing: a in [0, 1]; every one of the V classes gets a / V.
        z_loss_weight: factor on the mean over counted rows of lse^2, taken after the soft cap.
        softcap: s > 0 bounds the logits by s * tanh(z / s).
        num_items: the divisor: a 0-d integer tensor or an int, at least 1 is used. Default: the counted rows.
        lean: take the gradients in backward. A matmul more, and all that is kept for it are the inputs and [N] numbers;
            what backward needs of the weight's size is its gradient alone, in its own dtype (else: in fp32 and again in
            its own). The same value and gradients, up to rounding.

    Returns:
        LossParts of 0-d tensors in fp32 (float64 for float64 hidden). All targets ignored: ce_loss = z_loss = 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or option.
        RuntimeError: a target outside 0..V-1 that is not `ignore_index` (from torch.gather; the Triton kernels, which
            never wait for the device, give it an infinite loss), or differentiated twice.
    """
    _check(hidden, weight, target, bias, energy, label_smoothing, softcap)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1).long()
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in rows[:3]]
    if lean:
        total, nll, square, _ = lean_loss(*rows, label_smoothing, z_loss_weight, softcap, ignore_index)
    elif any(wants):
        total, nll, square, *_ = _loss_and_gradients(
            *rows, label_smoothing, z_loss_weight, softcap, ignore_index, wants
        )
    else:
        nll, square = _loss_only(*rows, label_smoothing, softcap, ignore_index)
        total = nll + z_loss_weight * square
    count = item_count(num_items, target != ignore_index)
    loss = total / count
    if energy is None:
        return LossParts(loss, nll / count, torch.zeros_like(nll), square / count)
    return LossParts(loss + energy_weight * energy, nll / count, energy.detach(), square / count)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    energy: Tensor | None = None,
    energy_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
) -> LossParts:
    """`linear_cross_entropy` with all its logits, in plain differentiable PyTorch and in the caller's dtype."""
    _check(hidden, weight, target, bias, energy, label_smoothing, softcap)
    keep = target != ignore_index
    z = F.linear(hidden.masked_fill(~keep.unsqueeze(-1), 0), weight.to(hidden.dtype), bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(-1)
    z_y = z.gather(-1, target.long().masked_fill(~keep, 0).unsqueeze(-1)).squeeze(-1)
    nll = lse - (1 - label_smoothing) * z_y
    if label_smoothing:  # 0 times the mean would be NaN where a bias of -inf rules a class out
        nll = nll - label_smoothing * z.mean(-1)
    count = item_count(num_items, keep)
    ce = nll.masked_fill(~keep, 0).sum() / count
    z_loss = lse.square().masked_fill(~keep, 0).sum() / count
    energy = torch.zeros_like(ce) if energy is None else energy
    loss = ce + energy_weight * energy + z_loss_weight * z_loss
    return LossParts(loss, ce.detach(), energy.detach(), z_loss.detach())


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    energy: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    check_integer("target", target)
    check_label_smoothing(label_smoothing)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [..., D] and [V, D]")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target {list(target.shape)} must have the shape of hidden {list(hidden.shape)} without D")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} must be [V] for weight {list(weight.shape)}")
    if energy is not None and energy.dim():
        raise ValueError(f"energy must be a 0-d tensor, got {list(energy.shape)}: sum it and divide by num_items first")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: it must be positive, or None for no cap")
