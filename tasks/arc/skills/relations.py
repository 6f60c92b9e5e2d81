"""Lines between things: join markers, shoot rays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import Grid, Pair
from tasks.arc.skills.base import Skill, between, paint, paints, pick, shifted

ORTHOGONAL, DIAGONAL = ((0, 1), (1, 0)), ((1, 1), (1, -1))
COMPASS = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def _spots(rng: Generator, grid: Grid, count: int, colours: Sequence[int]) -> None:
    """Colour `count` cells, anywhere."""
    for u, v in rng.random((count, 2)).tolist():
        grid[int(u * grid.shape[0]), int(v * grid.shape[1])] = pick(rng, colours)


class Connect(Skill):
    """Join markers of one colour with a line of another: those in a row or column, or those on a diagonal."""

    name = "connect"

    def rules(self) -> tuple[tuple[int, bool], ...]:
        return tuple((colour, diagonal) for colour in range(1, 10) for diagonal in (False, True))

    def candidates(self, pairs: Sequence[Pair]) -> list[tuple[int, bool]]:
        return [(colour, diagonal) for colour in paints(pairs[0]) for diagonal in (False, True)]

    def draw(self, rule: tuple[int, bool], rng: Generator, size: int) -> Grid:
        height, width = between(rng, 4, size), between(rng, 4, size)
        grid = np.zeros((height, width), dtype=np.uint8)
        colours = paint(rng, between(rng, 1, 3), but=[rule[0]])
        own = DIAGONAL if rule[1] else ORTHOGONAL
        for _ in range(between(rng, 1, max(1, size // 4))):
            dy, dx = pick(rng, own if rng.random() < 0.7 else ORTHOGONAL + DIAGONAL)
            steps = between(rng, 2, min(height if dy else width, width if dx else height) - 1)
            r = between(rng, 0, height - 1 - dy * steps)
            c = between(rng, max(0, -dx) * steps, width - 1 - max(0, dx) * steps)
            grid[[r, r + dy * steps], [c, c + dx * steps]] = pick(rng, colours)
        _spots(rng, grid, between(rng, 0, 2), colours)
        return grid

    def apply(self, rule: tuple[int, bool], grid: Grid) -> Grid:
        colour, diagonal = rule
        out = grid.copy()
        for (r, c), (y, x) in combinations(np.argwhere(grid).tolist(), 2):
            if grid[r, c] == grid[y, x] and (abs(y - r) == abs(x - c) if diagonal else y == r or x == c):
                steps = max(y - r, abs(x - c))
                line = np.arange(1, steps)
                line = r + line * (y - r) // steps, c + line * ((x > c) - (x < c))
                out[line] = np.where(grid[line] == 0, colour, grid[line])
        return out

    def solve(self, rule: tuple[int, bool], grid: Grid) -> Grid:
        colour, diagonal = rule
        between_two = np.zeros(grid.shape, dtype=bool)
        for marker in set(grid.ravel().tolist()) - {0}:
            for dy, dx in DIAGONAL if diagonal else ORTHOGONAL:
                sides = []
                for sign in (1, -1):  # cells with a marker somewhere behind them
                    passed = np.zeros(grid.shape, dtype=bool)
                    for _ in range(max(grid.shape)):
                        passed = shifted(passed | (grid == marker), sign * dy, sign * dx)
                    sides.append(passed)
                between_two |= sides[0] & sides[1]
        return np.where(between_two & (grid == 0), np.uint8(colour), grid)


class Shoot(Skill):
    """From every cell of one colour, shoot a ray of that colour in one of eight directions until something stops it."""

    name = "shoot"

    def rules(self) -> tuple[tuple[int, int], ...]:
        return tuple((colour, direction) for colour in range(1, 10) for direction in range(8))

    def candidates(self, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        return [(colour, direction) for colour in paints(pairs[0]) for direction in range(8)]

    def draw(self, rule: tuple[int, int], rng: Generator, size: int) -> Grid:
        height, width = between(rng, 4, size), between(rng, 4, size)
        grid = np.zeros((height, width), dtype=np.uint8)
        _spots(rng, grid, between(rng, 1, 2 + height * width // 16), paint(rng, 3, but=[rule[0]]))
        _spots(rng, grid, between(rng, 1, 3), rule[:1])
        return grid

    def apply(self, rule: tuple[int, int], grid: Grid) -> Grid:
        colour, direction = rule
        dy, dx = COMPASS[direction]
        free, tip = grid == 0, grid == colour
        out = grid.copy()
        while (tip := shifted(tip, dy, dx) & free).any():
            out[tip] = colour
        return out

    def solve(self, rule: tuple[int, int], grid: Grid) -> Grid:
        colour, direction = rule
        dy, dx = COMPASS[direction]
        out = grid.copy()
        for r, c in np.argwhere(grid == colour).tolist():
            r, c = r + dy, c + dx
            while 0 <= r < grid.shape[0] and 0 <= c < grid.shape[1] and not grid[r, c]:
                out[r, c] = colour
                r, c = r + dy, c + dx
        return out
