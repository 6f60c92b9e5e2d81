"""Laying out what is there: tile, upscale, downscale, sort."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import NUM_COLOURS, Grid
from tasks.arc.skills.base import Rule, Skill, between, coloured, paint, pick

# Which copies along an axis are mirrored: none of them, or every other one.
COPIES = ((0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (1, 0, 1))


class Tile(Skill):
    """Lay two or three copies side by side, one above the other, or both; every other copy may be mirrored."""

    name = "tile"
    colours = "all"
    smallest = 4

    def rules(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        return tuple((rows, columns) for rows in COPIES for columns in COPIES if len(rows) * len(columns) > 1)

    def sample(self, rng: Generator, size: int) -> Rule:
        return pick(rng, [rule for rule in self.rules() if 2 * max(map(len, rule)) <= size])

    def draw(self, rule: Rule, rng: Generator, size: int) -> Grid:
        rows, columns = rule
        return coloured(rng, between(rng, 2, size // len(rows)), between(rng, 2, size // len(columns)))

    def apply(self, rule: Rule, grid: Grid) -> Grid:
        rows, columns = rule
        strip = np.concatenate([grid[::-1] if mirrored else grid for mirrored in rows])
        return np.concatenate([strip[:, ::-1] if mirrored else strip for mirrored in columns], axis=1)

    def solve(self, rule: Rule, grid: Grid) -> Grid:
        source = []
        for length, copies in zip(grid.shape, rule, strict=True):
            copy, place = np.divmod(np.arange(length * len(copies)), length)
            source.append(np.where(np.array(copies)[copy], length - 1 - place, place))
        return grid[np.ix_(*source)]


class Upscale(Skill):
    """Make every cell a block of 2 x 2, 3 x 3 or 4 x 4."""

    name = "upscale"
    colours = "all"
    smallest = 4

    def rules(self) -> tuple[int, ...]:
        return (2, 3, 4)

    def sample(self, rng: Generator, size: int) -> int:
        return between(rng, 2, min(4, size // 2))

    def draw(self, rule: int, rng: Generator, size: int) -> Grid:
        return coloured(rng, between(rng, 1, size // rule), between(rng, 2, size // rule))

    def apply(self, rule: int, grid: Grid) -> Grid:
        return grid.repeat(rule, 0).repeat(rule, 1)

    def solve(self, rule: int, grid: Grid) -> Grid:
        out = np.zeros((grid.shape[0] * rule, grid.shape[1] * rule), dtype=np.uint8)
        for r in range(rule):
            for c in range(rule):
                out[r::rule, c::rule] = grid
        return out


class Downscale(Skill):
    """Shrink every block of 2 x 2, 3 x 3 or 4 x 4 cells to the colour that most of them have."""

    name = "downscale"
    colours = "all"
    smallest = 4

    def rules(self) -> tuple[int, ...]:
        return (2, 3, 4)

    def sample(self, rng: Generator, size: int) -> int:
        return between(rng, 2, min(4, size // 2))

    def draw(self, rule: int, rng: Generator, size: int) -> Grid:
        big = (
            coloured(rng, between(rng, 1, size // rule), between(rng, 2, size // rule)).repeat(rule, 0).repeat(rule, 1)
        )
        other = coloured(rng, *big.shape)
        rank = rng.random((big.shape[0] // rule, big.shape[1] // rule, rule * rule)).argsort(-1)  # within each block
        rank = rank.reshape(*rank.shape[:2], rule, rule).swapaxes(1, 2).reshape(big.shape)
        return np.where(rank < between(rng, 0, (rule * rule - 1) // 2), other, big)

    def apply(self, rule: int, grid: Grid) -> Grid | None:
        height, width = grid.shape
        if height % rule or width % rule:
            return None
        blocks = grid.reshape(height // rule, rule, width // rule, rule).swapaxes(1, 2)
        counts = (blocks.reshape(height // rule, width // rule, -1, 1) == np.arange(NUM_COLOURS)).sum(2)
        if ((counts == counts.max(-1, keepdims=True)).sum(-1) > 1).any():
            return None
        return counts.argmax(-1).astype(np.uint8)

    def solve(self, rule: int, grid: Grid) -> Grid | None:
        height, width = grid.shape
        if height % rule or width % rule:
            return None
        out = np.empty((height // rule, width // rule), dtype=np.uint8)
        for r in range(0, height, rule):
            for c in range(0, width, rule):
                first, *others = Counter(grid[r : r + rule, c : c + rule].ravel().tolist()).most_common(2)
                if others and others[0][1] == first[1]:
                    return None
                out[r // rule, c // rule] = first[0]
        return out


class Sort(Skill):
    """Put the rows, or the columns, in the order of how many coloured cells they have, up or down."""

    name = "sort"

    def rules(self) -> tuple[tuple[str, bool], ...]:
        return tuple((axis, falling) for axis in ("rows", "columns") for falling in (False, True))

    def draw(self, rule: tuple[str, bool], rng: Generator, size: int) -> Grid:
        width = between(rng, 3, size)
        height = between(rng, 3, min(width + 1, size))
        counts = rng.permutation(width + 1)[:height, None]
        filled = rng.random((height, width)).argsort(1) < counts
        one_each = np.array(paint(rng, 9), dtype=np.uint8)[rng.integers(0, between(rng, 1, 5), (height, 1))]
        grid = one_each * filled
        return grid if rule[0] == "rows" else grid.T

    def apply(self, rule: tuple[str, bool], grid: Grid) -> Grid | None:
        axis, falling = rule
        lines = grid if axis == "rows" else grid.T
        counts = np.count_nonzero(lines, axis=1)
        order = counts.argsort()
        if not np.diff(counts[order]).all():
            return None  # a tie
        lines = lines[order[::-1] if falling else order]
        return lines if axis == "rows" else lines.T

    def solve(self, rule: tuple[str, bool], grid: Grid) -> Grid | None:
        axis, falling = rule
        lines = {}
        for line in grid.tolist() if axis == "rows" else zip(*grid.tolist(), strict=True):
            count = sum(cell > 0 for cell in line)
            if count in lines:
                return None
            lines[count] = line
        out = np.array([lines[count] for count in sorted(lines, reverse=falling)], dtype=np.uint8)
        return out if axis == "rows" else out.T
