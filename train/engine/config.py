"""Every flag that all scripts share, and how a command line becomes a checked, frozen dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from train.engine.optim import TAKES_BETAS, OptimizerName, ScheduleName
from train.nearest import nearest

# The originals' names, each with ours. `--no_compile` needs no entry: it is the negative of `--compile`.
ALIASES = {
    "learning_rate": "lr",
    "output_dir": "run_dir",
    "output": "run_dir",
    "save_steps": "save_every",
    "max_seq_len": "seq_len",
}
# What a resumed run may change: where it stops, what it shows, and what the machine needs. None of it moves a weight.
LIMITS = {"max_steps", "max_minutes", "epochs", "max_cost", "hourly_rate", "early_stopping_patience"}
MOST = 2**53  # of any number: beyond it float64, and with it JSON's readers, skip whole numbers
MOST_WORKERS = 1024  # a slip of the finger should not start a process for every item,
MOST_ITEMS = 2**24  # nor draw a step's items until the memory is full
FREE_ON_RESUME = LIMITS | {"num_workers", "cpu", "wandb", "tensorboard", "db"}


class ConfigError(ValueError):
    """The user's settings, files or limits don't work; the message says what would."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the engine; a script's own config inherits them."""

    # Fields that say where and what to do now rather than how to train; no config.json holds them.
    actions: ClassVar[frozenset[str]] = frozenset({"run_dir", "resume", "settings", "print_config", "plan"})

    # Run folder; a new time-stamped one under runs/<script>/ when not given.
    run_dir: Path | None = None
    # auto: go on in --run_dir where it stopped; never: refuse a used folder; PATH: start from that run's checkpoint.
    resume: str = "auto"
    seed: int = 0
    # Shrink model and data until a step takes milliseconds on a CPU; everything else stays the same.
    tiny: bool = False

    # Limits: the first one reached ends the run. With none given, one epoch.
    max_steps: int | None = None
    # Counted from the start of the process; the schedule is laid out to end when the time does.
    max_minutes: float | None = None
    epochs: float | None = None
    # Money over all resumed parts of the run; needs --hourly_rate.
    max_cost: float | None = None
    hourly_rate: float | None = None
    # Stop after this many evaluations without a better score.
    early_stopping_patience: int | None = None

    # Items (dataset elements) per optimizer step, over all processes.
    batch_size: int = 32
    # Items per forward pass and process; the whole share of a process when not given.
    micro_batch_size: int | None = None
    # Forward passes per optimizer step: another way to say --micro_batch_size.
    gradient_accumulation: int | None = None
    optimizer: OptimizerName = "adamw"
    # Of Adam and its kin; 0.9 0.95 for adamw and torch's own for the others when not given.
    betas: tuple[float, float] | None = None
    lr: float = 3e-4
    weight_decay: float = 0.1
    # Largest norm of the gradient; 0 leaves gradients as they are.
    grad_clip: float = 1.0
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 20
    # Where linear, cosine and wsd end, as a share of --lr.
    final_lr_ratio: float = 0.1
    # Length of the first cycle of cosine_restarts, and by what each next one is longer.
    restart_every: int = 10
    restart_unit: Literal["epoch", "step"] = "epoch"
    restart_mult: int = 1
    # Decay of the averaged weights that evaluation and sampling then use; 0 keeps none.
    ema_decay: float = 0.0
    # What to do with a step whose loss or gradient is not finite, or whose loss leaps.
    bad_step: Literal["skip", "rewind", "stop"] = "skip"

    # Steps between rows, evaluations and checkpoints; derived from the length of the run when not given.
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    num_workers: int = 0
    cpu: bool = False

    # auto: online where credentials or a sweep are present, else offline.
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    tensorboard: bool = False
    # The experiment database. auto: experiments.db in the topmost folder called runs above the run's, or beside it;
    # off: none; or its path.
    db: str = "auto"

    # YAML, or an earlier run's config.json; flags win over it.
    settings: Path | None = None
    # Print the resolved settings as YAML and exit.
    print_config: bool = False
    # Print parameters, FLOPs and memory against this machine; exit 0 if it fits, 1 if not.
    plan: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.run_dir, str):  # as it is written in Python, where no parser makes it a path
            object.__setattr__(self, "run_dir", Path(self.run_dir))

    def problems(self) -> list[str]:
        """One sentence for each value that cannot work."""
        at_least_one: tuple[str, ...] = (
            "batch_size",
            "micro_batch_size",
            "gradient_accumulation",
            "max_steps",
            "early_stopping_patience",
        )
        at_least_one += ("log_every", "eval_every", "save_every", "restart_every", "restart_mult")
        found = [
            f"--{name} must be at least 1, not {getattr(self, name)}"
            for name in at_least_one
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        found += [
            f"--{name} must be more than 0, not {getattr(self, name)}"
            for name in ("lr", "max_minutes", "epochs", "max_cost", "hourly_rate")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        found += [
            f"--{name} must not be negative, not {getattr(self, name)}"
            for name in ("weight_decay", "grad_clip", "warmup_steps", "num_workers", "seed")
            if not getattr(self, name) >= 0
        ]
        if self.num_workers > MOST_WORKERS:
            found.append(f"--num_workers must be at most {MOST_WORKERS}, not {self.num_workers}")
        if (self.batch_size or 0) > MOST_ITEMS:
            found.append(f"--batch_size must be at most {MOST_ITEMS}, not {self.batch_size}")
        if self.betas is not None and self.optimizer not in TAKES_BETAS:
            found.append(f"--betas say nothing to --optimizer {self.optimizer}; they are for {', '.join(TAKES_BETAS)}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"--betas must both lie in [0, 1), not {self.betas[0]} {self.betas[1]}")
        if not 0 <= self.ema_decay < 1:
            found.append(f"--ema_decay must be in [0, 1), not {self.ema_decay}")
        if not 0 <= self.final_lr_ratio <= 1:
            found.append(f"--final_lr_ratio must be in [0, 1], not {self.final_lr_ratio}")
        if self.max_cost is not None and self.hourly_rate is None:
            found.append("--max_cost needs --hourly_rate, the price of this machine per hour")
        if self.micro_batch_size is not None and self.gradient_accumulation is not None:
            found.append("--micro_batch_size and --gradient_accumulation say the same thing twice; give one of them")
        if self.resume not in ("auto", "never") and not Path(self.resume).exists():
            found.append(f"--resume must be auto, never or the path of a run; {self.resume} does not exist")
        return found

    def fittings(self, sharded: bool) -> list[dict[str, Any]]:
        """Changes that may be tried, one upon the other, until a run fits the machine; the first is none to speak of.

        Only what the user left open may change. These two cost time and move no result. sharded: under FSDP2 or ZeRO,
        which take fp32 weights and elementwise optimizers only.
        """
        changes: list[dict[str, Any]] = [{}]
        if self.micro_batch_size is None and self.gradient_accumulation is None:
            changes.append({"micro_batch_size": 1})
        if not self.gradient_checkpointing:
            changes.append({"gradient_checkpointing": True})
        return changes

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, without `actions`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.actions}
        return {name: plain(value) for name, value in values.items()}

    def validate(self) -> None:
        """Raises ConfigError with every bad value in one message. Choices too, which tyro would see to."""
        found = [
            f"--{name} must be one of {', '.join(choices)}, not {getattr(self, name)}"
            for name, choices in _choices(type(self)).items()
            if getattr(self, name) not in choices
        ]
        if found := [*found, *_unusable(self)] or self.problems():
            raise ConfigError("these settings cannot work:\n" + "\n".join(f"  - {p}" for p in found))

    def diff(self, other: TrainingConfig) -> dict[str, tuple[Any, Any]]:
        """Settings in which two configs differ: name -> (of this one, of the other)."""
        return differences(self.to_dict(), other.to_dict())


Config = TypeVar("Config", bound=TrainingConfig)


def _choices(config_class: type[TrainingConfig]) -> dict[str, tuple[Any, ...]]:
    """The fields that have one of a few values."""
    hints = get_type_hints(config_class)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _unusable(config: TrainingConfig) -> Iterator[str]:
    """A sentence for each number without measure, and each text that no file of ours can hold."""
    for field in dataclasses.fields(config):
        of = getattr(config, field.name)
        for value in of if isinstance(of, tuple) else (of,):
            if isinstance(value, (int, float)) and not abs(value) <= MOST:
                yield f"--{field.name} must be a number of at most {MOST:.0e}, not {value:.4g}"
            elif isinstance(value, (str, Path)) and not _is_text(str(value)):
                yield f"--{field.name} must be text in UTF-8 without a zero byte, not {str(value)!a}"


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:  # the system's way to pass on bytes that are no UTF-8
        return False


def plain(value: Any) -> Any:
    """`value` as JSON has it: paths as strings, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def normalize(argv: Sequence[str]) -> list[str]:
    """Flags as tyro wants them: our names for the originals', and `auto` after a bare `--mixed_precision`."""
    out: list[str] = []
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        name = ALIASES.get(name, name)
        out.append(f"--{name}{equals}{value}")
        if name == "mixed_precision" and not equals and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            out.append("auto")
    return out


def named_preset(config_class: type[TrainingConfig], argv: Sequence[str]) -> str | None:
    """What --preset says, on the command line or in --settings, before the flags can be read: it decides defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--settings", type=Path)
    named, _ = parser.parse_known_args(normalize(argv))
    if named.preset is not None or named.settings is None:
        return named.preset
    return read_settings(config_class, named.settings).get("preset")


def read_settings(config_class: type[TrainingConfig], path: Path) -> dict[str, Any]:
    """Field values from a YAML file or a run's config.json, with names and shapes checked."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--settings {path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ConfigError(f"--settings {path} is neither YAML nor JSON: brackets lie too deep in each other") from None
    except (yaml.YAMLError, ValueError) as error:  # no YAML, no UTF-8, no such day, or a number without end
        raise ConfigError(f"--settings {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--settings {path} must hold `name: value` lines, not a {type(values).__name__}")
    values = by_our_names(config_class, values, said_by=f"--settings {path}")
    for name, value in values.items():
        if isinstance(value, list) and (flags := [word for word in value if str(word).startswith("--")]):
            raise ConfigError(f"--settings {path}: {name} holds {flags[0]}, a flag; only values may stand there")
    # Through the command line, so that a file's values meet the same parser as a flag's.
    return {name: value for name, value in values.items() if value is not None and name not in config_class.actions}


def by_our_names(config_class: type[TrainingConfig], values: dict[str, Any], said_by: str) -> dict[str, Any]:
    """`values` with the originals' names made ours. Raises ConfigError with the nearest name to one that is neither."""
    known = [f.name for f in dataclasses.fields(config_class)]
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    if unknown := [f"{name}{nearest(name, known)}" for name in values if name not in known]:
        raise ConfigError(f"{said_by} has unknown names: {', '.join(unknown)}")
    return values


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    default: Config | None = None,
    fill: Callable[[Config], Config] = lambda config: config,
) -> Config:
    """The command line as a checked `config_class`: defaults, then --settings, then flags, then what `fill` derives.

    Raises ConfigError with every bad value in one message; tyro exits with status 2 at an unknown flag.
    """
    argv = normalize(sys.argv[1:] if argv is None else argv)
    default = default if default is not None else config_class()
    config = tyro.cli(config_class, args=argv, default=default)
    if config.settings is not None:
        argv = _as_flags(read_settings(config_class, config.settings)) + argv
        config = tyro.cli(config_class, args=argv, default=default)
    config.validate()
    config = fill(config)
    if config.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two configs apart from FREE_ON_RESUME, as `name: old -> new`."""
    old, new = (json.loads(json.dumps(c)) for c in (old, new))
    names = sorted((old.keys() | new.keys()) - FREE_ON_RESUME)
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two dicts: name -> (of a, of b), None where one hasn't it."""
    return {n: (a.get(n), b.get(n)) for n in {**a, **b} if a.get(n) != b.get(n)}
