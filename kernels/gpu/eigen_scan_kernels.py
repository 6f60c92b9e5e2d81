"""Triton kernels of `eigen_scan`: a scan in three phases, sequential in time and parallel over channels and chunks.

1. `..._ends_kernel` walks every chunk but the last from a zero state and keeps only where it ends;
2. `eigen_scan_carry_kernel` goes from chunk to chunk with lambda^chunk and finds the state that truly enters each;
3. `eigen_scan_fwd_kernel` and `eigen_scan_bwd_kernel` walk again from there and write.

That reads the input twice, which is cheaper than a second trip of the states. Where batch and channels alone keep the
device busy, or time is short, one chunk is the whole sequence and phase 3 is all there is. Backward is the mirror
image: step s is position T - 1 - s, the factors are conjugate, and the state is what later positions send back.

A program is one warp that owns BLOCK channels, both planes, and keeps its state in registers. It loads UNROLL steps
before it computes them: in a recurrence nothing hides latency but loads in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.planar import load, load_decay, multiply, multiply_conjugate, planes, polar, store, where

# ---- parts -------------------------------------------------------------------------------------------------------


@triton.jit
def _program(num_chunks, NUM_STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Batch row, chunk, channels [BLOCK] and which of them exist; blocks of channels go fastest: they share rows."""
    blocks: tl.constexpr = (NUM_STATES + BLOCK - 1) // BLOCK
    row, k = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row // num_chunks, row % num_chunks, k.to(tl.int64), k < NUM_STATES


@triton.jit
def _keep_end(slots, products, cuts, end, product, was_cut, b, j, num_chunks, k, NUM_STATES: tl.constexpr, mask):
    """For the carry: where chunk j ends from zero, into slot j + 1; its lambdas multiplied; whether it has a reset."""
    store(planes(slots, (b * num_chunks + j + 1) * 2 * NUM_STATES, 1, k, NUM_STATES), 0, end, mask)
    chunk_row = b * (num_chunks - 1) + j
    if products is not None:
        store(planes(products, chunk_row * 2 * NUM_STATES, 1, k, NUM_STATES), 0, product, mask)
    if cuts is not None:
        tl.store(cuts + chunk_row, was_cut)  # the same from every block of channels


# ---- forward -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length", "chunk", "num_chunks"])
def eigen_scan_fwd_ends_kernel(
    log_rho, omega, reset, beta, slots, products, cuts, length, chunk, num_chunks,
    rho_b, rho_t, rho_k, omega_b, omega_t, omega_k, beta_b, beta_t, beta_k,
    NUM_STATES: tl.constexpr, PER_POSITION: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    wide: tl.constexpr = slots.dtype.element_ty
    b, j, k, mask = _program(num_chunks - 1, NUM_STATES, BLOCK)
    x = planes(beta, b * beta_b, beta_k, k, NUM_STATES)
    decay, decay_t = (log_rho + b * rho_b + k * rho_k, omega + b * omega_b + k * omega_k), (rho_t, omega_t)
    zero = tl.zeros([BLOCK], wide)
    state, product, was_cut = (zero, zero), (zero + 1, zero), j < 0
    if not PER_POSITION:
        factor = polar(load_decay(decay, 0, decay_t, mask), wide)
    for step in range(0, chunk, UNROLL):
        xs, decays, resets = (), (), ()
        for i in tl.static_range(UNROLL):
            t = j * chunk + step + i
            xs += (load(x, t * beta_t, mask),)
            if PER_POSITION:
                decays += (load_decay(decay, t, decay_t, mask),)
            if reset is not None:
                resets += (tl.load(reset + b * length + t) != 0,)
        for i in tl.static_range(UNROLL):
            if PER_POSITION:
                factor = polar(decays[i], wide)
                product = multiply(factor, product)
            if reset is not None:
                state, was_cut = where(resets[i], (zero, zero), state), was_cut | resets[i]
            turned = multiply(factor, state)
            state = turned[0] + xs[i][0], turned[1] + xs[i][1]
    _keep_end(slots, products, cuts, state, product, was_cut, b, j, num_chunks, k, NUM_STATES, mask)


@triton.jit(do_not_specialize=["length", "chunk", "num_chunks"])
def eigen_scan_fwd_kernel(
    log_rho, omega, reset, beta, entering, energy_mask, states, final_state, energy, length, chunk, num_chunks,
    rho_b, rho_t, rho_k, omega_b, omega_t, omega_k, beta_b, beta_t, beta_k,
    NUM_STATES: tl.constexpr, PER_POSITION: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Every chunk from the state that enters it, of entering [B, num_chunks, 2K] or zero; energy [B, chunk, block]."""
    wide: tl.constexpr = final_state.dtype.element_ty
    b, j, k, mask = _program(num_chunks, NUM_STATES, BLOCK)
    x = planes(beta, b * beta_b, beta_k, k, NUM_STATES)
    decay, decay_t = (log_rho + b * rho_b + k * rho_k, omega + b * omega_b + k * omega_k), (rho_t, omega_t)
    out = planes(states, b * length * 2 * NUM_STATES, 1, k, NUM_STATES)
    zero = tl.zeros([BLOCK], wide)
    state, total = (zero, zero), zero
    if entering is not None:
        state = load(planes(entering, (b * num_chunks + j) * 2 * NUM_STATES, 1, k, NUM_STATES), 0, mask)
    if not PER_POSITION:
        factor = polar(load_decay(decay, 0, decay_t, mask), wide)
    first = j * chunk
    for step in range(0, tl.minimum(length - first, chunk).to(tl.int32), UNROLL):
        xs, decays, resets, counts = (), (), (), ()
        for i in tl.static_range(UNROLL):
            t = first + step + i
            exists = t < length
            xs += (load(x, t * beta_t, mask & exists),)
            if PER_POSITION:
                decays += (load_decay(decay, t, decay_t, mask & exists),)
            if reset is not None:
                resets += (tl.load(reset + b * length + t, mask=exists, other=0) != 0,)
            if energy_mask is not None:
                counts += (tl.load(energy_mask + b * length + t, mask=exists, other=0) != 0,)
        for i in tl.static_range(UNROLL):
            t = first + step + i
            exists = t < length
            if PER_POSITION:
                factor = polar(decays[i], wide)
            before = where(resets[i], (zero, zero), state) if reset is not None else state
            turned = multiply(factor, before)
            after = turned[0] + xs[i][0], turned[1] + xs[i][1]
            store(out, t * 2 * NUM_STATES, after, mask & exists)
            if energy is not None:
                counted = counts[i] if energy_mask is not None else exists
                total += tl.where(counted, after[0] * after[0] + after[1] * after[1], 0.0)
            state = where(exists, after, state)
    if energy is not None:
        tl.store(energy + tl.program_id(0), tl.sum(total))
    store(planes(final_state, b * 2 * NUM_STATES, 1, k, NUM_STATES), 0, state, mask & (j == num_chunks - 1))


@triton.jit(do_not_specialize=["chunk", "num_chunks"])
def eigen_scan_carry_kernel(
    log_rho, omega, first, slots, products, cuts, chunk, num_chunks, rho_k, omega_k,
    NUM_STATES: tl.constexpr, CONJUGATE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """slots[:, j] := the state that enters chunk j, from where chunk j - 1 ended when zero entered it."""
    wide: tl.constexpr = slots.dtype.element_ty
    b, _, k, mask = _program(1, NUM_STATES, BLOCK)
    row = planes(slots, b * num_chunks * 2 * NUM_STATES, 1, k, NUM_STATES)
    zero = tl.zeros([BLOCK], wide)
    state = (zero, zero)
    if first is not None:
        state = load(planes(first, b * 2 * NUM_STATES, 1, k, NUM_STATES), 0, mask)
    store(row, 0, state, mask)
    if products is None:  # lambda^chunk; the angle is exact, for a chunk is a power of two
        exponent, angle = load_decay((log_rho + k * rho_k, omega + k * omega_k), 0, (0, 0), mask)
        factor = polar((chunk * exponent, (-chunk if CONJUGATE else chunk) * angle), wide)
    for step in range(0, num_chunks - 1, UNROLL):
        ends, factors, resets = (), (), ()
        for i in tl.static_range(UNROLL):
            j, exists = step + i, step + i < num_chunks - 1
            ends += (load(row, (j + 1) * 2 * NUM_STATES, mask & exists),)
            chunk_row = b * (num_chunks - 1) + j
            if products is not None:
                factors += (load(planes(products, chunk_row * 2 * NUM_STATES, 1, k, NUM_STATES), 0, mask & exists),)
            if cuts is not None:
                resets += (tl.load(cuts + chunk_row, mask=exists, other=0) != 0,)
        for i in tl.static_range(UNROLL):
            j, exists = step + i, step + i < num_chunks - 1
            if products is not None:
                factor = factors[i]
            if cuts is not None:
                state = where(resets[i], (zero, zero), state)
            turned = multiply(factor, state)
            state = turned[0] + ends[i][0], turned[1] + ends[i][1]
            store(row, (j + 1) * 2 * NUM_STATES, state, mask & exists)


# ---- backward: step s is position length - 1 - s -----------------------------------------------------------------


@triton.jit
def _add_energy(grad, state, counted, scale):
    return grad[0] + tl.where(counted, scale * state[0], 0.0), grad[1] + tl.where(counted, scale * state[1], 0.0)


@triton.jit(do_not_specialize=["length", "chunk", "num_chunks"])
def eigen_scan_bwd_ends_kernel(
    log_rho, omega, reset, grad_states, grad_energy, energy_mask, states, slots, products, cuts,
    length, chunk, num_chunks, rho_b, rho_t, rho_k, omega_b, omega_t, omega_k, grad_b, grad_t, grad_k,
    NUM_STATES: tl.constexpr, PER_POSITION: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """As the forward's; a chunk ends with what it sends back to the one before it in time."""
    wide: tl.constexpr = slots.dtype.element_ty
    b, j, k, mask = _program(num_chunks - 1, NUM_STATES, BLOCK)
    decay, decay_t = (log_rho + b * rho_b + k * rho_k, omega + b * omega_b + k * omega_k), (rho_t, omega_t)
    c = planes(states, b * length * 2 * NUM_STATES, 1, k, NUM_STATES)
    zero = tl.zeros([BLOCK], wide)
    back, product, was_cut = (zero, zero), (zero + 1, zero), j < 0
    if grad_states is not None:
        grad = planes(grad_states, b * grad_b, grad_k, k, NUM_STATES)
    if grad_energy is not None:
        scale = 2 * tl.load(grad_energy + b)
    if not PER_POSITION:
        factor = polar(load_decay(decay, 0, decay_t, mask), wide)
    for step in range(0, chunk, UNROLL):
        grads, cs, decays, resets, counts = (), (), (), (), ()
        for i in tl.static_range(UNROLL):
            t = length - 1 - j * chunk - step - i
            grads += (load(grad, t * grad_t, mask) if grad_states is not None else (zero, zero),)
            if grad_energy is not None:
                cs += (load(c, t * 2 * NUM_STATES, mask),)
                counts += (tl.load(energy_mask + b * length + t) != 0 if energy_mask is not None else True,)
            if PER_POSITION:
                decays += (load_decay(decay, t, decay_t, mask),)
            if reset is not None:
                resets += (tl.load(reset + b * length + t) != 0,)
        for i in tl.static_range(UNROLL):
            total = back[0] + grads[i][0], back[1] + grads[i][1]
            if grad_energy is not None:
                total = _add_energy(total, cs[i], counts[i], scale)
            if PER_POSITION:
                factor = polar(decays[i], wide)
                product = multiply_conjugate(factor, product)
            back = multiply_conjugate(factor, total)
            if reset is not None:
                back, was_cut = where(resets[i], (zero, zero), back), was_cut | resets[i]
    _keep_end(slots, products, cuts, back, product, was_cut, b, j, num_chunks, k, NUM_STATES, mask)


@triton.jit(do_not_specialize=["length", "chunk", "num_chunks"])
def eigen_scan_bwd_kernel(
    log_rho, omega, reset, grad_states, grad_energy, energy_mask, states, entering, initial_state,
    grad_beta, grad_log_rho, grad_omega, grad_initial,
    length, chunk, num_chunks, rho_b, rho_t, rho_k, omega_b, omega_t, omega_k, grad_b, grad_t, grad_k,
    NUM_STATES: tl.constexpr, PER_POSITION: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """All gradients; those of a decay [K] as one partial sum for each chunk, [B, num_chunks, K]."""
    wide: tl.constexpr = grad_initial.dtype.element_ty
    b, j, k, mask = _program(num_chunks, NUM_STATES, BLOCK)
    decay, decay_t = (log_rho + b * rho_b + k * rho_k, omega + b * omega_b + k * omega_k), (rho_t, omega_t)
    c = planes(states, b * length * 2 * NUM_STATES, 1, k, NUM_STATES)
    out = planes(grad_beta, b * length * 2 * NUM_STATES, 1, k, NUM_STATES)
    first = length - 1 - j * chunk
    zero = tl.zeros([BLOCK], wide)
    back, before_all, sums = (zero, zero), (zero, zero), (zero, zero)
    if entering is not None:
        back = load(planes(entering, (b * num_chunks + j) * 2 * NUM_STATES, 1, k, NUM_STATES), 0, mask)
    if initial_state is not None:
        before_all = load(planes(initial_state, b * 2 * NUM_STATES, 1, k, NUM_STATES), 0, mask)
    if grad_states is not None:
        grad = planes(grad_states, b * grad_b, grad_k, k, NUM_STATES)
    if grad_energy is not None:
        scale, here = 2 * tl.load(grad_energy + b), load(c, first * 2 * NUM_STATES, mask & (first >= 0))
        here = here[0].to(wide), here[1].to(wide)
    if not PER_POSITION:
        factor = polar(load_decay(decay, 0, decay_t, mask), wide)
    for step in range(0, tl.minimum(first + 1, chunk).to(tl.int32), UNROLL):
        grads, cs, decays, resets, counts = (), (), (), (), ()
        for i in tl.static_range(UNROLL):
            t = first - step - i
            grads += (load(grad, t * grad_t, mask & (t >= 0)) if grad_states is not None else (zero, zero),)
            cs += (load(c, (t - 1) * 2 * NUM_STATES, mask & (t > 0)),)
            if PER_POSITION:
                decays += (load_decay(decay, t, decay_t, mask & (t >= 0)),)
            if reset is not None:
                resets += (tl.load(reset + b * length + t, mask=t >= 0, other=0) != 0,)
            if grad_energy is not None:
                at = energy_mask + b * length + t if energy_mask is not None else None
                counts += (tl.load(at, mask=t >= 0, other=0) != 0 if energy_mask is not None else True,)
        for i in tl.static_range(UNROLL):
            t = first - step - i
            before = where(t > 0, cs[i], before_all)
            total = back[0] + grads[i][0], back[1] + grads[i][1]
            if grad_energy is not None:
                total, here = _add_energy(total, here, counts[i], scale), before
            store(out, t * 2 * NUM_STATES, total, mask & (t >= 0))
            if PER_POSITION:
                factor = polar(decays[i], wide)
            sent = multiply_conjugate(factor, total)
            if reset is not None:
                sent, before = where(resets[i], (zero, zero), sent), where(resets[i], (zero, zero), before)
            # d log_rho = Re(conj(sent) * before), d omega = Im(sent * conj(before))
            turn = sent[0] * before[0] + sent[1] * before[1], sent[1] * before[0] - sent[0] * before[1]
            if PER_POSITION:
                offset = (b * length + t) * NUM_STATES
                store((grad_log_rho + k, grad_omega + k), offset, turn, mask & (t >= 0))
            else:
                sums = where(t >= 0, (sums[0] + turn[0], sums[1] + turn[1]), sums)
            back = where(t >= 0, sent, back)
    if not PER_POSITION:
        store((grad_log_rho + k, grad_omega + k), (b * num_chunks + j) * NUM_STATES, sums, mask)
    store(planes(grad_initial, b * 2 * NUM_STATES, 1, k, NUM_STATES), 0, back, mask & (j == num_chunks - 1))
