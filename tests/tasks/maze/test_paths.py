from __future__ import annotations

import pytest
import torch

from tasks.maze.distance import distances, shortest_path
from tasks.maze.generate import Suite
from tasks.maze.grid import Mazes
from tasks.maze.paths import IGNORED, MASKINGS, PathTask, hidden
from tests.tasks.maze.test_task import Alone

# ---- what is hidden --------------------------------------------------------------------------------------------------


def test_rates_are_uniform_and_cells_are_hidden_independently():
    mask = hidden(torch.arange(4000), 400).float()
    rates = mask.mean(1)
    quantiles = torch.linspace(0.1, 0.9, 9)
    assert rates.quantile(quantiles) == pytest.approx(quantiles, abs=0.03)
    assert mask.mean(0) == pytest.approx(0.5, abs=0.04)  # every place alike
    residual = mask - rates.unsqueeze(1)
    assert (residual[:, 1:] * residual[:, :-1]).mean() == pytest.approx(0, abs=0.002)  # no runs but by the rate


@pytest.fixture(scope="module")
def task() -> PathTask:
    return PathTask(Suite("perfect-5"), train=6, val=20, augment=True)


def test_an_item_is_always_the_same_and_masked_in_its_own_way(task):
    assert len(task.train) == 6 * 8 * MASKINGS and task.num_mazes == 6 * 8
    batch = task.collate([task.train[i] for i in range(MASKINGS)])
    assert len(batch["passages"].flatten(1).unique(dim=0)) == 1, "one maze"
    assert len((batch["path"] < 0).unique(dim=0)) > 20  # of the 32 that five cells have
    again = task.collate([task.train[i] for i in (9, 3, 9)])
    for name, value in again.items():
        assert torch.equal(value, batch[name][[9, 3, 9]]), name


def test_every_cell_of_the_way_is_known_or_asked_for(task):
    batch = task.collate([task.train[i] for i in range(0, len(task.train), 61)])
    mazes = Mazes(batch["passages"], batch["start"], batch["goal"])
    way = shortest_path(mazes, distances(mazes.passages, mazes.goal))[:, 1:]
    asked, known = batch["labels"] != IGNORED, batch["path"] >= 0
    assert not (asked & known).any() and torch.equal(asked | known, way >= 0)
    assert torch.equal(batch["labels"].where(asked, batch["path"]), way.where(way >= 0, -1))
    assert task.num_items(batch) == asked.sum() > 0


# ---- scores ----------------------------------------------------------------------------------------------------------


def says_the_way(batch):
    mazes = Mazes(*(batch[name] for name in Mazes._fields))
    return {"path": shortest_path(mazes, distances(mazes.passages, mazes.goal))[:, 1:]}


def jumps(batch):
    return {"path": batch["goal"].unsqueeze(1)}


def test_ways_are_scored_by_walls_that_are_there(task):
    right = task.evaluate(Alone(says_the_way))
    assert right.pop("illegal_moves") == 0 and set(right.values()) == {1.0}
    mazes, steps = task.val.mazes, task.val.steps
    blind = task.outcomes(says_the_way, mazes, steps, show_walls=False)
    assert blind["success"].mean() < 0.5 and blind["illegal_moves"].mean() > 0.2
    assert torch.equal(blind["exact_grid"], blind["optimal"]) and torch.equal(
        blind["success_unmasked"], blind["success"]
    )
    jumped = task.outcomes(jumps, mazes, steps)
    assert torch.equal(jumped["success"], (steps.flatten(1)[torch.arange(20), mazes.start] == 1).float())
    assert 0 < task.baselines()["random"] < 0.8
