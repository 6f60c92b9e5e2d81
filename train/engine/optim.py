"""Optimizers by name, their parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from train.engine.config import TrainingConfig

OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "nadam", "radam", "rmsprop", "adamw8bit"]
TAKES_BETAS = ("adamw", "adam", "adamw8bit", "nadam", "radam")
ScheduleName = Literal["constant", "linear", "cosine", "cosine_restarts", "wsd"]

# A step d in a phase turns the state by T * d after T tokens, so recurrent eigenvalues learn more slowly, as in LRU
# (arXiv 2303.06349); recalling a token over 4096 others was learned at 0.1 (tests/models/test_ten_time.py).
FP32_LR_SCALE = 0.1
# Share of the run in which wsd (warm-up, stable, decay) decays (arXiv 2405.18392).
WSD_DECAY = 0.2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; vectors and what `model.fp32_parameters()` names don't, and the latter learn more slowly."""
    fp32 = set(getattr(model, "fp32_parameters", list)())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    split = {
        "decay": ([p for n, p in named if p.ndim >= 2 and n not in fp32], weight_decay, 1.0),
        "no_decay": ([p for n, p in named if p.ndim < 2 and n not in fp32], 0.0, 1.0),
        "fp32": ([p for n, p in named if n in fp32], 0.0, FP32_LR_SCALE),
    }
    return [
        {"name": name, "params": params, "weight_decay": decay, "lr_scale": scale}
        for name, (params, decay, scale) in split.items()
        if params
    ]


def _adamw8bit(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """AdamW whose state takes a byte per number, in blocks of their own scale (arXiv 2110.02861)."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or take --optimizer adamw"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "--optimizer adamw8bit needs a GPU; on a CPU take --optimizer adamw, or adafactor to save memory"
        )
    from bitsandbytes.optim import AdamW8bit  # here, because few have it

    return AdamW8bit(*args, **kwargs)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The named optimizer over `parameter_groups`, fused where torch has it for such parameters.

    Raises ValueError where adamw8bit is not to be had.
    """
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
        "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam,
        "rmsprop": torch.optim.RMSprop,
        "adamw8bit": _adamw8bit,
    }
    # beta2 0.95: the usual value for language models at small batches (arXiv 2005.14165, appendix B).
    betas = {"betas": (0.9, 0.95)}
    usual: dict[str, dict[str, Any]] = {"adamw": betas, "adamw8bit": betas, "sgd": {"momentum": 0.9, "nesterov": True}}
    extra = usual.get(config.optimizer, {}) if config.betas is None else {"betas": tuple(config.betas)}
    groups = parameter_groups(model, config.weight_decay)
    # Fused SGD has no rule for shards (torch 2.13: "_fused_sgd_ does not have a sharding strategy").
    on_shards = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    if config.optimizer in ("adamw", "adam") or (config.optimizer == "sgd" and not on_shards):
        extra = {**extra, "fused": True}
    return classes[config.optimizer](groups, lr=config.lr, **extra)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(config: TrainingConfig, step: int, total_steps: int | None, steps_per_epoch: float) -> float:
    """Learning rate of optimizer step `step` (from 0).

    `total_steps` may be None while step < max(1, warmup_steps): the warm-up is the same for every length of run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    since = step - config.warmup_steps
    length = max(1, total_steps - config.warmup_steps) if total_steps is not None else math.inf
    shape = _shape(config, since, length, steps_per_epoch)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * shape)


def _shape(config: TrainingConfig, since: int, length: float, steps_per_epoch: float) -> float:
    """1 at the peak, 0 at the floor, `since` steps after the warm-up in a run of `length`."""
    done = min(1.0, since / length)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1.0 - done
    if config.schedule == "cosine":
        return _half_cosine(done)
    if config.schedule == "wsd":
        return min(1.0, (1.0 - done) / WSD_DECAY)
    # cosine_restarts (arXiv 1608.03983); by epoch, the rate is held within one.
    elapsed = since if config.restart_unit == "step" else math.floor(since / steps_per_epoch)
    cycle = config.restart_every
    while elapsed >= cycle:
        elapsed -= cycle
        cycle *= config.restart_mult
    return _half_cosine(elapsed / cycle)


def _half_cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))
