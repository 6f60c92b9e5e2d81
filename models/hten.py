"""Time scales of a hierarchical TEN (HTEN): groups of eigenstates that step over s tokens at once and see no future.

The original pools blocks of s tokens, runs over the blocks and repeats each result over its own block, where a token
then sees up to s - 1 later ones. Here are two forms that don't, for each group of eigenstates and its scale s:

    polyphase   c_t = λ c_{t-s} + mean(β_{t-s+1} … β_t)
    hold        c_t = λ c_{t-1} + mean(β_{t-s+1} … β_t)  where t completes a block of s,  c_t = c_{t-1} elsewhere

polyphase is s interleaved recurrences, one for each residue of t, and every position sees its own token; hold is one,
and what it shows may be s - 1 tokens old. Both begin anew with a document: polyphase averages the positions there are,
c_{t-s} is 0 at the document's first s positions (one reset in each of the s recurrences: a reset of a single one lets
the others look into the document before), and hold counts its blocks from there and is 0 until the first completes.

The state after a position holds all that later ones need, so a token costs the same at any distance from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import eigen_scan, multiscale_pool
from kernels.eigen_scan import ScanOutput


def group_sizes(num_states: int, num_scales: int) -> list[int]:
    """How `torch.tensor_split` cuts K eigenstates into one contiguous group for each scale."""
    return [num_states // num_scales + (i < num_states % num_scales) for i in range(num_scales)]


def split_groups(planes: Tensor, num_scales: int) -> list[Tensor]:
    """[..., 2K], real half then imaginary half -> for each scale [..., 2K_s], of the same two halves."""
    halves = planes.unflatten(-1, (2, -1))
    # Not `tensor_split`: the backward of each of its slices fills a whole [..., 2K] with zeros.
    return [group.flatten(-2) for group in halves.split(group_sizes(halves.shape[-1], num_scales), -1)]


def scale_state_size(num_states: int, scale: int, mode: str) -> int:
    """Numbers that a group of `num_states` at this scale carries over time.

    Scale 1: the state. polyphase: the last s states, the last s - 1 inputs, the age of the document. hold: the state,
    the sum of the open block, the age.
    """
    if scale == 1:
        return 2 * num_states
    return 2 * num_states * (2 * scale - 1 if mode == "polyphase" else 2) + 1


def state_size(num_states: int, scales: Sequence[int], mode: str) -> int:
    """Numbers that a layer of `num_states` carries over time, its groups one after the other."""
    return sum(map(scale_state_size, group_sizes(num_states, len(scales)), scales, [mode] * len(scales)))


def document_age(reset: Tensor | None, before: Tensor, time: int) -> Tensor:
    """Positions between each one and its document's start, [B, T] int64; `before` [B] of them came in earlier calls."""
    t = torch.arange(time, device=before.device)
    start = -before[:, None].expand(-1, time)
    if reset is not None:
        start = torch.where(reset, t, start).cummax(1).values
    return t - start


def _age_after(age: Tensor, scale: int, dtype: torch.dtype) -> Tensor:
    """The age of the next position, [B, 1], in [0, 2s): blocks after the first are left out, or a float would fill."""
    count = age[:, -1:] + 1
    return torch.where(count < scale, count, scale + count % scale).to(dtype)


def hten_scan(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    scales: Sequence[int],
    mode: str,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    counted: Tensor | None = None,
) -> ScanOutput:
    """`eigen_scan` over several time scales at once; with scales (1,) it is `eigen_scan`.

    Args:
        beta: [B, T, 2K], T >= 1; group i of the K states, as `torch.tensor_split` cuts them, runs at scales[i].
        log_rho, omega: [K], or [B, T, K] for a decay of each position's own: the step that arrives at t takes t's. Per
            step, so a state of scale s shrinks by ρ over s tokens.
        scales: distinct whole numbers >= 1, at most K.
        mode: "polyphase" or "hold".
        initial_state: [B, state_size], an earlier call's final_state.
        reset: [B, T] bool, true where a document starts.
        counted: [B, T] bool, the positions the energy counts; no energy without.

    Returns:
        states [B, T, 2K] in beta's dtype; final_state [B, state_size] and energy [B] in fp32, or float64 with beta.
    """
    if tuple(scales) == (1,):
        return plain_scan(beta, log_rho, omega, 1, initial_state, reset, counted)
    num_states, num_scales = log_rho.shape[-1], len(scales)
    sizes = group_sizes(num_states, num_scales)
    carried: Sequence[Tensor | None] = [None] * num_scales
    if initial_state is not None:
        carried = initial_state.split([scale_state_size(n, s, mode) for n, s in zip(sizes, scales, strict=True)], -1)
    step = polyphase_scan if mode == "polyphase" else hold_scan
    groups = split_groups(beta, num_scales), log_rho.split(sizes, -1), omega.split(sizes, -1), scales, carried
    outs = [
        (plain_scan if scale == 1 else step)(drive, rate, turn, scale, state, reset, counted)
        for drive, rate, turn, scale, state in zip(*groups, strict=True)
    ]
    states = torch.cat([out.states.unflatten(-1, (2, -1)) for out in outs], -1).flatten(2)
    final_state = torch.cat([out.final_state for out in outs], -1)
    return ScanOutput(states, final_state, _total([out.energy for out in outs]))


def _total(energies: Sequence[Tensor | None]) -> Tensor | None:
    found = [energy for energy in energies if energy is not None]
    return sum(found[1:], found[0]) if found else None


def plain_scan(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    scale: int,
    state: Tensor | None,
    reset: Tensor | None,
    counted: Tensor | None,
) -> ScanOutput:
    """One group at scale 1, where both modes are `eigen_scan`."""
    return eigen_scan(
        beta,
        log_rho,
        omega,
        initial_state=state,
        reset=reset,
        with_energy=counted is not None,
        energy_mask=counted,
    )


@overload
def _lanes(x: Tensor, part: slice, lanes: int) -> Tensor: ...
@overload
def _lanes(x: Tensor | None, part: slice, lanes: int) -> Tensor | None: ...
def _lanes(x: Tensor | None, part: slice, lanes: int) -> Tensor | None:
    """Of x [B, T, ...] the positions `part`, dealt out in turn: [B * lanes, n, ...]. None, and a [K] for all, as is."""
    if x is None or x.dim() == 1:
        return x
    return x[:, part].unflatten(1, (-1, lanes)).transpose(1, 2).flatten(0, 1)


def polyphase_scan(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    scale: int,
    state: Tensor | None,
    reset: Tensor | None,
    counted: Tensor | None,
) -> ScanOutput:
    """One group at one scale above 1. The s recurrences are lanes of one scan over T // s steps, and the T % s
    positions left over are the lanes of a second one, of a single step."""
    batch, time, width = beta.shape
    dtype = torch.promote_types(beta.dtype, torch.float32)
    if state is None:
        ring = torch.zeros(batch, scale, width, dtype=dtype, device=beta.device)  # the last s states, oldest first
        age = document_age(reset, ring.new_zeros(batch, dtype=torch.int64), time)
        inputs, pooled = beta, multiscale_pool(beta, (scale,), reset=reset)
    else:
        ring, past, count = state.split([scale * width, (scale - 1) * width, 1], -1)
        ring, past = ring.unflatten(-1, (scale, width)), past.unflatten(-1, (scale - 1, width))
        age = document_age(reset, count[:, 0].long(), time)
        inputs = torch.cat([past.to(beta.dtype), beta], 1)  # [B, s - 1 + T, 2K_s]
        oldest = torch.arange(1 - scale, 0, device=beta.device) == -count
        pooled = multiscale_pool(inputs, (scale,), reset=torch.cat([oldest, age == 0], 1))[:, scale - 1 :]

    begins, states, energies = age < scale, [], []
    whole = time - time % scale
    for part, lanes in ((slice(0, whole), scale), (slice(whole, time), time - whole)):
        if part.start == part.stop:
            continue
        out = eigen_scan(
            _lanes(pooled, part, lanes),
            _lanes(log_rho, part, lanes),
            _lanes(omega, part, lanes),
            initial_state=ring[:, :lanes].flatten(0, 1),
            reset=_lanes(begins, part, lanes),
            with_energy=counted is not None,
            energy_mask=_lanes(counted, part, lanes),
        )
        states.append(out.states.unflatten(0, (batch, lanes)).transpose(1, 2).flatten(1, 2))
        ring = torch.cat([ring[:, lanes:], out.final_state.unflatten(0, (batch, lanes))], 1)
        energies.append(None if out.energy is None else out.energy.unflatten(0, (batch, lanes)).sum(1))
    past = F.pad(inputs[:, 1 - scale :], (0, 0, max(0, scale - 1 - inputs.shape[1]), 0)).to(dtype)
    final_state = torch.cat([ring.flatten(1), past.flatten(1), _age_after(age, scale, dtype)], 1)
    return ScanOutput(torch.cat(states, 1), final_state, _total(energies))


def hold_scan(
    beta: Tensor,
    log_rho: Tensor,
    omega: Tensor,
    scale: int,
    state: Tensor | None,
    reset: Tensor | None,
    counted: Tensor | None,
) -> ScanOutput:
    """One group at one scale above 1: gather the blocks that these positions complete, scan over them, hold each.

    All sizes depend on T and s alone: T positions complete at most ceil(T / s) blocks, and where resets leave fewer,
    the last ones are made up and no position looks at them.
    """
    batch, time, width = beta.shape
    dtype = torch.promote_types(beta.dtype, torch.float32)
    if state is None:
        state = torch.zeros(batch, 2 * width + 1, dtype=dtype, device=beta.device)
    held, open_sum, count = state.split([width, width, 1], -1)
    age = document_age(reset, count[:, 0].long(), time)
    block = ((age + 1) % scale == 0).cumsum(1)  # [B, T], how many are complete by now
    number = torch.arange(1, -(-time // scale) + 1, device=beta.device)  # [N]
    ends = torch.searchsorted(block, number.expand(batch, -1).contiguous())  # [B, N], T for those made up

    t = ends[..., None] + torch.arange(1 - scale, 1, device=beta.device)  # [B, N, s], the positions of each block
    inside = (t >= 0) & (t < time)
    members = _rows(beta, t.clamp(0, time - 1).flatten(1)).unflatten(1, (-1, scale)).to(dtype)
    sums = members.masked_fill(~inside[..., None], 0).sum(2)  # [B, N, 2K_s]
    begun_before = torch.where(t[:, :1, 0] < 0, open_sum, 0)  # [B, 2K_s], only the first block can have
    ends = ends.clamp(max=time - 1)
    decay = [x if x.dim() == 1 else _rows(x, ends) for x in (log_rho, omega)]
    first = age.gather(1, ends) + 1 == scale
    pushes = torch.cat([sums[:, :1] + begun_before[:, None], sums[:, 1:]], 1) / scale
    coarse = eigen_scan(pushes, *decay, initial_state=held, reset=first).states
    coarse = torch.cat([held[:, None], coarse], 1)  # [B, 1 + N, 2K_s]

    # Repeated s times, every block has a row for each position that can hold it, so no gradient meets another in a
    # gather: their order would be left to the device.
    here = scale * block + (age + 1) % scale  # [B, T]
    empty = age + 1 < scale
    repeated = coarse.to(beta.dtype).repeat_interleave(scale, 1)
    states = _rows(repeated, here).masked_fill(empty[..., None], 0)
    energy = None
    if counted is not None:
        energy = coarse.square().sum(-1).repeat_interleave(scale, 1).gather(1, here)
        energy = energy.masked_fill(empty | ~counted, 0).sum(1)

    number_open = (age[:, -1:] + 1) % scale  # [B, 1]
    recent = beta[:, 1 - scale :].to(dtype)
    is_open = torch.arange(-recent.shape[1], 0, device=beta.device) >= -number_open
    recent = recent.masked_fill(~is_open[..., None], 0).sum(1)
    open_sum = recent + torch.where(number_open > time, open_sum, 0)
    held = coarse.gather(1, block[:, -1, None, None].expand(-1, 1, width))[:, 0]
    return ScanOutput(states, torch.cat([held, open_sum, _age_after(age, scale, dtype)], 1), energy)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C] at index [B, M] -> [B, M, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
