"""Which of several models is the better, each with as much as the others: budget, tuning, seeds, data.

python train/compare.py "train/maze.py --models poh" "train/maze.py --models baseline" --budget 10m --tune lr --seeds 5
python train/compare.py "train/nano.py" "train/nano.py --use_hten" --budget 2e6tokens --tune lr=3e-4:1e-2 --trials 4
python train/compare.py train/champion.py train/decoder_only.py --budget 3000steps -- --preset tenfold --batch_size 32

Each argument is a script with its flags, in quotes, that trains one model. What stands after `--` goes to every run. A
budget is a time (30s, 10m, 2h), or steps, items (dataset elements), tokens or flops: 500steps, 1e15flops.

First every candidate tries the same grid of --tune, evenly spaced in its logarithm, on --seed; what scores best in the
validation is what it is then trained with, on --seeds other seeds. A score is that of a run's last evaluation: the best
of many would favour who is evaluated more often. Candidates take turns, so that a machine that slows down slows all.
The same command with the same --compare_dir goes on where it stopped. It leaves results.json, table.md and
comparison.png there, of which `python train/report.py COMPARE_DIR` makes a page.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from train.children import end, environment, held
from train.compare_report import report
from train.engine.config import ConfigError, normalize
from train.engine.metrics import read_rows
from train.engine.run_folder import read_json, write_json
from train.engine.script import sentences
from train.engine.signals import EXIT_INTERRUPTED, Signals
from train.nearest import nearest

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0}
UNITS = (*MINUTES, "steps", "items", "tokens", "flops")
# What a comparison decides for its runs.
OURS = ("run_dir", "resume", "seed", "seeds", "max_steps", "max_minutes", "epochs", "max_cost")
REACH = math.sqrt(10)  # of a grid whose ends aren't given, beyond the candidates' own values
MOST_SEEDS = 16  # the test over seeds goes through all 2^seeds ways to swap them
LEAST_FLOPS = 5e10  # a step's FLOPs are printed in steps of 1e9: below this they would be wrong by more than 1 %
POLL = 0.2  # seconds between looks at a run
SPEC = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Flags of train/compare.py."""

    # Scripts with their flags, each in quotes.
    candidates: Annotated[tuple[str, ...], tyro.conf.Positional]
    # What every run may spend: 10m, 500steps, 1e5items, 2e6tokens, 1e15flops.
    budget: str
    # A flag to tune, as lr or lr=1e-4:1e-2; nothing is tuned when not given.
    tune: str | None = None
    # Values of it that each candidate tries.
    trials: int = 5
    # Runs of each candidate that count.
    seeds: int = 5
    # Of the tuning; those that count have the seeds that follow.
    seed: int = 0
    # runs/compare/<time stamp> when not given.
    compare_dir: Path | None = None

    def problems(self) -> list[str]:
        found = [f"--{n} must be at least {m}, not {getattr(self, n)}" for n, m in (("trials", 2), ("seed", 0))
                 if getattr(self, n) < m]  # fmt: skip
        if not 1 <= self.seeds <= MOST_SEEDS:
            found.append(f"--seeds must be from 1 to {MOST_SEEDS}, not {self.seeds}")
        if len(self.candidates) < 2:
            found.append("a comparison needs two scripts at least, each with its flags in quotes")
        return found


@dataclass(frozen=True)
class Candidate:
    """One argument: its name, what is run, and the settings that come of its flags."""

    name: str
    script: str
    flags: tuple[str, ...]
    settings: dict[str, Any]
    limit: tuple[str, ...]  # the budget as a flag


# ---- before the first run --------------------------------------------------------------------------------------------


def parse_budget(text: str) -> tuple[float, str]:
    """(amount, unit). Raises ConfigError."""
    found = re.fullmatch(rf"(\d+\.?\d*(?:e\+?\d+)?)({'|'.join(UNITS)})", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--budget must be a number and one of {', '.join(UNITS)}, as 10m or 500steps, not {text}")
    return float(found[1]), found[2]


def names_of(commands: Sequence[Sequence[str]]) -> list[str]:
    """For each the words that not all have in common, else its script."""
    names = []
    for script, *flags in commands:
        own = [flag for flag in flags if not all(flag in other for other in commands)]
        same_script = all(other[0] == script for other in commands)
        words = own if same_script and own else [Path(script).stem, *own]
        names.append(re.sub(r"[^\w.=-]+", "-", "-".join(words)).strip("-"))
    if len(set(names)) < len(names):
        raise ConfigError(f"two candidates are the same: {', '.join(names)}; each needs a flag of its own")
    return names


def candidates_of(config: CompareConfig, extra: Sequence[str]) -> list[Candidate]:
    """The arguments, each checked by asking its script what it would do. Raises ConfigError with what one refuses."""
    amount, unit = parse_budget(config.budget)
    commands = [shlex.split(text) for text in config.candidates]
    found = []
    for name, (script, *flags) in zip(names_of(commands), commands, strict=True):
        flags = normalize([*flags, *extra])
        tuned = config.tune.partition("=")[0] if config.tune else None
        for flag in flags:
            word = flag.lstrip("-").partition("=")[0]
            if flag.startswith("--") and word in (*OURS, tuned):
                raise ConfigError(f"{name}: --{word} is what a comparison decides for all; leave it out")
        if not Path(script).is_file():
            raise ConfigError(f"{script} is not there; run this from the folder that holds it")
        settings = yaml.safe_load(_ask(name, script, *flags, "--max_steps", "1", "--print_config"))
        if len(settings.get("models", "1")) > 1:
            raise ConfigError(f"{name} trains {len(settings['models'])} models; give each as a candidate of its own")
        minutes = amount * MINUTES[unit] if unit in MINUTES else None
        length = minutes or max(1, round(amount / _cost_of_a_step(unit, name, script, flags, settings)))
        limit = ("--max_minutes" if minutes else "--max_steps", f"{length:g}" if minutes else str(length))
        found.append(Candidate(name, script, tuple(flags), settings, limit))
    return found


def _ask(name: str, *words: str) -> str:
    """What a script prints. Raises ConfigError with its own sentence where it refuses."""
    asked = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True)
    if asked.returncode and "--plan" not in words:
        raise ConfigError(f"{name} is refused: {asked.stderr.strip().removeprefix('error: ') or 'no reason given'}")
    return asked.stdout


def _cost_of_a_step(unit: str, name: str, script: str, flags: Sequence[str], settings: dict[str, Any]) -> float:
    """Steps, items, tokens or FLOPs of one optimizer step. Raises ConfigError where the script doesn't say."""
    if unit == "flops":
        said = re.search(r"([\d.]+) TFLOP per step", _ask(name, script, *flags, "--max_steps", "1", "--plan"))
        if said is None or float(said[1]) * 1e12 < LEAST_FLOPS:
            raise ConfigError(
                f"{name}: the FLOPs of a step are {said[1] + 'e12' if said else 'not known'}, too few to count by; "
                "give --budget in steps, items or minutes"
            )
        return float(said[1]) * 1e12
    if unit == "tokens" and not settings.get("seq_len"):
        raise ConfigError(f"{name} has no --seq_len to count tokens by; give --budget in items, steps or minutes")
    per_item = settings["seq_len"] if unit == "tokens" else 1
    return 1 if unit == "steps" else settings["batch_size"] * per_item


def grid_of(config: CompareConfig, candidates: Sequence[Candidate]) -> tuple[str, list[float]]:
    """The flag to tune and the values that every candidate tries. Raises ConfigError."""
    name, _, ends = (config.tune or "").partition("=")
    for candidate in candidates:
        if name not in candidate.settings:
            raise ConfigError(f"{candidate.name} has no flag --{name}{nearest(name, candidate.settings)}")
        if not isinstance(candidate.settings[name], (int, float)) or not (ends or candidate.settings[name] > 0):
            raise ConfigError(f"--tune {name}: {candidate.settings[name]} is no number above 0; give --tune {name}=A:B")
    own = [candidate.settings[name] for candidate in candidates]
    try:
        low, high = map(float, ends.split(":")) if ends else (min(own) / REACH, max(own) * REACH)
    except ValueError:
        low = high = 0.0
    if not 0 < low < high:
        raise ConfigError(f"--tune {name} goes from a number above 0 to a larger one, as {name}=1e-4:1e-2, not {ends}")
    values = [float(f"{low * (high / low) ** (k / (config.trials - 1)):.4g}") for k in range(config.trials)]
    return name, sorted({round(v) for v in values}) if all(isinstance(v, int) for v in own) else values


def prepare(folder: Path, spec: dict[str, Any]) -> None:
    """Write what the comparison is. Raises ConfigError where the folder holds another."""
    file, spec = folder / SPEC, json.loads(json.dumps(spec))
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, spec)
    elif different := [f"{n}: {old} -> {spec.get(n)}" for n, old in read_json(file).items() if old != spec.get(n)]:
        raise ConfigError(
            f"{folder} holds another comparison ({'; '.join(different)}); go on with the same, or give a new "
            "--compare_dir"
        )


# ---- the runs --------------------------------------------------------------------------------------------------------


class Runs:
    """Runs one after another, and holds each against the first: the same score of the same data."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.first: tuple[str, dict[str, Any]] | None = None

    def run(self, candidate: Candidate, folder: Path, *flags: str) -> dict[str, Any] | None:
        """What came of a run, from its folder where it has ended before; None if it diverged. Raises ConfigError."""
        end(folder)  # what a comparison that was killed left running
        if not (folder / "results.json").exists() and not _diverged(folder):
            print(f"{folder}: {candidate.name} {shlex.join(flags)}", flush=True)
            self._train(candidate, folder, flags)
        self._check(candidate.name, folder)
        if _diverged(folder):
            return None
        own = own_folder(folder)
        facts, results, rows = (
            read_json(own / "run.json"),
            read_json(own / "results.json"),
            read_rows(own / "metrics.jsonl"),
        )
        curve = [[r["step"], r["elapsed"], r[facts["monitor"]]] for r in rows if r["split"] == "val"]
        kept = ("steps", "parameters", "seconds", "items_per_second", "item_name", "stopped_by")
        made = {n: results[n] for n in kept} | {"score": results["final"][facts["monitor"]], "curve": curve}
        return made | {"run_dir": str(own), "monitor": facts["monitor"], "mode": facts["mode"]}

    def _train(self, candidate: Candidate, folder: Path, flags: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        words = [*LAUNCH, candidate.script, *candidate.flags, *candidate.limit, "--epochs", "None", *flags]
        words.append(f"--run_dir={folder}")
        with (folder / "log.txt").open("ab") as log:
            begin, out = log.tell(), {"stdout": log, "stderr": subprocess.STDOUT}
            # In a session of its own: what a terminal sends comes to us, and a run is told to stop once.
            process = subprocess.Popen(words, env=environment(), start_new_session=True, **out)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                self._check(candidate.name, folder)
                if self.signals.received:
                    raise SystemExit(EXIT_INTERRUPTED)
        finally:
            end(folder)
            process.wait()
        if not (folder / "results.json").exists() and not _diverged(folder):
            said = (folder / "log.txt").read_bytes()[begin:].decode(errors="replace").strip().splitlines()
            why = next((line for line in said if line.startswith("error: ")), (said or ["it said nothing"])[-1])
            raise ConfigError(f"{candidate.name} failed in {folder}: {why.removeprefix('error: ')}")

    def _check(self, name: str, folder: Path) -> None:
        """As soon as a run says what it is. Raises ConfigError where that is not comparable."""
        own = own_folder(folder)
        facts = read_json(own / "run.json") if own is not None else {}
        if "monitor" not in facts:
            return
        mine = {"monitor": facts["monitor"], "mode": facts["mode"]} | identity(facts.get("data") or {})
        if self.first is None:
            self.first = name, mine
        other, theirs = self.first
        for fact in {**theirs, **mine}:
            if theirs.get(fact) != mine.get(fact):
                raise ConfigError(
                    f"{other} and {name} cannot be compared: {fact} is {theirs.get(fact)} of one and {mine.get(fact)} "
                    "of the other; give both the same data and task"
                )


def identity(data: dict[str, Any]) -> dict[str, Any]:
    """What the data are, by dotted names: their hashes, or, where they are made from settings, all of these.

    Not the tokenizer's hash: scores like bits per byte are there to compare tokenizers by.
    """

    def leaves(value: Any, name: str) -> list[tuple[str, Any]]:
        if not isinstance(value, dict):
            return [(name, value)]
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}")]

    every = dict(leaves(data, "data"))
    hashes = {n: v for n, v in every.items() if re.search("hash|sha256", n) and "tokenizer" not in n}
    return hashes or every


def own_folder(folder: Path) -> Path | None:
    """Where a script that was given `folder` keeps its only run: there, or one below. Raises ConfigError."""
    found = [folder] if (folder / "run.json").exists() else sorted(f.parent for f in folder.glob("*/run.json"))
    if len(found) > 1:
        raise ConfigError(f"{folder} holds {len(found)} runs; a candidate trains one model at a time")
    return found[0] if found else None


def _diverged(folder: Path) -> bool:
    """Whether the engine gave the run up: its losses were not finite, or leapt."""
    own = own_folder(folder)
    return own is not None and read_json(own / "run.json").get("error", "").startswith("TrainingBroken")


# ---- main ------------------------------------------------------------------------------------------------------------


def compare(config: CompareConfig, extra: Sequence[str]) -> dict[str, Any]:
    candidates = candidates_of(config, extra)
    flag, values = grid_of(config, candidates) if config.tune else ("", [])
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (config.compare_dir or Path("runs/compare") / stamp).resolve()
    spec = {n: v for n, v in asdict(config).items() if n != "compare_dir"}
    with held(folder, "compare"), Signals() as signals:
        prepare(folder, spec | {"extra": list(extra), "values": values})
        try:
            runs = Runs(signals)
            tuning: dict[str, list] = {c.name: [] for c in candidates}
            for number, value in enumerate(values):
                for c in candidates:
                    found = runs.run(
                        c, folder / c.name / f"tune-{number}", f"--{flag}={value}", f"--seed={config.seed}"
                    )
                    tuning[c.name].append(
                        {"value": value, "score": found["score"] if found else math.nan} | (found or {})
                    )
            best = {c.name: best_value(c.name, tuning[c.name]) for c in candidates} if values else {}
            counted: dict[str, list] = {c.name: [] for c in candidates}
            for seed in range(config.seed + 1, config.seed + 1 + config.seeds):
                for c in candidates:
                    own = [f"--{flag}={best[c.name]}"] if values else []
                    if (found := runs.run(c, folder / c.name / f"seed-{seed}", *own, f"--seed={seed}")) is None:
                        raise ConfigError(
                            f"{c.name} diverged with seed {seed}, so it has no score: tune over smaller rates"
                        )
                    counted[c.name].append(found | {"seed": seed})
        except SystemExit:
            print(f"interrupted; the same command with --compare_dir {folder} goes on", file=sys.stderr)
            raise
    settings = {c.name: {"command": shlex.join([c.script, *c.flags]), "settings": c.settings} for c in candidates}
    return report(folder, config.budget, flag, settings, tuning, best, counted)


def best_value(name: str, trials: list[dict[str, Any]]) -> float:
    """Of a candidate's trials the one with the best finite score. Raises ConfigError if there is none."""
    finite = [t for t in trials if math.isfinite(t["score"])]
    if not finite:
        raise ConfigError(f"{name} diverged with every value that was tried; give --tune another range")
    sign = 1 if finite[0]["mode"] == "min" else -1
    return min(finite, key=lambda t: sign * t["score"])["value"]


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(CompareConfig, args=argv[:at], description=__doc__)
    with sentences():
        if problems := config.problems():
            raise ConfigError("; ".join(problems))
        compare(config, argv[at + 1 :])


if __name__ == "__main__":
    main()
