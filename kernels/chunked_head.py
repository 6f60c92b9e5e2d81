"""The PyTorch fallback of `linear_cross_entropy`, and what it shares with the Triton path and with the lean mode."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Budget(NamedTuple):
    """For one chunk of logits: bytes, and bounds on its rows that come first."""

    bytes: int
    min_rows: int
    max_rows: int
    multiple: int  # of rows


# Two Xeon cores at 2.8 GHz, fp32, N 2048, D 512, V 50304: the three matmuls alone take 1.63 s in chunks of 64 rows,
# 1.28 s of 256, 1.14 s of 512, 1.13 s of 1024; the whole op in chunks of 512, 1.29 s. In bf16 on two cores that have it
# (AMX), the whole op: 0.61 s in chunks of 512, 0.57 s of 1024.
FALLBACK = Budget(1 << 27, 64, 1024, 1)
# Every chunk reads and writes the fp32 gradient of the weight once more: at 4096 x 128256 a twentieth of its matmuls.
TRITON = Budget(1 << 30, 1024, 8192, 128)
BLOCK_BYTES = 1 << 21  # of logits in fp32 between two matmuls: all passes over them find them in the cache
WIDEN_ROWS = 4096  # rows of a low-precision gradient turned into fp32 at a time


def chunk_rows(num_rows: int, row_bytes: int, budget: Budget) -> int:
    """Rows per chunk: within the budget, and chunks of even size, for a short last one wastes the matmul."""
    rows = min(max(budget.bytes // row_bytes, budget.min_rows), budget.max_rows) // budget.multiple * budget.multiple
    return even_chunk(num_rows, rows, budget.multiple)


def even_chunk(total: int, most: int, multiple: int) -> int:
    """At most `most` of `total` at a time, itself a multiple of `multiple`."""
    even = -(-total // max(1, -(-total // most)))
    return max(1, -(-even // multiple)) * multiple


def padded_classes(classes: int) -> int:
    """The row stride of logits on a GPU: rows start aligned, for cuBLAS and for vector loads."""
    return -(-classes // 64) * 64


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """That of `hidden`, or fp32 on a CPU that only emulates it.

    N 512, D 512, V 16384 on two Ice Lake cores: 100 ms in fp32, 390 to 460 ms in bf16, 1.3 to 19 s in fp16.
    """
    if hidden.device.type == "cpu" and hidden.dtype.itemsize == 2 and not _cpu_multiplies(hidden.dtype):
        return torch.float32
    return hidden.dtype


@lru_cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for it; a torch too old to say counts as no."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    instructions = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
    }
    return any(capabilities.get(name, False) for name in instructions[dtype])


@lru_cache
def _multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether low precision accumulates into an fp32 tensor there: on no CPU, not before Ampere, nor in every ROCm."""
    total, factor = (torch.zeros(16, 16, device=device, dtype=d) for d in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def add_matmul(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b in the dtype of `total`, inside the matmul where the device can; `first` writes and reads nothing.

    Always into a tensor that is there: autocast would take an mm without `out` in low precision again.
    """
    if total.dtype == b.dtype or _multiplies_into_fp32(b.device, b.dtype):
        options: dict[str, Any] = {} if total.dtype == b.dtype else {"out_dtype": total.dtype}
        if first:
            torch.mm(a, b, out=total, **options)
        else:
            torch.addmm(total, a, b, out=total, **options)
        return
    product = torch.mm(a, b, out=b.new_empty(total.shape))
    for place, part in zip(total.split(WIDEN_ROWS), product.split(WIDEN_ROWS), strict=True):
        if first:
            place.copy_(part)
        else:
            place.add_(part.to(total.dtype))  # same-dtype: on a CPU a mixed-dtype op takes ten times as long


def finished(
    z: Tensor, bias: Tensor | None, softcap: float | None, wide: Tensor | None, tanh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits as the matmul left them -> with bias and cap, and the tanh of the cap; in place where `wide` is None.

    Args:
        z: [R, V].
        bias: [V], in the dtype of the result.
        wide, tanh: [R or more, V], for the result if z is in low precision, and for the tanh if there is a cap.
    """
    if wide is not None:  # a copy, then same-dtype ops: on a CPU a mixed-dtype op takes ten times as long
        z = wide[: len(z)].copy_(z)
    if bias is not None:
        z.add_(bias)
    if softcap is None or tanh is None:
        return z, None
    tanh = torch.div(z, softcap, out=tanh[: len(z)]).tanh_()
    return torch.mul(tanh, softcap, out=z), tanh


class ChunkedHead:
    """The loss of one chunk of rows at a time, in buffers that every chunk reuses.

    Matmuls run in `matmul_dtype`; what lies between them, in fp32 or better, a block of rows at a time.
    """

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        label_smoothing: float,
        z_loss_weight: float,
        softcap: float | None,
    ):
        wide, dtype, classes = torch.promote_types(hidden.dtype, torch.float32), matmul_dtype(hidden), weight.shape[0]
        self.chunk, self.block = _rows_at_a_time(hidden, weight)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(wide)
        self.label_smoothing, self.z_loss_weight, self.softcap = label_smoothing, z_loss_weight, softcap
        self.logits = hidden.new_empty((self.chunk, classes), dtype=dtype)
        self.wide = None if dtype == wide else hidden.new_empty((self.block, classes), dtype=wide)
        self.tanh = None if softcap is None else hidden.new_empty((self.block, classes), dtype=wide)

    def losses(
        self, z: Tensor, y: Tensor, keep: Tensor, d_bias: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums of nll and lse^2 over a block of rows.

        Args:
            z: [R, V], logits less the bias and uncapped; with `gradient` they become the gradient of the total.
            y, keep: [R, 1].
            d_bias: [V], added to.
        """
        narrow, a = z, self.label_smoothing
        z, tanh = finished(z, self.bias, self.softcap, self.wide, self.tanh)
        z_y = z.gather(1, y)
        z_mean = z.mean(1, keepdim=True) if a else 0.0
        peak = z.amax(1, keepdim=True)
        partition = z.sub_(peak).exp_().sum(1, keepdim=True)  # z is now exp(z - peak)
        lse = partition.log() + peak
        nll = lse - (1 - a) * z_y - a * z_mean
        sums = nll.masked_fill(~keep, 0).sum(), lse.square().masked_fill(~keep, 0).sum()
        if not gradient:
            return sums

        counted = keep.to(z.dtype)
        slope = (1 + 2 * self.z_loss_weight * lse) * counted  # of nll + z_loss_weight * lse^2 with respect to lse
        spread = a / z.shape[1] * counted
        d_y = slope * (z_y - lse).exp() - spread - (1 - a) * counted  # p - 1, rounded once
        z.mul_(slope / partition)
        if a:
            z.sub_(spread)
        z.scatter_(1, y, d_y)
        if tanh is not None:
            z.mul_(tanh.square_().neg_().add_(1))
        if d_bias is not None:
            d_bias.add_(z.sum(0))
        if self.wide is not None:
            narrow.copy_(z)
        return sums

    def backward(self, x: Tensor, dz: Tensor, d_x: Tensor | None, d_weight: Tensor | None) -> None:
        """Write d_x and add to d_weight, given dz [C, V], the gradient of the logits of x [C, D]."""
        if d_x is not None and d_x.dtype == dz.dtype:
            torch.mm(dz, self.weight, out=d_x)
        elif d_x is not None:  # into a buffer: autocast would take an mm without `out` in low precision again
            d_x.copy_(torch.mm(dz, self.weight, out=dz.new_empty(d_x.shape)))
        if d_weight is not None:
            add_matmul(d_weight, dz.t(), x)


def _rows_at_a_time(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows of a chunk, which share a matmul, and of a block of it, whose elementwise passes share the cache."""
    classes, wide = weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    chunk = chunk_rows(hidden.shape[0], classes * matmul_dtype(hidden).itemsize, FALLBACK)
    return chunk, min(chunk, max(1, BLOCK_BYTES // (classes * wide.itemsize)))


def sum_over_rows(
    hidden: Tensor,
    target: Tensor,  # [N]
    ignore_index: int,
    head: ChunkedHead,
    d_hidden: Tensor | None = None,  # [N, D], written
    d_weight: Tensor | None = None,  # [V, D], added to
    d_bias: Tensor | None = None,  # [V], added to
) -> tuple[Tensor, Tensor]:
    """Sums of nll and lse^2 over the counted rows; gradients of sum(total) where there is a place for them."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll_sum, square_sum = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
    gradient = not (d_hidden is None and d_weight is None and d_bias is None)
    for start in range(0, hidden.shape[0], head.chunk):
        rows = slice(start, start + head.chunk)
        keep = (target[rows] != ignore_index).unsqueeze(1)  # [C, 1]
        # An ignored row may hold NaN; as zeros it adds nothing to d_weight.
        x = hidden[rows].masked_fill(~keep, 0).to(head.weight.dtype)
        y = target[rows].unsqueeze(1).masked_fill(~keep, 0)
        z = torch.mm(x, head.weight.t(), out=head.logits[: len(x)])
        for block in zip(z.split(head.block), y.split(head.block), keep.split(head.block), strict=True):
            nll, square = head.losses(*block, d_bias, gradient)
            nll_sum, square_sum = nll_sum + nll, square_sum + square
        if gradient:
            head.backward(x, z, None if d_hidden is None else d_hidden[rows], d_weight)
    return nll_sum, square_sum


def workspace_bytes(hidden: Tensor, weight: Tensor, softcap: float | None) -> int:
    """What the op takes besides its outputs: the logits of a chunk, a cast weight, and what the fallback adds."""
    (rows, _), (classes, _) = hidden.shape, weight.shape
    if hidden.device.type == "cuda":
        row_bytes = padded_classes(classes) * hidden.dtype.itemsize
        cast = hidden.dtype.itemsize * (hidden.dtype != weight.dtype)
        return min(chunk_rows(rows, row_bytes, TRITON), rows) * row_bytes + weight.numel() * cast
    wide, dtype = torch.promote_types(hidden.dtype, torch.float32), matmul_dtype(hidden)
    chunk, block = _rows_at_a_time(hidden, weight)
    buffers = chunk * dtype.itemsize + block * wide.itemsize * ((dtype != wide) + (softcap is not None))
    copies = dtype.itemsize * ((dtype != weight.dtype) + (dtype != wide))  # the weight, its gradient of one chunk
    return classes * buffers + weight.numel() * copies
