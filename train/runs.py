"""The runs that were made: list them, compare them, make one again.

    python train/runs.py list --script nano --state finished
    python train/runs.py show RUN
    python train/runs.py compare RUN RUN ...                        # settings that differ, last scores
    python train/runs.py diff RUN RUN                               # settings, commit, versions
    python train/runs.py best --metric val_loss --script nano
    python train/runs.py plot RUN ... --metric loss train/loss --output losses.png
    python train/runs.py rerun RUN                                  # prints the command; --go runs it in a new folder
    python train/runs.py import FOLDER ...                          # runs that the database missed, all below FOLDER

RUN is a run's number, its folder, or the end of its name. A metric is val/loss, val_loss or loss for the validation's,
train/loss for the training rows'. The database is runs/experiments.db unless --db names another. A run is dead when it
was killed: its command with --run_dir goes on with it.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from train.engine import ConfigError
from train.engine.config import ALIASES, differences
from train.engine.experiments import ExperimentDB, Run
from train.engine.record import database_of
from train.engine.run_folder import provenance
from train.engine.script import sentences
from train.nearest import nearest
from train.pictures import new_figure

RUN_FILE = "run.json"
# Facts that differ between any two runs.
OWN_FACTS = ("started", "updated", "state", "stopped_by", "error")


# ---- commands --------------------------------------------------------------------------------------------------------


def list_runs(db: ExperimentDB, flags: argparse.Namespace) -> None:
    found = db.runs(flags.script, flags.state, flags.sweep, flags.limit)
    rows = [
        {
            "run": run["run_id"],
            "name": run["name"],
            "state": run["state"],
            "step": run["step"],
            "best": f"{run['monitor']}={_cell(run['score'])}" if run["score"] is not None else None,
            "sweep": run["sweep"] and f"{run['sweep']}/{run['trial']}",
            "started": run["created"][:16].replace("T", " "),
        }
        for run in found
    ]
    print("\n".join(table(rows)) if rows else "no such runs")


def show(db: ExperimentDB, flags: argparse.Namespace) -> None:
    run = db.get_run(flags.run)
    page: dict[str, Any] = {name: run[name] for name in ("run_id", "name", "state", "step", "sweep", "trial")}
    page |= {"folder": str(run["run_dir"]), "facts": run["facts"], "config": run["config"], "results": run["results"]}
    page["artifacts"] = [artifact["path"] for artifact in db.artifacts(run["run_id"])]
    print(yaml.safe_dump(page, sort_keys=False, allow_unicode=True), end="")


def compare(db: ExperimentDB, flags: argparse.Namespace) -> None:
    print("\n".join(table(db.comparison(flags.runs))))


def diff(db: ExperimentDB, flags: argparse.Namespace) -> None:
    a, b = db.get_run(flags.a), db.get_run(flags.b)
    rows = [
        {"": name, a["name"]: _cell(mine), b["name"]: _cell(other)}
        for name, (mine, other) in {**db.config_diff(a["run_id"], b["run_id"]), **facts_diff(a, b)}.items()
    ]
    print("\n".join(table(rows)) if rows else "same settings, commit, versions and machine")


def best(db: ExperimentDB, flags: argparse.Namespace) -> None:
    run = db.best_run(flags.metric, mode_of(db, flags), script=flags.script, sweep=flags.sweep)
    if run is None:
        split, name = db.split_and_name(flags.metric, flags.script)
        raise ConfigError(f"no such run has a finite {split}/{name}{nearest(name, db.names(split))}")
    print(f"{run['name']}  {flags.metric} {run['score']:.6g} at step {run['score_step']}  {run['run_dir']}")


def plot(db: ExperimentDB, flags: argparse.Namespace) -> None:
    figure = new_figure(6 * len(flags.metric), 4)
    axes = figure.subplots(1, len(flags.metric), squeeze=False)
    for axis, metric in zip(axes[0], flags.metric, strict=True):
        split, name = db.split_and_name(metric)
        for run in map(db.get_run, flags.runs):
            points = [(r["step"], r[name]) for r in db.rows(run["run_id"]) if r["split"] == split and name in r]
            if not points:
                raise ConfigError(f"run {run['name']} has no {split}/{name}{nearest(name, db.names(split))}")
            axis.plot(*zip(*points, strict=True), "o-" if split == "val" else "-", markersize=3, label=run["name"])
        axis.set(title=f"{split}/{name}", xlabel="optimizer step")
        axis.legend(fontsize="small")
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(flags.output, dpi=110)
    print(f"written to {flags.output}")


def rerun(db: ExperimentDB, flags: argparse.Namespace) -> None:
    run = db.get_run(flags.run)
    words = [
        *without_folder(run["command"]),
        *(["--run_dir", str(flags.run_dir)] if flags.run_dir else []),
    ]
    made_at, here = (run["facts"] or {}).get("git_commit"), provenance()["git_commit"]
    if made_at != here:
        print(f"note: the run was made at commit {made_at}, and this is {here}", file=sys.stderr)
    print(shlex.join(words), flush=True)
    if flags.go:
        raise SystemExit(subprocess.run(words).returncode)


def import_runs(flags: argparse.Namespace) -> None:
    for folder in flags.folders:
        found = sorted(file.parent for file in folder.rglob(RUN_FILE))
        if not found:
            raise ConfigError(f"{folder} holds no run: there is no {RUN_FILE} in it or below")
        for run_dir in found:
            path = flags.db or database_of(run_dir)
            with ExperimentDB(path) as db:
                print(f"{path}: {db.get_run(db.import_run(run_dir))['name']}")


# ---- what they are made of -------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Aligned columns, one for every name that a row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def facts_diff(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Commit, versions, machine and the like in which two runs differ."""
    mine, other = (dict(_flat(run["facts"] or {})) for run in (a, b))
    return {name: pair for name, pair in differences(mine, other).items() if name not in OWN_FACTS}


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in facts.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


def mode_of(db: ExperimentDB, flags: argparse.Namespace) -> str:
    """--mode; else what the runs say that monitor this score; else losses are the less the better."""
    split, name = db.split_and_name(flags.metric, flags.script)
    said = {run["mode"] for run in db.runs(flags.script, sweep=flags.sweep) if run["monitor"] == name}
    if flags.mode or len(said) == 1:
        return flags.mode or said.pop()
    if "loss" not in name:
        raise ConfigError(f"is the best {split}/{name} the least or the most? Say --mode min or --mode max")
    return "min"


def without_folder(command: str) -> list[str]:
    """Its words, less those that say where the run goes."""
    kept, words = [], iter(shlex.split(command))
    for word in words:
        flag, equals, _ = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or ALIASES.get(name, name) != "run_dir":
            kept.append(word)
        elif not equals:
            next(words)
    return kept


def natural(text: str) -> int:
    """A number that is not negative. Raises argparse's error, which becomes a sentence."""
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"give a whole number, 0 or more, not {text!r}")
    return int(text)


def open_database(flags: argparse.Namespace) -> ExperimentDB:
    """The one that --db names, or that the first RUN's folder belongs to, or runs/experiments.db."""
    named = [getattr(flags, name) for name in ("run", "a") if hasattr(flags, name)] or getattr(flags, "runs", [])
    folders = [Path(run) for run in named if (Path(run) / RUN_FILE).exists()]
    path = flags.db or (database_of(folders[0]) if folders else Path("runs/experiments.db"))
    if not path.exists():
        raise ConfigError(
            f"there is no {path}; name it with --db, or make it from run folders: python train/runs.py import FOLDER"
        )
    return ExperimentDB(path)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(call=call)
        sub.add_argument("--db", type=Path, help="the database, runs/experiments.db when not given")
        return sub

    def filters(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--script", help="only runs of this script: nano, maze, …")
        sub.add_argument(
            "--sweep", type=lambda s: int(s) if s.isdecimal() and len(s) < 19 else s, help="only trials of this sweep"
        )

    sub = command("list", list_runs, "the newest runs, their states and best scores")
    filters(sub)
    sub.add_argument("--state", choices=("running", "finished", "interrupted", "failed", "dead"))
    sub.add_argument("--limit", type=natural, default=20, help="at most so many (default 20)")
    command("show", show, "all that is known of a run").add_argument("run")
    command("compare", compare, "settings that differ, and last scores").add_argument("runs", nargs="+")
    sub = command("diff", diff, "settings, commit and versions that differ")
    sub.add_argument("a")
    sub.add_argument("b")
    sub = command("best", best, "the run with the best score")
    filters(sub)
    sub.add_argument("--metric", required=True)
    sub.add_argument("--mode", choices=("min", "max"), help="which is better, where the runs don't say")
    sub = command("plot", plot, "curves of runs, as a PNG")
    sub.add_argument("runs", nargs="+")
    sub.add_argument("--metric", nargs="+", default=["loss"])
    sub.add_argument("--output", type=Path, default=Path("runs.png"))
    sub = command("rerun", rerun, "print the command that makes a run again, or run it in a new folder")
    sub.add_argument("run")
    sub.add_argument("--go", action="store_true", help="run it")
    sub.add_argument("--run_dir", type=Path, help="the new folder, a time-stamped one when not given")
    command("import", import_runs, "fill the database from run folders").add_argument("folders", type=Path, nargs="+")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser().parse_args(argv)
    with sentences():
        if flags.call is import_runs:
            return import_runs(flags)
        with open_database(flags) as db:
            flags.call(db, flags)


if __name__ == "__main__":
    main()
