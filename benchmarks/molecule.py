"""Energies with forces, and steps of Langevin dynamics, per second, beside OpenMM in the same run.

    python benchmarks/molecule.py --csv benchmarks/results/molecule-cpu.csv
    python benchmarks/molecule.py --threads 1 --batch 64 256
    python benchmarks/molecule.py --device cuda --batch 256 4096 65536 --csv benchmarks/results/molecule-gpu.csv

A turn of ours is batches of conformations of ACE-ALA-NME; a turn of OpenMM's is what its users write, a loop in Python
that sets positions and asks for energy and forces, or its own integrator in one simulation. All take turns, float32 as
in dynamics. `error` is the largest relative error of the energies (less that of the minimum) and forces against
OpenMM's Reference platform. OpenMM is the extra `[molecule]`; where it or a platform is missing the row says so.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ops import machine
from tasks.molecule.dynamics import draw_velocities, langevin
from tasks.molecule.potential import Potential
from tasks.molecule.system import load_system

BATCHES = (32, 64, 256, 512)
OURS, FORCES, STEPS = 1024, 64, 128  # of a turn: ours at least, OpenMM's loop, OpenMM's integrator
COLUMNS = ("of", "batch", "peer", "per_s", "p20", "p80", "times_openmm", "error", "note")
TEMPERATURE = 450.0
SYSTEM = load_system()


class Peer(NamedTuple):
    turn: Callable[[], int]  # does its work, says how many conformations or steps that was
    error: str = "-"


class Conformations(NamedTuple):
    """Seen in hot dynamics."""

    x: torch.Tensor  # nm [B, N, 3]
    v: torch.Tensor  # nm/ps
    generator: torch.Generator


def conformations(potential: Potential, batch: int, device: str) -> Conformations:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.tensor(SYSTEM.positions, dtype=torch.float32, device=device).repeat(batch, 1, 1)
    v = draw_velocities(SYSTEM.masses, 2 * TEMPERATURE, (batch,), generator)
    x, v = langevin(potential, SYSTEM.masses, x, v, TEMPERATURE, 30, generator=generator)
    return Conformations(x, v, generator)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ours(potential: Potential, seen: Conformations, device: str, error: str) -> dict[str, Peer]:
    times = -(-OURS // len(seen.x))

    def forces() -> int:
        for _ in range(times):
            potential.energy_and_forces(seen.x)
        synchronize(device)
        return times * len(seen.x)

    def steps() -> int:
        langevin(potential, SYSTEM.masses, seen.x, seen.v, TEMPERATURE, times, generator=seen.generator)
        synchronize(device)
        return times * len(seen.x)

    return {"energies and forces": Peer(forces, error), "Langevin steps": Peer(steps)}


def theirs(platform: str, threads: int, seen: Conformations) -> dict[str, Peer] | str:
    """OpenMM's turns on a platform, or why there are none."""
    try:
        import openmm

        from tasks.molecule.derive import build, force_field_system

        integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 1e-3)
        properties = {"Threads": str(threads)} if platform == "CPU" else {}
        system = force_field_system(build()[0])
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)
    except ImportError as error:
        return f"n/a: {error}"
    except openmm.OpenMMException as error:
        return f"n/a: {error}"
    frames = seen.x[:FORCES].double().cpu().numpy()

    def forces() -> int:
        for frame in frames:
            context.setPositions(frame)
            state = context.getState(getEnergy=True, getForces=True)
            state.getPotentialEnergy()
            state.getForces(asNumpy=True)
        return len(frames)

    def steps() -> int:
        context.setPositions(frames[0])
        context.setVelocities(seen.v[0].double().cpu().numpy())
        integrator.step(STEPS)
        return STEPS

    return {"energies and forces": Peer(forces), "Langevin steps": Peer(steps)}


def error_of(potential: Potential, seen: Conformations) -> str:
    """Ours against the Reference platform, in float32."""
    try:
        from tasks.molecule.derive import build, context_of, force_field_system
    except ImportError:
        return "-"
    x = seen.x[:FORCES]
    energy, forces = (part.double().cpu().numpy() for part in potential.energy_and_forces(x))
    context = context_of(force_field_system(build()[0]), SYSTEM.positions)
    gold = [_state(context, frame) for frame in (SYSTEM.positions, *x.double().cpu().numpy())]
    gold_energy = np.array([value for value, _ in gold])
    gold_forces = np.array([value for _, value in gold[1:]])
    of_energy = np.abs(energy - gold_energy[1:]) / (gold_energy[1:] - gold_energy[0])
    of_forces = np.linalg.norm(forces - gold_forces, axis=(1, 2)) / np.linalg.norm(gold_forces, axis=(1, 2))
    return f"{of_energy.max():.0e} {of_forces.max():.0e}"


def _state(context, frame: np.ndarray) -> tuple[float, np.ndarray]:
    context.setPositions(frame)
    state = context.getState(getEnergy=True, getForces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def measure(device: str, batches: list[int], rounds: int, threads: int) -> list[dict[str, str]]:
    """A row for each peer and batch: the median and fifths of its rate over the rounds, all peers taking turns."""
    potential, table = Potential(SYSTEM), []
    seen = {batch: conformations(potential, batch, device) for batch in batches}
    error = error_of(potential, seen[max(batches)])
    groups = {("tenfold", str(batch)): ours(potential, seen[batch], device, error) for batch in batches}
    platforms = ("Reference", "CPU", *(["CUDA"] if device == "cuda" else []))
    groups |= {(f"OpenMM {name}", "1"): theirs(name, threads, seen[max(batches)]) for name in platforms}
    for what in ("energies and forces", "Langevin steps"):
        peers = {key: group[what] for key, group in groups.items() if not isinstance(group, str)}
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in peers}
        for done in range(rounds + 1):
            for key, peer in peers.items():
                started = time.perf_counter()
                count = peer.turn()
                if done:  # the first is the warm-up
                    rates[key].append(count / (time.perf_counter() - started))
        medians = {key: statistics.median(values) for key, values in rates.items()}
        best = max((value for (name, _), value in medians.items() if name != "tenfold"), default=None)
        for key, group in groups.items():
            row = dict.fromkeys(COLUMNS, "-") | {"of": what, "peer": key[0], "batch": key[1], "note": ""}
            if key in peers:
                fifths = statistics.quantiles(rates[key], n=5, method="inclusive")
                values = {"per_s": medians[key], "p20": fifths[0], "p80": fifths[3]}
                row |= {name: f"{value:.0f}" for name, value in values.items()} | {"error": peers[key].error}
                row["times_openmm"] = f"{medians[key] / best:.1f}" if best else "-"
            else:
                row["note"] = str(group)
            table.append(row)
            print("| " + " | ".join(row.values()) + " |", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of OpenMM's CPU")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = machine(arguments.device)
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()), "\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    table = measure(arguments.device, list(arguments.batch), arguments.rounds, arguments.threads)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *facts])
            writer.writeheader()
            writer.writerows(row | facts for row in table)


if __name__ == "__main__":
    main()
