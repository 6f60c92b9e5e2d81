"""The engine from Python and from notebooks, by the names that its users know. Each is a face on what the engine does.

trainer = Trainer(TEN, TENConfig(...), TrainingConfig(epochs=3, lr=1e-3), task_spec=TextTask())
trainer = Trainer(nn.Linear(4, 2), None, TrainingConfig(), TaskSpec(name="iris", loss="cross_entropy"))
results = trainer.train(train_data, val_data)           # the data are left out where the task brings its own
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train.engine.checkpoint import load_weights
from train.engine.config import ALIASES, ConfigError, TrainingConfig, nearest
from train.engine.experiments import ExperimentDB, data_frame
from train.engine.metrics import Row, read_rows
from train.engine.optim import OptimizerName, ScheduleName, learning_rate, make_optimizer
from train.engine.record import database_of
from train.engine.run_folder import default_run_dir
from train.engine.summary import Results
from train.engine.task_spec import TaskSpec, UniversalDataModule, WithLoss, plain_module
from train.engine.trainer import Task
from train.engine.trainer import Trainer as TrainingLoop

if TYPE_CHECKING:
    import pandas

__all__ = [
    "MetricsTracker",
    "OptimizerFactory",
    "SchedulerFactory",
    "TaskSpec",
    "Trainer",
    "TrainingConfig",
    "TrainingConfigBuilder",
    "TrainingLoop",
    "UniversalDataModule",
]

PRESETS: dict[str, dict[str, Any]] = {
    "quick_prototype": {"max_steps": 200, "warmup_steps": 10, "wandb": "off"},
    "baseline": {"epochs": 10.0},
    "production": {"epochs": 30.0, "ema_decay": 0.999, "early_stopping_patience": 5, "bad_step": "rewind"},
}
FINAL_MODEL = "final_model.pt"
_BEGUN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that a run of this process has trained


class TrainingConfigBuilder:
    """Settings, changed by name, as `learning_rate` too; every `with_` returns a new builder.

    TrainingConfigBuilder.from_config(config).with_optimizer("sgd", lr=0.1).with_scheduler("linear").build()
    """

    def __init__(self, config: TrainingConfig | None = None) -> None:
        self.config = config if config is not None else TrainingConfig()

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
        known = [f.name for f in dataclasses.fields(self.config)]
        settings = {ALIASES.get(name, name): value for name, value in settings.items()}
        if unknown := [f"{name}{nearest(name, known)}" for name in settings if name not in known]:
            raise ConfigError(f"no such setting: {', '.join(unknown)}")
        return TrainingConfigBuilder(dataclasses.replace(self.config, **settings))

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
        scores = [
            (row[metric] if mode == "min" else -row[metric], row["step"])
            for row in self.rows
            if row["split"] == "val" and row["step"] > 0 and math.isfinite(row.get(metric, math.nan))
        ]
        return min(scores)[1] / self.steps_per_epoch if scores else None


class _Weights:
    """A hook: what the last scores are of, taken at the end, when every process still has its part of the model."""

    def __init__(self, loop: TrainingLoop) -> None:
        self.loop = loop
        self.state: dict[str, torch.Tensor] | None = None

    def __call__(self, trainer: TrainingLoop, row: Row) -> None:
        """Nothing is kept before the end."""

    def finish(self) -> None:
        if (model := self.loop.predict.whole()) is not None:
            state = plain_module(model).state_dict()
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


class Trainer:
    """Trains `model` on what `task_spec` says: a TaskSpec, or a task that brings its data.

    model: a module; or what builds one from `config`, as its class does: then every `train` begins with fresh weights.
    hooks: as the engine's. training_config.run_dir: a new folder runs/NAME/TIME where it is None; a run that is there
    goes on, and one that is finished gives its results again.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Any], nn.Module],
        config: Any,
        training_config: TrainingConfig,
        task_spec: TaskSpec | Task,
        hooks: Sequence[Callable[[TrainingLoop, Row], None]] = (),
    ) -> None:
        training_config.validate()
        self.model, self.config, self.training_config = model, config, training_config
        self.task_spec, self.hooks = task_spec, hooks

    def train(self, train_data: Sequence[Any] | None = None, val_data: Sequence[Any] | None = None) -> dict[str, Any]:
        """The same dict on every process: metrics_summary (DataFrame), best_epoch, final_loss (of the validation, or of
        training where it has none), final (all last scores), checkpoint_path (final_model.pt), training_time in
        seconds, run_name. Exits with status 75 when a signal came, after saving.
        """
        data_frame([])  # without pandas there is no metrics_summary: now, not after hours
        task = self._task(train_data, val_data)
        run_dir = Path(self.training_config.run_dir or _new_folder(self._name))
        loop = TrainingLoop(self._for_the_loop(), dataclasses.replace(self.training_config, run_dir=run_dir), task)
        weights = _Weights(loop)
        loop.hooks = [*self.hooks, weights]
        loop.facts |= {"command": f"from Python: {self._name}", "model": repr(self.config)}
        if isinstance(self.model, nn.Module):
            if self.model in _BEGUN and not any((run_dir / "checkpoints").glob("step-*")):
                loop.book.say("weights     trained before: this run goes on from them; give a function for fresh ones")
            _BEGUN.add(self.model)
        with _backend_kept():
            done = loop.train()
        return loop.backend.on_main(lambda: _leave(loop, task, done, weights.state))

    @property
    def _name(self) -> str:
        return getattr(self.task_spec, "name", type(self.task_spec).__name__)

    def _task(self, train_data: Sequence[Any] | None, val_data: Sequence[Any] | None) -> Task:
        if isinstance(self.task_spec, TaskSpec):
            config = self.training_config
            return UniversalDataModule(
                self.task_spec, train_data, val_data, config.micro_batch_size or config.batch_size
            )
        if train_data is not None or val_data is not None:
            raise ConfigError(f"{self._name} brings its own data; call train() without any, or give a TaskSpec")
        return self.task_spec

    def _for_the_loop(self) -> nn.Module | Callable[[Any], nn.Module]:
        model, spec = self.model, self.task_spec

        def whole(module: nn.Module) -> nn.Module:
            return WithLoss(module, spec) if isinstance(spec, TaskSpec) and spec.loss != "model" else module

        return whole(model) if isinstance(model, nn.Module) else lambda _: whole(model(self.config))


def _leave(loop: TrainingLoop, task: Task, done: Results, state: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """final_model.pt in the run folder, and what `train` returns. state: None where the run was finished before."""
    run_dir, tracker = loop.run_dir, MetricsTracker(loop.run_dir, loop.order.steps_per_epoch)
    results = {
        "best_epoch": tracker.get_best_epoch(task.monitor, task.mode),
        "final_loss": done.final.get("loss", [r["loss"] for r in tracker.rows if "loss" in r][-1]),
        "final": done.final,
        "checkpoint_path": str(run_dir / FINAL_MODEL),
        "training_time": done.seconds,
        "run_name": f"{run_dir.parent.name}/{run_dir.name}",
    }
    if state is None:
        last = run_dir / "checkpoints" / "last"
        averaged = last / "ema.safetensors"
        load_weights(loop.inner, averaged if averaged.exists() else last / "model.safetensors")
        state = plain_module(loop.inner).state_dict()
    # Plain values only: the file loads with weights_only=True, which runs no code of whoever made it.
    content = {"training_config": loop.config.to_dict(), "results": {**results, "metrics_summary": tracker.rows}}
    torch.save({"model_state_dict": state, **content}, run_dir / f".{FINAL_MODEL}")
    (run_dir / f".{FINAL_MODEL}").replace(run_dir / FINAL_MODEL)
    if (database := database_of(run_dir, loop.config.db)) is not None:
        try:
            with ExperimentDB(database) as db:
                db.log_artifact(db.get_run(run_dir)["run_id"], "model", FINAL_MODEL)
        except ConfigError as error:  # the run is done, and its folder has the file
            loop.book.say(f"database    {error}")
    return {**results, "metrics_summary": tracker.get_summary()}


@contextmanager
def _backend_kept() -> Iterator[None]:
    """The engine draws into files, for which it takes Agg; a notebook's own plots must show after it as before."""
    import matplotlib.pyplot as plt  # here, because it takes half a second

    before = plt.get_backend()
    plt.switch_backend(before)  # loaded only after Agg, a notebook's does not learn that cells show their figures
    try:
        yield
    finally:
        plt.switch_backend(before)


def _new_folder(name: str) -> Path:
    """runs/NAME/TIME: runs of the same second are numbered."""
    first = Path("runs") / name / default_run_dir().name
    names = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in count(1))
    return next(folder for folder in names if not folder.exists())
