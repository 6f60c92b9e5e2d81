"""One page of HTML with all that is known of a run, or of several beside each other, to send to someone.

python train/report.py runs/nano/20260101-120000                        # RUN/report.html
python train/report.py RUN RUN ... -o three_runs.html
python train/report.py runs/maze/20260101-120000                        # every model and seed in it
python train/report.py runs/compare/20260101-120000                     # what train/compare.py left

A file of its own: pictures are inside, nothing is fetched, no script runs. It follows the reader's light or dark.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.engine.config import ConfigError
from train.engine.metrics import Row, read_rows
from train.engine.run_folder import is_held, read_json, write_whole
from train.engine.script import sentences
from train.report_page import chart, code, details, grid, page, paragraph, picture, section, table

# Of the columns of training rows, what has a chart only where a single run is shown.
ASIDE = ("grad_norm", "lr", "items_per_second")
NO_CHART = ("step", "split", "elapsed", "skipped")
MOST_SAMPLES, MOST_CHARACTERS = 3, 4000  # the newest samples of a run, and of each
MOST = 1e300  # of a number in a chart, whose ends must not lie further apart than float64 reaches
MOST_RUNS_IN_FULL = 12  # beyond, pictures would make a page of hundreds of megabytes


@dataclass
class Run:
    """A run folder, read."""

    name: str
    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    rows: list[Row]
    results: dict[str, Any]  # empty before the run's end

    @classmethod
    def read(cls, folder: Path, name: str) -> Run:
        """Raises ConfigError where the folder is damaged."""
        results, rows = folder / "results.json", folder / "metrics.jsonl"
        try:
            config, facts = read_json(folder / "config.json"), read_json(folder / "run.json")
            found = read_rows(rows) if rows.exists() else []
            run = cls(name, folder, config, facts, found, read_json(results) if results.exists() else {})
            run.check()
            return run
        except (OSError, ValueError) as error:
            raise ConfigError(f"the run in {folder} is damaged: {error}") from error

    def check(self) -> None:
        """Raises ValueError where a file holds JSON, but not what a run writes there."""
        for file in ("config", "facts", "results"):
            if not isinstance(getattr(self, file), dict):
                raise ValueError(f"its {file} are no names with values")
        tables = {name: self.results.get(name) or {} for name in ("final", "best", "report")}
        texts = {name: self.facts.get(name) or "" for name in ("command", "monitor", "state", "started")}
        for values, kind in ((tables, dict), (texts, str)):
            for name, value in values.items():
                if not isinstance(value, kind):
                    raise ValueError(f"{name} cannot be {value!r}")

    @property
    def state(self) -> str:
        state = self.facts.get("state") or "running"
        return "dead" if state == "running" and not is_held(self.folder) else state

    def points(self, split: str, name: str) -> list[tuple[float, float]]:
        return [
            (r["step"], r[name])
            for r in self.rows
            if r["split"] == split and isinstance(r.get(name), (int, float)) and abs(r[name]) < MOST
        ]

    def names(self, split: str) -> list[str]:
        return list(dict.fromkeys(n for r in self.rows if r["split"] == split for n in r if n not in NO_CHART))


def find(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders or below them. Raises ConfigError where there is none."""
    found: dict[Path, None] = {}
    for folder in folders:
        own = [folder] if (folder / "run.json").exists() else sorted(f.parent for f in folder.rglob("run.json"))
        if not own:
            raise ConfigError(f"{folder} holds no run: there is no run.json in it or below")
        found |= dict.fromkeys(run.resolve() for run in own)
    parents = [folder.resolve() for folder in folders]
    names = [_name(run, parents) for run in found]
    full = [names.count(name) > 1 for name in names]
    return [Run.read(run, str(run) if whole else n) for run, n, whole in zip(found, names, full, strict=True)]


def _name(run: Path, parents: Sequence[Path]) -> str:
    """Below the folder that was asked for its path there, else its last two folders."""
    within = [run.relative_to(parent).as_posix() for parent in parents if run != parent and run.is_relative_to(parent)]
    return within[0] if within else "/".join(run.parts[-2:])


# ---- parts of the page -----------------------------------------------------------------------------------------------


def scores(runs: Sequence[Run]) -> str:
    """A line for each run: state, steps, the best of what it monitors, last validation scores, speed."""
    rows = []
    for run in runs:
        monitor, results = run.facts.get("monitor") or "loss", run.results
        last = next((r for r in reversed(run.rows) if r["split"] == "val"), {})
        final = results.get("final") or {n: v for n, v in last.items() if n not in NO_CHART}
        row = {"run": run.name, "state": run.state, "step": run.rows[-1]["step"] if run.rows else 0}
        row |= {f"best {monitor}": (results.get("best") or {}).get(monitor), **final}
        speed = {f"{results.get('item_name', 'items')}/s": results.get("items_per_second")}
        rows.append(row | {name: results.get(name) for name in ("parameters", "seconds")} | speed)
    return section("Scores", table(rows))


def baselines(runs: Sequence[Run]) -> str:
    """What needs no training, beside the runs."""
    rows = [
        {"run": run.name, **{n: v for n, v in of.items() if not isinstance(v, (dict, list))}}
        for run in runs
        if isinstance(of := (run.results.get("report") or {}).get("baselines"), dict) and of
    ]
    return section("Baselines", table(rows)) if rows else ""


def curves(runs: Sequence[Run]) -> str:
    """Every score of the validation and every part of the loss, all runs in one chart each."""
    charts = []
    for split, title in (("val", "validation"), ("train", "training")):
        for name in dict.fromkeys(name for run in runs for name in run.names(split)):
            if split == "train" and name in ASIDE and len(runs) > 1:
                continue
            lines = {run.name: run.points(split, name) for run in runs}
            charts.append(chart(f"{title} {name}", {n: of for n, of in lines.items() if of}, marks=split == "val"))
    return section("Curves", grid([one for one in charts if one]))


def settings(runs: Sequence[Run]) -> str:
    """What differs, for several; all there is, for each."""
    shown = ""
    if len(runs) > 1:
        names = dict.fromkeys(name for run in runs for name in run.config)
        differ = [n for n in names if len({repr(run.config.get(n)) for run in runs}) > 1]
        rows = [{"setting": name, **{run.name: run.config.get(name) for run in runs}} for name in differ]
        shown = table(rows) if rows else paragraph("All runs have the same settings.")
    every = [details(f"All settings of {run.name}", table(pairs(run.config))) for run in runs[:MOST_RUNS_IN_FULL]]
    return section("Settings that differ" if len(runs) > 1 else "Settings", shown + "".join(every))


def pairs(values: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Rows of name and value, nested names dotted."""
    rows = []
    for name, value in values.items():
        inner = isinstance(value, dict)
        rows += pairs(value, f"{prefix}{name}.") if inner else [{"name": prefix + name, "value": value}]
    return rows


def one_run(run: Run) -> str:
    """Command, facts, results, pictures and samples of a run."""
    parts = [code(run.facts.get("command") or ""), details("Facts", table(pairs(run.facts)))]
    if run.results:
        parts.append(details("Results", table(pairs(run.results))))
    pictures = [*sorted(run.folder.glob("plots/*.png")), *sorted(run.folder.glob("*.png"))]
    parts.append(grid([picture(file) for file in pictures], wide=True))
    samples = sorted(run.folder.glob("samples/*.txt"), key=lambda file: file.stat().st_mtime)[-MOST_SAMPLES:]
    for file in samples:
        said = file.read_text(encoding="utf-8", errors="replace")
        cut = f"\n… {len(said) - MOST_CHARACTERS:,} characters more" if len(said) > MOST_CHARACTERS else ""
        parts.append(
            details(f"Sample {file.name}", code(said[:MOST_CHARACTERS] + cut), open_at_first=file == samples[-1])
        )
    return section(run.name, "".join(parts))


def compared(folder: Path) -> str:
    """What train/compare.py found, if it ended there."""
    if not (folder / "comparison.json").exists() or not (folder / "results.json").exists():
        return ""
    found = read_json(folder / "results.json")
    columns = ("mean", "half_interval", "tuned_to", "parameters", "steps", "seconds", "items_per_second")
    rows = [{"candidate": n, **{c: of[c] for c in columns}} for n, of in found["candidates"].items()]
    better = "less" if found["mode"] == "min" else "more"
    budget, seeds = found["budget"], len(found["seeds"])
    told = paragraph(f"Validation {found['monitor']} after {budget}, {seeds} seeds; {better} is better.")
    parts = [told, table(rows), table([_pair(pair) for pair in found["pairs"]])]
    items = [
        {"pair": " − ".join(pair["models"]), "score": name, **_pair_of_items(item)}
        for pair in found["pairs"]
        for name, item in pair["items"].items()
    ]
    parts += [details("On the test items", table(items))] if items else []
    parts += [paragraph(note) for note in found["notes"]]
    parts += [picture(folder / "comparison.png"), code(found["command"])]
    return section("Comparison", "".join(parts))


def _pair(pair: dict[str, Any]) -> dict[str, Any]:
    row = {"pair": " − ".join(pair["models"]), "difference": pair["difference"]}
    return row | {"± 95 %": pair["half_interval"], "p (Holm)": pair["p_holm"]}


def _pair_of_items(item: dict[str, Any]) -> dict[str, Any]:
    low, high = item["interval"]
    p = ", ".join(f"{p:.2g}" for p in item["mcnemar_holm"])
    return {"difference": item["difference"], "from": low, "to": high, "items": item["count"], "McNemar p by seed": p}


# ---- main ------------------------------------------------------------------------------------------------------------


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page; where it is. Raises ConfigError."""
    runs = find(folders)
    output = output or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    parts = ["".join(map(compared, folders)), scores(runs), baselines(runs), curves(runs), settings(runs)]
    parts += [one_run(run) for run in runs[:MOST_RUNS_IN_FULL]]
    if len(runs) > MOST_RUNS_IN_FULL:
        more = len(runs) - MOST_RUNS_IN_FULL
        parts.append(paragraph(f"{more} more runs have no pictures here; a page of fewer runs has them all."))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    commit = runs[0].facts.get("git_commit") or "no commit"
    output.parent.mkdir(parents=True, exist_ok=True)
    text = page(title, f"{runs[0].facts.get('started', '')} · {commit}", parts)
    write_whole(output, text.encode("utf-8", "replace").decode())  # JSON can spell what UTF-8 can't
    return output


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, of several, of a comparison"
    )
    parser.add_argument("-o", "--output", type=Path, help="RUN/report.html, or report.html for several, when not given")
    flags = parser.parse_args(argv)
    with sentences():
        print(f"written to {report(flags.runs, flags.output)}")


if __name__ == "__main__":
    main()
