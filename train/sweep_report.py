"""What a sweep comes to: its trials as a table and a file, plots, and their place in the experiment database."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from train.engine.config import ConfigError
from train.engine.experiments import ExperimentDB
from train.engine.run_folder import read_json
from train.sweep_space import Sweep
from train.sweep_worker import SWEEP_FILE, of_its_runs, open_study, run_dir_of

if TYPE_CHECKING:
    import pandas

SCORED = (TrialState.COMPLETE, TrialState.PRUNED)


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each trial, the best first: trial, its flags, the metric, state, attempts, run_dir. Those without a
    score come last."""
    sweep, by_number = Sweep.of(read_json(folder / SWEEP_FILE)["spec"]), {}
    for trial in open_study(folder).get_trials(deepcopy=False):
        by_number.setdefault(trial.user_attrs["number"], []).append(trial)
    found = []
    for number, attempts in by_number.items():
        trial = next((t for t in attempts if t.state in SCORED), attempts[-1])
        flags = trial.user_attrs.get("flags", {})
        found.append(
            {
                "trial": number,
                **{p.name: flags.get(p.name) for p in sweep.searched},
                sweep.metric: trial.value,
                "state": trial.state.name.lower(),
                "attempts": len(attempts),
                "ended": sum(t.state in SCORED for t in attempts),
                "run_dir": str(run_dir_of(folder, number)),
            }
        )
    sign = -1 if sweep.maximize else 1

    def place(row: dict[str, Any]) -> tuple[float, int]:
        return (math.inf if row[sweep.metric] is None else sign * row[sweep.metric]), row["trial"]

    return sorted(found, key=place)


def trial_results(folder: Path | str) -> pandas.DataFrame:
    """`rows` of a sweep's folder as a table. Raises ConfigError without pandas or where there is no sweep."""
    try:
        import pandas
    except ImportError as error:
        raise ConfigError('trial_results needs pandas: pip install -e ".[notebook]"') from error
    if not (Path(folder) / SWEEP_FILE).exists():
        raise ConfigError(f"{folder} holds no sweep; give the --sweep_dir of one")
    return pandas.DataFrame(rows(Path(folder)))


def summary(found: list[dict[str, Any]], sweep: Sweep) -> dict[str, Any]:
    """The sweep's last line. Trials that were pruned have come to their end too; the best is one that finished."""
    best = next((row for row in found if row["state"] == "complete"), None)
    return {
        "completed": sum(row["ended"] > 0 for row in found),
        "retried": sum(row["attempts"] > 1 for row in found),
        "duplicated": sum(row["ended"] > 1 for row in found),
        "best": best
        and {
            "trial": best["trial"],
            "value": best[sweep.metric],
            "flags": {p.name: best[p.name] for p in sweep.searched},
            "run_dir": best["run_dir"],
        },
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of text."""
    names = [name for name in found[0] if name not in ("ended", "run_dir")]
    lines = [names, *([_text(row[name]) for name in names] for row in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines]


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def write_csv(folder: Path, found: list[dict[str, Any]]) -> None:
    with (folder / "trial_results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


# ---- plots -----------------------------------------------------------------------------------------------------------


def draw(folder: Path, found: list[dict[str, Any]]) -> list[str]:
    """importance.png and parallel.png; a line for each that could not be drawn, saying why."""
    sweep, study, said = Sweep.of(read_json(folder / SWEEP_FILE)["spec"]), open_study(folder), []
    finite = [row for row in found if row[sweep.metric] is not None and math.isfinite(row[sweep.metric])]
    searched = [p for p in sweep.searched if len({row[p.name] for row in finite}) > 1]
    if len(finite) < 2 or not searched:
        return ["plots       none: they need two trials with a score and another value of some flag"]
    draw_parallel(folder / "parallel.png", finite, [p.name for p in searched], sweep)
    try:
        importances = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=False),
            params=[p.name for p in searched],
        )
    except (ValueError, RuntimeError) as error:
        said.append(f"importance  not known: {error}")
    else:
        draw_importance(folder / "importance.png", importances, sweep.metric)
    return said


def draw_importance(file: Path, importances: dict[str, float], metric: str) -> None:
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    names = list(importances)[::-1]
    figure = Figure(figsize=(6, 1 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, [importances[name] for name in names])
    axis.set(title=f"what decides {metric}", xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    figure.savefig(file, dpi=110)


def draw_parallel(file: Path, found: list[dict[str, Any]], names: list[str], sweep: Sweep) -> None:
    """A line for each trial through its values, on an axis for each flag and one for the metric; dark is better."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    parameters = {p.name: p for p in sweep.parameters}
    names = [*names, sweep.metric]
    figure = Figure(figsize=(2 + 1.8 * len(names), 4), layout="constrained")
    axis = figure.subplots()
    for rank, row in reversed(list(enumerate(found))):
        heights = [place(row[n], [r[n] for r in found], n in parameters and parameters[n].log) for n in names]
        color = colormaps["viridis"](rank / max(1, len(found) - 1))
        axis.plot(heights, color=color, linewidth=2.5 if rank == 0 else 1.0)
    for x, name in enumerate(names):
        values = [row[name] for row in found]
        axis.axvline(x, color="black", linewidth=0.6)
        for value in sorted(set(values), key=_order) if _named(values) else (min(values), max(values)):
            height = place(value, values, name in parameters and parameters[name].log)
            axis.annotate(_text(value), (x, height), (4, 0), textcoords="offset points", fontsize=8, va="center")
    axis.set(xticks=range(len(names)), xticklabels=names, yticks=[], title=f"{len(found)} trials")
    figure.savefig(file, dpi=110)


def _named(values: list[Any]) -> bool:
    """Whether values are names rather than amounts."""
    return any(isinstance(value, (str, bool)) for value in values)


def _order(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value


def place(value: Any, values: list[Any], log: bool) -> float:
    """Where a value stands on its axis, in [0, 1]."""
    if _named(values):
        different = sorted(set(values), key=_order)
        return different.index(value) / max(1, len(different) - 1)
    scale = math.log if log else float
    low, high = scale(min(values)), scale(max(values))
    return (scale(value) - low) / (high - low) if high > low else 0.5


# ---- the experiment database -----------------------------------------------------------------------------------------


class Recorder:
    """Tells the database which runs are a sweep's trials. A database that fails is said once, and stops nothing."""

    def __init__(self, folder: Path, db: Path | None) -> None:
        self.folder, self.db = folder, db
        self.known: set[Path] = set()

    def record(self, all_again: bool = False) -> None:
        """Runs that have appeared since the last call; or all, with their rows: at the end."""
        runs = [run.parent for run in sorted(self.folder.glob("trial-*")) for run in of_its_runs(run, "run.json")]
        new = [run for run in runs if all_again or run not in self.known]
        if self.db is None or not new:
            return
        self.known.update(new)
        for run in new:
            try:
                self._record(run, rows=all_again)
            except ConfigError as error:
                print(f"database    {error}", flush=True)

    def _record(self, run: Path, rows: bool) -> None:
        with ExperimentDB(self.db) as db:
            about = read_json(self.folder / SWEEP_FILE)
            db.import_run(run, rows=False)  # refuses a damaged folder
            db.log_run(
                run,
                script=Path(about["spec"]["program"]).stem,
                config=read_json(run / "config.json"),
                command=read_json(run / "run.json")["command"],
                sweep_id=db.log_sweep(str(self.folder), about),
                trial=int(run.relative_to(self.folder).parts[0].removeprefix("trial-")),
            )
            db.import_run(run, rows)  # which knows the state
