"""Pieces: coloured cells that hang together, apart from all others. How to draw them and two ways to find them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from tasks.arc.grid import Grid


def blob(rng: Generator, cells: int, limit: int) -> np.ndarray:
    """bool [h, w], tight: `cells` cells, grown by one neighbour at a time, at most `limit` each way."""
    inside, border = {(0, 0)}, [(0, 1), (1, 0), (0, -1), (-1, 0)]
    top = bottom = left = right = 0
    for u in rng.random(4 * cells).tolist():
        if len(inside) == cells:
            break
        r, c = border[int(u * len(border))]
        if (r, c) in inside or max(bottom, r) - min(top, r) >= limit or max(right, c) - min(left, c) >= limit:
            continue
        inside.add((r, c))
        border += [(r, c + 1), (r + 1, c), (r, c - 1), (r - 1, c)]
        top, bottom, left, right = min(top, r), max(bottom, r), min(left, c), max(right, c)
    places = np.array(list(inside))
    places -= places.min(0)
    mask = np.zeros(places.max(0) + 1, dtype=bool)
    mask[tuple(places.T)] = True
    return mask


def scatter(rng: Generator, height: int, width: int, masks: Sequence[np.ndarray], colours: Sequence[int]) -> Grid:
    """The masks in their colours at random places, none touching another, not even at a corner.

    Those for which there is no room are left out.
    """
    grid = np.zeros((height, width), dtype=np.uint8)
    for mask, colour in zip(masks, colours, strict=True):
        h, w = mask.shape
        if h > height or w > width:
            continue
        for u, v in rng.random((8, 2)).tolist():
            r, c = int(u * (height - h + 1)), int(v * (width - w + 1))
            if not grid[max(r - 1, 0) : r + h + 1, max(c - 1, 0) : c + w + 1].any():
                grid[r : r + h, c : c + w] = mask * np.uint8(colour)
                break
    return grid


def spread(start: set[int], free: set[int], steps: Sequence[int]) -> set[int]:
    """Takes out of `free`, and gives, all numbers that `steps` from free number to free number lead to."""
    reached, frontier = set(start), start
    while frontier:
        frontier = {place + step for place in frontier for step in steps} & free
        free -= frontier
        reached |= frontier
    return reached


def labelled(grid: Grid) -> tuple[np.ndarray, int]:
    """int64 [H, W], the piece of each cell, 0 for background and 1 ... n by first cell; and n. Corners join."""
    stride = grid.shape[1] + 1  # past the end of a row lies nothing
    rows, columns = grid.nonzero()
    places = (rows * stride + columns).tolist()
    unseen, piece_of, count = set(places), {}, 0
    for place in places:
        if place in unseen:
            count += 1
            unseen.remove(place)
            piece = spread({place}, unseen, (1, -1, stride, -stride, stride + 1, stride - 1, 1 - stride, -1 - stride))
            piece_of |= dict.fromkeys(piece, count)
    labels = np.zeros(grid.shape, dtype=np.int64)
    labels[rows, columns] = [piece_of[place] for place in places]
    return labels, count


def listed(grid: Grid) -> list[list[tuple[int, int]]]:
    """The cells of each piece, by first cell: every cell takes the least number around it until none is left."""
    height, width = grid.shape
    far = height * width
    numbers = np.full((height + 2, width + 2), far)
    inside = numbers[1:-1, 1:-1]
    inside[grid != 0] = np.flatnonzero(grid)
    while True:
        around = np.stack([numbers[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)])
        least = np.where(grid != 0, around.min(0), far)
        if (least == inside).all():
            break
        inside[:] = least
    return [[(r, c) for r, c in np.argwhere(inside == k).tolist()] for k in np.unique(inside[grid != 0])]
