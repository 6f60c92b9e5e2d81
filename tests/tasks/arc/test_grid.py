"""Grids are checked to the cell, canvases hold them, and a puzzle asks one question a test input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.arc.grid import (
    PAD,
    Episode,
    Pair,
    Puzzle,
    canvas,
    checked_grid,
    episode_hash,
    from_canvas,
    grid_hash,
    leave_one_out,
    questions,
    shapes,
)


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], dtype=np.uint8)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([[0, 1], [2]], "row 1 has 1 cells and row 0 has 2"),
        ([[0, 1], [2, 10]], r"cell \(1, 1\) is 10; a colour is a whole number, 0 to 9"),
        ([[0, -1]], r"cell \(0, 1\) is -1"),
        ([[0, True]], r"cell \(0, 1\) is True"),
        ([[0, 1.0]], r"cell \(0, 1\) is 1.0"),
        ([["1"]], r"cell \(0, 0\) is '1'"),
        ([[0] * 31], "1 x 31 cells; a grid has 1 to 30 each way"),
        ([[0]] * 31, "31 x 1 cells"),
        ([[]], "1 x 0 cells"),
        ([], r"not \[\]"),
        ([0, 1], r"not \[0, 1\]"),
        ("012", "not '012'"),
        (None, "not None"),
        (np.zeros(3, dtype=int), r"not \[0, 0, 0\]"),
    ],
)
def test_a_bad_grid_is_refused_with_its_place(value, sentence):
    with pytest.raises(ValueError, match=f"^puzzle p, test pair 0: .*{sentence}"):
        checked_grid(value, "puzzle p, test pair 0")


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (30, 30), (3, 7)])
def test_grids_of_every_shape_go_through_lists_and_canvases(size):
    value = np.random.default_rng(0).integers(0, 10, size)
    found = checked_grid(value, "here")
    assert found.dtype == np.uint8 and np.array_equal(found, value)
    assert np.array_equal(found, checked_grid(value.tolist(), "here"))
    held = canvas(found, 30)
    assert np.array_equal(from_canvas(held), found)
    assert tuple(int(n) for n in shapes(held)) == size


def test_no_grid_is_an_empty_canvas():
    empty = canvas(None, 4)
    assert (empty == PAD).all()
    assert [int(n) for n in shapes(empty)] == [0, 0]
    with pytest.raises(ValueError, match="rectangle"):
        from_canvas(empty)


@pytest.mark.parametrize("cell", [(0, 0), (1, 1), (3, 3)])
def test_a_canvas_with_a_hole_or_a_crumb_holds_no_grid(cell):
    held = canvas(grid("123", "456"), 4)
    held[cell] = 0 if held[cell] == PAD else PAD
    with pytest.raises(ValueError, match="rectangle"):
        from_canvas(held)


def test_shapes_of_many_canvases():
    held = torch.stack([torch.stack([canvas(grid("12"), 3), canvas(None, 3)])])  # [1, 2, 3, 3]
    height, width = shapes(held)
    assert height.tolist() == [[1, 0]] and width.tolist() == [[2, 0]]


def test_questions_of_a_puzzle():
    pairs = [Pair(grid(str(i)), grid(str(i + 1))) for i in range(4)]
    puzzle = Puzzle("p", tuple(pairs[:2]), (pairs[2], Pair(grid("3"), None)))
    assert questions(puzzle) == [Episode("p/0", puzzle.train, pairs[2]), Episode("p/1", puzzle.train, puzzle.test[1])]
    assert leave_one_out(puzzle) == [
        Episode("p/demo0", (pairs[1],), pairs[0]),
        Episode("p/demo1", (pairs[0],), pairs[1]),
    ]


def test_hashes_tell_shapes_order_and_missing_grids_apart():
    a, b = grid("12", "34"), grid("1234")
    hashes = [grid_hash(x) for x in ([a], [b], [a, b], [b, a], [a, None], [])]
    assert len(set(hashes)) == len(hashes)
    assert grid_hash([a]) == grid_hash([a.T.copy().T])
    one, other = (Episode(id, (Pair(a, b),), Pair(b, a)) for id in ("one", "other"))
    assert episode_hash(one) == episode_hash(other) != episode_hash(one._replace(query=Pair(b, None)))
