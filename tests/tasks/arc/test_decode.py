from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.arc.augment import canvases
from tasks.arc.decode import Rectangle, allowed, decode, score
from tasks.arc.grid import PAD, Episode, Pair, from_canvas, shapes
from tasks.arc.tokens import BOS, EOL, EOS, IGNORE_INDEX, SEP, Encoding
from tests.tasks.arc.stand_in import ByPlace, copy, noise


def questions(count: int, seed: int = 0, demos: int = 1) -> list[Episode]:
    rng = np.random.default_rng(seed)
    grid = lambda: rng.integers(0, 10, rng.integers(1, 7, 2), dtype=np.uint8)
    pairs = lambda: tuple(Pair(grid(), grid()) for _ in range(demos))
    return [Episode(f"test/{i}", pairs(), Pair(grid(), grid())) for i in range(count)]


class Speaks:
    """A session whose logits are drawn anew at every step."""

    def __init__(self, logits):
        self.logits = logits

    def begin(self, **prompt):
        return self

    def step(self, tokens, here, ahead):
        return self.logits(len(tokens))


def prompt(batch: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(batch, 1, dtype=torch.int64) for name in ("source", "source_rows", "source_columns")}


# ---- always a rectangle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "max_size", "batch"), [(1.0, 30, 100), (1.0, 8, 2000), (5.0, 8, 2000)])
def test_whatever_a_model_says_is_a_rectangle(scale, max_size, batch):
    g = torch.Generator().manual_seed(0)
    speaks = Speaks(lambda batch: scale * torch.randn(batch, 16, generator=g))
    found, log_prob = decode(speaks, prompt(batch), max_size=max_size, temperature=1.0, generator=g)
    height, width = shapes(found)
    inside = torch.arange(30)
    inside = (inside.view(30, 1) < height.view(-1, 1, 1)) & (inside < width.view(-1, 1, 1))
    assert torch.equal(found != PAD, inside) and (found <= PAD).all()
    for side in (height, width):
        assert side.min() == 1 and max_size // 2 < side.max() <= max_size
    assert (log_prob < 0).all() and log_prob.isfinite().all()


def only(token: int, value: float = 9.0) -> torch.Tensor:
    return torch.zeros(16).index_fill(0, torch.tensor([token]), value)


@pytest.mark.parametrize(
    ("logits", "shape"),
    [
        (only(EOL), (30, 1)),  # a row as short as can be, and no end
        (only(EOS), (1, 30)),  # it may not end before a row has
        (only(EOL, -9.0), (30, 30)),
        (only(PAD), (30, 30)),
        (only(SEP) + only(BOS), (30, 30)),
        (only(EOS) + only(EOL), (1, 1)),
        (torch.full((16,), torch.nan), (30, 30)),
        (only(EOL, torch.inf) + only(EOS, torch.nan), (30, 1)),
        (only(EOL, 1.0) - torch.inf, (30, 30)),
    ],
)
def test_a_model_that_wants_no_rectangle_says_one_too(logits, shape):
    found, log_prob = decode(Speaks(lambda batch: logits.expand(batch, -1)), prompt(2))
    assert from_canvas(found[0]).shape == shape and torch.equal(found[0], found[1])
    assert log_prob.isfinite().all()


def test_row_ends_are_forced_at_the_width_of_the_first():
    """Every step of an answer by hand: 2 x 3 with at most 4 each way."""
    rectangle = Rectangle(1, max_size=4)
    colours = set(range(10))
    said = [(1, colours), (2, colours | {EOL}), (3, colours | {EOL}), (EOL, colours | {EOL}), (4, colours | {EOS})]
    said += [(5, colours), (6, colours), (EOL, {EOL}), (EOS, colours | {EOS}), (PAD, {PAD})]
    for token, possible in said:
        assert set(rectangle.allowed()[0].nonzero().flatten().tolist()) == possible
        rectangle.push(torch.tensor([token]))
    assert rectangle.finished.all() and (int(rectangle.row), int(rectangle.width)) == (2, 3)


def test_the_largest_grid_has_only_its_ends_to_say():
    where = lambda row, column, width: allowed(*(torch.tensor(x) for x in (row, column, width)), 30).nonzero().flatten()
    assert where(0, 30, 0).tolist() == [EOL] == where(7, 30, 30).tolist()
    assert where(30, 0, 12).tolist() == [EOS]
    assert where(0, 0, 0).tolist() == list(range(10))


def test_a_size_that_cannot_be_is_a_sentence():
    with pytest.raises(ValueError, match="1 to 30 cells"):
        Rectangle(1, max_size=31)


# ---- what it means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_steps(temperature):
    table = noise(3)(prompt(1))[0]
    asked = Encoding().prompt(canvases(questions(6)))
    g = torch.Generator().manual_seed(1)
    found, log_prob = decode(ByPlace(noise(3)), asked, max_size=5, temperature=temperature, generator=g)
    for canvas, total in zip(found, log_prob, strict=True):
        grid, by_hand = from_canvas(canvas), 0.0
        (height, width), rectangle = grid.shape, Rectangle(1, max_size=5)
        tokens = [*np.c_[grid, np.full(height, EOL)].flatten().tolist(), EOS]
        places = [(r, c) for r in range(height) for c in range(width + 1)] + [(height, 0)]
        for token, place in zip(tokens, places, strict=True):
            logits = table[place].masked_fill(~rectangle.allowed()[0], -torch.inf)
            by_hand += float(logits[token] - logits.logsumexp(0))
            assert temperature or token == logits.argmax()
            rectangle.push(torch.tensor([token]))
        assert float(total) == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize(
    "encoding", [Encoding(), Encoding("decoder_only"), Encoding("decoder_only", loss_on_input=True)]
)
def test_a_score_is_what_decoding_the_same_answer_says(encoding):
    asked, model = questions(5, demos=2), ByPlace(noise(4))
    g = torch.Generator().manual_seed(0)
    found, log_prob = decode(model, encoding.prompt(canvases(asked)), max_size=6, temperature=1.0, generator=g)
    answered = [e._replace(query=Pair(e.query.input, from_canvas(c))) for e, c in zip(asked, found, strict=True)]
    batch = Encoding(encoding.kind).batch(canvases(answered))
    assert torch.allclose(score(model, batch, max_size=6), log_prob, atol=1e-4)
    assert not torch.allclose(score(model, batch, max_size=7), log_prob, atol=1e-4)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_a_session_hears_what_training_shows(kind):
    """The answer's tokens and places, said one by one, are those of a batch that has the answer."""
    encoding, asked, model = Encoding(kind), questions(4), ByPlace(noise(5))
    found, _ = decode(model, encoding.prompt(canvases(asked)), max_size=5)
    answered = [e._replace(query=Pair(e.query.input, from_canvas(c))) for e, c in zip(asked, found, strict=True)]
    batch = encoding.batch(canvases(answered))
    for b in range(4):
        counted = (batch["labels"][b] != IGNORE_INDEX).nonzero().flatten()
        before = batch["inputs" if kind == "encoder_decoder" else "tokens"][b, counted]
        heard = [(tokens[b], ahead[0][b], ahead[1][b]) for tokens, _, ahead in model.heard[: len(counted)]]
        assert [int(token) for token, *_ in heard] == before.tolist()
        shown = counted if kind == "encoder_decoder" else counted + 1  # places of what is said next
        places = torch.stack([batch["rows"][b, shown], batch["columns"][b, shown]], 1)
        assert [[int(r), int(c)] for _, r, c in heard] == places.tolist()
        if kind == "decoder_only":
            here = [[int(x[b]) for x in here] for _, here, _ in model.heard[: len(counted)]]
            assert here == torch.stack([batch["rows"][b, counted], batch["columns"][b, counted]], 1).tolist()


def test_a_model_that_copies_is_read_as_it_means():
    asked = questions(20)
    found, log_prob = decode(ByPlace(copy), Encoding().prompt(canvases(asked)))
    for episode, canvas in zip(asked, found, strict=True):
        assert np.array_equal(from_canvas(canvas), episode.query.input)
    assert (log_prob > -1e-5).all()


def test_the_legacy_vocabulary_is_told_the_shape():
    grids = canvases(questions(8))
    encoding, model = Encoding("decoder_only", legacy=True), ByPlace(noise(6, vocab_size=11))
    found, log_prob = decode(model, encoding.prompt(grids), shape=shapes(grids.answer))
    table = noise(6, vocab_size=11)(prompt(1))[0, ..., :10]
    for canvas, height, width, total in zip(found, *shapes(grids.answer), log_prob, strict=True):
        expected = table[:height, :width]
        assert np.array_equal(from_canvas(canvas), expected.argmax(-1).numpy())
        assert float(total) == pytest.approx(float(expected.log_softmax(-1).amax(-1).sum()), abs=1e-3)
