"""Mazes per second, made and labelled, beside maze-dataset in the same run; and what solvers came to over time.

    python benchmarks/mazes.py speed --csv benchmarks/results/mazes-cpu.csv
    python benchmarks/mazes.py curves runs/maze_12x12/RUN --png curves.png     # of a finished run of train/maze.py

`speed`: ours makes a batch and labels every cell with its distance and optimal moves; maze-dataset makes mazes one by
one and finds one path in each. The two take turns. maze-dataset needs muutils below 0.9, so it may want a virtual
environment of its own; where it is missing the row says so.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ops import machine
from tasks import random
from tasks.maze.distance import distances, optimal_moves
from tasks.maze.generate import Suite, attempt

SIZES = (8, 12, 16, 20, 30)
BATCH, SINGLES = 2048, 16  # mazes of a turn: ours in one batch, theirs one by one
Turn = Callable[[], int]  # does its work, says how many mazes that was


def ours(size: int) -> Turn:
    suite, batches = Suite(f"perfect-{size}"), iter(range(1 << 30))

    def turn() -> int:
        mazes = attempt(suite, random.keys(suite.key, next(batches), torch.arange(BATCH)))
        optimal_moves(mazes.passages, distances(mazes.passages, mazes.goal))
        return BATCH

    return turn


def theirs(size: int) -> Turn | str:
    """maze-dataset's turn, or why there is none."""
    try:
        import numpy as np
        from maze_dataset.generation import LatticeMazeGenerators
    except ImportError as error:
        return f"n/a: {error}"
    shape, generator = np.array([size, size]), np.random.default_rng(0)

    def turn() -> int:
        for _ in range(SINGLES):
            maze = LatticeMazeGenerators.gen_dfs(grid_shape=shape)
            start, goal = (tuple(cell) for cell in generator.integers(size, size=(2, 2)))
            maze.find_shortest_path(start, goal)
        return SINGLES

    return turn


def speed(sizes: list[int], rounds: int) -> list[dict[str, str]]:
    """A row for each size and peer: the median and fifths of mazes per second over the rounds, peers taking turns."""
    table = []
    for size in sizes:
        peers = {"tenfold": ours(size), "maze-dataset": theirs(size)}
        rates: dict[str, list[float]] = {name: [] for name, turn in peers.items() if callable(turn)}
        for done in range(rounds + 1):
            for name in rates:
                started = time.perf_counter()
                count = peers[name]()
                if done:  # the first is the warm-up
                    rates[name].append(count / (time.perf_counter() - started))
        for name, turn in peers.items():
            row = {"size": str(size), "peer": name, "mazes_per_s": "-", "p20": "-", "p80": "-", "note": ""}
            if name in rates:
                fifths = statistics.quantiles(rates[name], n=5, method="inclusive")
                values = {"mazes_per_s": statistics.median(rates[name]), "p20": fifths[0], "p80": fifths[3]}
                row |= {key: f"{value:.0f}" for key, value in values.items()}
            else:
                row["note"] = str(turn)
            table.append(row)
            print("| " + " | ".join(row.values()) + " |", flush=True)
    return table


def curves(root: Path, file: Path) -> None:
    """Validation fork accuracy of every model and seed of a run over the seconds it had trained."""
    import json

    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    names: dict[str, str] = {}
    for folder in sorted(root.glob("*-seed*")):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        val = [row for row in rows if row["split"] == "val"]
        model = folder.name.rpartition("-seed")[0]
        known = model in names
        color = names.setdefault(model, f"C{len(names)}")
        seconds, score = [row["elapsed"] for row in val], [row["fork_accuracy"] for row in val]
        axes.plot(seconds, score, color=color, linewidth=1.2, label=None if known else model)
    if not names:
        raise SystemExit(f"error: {root} holds no folders as poh-seed0; give the folder of a run of train/maze.py")
    axes.set(xlabel="seconds of training", ylabel="fork accuracy on validation mazes")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("speed")
    part.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    part.add_argument("--rounds", type=int, default=7)
    part.add_argument("--csv", type=Path, help="also write the table here")
    part = parts.add_parser("curves")
    part.add_argument("run", type=Path)
    part.add_argument("--png", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    if arguments.part == "curves":
        curves(arguments.run, arguments.png)
        return
    facts = machine("cpu")
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()), "\n")
    print("| size | peer | mazes per s | 20 % | 80 % | note |\n|---|---|---|---|---|---|")
    table = speed(list(arguments.sizes), arguments.rounds)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*table[0], *facts])
            writer.writeheader()
            writer.writerows(row | facts for row in table)


if __name__ == "__main__":
    main()
