from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks import random
from tasks.arc.augment import (
    INVERSE,
    NUM_SYMMETRIES,
    Augmentation,
    Legal,
    canvases,
    recoloured,
    symmetric,
    unchanged,
)
from tasks.arc.grid import PAD, Episode, Pair, canvas, from_canvas, shapes

EVERY = torch.arange(NUM_SYMMETRIES)


def turned(grid: np.ndarray, g: int) -> np.ndarray:
    """What the numbers of the symmetries mean."""
    grid = np.rot90(grid, g % 4)
    return grid.T if g >= 4 else grid


def a_grid(rng, height: int | None = None, width: int | None = None) -> np.ndarray:
    return rng.integers(0, 10, (height or rng.integers(1, 9), width or rng.integers(1, 9)), dtype=np.uint8)


def an_episode(seed: int, pairs: int = 3) -> Episode:
    rng = np.random.default_rng(seed)
    made = [Pair(a_grid(rng), a_grid(rng)) for _ in range(pairs + 1)]
    return Episode(f"test/{seed}", tuple(made[:-1]), made[-1])


def grids(batch, b: int = 0) -> list[np.ndarray]:
    return [from_canvas(canvas) for canvas in batch.grids()[b] if (canvas != PAD).any()]


# ---- canvases --------------------------------------------------------------------------------------------------------


def test_canvases_hold_the_grids_and_nothing_where_there_is_none():
    asked = an_episode(1, pairs=1)
    batch = canvases([an_episode(0), asked._replace(query=Pair(asked.query.input, None))])
    assert batch.demos.shape[:3] == (2, 3, 2) and batch.demos.dtype == torch.uint8
    for found, pair in zip(batch.demos[0], an_episode(0).demos, strict=True):
        assert all(np.array_equal(from_canvas(c), grid) for c, grid in zip(found, pair, strict=True))
    assert (batch.demos[1, 1:] == PAD).all() and (batch.answer[1] == PAD).all()
    assert np.array_equal(from_canvas(batch.query[1]), asked.query.input)


# ---- symmetries and colours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 6), (6, 3), (8, 8)])
def test_a_symmetry_turns_each_grid_as_numpy_does_and_leaves_it_in_its_corner(shape):
    grid = a_grid(np.random.default_rng(0), *shape)
    small = a_grid(np.random.default_rng(1), 2, 3)
    batch = torch.stack([canvas(grid, 8), canvas(small, 8), canvas(None, 8)]).expand(NUM_SYMMETRIES, -1, -1, -1)
    found = symmetric(batch, EVERY)
    for g in range(NUM_SYMMETRIES):
        assert np.array_equal(from_canvas(found[g, 0]), turned(grid, g))
        assert np.array_equal(from_canvas(found[g, 1]), turned(small, g))
    assert (found[:, 2] == PAD).all() and found.dtype == torch.uint8
    assert torch.equal(symmetric(found, torch.tensor(INVERSE)), batch)


def test_colours_are_renamed_and_padding_is_not():
    names = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    batch = canvases([an_episode(s) for s in range(4)])
    found = recoloured(batch.query, names)
    for b in range(4):
        assert np.array_equal(from_canvas(found[b]), names[b].numpy()[from_canvas(batch.query[b])])
    assert torch.equal(recoloured(found, names.argsort(1)), batch.query)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_a_draw_changes_all_grids_of_an_episode_alike_and_is_undone():
    batch = canvases([an_episode(s) for s in range(32)])
    draw = Augmentation().draw(random.keys(0, torch.arange(32)), 3)
    after = draw.apply(batch)
    for b in range(32):
        names, order = draw.colours[b].numpy(), draw.order[b].tolist()
        pairs = [grids(batch, b)[2 * p : 2 * p + 2] for p in order]
        expected = [grid for pair in pairs for grid in pair] + grids(batch, b)[6:]
        expected = [names[turned(grid, int(draw.symmetry[b]))] for grid in expected]
        assert all(np.array_equal(x, y) for x, y in zip(grids(after, b), expected, strict=True))
    assert torch.equal(draw.undo(after.answer), batch.answer)
    assert not torch.equal(draw._replace(symmetry=draw.symmetry.roll(1)).undo(after.answer), batch.answer)


def test_draws_depend_on_the_key_alone():
    keys = random.keys(7, torch.arange(50))
    together = Augmentation().draw(keys, 4)
    for b in (0, 13, 49):
        alone = Augmentation().draw(keys[b : b + 1], 4)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))
    other = Augmentation().draw(random.keys(8, torch.arange(50)), 4)
    assert not any(torch.equal(x, y) for x, y in zip(together, other, strict=True))


def test_draws_are_uniform():
    draw = Augmentation().draw(random.keys(3, torch.arange(8000)), 3)
    assert draw.symmetry.bincount(minlength=8).sub(1000).abs().max() < 120
    for colour in range(10):
        assert draw.colours[:, colour].bincount(minlength=10).sub(800).abs().max() < 110
    assert (draw.order * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1].sub(8000 / 6).abs().max() < 150
    assert torch.equal(draw.colours.sort(1).values, torch.arange(10).expand(8000, -1))


def test_only_what_is_legal_is_drawn():
    symmetries, fixed = torch.zeros(300, 8, dtype=torch.bool), torch.zeros(300, 10, dtype=torch.bool)
    symmetries[:, [0, 5]] = True
    fixed[:150, [2, 7]] = True
    fixed[150:] = True
    draw = Augmentation(fix_zero=True).draw(random.keys(0, torch.arange(300)), 2, Legal(symmetries, fixed))
    assert set(draw.symmetry.tolist()) == {0, 5}
    still = draw.colours == torch.arange(10)
    assert still[:, [0]].all() and still[:150, [2, 7]].all() and still[150:].all()
    assert not still[:150, [1, 3, 4, 5, 6, 8, 9]].all(0).any()


def test_what_is_switched_off_is_not_drawn():
    keys = random.keys(0, torch.arange(20))
    nothing = Augmentation(symmetries=False, colours=False, order=False, translation=False).draw(keys, 3)
    assert all(torch.equal(x, y) for x, y in zip(nothing, unchanged(20, 3), strict=True))
    batch = canvases([an_episode(s) for s in range(20)])
    assert all(torch.equal(x, y) for x, y in zip(nothing.apply(batch), batch, strict=True))


def test_a_translation_keeps_the_largest_grid_inside():
    batch = canvases([an_episode(s) for s in range(200)])
    draw = Augmentation(symmetries=False).draw(random.keys(0, torch.arange(200)), 3)
    offset = draw.offset(batch)
    height, width = (side.amax(1) for side in shapes(batch.grids()))
    assert (offset >= 0).all() and (offset[:, 0] + height <= 30).all() and (offset[:, 1] + width <= 30).all()
    assert (offset[:, 0] + height == 30).any() and (offset[:, 1] == 0).any()
    full = canvases([Episode("a/0", (), Pair(a_grid(np.random.default_rng(0), 30, 2), None))])
    assert Augmentation().draw(random.keys(0, torch.arange(1)), 0).offset(full)[0, 0] == 0
