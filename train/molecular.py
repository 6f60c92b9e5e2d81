"""Train a flow that carries alanine dipeptide from one temperature to another, on data that are made here.

accelerate launch train/molecular.py --preset aa_300_450 --max_minutes 60          # a third of it goes to data at most
accelerate launch train/molecular.py --preset aa_300_450_gpu --model transformer   # the original's architecture, mended
accelerate launch train/molecular.py --preset aa_300_1000 --groups 32 --ns 20 --epochs 500 --batch_size 128 --lr 3e-4
accelerate launch train/molecular.py --tiny --max_steps 10 --cpu
python train/temper.py runs/molecular/RUN --cycles 2000

The loss is the gap: the nats by which the bidirectional energy loss lies above the least that it can be. It is 0 for a
perfect map, and a map without parameters (every vibration scaled by the root of the temperatures' ratio) is what the
flow has to beat. Everything is fp32 or better: an energy of a clash leaves no room for fewer digits.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.ic_transport import PRESETS as IC_SIZES
from models.ic_transport import ICSplineTransport, ICTransportConfig
from models.transformer_flow import PRESETS as TRANSFORMER_SIZES
from models.transformer_flow import ScalableTransformerFlow, TransformerFlowConfig
from models.transport import Transport as Flow
from tasks.molecule.data import LADDER, Trajectories, make_data
from tasks.molecule.potential import Potential
from tasks.molecule.system import System, load_system
from tasks.molecule.task import MoleculeTask, Transport, check_temperatures, identity, in_float64
from train.engine import ConfigError, Results, Trainer, TrainingConfig, parse
from train.engine.config import named_preset
from train.engine.optim import ScheduleName
from train.engine.order import order_of
from train.engine.processes import process_state
from train.engine.run_folder import begun
from train.engine.script import sentences
from train.molecular_epochs import Epochs, OriginBar, banner
from train.molecular_report import Report

# The original's: temperatures, epochs, batch and learning rate. What sizes its models had is in models/. Not so the
# first batch: it was 256, of which two CPU cores would make a few hundred steps in ten minutes.
PRESETS: dict[str, dict[str, Any]] = {
    "aa_300_450": {"t_hot": 450.0, "epochs": 3000, "batch_size": 64, "lr": 5e-4},
    "aa_300_450_gpu": {"t_hot": 450.0, "epochs": 3000, "batch_size": 64, "lr": 5e-4},
    "aa_300_450_gpu_light": {"t_hot": 450.0, "epochs": 3000, "batch_size": 16, "lr": 5e-4},
    "aa_300_670": {"t_hot": 670.0, "epochs": 5000, "batch_size": 256, "lr": 3e-4},
    "aa_300_1000": {"t_hot": 1000.0, "epochs": 6000, "batch_size": 256, "lr": 2e-4},
}
TINY = {
    "groups": 6,
    "ns": 2.4e-4,
    "frame_ps": 0.005,
    "swap_ps": 0.01,
    "equilibration_ps": 0.02,
    "eval_pairs": 8,
    "move_fs": 2,
}
DATA_SHARE = 0.3  # of --max_minutes: with the last cycle, at most a third
WARMUP_SHARE = 1 / 20  # of the epochs, at most, as the original had it
MEASURED_PAIRS = 2048  # of training, for the gap that progress is measured against


@dataclass(frozen=True, kw_only=True)
class MoleculeRun(TrainingConfig):
    """Flags of train/molecular.py."""

    # Temperatures, epochs, batch and learning rate, and the size of --model transformer.
    preset: Literal["aa_300_450", "aa_300_450_gpu", "aa_300_450_gpu_light", "aa_300_670", "aa_300_1000"] = "aa_300_450"
    # ic_spline: splines over bonds, angles and dihedrals, that start as the scaling map. transformer: the original's
    # autoregressive flow over Cartesian coordinates, with its defects mended, that starts as the identity.
    model: Literal["ic_spline", "transformer"] = "ic_spline"
    # K.
    t_cold: float = 300.0
    t_hot: float = 450.0

    # Data, made by the first run that asks for them and kept. Independent runs of parallel tempering; whole groups are
    # held out: an eighth to choose by, a quarter to report on.
    groups: int = 24
    # Nanoseconds over all groups and both temperatures; fewer where --max_minutes has no time for them.
    ns: float = 10.0
    # Picoseconds from frame to frame, from swap to swap, and of every group before its first frame. Energies are
    # remembered for 0.7 ps, but bonds and angles have new phases sooner, and a flow learns pairs by heart where few.
    frame_ps: float = 0.1
    swap_ps: float = 0.5
    equilibration_ps: float = 100.0
    # Femtoseconds of a move of hybrid Monte Carlo that a frame makes each time it is learned from, with its energy
    # computed anew: of frames that stay as they are, a flow learns by heart what no other frame has. 0: no move.
    move_fs: int = 20
    # Of the dynamics: runs of any --seed have the same data.
    data_seed: int = 0
    # Validation pairs that an evaluation maps, at most.
    eval_pairs: int = 1024

    # Epochs of warm-up, a twentieth of all of them at most, and not more than --warmup_steps.
    warmup_epochs: float = 50
    warmup_steps: int = 500
    epochs: float | None = 3000
    batch_size: int = 64
    lr: float = 5e-4
    betas: tuple[float, float] | None = (0.9, 0.999)
    weight_decay: float = 1e-5
    schedule: ScheduleName = "cosine"
    final_lr_ratio: float = 0.01
    ema_decay: float = 0.999

    def problems(self) -> list[str]:
        found = super().problems()
        found += [
            f"--{name} must be more than 0, not {getattr(self, name)}"
            for name in ("ns", "frame_ps", "swap_ps", "eval_pairs")
            if not getattr(self, name) > 0
        ]
        found += [
            f"--{name} must not be negative, not {getattr(self, name)}"
            for name in ("equilibration_ps", "data_seed", "move_fs", "warmup_epochs")
            if not getattr(self, name) >= 0
        ]
        if self.groups < 3:
            found.append(
                f"--groups must be at least 3, to learn from, to choose by and to report on, not {self.groups}"
            )
        try:
            check_temperatures(self.t_cold, self.t_hot)
        except ValueError as error:
            found.append(f"--t_cold, --t_hot: {error}")
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.mixed_precision in ("bf16", "fp16"):
            found.append(
                f"--mixed_precision {self.mixed_precision}: 16 bits leave energies off by kJ/mol, and the odds of "
                "swaps with them; take no, or leave it out"
            )
        elif self.mixed_precision == "auto" and launched != "no":
            found.append(
                f"the launch config asks for {launched}: 16 bits leave energies off by kJ/mol, and the odds of swaps "
                "with them; say mixed_precision: no in it, or overrule it with --mixed_precision no"
            )
        return found

    def filled_in(self) -> MoleculeRun:
        """In fp32, and with what --tiny decides."""
        exact = dataclasses.replace(self, mixed_precision="no")
        return dataclasses.replace(exact, **TINY, batch_size=min(self.batch_size, 4)) if self.tiny else exact

    @property
    def temperatures(self) -> tuple[float, float]:
        return self.t_cold, self.t_hot


def preset_of(argv: Sequence[str]) -> MoleculeRun:
    """The defaults that --preset names, on the command line or in --settings."""
    name = named_preset(MoleculeRun, argv)
    return MoleculeRun(**PRESETS.get(name or MoleculeRun.preset, {}))  # a name that is not known, the parser refuses


# ---- data ------------------------------------------------------------------------------------------------------------


def data_of(run: MoleculeRun, system: System, potential: Potential) -> Trajectories:
    """What the flags ask for, or what the time allows: from the cache, or made now.

    A run that goes on has what it began with, however long it may now take.
    """
    state = process_state(run)
    if run.plan:  # which looks at shapes
        run = dataclasses.replace(run, **TINY)
    before = begun(run.run_dir, "run.json").get("data")
    seconds = None if run.max_minutes is None else 60 * DATA_SHARE * run.max_minutes
    if before is not None:
        seconds = before["max_seconds"]
    data = make_data(
        system,
        potential,
        run.temperatures,
        groups=run.groups,
        ps=1000 * run.ns / (2 * run.groups),
        frame_every_ps=run.frame_ps,
        swap_every_ps=run.swap_ps,
        equilibration_ps=run.equilibration_ps,
        ladder=tuple(sorted({*LADDER, *run.temperatures})),
        seed=run.data_seed,
        max_seconds=seconds,
        device="cuda" if state.device.type == "cuda" else "cpu",
        progress=state.is_main_process,
    )
    if before is not None and before["ps"] != data.info["ps"]:
        raise ConfigError(
            f"{run.run_dir} was begun with {before['ps']:g} ps of every group, and there are {data.info['ps']:g} ps "
            "now: give a new --run_dir"
        )
    return dataclasses.replace(data, info=data.info | {"max_seconds": seconds})


def task_of(run: MoleculeRun) -> MoleculeTask:
    system = load_system()
    potential = Potential(system)
    data = data_of(run, system, potential)
    settings = {"eval_pairs": run.eval_pairs, "move_fs": run.move_fs, "seed": run.seed}
    return MoleculeTask(system, potential, data, run.temperatures, **settings)


def with_warmup(run: MoleculeRun, steps_per_epoch: float) -> MoleculeRun:
    """warmup_steps as --warmup_epochs and the length of the run have it."""
    epochs = min(run.warmup_epochs, WARMUP_SHARE * run.epochs if run.epochs is not None else run.warmup_epochs)
    return dataclasses.replace(run, warmup_steps=min(run.warmup_steps, round(epochs * steps_per_epoch)))


# ---- the model -------------------------------------------------------------------------------------------------------


def build(run: MoleculeRun, task: MoleculeTask) -> Flow:
    """The flow that the flags ask for, as it is before it has learned anything."""
    if run.model == "transformer":
        size = TRANSFORMER_SIZES["tiny" if run.tiny else run.preset] | {"t_cold": run.t_cold, "t_hot": run.t_hot}
        model = ScalableTransformerFlow(TransformerFlowConfig(num_atoms=task.system.num_atoms, **size))
    else:
        model = ICSplineTransport(ic_config(run, task, **IC_SIZES["tiny" if run.tiny else "base"]))
    model.set_means(*task.train.ends())
    model.energy_fn = energy_of(task.potential)
    return model


def ic_config(run: MoleculeRun, task: MoleculeTask, **size: Any) -> ICTransportConfig:
    system = task.system
    molecule = {"zmatrix": system.zmatrix, "soft": system.soft, "flips": system.flips}
    return ICTransportConfig(**molecule, t_cold=run.t_cold, t_hot=run.t_hot, **size)


def baselines_of(run: MoleculeRun, task: MoleculeTask, device: torch.device | str = "cpu") -> dict[str, Transport]:
    """The maps that the flow must beat, in float64, by name: vibrations scaled by the root of the temperatures' ratio,
    or by the ratio of their spreads in the training data; and none at all."""
    maps = {}
    for name, fit_scale in (("scaling", False), ("affine", True)):
        model = ICSplineTransport(ic_config(run, task, num_couplings=0))
        model.set_means(*task.train.ends(), fit_scale=fit_scale)
        maps[name] = in_float64(model.to(device))
    return {**maps, "plain": identity}


def energy_of(potential: Potential) -> Callable[[Tensor], Tensor]:
    """The potential as a model takes it."""

    def energy(x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):  # of a plan: no numbers, and no potential, but as much memory
            return x.square().sum((-2, -1))
        return potential(x)

    return energy


# ---- a run -----------------------------------------------------------------------------------------------------------


def train(run: MoleculeRun) -> Results:
    task = task_of(run)
    run = with_warmup(run, order_of(task, run).steps_per_epoch)
    torch.manual_seed(run.seed)
    model = build(run, task)
    trainer = Trainer(model, run, task)
    baselines = baselines_of(run, task)
    gaps = {name: task.scores(task.mapped(transport, task.val))["gap"] for name, transport in baselines.items()}
    learned = task.scores(task.mapped(baselines["scaling"], task.train.thinned(MEASURED_PAIRS)))
    epochs = Epochs(trainer, learned["gap"])
    trainer.hooks = [Report(task, baselines, epochs, run.preset)]
    if trainer.backend.is_main:
        trainer.book.trackers.append(epochs)
    trainer.book.bar = OriginBar(trainer.backend.is_main, task.item_name)
    trainer.book.say(*banner(type(model).__name__, run.temperatures, run.epochs, run.batch_size, run.lr))
    trainer.facts |= {"data": task.info, "model": dataclasses.asdict(model.config)}
    trainer.report["baselines"] = gaps
    return trainer.train()


def main(argv: Sequence[str] | None = None) -> Results:
    with sentences():
        argv = sys.argv[1:] if argv is None else argv
        return train(parse(MoleculeRun, argv, preset_of(argv), fill=MoleculeRun.filled_in))


if __name__ == "__main__":
    main()
