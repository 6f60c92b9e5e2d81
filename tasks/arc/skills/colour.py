"""Changing colours and nothing else: one by one, or by the size of a piece."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import NUM_COLOURS, Grid, Pair
from tasks.arc.skills.base import Skill, between, noise, paint
from tasks.arc.skills.pieces import blob, labelled, listed, scatter

RANKS = 3
UNUSED = NUM_COLOURS


class ColourMap(Skill):
    """Give each of a few colours another one in its place, no two the same; some may stay."""

    name = "colour_map"
    colours = "all"
    smallest = 3

    def sample(self, rng: Generator, size: int) -> tuple[int, ...]:
        """The new colour of each of the ten, `UNUSED` for those of which nothing is known."""
        old = rng.permutation(NUM_COLOURS)[: between(rng, 2, 5)]
        among_them = rng.random() < 0.5
        new = np.roll(old, between(rng, 1, len(old) - 1)) if among_them else rng.permutation(NUM_COLOURS)[: len(old)]
        rule = np.full(NUM_COLOURS, UNUSED)
        rule[old] = new
        return tuple(rule.tolist())

    def candidates(self, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
        """What the pairs show and no more: on any other colour it says nothing."""
        if any(x.shape != y.shape for x, y in pairs):
            return []
        changes = {change for x, y in pairs for change in zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)}
        rule = dict(changes)
        one_to_one = len(changes) == len(rule) == len(set(rule.values()))
        return [tuple(rule.get(colour, UNUSED) for colour in range(NUM_COLOURS))] if one_to_one else []

    def draw(self, rule: tuple[int, ...], rng: Generator, size: int) -> Grid:
        old = rng.permutation([colour for colour in range(NUM_COLOURS) if rule[colour] != UNUSED])
        grid = noise(rng, between(rng, 2, size), between(rng, 2, size), old)
        grid.ravel()[rng.permutation(grid.size)[: len(old)]] = old[: grid.size]  # all of them show
        return grid

    def apply(self, rule: tuple[int, ...], grid: Grid) -> Grid | None:
        out = np.array(rule, dtype=np.uint8)[grid]
        return None if out.max() == UNUSED else out

    def solve(self, rule: tuple[int, ...], grid: Grid) -> Grid | None:
        if any(rule[cell] == UNUSED for row in grid.tolist() for cell in row):
            return None
        out = np.zeros_like(grid)
        for old, new in enumerate(rule):
            out += np.uint8(new) * (grid == old)
        return out


class SizeRank(Skill):
    """Give the largest of three pieces one colour, the middle one another and the smallest a third."""

    name = "size_rank"
    smallest = 7

    def rules(self) -> tuple[tuple[int, ...], ...]:
        colours = range(1, NUM_COLOURS)
        return tuple((a, b, c) for a in colours for b in colours for c in colours if len({a, b, c}) == RANKS)

    def sample(self, rng: Generator, size: int) -> tuple[int, ...]:
        return tuple(paint(rng, RANKS))

    def candidates(self, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
        """One pair shows all three colours."""
        x, y = pairs[0]
        if x.shape != y.shape:
            return []
        pieces, count = labelled(x)
        cells = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
        first = np.unique(pieces, return_index=True)[1][-count:] if count == RANKS else []
        rule = tuple(y.ravel()[first][(-cells).argsort()].tolist()) if count == RANKS else ()
        return [rule] if len(set(rule) - {0}) == RANKS else []

    def draw(self, rule: tuple[int, ...], rng: Generator, size: int) -> Grid:
        cells = rng.permutation(np.arange(1, 3 + size))[:RANKS]
        masks = [blob(rng, n, size // 2 + 1) for n in sorted(cells.tolist(), reverse=True)]
        colours = paint(rng, 1, but=rule) * RANKS
        return scatter(rng, between(rng, size - 2, size), between(rng, size - 2, size), masks, colours)

    def apply(self, rule: tuple[int, ...], grid: Grid) -> Grid | None:
        pieces, count = labelled(grid)
        cells = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
        if count != RANKS or len(set(cells.tolist())) < RANKS:
            return None
        colours = np.zeros(RANKS + 1, dtype=np.uint8)
        colours[1:][(-cells).argsort()] = rule
        return colours[pieces]

    def solve(self, rule: tuple[int, ...], grid: Grid) -> Grid | None:
        pieces = sorted(listed(grid), key=len, reverse=True)
        if len(pieces) != RANKS or len({len(piece) for piece in pieces}) < RANKS:
            return None
        out = np.zeros_like(grid)
        for colour, piece in zip(rule, pieces, strict=True):
            for cell in piece:
                out[cell] = colour
        return out
