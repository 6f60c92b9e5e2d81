"""What a maze model costs, by formula, and configs of one kind that cost what a config of another does.

Two models can be given the same parameters or the same FLOPs, not both: PoH-HRM runs its layers R times. The original
compared by parameters, "within" 10 %, and gave its own model 2.8 times the FLOPs. `match` meets either within 1 %:

    baseline = MazeTransformerConfig(maze_size=12)
    match(PoHConfig(maze_size=12), parameters(baseline), parameters)            # as many parameters
    match(PoHConfig(maze_size=12), flops(baseline), flops)                      # as many FLOPs
    match(baseline, flops(PoHConfig(maze_size=12)), flops, free="num_layers")   # the deep baseline
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from models.maze_layers import MazeConfig
from models.maze_transformer import MazeTransformerConfig
from models.mlmu import MLMUConfig
from models.poh import LEGACY_POSITIONS, PoHConfig
from models.trm import TRMConfig

C = TypeVar("C", bound=MazeConfig)

TOLERANCE = 0.01
MAX_LAYERS = 256
LEGACY_SCALES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
LEGACY_LIMIT = 1.1


# ---- costs -----------------------------------------------------------------------------------------------------------


def parameters(config: MazeConfig) -> int:
    """Trainable parameters of the config's model."""
    d, cells, legacy = config.d_model, config.maze_size**2, config.legacy
    total = (2 if legacy else 16) * d + 4 * d + (cells * d if config.position == "table" else 0)
    if config.maze_enc:
        total += (1 if legacy else 4) * 9 * 16 + 16 + 16 * 9 * 32 + 32 + 512 * d + d
    total += config.num_layers * _layer_parameters(config)
    total += sum((d + 1) * config.num_classes(k + 1) for k in range(config.num_outputs))
    if not legacy:
        total += d  # the last norm
    if _refines(config):
        total += 1  # α
    if isinstance(config, PoHConfig):
        total += (d + 1) * config.halting + LEGACY_POSITIONS * d * legacy
    if isinstance(config, MLMUConfig):
        total += 2 * d + (cells - 1) * d  # known or not, and which step
    return total


def flops(config: MazeConfig) -> int:
    """FLOPs of one forward over one maze: two for each multiplication in matrix products, attention and convolutions.

    That scores a maze, but with MLM-U: there it is one pass over the cells and a way of `typical_steps`, which is what
    learning from a maze takes; to say a way takes a pass for each of its steps.
    """
    if isinstance(config, MLMUConfig):
        return _path_flops(config)
    d, heads, cells = config.d_model, config.num_heads, config.maze_size**2
    runs = _runs(config)
    total = runs * config.num_layers * cells * (8 * d * d + 4 * d * config.d_ff + 4 * cells * d)
    total += sum(2 * cells * d * config.num_classes(k + 1) for k in range(config.horizons))
    if config.legacy:
        total += 2 * cells * d  # its linear map of a cell
    if config.maze_enc:
        total += _encoder_flops(config)
    if isinstance(config, PoHConfig) and config.routing != "uniform":
        width, rows = d // 2, 1 if config.route_per == "maze" else cells
        slow_runs = runs if config.legacy else math.ceil(runs / config.T)
        each = d * width + 9 * width**2 + width**2 + width * heads
        total += 2 * config.num_layers * rows * (runs * each + slow_runs * 6 * width**2)
    if isinstance(config, PoHConfig) and config.halting:
        total += 2 * runs * cells * d
    return total


def typical_steps(config: MLMUConfig) -> int:
    """A quarter of the cells: the mean of shortest ways is 33 at perfect-12, and 56 at perfect-16."""
    return config.maze_size**2 // 4


def _path_flops(config: MLMUConfig) -> int:
    d, d_ff, cells, steps = config.d_model, config.d_ff, config.maze_size**2, typical_steps(config)
    of_cells = cells * (8 * d * d + 4 * d * d_ff + 4 * cells * d)
    of_path = 6 * d * d * (cells + steps) + steps * (2 * d * d + 4 * d * d_ff + 4 * (cells + steps) * d)
    total = (config.num_layers - 1) * of_cells + config.num_layers * of_path + 2 * steps * d * cells
    return total + (_encoder_flops(config) if config.maze_enc else 0)


def _encoder_flops(config: MazeConfig) -> int:
    return 2 * config.maze_size**2 * 9 * 16 * ((1 if config.legacy else 4) + 32) + 2 * 512 * config.d_model


def _runs(config: MazeConfig) -> int:
    """How often the layers are run through."""
    if isinstance(config, PoHConfig):
        return config.R
    if isinstance(config, TRMConfig):
        return config.H_cycles * (config.L_cycles + 1)
    return cast(MazeTransformerConfig, config).loops


def _refines(config: MazeConfig) -> bool:
    return isinstance(config, PoHConfig) or (isinstance(config, MazeTransformerConfig) and config.loops > 1)


def _layer_parameters(config: MazeConfig) -> int:
    d, d_ff, legacy = config.d_model, config.d_ff, config.legacy
    total = 4 * d * d + 2 * d * d_ff + (4 * d if legacy else 2 * d)  # LayerNorms have biases, RMSNorms none
    if legacy:
        total += 4 * d  # biases of attention
    if not isinstance(config, PoHConfig):
        return total + (d_ff + d if legacy else 0)
    total += config.num_heads
    return total + (_controller_parameters(config) if config.routing == "learned" else 0)


def _controller_parameters(config: PoHConfig) -> int:
    d, width, heads = config.d_model, config.d_model // 2, config.num_heads
    fast, slow = (3 * width * (inputs + width) + 6 * width for inputs in (2 * width, width))
    maps = (d + 1) * width + (width + 1) * heads + width**2
    return fast + slow + maps + 4 * width + (0 if config.legacy else 2 * width)


# ---- configs at equal cost -------------------------------------------------------------------------------------------


def match(template: C, target: int, cost: Callable[[MazeConfig], int], *, free: str = "d_model") -> C:
    """A config like `template` whose cost is within 1 % of `target`, depth or width as it is there.

    Args:
        cost: `parameters` or `flops`.
        free: "d_model", a multiple of 8 * num_heads, or "num_layers"; d_ff follows from it. Of those that meet the
            target it is the config whose ratio of d_ff to d_model comes nearest to the template's.

    Raises:
        ValueError: there is none.
    """
    unit = 8 * template.num_heads
    values: Iterable[int] = {
        "d_model": range(unit, 4 * template.d_model + unit, unit),
        "num_layers": range(1, MAX_LAYERS + 1),
    }[free]
    for step in (8, 1):  # of d_ff: multiples of 8 keep matrix units busy, but small models have no room for them
        found = [c for v in values if (c := _with_d_ff(template, {free: v}, target, cost, step)) is not None]
        if found:
            ratio = template.d_ff / template.d_model
            return min(found, key=lambda c: abs(math.log(c.d_ff / c.d_model / ratio)))
    raise ValueError(
        f"no {free} brings {type(template).__name__} within {TOLERANCE:.0%} of {target:,} {cost.__name__} with "
        f"{template.num_heads} heads of a multiple of 8 channels"
    )


def _with_d_ff(template: C, changes: dict[str, Any], target: int, cost: Callable, step: int) -> C | None:
    """The d_ff, a multiple of step, that comes nearest to the target, if near enough: cost is linear in d_ff."""
    least = dataclasses.replace(template, d_ff=step, **changes)
    base, slope = cost(least), cost(dataclasses.replace(least, d_ff=2 * step)) - cost(least)
    steps = 1 + round((target - base) / slope)
    if steps < 1:
        return None
    config = dataclasses.replace(least, d_ff=steps * step)
    return config if abs(cost(config) - target) <= TOLERANCE * target else None


def legacy_match(template: PoHConfig, baseline: MazeTransformerConfig, by: str) -> PoHConfig:
    """The original's choice: the first candidate of at most 1.1 times the baseline's parameters, else the nearest.

    Args:
        by: "scale" (its scaling script: width times 1.0, 0.95 … 0.7, at least 64) or "heads" (its 12 x 12 script: 6, 5
            or 4 heads of 64, no less than half as wide).
    """
    heads = template.num_heads
    if by == "scale":
        shapes = [(int(template.d_model * s) // heads * heads, heads, int(template.d_ff * s)) for s in LEGACY_SCALES]
        shapes = [shape for shape in shapes if shape[0] >= 64]
    else:
        shapes = [(64 * n, n, 256 * n) for n in (6, 5, 4) if 64 * n >= template.d_model / 2]
    candidates = [dataclasses.replace(template, d_model=d, num_heads=n, d_ff=f) for d, n, f in shapes]
    if not candidates:
        raise ValueError(f"every candidate is narrower than the original allowed at d_model {template.d_model}")
    aim = parameters(baseline)
    within = (c for c in candidates if parameters(c) <= LEGACY_LIMIT * aim)
    return next(within, min(candidates, key=lambda c: abs(parameters(c) - aim)))
