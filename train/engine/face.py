"""The engine from Python and from notebooks, by the names that its users know. Each is a face on what the engine does.

trainer = Trainer(TEN, TENConfig(...), TrainingConfig(epochs=3, lr=1e-3), task_spec=TextTask())
trainer = Trainer(nn.Linear(4, 2), None, TrainingConfig(), TaskSpec(name="iris", loss="cross_entropy"))
results = trainer.train(train_data, val_data)           # the data are left out where the task brings its own
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from train.engine.checkpoint import load_weights
from train.engine.config import ConfigError, TrainingConfig, by_our_names
from train.engine.experiments import data_frame
from train.engine.metrics import Row, read_rows
from train.engine.optim import OptimizerName, ScheduleName, learning_rate, make_optimizer
from train.engine.run_folder import default_run_dir, weights_of
from train.engine.summary import Results
from train.engine.task_spec import TaskSpec, UniversalDataModule, WithLoss
from train.engine.trainer import Task
from train.engine.trainer import Trainer as TrainingLoop
from train.nearest import nearest

if TYPE_CHECKING:
    import pandas

PRESETS: dict[str, dict[str, Any]] = {
    "quick_prototype": {"max_steps": 200, "warmup_steps": 10, "wandb": "off"},
    "baseline": {"epochs": 10.0},
    "production": {"epochs": 30.0, "ema_decay": 0.999, "early_stopping_patience": 5, "bad_step": "rewind"},
}
FINAL_MODEL = "final_model.pt"
_BEGUN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that a run of this process has trained


@dataclass(frozen=True)
class TrainingConfigBuilder:
    """Settings, changed by name, as `learning_rate` too; every `with_` returns a new builder.

    TrainingConfigBuilder.from_config(config).with_optimizer("sgd", lr=0.1).with_scheduler("linear").build()
    """

    config: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_config(cls, config: TrainingConfig) -> TrainingConfigBuilder:
        return cls(config)

    @classmethod
    def preset(cls, name: str) -> TrainingConfigBuilder:
        """quick_prototype, baseline or production."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        return cls().with_training(**PRESETS[name])

    def with_training(self, **settings: Any) -> TrainingConfigBuilder:
        """Any settings. Raises ConfigError with the nearest name to one that is none."""
        return TrainingConfigBuilder(replace(self.config, **by_our_names(type(self.config), settings, "the call")))

    def with_optimizer(self, name: OptimizerName, **settings: Any) -> TrainingConfigBuilder:
        return self.with_training(optimizer=name, **settings)

    def with_scheduler(self, name: ScheduleName, **settings: Any) -> TrainingConfigBuilder:
        return self.with_training(schedule=name, **settings)

    def build(self) -> TrainingConfig:
        """Raises ConfigError with every value that cannot work."""
        self.config.validate()
        return self.config


class OptimizerFactory:
    create = staticmethod(make_optimizer)


class SchedulerFactory:
    @staticmethod
    def create(config: TrainingConfig, total_steps: int, steps_per_epoch: float = math.inf) -> Callable[[int], float]:
        """The learning rate as a function of the optimizer step, from 0, however many batches make one."""
        return partial(learning_rate, config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


class MetricsTracker:
    """The rows of a run folder as a table. steps_per_epoch: as the run's `order` says; else epochs are steps."""

    def __init__(self, run_dir: Path, steps_per_epoch: float = 1.0) -> None:
        self.rows, self.steps_per_epoch = read_rows(run_dir / "metrics.jsonl"), steps_per_epoch

    def get_summary(self) -> pandas.DataFrame:
        """A row for each logged step: step, epoch, and columns train/loss …, val/loss …, NaN where a step has none."""
        steps: dict[int, Row] = {}
        for row in self.rows:
            step = steps.setdefault(row["step"], {"step": row["step"], "epoch": row["step"] / self.steps_per_epoch})
            step |= {f"{row['split']}/{name}": v for name, v in row.items() if name not in ("step", "split")}
        return data_frame(list(steps.values()))

    def get_best_epoch(self, metric: str, mode: str) -> float | None:
        """Where the validation's `metric` was best, in epochs from 0; as with checkpoints, after step 0 and finite."""
        sign = 1 if mode == "min" else -1
        val = [row for row in self.rows if row["split"] == "val" and row["step"] > 0]
        finite = [(sign * row[metric], row["step"]) for row in val if math.isfinite(row.get(metric, math.nan))]
        return min(finite)[1] / self.steps_per_epoch if finite else None


@dataclass
class Trainer:
    """Trains `model` on what `task_spec` says: a TaskSpec, or a task that brings its data.

    model: a module; or what builds one from `config`, as its class does: then every `train` begins with fresh weights.
    hooks: as the engine's. training_config.run_dir: a new folder runs/NAME/TIME where it is None; a run that is there
    goes on, and one that is finished gives its results again.
    """

    model: nn.Module | Callable[[Any], nn.Module]
    config: Any
    training_config: TrainingConfig
    task_spec: TaskSpec | Task
    hooks: Sequence[Callable[[TrainingLoop, Row], None]] = ()

    def __post_init__(self) -> None:
        self.training_config.validate()

    def train(self, train_data: Sequence[Any] | None = None, val_data: Sequence[Any] | None = None) -> dict[str, Any]:
        """The same dict on every process: metrics_summary (DataFrame), best_epoch, final_loss (of the validation, or of
        training where it has none), final (all last scores), checkpoint_path (final_model.pt), training_time in
        seconds, run_name. final_model.pt has the weights of the last scores, averaged ones where there are, and so has
        a `model` that is a module. Exits with status 75 when a signal came, after saving.
        """
        data_frame([])  # without pandas there is no metrics_summary: now, not after hours
        config, task, wrapped = self.training_config, self.task_spec, lambda module: module
        name = getattr(task, "name", type(task).__name__)
        if isinstance(task, TaskSpec):
            wrapped = task.with_loss
            task = UniversalDataModule(task, train_data, val_data, config.micro_batch_size or config.batch_size)
        elif train_data is not None or val_data is not None:
            raise ConfigError(f"{name} brings its own data; call train() without any, or give a TaskSpec")
        run_dir, model = config.run_dir or default_run_dir(name), self.model
        whole = wrapped(model) if isinstance(model, nn.Module) else lambda _: wrapped(model(self.config))
        loop = TrainingLoop(whole, replace(config, run_dir=run_dir), task, self.hooks)
        loop.facts |= {"command": f"from Python: {name}", "model": repr(self.config)}
        if model in _BEGUN and not (run_dir / "checkpoints").exists():
            loop.book.say("weights     trained before: this run goes on from them; give a function for fresh ones")
        if isinstance(model, nn.Module):
            _BEGUN.add(model)
        done = loop.train()
        return loop.backend.on_main(lambda: _leave(loop, done))


def _leave(loop: TrainingLoop, done: Results) -> dict[str, Any]:
    """final_model.pt in the run folder, and what `train` returns."""
    run_dir, tracker = loop.run_dir, MetricsTracker(loop.run_dir, loop.order.steps_per_epoch)
    results = {
        "best_epoch": tracker.get_best_epoch(loop.task.monitor, loop.task.mode),
        "final_loss": done.final.get("loss", [row["loss"] for row in tracker.rows if "loss" in row][-1]),
        "final": done.final,
        "checkpoint_path": str(run_dir / FINAL_MODEL),
        "training_time": done.seconds,
        "run_name": "/".join(run_dir.absolute().parts[-2:]),
    }
    # Plain values only: the file loads with weights_only=True, which runs no code of whoever made it.
    content = {"training_config": loop.config.to_dict(), "results": {**results, "metrics_summary": tracker.rows}}
    torch.save({"model_state_dict": _last_weights(loop), **content}, run_dir / f".{FINAL_MODEL}")
    (run_dir / f".{FINAL_MODEL}").replace(run_dir / FINAL_MODEL)
    loop.book.conclude()  # once more, for the database to know the file
    return {**results, "metrics_summary": tracker.get_summary()}


def _last_weights(loop: TrainingLoop) -> dict[str, Tensor]:
    """Of the last checkpoint, which the last scores are of, by the names that they have in the caller's module."""
    file = weights_of(loop.run_dir / "checkpoints" / "last")
    prefix = "model." if isinstance(loop.inner, WithLoss) else ""
    if not loop.backend.sharded:  # else each process has a part of the caller's module, which stays as it is
        load_weights(loop.inner, file)
    state = load_file(file)
    with safe_open(file, "pt") as stored:  # of tensors that are shared it has one, and the others' names
        state |= {name: state[kept] for name, kept in (stored.metadata() or {}).items() if kept in state}
    return {name.removeprefix(prefix): value for name, value in state.items()}
