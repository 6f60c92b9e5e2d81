"""Each baseline on a puzzle that it solves and one that it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.arc.baselines import BASELINES, baselines, guessed_shape, majority_colour, nearest_demo, repeat_previous_cell
from tasks.arc.grid import Episode, Pair


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], dtype=np.uint8)


def blank(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.uint8)


def shown(*demos: tuple[tuple[int, int], tuple[int, int]], query: tuple[int, int]) -> Episode:
    """Demonstrations and a query of these shapes."""
    return Episode("e", tuple(Pair(blank(*one), blank(*other)) for one, other in demos), Pair(blank(*query), None))


@pytest.mark.parametrize(
    ("episode", "shape"),
    [
        (shown(query=(3, 4)), (3, 4)),
        (shown(((2, 3), (2, 3)), ((5, 5), (5, 5)), query=(3, 4)), (3, 4)),
        (shown(((2, 3), (1, 1)), ((5, 5), (1, 1)), query=(3, 4)), (1, 1)),
        (shown(((2, 3), (6, 9)), ((3, 3), (9, 9)), query=(3, 4)), (9, 9)),
        (shown(((2, 2), (6, 6)), ((3, 3), (9, 9)), query=(4, 5)), (12, 15)),
        (shown(((4, 6), (2, 3)), ((6, 8), (3, 4)), query=(8, 2)), (4, 1)),
        (shown(((2, 2), (3, 3)), ((4, 4), (6, 6)), query=(6, 6)), (9, 9)),
        (shown(((2, 2), (3, 3)), ((4, 4), (6, 6)), query=(5, 6)), (5, 9)),  # 7.5 rows there cannot be
        (shown(((2, 2), (6, 6)), ((3, 3), (9, 9)), query=(11, 10)), (11, 30)),  # nor 33
        (shown(((2, 3), (2, 6)), ((4, 5), (4, 10)), query=(3, 4)), (3, 8)),
        (shown(((2, 2), (3, 3)), ((4, 4), (5, 5)), query=(6, 7)), (6, 7)),
    ],
)
def test_the_shape_that_demonstrations_suggest(episode, shape):
    assert guessed_shape(episode) == shape


EPISODE = Episode(
    "e",
    (Pair(grid("11", "11"), grid("22", "23")), Pair(grid("45", "67"), grid("33", "22"))),
    Pair(grid("45", "66"), grid("33", "21")),
)


def test_what_each_says():
    said = {name: of(EPISODE).tolist() for name, of in BASELINES.items()}
    assert said == {
        "copy_input": [[4, 5], [6, 6]],
        "majority_colour": [[2, 2], [2, 2]],  # five cells of eight
        "nearest_demo": [[3, 3], [2, 2]],
        "repeat_previous_cell_teacher_forced": [[2, 3], [3, 2]],
    }
    assert all(of(EPISODE).dtype == np.uint8 for of in BASELINES.values())


def test_the_nearest_demo_counts_cells_that_only_one_has():
    near, far = Pair(grid("45", "66", "99"), grid("1")), Pair(grid("45", "99"), grid("2"))
    assert nearest_demo(EPISODE._replace(demos=(far, near))).item() == 2  # two cells each: the first of several
    assert nearest_demo(EPISODE._replace(demos=(near, far))).item() == 1
    assert nearest_demo(EPISODE._replace(demos=(near, far._replace(input=grid("45", "69"))))).item() == 2


def test_without_demonstrations_all_that_is_known_is_the_query():
    alone = EPISODE._replace(demos=())
    assert np.array_equal(nearest_demo(alone), alone.query.input)
    assert majority_colour(alone).tolist() == [[6, 6], [6, 6]]


def test_teacher_forcing_gives_away_a_grid_of_one_colour():
    """Why a score under teacher forcing says little: the second upstream task of 400 constant answers is 'solved'."""
    constant = Episode("e", (Pair(grid("12"), grid("777")),), Pair(grid("3"), grid("77", "77")))
    assert np.array_equal(repeat_previous_cell(constant), constant.query.output)


def test_their_scores():
    found = baselines([EPISODE, EPISODE._replace(query=Pair(grid("11"), grid("11")))])
    assert found["copy_input"]["exact"] == 0.5 and found["copy_input"]["copy_rate"] == 1
    assert found["nearest_demo"]["cell_accuracy"] == pytest.approx(0.75 / 2)
    assert found["repeat_previous_cell_teacher_forced"]["shape"] == 1
    assert not any(math.isnan(value) for value in found["majority_colour"].values())
    with pytest.raises(ValueError, match="question e: the answer is not known"):
        baselines([EPISODE, EPISODE._replace(query=Pair(grid("1"), None))])
    with pytest.raises(ValueError, match="no question to score"):
        baselines([])
