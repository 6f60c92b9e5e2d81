"""Pieces on a background: crop one, outline them, fill what they enclose, remove the small ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import Grid, Pair
from tasks.arc.skills.base import Skill, between, paint, paints, pick, shifted
from tasks.arc.skills.pieces import blob, labelled, listed, scatter, spread


class Crop(Skill):
    """Cut out one piece: the one of most cells, of fewest, of the largest box, or of a colour that no other has."""

    name = "crop"
    smallest = 8

    def rules(self) -> tuple[str, ...]:
        return ("most cells", "fewest cells", "largest box", "odd colour")

    def draw(self, rule: str, rng: Generator, size: int) -> Grid:
        count = between(rng, 3, 4)
        masks = [blob(rng, cells, size // 2) for cells in rng.integers(3, 4 + size // 2, count).tolist()]
        odd, common = paint(rng, 2)
        colours = rng.permutation([odd] + [common] * (count - 1)).tolist()
        return scatter(rng, between(rng, size - 2, size), between(rng, size - 2, size), masks, colours)

    def apply(self, rule: str, grid: Grid) -> Grid | None:
        pieces, count = labelled(grid)
        if count < 2:
            return None
        boxes = []
        for piece in range(1, count + 1):
            rows, columns = np.nonzero(pieces == piece)
            boxes.append((rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
        if rule == "odd colour":
            of_piece = grid.ravel()[np.unique(pieces, return_index=True)[1][-count:]]
            merit = -np.bincount(of_piece, minlength=10)[of_piece]
            if merit.max() < -1:
                return None
        elif rule == "largest box":
            merit = np.array([(bottom - top) * (right - left) for top, bottom, left, right in boxes])
        else:
            merit = np.bincount(pieces.ravel(), minlength=count + 1)[1:] * (1 if rule == "most cells" else -1)
        best = np.flatnonzero(merit == merit.max())
        if len(best) > 1:
            return None
        top, bottom, left, right = boxes[best[0]]
        return grid[top:bottom, left:right]

    def solve(self, rule: str, grid: Grid) -> Grid | None:
        pieces = listed(grid)
        if len(pieces) < 2:
            return None
        colours = [int(grid[piece[0]]) for piece in pieces]
        boxes = [[(min(places), max(places) + 1) for places in zip(*piece, strict=True)] for piece in pieces]
        if rule == "odd colour":
            chosen = [k for k, colour in enumerate(colours) if colours.count(colour) == 1]
        else:
            areas = [(bottom - top) * (right - left) for (top, bottom), (left, right) in boxes]
            sizes = {"most cells": map(len, pieces), "fewest cells": (-len(p) for p in pieces), "largest box": areas}
            sizes = list(sizes[rule])
            chosen = [k for k, cells in enumerate(sizes) if cells == max(sizes)]
        if len(chosen) != 1:
            return None
        (top, bottom), (left, right) = boxes[chosen[0]]
        return grid[top:bottom, left:right].copy()


class Outline(Skill):
    """Paint the background around every piece, with the corners or without."""

    name = "outline"

    def rules(self) -> tuple[tuple[int, bool], ...]:
        return tuple((colour, corners) for colour in range(1, 10) for corners in (False, True))

    def candidates(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, bool]]:
        return [(colour, corners) for colour in paints(pairs[0]) for corners in (False, True)]

    def draw(self, rule: tuple[int, bool], rng: Generator, size: int) -> Grid:
        count = between(rng, 1, max(1, size // 3))
        masks = [blob(rng, cells, size // 2) for cells in rng.integers(1, 6, count).tolist()]
        palette = paint(rng, 3, but=[rule[0]])
        colours = [pick(rng, palette) for _ in masks]
        return scatter(rng, between(rng, 4, size), between(rng, 4, size), masks, colours)

    def apply(self, rule: tuple[int, bool], grid: Grid) -> Grid:
        colour, corners = rule
        pieces = np.pad(grid != 0, 1)
        beside = pieces[1:-1, :-2] | pieces[1:-1, 2:] | pieces[:-2, 1:-1] | pieces[2:, 1:-1]
        if corners:
            beside |= pieces[:-2, :-2] | pieces[:-2, 2:] | pieces[2:, :-2] | pieces[2:, 2:]
        return np.where(beside & (grid == 0), np.uint8(colour), grid)

    def solve(self, rule: tuple[int, bool], grid: Grid) -> Grid:
        colour, corners = rule
        out = grid.copy()
        for r, c in np.argwhere(grid).tolist():
            for y in range(max(r - 1, 0), min(r + 2, grid.shape[0])):
                for x in range(max(c - 1, 0), min(c + 2, grid.shape[1])):
                    if not grid[y, x] and (corners or y == r or x == c):
                        out[y, x] = colour
        return out


class Fill(Skill):
    """Paint the background that is walled in, from which no way leads to the edge."""

    name = "fill"

    def rules(self) -> tuple[int, ...]:
        return tuple(range(1, 10))

    def candidates(self, pairs: Sequence[Pair]) -> Sequence[int]:
        return paints(pairs[0])

    def draw(self, rule: int, rng: Generator, size: int) -> Grid:
        height, width = between(rng, 5, size), between(rng, 5, size)
        masks = []
        for _ in range(between(rng, 1, max(1, size // 3))):
            mask = np.ones((between(rng, 3, min(6, height)), between(rng, 3, min(6, width))), dtype=bool)
            mask[1:-1, 1:-1] = rng.random((mask.shape[0] - 2, mask.shape[1] - 2)) < 0.1
            if rng.random() < 0.35:  # a door
                mask[pick(rng, (0, -1)), between(rng, 1, mask.shape[1] - 2)] = False
            masks.append(mask if rng.random() < 0.5 else mask.T)
        palette = paint(rng, 3, but=[rule])
        colours = [pick(rng, palette) for _ in masks]
        return scatter(rng, height, width, masks, colours)

    def apply(self, rule: int, grid: Grid) -> Grid:
        framed = np.pad(grid, 1)
        free = set(np.flatnonzero(framed == 0).tolist()) - {0}
        width = framed.shape[1]
        spread({0}, free, (1, -1, width, -width))  # along the frame to the next row's, and in from it
        out = framed.copy()
        out.ravel()[list(free)] = rule
        return out[1:-1, 1:-1]

    def solve(self, rule: int, grid: Grid) -> Grid:
        free = np.pad(grid == 0, 1, constant_values=True)
        outside = np.zeros_like(free)
        outside[0, 0] = True
        while True:
            wider = outside.copy()
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                wider |= shifted(outside, dy, dx) & free
            if (wider == outside).all():
                break
            outside = wider
        return np.where((free & ~outside)[1:-1, 1:-1], np.uint8(rule), grid)


class Denoise(Skill):
    """Remove every piece of no more than one, two or three cells."""

    name = "denoise"

    def rules(self) -> tuple[int, ...]:
        return (1, 2, 3)

    def draw(self, rule: int, rng: Generator, size: int) -> Grid:
        small = rng.integers(1, rule + 1, between(rng, 1, max(2, size // 2))).tolist()
        large = rng.integers(rule + 1, rule + 6, between(rng, 1, max(1, size // 4))).tolist()
        masks = [blob(rng, cells, size // 2) for cells in large + small]
        palette = paint(rng, 3)
        colours = [pick(rng, palette) for _ in masks]
        return scatter(rng, between(rng, 4, size), between(rng, 4, size), masks, colours)

    def apply(self, rule: int, grid: Grid) -> Grid:
        pieces, count = labelled(grid)
        return np.where(np.bincount(pieces.ravel(), minlength=count + 1)[pieces] > rule, grid, np.uint8(0))

    def solve(self, rule: int, grid: Grid) -> Grid:
        out = grid.copy()
        for piece in listed(grid):
            if len(piece) <= rule:
                for cell in piece:
                    out[cell] = 0
        return out
