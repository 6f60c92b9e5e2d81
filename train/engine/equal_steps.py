"""Several models in one script, each with as many optimizer steps as the others, however long a step of each takes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
from torch import nn

from train.engine.config import ConfigError, TrainingConfig
from train.engine.precision import synchronize
from train.engine.processes import process_state
from train.engine.run_folder import begun, read_json, write_json

WARMUP_SHARE = 0.1  # of a run, at most: the originals' warm-ups were longer than their runs
TIMED_STEPS = 3
SHARE_OF_TIME = 0.75  # what of --max_minutes is planned for steps; the rest goes to evaluations and tests

Config = TypeVar("Config", bound=TrainingConfig)
Models = Mapping[str, tuple[Callable[[], nn.Module], Any]]


def with_equal_steps(
    config: Config, models: Models, *, seeds: int, epoch: int, root: Path, cap_warmup: bool = True
) -> Config:
    """The config with the length and warm-up that all models share; a resumed run keeps what was planned at first.

    Args:
        models: by name, how each is built, and its task.
        epoch: dataset elements in one.
        root: the folder of all runs, whose length.json holds what was planned.
        cap_warmup: to a tenth of the run, saying so.

    Raises ConfigError where its limits now name another length.
    """
    state = process_state(config)
    if (length := planned(root, say=print if state.is_main_process else lambda line: None)) is not None:
        named = config.max_steps is not None or config.epochs is not None
        if named and (steps := common_length(config, models, seeds, epoch)) != length["max_steps"]:
            raise ConfigError(
                f"the models in {root} were begun with {length['max_steps']} steps each, not {steps}: give the same "
                "--max_steps or --epochs, or a new --run_dir"
            )
    else:
        steps = common_length(config, models, seeds, epoch)
        warmup = min(config.warmup_steps, int(WARMUP_SHARE * steps)) if cap_warmup else config.warmup_steps
        length = {"max_steps": steps, "warmup_steps": warmup}
    if state.is_main_process and not config.plan:
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / "length.json", length)
    if state.is_main_process and length["warmup_steps"] < config.warmup_steps:
        print(
            f"warm-up     {length['warmup_steps']} steps, a tenth of the run's {length['max_steps']}, in place of "
            f"{config.warmup_steps}"
        )
    return dataclasses.replace(config, epochs=None, max_steps=length["max_steps"], warmup_steps=length["warmup_steps"])


def planned(root: Path, say: Callable[[str], None]) -> dict[str, int] | None:
    """What was planned at first: as the runs below were begun, before whose checkpoints length.json may be damaged."""
    for file in sorted(root.glob("*/config.json")):
        if settings := begun(file.parent, file.name):
            return {name: settings[name] for name in ("max_steps", "warmup_steps")}
    file = root / "length.json"
    try:
        return read_json(file) if file.exists() else None
    except ConfigError as damaged:
        say(f"length      planned anew, for nothing was trained yet: {damaged}")
        return None


def common_length(config: TrainingConfig, models: Models, seeds: int, epoch: int) -> int:
    """Optimizer steps of every model: as the limits say, or as many as all of them can make within --max_minutes."""
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs is not None or config.max_minutes is None:
        return math.ceil((config.epochs or 1.0) * epoch / config.batch_size)
    state = process_state(config)
    if state.num_processes > 1:
        raise ConfigError("with several processes, say how long to train by --max_steps or --epochs")
    seconds = sum(step_seconds(build().to(state.device), task, config) for build, task in models.values())
    left = 60 * config.max_minutes - (time.time() - psutil.Process().create_time())
    return max(1, int(SHARE_OF_TIME * left / (seeds * seconds)))


def step_seconds(model: nn.Module, task: Any, config: TrainingConfig) -> float:
    """Of forward and backward over one batch, the least of a few."""
    device = next(model.parameters()).device
    items = [task.train[i % len(task.train)] for i in range(config.micro_batch_size or config.batch_size)]
    batch = {name: value.to(device) for name, value in task.collate(items).items()}
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        model(**batch)["loss"].backward()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times) * config.batch_size / len(items)


def cut_short(steps: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence for a table, where some runs of models by name made fewer steps than others: the clock ended them."""
    most = max(max(of) for of in steps.values())
    short = [f"{name} {', '.join(f'{n:,}' for n in of)}" for name, of in steps.items() if min(of) < most]
    if not short:
        return []
    return [f"Not at equal steps: --max_minutes ended some runs before their {most:,} ({'; '.join(short)}). Give more."]
