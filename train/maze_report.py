"""What maze models come to beside each other: a table with floors and ceilings, paired tests, a plot."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.maze_layers import MazeConfig
from models.parity import flops, parameters
from tasks.compare import holm, mcnemar, over_seeds, paired_difference, wilson
from tasks.maze.score import floors, length_groups, start_distance
from train.engine import Results
from train.engine.equal_steps import cut_short
from train.engine.run_folder import command_line, write_json
from train.pictures import new_figure

COLUMNS = ("success", "optimal", "exact_grid", "spl", "fork_accuracy", "illegal_moves")
# Walked otherwise, over the first mazes only: a column where there is such a score.
OTHER_WALKS = {
    "no_revisits_success": "no revisits",
    "reencode_success": "re-encoded",
    "reencode_no_revisits_success": "re-encoded, no revisits",
}
WALKERS = ("random_no_revisits", "wall_follower")  # drawn beside the models
# Questions that pairs of models answer: better, other.
QUESTIONS = {
    "routing helps": ("poh", "uniform"),
    "learning to route helps": ("poh", "frozen"),
    "PoH-HRM beats the looped baseline": ("poh", "looped"),
    "PoH-HRM beats the baseline": ("poh", "baseline"),
    "PoH-HRM beats as many FLOPs of baseline": ("poh", "deep"),
    "depth beats width": ("poh", "poh_depth3"),
}


def report(
    root: Path, run: Any, shapes: dict[str, MazeConfig], results: dict[str, list[Results]], test: Any
) -> dict[str, Any]:
    """results.json of the root: every model's scores on the mazes of `test` (train.maze_hooks.Test), floors, oracle,
    the scores by length, and what the pairs say."""
    seeds = range(run.seed, run.seed + run.seeds)
    outcomes = {name: [read_outcomes(root / f"{name}-seed{seed}") for seed in seeds] for name in shapes}
    solved = {name: success(of) for name, of in outcomes.items()}
    floor = floors(test.mazes, test.steps)
    walkers = {name: floor[name]["success"].unsqueeze(0) for name in WALKERS}
    summary = {
        **({"suite": run.suite, "min_path": run.min_path} if run.data is None else {"data": str(run.data)}),
        "test_mazes": len(test.steps),
        "rollout_mazes": min(test.rollouts, len(test.steps)),
        "seeds": list(seeds),
        "models": {name: model_row(shapes[name], results[name], outcomes[name]) for name in shapes},
        **_floors_and_oracle(floor),
        "test_sizes": {str(n): _floors_and_oracle(floors(*of)) for n, of in test.sizes.items()},
        "by_length": by_length(start_distance(test.mazes, test.steps), solved | walkers),
        "tests": paired_tests(solved),
        "command": command_line(),
    }
    write_json(root / "results.json", summary)
    lines = table(summary) + cut_short({name: row["steps"] for name, row in summary["models"].items()})
    (root / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines, "", *test_lines(summary["tests"])]), flush=True)
    draw(root / "scores.png", summary)
    draw_by_length(root / "by_length.png", summary["by_length"])
    return summary


def _floors_and_oracle(floor: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    means = {name: {n: value.nanmean().item() for n, value in scores.items()} for name, scores in floor.items()}
    return {"oracle": means.pop("oracle"), "floors": means}


def read_outcomes(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "outcomes.npz") as kept:
        return {name: kept[name] for name in kept.files}


def success(outcomes: list[dict[str, np.ndarray]]) -> Tensor:
    """float [seeds, mazes]."""
    return torch.from_numpy(np.stack([o["success"] for o in outcomes]))


def model_row(shape: MazeConfig, results: list[Results], outcomes: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Parameters, FLOPs, and for every score that all seeds have its mean over them and half its 95 % interval; beside
    it those with walls zeroed, and of other sizes."""
    scores: dict[str, dict[str, Any]] = {"": {}, "walls_zeroed_": {}}
    for name in outcomes[0]:
        if all(name in o for o in outcomes):
            prefix = re.match(r"(walls_zeroed_|size\d+_)?", name)[0]
            mean, half = over_seeds([float(np.nanmean(o[name])) for o in outcomes])
            scores.setdefault(prefix, {})[name.removeprefix(prefix)] = {"mean": mean, "half_interval": half}
    solved = success(outcomes)
    return {
        "parameters": parameters(shape),
        "flops_per_maze": flops(shape),
        "steps": [r.steps for r in results],
        "seconds": [r.seconds for r in results],
        "test": scores.pop(""),
        "success_wilson": wilson(solved.sum().item(), solved.numel()),
        "walls_zeroed": scores.pop("walls_zeroed_"),
        "test_sizes": {prefix[len("size") : -1]: of for prefix, of in scores.items()},
        "config": dataclasses.asdict(shape),
    }


def by_length(length: Tensor, success: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Of each tenth of the mazes by the steps of their shortest way, int64 [B]: the least and the most, and the success
    of models and walkers, float [seeds, B] each, over seeds."""
    group = length_groups(length)
    rows = []
    for number in range(int(group.max()) + 1):
        own = group == number
        over = {name: over_seeds(solved[:, own].mean(1).tolist()) for name, solved in success.items()}
        row = {"from": length[own].min().item(), "to": length[own].max().item(), "mazes": own.sum().item()}
        row["success"] = {name: {"mean": mean, "half_interval": half} for name, (mean, half) in over.items()}
        rows.append(row)
    return rows


def paired_tests(success: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The questions whose models are there, of success float [seeds, mazes]: difference, bootstrap interval, and the
    exact McNemar p-value of each pair of runs with one seed, corrected by Holm over all of them."""
    found: dict[str, dict[str, Any]] = {}
    p_values = {}
    for question, (better, other) in QUESTIONS.items():
        if better in success and other in success:
            first, second = success[better], success[other]
            difference, low, high = paired_difference(first, second)
            found[question] = {"models": [better, other], "difference": difference, "interval": [low, high]}
            for k, (a, b) in enumerate(zip(first.bool(), second.bool(), strict=True)):
                p_values[f"{question}/{k}"] = mcnemar(a, b)
    corrected = holm(p_values)
    for question in found:
        found[question]["mcnemar_holm"] = [p for name, p in corrected.items() if name.rpartition("/")[0] == question]
    return found


# ---- for people ------------------------------------------------------------------------------------------------------


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown: models, then each with its walls zeroed, then floors and the oracle; then the same for other sizes."""
    models = summary["models"].items()
    others = [name for name in OTHER_WALKS if any(name in m["test"] for _, m in models)]
    columns = {name: name.replace("_", " ") for name in COLUMNS}
    columns |= {name: f"{OTHER_WALKS[name]} ({summary['rollout_mazes']} mazes)" for name in others}

    def line(name: str, cost: str, scores: dict[str, Any]) -> str:
        return f"| {name} | {cost} | " + " | ".join(_cell(scores.get(column)) for column in columns) + " |"

    def floor_lines(of: dict[str, Any], where: str = "") -> list[str]:
        every = {**of["floors"], "oracle": of["oracle"]}
        return [
            line(name.replace("_", " ") + where, " | ", {k: {"mean": v} for k, v in scores.items()})
            for name, scores in every.items()
        ]

    lines = ["| | parameters | GFLOP a maze | " + " | ".join(columns.values()) + " |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    lines += [line(n, f"{m['parameters']:,} | {m['flops_per_maze'] / 1e9:.3f}", m["test"]) for n, m in models]
    lines += [line(f"{n}, walls zeroed", " | ", m["walls_zeroed"]) for n, m in models]
    lines += floor_lines(summary)
    for size, of in summary["test_sizes"].items():
        where = f", perfect-{size}"
        lines += [line(n + where, " | ", m["test_sizes"][size]) for n, m in models if size in m["test_sizes"]]
        lines += floor_lines(of, where)
    return lines


def _cell(score: dict[str, float | None] | None) -> str:
    if score is None:
        return ""
    half = score.get("half_interval")
    return f"{100 * score['mean']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def test_lines(tests: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{question}: {100 * t['difference']:+.1f} points of success, 95 % {100 * t['interval'][0]:+.1f} to "
        f"{100 * t['interval'][1]:+.1f}; McNemar p by seed {', '.join(f'{p:.2g}' for p in t['mcnemar_holm'])}"
        for question, t in tests.items()
    ]


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Success, optimality and fork accuracy of every model, walls zeroed beside it, floors as lines."""
    figure = new_figure(12, 4)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, score in zip(axes, ("success", "optimal", "fork_accuracy"), strict=True):
        names = [name for name, model in summary["models"].items() if score in model["test"]]
        for shift, which, color in ((-0.2, "test", "C0"), (0.2, "walls_zeroed", "0.75")):
            values = [summary["models"][name][which][score] for name in names]
            places = [i + shift for i in range(len(names))]
            label = "with walls" if which == "test" else "walls zeroed"
            errors = [v["half_interval"] or 0 for v in values]
            axis.bar(places, [v["mean"] for v in values], 0.4, yerr=errors, color=color, label=label)
        for number, (name, scores) in enumerate(summary["floors"].items()):
            if score in scores:
                style = {"linestyle": "--", "linewidth": 0.8, "color": f"C{number + 1}"}
                axis.axhline(scores[score], label=name.replace("_", " "), **style)
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set(title=score.replace("_", " "), ylim=(0, 1.02))
    axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def draw_by_length(file: Path, rows: list[dict[str, Any]]) -> None:
    """Success over the steps of the shortest way, a line for each model and, dashed, for what knows nothing."""
    figure = new_figure(7, 4)
    axis = figure.subplots()
    places = [(row["from"] + row["to"]) / 2 for row in rows]
    for name in rows[0]["success"]:
        values = [row["success"][name] for row in rows]
        halves = [value["half_interval"] or 0 for value in values]
        style = {"linestyle": "--", "linewidth": 0.8} if name in WALKERS else {"marker": "o"}
        axis.errorbar(places, [v["mean"] for v in values], halves, label=name.replace("_", " "), **style)
    axis.set(xlabel="steps of the shortest way, middle of a tenth of the mazes", ylabel="success", ylim=(0, 1.02))
    axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def draw_routing(file: Path, usage: dict[str, Any]) -> None:
    """Of every block a panel: the mean weight of each head (across) at each refinement (down), and how it deviates."""
    blocks = len(usage["mean"])
    figure = new_figure(1 + 2.6 * blocks, 3)
    axes = figure.subplots(1, blocks, squeeze=False)
    for number, axis in enumerate(axes.flat):
        mean, deviation = usage["mean"][number], usage["deviation"][number]
        image = axis.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, x in np.ndindex(len(mean), len(mean[0])):
            label = f"{mean[y][x]:.2f}\n±{deviation[y][x]:.2f}"
            axis.text(x, y, label, ha="center", va="center", fontsize=6, color="white" if mean[y][x] < 0.6 else "black")
        axis.set(title=f"block {number}", xlabel="head", xticks=range(len(mean[0])), yticks=range(len(mean)))
    axes[0, 0].set_ylabel("refinement")
    figure.colorbar(image, ax=axes, label="weight")
    figure.suptitle(f"step {usage['step']}: mean weight ± over mazes", fontsize="medium")
    figure.savefig(file, dpi=110)


def draw_scaling(file: Path, summaries: dict[str, dict[str, Any]]) -> None:
    """Four panels: success and optimality over parameters, a line for each model; below, each model's points over the
    baseline's at every size."""
    figure = new_figure(10, 7)
    axes = figure.subplots(2, 2)
    models = list(next(iter(summaries.values()))["models"])
    others = [name for name in models if name != "baseline"]
    for (above, below), score in zip(axes.T, ("success", "optimal"), strict=True):
        for name in models:
            rows = [summary["models"][name] for summary in summaries.values()]
            values = [row["test"][score] for row in rows]
            halves = [value["half_interval"] or 0 for value in values]
            sizes, means = [row["parameters"] for row in rows], [value["mean"] for value in values]
            above.errorbar(sizes, means, halves, marker="o", label=name)
        above.set(xscale="log", xlabel="parameters", title=score, ylim=(0, 1.02))
        for number, name in enumerate(others if "baseline" in models else ()):
            means = [[s["models"][n]["test"][score]["mean"] for s in summaries.values()] for n in (name, "baseline")]
            gains = [ours - theirs for ours, theirs in zip(*means, strict=True)]
            places = [i + (number + 0.5) / len(others) * 0.8 - 0.4 for i in range(len(gains))]
            below.bar(places, [100 * gain for gain in gains], 0.8 / len(others), label=name)
        below.axhline(0, color="0.3", linewidth=0.8)
        below.set_xticks(range(len(summaries)), list(summaries))
        below.set(ylabel=f"points of {score} over the baseline")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(file, dpi=110)
