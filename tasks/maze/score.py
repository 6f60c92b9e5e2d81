"""Scores of maze policies, each beside the floors and ceilings it has to be read against."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks import random
from tasks.maze.distance import optimal_moves, shortest_path
from tasks.maze.grid import Mazes, exits, marked, neighbors
from tasks.maze.rollout import Walk, follow, manhattan_scores, random_scores, visited, walk, wall_follower


def start_distance(mazes: Mazes, steps: Tensor) -> Tensor:
    """int64 [B]: the length of the shortest way."""
    return steps.flatten(1).gather(1, mazes.start.unsqueeze(1)).squeeze(1).long()


def walk_scores(mazes: Mazes, steps: Tensor, walked: Walk) -> dict[str, Tensor]:
    """Per maze, float [B]: success; optimal (as short as can be); within_5_percent; spl.

    SPL is success weighted by path length, shortest / max(shortest, walked) (Anderson et al., arXiv 1807.06757).
    """
    shortest = start_distance(mazes, steps)
    success = walked.success
    return {
        "success": success.float(),
        "optimal": (success & (walked.length == shortest)).float(),
        "within_5_percent": (success & (walked.length <= 1.05 * shortest)).float(),
        "spl": success * shortest / torch.maximum(shortest, walked.length).clamp(min=1),
    }


def forks(mazes: Mazes, steps: Tensor) -> Tensor:
    """bool [B, N * N]: the cells where there is a choice: a way to the goal, and two exits besides the one back.

    At the start there is no way back, so two exits are enough. Elsewhere in a maze, moves are mostly forced.
    """
    count = exits(mazes.passages.flatten(1)).sum(-1)
    needed = torch.full_like(count, 3).scatter(1, mazes.start.unsqueeze(1), 2)
    return (count >= needed) & (steps.flatten(1) > 0)


def move_scores(mazes: Mazes, steps: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Of logits [B, N * N, 4] over the directions, per maze, float [B].

    fork_accuracy is the share of forks decided optimally, any optimal move counting (NaN where a maze has no fork);
    illegal_moves the share of cells whose best direction, walls not masked, is a wall.
    """
    reachable = steps.flatten(1) > 0
    open_ = exits(mazes.passages.flatten(1))
    blind = logits.argmax(-1, keepdim=True)
    illegal = ~open_.gather(2, blind).squeeze(2) & reachable
    best = logits.masked_fill(~open_, -torch.inf).argmax(-1, keepdim=True)
    right = exits(optimal_moves(mazes.passages, steps).flatten(1)).gather(2, best).squeeze(2)
    fork = forks(mazes, steps)
    return {
        "fork_accuracy": (right & fork).sum(1) / fork.sum(1),
        "illegal_moves": illegal.sum(1) / reachable.sum(1),
    }


def greedy(mazes: Mazes, logits: Tensor, *, masked: bool = True) -> Tensor:
    """int64 [B, N * N]: the best direction of each cell, walls left out if `masked`."""
    if masked:
        logits = logits.masked_fill(~exits(mazes.passages.flatten(1)), -torch.inf)
    return logits.argmax(-1)


def policy_scores(mazes: Mazes, steps: Tensor, logits: Tensor, answers: Tensor | None = None) -> dict[str, Tensor]:
    """All scores of one forward, per maze: the masked greedy policy's walk, the unmasked one's, and the moves'."""
    move = greedy(mazes, logits)
    scores = walk_scores(mazes, steps, follow(mazes, move))
    scores["success_unmasked"] = follow(mazes, greedy(mazes, logits, masked=False)).success.float()
    return scores | grid_scores(mazes, steps, visited(mazes, move), answers) | move_scores(mazes, steps, logits)


def length_groups(length: Tensor, count: int = 10) -> Tensor:
    """int64 [B], from 0: which tenth of the mazes by length [B] each is in; equal lengths always in the same, so that
    there may be fewer groups, and larger ones."""
    edges = length.double().quantile(torch.arange(1, count, device=length.device, dtype=torch.float64) / count)
    return torch.bucketize(length.double(), edges.unique(), right=True).unique(return_inverse=True)[1]


# ---- floors, ceilings ------------------------------------------------------------------------------------------------


def fork_floor(mazes: Mazes, steps: Tensor) -> Tensor:
    """float [B]: the fork accuracy to be expected of a uniformly random exit."""
    right = exits(optimal_moves(mazes.passages, steps).flatten(1)).sum(-1)
    fork = forks(mazes, steps)
    chance = right / exits(mazes.passages.flatten(1)).sum(-1).clamp(min=1)
    return (chance * fork).sum(1) / fork.sum(1)


def floors(mazes: Mazes, steps: Tensor, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Per policy, the walk scores per maze: what no model may fall below unnoticed, and the oracle that none can beat.

    The random walkers get N * N steps, as models do, the wall follower four times as many.
    """
    key = random.keys(seed, torch.arange(len(mazes.start), device=mazes.start.device))
    optimal = exits(optimal_moves(mazes.passages, steps).flatten(1)).float()
    walks = {
        "random": walk(mazes, random_scores(key, 1)),
        "random_no_revisits": walk(mazes, random_scores(key, 2), revisits=False),
        "manhattan": walk(mazes, manhattan_scores),
        "wall_follower": wall_follower(mazes),
        "oracle": follow(mazes, optimal.argmax(-1)),
    }
    scores = {name: walk_scores(mazes, steps, walked) for name, walked in walks.items()}
    cells = torch.arange(mazes.size**2, device=mazes.start.device)
    towards = torch.stack([manhattan_scores(mazes, cell.expand_as(mazes.start), cell) for cell in cells], 1)
    scores["random"]["fork_accuracy"] = fork_floor(mazes, steps)
    scores["manhattan"]["fork_accuracy"] = move_scores(mazes, steps, towards)["fork_accuracy"]
    scores["oracle"]["fork_accuracy"] = move_scores(mazes, steps, optimal)["fork_accuracy"]
    return scores


# ---- marked cells ----------------------------------------------------------------------------------------------------


def grid_scores(mazes: Mazes, steps: Tensor, drawn: Tensor, answers: Tensor | None = None) -> dict[str, Tensor]:
    """What those score who have a model mark the way's cells, float [B]: exact_grid and shortest_path_grid.

    exact_grid asks for the marks of `answers`, bool [B, N, N], by default those of `shortest_path`; shortest_path_grid
    for those of any shortest way. The two are one where only one way leads to the goal, as in every perfect maze. For
    the cells that a walk enters the second is `optimal` under another name.
    """
    answers = marked(shortest_path(mazes, steps), mazes.size) if answers is None else answers
    return {
        "exact_grid": (drawn == answers).flatten(1).all(1).float(),
        "shortest_path_grid": shortest_path_grid(mazes, steps, drawn).float(),
    }


def shortest_path_grid(mazes: Mazes, steps: Tensor, drawn: Tensor) -> Tensor:
    """bool [B]: the cells marked in `drawn`, bool [B, N, N], are one shortest way from start to goal, whichever.

    They are if the start is marked, every marked cell but the goal has a marked one that an optimal move leads to, and
    there are no more of them than the way is long.
    """
    marked, flat = drawn.flatten(1), steps.flatten(1).long()
    shortest = start_distance(mazes, steps)
    enough = (marked.sum(1) == shortest + 1) & marked.gather(1, mazes.start.unsqueeze(1)).squeeze(1)
    moves = exits(optimal_moves(mazes.passages, steps).flatten(1))
    near = neighbors(mazes.size, flat.device)
    next_marked = torch.nn.functional.pad(marked, (0, 1))[:, near]  # index -1 reads the padding
    joined = ((moves & next_marked).any(-1) | ~marked | (flat == 0)).all(1)
    return enough & joined
