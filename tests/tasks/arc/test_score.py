"""Scores worked out by hand, the three rules where they differ, and intervals that cover."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tasks.arc.score import SCORES, first_right, mean_scores, question_scores, rules, score


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], dtype=np.uint8)


SOURCE, TARGET = grid("0000", "0000"), grid("0012", "0034")
CHANGES = SCORES[3:]


@pytest.mark.parametrize(
    ("answer", "scores"),
    [  # exact, shape, cells, change accuracy, copy rate, recall, precision, f1
        (TARGET, (1, 1, 1, 1, 1 / 2, 1, 1, 1)),
        (SOURCE, (0, 1, 1 / 2, 0, 1, 0, math.nan, 0)),
        # four due, three done: one in the right colour, one in another, one where nothing was due
        (grid("5011", "0000"), (0, 1, 4 / 8, 1 / 4, 5 / 8, 2 / 4, 2 / 3, 4 / 7)),
        (grid("00", "00", "00", "00"), (0, 0, 0, 0, 0, 0, math.nan, 0)),
        (None, (0, 0, 0, 0, 0, 0, math.nan, 0)),
    ],
    ids=["right", "copied", "partly", "transposed", "none"],
)
def test_scores_of_a_question_worked_out_by_hand(answer, scores):
    assert question_scores(answer, TARGET, SOURCE) == pytest.approx(
        dict(zip(SCORES, scores, strict=True)), nan_ok=True, abs=1e-12
    )


@pytest.mark.parametrize("source", [None, grid("00", "00"), grid("00120034"), TARGET.T])
def test_change_is_scored_only_between_grids_of_one_shape(source):
    """The original compared flat prefixes, so that the third of these sources would count as copied."""
    scores = question_scores(TARGET, TARGET, source)
    assert scores["exact"] == 1 and all(math.isnan(scores[name]) for name in CHANGES)


def test_a_shape_is_part_of_the_answer():
    """One row of the same cells is not the grid."""
    scores = question_scores(TARGET.reshape(1, -1), TARGET, SOURCE)
    assert scores["exact"] == scores["shape"] == scores["cell_accuracy"] == 0


def test_nothing_to_change_leaves_change_accuracy_undefined():
    scores = question_scores(SOURCE, SOURCE, SOURCE)
    assert math.isnan(scores["change_accuracy"]) and math.isnan(scores["change_f1"]) and scores["copy_rate"] == 1
    assert question_scores(TARGET, SOURCE, SOURCE)["change_precision"] == 0


def test_means_leave_out_what_is_undefined():
    rows = [question_scores(TARGET, TARGET, SOURCE), question_scores(SOURCE, TARGET, None)]
    means = mean_scores(rows)
    assert means["exact"] == 0.5 and means["change_accuracy"] == 1
    assert math.isnan(mean_scores(rows[1:])["copy_rate"]) and math.isnan(mean_scores([])["exact"])


# ---- puzzles ---------------------------------------------------------------------------------------------------------


def numbered(n: int) -> np.ndarray:
    return np.full((1, 1), n, dtype=np.uint8)


def solutions_and_answers(ranks: dict[str, list[int | None]], tried: int):
    """Right answers at the places given, none where that is None; all others are wrong."""
    right = numbered(9)
    solutions = {id: [right] * len(places) for id, places in ranks.items()}
    answers = {
        id: [[right if i == place else numbered(i % 9) for i in range(tried)] for place in places]
        for id, places in ranks.items()
    }
    return solutions, answers


def values(result: dict) -> list[float]:
    return [result[rule]["value"] for rule in ("puzzles", "mean_of_puzzles", "questions")]


def test_the_three_rules_and_passes():
    ranks = {"a": [0], "b": [0, None, 1], "c": [5, 1], "d": [11]}
    result = score(*solutions_and_answers(ranks, tried=12))
    assert (result["puzzles"], result["questions"], result["candidates"]) == (4, 7, 12)
    assert values(result["pass@1"]) == pytest.approx([1 / 4, (1 + 1 / 3) / 4, 2 / 7])
    assert values(result["pass@2"]) == pytest.approx([1 / 4, (1 + 2 / 3 + 1 / 2) / 4, 4 / 7])
    assert values(result["pass@10"]) == pytest.approx([2 / 4, (1 + 2 / 3 + 1) / 4, 5 / 7])
    assert values(result["oracle"]) == pytest.approx([3 / 4, (1 + 2 / 3 + 1 + 1) / 4, 6 / 7])
    assert result["first"]["exact"] == pytest.approx(2 / 7) and result["first"]["copy_rate"] is None
    json.dumps(result, allow_nan=False)


def test_a_pass_that_nobody_tried_is_not_reported():
    result = score(*solutions_and_answers({"a": [1]}, tried=2))
    assert "pass@2" in result and "pass@10" not in result
    assert values(result["pass@1"]) == [0, 0, 0] and values(result["pass@2"]) == [1, 1, 1]


def test_sources_give_the_scores_of_change():
    result = score({"a": [TARGET]}, {"a": [[SOURCE, TARGET]]}, {"a": [SOURCE]})
    assert result["first"]["copy_rate"] == 1 and result["first"]["change_accuracy"] == 0


def test_no_answer_is_a_wrong_one():
    result = score({"a": [TARGET], "b": [TARGET]}, {"a": [[]], "b": [[TARGET]]})
    assert values(result["pass@1"]) == [0.5] * 3 and result["first"]["exact"] == 0.5


def test_answers_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="puzzle a: answers to 2 test inputs; it has 1"):
        first_right({"a": [TARGET]}, {"a": [[TARGET], [TARGET]]})
    for solutions in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one puzzle is needed, and a test input in each"):
            score(solutions, {"a": []})


def test_intervals_are_of_puzzles_drawn_again():
    """Against resampling written out, of puzzles whose test inputs differ in number."""
    rng = np.random.default_rng(1)
    solved = [rng.random(1 + i % 3) < 0.3 for i in range(60)]
    found = rules(solved)
    drawn = rng.integers(60, size=(10_000, 60))
    hits, asked = (np.array([f(of) for of in solved]) for f in (sum, len))
    for name, shares in (
        ("puzzles", (hits == asked)[drawn].mean(1)),
        ("mean_of_puzzles", (hits / asked)[drawn].mean(1)),
        ("questions", hits[drawn].sum(1) / asked[drawn].sum(1)),
    ):
        low, high = np.quantile(shares, [0.025, 0.975])
        assert found[name]["low"] == pytest.approx(low, abs=0.017) and found[name]["high"] == pytest.approx(
            high, abs=0.017
        )
    assert rules(solved) == found != rules(solved, seed=1)


def test_all_or_nothing_has_no_spread():
    for right in (False, True):
        assert set(rules([np.array([right])] * 5)["puzzles"].values()) == {float(right)}
