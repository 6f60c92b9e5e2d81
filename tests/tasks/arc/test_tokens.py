from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks import random
from tasks.arc.augment import Augmentation, canvases, unchanged
from tasks.arc.grid import PAD, Episode, Pair, from_canvas
from tasks.arc.tokens import BOS, EOL, EOS, IGNORE_INDEX, MASK, SEP, Encoding, bucket, colours_at, masked


def an_episode(seed: int, pairs: int = 2, high: int = 7) -> Episode:
    rng = np.random.default_rng(seed)
    grid = lambda: rng.integers(0, 10, rng.integers(1, high, 2), dtype=np.uint8)
    made = [Pair(grid(), grid()) for _ in range(pairs + 1)]
    return Episode(f"test/{seed}", tuple(made[:-1]), made[-1])


EPISODES = [an_episode(0), an_episode(1, pairs=0), an_episode(2, pairs=3), an_episode(3, high=13)]


def spoken(grid: np.ndarray, end: int) -> list[tuple[int, int, int]]:
    """Token by token what a grid is: (token, row, column)."""
    said = []
    for r, row in enumerate(grid.tolist()):
        said += [(colour, r, c) for c, colour in enumerate(row)] + [(EOL, r, len(row))]
    return [*said, (end, len(grid), 0)]


def all_grids(episode: Episode) -> list[np.ndarray]:
    return [grid for pair in (*episode.demos, episode.query) for grid in pair]


def rows_of(batch, names, b, count):
    return list(zip(*(batch[name][b].flatten()[:count].tolist() for name in names), strict=True))


# ---- encoder and decoder ---------------------------------------------------------------------------------------------


def test_a_question_is_its_cells_with_their_true_places():
    batch = Encoding().batch(canvases(EPISODES))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    for b, episode in enumerate(EPISODES):
        cells = lambda grid: [(grid[r, c], r, c) for r, c in np.ndindex(grid.shape)]
        source = ("source", "source_rows", "source_columns")
        assert rows_of(batch, source, b, episode.query.input.size) == cells(episode.query.input)
        assert (batch["source"][b, episode.query.input.size :] == PAD).all()
        for p, pair in enumerate(episode.demos):
            for which, grid in enumerate(pair):
                one = {name: batch[name][:, p, which] for name in ("demos", "demo_rows", "demo_columns")}
                assert rows_of(one, one, b, grid.size) == cells(grid)
                assert (one["demos"][b, grid.size :] == PAD).all()
        assert (batch["demos"][b, len(episode.demos) :] == PAD).all()


def test_an_answer_says_where_its_rows_and_it_itself_end():
    batch = Encoding().batch(canvases(EPISODES))
    for b, episode in enumerate(EPISODES):
        said = spoken(episode.query.output, EOS)
        assert rows_of(batch, ("labels", "rows", "columns"), b, len(said)) == said
        assert batch["inputs"][b, : len(said)].tolist() == [BOS, *(token for token, _, _ in said[:-1])]
        assert (batch["labels"][b, len(said) :] == IGNORE_INDEX).all() and (
            batch["inputs"][b, len(said) :] == PAD
        ).all()
        height, width = episode.query.output.shape
        assert len(said) == height * (width + 1) + 1 == (batch["labels"][b] != IGNORE_INDEX).sum()


def test_the_prompt_is_the_batch_without_its_answer():
    grids = canvases(EPISODES)
    batch, prompt = Encoding().batch(grids), Encoding().prompt(grids)
    assert batch.keys() - prompt.keys() == {"inputs", "rows", "columns", "labels"}
    assert all(torch.equal(prompt[name], batch[name]) for name in prompt)


def test_answers_are_read_back_from_labels():
    batch = Encoding().batch(canvases(EPISODES))
    for episode, found in zip(EPISODES, colours_at(batch["labels"], batch["rows"], batch["columns"]), strict=True):
        assert np.array_equal(from_canvas(found), episode.query.output)


# ---- one sequence ----------------------------------------------------------------------------------------------------


def sequence(episode: Episode) -> list[tuple[int, int, int, int]]:
    said, grids = [(BOS, 0, 0, 0)], all_grids(episode)
    for number, grid in enumerate(grids):
        end = EOS if number == len(grids) - 1 else SEP
        said += [(*token, number) for token in spoken(grid, end)]
    return said


def test_a_sequence_is_all_grids_one_after_another():
    batch = Encoding("decoder_only").batch(canvases(EPISODES))
    for b, episode in enumerate(EPISODES):
        said = sequence(episode)
        assert rows_of(batch, ("tokens", "rows", "columns", "grids"), b, len(said)) == said
        assert (batch["tokens"][b, len(said) :] == PAD).all()
        answer = spoken(episode.query.output, EOS)
        counted = batch["labels"][b] != IGNORE_INDEX
        assert counted.nonzero().flatten().tolist() == list(range(len(said) - len(answer) - 1, len(said) - 1))
        assert batch["labels"][b][counted].tolist() == [token for token, _, _ in answer]


def test_the_loss_on_the_input_is_on_every_token_but_the_first():
    batch = Encoding("decoder_only", loss_on_input=True).batch(canvases(EPISODES))
    for b, episode in enumerate(EPISODES):
        said = [token for token, *_ in sequence(episode)]
        assert batch["labels"][b, : len(said) - 1].tolist() == said[1:]
        assert (batch["labels"][b, len(said) - 1 :] == IGNORE_INDEX).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_prompt_ends_with_the_separator_before_the_answer(legacy):
    encoding, grids = Encoding("decoder_only", legacy=legacy), canvases(EPISODES)
    batch, prompt = encoding.batch(grids), encoding.prompt(grids)
    for b in range(len(EPISODES)):
        first = int((batch["labels"][b] != IGNORE_INDEX).nonzero()[0])  # said at the separator
        for name in prompt:
            assert torch.equal(prompt[name][b, : first + 1], batch[name][b, : first + 1])
        assert (
            prompt["tokens"][b, first] == (PAD if legacy else SEP) and (prompt["tokens"][b, first + 1 :] == PAD).all()
        )


def test_the_legacy_vocabulary_is_flat_grids_between_tens_that_are_never_a_target():
    batch = Encoding("decoder_only", legacy=True, loss_on_input=True).batch(canvases(EPISODES))
    answer = Encoding("decoder_only", legacy=True).batch(canvases(EPISODES))
    for b, episode in enumerate(EPISODES):
        flat = [token for grid in all_grids(episode) for token in [*grid.flatten().tolist(), 10]]
        assert batch["tokens"][b, : len(flat)].tolist() == flat and (batch["tokens"][b, len(flat) :] == 10).all()
        expected = [token if token != 10 else IGNORE_INDEX for token in flat[1:]]
        assert batch["labels"][b, : len(flat) - 1].tolist() == expected
        assert answer["labels"][b][answer["labels"][b] >= 0].tolist() == episode.query.output.flatten().tolist()
    assert (batch["labels"] != 10).all()


# ---- both ------------------------------------------------------------------------------------------------------------

ENCODINGS = [Encoding(), Encoding("decoder_only"), Encoding("decoder_only", legacy=True, loss_on_input=True)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sample_reads_the_same_alone_and_among_larger_ones(encoding):
    together = encoding.batch(canvases(EPISODES))
    for b, episode in enumerate(EPISODES):
        for name, alone in encoding.batch(canvases([episode])).items():
            inside = tuple(slice(n) for n in alone.shape[1:])
            assert torch.equal(together[name][b][inside], alone[0]), name


@pytest.mark.parametrize("encoding", ENCODINGS[:2])
def test_an_offset_moves_all_places_and_only_them(encoding):
    grids = canvases(EPISODES)
    offset = Augmentation().draw(random.keys(0, torch.arange(4)), 3).offset(grids)
    before, after = encoding.batch(grids), encoding.batch(grids, offset)
    for name in before:
        axis = 0 if name.endswith("rows") else 1 if name.endswith("columns") else None
        moved = after[name] - before[name]
        if axis is None:
            assert not moved.any()
        else:
            expected = offset[:, axis].view(-1, *[1] * (moved.dim() - 1)).expand_as(moved)
            assert ((moved == 0) | (moved == expected)).all() and (moved != 0).any()
            assert after[name].max() <= 30


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_sequence_of_an_episode_is_longer_than_its_length_however_it_is_turned(encoding):
    square = Episode("square/0", (), Pair(np.ones((5, 5), np.uint8), np.ones((4, 4), np.uint8)))
    for episode in (*EPISODES, square):
        grids = canvases([episode]).map(lambda canvas: canvas.repeat(8, *[1] * (canvas.dim() - 1)))
        turned = unchanged(8, len(episode.demos))._replace(symmetry=torch.arange(8)).apply(grids)
        batch = encoding.batch(turned)
        if encoding.kind == "decoder_only":
            longest = 1 + (batch["labels"] != IGNORE_INDEX).nonzero()[:, 1].max() + 1
        else:
            longest = max((batch[name] != PAD).sum(-1).amax() for name in ("source", "inputs"))
            longest = max([longest, *(batch["demos"] != PAD).sum(-1).flatten()])
        assert longest <= encoding.length((*episode.demos, episode.query), len(episode.demos) + 1)
    assert longest == encoding.length((square.query,), 1)


def test_lengths_are_few():
    assert [bucket(n) for n in (1, 16, 17, 64, 65, 97, 931, 9031)] == [8, 16, 24, 64, 96, 128, 1024, 12288]
    assert len({bucket(n) for n in range(1, 9332)}) == 23 and all(bucket(n) >= n for n in range(1, 9332))


def test_the_largest_episode_fits():
    full = np.full((30, 30), 7, dtype=np.uint8)
    episode = Episode("full/0", (Pair(full, full),) * 10, Pair(full, full))
    batch = Encoding("decoder_only").batch(canvases([episode]))
    assert batch["tokens"].shape == (1, 24576) and (batch["tokens"] != PAD).sum() == 1 + 22 * 931
    assert Encoding("decoder_only").length((episode.query,) * 20, 11) == 1 + 22 * 931
    assert Encoding().batch(canvases([episode]))["labels"].shape == (1, 1024)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"kind": "both"}, "encoder_decoder, decoder_only"), ({"legacy": True}, "are those of kind='decoder_only'")],
)
def test_an_encoding_that_cannot_be_is_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Encoding(**settings)


# ---- hidden answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "on_input"), [("encoder_decoder", False), ("decoder_only", False), ("decoder_only", True)]
)
def test_only_what_was_said_of_the_answer_is_hidden(kind, on_input):
    episodes = [EPISODES[i % 4] for i in range(400)]
    plain, key = Encoding(kind, loss_on_input=on_input).batch(canvases(episodes)), random.keys(torch.arange(400))
    batch = masked(plain, key)
    name = {"encoder_decoder": "inputs", "decoder_only": "tokens"}[kind]
    assert all(torch.equal(batch[other], plain[other]) for other in plain if other != name)
    hidden = batch[name] != plain[name]
    assert (batch[name][hidden] == MASK).all()
    for b in range(4):  # the answer is the end of the sequence, and what ends it is never an input with an encoder
        answer = spoken(episodes[b].query.output, EOS)
        end = int((plain[name][b] != PAD).sum())
        start = end - len(answer) + (kind == "encoder_decoder")
        ever = hidden[b::4].any(0).nonzero().flatten().tolist()
        assert ever == list(range(start, end)) if not on_input else set(range(start, end)) <= set(ever)
    longest = [i for i in range(400) if i % 4 == 3]
    shares = hidden[longest].float().sum(1) / hidden[longest].any(0).sum()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.1) and shares.std().item() == pytest.approx(0.29, abs=0.05)
    few = Encoding(kind, loss_on_input=on_input).batch(canvases(episodes[7:9]))
    end = few[name].shape[1]
    assert torch.equal(masked(few, key[7:9])[name], batch[name][7:9, :end]), "an item is hidden alike in any batch"
