"""Train maze solvers beside their controls, and test them all on the same mazes; train/maze_12x12.py and
train/maze_scaling.py are this script with other defaults.

accelerate launch train/maze.py --suite perfect-8 --size micro --position rope2d --validity_mask --dropout 0 \
    --batch_size 8 --lr 4e-3 --rollout_mazes 0 --models baseline --max_minutes 2
accelerate launch train/maze.py --suite randwall-20 --models baseline looped poh --max_steps 20000
accelerate launch train/maze.py --suite perfect-12 --models baseline poh uniform frozen deep --seeds 5 --epochs 10
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.maze_layers import SIZES, MazeConfig, MazeModel
from models.maze_transformer import MazeTransformer, MazeTransformerConfig
from models.mlmu import MLMU, MLMUConfig
from models.parity import flops, legacy_match, match, parameters
from models.poh import PoH, PoHConfig
from models.trm import TRM, TRMConfig
from tasks.maze.files import MazeFiles
from tasks.maze.generate import Suite
from tasks.maze.paths import PathTask
from tasks.maze.task import MazeTask
from train.engine import Results, Trainer, TrainingConfig, parse
from train.engine.equal_steps import with_equal_steps
from train.engine.processes import process_state
from train.engine.run_folder import default_run_dir
from train.engine.script import sentences
from train.maze_hooks import EntropyAnneal, Routing, Test
from train.maze_report import report

ModelName = Literal["baseline", "poh", "looped", "uniform", "frozen", "deep", "poh_depth3", "trm", "mlmu"]
ORIGINAL = {"d_model": 384, "num_heads": 6, "d_ff": 1536, "num_layers": 4}  # of the 12 x 12 script
TINY = {"d_model": 32, "num_heads": 2, "d_ff": 64, "num_layers": 1}
KINDS = {MazeTransformerConfig: MazeTransformer, PoHConfig: PoH, TRMConfig: TRM, MLMUConfig: MLMU}


@dataclass(frozen=True, kw_only=True)
class MazeRun(TrainingConfig):
    """Flags of the maze scripts."""

    # Models to train one after another. poh: PoH-HRM; its controls: looped (as many refinements, no routing), uniform
    # and frozen (routing that does not learn), deep (a baseline of poh's FLOPs), poh_depth3 (three wide layers), trm;
    # mlmu is another objective: the way itself, hidden cells to be named. It has a table of positions in any case.
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
    # A folder of your own mazes in place of a suite, in HRM's and TRM's format: train/ and test/ of .npy files, or
    # train.csv and test.csv. The last --val of train are set aside; --train and --test are then at most so many.
    data: Path | None = None
    # Cells of the way from start to goal, at least.
    min_path: int = 0
    # Share of dead ends that get a second exit.
    braid: float = 0.0
    # Mazes to learn from, to choose by, and to report on.
    train: int = 10_000
    val: int = 256
    test: int = 2000
    # Test mazes that are also walked with a forward for every step, about N^2 of them a maze; 100 leave an interval of
    # 10 points to either side. 0 leaves it out.
    rollout_mazes: int = 100
    # N of perfect-N that the trained models are tested on as well, for which they need --position rope2d.
    test_sizes: tuple[int, ...] = ()
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
        if not self.models:
            found.append("--models needs at least one model, as baseline or poh")
        if len(set(self.models)) < len(self.models):
            found.append(f"--models names one twice: {' '.join(self.models)}")
        if self.legacy and set(self.models) - {"baseline", "poh", "poh_depth3"}:
            found.append("--legacy has the original's models only: --models baseline poh poh_depth3")
        found += self._problems_of_mazes()
        return found

    def _problems_of_mazes(self) -> list[str]:
        found = []
        try:
            Suite(self.suite, self.min_path, self.braid)
            for size in self.test_sizes:
                Suite(f"perfect-{size}")
        except ValueError as error:
            found.append(f"--suite, --min_path, --braid, --test_sizes: {error}")
        if self.data is not None and (self.min_path or self.braid or self.suite != MazeRun.suite):
            found.append("--data brings its own mazes: leave out --suite, --min_path and --braid")
        if self.rollout_mazes < 0:
            found.append(f"--rollout_mazes must not be negative, not {self.rollout_mazes}")
        if self.test_sizes and self.position == "table":
            found.append("--test_sizes needs --position rope2d: a table has a row for each cell of one size")
        if len(set(self.test_sizes)) < len(self.test_sizes):
            found.append(f"--test_sizes names one twice: {' '.join(map(str, self.test_sizes))}")
        return found

    def filled_in(self) -> MazeRun:
        """With what --tiny decides."""
        if not self.tiny:
            return self
        small = {"suite": "perfect-5", "min_path": 0, "train": 64, "val": 16, "test": 32}
        small["rollout_mazes"] = min(self.rollout_mazes, 8)
        return dataclasses.replace(self, **small, batch_size=min(self.batch_size, 8))


def mazes_of(run: MazeRun) -> Suite | MazeFiles:
    return Suite(run.suite, run.min_path, run.braid) if run.data is None else MazeFiles(run.data, run.val)


# ---- the models ------------------------------------------------------------------------------------------------------


def configs(run: MazeRun, maze_size: int) -> dict[str, MazeConfig]:
    """A config for each of the run's models, matched to the baseline's, for mazes of that many rows."""
    shape = TINY if run.tiny else ORIGINAL if run.size == "12x12" else SIZES[run.size]
    common = {
        "maze_size": maze_size,
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
        if name == "mlmu":
            own = {"position": "table", "horizons": 1, "validity_mask": False}
            return match(MLMUConfig(**shape, **{**common, **own}), aim, cost)
        return poh

    return {name: made(name) for name in run.models}


def build(config: MazeConfig) -> MazeModel:
    return KINDS[type(config)](config)


# ---- main ------------------------------------------------------------------------------------------------------------


def train_all(run: MazeRun, root: Path) -> dict[str, Any]:
    """Every model and seed in a folder of its own, then what they come to beside each other."""
    source = mazes_of(run)
    counts = {"train": run.train, "val": run.val, "augment": run.augment}
    task = MazeTask(source, horizons=run.multi_horizon, rows=run.rows, **counts)
    tasks = {name: PathTask(source, **counts) if name == "mlmu" else task for name in run.models}
    shapes = configs(run, source.size)
    models = {name: (lambda shape=shape: build(shape), tasks[name]) for name, shape in shapes.items()}
    lengths = {"seeds": run.seeds, "epoch": task.num_mazes, "root": root}
    run = with_equal_steps(run, models, **lengths, cap_warmup=not run.legacy)
    test = Test(source, run.test, run.rollout_mazes, run.test_sizes, run.braid)
    results: dict[str, list[Results]] = {name: [] for name in shapes}
    for seed in range(run.seed, run.seed + run.seeds):
        for name, shape in shapes.items():
            # One model and one seed, whatever else there is: more of both can be added to the same --run_dir later.
            own = dataclasses.replace(run, run_dir=root / f"{name}-seed{seed}", models=(name,), seed=seed, seeds=1)
            hooks = [test, Routing(), *([EntropyAnneal()] if run.ent_anneal else [])]
            trainer = Trainer(lambda _, shape=shape: build(shape), own, tasks[name], hooks)
            trainer.facts |= {"data": task.info, "model": dataclasses.asdict(shape)}
            trainer.report["baselines"] = tasks[name].baselines()
            results[name].append(trainer.train())
    return report(root, run, shapes, results, test) if process_state(run).is_main_process else {}


def main(
    argv: Sequence[str] | None = None, default: MazeRun | None = None, config_class: type[MazeRun] = MazeRun
) -> dict[str, Any]:
    with sentences():
        run = parse(config_class, argv, default, fill=config_class.filled_in)
        return train_all(run, run.run_dir or default_run_dir())


if __name__ == "__main__":
    main()
