"""Moving cells about: reflect, rotate, shift, gravity."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import Grid
from tasks.arc.skills.base import Skill, between, coloured, noise, paint


class Reflect(Skill):
    """Mirror the grid: top and bottom, left and right, or over one of the diagonals."""

    name = "reflect"
    colours = "all"
    smallest = 3

    def rules(self) -> tuple[str, ...]:
        return ("rows", "columns", "diagonal", "antidiagonal")

    def draw(self, rule: str, rng: Generator, size: int) -> Grid:
        return coloured(rng, between(rng, 2, size), between(rng, 2, size))

    def apply(self, rule: str, grid: Grid) -> Grid:
        return {"rows": grid[::-1], "columns": grid[:, ::-1], "diagonal": grid.T, "antidiagonal": grid[::-1, ::-1].T}[
            rule
        ]

    def solve(self, rule: str, grid: Grid) -> Grid:
        height, width = grid.shape
        source = {
            "rows": lambda r, c: (height - 1 - r, c),
            "columns": lambda r, c: (r, width - 1 - c),
            "diagonal": lambda r, c: (c, r),
            "antidiagonal": lambda r, c: (height - 1 - c, width - 1 - r),
        }[rule]
        shape = (width, height) if "diagonal" in rule else (height, width)
        return grid[source(*np.indices(shape))]


class Rotate(Skill):
    """Turn the grid by one, two or three quarters."""

    name = "rotate"
    colours = "all"
    smallest = 3

    def rules(self) -> tuple[int, ...]:
        return (1, 2, 3)

    def draw(self, rule: int, rng: Generator, size: int) -> Grid:
        return coloured(rng, between(rng, 2, size), between(rng, 2, size))

    def apply(self, rule: int, grid: Grid) -> Grid:
        return np.rot90(grid, rule)

    def solve(self, rule: int, grid: Grid) -> Grid:
        rows = grid.tolist()
        for _ in range(rule):  # the last column becomes the first row
            rows = list(zip(*rows, strict=True))[::-1]
        return np.array(rows, dtype=np.uint8)


class Shift(Skill):
    """Move every cell by the same few rows and columns; what leaves on one side comes in on the other."""

    name = "shift"
    colours = "all"
    smallest = 4

    def rules(self) -> tuple[tuple[int, int], ...]:
        return tuple((dy, dx) for dy in range(-3, 4) for dx in range(-3, 4) if (dy, dx) != (0, 0))

    def draw(self, rule: tuple[int, int], rng: Generator, size: int) -> Grid:
        return coloured(rng, between(rng, 3, size), between(rng, 3, size))

    def apply(self, rule: tuple[int, int], grid: Grid) -> Grid:
        (dy, dx), (height, width) = rule, grid.shape
        rows = np.concatenate((grid[height - dy % height :], grid[: height - dy % height]))
        return np.concatenate((rows[:, width - dx % width :], rows[:, : width - dx % width]), axis=1)

    def solve(self, rule: tuple[int, int], grid: Grid) -> Grid:
        (dy, dx), (height, width) = rule, grid.shape
        out = np.empty_like(grid)
        for r in range(height):
            for c in range(width):
                out[(r + dy) % height, (c + dx) % width] = grid[r, c]
        return out


class Gravity(Skill):
    """Let every coloured cell fall to one side until it lies on another or on the edge."""

    name = "gravity"

    def rules(self) -> tuple[int, ...]:
        return (0, 1, 2, 3)  # quarters, clockwise, from down: down, left, up, right

    def draw(self, rule: int, rng: Generator, size: int) -> Grid:
        height, width = between(rng, 3, size), between(rng, 3, size)
        things = noise(rng, height, width, paint(rng, between(rng, 1, 4)))
        return things * (rng.random((height, width)) < rng.uniform(0.15, 0.5))

    def apply(self, rule: int, grid: Grid) -> Grid:
        upright = np.rot90(grid, rule)
        order = np.argsort(upright != 0, axis=0, kind="stable")
        return np.rot90(np.take_along_axis(upright, order, 0), -rule)

    def solve(self, rule: int, grid: Grid) -> Grid:
        lines = (grid.T if rule in (0, 2) else grid).tolist()
        fallen = []
        for line in lines:
            things = [cell for cell in line if cell]
            empty = [0] * (len(line) - len(things))
            fallen.append(empty + things if rule in (0, 3) else things + empty)
        out = np.array(fallen, dtype=np.uint8)
        return out.T if rule in (0, 2) else out
