from __future__ import annotations

import pytest
import torch

from tasks import random
from tasks.maze.distance import optimal_moves, shortest_path
from tasks.maze.generate import Suite, canonical_hash, sample
from tasks.maze.grid import Mazes, exits, neighbors
from tasks.maze.score import fork_floor
from tasks.maze.targets import candidates_and_labels, offsets
from tasks.maze.task import MazeTask, decoded, without_walls

SUITE = Suite("perfect-5", braid=0.3)


def adjacency(codes: torch.Tensor, size: int) -> torch.Tensor:
    """float [B, n, n] of passage or move codes."""
    moves, near = exits(codes.flatten(1)), neighbors(size)
    matrix = torch.zeros(len(codes), size**2, size**2 + 1)
    for k in range(4):
        there = (near[:, k] % (size**2 + 1)).expand(len(codes), -1)  # outside is one column more
        matrix.scatter_add_(2, there.unsqueeze(2), moves[..., k : k + 1].float())
    return matrix[..., :-1]


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizons", [1, 2, 3])
def test_candidates_and_labels_are_powers_of_the_adjacency(horizons):
    mazes, steps = sample(SUITE, "train", torch.arange(20))
    candidates, labels = candidates_and_labels(mazes, steps, horizons)
    assert candidates.shape == labels.shape == (20, 25, horizons, (4, 12, 24)[horizons - 1])
    open_, optimal = adjacency(mazes.passages, 5), adjacency(optimal_moves(mazes.passages, steps), 5)
    reach, wanted = torch.eye(25).expand(20, -1, -1), torch.eye(25).expand(20, -1, -1)
    for k in range(horizons):
        reach, wanted = reach + reach @ open_, wanted @ optimal
        found, named = torch.zeros(20, 25, 26, dtype=torch.bool), torch.zeros(20, 25, 26, dtype=torch.bool)
        found.scatter_(2, candidates[:, :, k] % 26, True)
        named.scatter_(2, torch.where(labels[:, :, k], candidates[:, :, k], 25), True)
        assert torch.equal(found[..., :-1] | torch.eye(25, dtype=torch.bool), reach > 0)
        assert torch.equal(named[..., :-1], wanted > 0)
        assert not (labels[:, :, k] & (candidates[:, :, k] < 0)).any()


def test_the_first_slots_are_the_directions():
    for horizon in (1, 2, 3):
        assert offsets(horizon)[:4] == ((-1, 0), (1, 0), (0, -1), (0, 1))
        assert len(set(offsets(horizon))) == 2 * horizon * (horizon + 1)


# ---- the task --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> MazeTask:
    return MazeTask(SUITE, train=12, val=40, augment=True, eval_batch_size=16)


class Alone:
    """What the engine hands to `evaluate`, for one process."""

    def __init__(self, predict):
        self.predict = predict

    def __call__(self, batch):
        return self.predict(batch)

    def share(self, n):
        return list(range(n))

    def total(self, sums):
        return {name: float(value) for name, value in sums.items()}


def knows_the_way(batch):
    """An oracle that reads only what a model is given."""
    from tasks.maze.distance import distances

    moves = exits(optimal_moves(batch["passages"], distances(batch["passages"], batch["goal"])).flatten(1))
    return {"scores": moves.float().unsqueeze(2)}


def knows_nothing(batch):
    g = torch.Generator().manual_seed(0)
    return {"scores": torch.randn(batch["candidates"].shape, generator=g)}


def test_who_sees_the_walls_scores_one_and_who_does_not_falls(task):
    found = task.evaluate(Alone(knows_the_way))
    assert found.pop("exact_grid") > 0.9  # a braided maze may have another shortest way than the one that is marked
    assert {name: value for name, value in found.items() if name != "illegal_moves"} == (
        dict.fromkeys(set(MazeTask.scores) - {"illegal_moves", "exact_grid"}, 1.0)
    )
    assert task.evaluate(Alone(knows_the_way))["illegal_moves"] == 0
    mazes, steps = task.val.mazes, task.val.steps
    blind = task.outcomes(knows_the_way, mazes, steps, show_walls=False)
    assert blind["fork_accuracy"].nanmean() < 0.8 and blind["illegal_moves"].mean() > 0.1
    random = task.evaluate(Alone(knows_nothing))
    assert random["fork_accuracy"] == pytest.approx(task.baselines()["random"], abs=0.06)
    assert task.baselines()["random"] == pytest.approx(fork_floor(mazes, steps).nanmean().item())


def knows_the_next_move_only(batch):
    """Right where it starts, wrong everywhere else."""
    scores = knows_the_way(batch)["scores"]
    here = torch.arange(25) == batch["start"].unsqueeze(1)
    return {"scores": torch.where(here[..., None, None], scores, -scores)}


def does_not_mind_where_it_starts(batch):
    key = random.keys(batch["goal"], batch["passages"].flatten(1).long().sum(1))
    return {"scores": random.integers(key, 100, 1000).view(-1, 25, 1, 4).float()}


def test_a_walk_that_asks_anew_needs_the_next_move_only(task):
    mazes, steps = task.val.mazes, task.val.steps
    once = task.outcomes(knows_the_next_move_only, mazes, steps)
    again = decoded(knows_the_next_move_only, mazes, steps)
    assert once["success"].mean() < 0.5 and (again["reencode_optimal"] == 1).all()
    assert (again["reencode_no_revisits_optimal"] == 1).all()
    assert again["no_revisits_success"].mean() < 1


def test_a_walk_that_asks_anew_is_the_same_where_the_start_does_not_matter(task):
    mazes, steps = task.val.mazes, task.val.steps
    once = task.outcomes(does_not_mind_where_it_starts, mazes, steps)
    again = decoded(does_not_mind_where_it_starts, mazes, steps)
    for name in ("success", "optimal", "spl"):
        assert torch.equal(again[f"reencode_{name}"], once[name])
        assert torch.equal(again[f"reencode_no_revisits_{name}"], again[f"no_revisits_{name}"])
    assert 0 < once["success"].mean() < again["no_revisits_success"].mean()


def test_without_walls_every_cell_of_the_inside_has_four_exits(task):
    open_ = exits(without_walls(task.val.mazes).passages)
    assert (open_.sum(-1)[:, 1:-1, 1:-1] == 4).all() and (open_.sum((1, 2, 3)) == 4 * 25 - 20).all()


def test_different_walls_are_different_inputs(task):
    batch = task.collate([task.train[i] for i in range(0, 96, 8)])
    assert len(batch["passages"].flatten(1).unique(dim=0)) == 12


def test_items_are_the_eight_symmetries_of_each_maze(task):
    assert len(task.train) == 96
    turned = [task.train[8 + which][0] for which in range(8)]
    assert len({canonical_hash(maze).item() for maze in turned}) == 1
    assert len({tuple(maze.passages.flatten().tolist()) for maze in turned}) == 8


def test_the_items_counted_are_the_cells_with_a_label(task):
    batch = task.collate([task.train[i] for i in (0, 9, 33)])
    assert task.num_items(batch) == 3 * 24  # every cell of a braided maze but the goal
    on_path = MazeTask(SUITE, train=12, val=1, rows="path")
    batch = on_path.collate([on_path.train[i] for i in range(12)])
    mazes = Mazes(batch["passages"], batch["start"], batch["goal"])
    path = shortest_path(mazes, on_path.train.steps)
    assert on_path.num_items(batch) == (path >= 0).sum() - 12


def test_validation_is_the_same_however_it_is_batched(task):
    small = MazeTask(SUITE, train=1, val=40, eval_batch_size=7)
    assert small.evaluate(Alone(knows_the_way)) == task.evaluate(Alone(knows_the_way))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train": 0}, "train=0: at least 1"),
        ({"horizons": 4}, "1 to 3 steps ahead"),
        ({"rows": "some"}, "'all' cells"),
    ],
)
def test_a_task_that_cannot_be_is_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        MazeTask(SUITE, **{"train": 2, "val": 2, **settings})
