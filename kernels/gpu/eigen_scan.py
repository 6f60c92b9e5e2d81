"""How `eigen_scan` is cut into programs, and the launches of its kernels: see eigen_scan_kernels.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.chunked_scan import state_dtype
from kernels.dispatch import launch, multiprocessors
from kernels.gpu.eigen_scan_kernels import (
    eigen_scan_bwd_ends_kernel,
    eigen_scan_bwd_kernel,
    eigen_scan_carry_kernel,
    eigen_scan_fwd_ends_kernel,
    eigen_scan_fwd_kernel,
)

# A program has 4 KiB of loads in flight: 256 bytes of a plane, two planes, 8 steps (or four and 4, backward). At 4.8
# TB/s and 0.7 us of latency an SM wants 26 KiB (Little's law). Up to 16 programs of at most 128 registers a thread
# run on it at once; one pass over T with 4 of them still beats three phases with 16, which move 1.5 times as much.
BYTES_OF_A_PLANE = 256
PROGRAMS_TO_FILL, PROGRAMS_FOR_ONE_PASS = 16, 4
SHORTEST_CHUNK = 64  # walked in less time than the launches of two more kernels take; a multiple of any UNROLL
LONGEST_CHUNK = 1024  # fp32 rounds lambda by 2^-25: 3e-5 over a chunk, and no further, for lambda^chunk is exact


class _Plan(NamedTuple):
    """How [B, T, 2K] is cut: B * num_chunks * blocks programs of `block` channels and `chunk` positions."""

    batch: int
    num_states: int
    block: int
    blocks: int
    chunk: int
    num_chunks: int

    def launch(self, kernel: Any, chunks: int, *args: Any, **constants: Any) -> None:
        grid = (self.batch * chunks * self.blocks,)
        constants |= {"NUM_STATES": self.num_states, "BLOCK": self.block}
        launch("eigen_scan", kernel, grid, *args, **constants, num_warps=1)


def _plan(x: Tensor, log_rho: Tensor) -> _Plan:
    (batch, length, width), device = x.shape, multiprocessors(x.device)
    itemsize = max(x.element_size(), log_rho.element_size() if log_rho.dim() == 3 else 0)
    block = min(BYTES_OF_A_PLANE // itemsize, triton.next_power_of_2(max(width // 2, 1)))
    blocks = triton.cdiv(width // 2, block)
    # As few chunks as fill the device, for the carry walks them one by one; nor more than there are steps in a chunk.
    filling = triton.next_power_of_2(max(length * batch * blocks // (PROGRAMS_TO_FILL * device), 1))
    chunk = max(SHORTEST_CHUNK, 1 << length.bit_length() // 2, min(filling, LONGEST_CHUNK))
    if length <= chunk or batch * blocks >= PROGRAMS_FOR_ONE_PASS * device:
        return _Plan(batch, width // 2, block, blocks, length, 1)
    return _Plan(batch, width // 2, block, blocks, chunk, triton.cdiv(length, chunk))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    """(b, t, k) of each; a decay [K] does not move with b and t."""
    return [stride for x in tensors for stride in (x.stride() if x.dim() == 3 else (0, 0, x.stride(0)))]


def _entering(
    plan: _Plan,
    ends_kernel: Any,
    log_rho: Tensor,
    omega: Tensor,
    reset: Tensor | None,
    inputs: tuple,
    sizes: tuple[int, ...],
    first: Tensor | None,
    **constants: Any,
) -> Tensor | None:
    """The states that enter the chunks, [B, num_chunks, 2K] (phases 1 and 2): `first` is the first of them."""
    if plan.num_chunks == 1:
        return first
    slots = log_rho.new_empty(plan.batch, plan.num_chunks, 2 * plan.num_states, dtype=state_dtype(inputs[-1].dtype))
    products = slots.new_empty(plan.batch, plan.num_chunks - 1, 2 * plan.num_states) if log_rho.dim() == 3 else None
    cuts = None if reset is None else reset.new_empty(plan.batch, plan.num_chunks - 1)
    kept = slots, products, cuts
    plan.launch(ends_kernel, plan.num_chunks - 1, log_rho, omega, reset, *inputs, *kept, *sizes, **constants)
    backwards = ends_kernel is eigen_scan_bwd_ends_kernel
    arguments = log_rho, omega, first, *kept, plan.chunk, plan.num_chunks, log_rho.stride(-1), omega.stride(-1)
    plan.launch(eigen_scan_carry_kernel, 1, *arguments, CONJUGATE=backwards, UNROLL=8)
    return slots


def forward(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    energy_mask: Tensor | None,
    with_energy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the fallback `kernels.chunked_scan.forward`."""
    plan, wide = _plan(beta, log_rho), state_dtype(beta.dtype)
    initial_state, reset, energy_mask = _contiguous(initial_state, reset, energy_mask)
    sizes = beta.shape[1], plan.chunk, plan.num_chunks, *_strides(log_rho, omega, beta)
    constants = {"PER_POSITION": log_rho.dim() == 3, "UNROLL": 8}
    ends = eigen_scan_fwd_ends_kernel
    entering = _entering(plan, ends, log_rho, omega, reset, (beta,), sizes, initial_state, **constants)
    states, final_state = beta.new_empty(beta.shape), beta.new_empty(plan.batch, beta.shape[2], dtype=wide)
    energy = final_state.new_empty(plan.batch, plan.num_chunks * plan.blocks) if with_energy else None
    tensors = log_rho, omega, reset, beta, entering, energy_mask, states, final_state, energy
    plan.launch(eigen_scan_fwd_kernel, plan.num_chunks, *tensors, *sizes, **constants)
    return states, final_state, final_state.new_empty(0) if energy is None else energy.sum(1)


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
    """As the fallback `kernels.chunked_scan.backward`."""
    plan, wide, per_position = _plan(states, log_rho), state_dtype(states.dtype), log_rho.dim() == 3
    grad_final_state, grad_energy, states = _contiguous(grad_final_state, grad_energy, states)
    initial_state, reset, energy_mask = _contiguous(initial_state, reset, energy_mask)
    moved = states if grad_states is None else grad_states
    sizes = states.shape[1], plan.chunk, plan.num_chunks, *_strides(log_rho, omega, moved)
    constants = {"PER_POSITION": per_position, "UNROLL": 4}
    inputs = grad_states, grad_energy, energy_mask, states
    ends = eigen_scan_bwd_ends_kernel
    entering = _entering(plan, ends, log_rho, omega, reset, inputs, sizes, grad_final_state, **constants)
    grad_beta, grad_initial = torch.empty_like(states), states.new_empty(plan.batch, states.shape[2], dtype=wide)
    if per_position:
        grad_decay = [log_rho.new_empty(log_rho.shape) for _ in range(2)]
    else:
        grad_decay = [grad_initial.new_empty(plan.batch, plan.num_chunks, plan.num_states) for _ in range(2)]
    tensors = log_rho, omega, reset, *inputs, entering, initial_state, grad_beta, *grad_decay, grad_initial
    plan.launch(eigen_scan_bwd_kernel, plan.num_chunks, *tensors, *sizes, **constants)
    if not per_position:
        grad_decay = [partials.sum((0, 1)).to(log_rho.dtype) for partials in grad_decay]
    grad_log_rho, grad_omega = grad_decay
    return grad_beta, grad_log_rho, grad_omega, grad_initial
