from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
import torch

from tasks import random
from tasks.maze.distance import distances, optimal_moves, shortest_path
from tasks.maze.generate import SPLITS, Suite, attempt, canonical_hash, drawn, sample
from tasks.maze.grid import (
    NUM_SYMMETRIES,
    OPPOSITE,
    Mazes,
    exits,
    neighbors,
    passages_of_connections,
    passages_of_floor,
    symmetric,
    symmetric_cells,
    symmetric_moves,
)

SUITES = [Suite("perfect-7"), Suite("perfect-7", min_path=20, braid=0.5), Suite("randwall-9"), Suite("perfect30px")]


def first(suite: Suite, count: int, split: str = "train") -> tuple[Mazes, torch.Tensor]:
    return sample(suite, split, torch.arange(count))


def doors(mazes: Mazes) -> torch.Tensor:
    return exits(mazes.passages.flatten(1))  # [B, N * N, 4]


def queue_distances(open_: torch.Tensor, near: torch.Tensor, goal: int) -> list[int]:
    """One maze, one cell at a time."""
    steps, queue = [-1] * len(open_), deque([goal])
    steps[goal] = 0
    while queue:
        cell = queue.popleft()
        for k in range(4):
            there = int(near[cell, k])
            if open_[cell, k] and steps[there] < 0:
                steps[there] = steps[cell] + 1
                queue.append(there)
    return steps


# ---- what a maze is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_a_way_out_is_a_way_back_and_nothing_leads_outside(suite):
    mazes, _ = first(suite, 20)
    open_, near = doors(mazes), neighbors(mazes.size)
    assert not (open_ & (near < 0)).any()
    for k in range(4):
        inside = near[:, k] >= 0
        assert torch.equal(open_[:, inside, k], open_[:, near[inside, k], OPPOSITE[k]])


def test_a_perfect_maze_is_a_spanning_tree():
    mazes, steps = first(Suite("perfect-7"), 50)
    assert (doors(mazes).sum((1, 2)) == 2 * (49 - 1)).all() and (steps >= 0).all()
    braided, _ = first(Suite("perfect-7", braid=1.0), 50)
    assert (doors(braided).sum(-1) >= 2).all()  # no dead end is left


def test_every_direction_is_as_likely_in_a_tree():
    open_ = doors(first(Suite("perfect-7"), 400)[0]).float().mean((0, 1))
    assert open_.std() < 0.01
    starts = torch.bincount(first(Suite("perfect-7"), 2000)[0].start, minlength=49)
    assert starts.min() > 15 and starts.max() < 75  # 41 expected, standard deviation 6


def test_random_walls_fill_the_share_they_should():
    mazes, _ = first(Suite("randwall-10"), 200)
    walls = (mazes.passages == 0).float().mean((1, 2))  # a floor cell that is walled in counts too
    assert walls.min() >= 0.3 and walls.max() < 0.65


def test_a_drawn_maze_keeps_its_distances():
    small = attempt(Suite("perfect-5"), random.keys(torch.arange(10)))
    pixels = passages_of_floor(drawn(small.passages))
    goal = small.goal // 5 * 24 + small.goal % 5 * 2  # on 12 x 12 pixels
    steps = distances(pixels, goal)[:, :10:2, :10:2]
    assert torch.equal(steps, 2 * distances(small.passages, small.goal))


def test_connection_lists_say_the_same_as_codes():
    mazes, _ = first(Suite("perfect-6"), 5)
    open_ = exits(mazes.passages)
    assert torch.equal(passages_of_connections(torch.stack([open_[..., 1], open_[..., 3]], 1)), mazes.passages)


# ---- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES[:3], ids=str)
def test_distances_are_those_of_a_queue(suite):
    mazes, steps = first(suite, 30)
    open_, near = doors(mazes), neighbors(mazes.size)
    for b in range(30):
        assert steps[b].flatten().tolist() == queue_distances(open_[b], near, int(mazes.goal[b]))
        assert steps[b].flatten()[mazes.start[b]] >= suite.steps_at_least


@pytest.mark.parametrize("suite", SUITES[:3], ids=str)
def test_every_optimal_move_and_no_other_brings_the_goal_one_step_nearer(suite):
    mazes, steps = first(suite, 30)
    moves, near = exits(optimal_moves(mazes.passages, steps).flatten(1)), neighbors(mazes.size)
    flat = steps.flatten(1)
    there = torch.nn.functional.pad(flat, (0, 1), value=-1)[:, near]  # [B, N * N, 4]
    nearer = doors(mazes) & (there == flat.unsqueeze(-1) - 1) & (flat.unsqueeze(-1) > 0)
    assert torch.equal(moves, nearer)
    assert (moves.any(-1) == (flat > 0)).all()


def test_the_shortest_path_leads_from_start_to_goal():
    mazes, steps = first(Suite("perfect-7", braid=0.3), 30)
    path, near = shortest_path(mazes, steps), neighbors(7)
    for b in range(30):
        cells = [c for c in path[b].tolist() if c >= 0]
        assert cells[0] == mazes.start[b] and cells[-1] == mazes.goal[b]
        assert len(cells) == steps[b].flatten()[mazes.start[b]] + 1
        for here, there in pairwise(cells):
            assert doors(mazes)[b, here, near[here].tolist().index(there)]


@pytest.mark.parametrize("which", range(NUM_SYMMETRIES))
def test_turning_a_maze_turns_its_distances_and_moves(which):
    mazes, steps = first(Suite("perfect-6", braid=0.3), 10)
    turned = symmetric(mazes, which)
    turned_steps = distances(turned.passages, turned.goal)
    assert torch.equal(turned_steps, symmetric_cells(steps, which))
    moves = optimal_moves(mazes.passages, steps)
    assert torch.equal(optimal_moves(turned.passages, turned_steps), symmetric_moves(moves, which))
    assert (which == 0) == torch.equal(turned.passages, mazes.passages)


# ---- suites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_a_maze_depends_on_its_index_alone(suite):
    whole, steps = first(suite, 12)
    some = torch.tensor([7, 2, 7])
    mazes, some_steps = sample(suite, "train", some)
    for a, b in zip((*mazes, some_steps), (*whole, steps), strict=True):
        assert torch.equal(a, b[some])


def test_splits_have_nothing_in_common_not_even_turned():
    suite = Suite("perfect-3")  # so small that mazes come up again and again
    seen = {split: set(canonical_hash(first(suite, 400, split)[0]).tolist()) for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    keyspaces = [set(canonical_hash(attempt(suite, random.keys(i, torch.arange(400)))).tolist()) for i in range(2)]
    assert keyspaces[0] & keyspaces[1]  # keys of their own would not do: the same mazes come up under both


def test_the_hash_knows_a_maze_from_another_and_not_from_its_mirror_image():
    mazes, _ = first(Suite("perfect-6"), 300)
    hashes = canonical_hash(mazes)
    assert len(hashes.unique()) == 300
    assert all(torch.equal(canonical_hash(symmetric(mazes, which)), hashes) for which in range(NUM_SYMMETRIES))
    assert (canonical_hash(Mazes(mazes.passages, mazes.goal, mazes.start)) != hashes).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "perfect-"}, "use perfect-N, perfect30px, randwall-N or hard30"),
        ({"name": "perfect-2"}, "N must lie in 3..100"),
        ({"name": "randwall-9", "braid": 0.5}, "braid=0.5"),
        ({"name": "perfect-9", "min_path": 41}, "at most 40"),
    ],
)
def test_a_suite_that_cannot_be_is_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Suite(**settings)


def test_a_split_that_is_none_is_a_sentence():
    with pytest.raises(ValueError, match="use train, val or test"):
        first(SUITES[0], 1, "dev")
