"""One question seen in many ways, and what its answers agree on.

A rule that holds for a grid holds for its reflection with other colours. So each question is asked in several views,
each answer is mapped back, and the answers are ranked by how many views gave them. In TRM a thousand views were worth
11 points of exact match over one (arXiv 2512.11847).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks import random
from tasks.arc.augment import NUM_SYMMETRIES, Augmentation, Canvases, Draw, canvases, unchanged
from tasks.arc.decode import decode, score
from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, PAD, Episode, Grid, Pair, from_canvas
from tasks.arc.tokens import Encoding


class Candidate(NamedTuple):
    grid: Grid
    votes: int  # views that gave it
    log_prob: float  # of their answers, the mean
    joint: float | None = None  # the mean over all views, whether they gave it or not; None where it was not asked


def views(count: int, pairs: int, *, canonical: bool = False, fix_zero: bool = False, seed: int = 0) -> Draw:
    """The first `count` of 8 symmetries x any number of colourings, beginning with what changes nothing.

    A model that names colours by their first appearance is shown the 8 symmetries at most: it is blind to colourings.
    """
    if count < 1:
        raise ValueError(f"views={count}: at least 1 is needed")
    number = torch.arange(min(count, NUM_SYMMETRIES) if canonical else count)
    colouring = number // NUM_SYMMETRIES
    drawn = Augmentation(fix_zero=fix_zero).draw(random.keys(seed, colouring), pairs)
    plain = unchanged(len(number), pairs)
    colours = torch.where(colouring.unsqueeze(1) == 0, plain.colours, drawn.colours)
    return plain._replace(symmetry=number % NUM_SYMMETRIES, colours=colours)


def solve(
    model: Any,
    episodes: Sequence[Episode],
    encoding: Encoding,
    *,
    num_views: int = 32,
    canonical: bool = False,
    fix_zero: bool = False,
    rescore: bool = False,
    batch_size: int = 256,
    max_size: int = MAX_SIZE,
    seed: int = 0,
) -> list[list[Candidate]]:
    """For each episode all answers that some view gave, best first: by votes and then by mean log-probability.

    With `rescore` the order is by the mean log-probability that all views give to an answer: a product of experts, the
    geometric mean of their distributions (arXiv 2505.07859). Views that look the same to the model have one vote
    between them. Raises ValueError for the legacy vocabulary, in which a shape cannot be said.
    """
    if encoding.legacy:
        raise ValueError("the legacy vocabulary cannot say the shape of an answer, so it cannot answer new questions")
    at_once = max(1, batch_size // len(views(num_views, 0, canonical=canonical).symmetry))
    # Alike in size, so that few rows wait for the longest.
    by_size = sorted(range(len(episodes)), key=lambda i: _num_cells(episodes[i]))
    found: list[list[Candidate]] = [[] for _ in episodes]
    for numbers in (by_size[i : i + at_once] for i in range(0, len(by_size), at_once)):
        asked = [episodes[i]._replace(query=episodes[i].query._replace(output=None)) for i in numbers]
        pairs = max(len(episode.demos) for episode in asked)
        draw = views(num_views, pairs, canonical=canonical, fix_zero=fix_zero, seed=seed)
        seen, every = _in_views(model, asked, draw)
        answers, log_probs = decode(model, encoding.prompt(seen), max_size=max_size)
        answers, log_probs = (x.unflatten(0, (len(asked), -1)) for x in (every.undo(answers), log_probs))
        looks = seen.grids().flatten(1).unflatten(0, (len(asked), -1))  # [E, V, C]
        for row, i in enumerate(numbers):
            distinct = _distinct(_by_appearance(looks[row], fix_zero) if canonical else looks[row])
            candidates = _counted(answers[row][distinct], log_probs[row][distinct])
            if rescore:
                own = Draw(*(part[distinct.cpu()] for part in draw))
                joint = _joint(model, asked[row], candidates, own, encoding, batch_size, max_size)
                candidates = [c._replace(joint=value) for c, value in zip(candidates, joint, strict=True)]
            found[i] = sorted(candidates, key=_rank, reverse=True)
    return found


def attempts(candidates: Sequence[Candidate], count: int = 2) -> list[Grid]:
    """The best distinct answers; fewer where all views agree."""
    return [candidate.grid for candidate in candidates[:count]]


def _rank(candidate: Candidate) -> tuple[float, ...]:
    ranks = (candidate.votes, candidate.log_prob)
    return ranks if candidate.joint is None else (candidate.joint, *ranks)


def _num_cells(episode: Episode) -> int:
    return sum(grid.size for pair in (*episode.demos, episode.query) for grid in pair if grid is not None)


def _in_views(model: Any, episodes: Sequence[Episode], draw: Draw) -> tuple[Canvases, Draw]:
    """Every episode in each of V views, [E * V, ...] on the model's device, and what was done to each."""
    device, count = next(model.parameters()).device, len(draw.symmetry)
    every = Draw(*(part.repeat(len(episodes), *[1] * (part.dim() - 1)) for part in draw)).to(device)
    return every.apply(canvases(episodes).map(lambda grids: grids.to(device).repeat_interleave(count, 0))), every


def _distinct(cells: Tensor) -> Tensor:
    """Which views of one question, its cells [V, C], no earlier one looks like: bool [V]."""
    _, number = cells.unique(dim=0, return_inverse=True)
    first = (number.unsqueeze(1) == number).long().argmax(1)
    return first == torch.arange(len(cells), device=cells.device)


def _by_appearance(cells: Tensor, fix_zero: bool) -> Tensor:
    """Cells [V, C] with the colour that comes first called 0, the next one 1, …; 0 stays 0 with `fix_zero`."""
    where = torch.stack([(cells == colour).long().argmax(1) for colour in range(NUM_COLOURS)], 1)  # [V, 10]
    absent = torch.stack([(cells != colour).all(1) for colour in range(NUM_COLOURS)], 1)
    where = where.masked_fill(absent, cells.shape[1])
    if fix_zero:
        where[:, 0] = -1
    names = where.argsort(dim=1, stable=True).argsort(1)
    return torch.cat([names, names.new_full((len(names), 1), PAD)], 1).gather(1, cells.long())


def _counted(answers: Tensor, log_probs: Tensor) -> list[Candidate]:
    """Answers [V, 30, 30] of one question, each once."""
    grids, number, votes = answers.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(grids), device=log_probs.device).index_add(0, number, log_probs) / votes
    kept = zip(grids.unflatten(1, answers.shape[1:]), votes.tolist(), mean.tolist(), strict=True)
    return [Candidate(from_canvas(grid), votes, log_prob) for grid, votes, log_prob in kept]


def _joint(
    model: Any,
    episode: Episode,
    candidates: Sequence[Candidate],
    draw: Draw,
    encoding: Encoding,
    batch_size: int,
    max_size: int,
) -> list[float]:
    """The mean over views of the log-probability of each candidate."""
    answered = [episode._replace(query=Pair(episode.query.input, candidate.grid)) for candidate in candidates]
    seen, _ = _in_views(model, answered, draw)
    parts = zip(*(grids.split(batch_size) for grids in seen), strict=True)
    scores = torch.cat([score(model, encoding.batch(Canvases(*part)), max_size) for part in parts])
    return scores.view(len(candidates), -1).mean(1).tolist()
