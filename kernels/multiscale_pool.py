"""Causal means over several time scales: what hierarchical Temporal Eigenstate Networks look at.

A block mean repeated over its own block shows a position up to s - 1 later ones. The two modes here never do:
"trailing" averages the last s positions, "hold" repeats the mean of the last block that is complete by now.

The PyTorch fallback knows two linear maps, and their transposes for the backward. Windows, the sums over the last s
positions of the document, come by doubling: about log2(s) shifted adds, shared by all scales, and no long cumulative
sum, whose cancellation grows with T. Blocks serve hold without resets: a scale sums the blocks of a scale that divides
it, so all but the finest live on T / s rows. Hold with resets is windows twice: one covers exactly one block end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import fused_op

AT_ONCE = 1 << 18  # elements that the fallback works on together, so that they stay in the cache


def positions_since_start(reset: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[B or 1, T] int64: how many earlier rows of its document each row has."""
    t = torch.arange(length, device=device)[None]
    return t if reset is None or not length else t - torch.where(reset, t, 0).cummax(1).values


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- windows: the last s rows of the document --------------------------------------------------------------------


def _digits(scale: int) -> list[int]:
    return [i for i in range(scale.bit_length()) if scale >> i & 1]


class _Windows:
    """The mix sum_s weights[s] * y_s of either mode, and its transpose; x [B, T, D] in the dtype it is summed in."""

    def __init__(self, reset: Tensor | None, x: Tensor, scales: Sequence[int], mode: str):
        self.age, self.has_resets = positions_since_start(reset, x.shape[1], x.device), reset is not None
        self.scales, self.mode, self.dtype = scales, mode, wide_dtype(x.dtype)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        pooled = zip(self._pooled(x), weights, strict=True)
        (total, count), weight = next(pooled)
        y = total * (weight / count)
        for (total, count), weight in pooled:
            y.addcmul_(total, weight / count)
        return y

    def mix_transposed(self, grad: Tensor, weights: Tensor) -> Tensor:
        counts = map(self._count, self.scales)
        grads = (grad * (weight / count) for weight, count in zip(weights, counts, strict=True))
        if self.mode == "hold":
            grads = (
                self._at_block_ends(self._sums_transposed([g], (s,)), s)
                for g, s in zip(grads, self.scales, strict=True)
            )
        return self._sums_transposed(grads, self.scales)

    def grad_weights(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        """[D] for each scale."""
        return [(total * grad).div_(count).sum((0, 1)) for total, count in self._pooled(x)]

    def _pooled(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each scale the sums to average, and over how many rows."""
        for total, scale in zip(self._sums(x, self.scales), self.scales, strict=True):
            if self.mode == "hold":
                (total,) = self._sums(self._at_block_ends(total, scale), (scale,))
            yield total, self._count(scale)

    def _sums(self, x: Tensor, scales: Sequence[int]) -> Iterator[Tensor]:
        """For each scale the sum of the rows up to each one, put together from sums over 2^i rows."""
        powers = [x]
        for i in range(max(scales).bit_length() - 1):
            powers.append(self._plus(powers[i], powers[i], 1 << i))
        for scale in scales:
            low, *others = _digits(scale)
            total = powers[low]
            for i in others:
                total = self._plus(total, powers[i], scale % (1 << i))
            yield total

    def _sums_transposed(self, grads: Iterable[Tensor], scales: Sequence[int]) -> Tensor:
        """The gradient of x, given those of `_sums(x, scales)`, which are used up."""
        powers: dict[int, Tensor] = {}
        for grad, scale in zip(grads, scales, strict=True):
            low, *others = _digits(scale)
            for i in others:
                before = powers[i] if i in powers else torch.zeros_like(grad)
                powers[i] = self._plus(before, grad, scale % (1 << i), ahead=True)
            powers[low] = powers[low].add_(grad) if low in powers else grad
        for i in reversed(range(max(powers))):
            above = powers[i + 1]
            both = powers[i].add_(above) if i in powers else above
            powers[i] = self._plus(both, above, 1 << i, ahead=True)
        return powers[0]

    def _plus(self, total: Tensor, x: Tensor, shift: int, ahead: bool = False) -> Tensor:
        """total[t] + x[t - shift], or x[t + shift] if ahead, where both rows are of one document."""
        length = x.shape[1]
        if shift >= length:
            return total
        late, early = slice(shift, length), slice(0, length - shift)
        to, source, alone = (early, late, slice(length - shift, length)) if ahead else (late, early, slice(0, shift))
        other = x[:, source]
        if self.has_resets:
            other = _keep(other, self.age[:, late] >= shift)
        out = torch.empty_like(total)
        out[:, alone] = total[:, alone]
        torch.add(total[:, to], other, out=out[:, to])
        return out

    def _at_block_ends(self, x: Tensor, scale: int) -> Tensor:
        return _keep(x, (self.age + 1) % scale == 0)

    def _count(self, scale: int) -> Tensor:
        """Float [B or 1, T, 1], how many rows a mean is over. Held ones are always over a whole block."""
        count = (self.age + 1).clamp(max=scale) if self.mode == "trailing" else torch.full_like(self.age, scale)
        return count[..., None].to(self.dtype)


def _keep(x: Tensor, rows: Tensor) -> Tensor:
    """x where rows [B or 1, T] is true, else 0, by its bits: masked_fill takes 15 times as long on a CPU."""
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    return (x.view(bits) & torch.where(rows, -1, 0).to(bits)[..., None]).view(x.dtype)


# ---- blocks: hold without resets ---------------------------------------------------------------------------------


class _Blocks:
    """As `_Windows`, by a tree of scales: the parent of each is the largest before it that divides it, the root is 1.

    Moved by the s - 1 rows that it takes to complete a block, blocks of s are still made of whole blocks of a scale
    that divides s: what a row holds is added up from the coarsest scale down, each on its own T / s rows.
    """

    def __init__(self, scales: Sequence[int]):
        order = sorted(range(len(scales)), key=lambda i: scales[i])
        self.sizes = [scales[i] for i in order]
        self.nodes: list[int | None] = [*order]  # the scale of each node, by its place
        if self.sizes[0] > 1:
            self.nodes, self.sizes = [None, *self.nodes], [1, *self.sizes]
        self.edges = []  # (node, parent, ratio of their sizes)
        for i, size in enumerate(self.sizes[1:], 1):
            parent = max(j for j in range(i) if size % self.sizes[j] == 0)
            self.edges.append((i, parent, size // self.sizes[parent]))

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        return self._spread(self._weighted(self._sums(x, held=False), weights), held=True)

    def mix_transposed(self, grad: Tensor, weights: Tensor) -> Tensor:
        return self._spread(self._weighted(self._sums(grad, held=True), weights), held=False)

    def grad_weights(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        """[D] for each scale."""
        nodes = zip(self.nodes, self.sizes, self._sums(grad, held=True), self._sums(x, held=False), strict=True)
        by_scale = {i: (g * total).sum((0, 1)) / size for i, size, g, total in nodes if i is not None}
        return [by_scale[i] for i in range(len(by_scale))]

    def _weighted(self, sums: list[Tensor], weights: Tensor) -> list[Tensor]:
        root = [torch.zeros_like(sums[0])] if self.nodes[0] is None else []
        return root + [
            total * (weights[i] / size)
            for i, size, total in zip(self.nodes, self.sizes, sums, strict=True)
            if i is not None
        ]

    def _sums(self, x: Tensor, held: bool) -> list[Tensor]:
        """[B, T // s, D] of each node: the sums over its blocks, or over the rows that hold each of its blocks."""
        sums = [x]
        for _, parent, ratio in self.edges:
            sums.append(_block_sums(sums[parent], ratio, first=ratio - 1 if held else 0))
        return sums

    def _spread(self, levels: list[Tensor], held: bool) -> Tensor:
        """The transpose: to the rows of each block, or to those that hold it, what `levels` has for the block."""
        for i, parent, ratio in reversed(self.edges):
            _add_to_blocks_(levels[parent], levels[i], ratio, first=ratio - 1 if held else 0)
        return levels[0]


def _block_sums(x: Tensor, ratio: int, first: int) -> Tensor:
    """[B, T // ratio, D]: sums over `ratio` rows each from `first` on, the last of them maybe over fewer."""
    count, x = x.shape[1] // ratio, x[:, first:]
    whole = x.shape[1] // ratio
    blocks = x[:, : whole * ratio].unflatten(1, (whole, ratio))
    # A sum over two rows takes three times as long as adding the one to the other.
    sums = blocks[:, :, 0] + blocks[:, :, 1] if ratio == 2 else blocks.sum(2)
    return sums if whole == count else torch.cat([sums, x[:, whole * ratio :].sum(1, keepdim=True)], 1)


def _add_to_blocks_(x: Tensor, values: Tensor, ratio: int, first: int) -> None:
    count, x = values.shape[1], x[:, first:]
    whole = min(x.shape[1] // ratio, count)
    x[:, : whole * ratio].unflatten(1, (whole, ratio)).add_(values[:, :whole, None])
    if whole < count:
        x[:, whole * ratio :] += values[:, whole:]


# ---- the op ------------------------------------------------------------------------------------------------------


def _map_of(x: Tensor, reset: Tensor | None, scales: Sequence[int], mode: str) -> _Windows | _Blocks:
    return _Blocks(scales) if mode == "hold" and reset is None else _Windows(reset, x, scales, mode)


def _parts(
    scales: Sequence[int], mode: str, weights: Tensor | None, reset: Tensor | None, *tensors: Tensor
) -> Iterator[tuple]:
    """(map, its weights, views of the tensors): some batch items at a time; without weights, each scale's channels."""
    batch, *rest = tensors[0].shape
    dtype = wide_dtype(tensors[0].dtype)
    at_once = max(1, AT_ONCE // max(1, math.prod(rest)))
    for first in range(0, batch, at_once):
        here = slice(first, first + at_once)
        views, cuts = [x[here] for x in tensors], None if reset is None else reset[here]
        if weights is not None:
            yield _map_of(views[0], cuts, scales, mode), weights.to(dtype), *views
            continue
        for scale, *group in zip(scales, *(x.tensor_split(len(scales), -1) for x in views), strict=True):
            yield _map_of(group[0], cuts, (scale,), mode), group[0].new_ones(1, dtype=dtype), *group


@fused_op("multiscale_pool_fwd", "multiscale_pool:forward")
def _multiscale_pool_fwd(
    x: Tensor, weights: Tensor | None, reset: Tensor | None, scales: Sequence[int], mode: str
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for pool, mix, x_part, y_part in _parts(scales, mode, weights, reset, x, y):
        y_part.copy_(pool.mix(x_part.to(mix.dtype), mix))
    return y


@_multiscale_pool_fwd.register_fake
def _(x: Tensor, weights: Tensor | None, reset: Tensor | None, scales: Sequence[int], mode: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fused_op("multiscale_pool_bwd", "multiscale_pool:backward")
def _multiscale_pool_bwd(
    grad: Tensor, x: Tensor | None, weights: Tensor | None, reset: Tensor | None, scales: Sequence[int], mode: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weights; the latter is [0] where there are none, and only then may x be None."""
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if weights is None:
        for pool, mix, grad_part, out in _parts(scales, mode, None, reset, grad, grad_x):
            out.copy_(pool.mix_transposed(grad_part.to(mix.dtype), mix))
        return grad_x, grad.new_empty(0)
    assert x is not None
    by_channel = torch.zeros(len(scales), grad.shape[-1], dtype=wide_dtype(grad.dtype), device=grad.device)
    for pool, mix, grad_part, x_part, out in _parts(scales, mode, weights, reset, grad, x, grad_x):
        wide = grad_part.to(mix.dtype)
        out.copy_(pool.mix_transposed(wide, mix))
        by_channel += torch.stack(pool.grad_weights(wide, x_part.to(mix.dtype)))
    return grad_x, (by_channel if weights.dim() == 2 else by_channel.sum(1)).to(weights.dtype)


@_multiscale_pool_bwd.register_fake
def _(
    grad: Tensor, x: Tensor | None, weights: Tensor | None, reset: Tensor | None, scales: Sequence[int], mode: str
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad_x, grad.new_empty(0) if weights is None else weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weights, reset, ctx.scales, ctx.mode = inputs
    ctx.save_for_backward(None if weights is None else x, weights, reset)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, reset = ctx.saved_tensors  # once: activation checkpointing allows no second reading
    grad_x, grad_weights = _multiscale_pool_bwd(grad, x, weights, reset, ctx.scales, ctx.mode)
    return grad_x, None if weights is None else grad_weights, None, None, None


_multiscale_pool_fwd.register_autograd(_backward, setup_context=_setup_context)


# ---- the public faces --------------------------------------------------------------------------------------------


def _check(x: Tensor, scales: Sequence[int], weights: Tensor | None, mode: str, reset: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if not scales or any(not isinstance(s, int) or s < 1 for s in scales):
        raise ValueError(f"scales must be one or more whole numbers of at least 1, got {scales}")
    if mode not in ("trailing", "hold"):
        raise ValueError(f"mode must be 'trailing' or 'hold', got {mode!r}")
    num_scales, d_model = len(scales), x.shape[-1]
    if weights is None and num_scales > d_model:
        raise ValueError(f"{num_scales} scales cannot share {d_model} channels: use fewer scales, or give weights")
    if weights is not None and tuple(weights.shape) not in ((num_scales,), (num_scales, d_model)):
        raise ValueError(f"weights must be [{num_scales}] or [{num_scales}, {d_model}], got {list(weights.shape)}")
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset must be bool {list(x.shape[:2])}, got {reset.dtype} {list(reset.shape)}")


def multiscale_pool(
    x: Tensor,
    scales: Sequence[int],
    *,
    weights: Tensor | None = None,
    mode: str = "trailing",
    reset: Tensor | None = None,
) -> Tensor:
    """Means of x over several time scales, each position seeing only itself and earlier ones of its document.

    trailing: y_s[t] = mean of x[max(t - s + 1, start) .. t]. hold: y_s[t] = mean of the last complete block of s
    positions since start, 0 before the first is complete. start is the last reset up to t, or 0. Causal forms
    of the block pooling in "TEN: Linear-Complexity Sequence Modeling via Spectral Decomposition" (Afolabi, 2026), which
    is not causal as stated there. Differentiable once, in x and weights.

    To go on one position at a time, keep the last max(scales) - 1 rows and pool them with the new one (trailing), or
    keep the sum and the number of the rows in each scale's open block, and the last complete mean (hold).

    Args:
        x: [B, T, D], any floating dtype and strides; sums are float32, or float64 if x is. T may be 0.
        scales: S whole numbers >= 1, in any order.
        weights: None splits the D channels over the scales as `torch.tensor_split` does, each group pooled at its own;
            [S] or [S, D] gives sum_s weights[s] * y_s.
        mode: "trailing" or "hold".
        reset: [B, T] bool, true where a document starts.

    Returns:
        y: [B, T, D] in x's dtype.

    Raises:
        ValueError: scales, mode, or the shape of x, weights or reset is not one of the above.
        TypeError: x is not floating point.
    """
    scales = tuple(scales)
    _check(x, scales, weights, mode, reset)
    return _multiscale_pool_fwd(x, weights, reset, scales, mode)


def multiscale_pool_reference(
    x: Tensor,
    scales: Sequence[int],
    *,
    weights: Tensor | None = None,
    mode: str = "trailing",
    reset: Tensor | None = None,
) -> Tensor:
    """`multiscale_pool` as one [T, T] averaging matrix per scale, by plain autograd in x's dtype."""
    t = torch.arange(x.shape[1], device=x.device)
    start = torch.zeros_like(t)[None] if reset is None else torch.where(reset, t, 0).cummax(1).values
    pooled = []
    for scale in scales:
        end = t if mode == "trailing" else start + (t - start + 1) // scale * scale - 1  # the last row averaged
        end, first = end.expand_as(start)[..., None], start[..., None]  # [B or 1, T, 1]
        inside = (t <= end) & (t > end - scale) & (t >= first)  # [B or 1, T, T]
        mean = inside.to(x.dtype) / inside.sum(-1, keepdim=True).clamp(min=1).to(x.dtype)
        pooled.append(mean @ x)
    if weights is None:
        groups = [y.tensor_split(len(scales), -1)[i] for i, y in enumerate(pooled)]
        return torch.cat(groups, -1)
    per_scale = weights.view(len(scales), 1, 1, -1)
    return (per_scale * torch.stack(pooled)).sum(0)
