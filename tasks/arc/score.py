"""Scores of answers: of one question, and of puzzles under the three rules in use, with intervals.

Every score here is of an answer that was said freely, its shape included.

The rules, for answers of which the first k count (pass@k) or any (oracle):

    puzzles         the share of puzzles all of whose test inputs are solved: the official rule
    mean_of_puzzles the mean over puzzles of the share of their test inputs that are solved
    questions       the share of all test inputs that are solved
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks.arc.formats import Answers, Solutions
from tasks.arc.grid import Grid

PASSES = (1, 2, 10)
RESAMPLES = 10_000
SCORES = (
    "exact",
    "shape",
    "cell_accuracy",
    "change_accuracy",
    "copy_rate",
    "change_recall",
    "change_precision",
    "change_f1",
)


def question_scores(answer: Grid | None, target: Grid, source: Grid | None = None) -> dict[str, float]:
    """SCORES of one answer; None is no answer, and right in nothing.

    exact: every cell, and so the shape. shape: the shape. cell_accuracy: the share of cells, 0 for another shape.

    Where the query's input `source` has the target's shape, and NaN elsewhere (0 for an answer of another shape):
        change_accuracy: P(answer == target | target != source), the right changes
        copy_rate: P(answer == source) over all cells
        change_recall, change_precision, change_f1: of changing what has to change, whatever into
    These are NaN too where they divide by nothing: where no cell has to change, or none is changed.
    """
    shape = answer is not None and answer.shape == target.shape
    right = answer == target if shape else np.zeros(target.shape, dtype=bool)
    scores = {"exact": float(right.all()), "shape": float(shape), "cell_accuracy": float(right.mean())}
    if source is None or source.shape != target.shape:
        return scores | dict.fromkeys(SCORES[3:], np.nan)
    due = target != source
    done = answer != source if shape else np.zeros_like(due)
    found = (due & done).sum()
    return scores | {
        "change_accuracy": _share((right & due).sum(), due.sum()),
        "copy_rate": float((~done).mean()) if shape else 0.0,
        "change_recall": _share(found, due.sum()),
        "change_precision": _share(found, done.sum()),
        "change_f1": _share(2 * found, due.sum() + done.sum()),
    }


def _share(part: np.integer, whole: np.integer) -> float:
    return float(part / whole) if whole else np.nan


def mean_scores(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every score over the questions where it is defined; NaN where it is nowhere."""
    rows = list(rows)
    means = {}
    for name in SCORES:
        known = [row[name] for row in rows if not np.isnan(row[name])]
        means[name] = float(np.mean(known)) if known else np.nan
    return means


# ---- puzzles ---------------------------------------------------------------------------------------------------------


def score(solutions: Solutions, answers: Answers, sources: Solutions | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Everything about answers to puzzles, ready for JSON: NaN is None.

    Args:
        answers: of every puzzle in `solutions`, for each test input what is tried, best first.
        sources: the test inputs, for the scores of `question_scores` that need them.

    Returns:
        puzzles, questions, candidates (the most tried for a test input); "pass@k" for the k of PASSES that there are
        candidates for, and "oracle", each {rule: {"value", "low", "high"}} with a 95 % bootstrap interval over puzzles;
        "first": `mean_scores` of the first answers.
    """
    rank = first_right(solutions, answers)
    candidates = max((len(tried) for tests in answers.values() for tried in tests), default=0)
    limits = {f"pass@{k}": k for k in PASSES if k <= max(candidates, 1)} | {"oracle": max(candidates, 1)}
    rows = []
    for id, targets in solutions.items():
        inputs = [None] * len(targets) if sources is None else sources[id]
        for tried, target, source in zip(answers[id], targets, inputs, strict=True):
            rows.append(question_scores(tried[0] if tried else None, target, source))
    return {
        "puzzles": len(rank),
        "questions": len(rows),
        "candidates": candidates,
        **{name: rules([ranks < k for ranks in rank.values()], seed) for name, k in limits.items()},
        "first": {name: None if np.isnan(mean) else mean for name, mean in mean_scores(rows).items()},
    }


def first_right(solutions: Solutions, answers: Answers) -> dict[str, np.ndarray]:
    """Of a puzzle, for each test input: how many answers are tried before the right one; infinity if none is."""
    rank = {}
    for id, targets in solutions.items():
        if len(answers[id]) != len(targets):
            raise ValueError(f"puzzle {id}: answers to {len(answers[id])} test inputs; it has {len(targets)}")
        places = [_place(target, tried) for target, tried in zip(targets, answers[id], strict=True)]
        rank[id] = np.array(places, dtype=np.float64)
    return rank


def _place(target: Grid, tried: Sequence[Grid]) -> float:
    return next((i for i, grid in enumerate(tried) if np.array_equal(grid, target)), np.inf)


def rules(solved: Sequence[np.ndarray], seed: int = 0) -> dict[str, dict[str, float]]:
    """The three rules, with their intervals. solved: bool [test inputs] of each puzzle, one test input or more."""
    if not solved or not all(len(of) for of in solved):
        raise ValueError("nothing to score: at least one puzzle is needed, and a test input in each")
    rows = np.array([(of.sum(), len(of)) for of in solved])  # [puzzles, (solved, asked)]
    # Puzzles of like outcome are interchangeable, so how many of each kind a resample has says all about it: some ten
    # kinds, where thousands of puzzles would take gigabytes.
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(rows), counts / len(rows), size=RESAMPLES)
    drawn = np.concatenate([counts[None], drawn])  # [1 + RESAMPLES, kinds], the sample itself first
    hits, asked = kinds.T
    values = {
        "puzzles": drawn @ (hits == asked) / len(rows),
        "mean_of_puzzles": drawn @ (hits / asked) / len(rows),
        "questions": (drawn @ hits) / (drawn @ asked),
    }
    return {name: _interval(value) for name, value in values.items()}


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}
