"""Parallel tempering with a trained flow in its swaps, beside plain and scaled ones, at equal numbers of energy calls.

python train/temper.py runs/molecular/RUN --cycles 2000
python train/temper.py runs/molecular/RUN --mode plain flow --groups 32 --cycles 5000 --write cold.dcd
python train/temper.py runs/molecular/RUN --temperatures 300 350 400 450        # one flow serves a whole ladder

A replica that went from the coldest temperature to the hottest and back has made a round trip. An energy call is the
energy, or energy and forces, of one conformation. The rates leave out what training and its data took; from the
break-even on, a chain of the flow's has made more round trips than a plain one of as many calls, all counted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from tasks.molecule.estimates import over_groups, tau_int
from tasks.molecule.formats import WRITTEN, write_trajectory
from tasks.molecule.task import MoleculeTask, Transport, in_float64
from tasks.molecule.tempering import RoundTrips, Tempering
from train.engine import ConfigError, parse
from train.engine.checkpoint import load_state
from train.engine.metrics import read_rows
from train.engine.processes import process_state
from train.engine.run_folder import command_line, read_json, write_json
from train.engine.script import sentences
from train.molecular import MoleculeRun, baselines_of, build, task_of
from train.molecular_report import torsions, weights_file
from train.pictures import new_figure

Mode = Literal["plain", "scaled", "flow"]
MILLION = 1_000_000
OKABE_ITO = ("#222222", "#E69F00", "#0072B2")
ENDS = 2  # frames of a training pair, each mapped, and moved on before it is


@dataclass(frozen=True)
class TemperRun:
    """Flags of train/temper.py."""

    # The folder of a finished run of train/molecular.py.
    run: Annotated[Path, tyro.conf.Positional]
    mode: tuple[Mode, ...] = ("plain", "scaled", "flow")
    # Cycles of dynamics and swaps of plain tempering; the other modes have as many energy calls.
    cycles: int = 1000
    # Independent chains, each from frames of its own among those that were learned.
    groups: int = 16
    # K, the coldest first; the two of the run when not given.
    temperatures: tuple[float, ...] = ()
    # Picoseconds of dynamics in a cycle, and of a step of it.
    swap_ps: float = 0.5
    dt: float = 0.001
    seed: int = 0
    # Where results go, as JSON with a picture beside it; RUN/temper.json when not given.
    output: Path | None = None
    # The cold chains, one after another, of the last mode: .dcd, .xtc or .pdb.
    write: Path | None = None

    def check(self) -> None:
        """Raises ConfigError with one sentence for each setting that cannot work."""
        found = [
            f"--{n} must be more than 0, not {getattr(self, n)}"
            for n in ("cycles", "groups", "swap_ps", "dt")
            if not getattr(self, n) > 0
        ]
        if not (self.run / "results.json").exists():
            found.append(f"{self.run} holds no finished run of train/molecular.py: results.json is not there")
        if len(set(self.mode)) < len(self.mode) or not self.mode:
            found.append(f"--mode takes each of plain, scaled and flow once at most, not {' '.join(self.mode)}")
        if self.write is not None and self.write.suffix not in WRITTEN:
            found.append(f"--write {self.write}: frames can be written as {', '.join(WRITTEN)}")
        if len(self.temperatures) == 1:
            found.append(f"--temperatures needs two at least, not {self.temperatures[0]:g} alone")
        if found:
            raise ConfigError("these settings cannot work:\n" + "\n".join(f"  - {p}" for p in found))

    @property
    def steps(self) -> int:
        return max(1, round(self.swap_ps / self.dt))


def trained(folder: Path) -> tuple[MoleculeTask, dict[str, Transport | None], torch.device]:
    """The task of a run, its maps in float64 by mode, and where to compute."""
    settings = dataclasses.replace(parse(MoleculeRun, ["--settings", str(folder / "config.json")]), run_dir=folder)
    device = process_state(settings).device
    device = torch.device("cpu") if device.type == "mps" else device  # swaps are decided in float64
    task = task_of(settings)
    flow, scaling = build(settings, task), baselines_of(settings, task, device)["scaling"]
    flow.load_state_dict(load_state(weights_file(folder, settings.preset, task)))
    return task, {"plain": None, "scaled": scaling, "flow": in_float64(flow.to(device))}, device


def spent_calls(folder: Path, mode: str) -> dict[str, int]:
    """Energy calls that were made before the first cycle could be: for data, and for training with its evaluations."""
    facts, settings = read_json(folder / "run.json")["data"], read_json(folder / "config.json")
    evaluations = sum(row["split"] == "val" for row in read_rows(folder / "metrics.jsonl"))
    steps = read_json(folder / "results.json")["steps"]
    moved = facts["move_fs"] + 1 if facts["move_fs"] else 0
    training = ENDS * (steps * settings["batch_size"] * (1 + moved) + evaluations * facts["pairs"]["val"])
    return {
        "data": 0 if mode == "plain" else facts["energy_calls"],
        "training": training if mode == "flow" else 0,
    }


# ---- a mode ----------------------------------------------------------------------------------------------------------


def temper(
    run: TemperRun, task: MoleculeTask, mode: str, transport: Transport | None, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Chains of one mode: what they come to, and the cold frames [groups, cycles, N, 3]."""
    temperatures = run.temperatures or task.temperatures
    chain = Tempering(
        task.potential,
        task.system.masses,
        temperatures,
        starts(run, task, temperatures).to(device),
        transport=transport,
        steps=run.steps,
        dt=run.dt,
        generator=torch.Generator(device).manual_seed(run.seed),
    )
    budget = run.cycles * run.groups * len(temperatures) * (run.steps + 2)
    counters = [RoundTrips(labels) for labels in chain.labels.split(1)]
    cold, calls, trips, started = [], [0], [0], time.perf_counter()
    with tqdm(total=budget, desc=mode, unit="call", unit_scale=True, disable=None) as bar:
        while chain.energy_calls < budget:
            chain.cycle()
            for counter, labels in zip(counters, chain.labels.split(1), strict=True):
                counter.visit(labels)
            cold.append(chain.x[:, 0].cpu().clone())
            calls.append(chain.energy_calls)
            trips.append(chain.round_trips)
            bar.update(calls[-1] - calls[-2])
    x = torch.stack(cold, 1)
    each = np.array([counter.count for counter in counters])
    rate = over_groups(each * run.groups * MILLION / calls[-1])
    found = {
        "acceptance": chain.acceptance.tolist(),
        "trips_per_million": float(rate.value),
        "trips_per_million_se": float(rate.error),
        **samples_per_million(task, x, calls[-1]),
        "seconds": time.perf_counter() - started,
        "spent": spent_calls(run.run, mode),
        "calls": calls,
        "trips": trips,
    }
    return found, x


def starts(run: TemperRun, task: MoleculeTask, temperatures: Sequence[float]) -> Tensor:
    """[groups, K, N, 3]: training frames, far from each other, of the one of the two temperatures that is nearer."""
    rows = torch.linspace(0, len(task.train) - 1, run.groups).round().long()
    ends, middle = task.train.ends()[:, rows], math.prod(task.temperatures) ** 0.5
    return torch.stack([ends[int(t > middle)] for t in temperatures], 1)


def samples_per_million(task: MoleculeTask, cold: Tensor, calls: int) -> dict[str, float]:
    """Independent values of phi and psi that cold frames [groups, cycles, N, 3] hold, per million calls."""
    frames = cold.shape[:2].numel()
    return {
        f"{name}_samples_per_million": frames * MILLION / calls / (2 * tau_int(np.exp(1j * angle)))
        for name, angle in zip(("phi", "psi"), torsions(task, cold), strict=True)
    }


def break_even(found: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """Calls from which on this mode is ahead of plain tempering, with what was spent before; None if it never is."""
    gain = found["trips_per_million"] - plain["trips_per_million"]
    return sum(found["spent"].values()) * found["trips_per_million"] / gain if gain > 0 else None


# ---- what it comes to ------------------------------------------------------------------------------------------------


def table(modes: dict[str, dict[str, Any]]) -> list[str]:
    head = ["mode", "acceptance", "round trips", "per 10^6 calls", "all counted", "φ samples per 10^6", "break-even"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, of in modes.items():
        cells = [name, " ".join(f"{a:.3f}" for a in of["acceptance"]), str(of["trips"][-1])]
        cells += [f"{of['trips_per_million']:.2f} ± {of['trips_per_million_se']:.2f}", f"{of['all_counted']:.2f}"]
        cells += [f"{of['phi_samples_per_million']:.1f}"]
        later = of.get("break_even")
        cells += ["" if name == "plain" else "none" if later is None else f"{later:.2g} calls"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(file: Path, modes: dict[str, dict[str, Any]]) -> None:
    """Round trips by energy calls: of the chains alone, and from where data and training had been paid for."""
    figure = new_figure(11, 4)
    alone, counted = figure.subplots(1, 2)
    ends = [[of["calls"][-1], sum(of["spent"].values()), of.get("break_even") or 0] for of in modes.values()]
    ahead = 1.5 * max(map(max, ends)) / MILLION
    for number, (name, of) in enumerate(modes.items()):
        calls, spent = np.array(of["calls"]) / MILLION, sum(of["spent"].values()) / MILLION
        style = {"color": OKABE_ITO[number], "label": name}
        alone.plot(calls, of["trips"], **style)
        counted.plot([0, spent, ahead], [0, 0, of["trips_per_million"] * (ahead - spent)], **style)
    alone.set(title="measured", xlabel="energy calls (millions)", ylabel="round trips")
    counted.set(title="data and training counted in", xlabel="energy calls (millions)", ylabel="round trips expected")
    for axes in (alone, counted):
        axes.legend(fontsize="small")
        axes.set(xlim=(0, None), ylim=(0, None))
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    with sentences():
        run = tyro.cli(TemperRun, args=argv)
        run.check()
        task, maps, device = trained(run.run)
        modes: dict[str, dict[str, Any]] = {}
        for mode in run.mode:
            modes[mode], cold = temper(run, task, mode, maps[mode], device)
        for of in modes.values():
            of["all_counted"] = of["trips"][-1] * MILLION / (of["calls"][-1] + sum(of["spent"].values()))
            if "plain" in modes:
                of["break_even"] = break_even(of, modes["plain"])
        output = run.output or run.run / "temper.json"
        temperatures = run.temperatures or task.temperatures
        write_json(output, {"temperatures": temperatures, "modes": modes, "command": command_line()})
        draw(output.with_suffix(".png"), modes)
        if run.write is not None:
            write_trajectory(run.write, cold.flatten(0, 1), task.system, frame_ps=run.swap_ps)
        print("\n".join(table(modes)), flush=True)
        return modes


if __name__ == "__main__":
    main()
