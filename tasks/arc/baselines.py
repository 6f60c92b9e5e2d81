"""What can be scored without understanding a rule: every score stands beside these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np

from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, Episode, Grid
from tasks.arc.score import mean_scores, question_scores


def copy_input(episode: Episode) -> Grid:
    return episode.query.input


def majority_colour(episode: Episode) -> Grid:
    """The most frequent colour of the demonstrated outputs, in the shape of `guessed_shape`."""
    return np.full(guessed_shape(episode), _majority(episode), dtype=np.uint8)


def nearest_demo(episode: Episode) -> Grid:
    """The output of the demonstration whose input is most like the query's, the first of several; without any, that."""
    query = episode.query.input
    if not episode.demos:
        return query
    return min(episode.demos, key=lambda pair: _difference(pair.input, query)).output


def repeat_previous_cell(episode: Episode) -> Grid:
    """Every cell as the right one before it in reading order, the first in the majority colour. Needs the answer.

    What teacher forcing gives away for nothing: the shape, most cells, and all of a grid of one colour.
    """
    target = episode.query.output
    cells = np.concatenate([[_majority(episode)], target.ravel()[:-1]])
    return cells.reshape(target.shape).astype(np.uint8)


BASELINES: dict[str, Callable[[Episode], Grid]] = {
    "copy_input": copy_input,
    "majority_colour": majority_colour,
    "nearest_demo": nearest_demo,
    "repeat_previous_cell_teacher_forced": repeat_previous_cell,
}


def baselines(episodes: Iterable[Episode]) -> dict[str, dict[str, float]]:
    """`score.mean_scores` of each of BASELINES. Raises ValueError for an episode whose answer is not known."""
    episodes = list(episodes)
    if not episodes:
        raise ValueError("no question to score; at least one test input is needed")
    for episode in episodes:
        if episode.query.output is None:
            raise ValueError(f"question {episode.id}: the answer is not known, so nothing can be scored")
    return {
        name: mean_scores(question_scores(said(e), e.query.output, e.query.input) for e in episodes)
        for name, said in BASELINES.items()
    }


def guessed_shape(episode: Episode) -> tuple[int, int]:
    """Height and width of the answer, each on its own, by the first rule that every demonstration follows: as long as
    the input; always as long; in one ratio to the input. The query's own where none holds or leads out of 1 … 30."""
    asked = episode.query.input.shape
    axes = [[(pair.input.shape[axis], pair.output.shape[axis]) for pair in episode.demos] for axis in (0, 1)]
    return _guessed_length(axes[0], asked[0]), _guessed_length(axes[1], asked[1])


def _guessed_length(shown: list[tuple[int, int]], asked: int) -> int:
    """shown: (input, output) of each demonstration."""
    if all(before == after for before, after in shown):
        return asked
    if len({after for _, after in shown}) == 1:
        return shown[0][1]
    ratios = {Fraction(after, before) for before, after in shown}
    guess = ratios.pop() * asked
    return int(guess) if not ratios and guess.denominator == 1 and guess <= MAX_SIZE else asked


def _majority(episode: Episode) -> int:
    grids = [pair.output for pair in episode.demos] or [episode.query.input]
    return int(np.bincount(np.concatenate([grid.ravel() for grid in grids]), minlength=NUM_COLOURS).argmax())


def _difference(one: Grid, other: Grid) -> int:
    """Cells that differ with the top left corners laid on each other, those that only one has included."""
    height, width = np.minimum(one.shape, other.shape)
    same = (one[:height, :width] == other[:height, :width]).sum()
    return int(one.size + other.size - height * width - same)
