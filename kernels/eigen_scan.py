"""The diagonal complex recurrence of Temporal Eigenstate Networks: c_t = lambda * c_{t-1} + beta_t.

`eigen_scan` is the op, `eigen_scan_reference` the sequential truth it is held against. The PyTorch fallback cuts time
into chunks and walks the positions inside all chunks in lockstep: once from zero states to find where each chunk ends,
then from chunk to chunk to find the state that truly enters each, then once more from there. The second walk stays in
cache, so it costs less than adding lambda^(i+1) * carry to [B, T, 2K] afterwards, and resets and time-varying decay
need no case of their own. Backward is the same walk from the other end (Martin & Cundy, arXiv 1709.04057).

Complex numbers are planar, a real and an imaginary plane: bf16 has no complex kin and MPS supports few complex ops.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import fused_op

# Numbers a CPU's thread works on in a step: half of them, one plane, is the least that PyTorch gives a thread, and with
# what they are made of they fit in its L2 cache.
STEP_SIZE = 2**16


class ScanOutput(NamedTuple):
    states: Tensor  # [B, T, 2K] in beta's dtype
    final_state: Tensor  # [B, 2K], fp32 (float64 for a float64 beta)
    energy: Tensor | None  # [B], as final_state


# ---- layout: planes, segments, decay -----------------------------------------------------------------------------


def _planes(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, x.shape[-1] // 2))  # [..., 2K] -> [..., 2, K]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _State(NamedTuple):
    """A [..., 2, K] tensor and its two planes: taking views at every step would cost as much as the arithmetic."""

    both: Tensor
    re: Tensor
    im: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _State:
        return cls(x, *x.unbind(-2))


class _Segment(NamedTuple):
    """A run of N chunks of C positions each."""

    start: int
    num_chunks: int
    chunk: int

    def chunks(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> the view [B, N, C, ...]."""
        return x.narrow(1, self.start, self.num_chunks * self.chunk).unflatten(1, (self.num_chunks, self.chunk))

    def steps(self, x: Tensor) -> list[Tensor]:
        """[B, T, ...] -> C views [B, N, ...], one for each position inside the chunks."""
        return list(self.chunks(x).unbind(2))

    def keeps(self, keep: Tensor | None) -> list[Tensor] | list[None]:
        return [None] * self.chunk if keep is None else self.steps(keep)

    def states(self, x: Tensor) -> list[_State]:
        """As `steps`, of [B, T, 2, K]."""
        return list(map(_State, self.steps(x), *map(self.steps, x.unbind(-2))))

    def keep_whole(self, keep: Tensor | None) -> Tensor | None:
        """[B, N, 1, 1] of `_keep_bits`: what entered a chunk leaves it only if no position of it resets."""
        return None if keep is None else self.chunks(keep).amax(2)


def _segments(x: Tensor) -> list[_Segment]:
    """Even chunks of [B, T, 2, K], then what is left of them as one short chunk."""
    # C steps over all chunks twice, then T / C carries: the root of T balances them. On a CPU longer chunks keep the
    # states of a step in cache, and once one row of them fills it, a single chunk needs a single walk. A power of two
    # keeps C * omega exact, so the angle of lambda^C is as good as cos and sin can make it.
    length = x.shape[1]
    chunk = 1 << (max(length, 1).bit_length() - 1) // 2
    if x.device.type == "cpu":
        chunk = max(chunk, 1 << (x.numel() // (STEP_SIZE * torch.get_num_threads())).bit_length() >> 1)
    whole, rest = divmod(length, chunk)
    segments = [_Segment(0, whole, chunk), _Segment(whole * chunk, 1, rest)]
    return [s for s in segments if s.num_chunks * s.chunk > 0]


class _Decay:
    """lambda = exp(log_rho + i*omega) as (real, imaginary) factors, for single positions and for whole chunks."""

    def __init__(self, log_rho: Tensor, omega: Tensor, dtype: torch.dtype):
        self.dtype, wide = dtype, torch.promote_types(log_rho.dtype, dtype)
        self.log_rho, self.omega = log_rho.to(wide), omega.to(wide)
        self.factors = self._factors(self.log_rho, self.omega)

    def _factors(self, log_rho: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 1, K] to multiply both planes with, and [..., K] to cross them with."""
        rho = log_rho.exp()
        return (rho * omega.cos()).to(self.dtype).unsqueeze(-2), (rho * omega.sin()).to(self.dtype)

    def steps(self, segment: _Segment) -> list[tuple[Tensor, Tensor]]:
        if self.log_rho.dim() == 1:
            return [self.factors] * segment.chunk  # [K]
        return list(zip(*map(segment.steps, self.factors), strict=True))  # [B, N, K]

    def products(self, segment: _Segment) -> list[tuple[Tensor, Tensor]]:
        """The product of lambda over each chunk, from summed exponents: no negative power, so nothing overflows."""
        if self.log_rho.dim() == 1:
            return [self._factors(segment.chunk * self.log_rho, segment.chunk * self.omega)] * segment.num_chunks
        # An angle of 1000 is known to 3e-5 in fp32; MPS has nothing wider.
        wide = self.omega.dtype if self.omega.device.type == "mps" else torch.float64
        sums = (segment.chunks(x).sum(2, dtype=wide) for x in (self.log_rho, self.omega))
        return list(zip(*(p.unbind(1) for p in self._factors(*sums)), strict=True))  # [B, K]


def _keep_bits(reset: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, T, 1, 1] integers as wide as dtype: no bit set where the state before is cut off, all of them elsewhere."""
    if reset is None:
        return None
    return torch.where(reset, 0, -1).to(torch.int64 if dtype == torch.float64 else torch.int32)[..., None, None]


def _kept(state: _State, keep: Tensor | None) -> _State:
    """By its bits: 0 * NaN would cross a reset, and masked_fill takes 15 times as long on a CPU."""
    return state if keep is None else _State.of((state.both.view(keep.dtype) & keep).view(state.both.dtype))


# ---- the walks: state [B, N, 2, K], one position of every chunk at a time ----------------------------------------


def _multiply_add(x: Tensor | None, state: _State, decay: tuple[Tensor, Tensor], out: _State) -> _State:
    """out = x + lambda * state."""
    a, b = decay
    if x is None:
        torch.mul(state.both, a, out=out.both)
    else:
        torch.addcmul(x.to(out.both.dtype), a, state.both, out=out.both)
    out.re.addcmul_(b, state.im, value=-1)
    out.im.addcmul_(b, state.re)
    return out


def _carry(ends: Tensor, products: list, keep: Tensor | None, state: Tensor, reverse: bool = False) -> Tensor:
    """The states [B, N, 2, K] that enter the chunks: state the first one, ends[:, j] is where chunk j ends from 0."""
    entering = torch.empty_like(ends)
    order, into = (
        list(range(ends.shape[1])),
        list(map(_State, entering.unbind(1), *(p.unbind(1) for p in entering.unbind(-2)))),
    )
    if reverse:
        order.reverse()
    entering[:, order[0]] = state
    for here, after in pairwise(order):
        before = _kept(into[here], None if keep is None else keep[:, here])
        _multiply_add(ends[:, here], before, products[here], into[after])
    return entering


def _walk(x: list, decays: list, keeps: list, entering: Tensor, outs: Iterable[_State]) -> Tensor:
    """Every chunk from its entering state to its last, which is returned; the states on the way are written to outs."""
    state = _State.of(entering)
    for x_i, decay, keep, out in zip(x, decays, keeps, outs, strict=False):
        state = _multiply_add(x_i, _kept(state, keep), decay, out)
    return state.both


def _add_decay_gradient(back: _State, previous: _State, log_rho_sum: Tensor, omega_sum: Tensor) -> None:
    """With q = conj(lambda) * dc_t: d log_rho += Re(conj(q) * c_{t-1}), d omega += Im(q * conj(c_{t-1}))."""
    log_rho_sum.addcmul_(back.re, previous.re).addcmul_(back.im, previous.im)
    omega_sum.addcmul_(back.im, previous.re).addcmul_(back.re, previous.im, value=-1)


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
    dtype = state_dtype(beta.dtype)
    x, decay, keep = _planes(beta), _Decay(log_rho, omega, dtype), _keep_bits(reset, dtype)
    states = torch.empty(x.shape, dtype=dtype, device=x.device)  # [B, T, 2, K]
    carry = states.new_zeros(x.shape[0], *x.shape[2:]) if initial_state is None else _planes(initial_state)
    for seg in _segments(x):
        walk = seg.steps(x), decay.steps(seg), seg.keeps(keep)
        entering = carry.unsqueeze(1)
        if seg.num_chunks > 1:
            scratch = states.new_empty(2, x.shape[0], seg.num_chunks, *x.shape[2:])
            xs, decays, keeps = walk
            ends = _walk(xs[1:], decays[1:], keeps[1:], xs[0].to(dtype), cycle(map(_State.of, scratch)))
            entering = _carry(ends, decay.products(seg), seg.keep_whole(keep), carry)
        carry = _walk(*walk, entering, seg.states(states))[:, -1]
    energy = states.new_empty(0)
    if with_energy:
        energy = torch.linalg.vector_norm(states, dim=(2, 3)).square()  # [B, T]
        energy = (energy if energy_mask is None else energy.masked_fill(~energy_mask, 0)).sum(1)
    return states.flatten(2).to(beta.dtype), carry.flatten(1).clone(), energy


@_eigen_scan_fwd.register_fake
def _(beta: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, with_energy = others
    dtype = state_dtype(beta.dtype)
    batch, _, width = beta.shape
    final_state = beta.new_empty(batch, width, dtype=dtype)
    energy = beta.new_empty(batch if with_energy else 0, dtype=dtype)
    return torch.empty_like(beta, memory_format=torch.contiguous_format), final_state, energy


def _direct_gradient(
    grad_states: Tensor | None, grad_energy: Tensor | None, states: Tensor, energy_mask: Tensor | None
) -> Tensor:
    """[B, T, 2, K], perhaps a view of grad_states: what reaches each state other than through later states."""
    grad = states.new_zeros(()).expand_as(states) if grad_states is None else grad_states
    if grad_energy is not None:
        counted = states if energy_mask is None else states.masked_fill(~energy_mask[..., None], 0)
        grad = torch.addcmul(grad, counted, 2 * grad_energy[:, None, None])  # d sum |c|^2 = 2 c dc
    return _planes(grad)


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
    direct, c = _direct_gradient(grad_states, grad_energy, states, energy_mask), _planes(states)
    grad = torch.empty(c.shape, dtype=state_dtype(states.dtype), device=c.device)  # [B, T, 2, K]
    conj, keep = _Decay(log_rho, -omega, grad.dtype), _keep_bits(reset, grad.dtype)
    zero_state = grad.new_zeros(grad.shape[0], *grad.shape[2:])
    first = zero_state if initial_state is None else _planes(initial_state)
    carry = zero_state if grad_final_state is None else _planes(grad_final_state)
    sums = [torch.zeros(log_rho.shape, dtype=grad.dtype, device=grad.device) for _ in range(2)]
    for seg in reversed(_segments(grad)):
        g, decays, keeps = seg.steps(direct)[::-1], conj.steps(seg)[::-1], seg.keeps(keep)[::-1]
        scratch = grad.new_empty(3, grad.shape[0], seg.num_chunks, *grad.shape[2:])
        sent, future = _State.of(scratch[2]), carry.unsqueeze(1)  # what later chunks send to the last state of each
        if seg.num_chunks > 1:
            totals = cycle(map(_State.of, scratch[:2]))
            total = _walk(g[1:], decays[:-1], keeps[:-1], g[0].to(grad.dtype), totals)
            back = _kept(_multiply_add(None, _State.of(total), decays[-1], sent), keeps[-1])
            future = _carry(back.both, conj.products(seg), seg.keep_whole(keep), carry, reverse=True)

        entering = c[:, seg.start - 1] if seg.start else first
        entering = torch.cat([entering[:, None], seg.chunks(c)[:, :-1, -1]], 1)
        previous = [entering, *seg.steps(c)[:-1]][::-1]
        # The gradient of a [K] decay is summed within each chunk, then over them: short sums, so fp32 is enough.
        targets = [seg.steps(s) if s.dim() == 3 else [torch.zeros_like(sent.re)] * seg.chunk for s in sums]
        back, outs = _State.of(future), seg.states(grad)[::-1]
        walk = zip(g, decays, keeps, outs, previous, *(t[::-1] for t in targets), strict=True)
        for g_i, decay, kept, out, before, *target in walk:
            torch.add(g_i, back.both, out=out.both)
            back = _kept(_multiply_add(None, out, decay, sent), kept)
            _add_decay_gradient(back, _kept(_State.of(before.to(grad.dtype)), kept), *target)
        if log_rho.dim() == 1:
            sums = [s + t[0].sum((0, 1)) for s, t in zip(sums, targets, strict=True)]
        carry = back.both[:, 0]
    grad_log_rho, grad_omega = (s.to(log_rho.dtype) for s in sums)
    return grad.flatten(2).to(states.dtype), grad_log_rho, grad_omega, carry.flatten(1).clone()


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
