"""Frames of a molecule at several temperatures, made on this machine by independent parallel-tempering runs and kept.

A group is one such run: its frames depend on each other and on no other group's, so that sets to train on and to test
with are made of whole groups, and errors are estimated by drawing groups.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tasks.cache import cache_folder, kept_in, locked, renamed
from tasks.molecule.dynamics import draw_velocities, langevin
from tasks.molecule.estimates import tau_int
from tasks.molecule.observables import dihedral
from tasks.molecule.system import System
from tasks.molecule.tempering import Tempering
from tasks.reading import read_arrays

VERSION = 2  # raise it with any change to what is simulated
LADDER = (300.0, 450.0, 670.0, 1000.0)  # K; phi > 0 is reached within nanoseconds only from the hot end
SWAP_EVERY_PS = 0.5  # about as long as an energy is remembered (tau_int 0.5 ps at 300 K)
ANNEALED = 0.25  # of the equilibration: without swaps, from the hottest temperature down to each one's own
EQUILIBRATION_SHARE = 1 / 3  # of a limited time, at most
LEAST_FRAMES = 2
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Recipe:
    """All that decides the frames. Times in ps, temperatures in K."""

    system: str
    ladder: tuple[float, ...]
    groups: int
    ps: float
    frame_every_ps: float
    swap_every_ps: float
    equilibration_ps: float
    dt: float
    seed: int
    device: str

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: more than 0 is needed"
            for name in ("groups", "ps", "frame_every_ps", "swap_every_ps", "dt")
            if not getattr(self, name) > 0
        ]
        if self.equilibration_ps < 0:
            problems.append(f"equilibration_ps={self.equilibration_ps}: 0 or more is needed")
        if len(self.ladder) < 2 or list(self.ladder) != sorted(set(self.ladder)) or self.ladder[0] <= 0:
            problems.append(f"ladder={self.ladder}: two or more temperatures in K are needed, the coldest first")
        if not problems and self.frames < LEAST_FRAMES:
            problems.append(
                f"ps={self.ps}: {LEAST_FRAMES} frames, {LEAST_FRAMES * self.frame_every_ps} ps, are the least"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def frames(self) -> int:
        return math.ceil(round(self.ps / self.frame_every_ps, 6))

    @property
    def moves(self) -> tuple[int, int]:
        """Moves, pieces of dynamics, from frame to frame and from swap to swap: one of them is 1."""
        frame, swap = self.frame_every_ps, self.swap_every_ps
        return math.ceil(round(frame / swap, 6)), max(1, int(round(swap / frame, 6)))

    @property
    def steps(self) -> int:
        """Of a move."""
        return max(1, round(self.frame_every_ps / self.dt / self.moves[0]))

    def file(self, max_seconds: float | None = None) -> Path:
        identity = [VERSION, dataclasses.asdict(self), max_seconds]
        return cache_folder() / "molecule" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"


@dataclass(frozen=True)
class Trajectories:
    """x float32 [G, T, F, N, 3] in nm, centred; energies float64 [G, T, F] in kJ/mol, of exactly these positions.

    Frames of one group lie `info["frame_every_ps"]` apart.
    """

    x: Tensor
    energies: Tensor
    temperatures: tuple[float, ...]
    info: dict[str, Any]

    def at(self, temperatures: tuple[float, ...]) -> Trajectories:
        """Those of some temperatures of the ladder; `info["ns"]` is what they add up to."""
        rows = _on(self.temperatures, temperatures)
        x, energies = self.x[:, rows], self.energies[:, rows]
        ns = round(x.shape[:3].numel() * self.info["frame_every_ps"] / 1000, 6)
        return Trajectories(x, energies, tuple(temperatures), self.info | {"ns": ns})


def make_data(
    system: System,
    potential: Any,
    temperatures: tuple[float, ...] = (300.0, 450.0),
    *,
    groups: int,
    ps: float,
    frame_every_ps: float = 0.1,
    swap_every_ps: float = SWAP_EVERY_PS,
    equilibration_ps: float = 100.0,
    ladder: tuple[float, ...] = LADDER,
    dt: float = 0.001,
    seed: int = 0,
    max_seconds: float | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Trajectories:
    """`ps` of every group at each of the temperatures, from the cache where they are there.

    The whole ladder is kept, so that other temperatures of it cost nothing more. With `max_seconds` there are as many
    frames as the time allows, two at least, after an equilibration of no more than a third of it; `info` says how many.

    Raises ValueError for settings that cannot be and where positions stop being finite, and OSError where the cache's
    folder cannot be written.
    """
    recipe = Recipe(
        system.hash, tuple(ladder), groups, ps, frame_every_ps, swap_every_ps, equilibration_ps, dt, seed, device
    )
    _on(recipe.ladder, temperatures)
    complete, limited = recipe.file(), recipe.file(max_seconds)
    with kept_in(complete.parent):  # first: a disk that refuses should do so before the work
        complete.parent.mkdir(parents=True, exist_ok=True)
    with locked(limited.with_suffix(".lock")):  # one process makes what several ask for
        for file in dict.fromkeys((complete, limited)):  # what was made without haste serves who is in haste
            if (kept := _read(file, progress)) is not None:
                return kept.at(temperatures)
        watch = _Watch(recipe, max_seconds, progress)
        try:
            made = _simulate(system, potential, recipe, watch)
        finally:
            watch.close()
        whole = made.info["ps"] >= ps and made.info["equilibration_ps"] >= equilibration_ps
        with kept_in(complete.parent):
            _write(complete if whole else limited, made)
    return made.at(temperatures)


def _on(ladder: tuple[float, ...], temperatures: Sequence[float]) -> list[int]:
    """Their places on the ladder."""
    if missing := [t for t in temperatures if t not in ladder]:
        raise ValueError(f"{missing[0]:g} K is not on the ladder of {', '.join(f'{t:g}' for t in ladder)} K")
    return [ladder.index(t) for t in temperatures]


# ---- making ----------------------------------------------------------------------------------------------------------


def _simulate(system: System, potential: Any, recipe: Recipe, watch: _Watch) -> Trajectories:
    masses, count = system.masses, (recipe.groups, len(recipe.ladder))
    generator = torch.Generator(recipe.device).manual_seed(recipe.seed)
    settings = {"steps": recipe.steps, "dt": recipe.dt, "generator": generator}
    move_ps, kelvin = recipe.steps * recipe.dt, torch.tensor(recipe.ladder, device=recipe.device)
    x = torch.as_tensor(system.positions, dtype=torch.float32, device=recipe.device).repeat(*count, 1, 1)
    v = draw_velocities(masses, recipe.ladder[-1], count, generator)
    equilibrated = calls = 0
    # All begin at the hottest, where everything mixes, and come down the ladder together: left at once from there to
    # 300 K, every seventh conformation would be caught at phi > 0, ten times as many as belong there.
    for part, stage in enumerate(reversed(recipe.ladder[1:]), 1):
        share = ANNEALED * part / (len(recipe.ladder) - 1)
        while equilibrated < share * recipe.equilibration_ps and not watch.late(share * EQUILIBRATION_SHARE):
            x, v = langevin(potential, masses, x, v, kelvin.clamp(min=stage), **settings)
            equilibrated, calls = equilibrated + move_ps, calls + (recipe.steps + 1) * math.prod(count)
            watch.advance(move_ps)
    settling = Tempering(potential, masses, recipe.ladder, x, **settings)
    while equilibrated < recipe.equilibration_ps and not watch.late(EQUILIBRATION_SHARE):
        _move(settling, recipe, system)
        equilibrated += move_ps
        watch.advance(move_ps)
    run, frames = Tempering(potential, masses, recipe.ladder, settling.x, **settings), []
    while len(frames) < recipe.frames and not (watch.late() and len(frames) >= LEAST_FRAMES):
        for _ in range(recipe.moves[0]):
            _move(run, recipe, system)
        run.x -= run.x.mean(-2, keepdim=True)  # far from the origin float32 loses digits
        frames.append(run.x.cpu())
        watch.advance(recipe.frame_every_ps)
    x, ps = torch.stack(frames, 2), len(frames) * recipe.frame_every_ps
    info = dataclasses.asdict(recipe) | {
        "ladder": list(recipe.ladder),
        "force_field": system.force_field,
        "equilibration_ps": round(equilibrated, 6),
        "ps": round(ps, 6),
        "ns_simulated": round((equilibrated + ps) * math.prod(count) / 1000, 6),
        "energy_calls": calls + settling.energy_calls + run.energy_calls,
        "swap_acceptance": [round(a, 4) for a in run.acceptance.tolist()],
        "round_trips": run.round_trips,
        "seconds": round(watch.seconds, 1),
    }
    energies = _energies(potential, x)
    return Trajectories(x, energies, recipe.ladder, info | {"tau_ps": _correlation(system, recipe, x, energies)})


def _move(chains: Tempering, recipe: Recipe, system: System) -> None:
    chains.move()
    if chains.moves % recipe.moves[1] == 0:
        chains.swap()
        chains.flip(system.flip_axes)


@torch.no_grad()
def _energies(potential: Any, x: Tensor) -> Tensor:
    """U float64 [G, T, F] of frames float32 [G, T, F, N, 3], a few thousand at a time."""
    return torch.cat([potential(part.double()) for part in x.flatten(0, 2).split(4096)]).view(x.shape[:3])


def _correlation(system: System, recipe: Recipe, x: Tensor, energies: Tensor) -> dict[str, list[float]]:
    """Integrated autocorrelation times in ps of energy, phi and psi, at each temperature."""
    series = {"energy": energies.numpy()}
    for name, atoms in (("phi", system.phi), ("psi", system.psi)):
        series[name] = np.exp(1j * dihedral(x, atoms).numpy())
    return {
        name: [round(tau_int(values[:, place]) * recipe.frame_every_ps, 3) for place in range(len(recipe.ladder))]
        for name, values in series.items()
    }


class _Watch:
    """Knows how much time is left, and shows how far the making is: a bar on a terminal, lines elsewhere."""

    def __init__(self, recipe: Recipe, max_seconds: float | None, shown: bool) -> None:
        self.max_seconds, self.shown, self.done = max_seconds, shown, 0.0
        self.total = recipe.equilibration_ps + recipe.ps
        self._started, self._said, self._advanced, self._last = perf_counter(), 0.0, 0.0, 0.0
        at = ", ".join(f"{t:g}" for t in recipe.ladder)
        limit = "" if max_seconds is None else f", or as much as {max_seconds:.0f} s allow"
        self.say(f"making {recipe.groups} trajectories of {self.total:g} ps at {at} K{limit}")
        self._bar = tqdm(total=self.total, unit="ps", desc="dynamics", disable=None if shown else True)

    @property
    def seconds(self) -> float:
        return perf_counter() - self._started

    def late(self, share: float = 1.0) -> bool:
        """Whether something that takes as long as the last did would end after that share of the time."""
        return self.max_seconds is not None and self.seconds + self._last > share * self.max_seconds

    def advance(self, ps: float) -> None:
        self.done, self._last, self._advanced = self.done + ps, self.seconds - self._advanced, self.seconds
        self._bar.update(ps)
        if self._bar.disable and self.seconds - self._said > SECONDS_BETWEEN_LINES:
            self._said = self.seconds
            self.say(f"{self.done:.1f} of {self.total:g} ps after {self.seconds:.0f} s")

    def say(self, line: str) -> None:
        if self.shown:
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()
        self.say(f"made {self.done:.1f} ps of each in {self.seconds:.1f} s")


# ---- keeping ---------------------------------------------------------------------------------------------------------


def _write(file: Path, data: Trajectories) -> None:
    arrays = {"x": data.x.numpy(), "energies": data.energies.numpy(), "info": np.array(json.dumps(data.info))}
    with renamed(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays, sha256=np.array(_digest(arrays)))


def _read(file: Path, shown: bool) -> Trajectories | None:
    """What was kept, or None where it is not there or not what was written: it is then made again."""
    if not file.exists():
        return None
    try:
        *found, written = read_arrays(file, ("x", "energies", "info", "sha256"))
        arrays = dict(zip(("x", "energies", "info"), found, strict=True))
        intact = _digest(arrays) == str(written)
    except ValueError:
        intact = False
    if not intact:
        if shown:
            print(f"making trajectories again: {file} is not what was written", flush=True)
        return None
    info = json.loads(str(arrays["info"]))
    return Trajectories(*map(torch.from_numpy, (arrays["x"], arrays["energies"])), tuple(info["ladder"]), info)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
