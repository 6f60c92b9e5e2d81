"""The diagonal complex recurrence of Temporal Eigenstate Networks: c_t = lambda * c_{t-1} + beta_t.

`eigen_scan` is the op, `eigen_scan_reference` the sequential truth it is held against; the PyTorch fallback is in
`chunked_scan`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import chunked_scan
from kernels.chunked_scan import state_dtype
from kernels.dispatch import fused_op


class ScanOutput(NamedTuple):
    states: Tensor  # [B, T, 2K] in beta's dtype
    final_state: Tensor  # [B, 2K], fp32 (float64 for a float64 beta)
    energy: Tensor | None  # [B], as final_state


# ---- the op ------------------------------------------------------------------------------------------------------


@fused_op("eigen_scan_fwd", "eigen_scan:forward")
def _eigen_scan_fwd(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    energy_mask: Tensor | None,
    with_energy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eigen_scan`; energy is [0] when not asked for, since an output of an op cannot be optional."""
    return chunked_scan.forward(beta, log_rho, omega, initial_state, reset, energy_mask, with_energy)


@_eigen_scan_fwd.register_fake
def _(beta: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, with_energy = others
    dtype = state_dtype(beta.dtype)
    batch, _, width = beta.shape
    final_state = beta.new_empty(batch, width, dtype=dtype)
    energy = beta.new_empty(batch if with_energy else 0, dtype=dtype)
    return torch.empty_like(beta, memory_format=torch.contiguous_format), final_state, energy


@fused_op("eigen_scan_bwd", "eigen_scan:backward")
def _eigen_scan_bwd(
    grad_states: Tensor | None,
    grad_final_state: Tensor | None,
    grad_energy: Tensor | None,
    states: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    energy_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of beta, log_rho, omega and initial_state (also where there was none: the one of its zeros)."""
    return chunked_scan.backward(
        grad_states, grad_final_state, grad_energy, states, log_rho, omega, initial_state, reset, energy_mask
    )


@_eigen_scan_bwd.register_fake
def _(
    grad_states: Tensor | None,
    grad_final_state: Tensor | None,
    grad_energy: Tensor | None,
    states: Tensor,
    log_rho: Tensor,
    *others: Tensor | None,
) -> tuple[Tensor, ...]:
    grad_initial = states.new_empty(states.shape[0], states.shape[2], dtype=state_dtype(states.dtype))
    contiguous = torch.contiguous_format
    grad_decay = [torch.empty_like(log_rho, memory_format=contiguous) for _ in range(2)]
    return torch.empty_like(states, memory_format=contiguous), *grad_decay, grad_initial


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, log_rho, omega, initial_state, reset, energy_mask, ctx.with_energy = inputs
    ctx.save_for_backward(output[0], log_rho, omega, initial_state, reset, energy_mask)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_states: Tensor | None, grad_final_state: Tensor | None, grad_energy: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_energy = grad_energy if ctx.with_energy else None
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them out once
    grads = _eigen_scan_bwd(grad_states, grad_final_state, grad_energy, *saved)
    has_initial_state = saved[3] is not None
    return *grads[:3], grads[3] if has_initial_state else None, None, None, None


_eigen_scan_fwd.register_autograd(_backward, setup_context=_setup_context)


# ---- the public faces --------------------------------------------------------------------------------------------


def _check(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    energy_mask: Tensor | None,
    with_energy: bool,
) -> None:
    if beta.dim() != 3 or beta.shape[-1] % 2:
        raise ValueError(f"beta must be [B, T, 2K], real half then imaginary half; got {list(beta.shape)}")
    if not beta.is_floating_point():
        raise TypeError(f"beta must be a real floating-point tensor, got {beta.dtype}")
    batch, length, width = beta.shape
    for name, x in (("log_rho", log_rho), ("omega", omega)):
        if tuple(x.shape) not in ((width // 2,), (batch, length, width // 2)):
            shapes = f"[{width // 2}] or [{batch}, {length}, {width // 2}]"
            raise ValueError(f"{name} must be {shapes} to go with beta {list(beta.shape)}, got {list(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64 (lower precision loses the phase), got {x.dtype}")
    if initial_state is not None and initial_state.shape != (batch, width):
        raise ValueError(f"initial_state must be [{batch}, {width}], got {list(initial_state.shape)}")
    for name, mask in (("reset", reset), ("energy_mask", energy_mask)):
        if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
            raise ValueError(f"{name} must be bool [{batch}, {length}], got {mask.dtype} {list(mask.shape)}")
    if energy_mask is not None and not with_energy:
        raise ValueError("energy_mask says which positions the energy counts: pass with_energy=True, or no mask")


def eigen_scan(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    with_energy: bool = False,
    energy_mask: Tensor | None = None,
) -> ScanOutput:
    """c_t = exp(log_rho + i*omega) * c_{t-1} + beta_t for K complex channels.

    The recurrence of LRU (arXiv 2303.06349, eq. 4) and of Temporal Eigenstate Networks. Differentiable once, through
    all three outputs, into beta, log_rho, omega and initial_state.

    Args:
        beta: [B, T, 2K], real half then imaginary half; any real floating dtype and strides. T may be 0.
        log_rho, omega: each [K] or [B, T, K], float32 or float64. log_rho <= 0 is the caller's to keep (checking would
            wait for the device): above 0 the state grows without bound. -inf is a decay of exactly 0.
        initial_state: [B, 2K], the c_{-1}; zero by default. Computed with in the state's dtype.
        reset: [B, T] bool; where true, c_{t-1} is taken as 0 (a document starts here), initial_state too.
        with_energy: also return the energy.
        energy_mask: [B, T] bool, the positions the energy counts; all by default.

    Returns:
        ScanOutput: states [B, T, 2K] in beta's dtype; final_state [B, 2K]; energy [B], the sum of |c|^2 over the
        counted t and all k, or None. The state's dtype, which is also that of the last two, is float32, or float64 if
        beta is; states in a lower precision are rounded copies, and backward reads those.

    Raises:
        ValueError: a shape does not fit beta's, a mask is not bool, or energy_mask comes without with_energy.
        TypeError: beta is not floating point, or log_rho or omega is neither float32 nor float64.
    """
    _check(beta, log_rho, omega, initial_state, reset, energy_mask, with_energy)
    if log_rho.shape != omega.shape:
        log_rho, omega = torch.broadcast_tensors(log_rho, omega)
    if log_rho.dtype != omega.dtype:
        log_rho, omega = log_rho.double(), omega.double()
    if initial_state is not None:
        initial_state = initial_state.to(state_dtype(beta.dtype))
    states, final_state, energy = _eigen_scan_fwd(beta, log_rho, omega, initial_state, reset, energy_mask, with_energy)
    return ScanOutput(states, final_state, energy if with_energy else None)


def eigen_scan_reference(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    with_energy: bool = False,
    energy_mask: Tensor | None = None,
) -> ScanOutput:
    """`eigen_scan` one position at a time, by plain autograd, in the dtype the inputs promote to. Needs T > 0."""
    decay_re, decay_im = log_rho.exp() * omega.cos(), log_rho.exp() * omega.sin()  # [K] or [B, T, K]
    re, im = (torch.zeros_like(beta[:, 0]) if initial_state is None else initial_state).chunk(2, -1)
    # unbind, because the backward of T separate selects is O(T^2)
    betas, cuts = beta.unbind(1), [] if reset is None else reset.unbind(1)
    a, b = (d.expand(beta.shape[1], -1).unbind(0) if d.dim() == 1 else d.unbind(1) for d in (decay_re, decay_im))
    steps = []
    for t, (beta_re, beta_im) in enumerate(x.chunk(2, -1) for x in betas):
        if cuts:
            re, im = (torch.where(cuts[t][:, None], 0, part) for part in (re, im))
        re, im = a[t] * re - b[t] * im + beta_re, b[t] * re + a[t] * im + beta_im
        steps.append(torch.cat([re, im], -1))
    states = torch.stack(steps, 1)  # [B, T, 2K]
    counted = states if energy_mask is None else torch.where(energy_mask[..., None], states, 0)
    return ScanOutput(states, states[:, -1], counted.square().sum((1, 2)) if with_energy else None)
