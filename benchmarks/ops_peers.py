"""Whom benchmarks/ops.py compares the ops with: compilations of one function, and adapters to other people's kernels.

Checked against liger-kernel 0.8.5, cut-cross-entropy 25.1.1, fla-core 0.6.0, quack-kernels 0.6.5 and accelerated-scan
0.3.1. Packages are imported when a peer runs: one that is not there is a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import has_triton

Function = Callable[..., Tensor]
# (leaves in float64, fixed, gradient of the output or None) -> the output and the gradient of every leaf
Gold = Callable[[list[Tensor], list[Tensor], Tensor | None], list[Tensor]]

COMPILED = {
    "torch.compile": {},
    "torch.compile, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "torch.compile, auto-chunker": {"options": {"auto_chunker.enable": True}},
}
INSTALL = {
    "fla": "flash-linear-attention",
    "quack": "quack-kernels",
}  # where the two names differ by more than a hyphen


@dataclass(frozen=True)
class Peer:
    """`run(*leaves, *fixed)` gives the one output of a case, which the harness differentiates.

    A peer whose own layout is another gets it outside the clock: it runs on `adapt(*leaves)`, and `restore(output)` is
    the case's output. Both are differentiable, and by their chain rule its gradients are compared too.
    """

    run: Function
    package: str | None = None  # of other people's: what it imports; all of these need CUDA
    backend: str | None = None  # of ours: TENFOLD_KERNELS while it runs
    compiled: Mapping[str, Any] | None = None  # with these arguments of torch.compile
    gold: Gold | None = None  # of a peer that can only do something easier, which `note` names
    adapt: Callable[..., tuple[Tensor, ...]] | None = None
    restore: Function | None = None
    captured: bool = True  # in a CUDA graph, where the case is
    checked: bool = True  # False: a yardstick without a result, timed as a whole
    missing: str | None = None  # why it cannot run
    note: str = ""

    def reason(self, device: str, compiles: bool) -> str | None:
        """Why it cannot run here, if so."""
        if self.missing is not None:
            return self.missing
        if self.package is not None and find_spec(self.package) is None:
            return f"{INSTALL.get(self.package, self.package.replace('_', '-'))} is not installed"
        if self.package is not None and device != "cuda":
            return f"{self.package} needs CUDA"
        if self.backend == "triton" and (device != "cuda" or not has_triton()):
            return "Triton kernels need a GPU and the triton package"
        if self.compiled is not None and not compiles:
            return "compiling takes longer than measuring on a CPU: add --compile"
        return None


def ours(run: Function) -> dict[str, Peer]:
    return {"tenfold, Triton": Peer(run, backend="triton"), "tenfold, PyTorch": Peer(run, backend="torch")}


def ours_lean(run: Function, device: str) -> dict[str, Peer]:
    """The head's other mode, on the backend that is meant for the device."""
    backend, name = ("triton", "Triton") if device == "cuda" else ("torch", "PyTorch")
    return {f"tenfold, {name}, lean": Peer(run, backend=backend)}


def eager_and_compiled(run: Function, *, chunker: bool = False) -> dict[str, Peer]:
    names = [name for name in COMPILED if chunker or "chunker" not in name]
    return {"torch eager": Peer(run)} | {name: Peer(run, compiled=COMPILED[name]) for name in names}


# ------------------------------------------------------------------------------------------------ the head and its loss


def full_logits(label_smoothing: float) -> Function:
    return lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y, label_smoothing=label_smoothing)


def torch_chunked(policy: str) -> Function:
    """torch's own, which takes the gradients in forward as ours does; new in 2.13."""

    def run(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.linear_cross_entropy(h, w, y, options=torch.nn.LinearCrossEntropyOptions(acc_policy=policy))

    return run


def liger_head(label_smoothing: float, accum_dtype: torch.dtype | None) -> Function:
    def run(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(h, w, y, label_smoothing=label_smoothing, accum_dtype=accum_dtype)

    return run


def cut_cross_entropy(**options: Any) -> Function:
    def run(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(h, w, y, **options)

    return run


def fla_head(label_smoothing: float) -> Function:
    def run(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

        return fused_linear_cross_entropy_loss(h, y, w, label_smoothing=label_smoothing)

    return run


def quack_head(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(h, w, y)


def head_peers(label_smoothing: float, device: str, plain: Gold) -> dict[str, Peer]:
    """Everyone who computes the loss of a head from hidden [N, D], weight [V, D] and target [N].

    Who knows no label smoothing runs without, against `plain`, the gold of that easier loss.
    """
    peers = eager_and_compiled(full_logits(label_smoothing), chunker=True)
    peers |= {
        "Liger": Peer(liger_head(label_smoothing, None), "liger_kernel"),
        "Liger, fp32 accumulation": Peer(liger_head(label_smoothing, torch.float32), "liger_kernel"),
        "FLA": Peer(fla_head(label_smoothing), "fla"),
    }
    unsmoothed = {f"F.linear_cross_entropy, {p}": Peer(torch_chunked(p)) for p in ("auto", "compact", "balanced")}
    for name, peer in unsmoothed.items():
        if not hasattr(F, "linear_cross_entropy"):
            unsmoothed[name] = replace(peer, missing=f"torch {torch.__version__} does not have it")
        elif device == "cpu" and not name.endswith("auto"):
            unsmoothed[name] = replace(
                peer, missing="for GPUs: torch emulates its matmuls on a CPU, where auto avoids it"
            )
    unsmoothed |= {
        "Cut Cross-Entropy": Peer(cut_cross_entropy(), "cut_cross_entropy"),
        "Cut Cross-Entropy, no filter": Peer(cut_cross_entropy(filter_eps=None), "cut_cross_entropy"),
        "Cut Cross-Entropy, exact": Peer(cut_cross_entropy(impl="cce_exact"), "cut_cross_entropy"),
        "quack": Peer(quack_head, "quack"),
    }
    if label_smoothing:
        easier = {"gold": plain, "note": "has no label smoothing: an easier loss"}
        unsmoothed = {name: replace(peer, **easier) for name, peer in unsmoothed.items()}
    return peers | unsmoothed


# -------------------------------------------------------------------------------------------- losses of existing logits


def liger_loss(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def quack_loss(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, target)


# ------------------------------------------------------------------------------------------------------------- the scan


def fft_scan(beta: Tensor, log_rho: Tensor, omega: Tensor) -> Tensor:
    """The convolution with the powers of the decay; only of one that is the same at all positions."""
    length = beta.shape[1]
    powers = torch.exp(torch.arange(length, device=beta.device).unsqueeze(1) * torch.complex(log_rho, omega))
    signal = torch.complex(*(half.float().contiguous() for half in beta.chunk(2, dim=-1)))
    product = torch.fft.fft(signal, 2 * length, dim=1) * torch.fft.fft(powers, 2 * length, dim=0)
    state = torch.fft.ifft(product, dim=1)[:, :length]
    return torch.cat([state.real, state.imag], dim=-1).to(beta.dtype)


def accelerated_scan_layout(beta: Tensor, log_rho: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, 2K] and [K] or [B, T, K] -> decay and input, complex64 [B, K, T]."""
    signal = torch.complex(*(half.float() for half in beta.chunk(2, dim=-1)))
    decay = torch.exp(torch.complex(log_rho, omega)).expand_as(signal)
    return decay.transpose(1, 2).contiguous(), signal.transpose(1, 2).contiguous()


def accelerated_scan(decay: Tensor, signal: Tensor) -> Tensor:
    from accelerated_scan.complex import scan

    return scan(decay, signal)


def hgrn_layout(beta: Tensor, log_rho: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """The real half alone, and its decay at every position."""
    signal = beta.chunk(2, dim=-1)[0]
    return signal.contiguous(), log_rho.expand_as(signal).contiguous()


def hgrn(signal: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(signal, log_decay)[0]


def scan_peers(real_gold: Gold) -> dict[str, Peer]:
    """Of other people; `real_gold` is the gold of a scan whose imaginary half and phase are zero."""
    return {
        "accelerated-scan": Peer(
            accelerated_scan,
            "accelerated_scan",
            adapt=accelerated_scan_layout,
            restore=lambda y: torch.cat([y.real, y.imag], dim=1).transpose(1, 2),
            note="fp32, in its own layout",
        ),
        "FLA hgrn": Peer(
            hgrn,
            "fla",
            gold=real_gold,
            adapt=hgrn_layout,
            restore=lambda y: torch.cat([y, torch.zeros_like(y)], dim=-1),
            note="a real state and decay: half the work or less",
        ),
    }


# ---------------------------------------------------------------------------------------------------------- the pooling


def pooled_and_held(x: Tensor, weights: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Hold mode: pool, interpolate, and shift, for a block shows once it is complete."""
    y = torch.zeros_like(x)
    for scale, weight in zip(scales, weights, strict=True):
        held = F.interpolate(F.avg_pool1d(x.transpose(1, 2), scale), scale_factor=scale)
        y = y + weight * F.pad(held, (scale - 1, 0))[..., : x.shape[1]].transpose(1, 2)
    return y


def padded_and_pooled(x: Tensor, weights: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Trailing mode: windows of stride one over padded x; the first are shorter than they look."""
    y, position = torch.zeros_like(x), torch.arange(1, x.shape[1] + 1, device=x.device)
    for scale, weight in zip(scales, weights, strict=True):
        mean = F.avg_pool1d(F.pad(x.transpose(1, 2), (scale - 1, 0)), scale, stride=1)
        y = y + weight * (mean * (scale / position.clamp(max=scale)).to(x.dtype)).transpose(1, 2)
    return y


def fla_pooled_and_held(x: Tensor, weights: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Hold mode with FLA's mean pooling, a launch for each scale."""
    from fla.ops.utils import mean_pooling

    y = torch.zeros_like(x)
    for scale, weight in zip(scales, weights, strict=True):
        held = mean_pooling(x.unsqueeze(2), scale).squeeze(2).repeat_interleave(scale, dim=1)
        y = y + weight * F.pad(held, (0, 0, scale - 1, 0))[:, : x.shape[1]]
    return y
