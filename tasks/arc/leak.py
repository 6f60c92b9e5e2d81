"""Whether what a model was trained on holds what it is asked: by id, by hash, and under other colours or another side.

ARC-AGI-2's training set has 376 of the 400 evaluation puzzles of ARC-AGI-1, their pairs in another order, so comparing
files finds none of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tasks.arc.grid import Grid, Pair, Puzzle, grid_hash

# Of the square: steps down the rows and along the columns, and whether these change places.
SYMMETRIES = tuple(itertools.product((1, -1), (1, -1), (False, True)))


class Leak(NamedTuple):
    """Ids of the held-out puzzles that are among the others, by what gives them away."""

    ids: list[str]  # the same id
    exact: list[str]  # the same demonstrations and test inputs, in any order
    canonical: list[str]  # the same after a reflection or rotation and a permutation of the colours
    questions: list[str]  # a test input, with its answer where both are known, is a pair of any puzzle

    @property
    def all(self) -> list[str]:
        """All that are given away."""
        return sorted({*self.ids, *self.exact, *self.canonical, *self.questions})


def compare(known: Iterable[Puzzle], asked: Iterable[Puzzle]) -> Leak:
    """What of the puzzles `asked` is among those `known`. Seconds for 1,400 of them."""
    known, asked = list(known), list(asked)
    pairs = [pair for puzzle in known for pair in (*puzzle.train, *puzzle.test)]
    answered, inputs = {grid_hash(pair) for pair in pairs}, {grid_hash(pair[:1]) for pair in pairs}

    def given_away(key: Callable[[Puzzle], str]) -> list[str]:
        keys = {key(puzzle) for puzzle in known}
        return sorted(puzzle.id for puzzle in asked if key(puzzle) in keys)

    def shown(question: Pair) -> bool:
        return grid_hash(question[:1]) in inputs if question.output is None else grid_hash(question) in answered

    return Leak(
        ids=given_away(lambda puzzle: puzzle.id),
        exact=given_away(exact_hash),
        canonical=given_away(canonical_hash),
        questions=sorted(puzzle.id for puzzle in asked if any(shown(pair) for pair in puzzle.test)),
    )


def without_leaks(known: Iterable[Puzzle], asked: Iterable[Puzzle]) -> tuple[list[Puzzle], list[str]]:
    """Of the puzzles `known` those that give nothing of `asked` away by `compare`, and the ids of the others."""
    known, asked = list(known), list(asked)
    theirs = {key(puzzle) for puzzle in asked for key in KEYS}
    tests = [pair for puzzle in asked for pair in puzzle.test]
    theirs |= {grid_hash(pair if pair.output is not None else pair[:1]) for pair in tests}

    def tells(puzzle: Puzzle) -> bool:
        pairs = (*puzzle.train, *puzzle.test)
        own = {key(puzzle) for key in KEYS} | {grid_hash(pair[:n]) for pair in pairs for n in (1, 2)}
        return not theirs.isdisjoint(own)

    leaking = [puzzle.id for puzzle in known if tells(puzzle)]
    return [puzzle for puzzle in known if puzzle.id not in set(leaking)], leaking


def exact_hash(puzzle: Puzzle) -> str:
    """Of the demonstrations and the test inputs, in whatever order. Not of the answers, which some files leave out."""
    return _digest(sorted(grid_hash(pair) for pair in _pairs(puzzle)))


def canonical_hash(puzzle: Puzzle) -> str:
    """The same for all the puzzles that a symmetry of the square, a permutation of the ten colours, and other orders of
    demonstrations and test inputs make of this one.

    The names of colours must not depend on the order of pairs. So each pair is first drawn in names of its own, 0 for
    the colour that appears first in it; then a colour is named by the drawings it appears in and its name in each.
    Puzzles that differ only in how colours go round pairs of one drawing, six in one ring or three in each of two, come
    out the same too: a false alarm, never a miss.
    """
    pairs = _pairs(puzzle)
    return min(_colourless_hash([_turned(pair, *symmetry) for pair in pairs]) for symmetry in SYMMETRIES)


def _colourless_hash(pairs: list[list[Grid]]) -> str:
    drawn = [_first_appearance(grids) for grids in pairs]
    seen: dict[int, list[tuple[str, int]]] = {}
    for drawing, colours in drawn:
        for name, colour in enumerate(colours):
            seen.setdefault(colour, []).append((drawing, name))
    names = {colour: _digest(sorted(places)) for colour, places in seen.items()}
    return _digest(sorted((drawing, *(names[colour] for colour in colours)) for drawing, colours in drawn))


def _first_appearance(grids: list[Grid]) -> tuple[str, bytes]:
    """The hash of grids whose colours are numbered as they appear; and which colours these are."""
    cells = b"".join(grid.tobytes() for grid in grids)
    colours = bytes(dict.fromkeys(cells))
    names = bytes.maketrans(colours, bytes(range(len(colours))))
    return _digest([[grid.shape for grid in grids], cells.translate(names)]), colours


def _turned(pair: Pair, down: int, right: int, transposed: bool) -> list[Grid]:
    grids = [grid[::down, ::right] for grid in pair if grid is not None]
    return [grid.T for grid in grids] if transposed else grids


def _pairs(puzzle: Puzzle) -> list[Pair]:
    return [*puzzle.train, *(pair._replace(output=None) for pair in puzzle.test)]


def _digest(value: Sequence[object]) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


KEYS: tuple[Callable[[Puzzle], str], ...] = (lambda puzzle: puzzle.id, exact_hash, canonical_hash)
