"""Colours alike: permuted colours in, permuted logits and grids out, bit for bit; and names that tell no secret."""

import itertools
import math

import numpy as np
import pytest
import torch

from models.arc_colours import Naming
from models.arc_encoder_decoder import ArcEncoderDecoder
from models.arc_layers import EOL, NUM_COLOURS, PAD
from models.champion import Champion
from tasks.arc.decode import decode
from tasks.arc.grid import Pair
from tests.models.tiny_arc import EPISODES, batch, build, logits, prompt

SMALL = {"decoder_layers": 1}
CANONICAL = [
    (ArcEncoderDecoder, {"position": "grid2d", "perminv": "canonical"}),
    (Champion, {"bridge": "none"}),
    (Champion, {"bridge": "film"}),
    (Champion, {"bridge": "concat_mlp"}),
    (Champion, {"refine": 3}),
]
TRANSPOSITIONS = [
    [b if c == a else a if c == b else c for c in range(10)] for a, b in itertools.combinations(range(10), 2)
]
RANDOM = [torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(50)]
MAX_SIZE = 2


def recoloured(episodes, permutation):
    names = np.array(permutation, dtype=np.uint8)
    change = lambda pair: Pair(names[pair.input], names[pair.output])
    return [e._replace(demos=tuple(map(change, e.demos)), query=change(e.query)) for e in episodes]


@torch.no_grad()
def differs(model, permutations) -> set[str]:
    """What of logits, decoded grids and losses is not the same to the last bit under a permutation of the colours."""
    asked, found = EPISODES[:2], set()
    before, grids = model_says(model, asked)
    for permutation in permutations:
        after, drawn = model_says(model, recoloured(asked, permutation))
        names = torch.tensor([*permutation, PAD], dtype=torch.uint8)
        same = {
            "logits": torch.equal(torch.cat([after[0][..., permutation], after[0][..., NUM_COLOURS:]], -1), before[0]),
            "loss": torch.equal(after[1], before[1]),
            "decoded": torch.equal(drawn, names[grids.long()]),
        }
        found |= {name for name, equal in same.items() if not equal}
    return found


def model_says(model, episodes):
    """(logits, loss) and the grids that it draws."""
    given = batch(model, episodes)
    return (logits(model, given), model(**given)["loss"]), decode(model, prompt(model, episodes), max_size=MAX_SIZE)[0]


@pytest.mark.parametrize(("kind", "changes"), CANONICAL)
def test_permuted_colours_give_permuted_answers_bit_for_bit(kind, changes):
    assert differs(build(kind, torch.float32, **SMALL, **changes), RANDOM[:3]) == set()


def test_all_transpositions_and_fifty_permutations():
    model = build(Champion, torch.float32, **SMALL)
    grids = model_says(model, EPISODES[:2])[1]
    assert len(grids.unique()) > 2, "grids of one colour would show little"
    assert differs(model, TRANSPOSITIONS + RANDOM) == set()


def test_a_table_of_colours_is_not_alike():
    model = build(Champion, torch.float32, **SMALL, perminv="table")
    for permutation in (RANDOM[0], RANDOM[1]):
        assert differs(model, [permutation]) == {"logits", "loss", "decoded"}


def test_with_fix_zero_the_other_nine_are_alike():
    model = build(Champion, torch.float32, **SMALL, fix_zero=True)
    kept = [permutation for permutation in TRANSPOSITIONS if permutation[0] == 0]
    assert len(kept) == 36 and differs(model, kept[::5]) == set()
    assert "logits" in differs(model, TRANSPOSITIONS[:1])


# --- names ---


def test_colours_are_named_as_they_appear():
    naming = Naming(torch.tensor([[7, 7, 10, 3, 7, 10], [10, 10, 10, 0, 10, 9]]))
    assert naming.names(torch.tensor([[3, 7, 10, 14], [9, 0, 12, 13]])).tolist() == [[1, 0, 10, 14], [1, 0, 12, 13]]
    naming.read(torch.tensor([[3, 5, EOL, 8], [4, 9, 4, 1]]))
    assert naming.names(torch.tensor([[5, 8], [4, 1]])).tolist() == [[2, 3], [2, 3]]
    choices = naming.choices(4)
    assert choices.count.squeeze(2).tolist() == [[2, 3, 3, 4], [3, 3, 3, 4]]
    # What may be said next: colours that have appeared, and any new one as the next name.
    assert choices.of(torch.tensor([[5, 8, 1, EOL], [9, 1, -100, 2]])).tolist() == [[2, 3, 3, EOL], [1, 3, -100, 4]]
    zero = Naming(torch.tensor([[7, 3]]), fix_zero=True)
    assert zero.names(torch.tensor([[7, 0, 3]])).tolist() == [[1, 0, 2]]


def test_logits_of_names_become_those_of_colours():
    naming = Naming(torch.tensor([[6, 2]]))
    choices = naming.choices(1)
    given = torch.randn(1, 1, 16, dtype=torch.float64).masked_fill(torch.arange(16).sub(3).abs() < 1, -math.inf)
    given[..., 3:10] = -math.inf  # names 0 and 1 are in use, 2 is the next
    assert torch.equal(choices.possible()[0, 0], given[0, 0, :10] > -math.inf)
    colours = choices.colour_logits(given)
    assert colours[0, 0, 6] == given[0, 0, 0] and colours[0, 0, 2] == given[0, 0, 1]
    torch.testing.assert_close(colours.logsumexp(-1), given.logsumexp(-1))
    unseen = colours[0, 0, [0, 1, 3, 4, 5, 7, 8, 9]]
    assert (unseen == unseen[0]).all() and torch.equal(colours[..., 10:], given[..., 10:])


def test_a_new_colour_is_said_only_where_it_is_the_only_one_left():
    for shown, expected in ((8, -math.inf), (9, None)):
        colours = torch.arange(shown).view(1, -1)
        model = build()
        empty = torch.empty(1, 0, 2, 1, dtype=torch.int64)
        session = model.begin(colours, 0 * colours, colours, empty, empty, empty)
        zero = torch.zeros(1, dtype=torch.int64)
        said = session.step(zero + 14, (zero, zero), (zero, zero))[0, :10]
        assert (said[:shown] > -math.inf).all()
        assert (said[shown:] == -math.inf).all() if expected else (said > -math.inf).all()


@pytest.mark.parametrize("kind", [ArcEncoderDecoder, Champion])
def test_the_loss_charges_for_the_name_only(kind):
    """-log p of the labels is the loss and, for each colour that is new, the log of how many it could have been."""
    model = build(kind, perminv="canonical")
    given = batch(model)
    counted = given["labels"] != -100
    log_probs = logits(model, given).log_softmax(-1).gather(2, given["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    naming = Naming(torch.cat([given["demos"].flatten(1), given["source"]], 1))
    naming.read(given["inputs"])
    choices = naming.choices(given["inputs"].shape[1])
    label = given["labels"].clamp(0, 9).unsqueeze(-1)
    new = counted & (given["labels"] < 10) & ~choices.known.gather(2, label).squeeze(-1)
    assert new.any(), "else this shows nothing"
    guessing = torch.where(new, (10 - choices.count.squeeze(2)).clamp(min=1).double().log(), 0.0)
    expected = (-log_probs - guessing)[counted].mean()
    torch.testing.assert_close(model(**given)["loss"].detach(), expected)
