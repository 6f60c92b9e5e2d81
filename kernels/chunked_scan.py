"""The PyTorch fallback of `eigen_scan`: chunks of time, walked in lockstep.

It cuts time into chunks and walks the positions inside all chunks at once: first from zero states to find where each
chunk ends, then from chunk to chunk to find the state that truly enters each, then once more from there. The second
walk stays in cache, so it costs less than adding lambda^(i+1) * carry to [B, T, 2K] afterwards, and resets and
time-varying decay need no case of their own. Backward is the same walk from the other end (Martin & Cundy, arXiv
1709.04057).

Complex numbers are planar, a real and an imaginary plane: bf16 has no complex kin and MPS supports few complex ops.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers a CPU's thread works on in a step: half of them, one plane, is the least that PyTorch gives a thread, and with
# what they are made of they fit in its L2 cache.
STEP_SIZE = 2**16


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
        """[..., 1, K] or [2, K] to multiply both planes with, and [..., K] to cross them with."""
        rho = log_rho.exp()
        both = (rho * omega.cos()).to(self.dtype).unsqueeze(-2)
        if log_rho.dim() == 1:
            both = both.repeat(2, 1)  # broadcast, a CPU's inner loop would be half as long: 23 us a step, not 18
        return both, (rho * omega.sin()).to(self.dtype)

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
    order = range(ends.shape[1])[:: -1 if reverse else 1]
    into = list(map(_State, entering.unbind(1), *(p.unbind(1) for p in entering.unbind(-2))))
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


def _sent(state: Tensor, decay: tuple[Tensor, Tensor], keep: Tensor | None) -> Tensor:
    """What gradients [B, N, 2, K] of some positions add to those of the positions before."""
    return _kept(_multiply_add(None, _State.of(state), decay, _State.of(torch.empty_like(state))), keep).both


def _add_overlap(grad: _State, previous: _State, real: Tensor, imaginary: Tensor) -> None:
    """dc_t * conj(c_{t-1}) added to its parts; `real` is [B, N, K], or [B, N, 2, K] with its two products apart."""
    if real.dim() == grad.both.dim():
        real.addcmul_(grad.both, previous.both)
    else:
        real.addcmul_(grad.re, previous.re).addcmul_(grad.im, previous.im)
    imaginary.addcmul_(grad.im, previous.re).addcmul_(grad.re, previous.im, value=-1)


# ---- forward and backward ----------------------------------------------------------------------------------------


def forward(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    energy_mask: Tensor | None,
    with_energy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eigen_scan`, but for the energy, which is [0] when not asked for."""
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


def _direct_gradient(
    grad_states: Tensor | None, grad_energy: Tensor | None, states: Tensor, energy_mask: Tensor | None
) -> Tensor:
    """[B, T, 2, K], perhaps a view of grad_states: what reaches each state other than through later states."""
    grad = states.new_zeros(()).expand_as(states) if grad_states is None else grad_states
    if grad_energy is not None:
        counted = states if energy_mask is None else states.masked_fill(~energy_mask[..., None], 0)
        grad = torch.addcmul(grad, counted, 2 * grad_energy[:, None, None])  # d sum |c|^2 = 2 c dc
    return _planes(grad)


def backward(
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
        future = carry.unsqueeze(1)  # what later chunks send to the last state of each
        if seg.num_chunks > 1:
            scratch = grad.new_empty(2, grad.shape[0], seg.num_chunks, *grad.shape[2:])
            total = _walk(g[1:], decays[:-1], keeps[:-1], g[0].to(grad.dtype), cycle(map(_State.of, scratch)))
            back = _sent(total, decays[-1], keeps[-1])
            future = _carry(back, conj.products(seg), seg.keep_whole(keep), carry, reverse=True)

        entering = c[:, seg.start - 1] if seg.start else first
        entering = torch.cat([entering[:, None], seg.chunks(c)[:, :-1, -1]], 1)
        previous = [entering, *seg.steps(c)[:-1]][::-1]
        # For a [K] decay summed within each chunk, then over them: short sums, so fp32 is enough.
        apart = torch.zeros_like(entering, dtype=grad.dtype), torch.zeros_like(entering[..., 0, :], dtype=grad.dtype)
        overlaps = [seg.steps(s)[::-1] if s.dim() == 3 else [t] * seg.chunk for s, t in zip(sums, apart, strict=True)]
        outs = seg.states(grad)[::-1]
        torch.add(g[0], future, out=outs[0].both)
        for i, (out, before, *overlap) in enumerate(zip(outs, previous, *overlaps, strict=True)):
            if i:
                _multiply_add(g[i], _kept(outs[i - 1], keeps[i - 1]), decays[i - 1], out)
            _add_overlap(out, _kept(_State.of(before.to(grad.dtype)), keeps[i]), *overlap)
        if log_rho.dim() == 1:
            sums = [s + t.sum(tuple(range(t.dim() - 1))) for s, t in zip(sums, apart, strict=True)]
        carry = _sent(outs[-1].both, decays[-1], keeps[-1])[:, 0]
    # With z the sum of dc_t * conj(c_{t-1}): d log_rho = Re(conj(lambda) * z), d omega = Im(conj(lambda) * z).
    a, b = conj.factors[0][..., 0, :], conj.factors[1]
    grad_log_rho, grad_omega = (a * sums[0]).addcmul_(b, sums[1], value=-1), (a * sums[1]).addcmul_(b, sums[0])
    grad_log_rho, grad_omega = grad_log_rho.to(log_rho.dtype), grad_omega.to(log_rho.dtype)
    return grad.flatten(2).to(states.dtype), grad_log_rho, grad_omega, carry.flatten(1).clone()
