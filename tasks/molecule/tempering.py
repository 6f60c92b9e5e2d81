"""Parallel tempering of many independent groups in one tensor, with swaps that may go through a map.

A swap takes x, found at temperature A, and y, found at the next higher B, to T^-1(y) and T(x). It is accepted with
probability min(1, exp Delta),

    Delta(x, y) = b_A U(x) + b_B U(y) - b_A U(T^-1 y) - b_B U(T x) + log|det J_T(x)| + log|det J_T^-1(y)|,

which for the identity, the plain swap, is (b_A - b_B) (U(x) - U(y)). The rule is exact for any invertible map that does
not change while the chain runs. b = 1 / (k T), in mol/kJ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.molecule.dynamics import draw_velocities, flip, langevin
from tasks.molecule.system import beta

# transport(x [B, N, 3] float64, t_from, t_to) -> (y [B, N, 3], log|det J| [B])
Transport = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]


class Swap(NamedTuple):
    """What a swap would do: the places' new conformations [B, N, 3] and their energies in kJ/mol [B] float64."""

    log_ratio: Tensor  # Delta [B] float64
    cold: Tensor  # T^-1 of what was hot
    hot: Tensor  # T of what was cold
    cold_energy: Tensor
    hot_energy: Tensor


@torch.no_grad()
def propose_swap(
    potential: Any,
    cold: Tensor,
    hot: Tensor,
    cold_energy: Tensor,
    hot_energy: Tensor,
    temperatures: tuple[float, float],
    transport: Transport | None = None,
) -> Swap:
    """The swap of conformations cold and hot [B, N, 3] whose energies are known, in float64; plain without a map.

    `potential(x [B, N, 3] float64) -> U [B]` is asked for the energies of what a map makes.
    """
    t_cold, t_hot = temperatures
    to_cold, to_hot, to_cold_energy, to_hot_energy, log_det = hot, cold, hot_energy, cold_energy, 0.0
    if transport is not None:
        to_hot, log_det_up = transport(cold.double(), t_cold, t_hot)
        to_cold, log_det_down = transport(hot.double(), t_hot, t_cold)
        # Rounded first, so that the energies are those of what is kept.
        to_hot, to_cold, log_det = to_hot.to(cold.dtype), to_cold.to(hot.dtype), log_det_up + log_det_down
        to_hot_energy, to_cold_energy = potential(to_hot.double()), potential(to_cold.double())
    log_ratio = beta(t_cold) * (cold_energy - to_cold_energy) + beta(t_hot) * (hot_energy - to_hot_energy) + log_det
    return Swap(log_ratio, to_cold, to_hot, to_cold_energy, to_hot_energy)


class RoundTrips:
    """Counts the ways of replicas from the coldest place to the hottest and back.

    `labels` int64 [G, K]: which replica of its group is at which temperature.
    """

    ASTRAY, OUTWARD, HOMEWARD = 0, 1, 2  # has not been coldest yet; the last end it saw was the coldest, the hottest

    def __init__(self, labels: Tensor) -> None:
        self.count = 0
        self._leg = torch.full_like(labels, self.ASTRAY)
        self.visit(labels)

    def visit(self, labels: Tensor) -> None:
        coldest, hottest = labels[:, :1], labels[:, -1:]
        self.count += int((self._leg.gather(1, coldest) == self.HOMEWARD).sum())
        self._leg.scatter_(1, coldest, self.OUTWARD)
        leg = self._leg.gather(1, hottest)
        self._leg.scatter_(1, hottest, torch.where(leg == self.OUTWARD, self.HOMEWARD, leg))


class Tempering:
    """K temperatures in each of G groups that know nothing of one another.

    Args:
        potential: `energy_and_forces` for the dynamics, and a call for the energies of swaps, in float64.
        masses: [N] amu.
        temperatures: K, ascending.
        x: [G, K, N, 3] nm, group by group what each temperature starts from; the dynamics runs in its dtype.
        transport: the map of the swaps; None for plain ones. It must not change meanwhile.
        steps, dt, friction: of the dynamics between swaps, as in `langevin`.

    Attributes: `x`, `v` [G, K, N, 3], `energies` float64 [G, K] in kJ/mol after the last swaps, `labels` int64 [G, K]
    (the replica at each temperature), `moves`, `cycles` (rounds of swaps), `energy_calls` (conformations whose energy
    or forces were asked for).
    """

    def __init__(
        self,
        potential: Any,
        masses: np.ndarray,
        temperatures: Sequence[float],
        x: Tensor,
        *,
        transport: Transport | None = None,
        steps: int = 500,
        dt: float = 0.001,
        friction: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        self.temperatures = tuple(float(t) for t in temperatures)
        if len(self.temperatures) < 2 or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError(f"temperatures={self.temperatures}: two or more are needed, in K, the coldest first")
        if x.ndim != 4 or x.shape[1] != len(self.temperatures):
            raise ValueError(f"x has shape {tuple(x.shape)}: [groups, {len(self.temperatures)} temperatures, N, 3]")
        self.potential, self.masses, self.transport, self.generator = potential, masses, transport, generator
        self.steps, self.dt, self.friction = steps, dt, friction
        self.x, (groups, places) = x.clone(), x.shape[:2]
        self._kelvin = torch.tensor(self.temperatures, dtype=torch.float64, device=x.device)
        self.v = draw_velocities(masses, self._kelvin, (groups, places), generator, x.dtype)
        self.labels = torch.arange(places, device=x.device).repeat(groups, 1)
        self.energies = torch.full((groups, places), torch.nan, dtype=torch.float64, device=x.device)
        self.moves = self.cycles = self.energy_calls = 0
        self._trips = RoundTrips(self.labels)
        self._attempts, self._accepted = np.zeros(places - 1), np.zeros(places - 1)

    @property
    def round_trips(self) -> int:
        """In all groups; see `RoundTrips`."""
        return self._trips.count

    @property
    def acceptance(self) -> np.ndarray:
        """Mean probability [K - 1] that a swap of neighbours was accepted; NaN where none was tried."""
        return np.where(self._attempts > 0, self._accepted / np.maximum(self._attempts, 1), np.nan)

    def cycle(self) -> None:
        """Dynamics at every temperature, then swaps."""
        self.move()
        self.swap()

    def move(self) -> None:
        """`steps` of dynamics at every temperature."""
        settings = {"dt": self.dt, "friction": self.friction, "generator": self.generator}
        self.x, self.v = langevin(self.potential, self.masses, self.x, self.v, self._kelvin, self.steps, **settings)
        self.energy_calls += self.labels.numel() * (self.steps + 1)
        self.moves += 1

    def swap(self) -> None:
        """Swaps of neighbours: the even pairs and the odd ones in turn."""
        with torch.no_grad():
            self.energies = self.potential(self.x.double())
        self.energy_calls += self.labels.numel()
        pairs = len(self.temperatures) - 1
        for k in range(self.cycles % min(2, pairs), pairs, 2):
            self._swap(k)
        self._trips.visit(self.labels)
        self.cycles += 1

    def flip(self, axes: Iterable[tuple[list[int], list[int]]]) -> None:
        """After swaps: a half turn about each bond (`System.flip_axes`), tried at every temperature. Velocities stay,
        for they don't depend on positions."""
        for axis in axes:
            state = self.x, self.energies, self._kelvin
            self.x, self.energies, _ = flip(self.potential, *state, *axis, generator=self.generator)
            self.energy_calls += self.labels.numel()

    def _swap(self, k: int) -> None:
        """Of places k and k + 1 in every group; velocities of what moved are drawn anew at the new temperature."""
        pair, groups = slice(k, k + 2), len(self.x)
        states = (*self.x[:, pair].unbind(1), *self.energies[:, pair].unbind(1))
        swap = propose_swap(self.potential, *states, self.temperatures[pair], self.transport)
        self.energy_calls += 0 if self.transport is None else 2 * groups
        probability = swap.log_ratio.clamp(max=0).exp().nan_to_num(0.0)  # what a map makes infinite is refused
        taken = torch.rand(groups, dtype=torch.float64, device=self.x.device, generator=self.generator) < probability
        v = draw_velocities(self.masses, self._kelvin[pair], (groups, 2), self.generator, self.x.dtype)
        rows = taken[:, None, None, None]
        self.x[:, pair] = torch.where(rows, torch.stack([swap.cold, swap.hot], 1), self.x[:, pair])
        self.v[:, pair] = torch.where(rows, v, self.v[:, pair])
        energies = torch.stack([swap.cold_energy, swap.hot_energy], 1)
        self.energies[:, pair] = torch.where(taken[:, None], energies, self.energies[:, pair])
        self.labels[:, pair] = torch.where(taken[:, None], self.labels[:, pair].flip(1), self.labels[:, pair])
        self._attempts[k] += groups
        self._accepted[k] += probability.sum().item()
