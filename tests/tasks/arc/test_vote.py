from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.arc.augment import Draw, canvases
from tasks.arc.decode import decode, score
from tasks.arc.grid import Episode, Pair, from_canvas
from tasks.arc.tokens import Encoding
from tasks.arc.vote import Candidate, attempts, solve, views
from tests.tasks.arc.stand_in import ByPlace, copy, noise

ENCODING = Encoding()


def questions(count: int, seed: int = 0) -> list[Episode]:
    rng = np.random.default_rng(seed)
    grid = lambda: rng.integers(0, 10, rng.integers(2, 6, 2), dtype=np.uint8)
    pair = lambda: Pair(grid(), grid())
    return [Episode(f"test/{i}", tuple(pair() for _ in range(i % 3)), pair()) for i in range(count)]


def copy_or_not(prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Copies, but says another colour in the corner if the one there is 0 … 3."""
    logits = copy(prompt)
    wrong = prompt["source"][:, 0] < 4
    logits[wrong, 0, 0] = logits[wrong, 0, 0].roll(4, -1)
    return logits


# ---- views -----------------------------------------------------------------------------------------------------------


def test_views_are_symmetries_times_colourings_and_begin_with_nothing_changed():
    draw = views(32, 2)
    assert draw.symmetry.tolist() == list(range(8)) * 4
    assert torch.equal(draw.colours[:8], torch.arange(10).expand(8, -1))
    assert len(draw.colours.unique(dim=0)) == 4 and torch.equal(draw.colours[8], draw.colours[15])
    assert len(views(1, 2).symmetry) == 1 and views(1, 2).symmetry == 0
    assert all(torch.equal(a[:20], b) for a, b in zip(draw, views(20, 2), strict=True))
    assert (views(32, 0, fix_zero=True).colours[:, 0] == 0).all() and (draw.colours[:, 0] != 0).any()


def test_a_model_that_is_blind_to_colourings_has_eight_views():
    assert views(32, 2, canonical=True).symmetry.tolist() == list(range(8))
    assert views(3, 2, canonical=True).symmetry.tolist() == [0, 1, 2]


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_who_is_right_in_every_view_is_unanimous(batch_size):
    asked = questions(7)
    for episode, found in zip(
        asked, solve(ByPlace(copy), asked, ENCODING, num_views=16, batch_size=batch_size), strict=True
    ):
        assert len(found) == 1 and found[0].votes == 16
        assert np.array_equal(found[0].grid, episode.query.input)


def test_votes_are_counted_over_what_the_views_gave_after_mapping_back():
    """Against a loop over the views, one by one."""
    for episode, found in zip(
        questions(2), solve(ByPlace(copy_or_not), questions(2), ENCODING, num_views=12), strict=True
    ):
        asked, draw, heap = canvases([episode]), views(12, len(episode.demos)), {}
        for v in range(12):
            one = Draw(*(part[v : v + 1] for part in draw))
            said, log_prob = decode(ByPlace(copy_or_not), ENCODING.prompt(one.apply(asked)))
            grid = from_canvas(one.undo(said)[0])
            heap.setdefault((grid.shape, grid.tobytes()), []).append(float(log_prob))
        expected = sorted(((len(x), sum(x) / len(x)) for x in heap.values()), reverse=True)
        assert len(found) == len(expected) > 1
        for candidate, (votes, log_prob) in zip(found, expected, strict=True):
            assert candidate.votes == votes and candidate.log_prob == pytest.approx(log_prob, abs=1e-4)
            same = heap[candidate.grid.shape, candidate.grid.tobytes()]
            assert len(same) == votes
        assert np.array_equal(found[0].grid, episode.query.input)


def test_a_mistake_of_one_view_is_outvoted():
    """What a single look gets wrong in 4 of 10 corners."""
    asked = [e for e in questions(30) if e.query.input[0, 0] < 4]
    hit = lambda found: np.mean([np.array_equal(f[0].grid, e.query.input) for f, e in zip(found, asked, strict=True)])
    assert len(asked) > 5
    assert hit(solve(ByPlace(copy_or_not), asked, ENCODING, num_views=1)) == 0
    assert hit(solve(ByPlace(copy_or_not), asked, ENCODING, num_views=32)) == 1


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("fix_zero", [False, True])
def test_views_that_look_the_same_have_one_vote_between_them(canonical, fix_zero):
    flat, checks = np.full((3, 3), 5, np.uint8), np.array([[0, 2], [2, 0]], np.uint8)
    asked = [Episode("a/0", (), Pair(flat, None)), Episode("b/0", (), Pair(checks, None))]
    settings = {"num_views": 32, "canonical": canonical, "fix_zero": fix_zero}
    one, other = solve(ByPlace(copy), asked, ENCODING, **settings)
    if canonical:
        # Turned checks are checks with their colours exchanged, which is seen where 0 keeps its name.
        assert one[0].votes == 1 and other[0].votes == (2 if fix_zero else 1)
        return
    colourings = views(32, 0, fix_zero=fix_zero).colours[::8]
    assert one[0].votes == len(colourings[:, 5].unique())
    shown = {tuple(pair) for colours in colourings[:, [0, 2]].tolist() for pair in (colours, colours[::-1])}
    assert other[0].votes == len(shown)


def test_an_answer_that_is_there_already_is_not_looked_at():
    flat = Pair(
        np.full((2, 2), 5, np.uint8), np.array([[1, 2], [3, 4]], np.uint8)
    )  # its views differ in the answer only
    asked = [*questions(2), Episode("flat/0", (), flat)]
    unknown = [episode._replace(query=Pair(episode.query.input, None)) for episode in asked]
    model = ByPlace(noise(0))
    for with_it, without in zip(
        *(solve(model, given, ENCODING, num_views=8, max_size=5) for given in (asked, unknown)), strict=True
    ):
        assert [c.votes for c in with_it] == [c.votes for c in without]
        assert all(np.array_equal(a.grid, b.grid) for a, b in zip(with_it, without, strict=True))


# ---- product of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [Encoding(), Encoding("decoder_only")])
def test_the_joint_score_is_the_mean_over_all_views(encoding):
    asked, model = questions(2, seed=4), ByPlace(noise(1))
    for episode, found in zip(
        asked, solve(model, asked, encoding, num_views=5, rescore=True, batch_size=4, max_size=4), strict=True
    ):
        assert [c.joint for c in found] == sorted((c.joint for c in found), reverse=True)
        for candidate in found:
            answered = canvases([episode._replace(query=Pair(episode.query.input, candidate.grid))])
            draw = views(5, len(episode.demos))
            each = [Draw(*(part[v : v + 1] for part in draw)).apply(answered) for v in range(5)]
            expected = torch.cat([score(model, encoding.batch(one), max_size=4) for one in each]).mean()
            assert candidate.joint == pytest.approx(float(expected), abs=1e-3)


def test_attempts_are_the_best_distinct_answers():
    grids = [np.full((1, k), k, np.uint8) for k in (1, 2, 3)]
    ranked = [Candidate(grid, 3 - i, -1.0) for i, grid in enumerate(grids)]
    assert attempts(ranked) == grids[:2] and attempts(ranked, 1) == grids[:1] and attempts(ranked[:1]) == grids[:1]


def test_what_cannot_be_solved_is_a_sentence():
    with pytest.raises(ValueError, match="cannot say the shape"):
        solve(ByPlace(noise(0)), questions(1), Encoding("decoder_only", legacy=True))
    with pytest.raises(ValueError, match="at least 1"):
        solve(ByPlace(noise(0)), questions(1), ENCODING, num_views=0)
