"""The lean mode of `linear_cross_entropy`: its gradients are taken in backward, over chunks of the vocabulary.

Forward keeps a number a row, lse. With it backward turns any [R, C] tile of the logits, made once more, into its
gradient without seeing the others. Once a chunk of classes is through all rows, its gradient of the weight is whole, is
scaled by the upstream gradient in fp32 and rounded into its place. That is four matmuls in place of three; and in
memory, beside the gradients, hidden's in fp32, a copy of hidden, one tile, and one chunk's gradient of the weight. (Cut
Cross-Entropy, arXiv 2411.09009, makes the logits again too, inside its kernels.)

Both passes make the same tiles by the same matmuls. Logits in bf16 between 16 and 32 lie 1/8 apart: were one summed in
another order and rounded to its neighbour, p = 0.95 would become 1.08, and p - 1 change its sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.chunked_head import BLOCK_BYTES, add_matmul, even_chunk, finished, matmul_dtype, padded_classes
from kernels.dispatch import fused_op


class Most(NamedTuple):
    """Of a tile; of each dimension even parts of at most this are taken, multiples of `multiple`."""

    rows: int
    classes: int
    multiple: int


# One Xeon core, fp32, N 2048, D 512, V 16384: 1.38 s in tiles of 2048 x 2048, 1.34 s of 2048 x 512, 1.21 s of 1024 x
# 8192, which are twice as large; the fast mode takes 1.11 s.
FALLBACK = Most(2048, 2048, 1)
# 128 MiB of bf16 logits. Fewer classes, and d_hidden in fp32 is read and written more often: 8 / C bytes for 2 FLOPs.
TRITON = Most(8192, 8192, 128)


class Options(NamedTuple):
    label_smoothing: float
    z_loss_weight: float
    softcap: float | None
    ignore_index: int


class Tile(NamedTuple):
    rows: slice
    classes: slice
    x: Tensor  # [R, D], ignored rows as zeros
    w: Tensor  # [C, D]
    z: Tensor  # [R, C], logits less the bias and uncapped; rows are the start of longer ones, of `padded_classes(C)`
    target: Tensor  # [R]
    bias: Tensor | None  # [C]


# (tile, options, lse, z_y, total): take the tile into what the tiles before have left, all [R]: lse, the target's logit
# (if the target is here) and, where labels are smoothed, the sum of the logits.
Reduce = Callable[[Tile, Options, Tensor, Tensor, Tensor], None]
# (tile, options, V, lse): z becomes the gradient of the total.
Differentiate = Callable[[Tile, Options, int, Tensor], None]


def _tile_size(hidden: Tensor, weight: Tensor, most: Most) -> tuple[int, int]:
    rows = even_chunk(len(hidden), most.rows, most.multiple)
    return rows, even_chunk(len(weight), most.classes, most.multiple)


def _tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    most: Most,
    dtype: torch.dtype,
) -> Iterator[Tile]:
    """All rows of the first chunk of classes, all of the second, ...: each in the buffer of the one before."""
    num_rows, classes = hidden.shape[0], weight.shape[0]
    rows_each, classes_each = _tile_size(hidden, weight, most)
    # An ignored row may hold NaN; as zeros it adds nothing to d_weight.
    x = hidden.masked_fill((target == ignore_index).unsqueeze(1), 0).to(dtype)
    # Zeros, for oneDNN on AMX multiplies what lies right of an odd row by 0 and adds it: NaN would become of NaN.
    logits = x.new_zeros((min(rows_each, num_rows), padded_classes(min(classes_each, classes))))
    for first in range(0, classes if num_rows else 0, classes_each):
        chunk = slice(first, min(first + classes_each, classes))
        w, b = weight[chunk].to(dtype), None if bias is None else bias[chunk]
        for start in range(0, num_rows, rows_each):
            rows = slice(start, min(start + rows_each, num_rows))
            z = torch.mm(x[rows], w.t(), out=logits[: rows.stop - start, : len(w)])
            yield Tile(rows, chunk, x[rows], w, z, target[rows], b)


def loss_over_tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    most: Most,
    dtype: torch.dtype,
    reduce: Reduce,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> total, sum of nll, sum of lse^2, lse [N], which is 0 for ignored rows. Matmuls run in `dtype`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    lse, z_y, z_sum = (hidden.new_full(target.shape, value, dtype=wide) for value in (-math.inf, -math.inf, 0.0))
    for tile in _tiles(hidden, weight, bias, target, options.ignore_index, most, dtype):
        reduce(tile, options, lse[tile.rows], z_y[tile.rows], z_sum[tile.rows])
    a, ignored = options.label_smoothing, target == options.ignore_index
    nll = lse - (1 - a) * z_y
    if a:
        nll -= a / weight.shape[0] * z_sum
    nll, lse = nll.masked_fill(ignored, 0).sum(), lse.masked_fill(ignored, 0)
    square = lse.square().sum()
    return nll + options.z_loss_weight * square, nll, square, lse


def gradients_over_tiles(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    options: Options,
    wants: list[bool],
    most: Most,
    dtype: torch.dtype,
    differentiate: Differentiate,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_hidden, d_weight, d_bias, those of the total times `grad`, in the dtypes of their tensors."""
    num_rows, num_classes = len(hidden), len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    place = hidden.new_empty if num_rows else hidden.new_zeros  # without rows there is no tile that would write
    d_hidden = place(hidden.shape if wants[0] else 0, dtype=wide)
    d_weight = place(weight.shape if wants[1] else 0, dtype=weight.dtype)
    d_bias = hidden.new_zeros(num_classes if wants[2] else 0, dtype=wide)
    grad = grad.view(1)  # of one dimension: the fp32 scale is not rounded to the dtype of what it scales

    def add_up() -> None:  # its buffers end with it: d_hidden in its own dtype need not stand beside them
        whole = d_weight.dtype == wide  # then a chunk adds up in its place
        chunk = 0 if whole or not wants[1] else _tile_size(hidden, weight, most)[1]
        partial = hidden.new_empty((chunk, weight.shape[1]), dtype=wide)
        for tile in _tiles(hidden, weight, bias, target, options.ignore_index, most, dtype):
            rows, classes, dz = tile.rows, tile.classes, tile.z
            differentiate(tile, options, num_classes, lse[rows])
            if wants[0]:
                add_matmul(d_hidden[rows], dz, tile.w, first=classes.start == 0)
            if wants[1]:
                total = d_weight[classes] if whole else partial[: len(tile.w)]
                add_matmul(total, dz.t(), tile.x, first=rows.start == 0)
                if rows.stop == num_rows:
                    torch.mul(total, grad, out=d_weight[classes])
            if wants[2]:
                d_bias[classes].add_(dz.sum(0, dtype=wide))

    add_up()
    bias_dtype = wide if bias is None else bias.dtype
    return _scaled(d_hidden, grad, hidden.dtype), d_weight, _scaled(d_bias, grad, bias_dtype)


def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    place = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, grad, out=place)


# -------------------------------------------------------------------------------------------------------- the fallback


def _blocks(tile: Tile, options: Options, wide: torch.dtype, *each_row: Tensor) -> Iterator[tuple]:
    """Rows of a tile that share the cache: (z as it was, z finished, tanh of the cap, target, *each_row)."""
    classes = tile.z.shape[1]
    block = max(1, BLOCK_BYTES // (classes * wide.itemsize))
    rows = min(block, len(tile.z))
    widened = None if tile.z.dtype == wide else tile.z.new_empty((rows, classes), dtype=wide)
    tanh = None if options.softcap is None else tile.z.new_empty((rows, classes), dtype=wide)
    bias = None if tile.bias is None else tile.bias.to(wide)
    for z, *rest in zip(*(t.split(block) for t in (tile.z, tile.target, *each_row)), strict=True):
        yield z, *finished(z, bias, options.softcap, widened, tanh), *rest


def _place(target: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Which targets are classes of this tile, [R]; and the columns of these, 0 for others, [R, 1]."""
    here = (target >= tile.classes.start) & (target < tile.classes.stop)
    return here, (target - tile.classes.start).masked_fill(~here, 0).unsqueeze(1)


def _reduce(tile: Tile, options: Options, lse: Tensor, z_y: Tensor, z_sum: Tensor) -> None:
    for _, z, _, target, lse_, z_y_, z_sum_ in _blocks(tile, options, lse.dtype, lse, z_y, z_sum):
        here, column = _place(target, tile)
        z_y_.copy_(torch.where(here, z.gather(1, column).squeeze(1), z_y_))
        if options.label_smoothing:
            z_sum_.add_(z.sum(1))
        lse_.copy_(torch.logaddexp(lse_, z.logsumexp(1)))


def _differentiate(tile: Tile, options: Options, num_classes: int, lse: Tensor) -> None:
    for narrow, z, tanh, target, lse_ in _blocks(tile, options, lse.dtype, lse):
        here, column = _place(target, tile)
        keep = target != options.ignore_index
        z.sub_(lse_.masked_fill(~keep, math.inf).unsqueeze(1)).exp_()  # 0 in ignored rows
        if options.z_loss_weight:
            z.mul_((1 + 2 * options.z_loss_weight * lse_).unsqueeze(1))
        if options.label_smoothing:
            z.sub_((options.label_smoothing / num_classes * keep).unsqueeze(1))
        z.scatter_add_(1, column, ((options.label_smoothing - 1) * (here & keep)).to(z.dtype).unsqueeze(1))
        if tanh is not None:
            z.mul_(tanh.square_().neg_().add_(1))
        if z is not narrow:
            narrow.copy_(z)


# ------------------------------------------------------------------------------------------------------------- the ops


@fused_op("linear_cross_entropy_lean_fwd", "lean_head:loss")
def lean_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> total (differentiable), sum of nll, sum of lse^2, lse [N]."""
    # The target's logit is looked for tile by tile: that it is nowhere, this gather says.
    target.new_empty(len(weight)).gather(0, target.masked_fill(target == ignore_index, 0))
    options = Options(label_smoothing, z_loss_weight, softcap, ignore_index)
    return loss_over_tiles(hidden, weight, bias, target, options, FALLBACK, matmul_dtype(hidden), _reduce)


@lean_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return *(hidden.new_empty((), dtype=wide) for _ in range(3)), hidden.new_empty(target.shape, dtype=wide)


@fused_op("linear_cross_entropy_lean_bwd", "lean_head:gradients")
def _gradients(
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
    """-> `grad` times the gradients of total: d_hidden, d_weight, d_bias; empty if not wanted."""
    options, dtype = Options(label_smoothing, z_loss_weight, softcap, ignore_index), matmul_dtype(hidden)
    return gradients_over_tiles(
        grad, hidden, weight, bias, target, lse, options, wants, FALLBACK, dtype, _differentiate
    )


@_gradients.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    whole = hidden.shape, weight.shape, weight.shape[:1]
    shapes = (shape if wanted else (0,) for shape, wanted in zip(whole, wants, strict=True))
    dtypes = hidden.dtype, weight.dtype, lse.dtype if bias is None else bias.dtype
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


@register_flop_formula(torch.ops.tenfold.linear_cross_entropy_lean_fwd)
def _(hidden_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.tenfold.linear_cross_entropy_lean_bwd)
def _(grad_shape: torch.Size, hidden_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    *_, (wants_hidden, wants_weight, _) = args
    return 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1] * (1 + wants_hidden + wants_weight)


def _workspace_bytes(hidden: Tensor, weight: Tensor, wants_hidden: bool = False, wants_weight: bool = False) -> int:
    """What the ops take besides their outputs: a copy of hidden, a tile, a cast chunk of the weight; fp32 gradients."""
    gpu, wide = hidden.device.type == "cuda", torch.promote_types(hidden.dtype, torch.float32)
    dtype = hidden.dtype if gpu else matmul_dtype(hidden)
    rows, classes = _tile_size(hidden, weight, TRITON if gpu else FALLBACK)
    logits = min(rows, len(hidden)) * padded_classes(min(classes, len(weight)))
    low = hidden.numel() + logits + classes * weight.shape[1] * (weight.dtype != dtype)
    high = hidden.numel() * wants_hidden + classes * weight.shape[1] * (wants_weight and weight.dtype != wide)
    return low * dtype.itemsize + high * wide.itemsize


torch.ops.tenfold.linear_cross_entropy_lean_fwd.default.workspace_bytes = (  # type: ignore[attr-defined]
    lambda hidden, weight, *rest: _workspace_bytes(hidden, weight)
)
torch.ops.tenfold.linear_cross_entropy_lean_bwd.default.workspace_bytes = (  # type: ignore[attr-defined]
    lambda grad, hidden, weight, *rest: _workspace_bytes(hidden, weight, *rest[-1][:2])
)


# ------------------------------------------------------------------------------------------------------- autograd glue


def refuse_to_differentiate_twice() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy cannot be differentiated twice, for its backward keeps no graph: "
            "drop create_graph=True, or use linear_cross_entropy_reference"
        )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.options = inputs[:4], inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[3])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_to_differentiate_twice()
    wants = list(ctx.needs_input_grad[:3])
    gradients = _gradients(grad, *ctx.saved_tensors, *ctx.options, wants)
    return *(g if wanted else None for g, wanted in zip(gradients, wants, strict=True)), *[None] * 5


lean_loss.register_autograd(_backward, setup_context=_setup_context)
