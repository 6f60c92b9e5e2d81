"""The ARC experiments on one ladder: equal parameters, data and steps, some seeds each, and one table with intervals.

accelerate launch train/arc_ladder.py --max_minutes 120 --seeds 3
accelerate launch train/arc_ladder.py --preset tenfold --size small --skills upscale colour_map --max_minutes 60

    decoder_only      Exp -1   one sequence, RoPE
    encoder_decoder   Exp 0    an encoder of the question, a decoder of the answer
    grid2d            Exp 1    and places by row and column
    perminv           Exp 2    and colours by their order of appearance
    champion          Exp 3    and demonstrations
    refine            Exp 4    and a second pass over the answer
    borders           Exp 5    the Champion with learned places from either border, and rotary ones
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models.arc_layers import ArcConfig, ArcModel, parameters
from models.champion import LADDERS, Champion
from tasks.compare import over_seeds, paired_difference
from train.arc import ArcRun, data_of, make_task, preset_of, train
from train.engine import ConfigError, Results, parse
from train.engine.equal_steps import cut_short, with_equal_steps
from train.engine.processes import process_state
from train.engine.run_folder import command_line, default_run_dir, write_json
from train.engine.script import sentences

Experiment = Literal["decoder_only", "encoder_decoder", "grid2d", "perminv", "champion", "refine", "borders"]
COLUMNS = ("exact", "shape", "cell_accuracy", "change_accuracy")


@dataclass(frozen=True, kw_only=True)
class Rung(ArcRun):
    """One experiment of the ladder."""

    rung: Experiment = "champion"
    # trial69: 1.72 M parameters each; small: 0.37 M, for a CPU.
    size: Literal["trial69", "small"] = "trial69"

    @property
    def of_ladder(self) -> tuple[type[ArcModel], ArcConfig]:
        return LADDERS[self.size][self.rung]

    @property
    def experiment(self) -> str:  # type: ignore[override]
        return f"exp_{list(LADDERS[self.size]).index(self.rung) - 1}_{self.rung}"

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "decoder_only" if self.rung == "decoder_only" else "encoder_decoder"

    def shape(self) -> ArcConfig:
        config = self.of_ladder[1]
        if self.tiny:
            config = dataclasses.replace(config, d_model=32, num_heads=2, d_ff=64)
        if self.dropout:
            return config
        rates = {f.name: 0.0 for f in dataclasses.fields(config) if f.name.endswith("dropout")}
        return dataclasses.replace(config, **rates)

    def build(self) -> ArcModel:
        return self.of_ladder[0](self.shape())


@dataclass(frozen=True, kw_only=True)
class LadderRun(Rung):
    """Flags of train/arc_ladder.py; --context_pairs is what those that see demonstrations are shown."""

    experiments: tuple[Experiment, ...] = (
        "decoder_only",
        "encoder_decoder",
        "grid2d",
        "perminv",
        "champion",
        "borders",
    )
    # Initialisations and orders of each, from --seed on.
    seeds: int = 3
    epochs: float | None = None
    early_stopping_patience: int | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.seeds < 1:
            found.append(f"--seeds must be at least 1, not {self.seeds}")
        if len(set(self.experiments)) < len(self.experiments):
            found.append(f"--experiments names one twice: {' '.join(self.experiments)}")
        if self.early_stopping_patience is not None:
            found.append("--early_stopping_patience would give the experiments unequal numbers of steps; leave it out")
        return found

    def of(self, name: Experiment, **changes: Any) -> Rung:
        """The run of one experiment."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Rung)}
        shown = self.context_pairs if issubclass(LADDERS[self.size][name][0], Champion) else 0
        return Rung(**{**values, "rung": name, "context_pairs": shown, **changes})


def climb(run: LadderRun, root: Path) -> dict[str, Any]:
    """Every experiment and seed in a folder of its own, then what they come to beside each other."""
    rungs = {name: run.of(name) for name in run.experiments}
    data = data_of(run)
    models = {name: (rung.build, make_task(rung, data)) for name, rung in rungs.items()}
    run = with_equal_steps(run, models, seeds=run.seeds, epoch=len(data["train"]), root=root)
    results: dict[str, list[Results]] = {name: [] for name in rungs}
    for seed in range(run.seed, run.seed + run.seeds):
        for name in rungs:
            results[name].append(train(run.of(name, seed=seed, run_dir=root / f"{name}-seed{seed}"), data))
    return report(run, root, results) if process_state(run).is_main_process else {}


def report(run: LadderRun, root: Path, results: dict[str, list[Results]]) -> dict[str, Any]:
    """results.json and table.md of the root."""
    seeds = range(run.seed, run.seed + run.seeds)
    sets = [name for name in ("examples", "skills", "compose") if name in results[run.experiments[0]][0].report]
    summary: dict[str, Any] = {"seeds": list(seeds), "command": command_line(), "experiments": {}}
    for name, of in results.items():
        rung = run.of(name)
        model, config = rung.of_ladder[0], rung.shape()
        scores = {
            part: {key: dict(zip(("mean", "half_interval"), over_seeds([r.report[part][key] for r in of]), strict=True))
                   for key in COLUMNS if all(key in r.report[part] for r in of)}
            for part in sets
        }  # fmt: skip
        summary["experiments"][name] = {
            "parameters": parameters(model, config),
            "steps": [r.steps for r in of],
            **scores,
        }
    summary["baselines"] = {k: v for k, v in results[run.experiments[0]][0].report["summary"].items() if ", " in k}
    summary["steps_up"] = {
        f"{better} over {other}": paired(root, better, other, seeds, "examples")
        for other, better in zip(run.experiments, run.experiments[1:], strict=False)
    }
    write_json(root / "results.json", summary)
    lines = table(summary, sets) + cut_short({n: row["steps"] for n, row in summary["experiments"].items()})
    (root / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]), flush=True)
    return summary


def paired(root: Path, better: str, other: str, seeds: Sequence[int], part: str) -> dict[str, float]:
    """Exact match of one experiment less that of another on the same questions, with its bootstrap interval."""
    exact = []
    for name in (better, other):
        rows = [np.load(root / f"{name}-seed{seed}" / "outcomes.npz")[part] for seed in seeds]
        exact.append(torch.from_numpy(np.stack(rows)))
    return dict(zip(("difference", "low", "high"), paired_difference(*exact), strict=True))


def table(summary: dict[str, Any], sets: Sequence[str]) -> list[str]:
    """Markdown: exact match on every set, and the other scores on the examples; then what could be guessed."""
    head = ["parameters", *(f"exact, {part}" for part in sets), *(f"{key}, examples" for key in COLUMNS[1:])]
    lines = ["| | " + " | ".join(head).replace("_", " ") + " |", "|---" * (1 + len(head)) + "|"]
    for name, row in summary["experiments"].items():
        cells = [_cell(row[part]["exact"]) for part in sets] + [_cell(row[sets[0]].get(k)) for k in COLUMNS[1:]]
        lines.append(f"| {name} | {row['parameters']:,} | " + " | ".join(cells) + " |")
    for name, scores in summary["baselines"].items():
        part, guess = name.split(", ")
        if part == sets[0]:
            of = [summary["baselines"][f"{p}, {guess}"]["exact"] for p in sets] + [scores[k] for k in COLUMNS[1:]]
            lines.append(f"| {guess.replace('_', ' ')} | | " + " | ".join(_cell({"mean": v}) for v in of) + " |")
    for name, found in summary["steps_up"].items():
        low, high = found["low"], found["high"]
        lines.append(f"\n{name}: {100 * found['difference']:+.1f} points, 95 % {100 * low:+.1f} to {100 * high:+.1f}")
    return lines


def _cell(score: dict[str, float | None] | None) -> str:
    if score is None or score["mean"] != score["mean"]:
        return "–"
    half = score.get("half_interval")
    return f"{100 * score['mean']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    with sentences():
        argv = sys.argv[1:] if argv is None else argv
        run = parse(LadderRun, argv, preset_of(LadderRun, argv), fill=LadderRun.filled_in)
        if not run.free_run_at_end:
            raise ConfigError("--free_run_at_end 0 leaves nothing to compare; give some questions")
        return climb(run, run.run_dir or default_run_dir())


if __name__ == "__main__":
    main()
