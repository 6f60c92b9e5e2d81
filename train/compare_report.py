"""What a comparison comes to: a table, paired tests over seeds and over test items, and a picture."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.compare import holm, mcnemar, over_seeds, paired_difference
from train.engine.run_folder import command_line, write_json

Runs = dict[str, list[dict[str, Any]]]  # by candidate, one after another


def report(
    folder: Path, budget: str, flag: str, about: dict[str, Any], tuning: Runs, best: dict[str, float], counted: Runs
) -> dict[str, Any]:
    """results.json, table.md and comparison.png of the folder.

    Args:
        flag: what was tuned, "" for nothing; `tuning` its runs, `best` the value that each candidate came to.
        about: command and settings by candidate.
        counted: the runs that count, by candidate in the order of seeds.
    """
    first = next(iter(counted.values()))[0]
    summary = {
        "budget": budget,
        "monitor": first["monitor"],
        "mode": first["mode"],
        "seeds": [run["seed"] for run in next(iter(counted.values()))],
        "tuned": flag,
        "candidates": {name: candidate_row(runs, best.get(name)) | about[name] for name, runs in counted.items()},
        "pairs": pairs(counted),
        "notes": notes(flag, tuning, best, counted),
        "settings_that_differ": differing({name: of["settings"] for name, of in about.items()}),
        "tuning": tuning,
        "runs": counted,
        "command": command_line().replace("accelerate launch", "python", 1),
    }
    write_json(folder / "results.json", _without_nan(summary))
    lines = [*table(summary), "", *sentences_of(summary)]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(folder / "comparison.png", summary)
    print("", *lines, "", f"comparison  {folder}", sep="\n", flush=True)
    return summary


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what diverged has no score, null."""
    if isinstance(value, dict):
        return {name: _without_nan(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def candidate_row(runs: list[dict[str, Any]], tuned_to: float | None) -> dict[str, Any]:
    mean, half = over_seeds([run["score"] for run in runs])
    row = {"mean": mean, "half_interval": half, "scores": [run["score"] for run in runs], "tuned_to": tuned_to}
    row |= {name: float(np.mean([run[name] for run in runs])) for name in ("steps", "seconds")}
    speeds = [run["items_per_second"] for run in runs if run["items_per_second"]]
    return row | {
        "items_per_second": float(np.mean(speeds)) if speeds else None,
        "item_name": runs[0]["item_name"],
        "parameters": runs[0]["parameters"],
    }


# ---- tests -----------------------------------------------------------------------------------------------------------


def pairs(counted: Runs) -> list[dict[str, Any]]:
    """Every two candidates: the difference of their scores over seeds and of their answers to the test items, with
    95 % intervals, and p-values corrected by Holm over all pairs (of the items also over seeds and scores)."""
    found, over, of_items = [], {}, {}
    outcomes = {name: [read_outcomes(Path(run["run_dir"])) for run in runs] for name, runs in counted.items()}
    for a, b in itertools.combinations(counted, 2):
        differences = [x["score"] - y["score"] for x, y in zip(counted[a], counted[b], strict=True)]
        mean, half = over_seeds(differences)
        pair: dict[str, Any] = {"models": [a, b], "difference": mean, "half_interval": half, "items": {}}
        over[f"{a}/{b}"] = sign_flip(differences)
        for name, (first, second) in common(outcomes[a], outcomes[b]).items():
            difference, low, high = paired_difference(first, second)
            pair["items"][name] = {"difference": difference, "interval": [low, high], "count": first.shape[1]}
            pair["items"][name]["means"] = [first.mean().item(), second.mean().item()]
            if all(((x == 0) | (x == 1)).all() for x in (first, second)):
                for seed, (x, y) in enumerate(zip(first.bool(), second.bool(), strict=True)):
                    of_items[f"{a}/{b}/{name}/{seed}"] = mcnemar(x, y)
        found.append(pair)
    corrected, corrected_items = holm(over), holm(of_items)
    for pair in found:
        key = "/".join(pair["models"])
        pair |= {"p": over[key], "p_holm": corrected[key]}
        for name, item in pair["items"].items():
            item["mcnemar_holm"] = [p for k, p in corrected_items.items() if k.startswith(f"{key}/{name}/")]
    return found


def sign_flip(differences: list[float]) -> float:
    """The exact two-sided p-value that which of two candidates was which is a coin's toss for every seed: the share of
    all 2^n choices of signs whose mean is as far from 0 (Fisher, The Design of Experiments, 1935, section 21)."""
    x = torch.tensor(differences, dtype=torch.float64)
    bits = torch.arange(2 ** len(x)).unsqueeze(1) >> torch.arange(len(x))  # [2^n, n]
    sums = ((1 - 2 * (bits & 1)).double() @ x).abs()
    return (sums >= x.sum().abs() * (1 - 1e-12)).double().mean().item()


def read_outcomes(run_dir: Path) -> dict[str, np.ndarray]:
    """What a run answered to each test item, by score; nothing where the script keeps none."""
    if not (run_dir / "outcomes.npz").exists():
        return {}
    with np.load(run_dir / "outcomes.npz") as kept:
        return {name: kept[name].astype(float) for name in kept.files if kept[name].ndim == 1}


def common(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The scores that all runs of both have of the same items, without gaps: float [seeds, items] of each."""
    every = [*first, *second]
    names = [
        name
        for name, values in first[0].items()
        if all(name in of and of[name].shape == values.shape and np.isfinite(of[name]).all() for of in every)
    ]
    return {n: tuple(torch.from_numpy(np.stack([of[n] for of in runs])) for runs in (first, second)) for n in names}


# ---- for people ------------------------------------------------------------------------------------------------------


def notes(flag: str, tuning: Runs, best: dict[str, float], counted: Runs) -> list[str]:
    """What a reader should know before believing the table."""
    said = []
    for name, value in best.items():
        values = [trial["value"] for trial in tuning[name]]
        if value in (values[0], values[-1]):
            said.append(
                f"{name} was best with {flag} {value:g}, an end of the grid: a wider one may do it more justice."
            )
        if lost := sum(not math.isfinite(trial["score"]) for trial in tuning[name]):
            said.append(f"{name} diverged in {lost} of its {len(values)} trials.")
    for name, runs in counted.items():
        if early := sorted({r["stopped_by"] for r in runs} - {"max_steps", "max_minutes"}):
            said.append(f"{name} did not spend its budget: ended by {', '.join(early)}.")
    seeds = len(next(iter(counted.values())))
    if 1 < seeds < 6:
        said.append(f"{seeds} seeds: no test over seeds alone can give a p below {2 / 2**seeds:.3g}.")
    return said


def differing(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings in which candidates differ, by name and candidate."""
    names = dict.fromkeys(name for of in settings.values() for name in of)
    rows = {name: {candidate: of.get(name) for candidate, of in settings.items()} for name in names}
    return {name: row for name, row in rows.items() if len({repr(value) for value in row.values()}) > 1}


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown: a line for each candidate, the best first."""
    sign = 1 if summary["mode"] == "min" else -1
    order = sorted(summary["candidates"].items(), key=lambda of: sign * of[1]["mean"])
    tuned = [summary["tuned"]] if summary["tuned"] else []
    score = f"validation {summary['monitor']} ({'less' if sign == 1 else 'more'} is better)"
    items = f"{order[0][1]['item_name']}/s"
    lines = ["| " + " | ".join(["", score, *tuned, "parameters", "steps", "seconds", items]) + " |"]
    lines.append("|---" * (6 + len(tuned)) + "|")
    for name, row in order:
        half = "" if row["half_interval"] is None else f" ± {row['half_interval']:.2g}"
        cells = [
            name,
            f"{row['mean']:.4g}{half}",
            *([f"{row['tuned_to']:g}"] if tuned else []),
            f"{row['parameters']:,}",
        ]
        speed = "n/a" if row["items_per_second"] is None else f"{row['items_per_second']:,.0f}"
        lines.append("| " + " | ".join([*cells, f"{row['steps']:,.0f}", f"{row['seconds']:,.0f}", speed]) + " |")
    return lines


def sentences_of(summary: dict[str, Any]) -> list[str]:
    """What the pairs come to, and the notes."""
    lines = []
    for pair in summary["pairs"]:
        a, b = pair["models"]
        difference, half = pair["difference"], pair["half_interval"]
        line = f"- {a} − {b}: {summary['monitor']} {difference:+.4g}"
        if half is None:
            lines.append(f"{line}; a single seed says nothing of others.")
            continue
        better = a if (difference < 0) == (summary["mode"] == "min") else b
        verdict = f"{better} is better" if abs(difference) > half else "no difference is shown"
        lines.append(
            f"{line}, 95 % {difference - half:+.4g} to {difference + half:+.4g} over {len(summary['seeds'])} seeds, "
            f"p {pair['p_holm']:.2g}: {verdict}."
        )
        for name, item in pair["items"].items():
            p = f"; McNemar p by seed {', '.join(f'{p:.2g}' for p in item['mcnemar_holm'])}" * bool(
                item["mcnemar_holm"]
            )
            lines.append(
                f"  - {name} of {item['count']} test items: {item['means'][0]:.4g} and {item['means'][1]:.4g}, "
                f"difference {item['difference']:+.4g}, 95 % {item['interval'][0]:+.4g} to "
                f"{item['interval'][1]:+.4g}{p}."
            )
    return [*lines, *(f"- Note: {note}" for note in summary["notes"])]


def draw(file: Path, summary: dict[str, Any]) -> None:
    """What was tuned, if anything; the learning curves of the runs that count; their last scores, mean and interval."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    panels = 2 + bool(summary["tuned"])
    figure = Figure(figsize=(4.6 * panels, 4), layout="constrained")
    *tune, curves, last = figure.subplots(1, panels)
    by_time = re.fullmatch(r"[\d.e+]+[smh]", summary["budget"]) is not None
    for number, (name, row) in enumerate(summary["candidates"].items()):
        color = f"C{number}"
        for axis in tune:
            trials = summary["tuning"][name]
            axis.plot([t["value"] for t in trials], [t["score"] for t in trials], "o-", markersize=4, color=color)
            axis.axvline(row["tuned_to"], color=color, linestyle=":", linewidth=1)
        for k, run in enumerate(summary["runs"][name]):
            steps, seconds, scores = zip(*run["curve"], strict=True)
            label = {"label": name} if k == 0 else {}
            curves.plot(seconds if by_time else steps, scores, color=color, linewidth=1.2, alpha=0.7, **label)
        last.plot([number] * len(row["scores"]), row["scores"], "o", color=color, alpha=0.5, markersize=4)
        last.errorbar([number + 0.15], [row["mean"]], [row["half_interval"] or 0], fmt="D", color=color, capsize=4)
    for axis in tune:
        axis.set(xscale="log", xlabel=summary["tuned"], title=f"tuning: {summary['monitor']}")
    curves.set(xlabel="seconds" if by_time else "optimizer step", title=f"validation {summary['monitor']}, every seed")
    curves.legend(fontsize="small")
    last.set_xticks(range(len(summary["candidates"])), list(summary["candidates"]), rotation=15)
    last.set(title=f"last {summary['monitor']}: seeds, mean ± 95 %", xlim=(-0.5, len(summary["candidates"]) - 0.3))
    figure.savefig(file, dpi=110)
