from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tasks import random
from tasks.maze.distance import optimal_moves, shortest_path
from tasks.maze.generate import Suite, sample
from tasks.maze.grid import Mazes, exits, neighbors
from tasks.maze.rollout import follow, manhattan_scores, next_cells, random_scores, said, visited, walk
from tasks.maze.score import (
    floors,
    fork_floor,
    forks,
    greedy,
    length_groups,
    policy_scores,
    shortest_path_grid,
    start_distance,
    walk_scores,
)

SUITES = [Suite("perfect-7"), Suite("perfect-6", braid=0.5), Suite("randwall-8")]


@pytest.fixture(params=SUITES, ids=str)
def batch(request) -> tuple[Mazes, torch.Tensor]:
    return sample(request.param, "val", torch.arange(60))


def random_logits(mazes: Mazes, seed: int = 0) -> torch.Tensor:
    shape = (len(mazes.start), mazes.size**2, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearly_optimal(mazes: Mazes, steps: torch.Tensor, noise: float) -> torch.Tensor:
    return exits(optimal_moves(mazes.passages, steps).flatten(1)) + noise * random_logits(mazes)


# ---- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3, 100.0])
def test_pointer_doubling_is_walking_step_by_step(batch, noise):
    mazes, steps = batch
    move = greedy(mazes, nearly_optimal(mazes, steps, noise))
    found, ahead = follow(mazes, move), next_cells(mazes, move)
    for b in range(len(mazes.start)):
        cell, length = int(mazes.start[b]), 0
        while cell != mazes.goal[b] and length <= mazes.size**2:
            cell, length = int(ahead[b, cell]), length + 1
        assert bool(found.success[b]) == (cell == mazes.goal[b])
        assert not found.success[b] or found.length[b] == length
    stepwise = walk(mazes, lambda left, cell, rows: torch.nn.functional.one_hot(move[rows, cell], 4).float())
    assert torch.equal(stepwise.success, found.success)
    assert torch.equal(stepwise.length[found.success], found.length[found.success])


@pytest.mark.parametrize("noise", [0.0, 0.3, 100.0])
def test_the_cells_of_a_walk_are_those_it_enters(batch, noise):
    mazes, steps = batch
    move = greedy(mazes, nearly_optimal(mazes, steps, noise))
    ahead, entered = next_cells(mazes, move), torch.zeros(len(mazes.start), mazes.size**2, dtype=torch.bool)
    cell = mazes.start.unsqueeze(1)
    for _ in range(mazes.size**2):
        entered.scatter_(1, cell, True)
        cell = ahead.gather(1, cell)
    assert torch.equal(visited(mazes, move).flatten(1), entered)


def test_who_has_no_memory_is_let_go_where_he_has_been(batch):
    mazes, steps = batch
    move, asked = greedy(mazes, nearly_optimal(mazes, steps, 1.0)), []

    def scores(left, cell, rows):
        asked.append(len(rows))
        return torch.nn.functional.one_hot(move[rows, cell], 4).float()

    whole, of_whole = walk(mazes, scores), sum(asked)
    asked.clear()
    short = walk(mazes, scores, memory=False)
    assert torch.equal(short.success, whole.success) and 0 < whole.success.sum() < len(whole.success)
    assert torch.equal(short.length[short.success], whole.length[whole.success])
    assert sum(asked) < of_whole / 2


def test_a_way_that_is_said_counts_while_its_steps_are_passages(batch):
    mazes, steps = batch
    way = shortest_path(mazes, steps)[:, 1:]
    walked, illegal = said(mazes, way)
    assert walked.success.all() and torch.equal(walked.length, start_distance(mazes, steps)) and (illegal == 0).all()
    headless, _ = said(mazes, way.where(torch.arange(way.shape[1]) > 0, mazes.start.unsqueeze(1)))
    assert not headless.success.any(), "a step that stays is no passage"
    beyond, _ = said(mazes, torch.cat([way.where(way >= 0, 0), way[:, :1]], 1))
    assert torch.equal(beyond.length, walked.length), "what is said behind the goal does not count"
    jump, illegal = said(mazes, mazes.goal.unsqueeze(1))
    near = walked.length == 1
    assert torch.equal(jump.success, near) and torch.equal(illegal, (~near).float())


def test_no_walk_goes_through_a_wall(batch):
    mazes, _ = batch
    near, open_ = neighbors(mazes.size), exits(mazes.passages.flatten(1))
    ahead = next_cells(mazes, random_logits(mazes).argmax(-1))
    cells = torch.arange(mazes.size**2)
    moved = ahead != cells
    through = (near[cells].unsqueeze(0) == ahead.unsqueeze(-1)) & open_
    assert moved.any() and through.any(-1)[moved].all()
    seen = []

    def scores(left, cell, rows):
        seen.append((rows.clone(), cell.clone()))
        return random_logits(left)[:, 0]

    walk(mazes, scores, revisits=False)
    for (rows, cell), (later_rows, later_cell) in pairwise(seen):
        before = torch.full_like(mazes.start, -1).scatter(0, rows, cell)[later_rows]
        assert (open_[later_rows, before] & (near[before] == later_cell.unsqueeze(1))).any(1).all()


@pytest.mark.parametrize("revisits", [False, True])
def test_without_revisits_no_cell_comes_twice_while_another_is_left(revisits):
    mazes, _ = sample(Suite("perfect-6"), "val", torch.arange(40))
    near, open_ = neighbors(6), exits(mazes.passages.flatten(1))
    seen = torch.zeros(40, 37, dtype=torch.bool)
    had_another, needless = torch.zeros(40, dtype=torch.bool), torch.tensor(False)

    def watch(left, cell, rows):
        nonlocal needless
        needless = needless | (seen[rows, cell] & had_another[rows]).any()
        seen[rows, cell] = True
        had_another[rows] = (open_[rows, cell] & ~seen[rows].gather(1, near[cell] % 37)).any(1)
        return random_logits(left)[:, 0]

    walk(mazes, watch, revisits=revisits)
    assert needless == revisits


# ---- floors and ceilings ---------------------------------------------------------------------------------------------


def test_the_oracle_is_perfect_and_a_loop_gets_nowhere(batch):
    mazes, steps = batch
    scores = floors(mazes, steps)["oracle"]
    assert all((value[value.isfinite()] == 1).all() for value in scores.values())
    up_and_down = torch.zeros(len(mazes.start), mazes.size**2, 4)
    up_and_down[..., :2] = 1.0
    looped = walk_scores(mazes, steps, follow(mazes, greedy(mazes, up_and_down)))
    assert looped["optimal"].mean() < 0.2 and (looped["success"] >= looped["optimal"]).all()


def test_the_wall_follower_solves_every_tree_and_takes_its_time():
    mazes, steps = sample(Suite("perfect-8"), "val", torch.arange(100))
    scores = floors(mazes, steps)["wall_follower"]
    assert (scores["success"] == 1).all() and scores["spl"].mean() < 0.8


def test_floors_lie_where_they_lay():
    """On the mazes of the original's size and length; its wall-blind metric gave the random walker 72 %."""
    mazes, steps = sample(Suite("perfect-12", min_path=50), "test", torch.arange(400))
    success = {name: scores["success"].mean().item() for name, scores in floors(mazes, steps).items()}
    assert success["random_no_revisits"] == pytest.approx(0.28, abs=0.07)
    assert success["manhattan"] < 0.2 and success["random"] < 0.2
    blind = Mazes(torch.full_like(mazes.passages, 0), mazes.start, mazes.goal)
    near = neighbors(12)
    everywhere = Mazes(
        ((near >= 0).to(torch.uint8) * torch.tensor([1, 2, 4, 8], dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        .view(1, 12, 12).expand_as(blind.passages).contiguous(), mazes.start, mazes.goal,
    )  # fmt: skip
    assert walk(everywhere, manhattan_scores).success.all()  # what the original's metric let through
    drawn = random_scores(random.keys(0, torch.arange(400)), 1)
    assert walk(everywhere, drawn, revisits=False).success.float().mean() == pytest.approx(0.72, abs=0.08)


def test_the_fork_floor_is_what_random_exits_get():
    mazes, steps = sample(Suite("perfect-7", braid=0.3), "val", torch.arange(300))
    shares = [policy_scores(mazes, steps, random_logits(mazes, seed))["fork_accuracy"].nanmean() for seed in range(8)]
    assert torch.stack(shares).mean() == pytest.approx(fork_floor(mazes, steps).nanmean().item(), abs=0.01)
    assert 0.1 < forks(mazes, steps).float().mean() < 0.5


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_fall_as_moves_get_worse_and_illegal_ones_are_counted():
    mazes, steps = sample(Suite("perfect-7"), "val", torch.arange(100))
    good, bad = (policy_scores(mazes, steps, nearly_optimal(mazes, steps, noise)) for noise in (0.0, 1.0))
    assert good["success"].mean() == 1 and good["fork_accuracy"].nanmean() == 1 and good["spl"].mean() == 1
    assert good["illegal_moves"].max() == 0 and good["success_unmasked"].mean() == 1
    for name in ("success", "optimal", "spl", "fork_accuracy", "success_unmasked"):
        assert bad[name].nanmean() < 0.9
    assert bad["illegal_moves"].mean() > 0.05


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_a_walk_marks_a_shortest_way_if_and_only_if_it_is_optimal(suite):
    mazes, steps = sample(suite, "val", torch.arange(100))
    scores = policy_scores(mazes, steps, nearly_optimal(mazes, steps, 0.3))
    assert torch.equal(scores["shortest_path_grid"], scores["optimal"]) and 0 < scores["optimal"].mean() < 1
    if suite.kind == "perfect" and not suite.braid:
        assert torch.equal(scores["exact_grid"], scores["optimal"])
    else:
        assert (scores["exact_grid"] <= scores["optimal"]).all() and scores["exact_grid"].sum() < scores[
            "optimal"
        ].sum()


def test_tenths_by_length_keep_equal_lengths_together():
    length = torch.randint(3, 40, (1000,), generator=torch.Generator().manual_seed(0))
    group = length_groups(length)
    assert group.unique().tolist() == list(range(10)) and torch.bincount(group).min() > 60
    order = length.argsort()
    assert (group[order].diff() >= 0).all() and len(torch.stack([length, group]).unique(dim=1)[0]) == len(
        length.unique()
    )
    assert length_groups(torch.full((7,), 5)).unique().tolist() == [0]


def test_any_shortest_path_counts_on_the_grid_and_nothing_else():
    mazes, steps = sample(Suite("randwall-8"), "val", torch.arange(60))
    path = shortest_path(mazes, steps)
    marked = torch.zeros(60, 65, dtype=torch.bool).scatter(1, path.where(path >= 0, 64), True)[:, :64]
    assert shortest_path_grid(mazes, steps, marked.view(60, 8, 8)).all()
    other = shortest_path(Mazes(mazes.passages, mazes.goal, mazes.start), steps)  # not towards the goal: no such path
    one_more = marked.clone()
    one_more[torch.arange(60), (~marked).float().argmax(1)] = True
    one_less = marked.clone()
    one_less[torch.arange(60), mazes.start] = False
    for wrong in (one_more, one_less, torch.zeros_like(marked)):
        assert not shortest_path_grid(mazes, steps, wrong.view(60, 8, 8)).any()
    assert other.shape[0] == 60
