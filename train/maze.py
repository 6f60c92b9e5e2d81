"""Train maze solvers beside their controls, and test them all on the same mazes; train/maze_12x12.py and
train/maze_scaling.py are this script with other defaults.

accelerate launch train/maze.py --suite perfect-8 --size micro --position rope2d --validity_mask --dropout 0 \
    --batch_size 8 --lr 4e-3 --models poh --max_minutes 2
accelerate launch train/maze.py --suite randwall-20 --models baseline looped poh --max_steps 20000
accelerate launch train/maze.py --suite perfect-12 --models baseline poh uniform frozen deep --seeds 5 --epochs 10
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from models.maze_layers import SIZES, MazeConfig, MazeModel
from models.maze_transformer import MazeTransformer, MazeTransformerConfig
from models.parity import flops, legacy_match, match, parameters
from models.poh import PoH, PoHConfig
from models.trm import TRM, TRMConfig
from tasks.maze.generate import Suite
from tasks.maze.store import load
from tasks.maze.task import MazeTask, outcomes
from train.engine import ConfigError, Results, Trainer, TrainingConfig, parse
from train.engine.evaluation import aside
from train.engine.metrics import Row
from train.engine.processes import process_state
from train.engine.run_folder import default_run_dir, read_json, write_json
from train.engine.script import sentences
from train.maze_report import report

ModelName = Literal["baseline", "poh", "looped", "uniform", "frozen", "deep", "poh_depth3", "trm"]
ORIGINAL = {"d_model": 384, "num_heads": 6, "d_ff": 1536, "num_layers": 4}  # of the 12 x 12 script
TINY = {"d_model": 32, "num_heads": 2, "d_ff": 64, "num_layers": 1}
KINDS = {MazeTransformerConfig: MazeTransformer, PoHConfig: PoH, TRMConfig: TRM}
WARMUP_SHARE = 0.1  # of a run, at most: the original's warm-ups were longer than its runs
TIMED_STEPS = 3
SHARE_OF_TIME = 0.8  # what of --max_minutes is planned for steps; the rest goes to evaluations and tests


@dataclass(frozen=True, kw_only=True)
class MazeRun(TrainingConfig):
    """Flags of the maze scripts."""

    # Models to train one after another. poh: PoH-HRM; its controls: looped (as many refinements, no routing), uniform
    # and frozen (routing that does not learn), deep (a baseline of poh's FLOPs), poh_depth3 (three wide layers), trm.
    models: tuple[ModelName, ...] = ("baseline", "poh")
    # Initialisations and orders of each model, from --seed on.
    seeds: int = 1
    # 12x12 is the original's shape; micro 0.1 M parameters, tiny 0.5 M, small 2.5 M, medium 13 M, large 43 M, xl 101 M.
    size: Literal["12x12", "micro", "tiny", "small", "medium", "large", "xl"] = "12x12"
    # What the other models have in common with the baseline.
    match: Literal["parameters", "flops"] = "parameters"
    # The original's arithmetic, blind to walls: to explain its numbers.
    legacy: bool = False

    # perfect-N, perfect30px, randwall-N or hard30.
    suite: str = "perfect-12"
    # Cells of the way from start to goal, at least.
    min_path: int = 0
    # Share of dead ends that get a second exit.
    braid: float = 0.0
    # Mazes to learn from, to choose by, and to report on.
    train: int = 10_000
    val: int = 256
    test: int = 2000
    # all: learn from every cell; path: from those between start and goal, as the original.
    rows: Literal["all", "path"] = "all"
    # Every maze in its eight symmetries: an epoch is eight times as long.
    augment: bool = False

    label_smoothing: float = 0.1
    warmup_steps: int = 500
    # Heads for 1 … k steps ahead.
    multi_horizon: int = 1
    # A CNN's summary of the maze for every cell.
    maze_enc: bool = False
    # Score moves that are possible against each other, rather than all cells.
    validity_mask: bool = False
    # Refinements, and from one move of the slow state to the next.
    R: int = 4
    T: int = 4
    # topk lets two heads speak at a time.
    route_mode: Literal["soft", "topk"] = "soft"
    # Above 0 sharpens the routing, below 0 evens it out.
    route_ent_weight: float = 0.0
    # Let that weight fall to 0 over the run.
    ent_anneal: bool = False
    # Let each cell say when it has pondered enough.
    halting: bool = False
    # table: a vector for each cell; rope2d: relative, so that a model solves mazes of any size.
    position: Literal["table", "rope2d"] = "table"
    dropout: float = 0.1
    lr: float = 1e-3

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("seeds", "train", "val", "test", "R", "T"):
            if getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.multi_horizon <= 3:
            found.append(f"--multi_horizon must be 1, 2 or 3, not {self.multi_horizon}")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"--{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.ent_anneal and not self.route_ent_weight:
            found.append("--ent_anneal has nothing to anneal with --route_ent_weight 0; give a weight, as 5e-4")
        if len(set(self.models)) < len(self.models):
            found.append(f"--models names one twice: {' '.join(self.models)}")
        if self.legacy and set(self.models) - {"baseline", "poh", "poh_depth3"}:
            found.append("--legacy has the original's models only: --models baseline poh poh_depth3")
        try:
            Suite(self.suite, self.min_path, self.braid)
        except ValueError as error:
            found.append(f"--suite, --min_path, --braid: {error}")
        return found

    def filled_in(self) -> MazeRun:
        """With what --tiny decides."""
        if not self.tiny:
            return self
        small = {"suite": "perfect-5", "min_path": 0, "train": 64, "val": 16, "test": 32}
        return dataclasses.replace(self, **small, batch_size=min(self.batch_size, 8))


# ---- the models ------------------------------------------------------------------------------------------------------


def configs(run: MazeRun) -> dict[str, MazeConfig]:
    """A config for each of the run's models, matched to the baseline's."""
    shape = TINY if run.tiny else ORIGINAL if run.size == "12x12" else SIZES[run.size]
    common = {
        "maze_size": Suite(run.suite).size,
        "horizons": run.multi_horizon,
        "maze_enc": run.maze_enc,
        "validity_mask": run.validity_mask,
        "label_smoothing": run.label_smoothing,
        "dropout": run.dropout,
        "position": run.position,
        "legacy": run.legacy,
    }
    routed = {"R": run.R, "T": run.T, "route_mode": run.route_mode, "route_ent_weight": run.route_ent_weight}
    baseline = MazeTransformerConfig(**shape, **common)
    template = PoHConfig(**shape, **common, **routed, halting=run.halting)
    cost = parameters if run.match == "parameters" else flops
    aim = cost(baseline)
    if run.legacy:
        poh = legacy_match(template, baseline, "heads" if run.size == "12x12" else "scale")
    else:
        poh = match(template, aim, cost)

    def made(name: ModelName) -> MazeConfig:
        if name == "baseline":
            return baseline
        if name == "looped":
            return match(dataclasses.replace(baseline, loops=run.R), aim, cost)
        if name in ("uniform", "frozen"):
            return dataclasses.replace(poh, routing=name)
        if name == "deep":
            return match(baseline, flops(poh), flops, free="num_layers")
        if name == "poh_depth3":
            shallow = dataclasses.replace(template, num_layers=3)
            return shallow if run.legacy else match(shallow, aim, cost)
        if name == "trm":
            return match(TRMConfig(**{**shape, "num_layers": min(2, shape["num_layers"])}, **common), aim, cost)
        return poh

    return {name: made(name) for name in run.models}


def build(config: MazeConfig) -> MazeModel:
    return KINDS[type(config)](config)


# ---- hooks -----------------------------------------------------------------------------------------------------------


class EntropyAnneal:
    """Lets the weight of the routing's entropy fall in a line to 0 at the run's end."""

    def __call__(self, trainer: Trainer, row: Row) -> None:
        total = trainer.progress.total_steps
        if total is not None and hasattr(trainer.inner, "entropy_scale"):
            trainer.inner.entropy_scale.fill_(1 - row["step"] / total)


class Test:
    """At the end, the test mazes, with walls and without: means into results.json, every maze into outcomes.npz."""

    def __init__(self, suite: Suite, count: int, batch_size: int = 64) -> None:
        self.mazes, self.steps = load(suite, "test", count)
        self.batch_size, self.trainer = batch_size, None

    def __call__(self, trainer: Trainer, row: Row) -> None:
        self.trainer = trainer

    def finish(self) -> None:
        trainer = self.trainer
        seen, blind = (self.scores(trainer, show_walls=show) for show in (True, False))
        trainer.report["test"] = {name: value.nanmean().item() for name, value in seen.items()}
        trainer.report["walls_zeroed"] = {name: value.nanmean().item() for name, value in blind.items()}
        if trainer.folder is not None:
            arrays = {name: value.numpy() for name, value in seen.items()}
            arrays |= {f"walls_zeroed_{name}": value.numpy() for name, value in blind.items()}
            np.savez_compressed(trainer.run_dir / "outcomes.npz", **arrays)

    def scores(self, trainer: Trainer, *, show_walls: bool) -> dict[str, Tensor]:
        parts, horizons = [], trainer.task.horizons
        with aside(trainer.predict.model):
            for rows in torch.arange(len(self.steps)).split(self.batch_size):
                mazes, steps = self.mazes.take(rows), self.steps[rows]
                parts.append(outcomes(trainer.predict, mazes, steps, horizons, show_walls=show_walls))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- equal steps for all ---------------------------------------------------------------------------------------------


def common_length(run: MazeRun, task: MazeTask, shapes: dict[str, MazeConfig]) -> int:
    """Optimizer steps of every model: as the limits say, or as many as all of them can make within --max_minutes."""
    if run.max_steps is not None:
        return run.max_steps
    if run.epochs is not None or run.max_minutes is None:
        return math.ceil((run.epochs or 1.0) * len(task.train) / run.batch_size)
    state = process_state(run)
    if state.num_processes > 1:
        raise ConfigError("with several processes, say how long to train by --max_steps or --epochs")
    seconds = sum(step_seconds(build(shape).to(state.device), task, run) for shape in shapes.values())
    left = 60 * run.max_minutes - (time.time() - psutil.Process().create_time())
    return max(1, int(SHARE_OF_TIME * left / (run.seeds * seconds)))


def step_seconds(model: MazeModel, task: MazeTask, run: MazeRun) -> float:
    """Of forward and backward over one batch, the least of a few."""
    device = next(model.parameters()).device
    items = [task.train[i % len(task.train)] for i in range(run.micro_batch_size or run.batch_size)]
    batch = {name: value.to(device) for name, value in task.collate(items).items()}
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        model(**batch)["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times) * run.batch_size / len(items)


def planned(run: MazeRun, task: MazeTask, shapes: dict[str, MazeConfig], root: Path) -> MazeRun:
    """The run with the length and warm-up that all its models share; a resumed one keeps what was planned at first.

    Raises ConfigError where its limits now name another length.
    """
    file, state = root / "length.json", process_state(run)
    if file.exists():
        length = read_json(file)
        named = run.max_steps is not None or run.epochs is not None
        if named and (steps := common_length(run, task, shapes)) != length["max_steps"]:
            raise ConfigError(
                f"the models in {root} were begun with {length['max_steps']} steps each, not {steps}: give the same "
                "--max_steps or --epochs, or a new --run_dir"
            )
    else:
        steps = common_length(run, task, shapes)
        warmup = run.warmup_steps if run.legacy else min(run.warmup_steps, int(WARMUP_SHARE * steps))
        length = {"max_steps": steps, "warmup_steps": warmup}
        if state.is_main_process and not run.plan:
            root.mkdir(parents=True, exist_ok=True)
            write_json(file, length)
    if state.is_main_process and length["warmup_steps"] < run.warmup_steps:
        print(
            f"warm-up     {length['warmup_steps']} steps, a tenth of the run's {length['max_steps']}, in place of "
            f"{run.warmup_steps}"
        )
    return dataclasses.replace(run, epochs=None, **length)


# ---- main ------------------------------------------------------------------------------------------------------------


def train_all(run: MazeRun, root: Path) -> dict[str, Any]:
    """Every model and seed in a folder of its own, then what they come to beside each other."""
    suite = Suite(run.suite, run.min_path, run.braid)
    task = MazeTask(suite, train=run.train, val=run.val, horizons=run.multi_horizon, rows=run.rows, augment=run.augment)
    shapes = configs(run)
    run = planned(run, task, shapes, root)
    test = Test(suite, run.test)
    results: dict[str, list[Results]] = {name: [] for name in shapes}
    for seed in range(run.seed, run.seed + run.seeds):
        for name, shape in shapes.items():
            # One model and one seed, whatever else there is: more of both can be added to the same --run_dir later.
            own = dataclasses.replace(run, run_dir=root / f"{name}-seed{seed}", models=(name,), seed=seed, seeds=1)
            hooks = [test, *([EntropyAnneal()] if run.ent_anneal else [])]
            trainer = Trainer(lambda _, shape=shape: build(shape), own, task, hooks)
            trainer.facts |= {"data": task.info, "model": dataclasses.asdict(shape)}
            trainer.report["baselines"] = task.baselines()
            results[name].append(trainer.train())
    return report(root, run, shapes, results, test.mazes, test.steps) if process_state(run).is_main_process else {}


def main(
    argv: Sequence[str] | None = None, default: MazeRun | None = None, config_class: type[MazeRun] = MazeRun
) -> dict[str, Any]:
    with sentences():
        run = parse(config_class, argv, default, fill=config_class.filled_in)
        return train_all(run, run.run_dir or default_run_dir())


if __name__ == "__main__":
    main()
