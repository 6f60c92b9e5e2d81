"""A W&B sweep file: its parameters as things to draw from, and its command as the words of a process.

The format is W&B's sweep configuration, so that one file serves `wandb agent` and train/sweep.py. Nothing here needs
torch: a worker reads the file in a fraction of a second.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from train.nearest import nearest

if TYPE_CHECKING:
    import optuna

Flags = dict[str, Any]

KEYS = (
    "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "description",
    "project", "entity",
)  # fmt: skip
COMMAND = ["${env}", "accelerate", "launch", "${program}", "${args_no_boolean_flags}"]
BACKENDS = {"grid": "grid", "random": "random", "bayes": "optuna"}  # what W&B calls them, and what we do
GOALS = ("minimize", "maximize")
HYPERBAND = {"type", "min_iter", "max_iter", "s", "eta", "strict"}
MOST = 2**53  # of a number in a file: beyond it float64 skips whole numbers
MOST_POINTS = 1_000_000  # of an axis of a grid, which is held in memory
# Of a distribution that has no ends: what a normal number exceeds once in half a billion draws.
SIGMAS = 6.0
# The keys that each distribution needs and those that it may have, by the name that W&B gives it without its q_.
RANGES = {
    "uniform", "int_uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values",
}  # fmt: skip
NEEDS = {name: ("min", "max") for name in RANGES}
NEEDS |= {"constant": ("value",), "categorical": ("values",), "beta": ("a", "b")}
NEEDS |= {"normal": ("mu", "sigma"), "log_normal": ("mu", "sigma")}
QUANTIZED = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
DISTRIBUTIONS = (*NEEDS, *(f"q_{name}" for name in QUANTIZED))


@dataclass(frozen=True)
class Parameter:
    """One flag. Numbers lie in [low, high]; `shape` is what their logarithm, if `log`, or they themselves follow."""

    name: str
    choices: tuple[Any, ...] = ()
    weights: tuple[float, ...] | None = None
    shape: str = "uniform"  # or normal (mu, sigma), beta (a, b)
    shape_of: tuple[float, float] = (0.0, 1.0)
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    q: float | None = None  # results are rounded to multiples of it

    @property
    def fixed(self) -> bool:
        return len(self.choices) == 1

    def draw(self, rng: random.Random) -> Any:
        """A value, not yet `rounded`."""
        if self.choices:
            return rng.choices(self.choices, self.weights)[0]
        if self.integer:
            return rng.randint(int(self.low), int(self.high))
        if self.shape == "beta":
            return rng.betavariate(*self.shape_of)
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        x = rng.uniform(*ends) if self.shape == "uniform" else rng.gauss(*self.shape_of)
        return min(max(math.exp(x) if self.log else x, self.low), self.high)

    def grid(self) -> list[Any]:
        """Every value there is. Raises ValueError where they cannot be counted."""
        if self.choices:
            return list(self.choices)
        step = 1 if self.integer else self.q
        endless = step is None or self.shape != "uniform" or self.log
        if endless or not (self.high - self.low) / step < MOST_POINTS:
            raise ValueError(
                f"{self.name} has no end of values, and a grid needs a list: give it `values`, or take --backend random"
            )
        return [number * step for number in range(round(self.low / step), round(self.high / step) + 1)]

    def suggest(self, trial: optuna.Trial) -> Any:
        """The study's value for a trial, not yet `rounded`; the queue's where it has one."""
        if self.fixed:
            return self.choices[0]
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.integer:
            return trial.suggest_int(self.name, int(self.low), int(self.high))
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def rounded(self, value: Any) -> Any:
        """round(value / q) q, as W&B has it, and a whole number where q is one."""
        if self.q is None:
            return value
        steps = round(value / self.q)
        return steps * self.q if isinstance(self.q, int) else float(f"{steps * self.q:.12g}")


def parameter(name: str, spec: Any) -> Parameter:
    """From an entry of `parameters`. Raises ValueError with what is wrong with it."""
    keys = ("distribution", "value", "values", "probabilities", "min", "max", "mu", "sigma", "a", "b", "q")
    if not isinstance(spec, dict):
        raise ValueError(f"parameters.{name} must be a mapping, as {{value: {spec}}}")
    if "parameters" in spec:
        raise ValueError(f"parameters.{name} is nested, and a flag is not: give each its own name")
    for key in spec:
        if key not in keys:
            raise ValueError(f"parameters.{name} has an unknown key {key}{nearest(key, keys)}")
    kind = spec.get("distribution") or _kind_of(name, spec)
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"parameters.{name} has an unknown distribution {kind}{nearest(kind, DISTRIBUTIONS)}")
    base = kind.removeprefix("q_")
    if missing := [key for key in NEEDS[base] if key not in spec]:
        raise ValueError(f"parameters.{name} is {kind}, which needs {' and '.join(NEEDS[base])}; add {missing[0]}")
    if base in ("constant", "categorical"):
        return _choice(name, spec)
    numbers = [_number(name, key, spec[key]) for key in NEEDS[base]]
    q = _number(name, "q", spec.get("q", 1)) if kind.startswith("q_") else None
    if q is not None and not q > 0:
        raise ValueError(f"parameters.{name}: q must be more than 0, not {q}")
    return Parameter(name, q=q, **_shape(name, base, *numbers))


def _kind_of(name: str, spec: dict[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    if {"min", "max"} <= spec.keys():
        whole = all(isinstance(_number(name, key, spec[key]), int) for key in ("min", "max"))
        return "int_uniform" if whole else "uniform"
    raise ValueError(f"parameters.{name} says nothing to draw from; give value, values, or min and max")


def _choice(name: str, spec: dict[str, Any]) -> Parameter:
    values = [spec["value"]] if "value" in spec else spec["values"]
    if not isinstance(values, list) or not values:
        raise ValueError(f"parameters.{name}: values must be a list, as [{values}]")
    for value in values:
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f"parameters.{name}: {value!r} is no value of one flag; give a number, a text or a boolean"
            )
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"parameters.{name}: values names one twice: {values}")
    weights = spec.get("probabilities")
    if weights is not None and not _is_distribution(weights, len(values)):
        raise ValueError(f"parameters.{name}: probabilities must be {len(values)} numbers that sum to 1, not {weights}")
    return Parameter(name, choices=tuple(values), weights=None if weights is None else tuple(weights))


def _is_distribution(weights: Any, count: int) -> bool:
    if not isinstance(weights, list) or len(weights) != count:
        return False
    numbers = [w for w in weights if isinstance(w, (int, float)) and w >= 0]
    return len(numbers) == count and math.isclose(sum(numbers), 1, abs_tol=1e-6)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_early(early: Any) -> None:
    """Raises ValueError where `early_terminate` is not W&B's hyperband."""
    if not isinstance(early, dict):
        raise ValueError("early_terminate must be a mapping, as {type: hyperband, min_iter: 3}")
    if unknown := [key for key in early if key not in HYPERBAND]:
        raise ValueError(f"early_terminate has an unknown key {unknown[0]}{nearest(unknown[0], HYPERBAND)}")
    if early and (early.get("type") != "hyperband" or not {"min_iter", "max_iter"} & early.keys()):
        raise ValueError("early_terminate needs type: hyperband, and min_iter or max_iter")
    for key, least in (("min_iter", 1), ("max_iter", 1), ("s", 1), ("eta", 2)):
        if key in early and not (_is_count(early[key]) and early[key] >= least):
            raise ValueError(f"early_terminate: {key} must be a whole number of at least {least}, not {early[key]}")


def _number(name: str, key: str, value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
        mantissa, exponent = re.split("[eE]", value)
        raise ValueError(f"parameters.{name}: YAML reads {value} as text; write {key}: {mantissa}.0e{int(exponent):+d}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST:
        raise ValueError(f"parameters.{name}: {key} must be a number within {MOST:.0e} of 0, not {value!r}")
    return value


def _shape(name: str, base: str, a: float, b: float) -> dict[str, Any]:
    """Fields of the Parameter that W&B's distribution `base` is with its two numbers."""
    if base == "beta":
        if not (a > 0 and b > 0):
            raise ValueError(f"parameters.{name}: a and b of a beta distribution must be more than 0, not {a} and {b}")
        return {"shape": "beta", "shape_of": (a, b)}
    if base.endswith("normal"):
        if not b > 0:
            raise ValueError(f"parameters.{name}: sigma must be more than 0, not {b}")
        ends, log = (a - SIGMAS * b, a + SIGMAS * b), base == "log_normal"
        low, high = map(math.exp, ends) if log else ends
        return {"shape": "normal", "shape_of": (a, b), "low": low, "high": high, "log": log}
    if not a < b:
        raise ValueError(f"parameters.{name}: min must be less than max, and {a} is not less than {b}")
    log = "log" in base
    if base == "log_uniform":  # its ends are exponents
        a, b = math.exp(a), math.exp(b)
    elif base == "inv_log_uniform":  # log(1 / x) is uniform between them
        a, b = math.exp(-b), math.exp(-a)
    if log and not a > 0:
        raise ValueError(f"parameters.{name}: {base} needs a min of more than 0, not {a}")
    if base == "int_uniform" and not (isinstance(a, int) and isinstance(b, int)):
        raise ValueError(f"parameters.{name}: int_uniform needs whole numbers, not {a} and {b}")
    return {"low": a, "high": b, "log": log, "integer": base == "int_uniform"}


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked. `spec` is what it says, as JSON types; the file may then change or go."""

    spec: dict[str, Any]
    parameters: tuple[Parameter, ...]

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Raises ValueError with the first thing that is wrong with the file."""
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except RecursionError:
            raise ValueError(f"{path} is not YAML: its brackets lie too deep in each other") from None
        except (yaml.YAMLError, ValueError) as error:  # no YAML, no UTF-8, no such day, or a number without end
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(spec, dict):
            raise ValueError(f"{path} must hold a sweep: program, method, metric and parameters")
        try:
            return cls.of(spec)
        except (ValueError, OverflowError) as error:  # the latter is how math says that an end is beyond float64
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Sweep:
        for key in spec:
            if key not in KEYS:
                raise ValueError(f"unknown key {key}{nearest(key, KEYS)}")
        for key in ("program", "metric", "parameters"):
            if not spec.get(key):
                raise ValueError(f"{key} is missing")
        if not isinstance(spec["program"], str) or not isinstance(spec.get("command", []), list):
            raise ValueError("program must be the path of a script, and command a list of words")
        metric = spec["metric"]
        if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
            raise ValueError("metric needs a name, as {name: val/loss, goal: minimize}")
        if "/" not in metric["name"]:
            raise ValueError(f"metric.name must say of which rows, as val/{metric['name']}")
        if metric.get("goal", "minimize") not in GOALS:
            raise ValueError(f"metric.goal must be minimize or maximize, not {metric['goal']}")
        if spec.get("method", "random") not in tuple(BACKENDS):
            raise ValueError(f"unknown method {spec['method']}{nearest(spec['method'], BACKENDS)}")
        _check_early(spec.get("early_terminate") or {})
        if not _is_count(spec.get("run_cap", 1)):
            raise ValueError(f"run_cap must be a number of trials, at least 1, not {spec['run_cap']}")
        for word in _words(spec):
            if (macro := re.fullmatch(r"\$\{(\w+)\}", word)) and macro[1] not in (macros := _macros("", {}, Path())):
                raise ValueError(f"command has an unknown macro {word}{nearest(macro[1], macros)}")
        if not isinstance(spec["parameters"], dict):
            raise ValueError("parameters must map names of flags to what they are drawn from")
        parameters = tuple(parameter(name, entry) for name, entry in spec["parameters"].items())
        try:
            return cls(json.loads(json.dumps(spec)), parameters)
        except TypeError as error:  # YAML has days and bytes too
            raise ValueError(f"it holds a value that is neither number nor text: {error}") from error

    @property
    def metric(self) -> str:
        return self.spec["metric"]["name"]

    @property
    def maximize(self) -> bool:
        return self.spec["metric"].get("goal") == "maximize"

    @property
    def backend(self) -> str:
        return BACKENDS[self.spec.get("method", "random")]

    @property
    def searched(self) -> list[Parameter]:
        return [p for p in self.parameters if not p.fixed]

    def first_rung(self) -> tuple[int, int] | None:
        """(evaluations before a trial may be ended, by what the next chance is later), as W&B's hyperband has them."""
        early = self.spec.get("early_terminate")
        if not early:
            return None
        eta = int(early.get("eta", 3))
        least = early.get("min_iter") or early["max_iter"] / eta ** early.get("s", 1)
        return max(1, int(least)), eta

    def grid_size(self) -> int:
        return math.prod(len(p.grid()) for p in self.parameters)

    def points(self, backend: str, count: int, seed: int) -> list[Flags]:
        """What the queue holds, not yet `rounded`; nothing where the study decides. More points begin with the same."""
        if backend == "random":
            rngs = (random.Random(f"{seed}/{number}") for number in range(count))
            return [{p.name: p.draw(rng) for p in self.parameters} for rng in rngs]
        if backend == "optuna":
            return [{} for _ in range(count)]
        axes, points = {p.name: p.grid() for p in self.parameters}, []
        for index in distinct(self.grid_size(), count, seed):
            point = {}
            for name, values in axes.items():
                index, place = divmod(index, len(values))
                point[name] = values[place]
            points.append(point)
        return points

    def command(self, flags: Flags, json_file: Path) -> list[str]:
        """The words that `wandb agent` would run for these flags."""
        macros, words = _macros(self.spec["program"], flags, json_file), []
        for word in _words(self.spec):
            words += macros.get(word[2:-1], [word]) if word.startswith("${") and word.endswith("}") else [word]
        if "${args_json_file}" in _words(self.spec):
            json_file.write_text(json.dumps(flags), encoding="utf-8")
        return words


def distinct(total: int, count: int, seed: int) -> list[int]:
    """`count` different numbers below `total`, a longer list begins with a shorter one."""
    rng, seen = random.Random(seed), {}
    while len(seen) < min(count, total):
        seen[rng.randrange(total)] = None
    return list(seen)


def _words(spec: dict[str, Any]) -> list[str]:
    """The command with the environment's variables filled in, each left as its name where it isn't set."""
    command = [str(word) for word in spec.get("command") or COMMAND]
    return [re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda m: os.environ.get(m[1], m[1]), word) for word in command]


def _macros(program: str, flags: Flags, json_file: Path) -> dict[str, list[str]]:
    booleans = {name: value for name, value in flags.items() if isinstance(value, bool)}
    return {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [program],
        "args": [f"--{name}={value}" for name, value in flags.items()],
        "args_no_equals": [word for name, value in flags.items() for word in (f"--{name}", str(value))],
        "args_no_hyphens": [f"{name}={value}" for name, value in flags.items()],
        "args_no_boolean_flags": [
            f"--{name}" if name in booleans else f"--{name}={value}"
            for name, value in flags.items()
            if booleans.get(name, True)
        ],
        "args_json": [json.dumps(flags)],
        "args_json_file": [str(json_file)],
    }
