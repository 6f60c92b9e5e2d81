"""Settings that make a run fit this machine, found before anything large is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from train.engine.backend import Backend
from train.engine.config import ConfigError, TrainingConfig
from train.engine.order import micro_batches_per_step, order_of
from train.engine.plan import Cost, Plan, make_plan
from train.engine.run_folder import begun

Config = TypeVar("Config", bound=TrainingConfig)


def first_micro_batch(task: Any, config: TrainingConfig, world_size: int) -> tuple[dict[str, Any], int]:
    """The largest micro-batch of a process, collated from the first step's items, and how many there are in a step."""
    per_step = micro_batches_per_step(config, world_size)
    largest = -(-config.batch_size // world_size // per_step)
    items = order_of(task, config).items(0)[:largest]
    return task.collate([task.train[int(i)] for i in items]), per_step


def recompute_if_asked(model: nn.Module, config: TrainingConfig) -> None:
    """Turn on activation checkpointing. Raises ConfigError where the model has none."""
    if config.gradient_checkpointing:
        if not hasattr(model, "gradient_checkpointing"):
            raise ConfigError(f"{type(model).__name__} cannot recompute activations; drop --gradient_checkpointing")
        model.gradient_checkpointing = True  # type: ignore[assignment]


def fit(
    config: Config, build: Callable[[Config], nn.Module], task: Any, backend: Backend, say: Callable[..., None]
) -> tuple[Config, Plan]:
    """`config` changed as little as memory demands, and the plan of its run; says what was tried.

    The changes are those of `config.fittings()`, one upon the other. A run that is resumed keeps what it was fitted to
    at first. Raises ConfigError, with numbers, where nothing fits.
    """

    def plan_of(config: Config) -> Plan:
        with FakeTensorMode():
            model = build(config)
        recompute_if_asked(model, config)
        return make_plan(model, config, *first_micro_batch(task, config, backend.world_size), backend, known)

    def search() -> tuple[Config, Plan, list[str]]:
        candidate, tried = config, []
        made: list[dict[str, Any]] = []
        for changes in fittings:
            if changes.get("micro_batch_size") == 1 and config.batch_size == backend.world_size:
                continue  # it is that small already
            candidate = dataclasses.replace(candidate, **changes)
            plan = plan_of(candidate)
            tried.append(f"{_flags(fittings, config, candidate)}: {_verdict(plan)}")
            if plan.fits:
                plain = dataclasses.replace(config, **fittings[0])
                return *_undone(candidate, plan, plain, made[1:], plan_of, backend.world_size), tried
            made.append(changes)
        advice = "take a smaller model, shorter or fewer items, or a machine with more memory"
        raise ConfigError("\n  ".join([f"this run does not fit this machine; {advice}:", *tried]))

    known: dict[tuple, Cost] = {}
    fittings = _fittings(config, backend.sharded)
    fitted, plan, tried = backend.on_main(search)
    if len(tried) > 1:
        say("fitting     " + tried[0], *(" " * 12 + line for line in tried[1:]))
        say(f"            taken: {_flags(fittings, config, fitted)}")
    return fitted, plan


def _fittings(config: TrainingConfig, sharded: bool) -> list[dict[str, Any]]:
    """What to try; of a run that is resumed only what it came to, for another memory may be free today."""
    fittings = config.fittings(sharded)
    settings = begun(config.run_dir, "config.json")
    if not settings or config.resume != "auto":
        return fittings
    kept, *savers = fittings
    for changes in savers:  # one by one: of the changes on the way to what fitted, needless ones were undone
        changes = {name: settings.get(name) if name == "micro_batch_size" else value for name, value in changes.items()}
        if all(settings.get(name) == value for name, value in changes.items()):
            kept = {**kept, **changes}
    return [kept]


def _verdict(plan: Plan) -> str:
    return f"{'fits' if plan.fits else 'does not fit'}, {plan.memory_line()}"


def _flags(fittings: list[dict[str, Any]], config: TrainingConfig, changed: TrainingConfig) -> str:
    """What fitting made of `config`, as flags."""
    names = dict.fromkeys(name for changes in fittings[1:] for name in changes)
    values = {name: getattr(changed, name) for name in names if getattr(changed, name) != getattr(config, name)}
    values = {name: value for name, value in values.items() if value != fittings[0].get(name)}
    return " ".join(f"--{n}" if value is True else f"--{n} {value}" for n, value in values.items()) or "as given"


def _undone(
    candidate: Config,
    plan: Plan,
    plain: Config,
    made: list[dict[str, Any]],
    plan_of: Callable[[Config], Plan],
    world_size: int,
) -> tuple[Config, Plan]:
    """`candidate` without those of the earlier changes `made` to `plain` that the last one makes needless."""
    for changes in reversed(made):
        without = dataclasses.replace(candidate, **{name: getattr(plain, name) for name in changes})
        if (plan_without := plan_of(without)).fits:
            candidate, plan = without, plan_without
    # Where micro-batches had to shrink to 1, the largest power of two that fits, for speed.
    while (size := candidate.micro_batch_size) is not None and size != plain.micro_batch_size:
        wider = dataclasses.replace(candidate, micro_batch_size=2 * size)
        if 2 * size * world_size >= plain.batch_size or not (wider_plan := plan_of(wider)).fits:
            break
        candidate, plan = wider, wider_plan
    return candidate, plan
