"""Batches of episodes on canvases, and what may be done to one without changing what it asks: turns and reflections,
other names for the colours, another order of the pairs, another place.

All of it is gathers on uint8, on any device; what is drawn is a tensor that depends on nothing but a key, so that an
item is augmented alike in any batch, worker or process. (Others keep a thousand augmented copies of each puzzle.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tasks import random
from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, PAD, Episode, shapes

NUM_SYMMETRIES = 8
# g = rotation by 90 * (g % 4) degrees counter-clockwise, as np.rot90, then a transposition if g >= 4.
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


class Canvases(NamedTuple):
    """B episodes of up to P demonstrations, uint8, each grid in the top left corner of N x N and PAD around it."""

    demos: Tensor  # [B, P, 2, N, N]: inputs and outputs; all PAD where an episode has fewer pairs
    query: Tensor  # [B, N, N]
    answer: Tensor  # [B, N, N]: all PAD where it is not known

    def map(self, change) -> Canvases:
        return Canvases(*(change(grids) for grids in self))

    def grids(self) -> Tensor:
        """[B, 2 P + 2, N, N]: in the order in which they are read."""
        return torch.cat([self.demos.flatten(1, 2), self.query.unsqueeze(1), self.answer.unsqueeze(1)], 1)


def canvases(episodes: Sequence[Episode]) -> Canvases:
    """Episodes on canvases just large enough for all of their grids."""
    pairs = max(len(episode.demos) for episode in episodes)
    every = [[(pair.input, pair.output) for pair in (*episode.demos, episode.query)] for episode in episodes]
    size = max(max(grid.shape) for episode in every for pair in episode for grid in pair if grid is not None)
    out = torch.full((len(episodes), pairs + 1, 2, size, size), PAD, dtype=torch.uint8)
    cells = out.numpy()
    for b, episode in enumerate(every):
        for place, pair in zip((*range(len(episode) - 1), pairs), episode, strict=True):
            for which, grid in enumerate(pair):
                if grid is not None:
                    cells[b, place, which, : grid.shape[0], : grid.shape[1]] = grid
    return Canvases(out[:, :pairs], out[:, pairs, 0], out[:, pairs, 1])


# ---- what is done ----------------------------------------------------------------------------------------------------


def symmetric(grids: Tensor, symmetry: Tensor) -> Tensor:
    """Canvases [B, ..., N, N], each grid turned within its own rectangle by its episode's symmetry, int64 [B]."""
    size, leading = grids.shape[-1], (...,) + (None,) * (grids.dim() - 1)
    g = symmetry[leading]  # [B, 1, ..., 1]
    height, width = (side[..., None, None] for side in shapes(grids))
    i = torch.arange(size, device=grids.device).unsqueeze(1)
    row, column = torch.where(g >= 4, i.T, i), torch.where(g >= 4, i, i.T)  # in the grid before its transposition
    turns = g % 4
    up, left = height - 1 - row, width - 1 - column
    across, along = height - 1 - column, width - 1 - row
    r = torch.where(turns == 0, row, torch.where(turns == 1, column, torch.where(turns == 2, up, across)))
    c = torch.where(turns == 0, column, torch.where(turns == 1, along, torch.where(turns == 2, left, row)))
    r, c = (place.expand(grids.shape) for place in (r, c))
    # Too far down or right is PAD on the canvas already.
    turned = grids.flatten(-2).gather(-1, (r.clamp(min=0) * size + c.clamp(min=0)).flatten(-2)).view(grids.shape)
    return torch.where((r < 0) | (c < 0), PAD, turned)


def recoloured(grids: Tensor, colours: Tensor) -> Tensor:
    """Canvases [B, ..., N, N] with colour k of episode b called colours[b, k]: int64 [B, 10]."""
    names = torch.cat([colours, colours.new_full((len(colours), 1), PAD)], 1).to(torch.uint8)
    return names.gather(1, grids.flatten(1).long()).view(grids.shape)


def reordered(demos: Tensor, order: Tensor) -> Tensor:
    """Demonstrations [B, P, ...] of which the order[b, p]-th, int64 [B, P], comes at place p."""
    return demos.gather(1, order.view(*order.shape, *[1] * (demos.dim() - 2)).expand_as(demos))


def inverse(symmetry: Tensor) -> Tensor:
    """The symmetries that undo these, int64 of any shape."""
    return torch.tensor(INVERSE, device=symmetry.device)[symmetry]


# ---- what is drawn ---------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    symmetry: Tensor  # int64 [B], 0 … 7
    colours: Tensor  # int64 [B, 10]: what each colour is called from now on
    order: Tensor  # int64 [B, P]: which pair comes at each place
    shift: Tensor  # int64 [B, 2], of which the room that is left for rows and columns is taken as a remainder

    def to(self, device: torch.device) -> Draw:
        return Draw(*(part.to(device) for part in self))

    def apply(self, canvases: Canvases) -> Canvases:
        demos, query, answer = canvases.map(lambda grids: recoloured(symmetric(grids, self.symmetry), self.colours))
        return Canvases(reordered(demos, self.order), query, answer)

    def undo(self, answers: Tensor) -> Tensor:
        """Answers [B, N, N] to what `apply` asks, as answers to what was asked before."""
        return symmetric(recoloured(answers, self.colours.argsort(1)), inverse(self.symmetry))

    def offset(self, canvases: Canvases) -> Tensor:
        """int64 [B, 2], by how much all rows and columns of an episode are moved: its largest grid stays inside."""
        sides = torch.stack(shapes(canvases.grids()), -1).amax(1)  # [B, 2]
        return self.shift % (MAX_SIZE + 1 - sides)


class Legal(NamedTuple):
    """What keeps an episode's rule among those that it is about."""

    symmetries: Tensor  # bool [B, 8]; the first, which changes nothing, is always among them
    fixed: Tensor  # bool [B, 10]: colours that keep their names


@dataclass(frozen=True)
class Augmentation:
    symmetries: bool = True
    colours: bool = True  # off for a model that names colours by their first appearance: it would not notice
    fix_zero: bool = False  # colour 0 keeps its name: most rules of ARC treat it as background
    order: bool = True
    translation: bool = True

    def draw(self, key: Tensor, pairs: int, legal: Legal | None = None) -> Draw:
        """One of all that is legal (by default everything), each as likely, for int64 keys [B]."""
        nothing = unchanged(len(key), pairs, key.device)
        colours = torch.arange(NUM_COLOURS, device=key.device).expand_as(nothing.colours)
        fixed = legal.fixed if legal is not None else torch.zeros_like(colours, dtype=torch.bool)
        fixed = fixed | (colours == 0) & self.fix_zero
        return Draw(
            _one_of(key, legal.symmetries if legal is not None else None) if self.symmetries else nothing.symmetry,
            _permutation(key, fixed) if self.colours else nothing.colours,
            random.order(key, pairs, stream=3) if self.order else nothing.order,
            random.integers(key, 2, 1 << 31, stream=4) if self.translation else nothing.shift,
        )


def unchanged(batch: int, pairs: int, device: torch.device | None = None) -> Draw:
    """The draw that changes nothing."""
    colours, order = (torch.arange(n, device=device).repeat(batch, 1) for n in (NUM_COLOURS, pairs))
    zeros = torch.zeros(batch, 2, dtype=torch.int64, device=device)
    return Draw(zeros[:, 0], colours, order, zeros)


def _one_of(key: Tensor, legal: Tensor | None) -> Tensor:
    """A legal symmetry for each key: int64 [B]."""
    value = random.integers(key, NUM_SYMMETRIES, 1 << 31, stream=1)
    return (value if legal is None else value.masked_fill(~legal, -1)).argmax(1)


def _permutation(key: Tensor, fixed: Tensor) -> Tensor:
    """A permutation of the colours that are not fixed, bool [B, 10], for each key: int64 [B, 10]."""
    value = random.integers(key, NUM_COLOURS, 1 << 31, stream=2)
    # Both orders end in the fixed colours, by number; before them are the free ones, shuffled and by number.
    shuffled = value.masked_fill(fixed, 1 << 31).argsort(dim=1, stable=True)
    by_number = fixed.long().argsort(dim=1, stable=True)
    return torch.empty_like(shuffled).scatter(1, by_number, shuffled)
