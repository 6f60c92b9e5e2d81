"""Everything that a checkpoint holds, and how it goes out to files and comes back."""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from train.engine.backend import Backend
from train.engine.checkpoint import KEEP_BEST, Checkpoints, load_state, random_state, save_weights, set_random_state
from train.engine.config import ConfigError
from train.engine.guard import Guard, TrainingBroken
from train.engine.limits import Intervals
from train.engine.metrics import Meter
from train.engine.run_folder import read_json, write_json

# torch and safetensors say in their own ways that a disk is full.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def seed_generators(seed: int) -> None:
    """All whose state a checkpoint holds: what draws from Python's or numpy's is exact as well."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass
class Progress:
    """How far a run is: all of its state that isn't a tensor."""

    step: int = 0
    total_steps: int | None = None
    intervals: Intervals = field(default_factory=Intervals)
    seconds: float = 0.0  # of training, in the run's earlier processes
    spent: float = 0.0  # of those processes from start to end: what --max_cost counts
    last: dict = field(default_factory=dict)  # the newest evaluation: {"step", "scores"}
    best: list[dict] = field(default_factory=list)  # {"step", "score", "scores"}, best first
    evaluations_since_best: int = 0
    banned_steps: list[int] = field(default_factory=list)  # rewound over: their batches are left out
    skipped_steps: int = 0
    metrics_bytes: int = 0
    rows_logged: int = 0
    wandb_id: str | None = None

    def note(self, scores: dict[str, float], monitor: str, mode: str) -> bool:
        """An evaluation; whether it is among the best. The untrained model's isn't, nor one that is not finite."""
        self.last = {"step": self.step, "scores": scores}
        if self.step == 0 or not math.isfinite(scores[monitor]):
            return False
        sign = 1 if mode == "min" else -1
        entry: dict[str, Any] = {"step": self.step, "score": scores[monitor], "scores": scores}
        is_best = not self.best or sign * entry["score"] < sign * self.best[0]["score"]
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        others = [e for e in self.best if e["step"] != self.step]
        self.best = sorted([*others, entry], key=lambda e: sign * e["score"])[:KEEP_BEST]
        return entry in self.best

    def load(self, saved: dict) -> None:
        for name, value in saved.items():
            setattr(self, name, Intervals(**value) if name == "intervals" else value)

    def keep_only_step(self) -> None:
        """For a new run that goes on from another's checkpoint: its length, scores and rows are its own."""
        self.load({**asdict(Progress()), "step": self.step})


@dataclass
class Snapshot:
    """The live objects of a run. Every process calls `write` and `read`; process 0 writes what all share."""

    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    guard: Guard
    meter: Meter
    progress: Progress
    backend: Backend
    checkpoints: Checkpoints

    def write(self) -> float:
        """Write and seal a checkpoint of this step; returns the seconds it took.

        Raises OSError when the disk is full or the folder not ours; earlier checkpoints are then as they were.
        """
        started = time.perf_counter()
        if not self.backend.are_finite(self.model):
            raise TrainingBroken(
                f"after step {self.progress.step} the weights are not finite, and are not saved; lower --lr, or go on "
                f"from the newest checkpoint in {self.checkpoints.folder}, as the same command does"
            )
        try:
            self._write()
        except WRITE_ERRORS as error:
            raise OSError(
                f"the checkpoint of step {self.progress.step} could not be written to {self.checkpoints.folder} "
                f"({error}); earlier ones are untouched: make room, and the same command with this --run_dir goes on"
            ) from error
        return time.perf_counter() - started

    def _write(self) -> None:
        backend, progress = self.backend, self.progress
        aside = backend.on_main(lambda: self.checkpoints.begin(progress.step))
        optimizer = backend.optimizer_state() if backend.sharded or backend.is_main else None
        mine = {"random": random_state(), "meter": self.meter.state_dict()}
        torch.save({**mine, "optimizer": optimizer if backend.sharded else None}, aside / f"rank-{backend.rank}.pt")
        model = backend.whole(self.model)
        averaged = backend.whole(self.ema.module) if self.ema is not None else None
        if model is not None:
            save_weights(model, aside)
            if averaged is not None:
                save_model(averaged, str(aside / "ema.safetensors"))
            state = {
                "launch": backend.name,
                "optimizer": None if backend.sharded else optimizer,
                "guard": self.guard.state_dict(),
                "scaler": backend.scaler.state_dict() if backend.scaler is not None else None,
                "averaged": int(self.ema.n_averaged) if self.ema is not None else 0,
            }
            torch.save(state, aside / "optimizer.pt")
            write_json(aside / "trainer.json", asdict(progress))
        backend.wait()
        if backend.is_main:
            self.checkpoints.seal(aside, progress.best)

    def read(self, folder: Path) -> None:
        """Bring every object back to what it was when `folder` was written. Raises ConfigError if it doesn't fit."""
        backend = self.backend
        writers, readers = len(list(folder.glob("rank-*.pt"))), backend.world_size
        if writers != readers:
            raise ConfigError(
                f"{folder} was written by {writers} process(es) and this launch has {readers}; "
                "an exact resume needs as many"
            )
        state = load_state(folder / "optimizer.pt")
        if state["launch"] != backend.name:
            raise ConfigError(
                f"{folder} was written under {state['launch']} and this launch is {backend.name}; "
                "an exact resume needs the same launch config"
            )
        mine = load_state(folder / f"rank-{backend.rank}.pt")
        backend.load_weights(self.model, folder / "model.safetensors")
        backend.load_optimizer_state(mine["optimizer"] if backend.sharded else state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        if backend.scaler is not None:
            backend.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            backend.load_weights(self.ema.module, folder / "ema.safetensors")
            self.ema.n_averaged.fill_(state["averaged"])
        self.meter.load_state_dict(mine["meter"])
        set_random_state(mine["random"])
        self.progress.load(read_json(folder / "trainer.json"))
