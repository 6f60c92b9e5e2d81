"""Comparing panels: combine two, find the odd one out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import Grid, Pair
from tasks.arc.skills.base import Skill, between, paint

# What of (neither, the second alone, the first alone, both) is coloured.
TRUTH = {
    "and": (0, 0, 0, 1),
    "or": (0, 1, 1, 1),
    "xor": (0, 1, 1, 0),
    "first": (0, 0, 1, 0),
    "second": (0, 1, 0, 0),
    "neither": (1, 0, 0, 0),
}
PROPERTIES = ("shape", "colour", "count")


class Combine(Skill):
    """Lay two panels over one another and colour the cells that both, either, one or neither of them has."""

    name = "combine"

    def rules(self) -> tuple[tuple[str, bool, int], ...]:
        return tuple((op, stacked, colour) for op in TRUTH for stacked in (False, True) for colour in range(1, 10))

    def candidates(self, pairs: Sequence[Pair]) -> list[tuple[str, bool, int]]:
        colours = set(pairs[0].output.ravel().tolist()) - {0} or range(1, 10)
        return [(op, stacked, colour) for colour in colours for op in TRUTH for stacked in (False, True)]

    def draw(self, rule: tuple[str, bool, int], rng: Generator, size: int) -> Grid:
        _, stacked, _ = rule
        height, width = between(rng, 2, size), between(rng, 2, (size - 1) // 2)
        first, second, line = paint(rng, 3)
        panels = [
            (rng.random((height, width)) < rng.uniform(0.3, 0.7)) * np.uint8(colour) for colour in (first, second)
        ]
        grid = np.concatenate((panels[0], np.full((height, 1), line, np.uint8), panels[1]), axis=1)
        return grid.T if stacked else grid

    def apply(self, rule: tuple[str, bool, int], grid: Grid) -> Grid | None:
        op, stacked, colour = rule
        rows = grid if stacked else grid.T
        half, odd = divmod(len(rows), 2)
        if not odd or not half or not rows[half, 0] or (rows[half] != rows[half, 0]).any():
            return None
        case = 2 * (rows[:half] != 0) + (rows[half + 1 :] != 0)
        out = np.array(TRUTH[op], dtype=np.uint8)[case] * np.uint8(colour)
        return out if stacked else out.T

    def solve(self, rule: tuple[str, bool, int], grid: Grid) -> Grid | None:
        op, stacked, colour = rule
        rows = grid.tolist() if stacked else [list(column) for column in zip(*grid.tolist(), strict=True)]
        first, middle, second = rows[: len(rows) // 2], rows[len(rows) // 2], rows[len(rows) // 2 + 1 :]
        if len(first) != len(second) or not first or len(set(middle)) > 1 or not middle[0]:
            return None
        law = {
            "and": lambda a, b: a and b,
            "or": lambda a, b: a or b,
            "xor": lambda a, b: a is not b,
            "first": lambda a, b: a and not b,
            "second": lambda a, b: b and not a,
            "neither": lambda a, b: not (a or b),
        }[op]
        out = [
            [colour if law(a > 0, b > 0) else 0 for a, b in zip(*lines, strict=True)]
            for lines in zip(first, second, strict=True)
        ]
        out = np.array(out, dtype=np.uint8)
        return out if stacked else out.T


class OddPanel(Skill):
    """Of three or more panels take the one that differs from all others, which agree: in shape, colour or count."""

    name = "odd_panel"
    smallest = 8

    def rules(self) -> tuple[str, ...]:
        return PROPERTIES

    def draw(self, rule: str, rng: Generator, size: int) -> Grid:
        count = between(rng, 3, min(4, (size + 1) // 3))
        width = between(rng, 2, min(5, (size + 1) // count - 1))
        height = between(rng, 2, min(5, size))
        line, *colours = paint(rng, 1 + count)
        shapes = [rng.random((height, width)) < 0.5 for _ in range(count)]
        odd, decoy = rng.permutation(count)[:2].tolist()
        if rule == "shape":
            shapes = [shapes[k == odd] for k in range(count)]
        elif rule == "count":
            cells = rng.permutation(np.arange(1, height * width))[:2]
            order = rng.random((count, height, width)).reshape(count, -1).argsort(1).reshape(count, height, width)
            shapes = [order[k] < cells[int(k == odd)] for k in range(count)]
        elif rng.random() < 0.5:
            shapes = [shapes[k == decoy] for k in range(count)]
        if rule == "colour" or rng.random() < 0.5:
            colours = [colours[k == (odd if rule == "colour" else decoy)] for k in range(count)]
        border = np.full((height, 1), line, dtype=np.uint8)
        parts = [
            part for shape, colour in zip(shapes, colours, strict=True) for part in (border, shape * np.uint8(colour))
        ]
        grid = np.concatenate(parts[1:], axis=1)
        return grid if rng.random() < 0.5 else grid.T

    def apply(self, rule: str, grid: Grid) -> Grid | None:
        found = [panels for panels in (_panels(grid), _panels(grid.T)) if panels is not None]
        if len(found) != 1:
            return None
        panels = found[0]  # [P, H, W]
        if rule == "count":
            marks = (panels != 0).sum((1, 2))
        elif rule == "colour":
            marks = panels.max((1, 2))
        else:
            marks = np.unique((panels != 0).reshape(len(panels), -1), axis=0, return_inverse=True)[1].ravel()
        values, first, counts = np.unique(marks, return_index=True, return_counts=True)
        if len(values) != 2 or counts.min() != 1:
            return None
        odd = panels[first[counts.argmin()]]
        return odd if _panels(grid) is not None else odd.T

    def solve(self, rule: str, grid: Grid) -> Grid | None:
        answers = []
        for lines, back in ((grid.T.tolist(), True), (grid.tolist(), False)):
            panels = _split(lines)
            if panels is None:
                continue
            features = {
                "shape": lambda panel: tuple(tuple(cell > 0 for cell in line) for line in panel),
                "colour": lambda panel: max(map(max, panel)),
                "count": lambda panel: sum(cell > 0 for line in panel for cell in line),
            }
            marks = [features[rule](panel) for panel in panels]
            common = Counter(marks).most_common()
            odd = [k for k, mark in enumerate(marks) if len(common) == 2 and mark == common[1][0]]
            out = np.array(panels[odd[0]], dtype=np.uint8) if len(odd) == 1 else None
            answers.append(out if out is None or not back else out.T)
        return answers[0] if len(answers) == 1 else None


def _panels(grid: Grid) -> np.ndarray | None:
    """uint8 [P >= 3, H, W], what columns of one colour divide the grid into, if all are as wide and P - 1 divide it."""
    border = np.flatnonzero((grid == grid[0]).all(0) & (grid[0] != 0))
    if len(border) < 2 or len(set(grid[0, border].tolist())) > 1:
        return None
    width = border[0]
    if not width or grid.shape[1] != width + (width + 1) * len(border) or (np.diff(border) != width + 1).any():
        return None
    kept = np.delete(grid, border, axis=1)
    return kept.reshape(len(grid), len(border) + 1, width).swapaxes(0, 1)


def _split(lines: list[list[int]]) -> list[list[list[int]]] | None:
    """The same of a grid's columns, as lists of columns."""
    panels, borders = [[]], set()
    for line in lines:
        if line[0] and line.count(line[0]) == len(line):
            panels.append([])
            borders.add(line[0])
        else:
            panels[-1].append(line)
    if len(panels) < 3 or len(borders) != 1 or not panels[0] or len({len(panel) for panel in panels}) > 1:
        return None
    return panels
