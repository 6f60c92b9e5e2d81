"""ARC models: who sees what and where, sessions, losses, sizes, files and complaints."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import arc_decoder, arc_encoder_decoder, arc_layers, champion
from models.arc_decoder import ArcDecoder, ArcDecoderConfig
from models.arc_encoder_decoder import ArcEncoderDecoder, ArcEncoderDecoderConfig
from models.arc_layers import NUM_COLOURS, Borders, match, parameters
from models.champion import BRIDGES, LADDERS, PARAMETERS, Champion, ChampionConfig
from models.layers import rotary, rotate
from tasks.arc import tokens
from tests.models.tiny_arc import EPISODES, VARIANTS, answer_logits, batch, build, gradients, logits, prompt

variants = pytest.mark.parametrize(("kind", "changes"), VARIANTS)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)  # the models are float64, but sines are fp32


# --- who sees what ---


def sees_ahead(model) -> bool:
    """Whether logits before a token depend on it."""
    given = batch(model)
    name = "tokens" if isinstance(model, ArcDecoder) else "inputs"
    before = logits(model, given)
    for j in range(1, given[name].shape[1], 3 if name == "inputs" else 9):
        changed = given[name].clone()
        colours = changed[:, j] < NUM_COLOURS
        changed[:, j] = torch.where(colours, (changed[:, j] + 1) % NUM_COLOURS, changed[:, j])
        after = logits(model, {**given, name: changed})
        if not torch.equal(after[:, :j], before[:, :j]):
            return True
        if j == 1:
            assert not torch.equal(after[:, j:], before[:, j:]), "nothing depends on it at all"
    return False


@variants
def test_no_logit_depends_on_the_future(kind, changes):
    assert not sees_ahead(build(kind, **changes))


def test_an_unshifted_answer_is_seen(monkeypatch):
    """The original's defect: position t was given token t. Its loss fell to 1e-5, its exact match stayed at nothing."""
    model = build(perminv="table")
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda tokens, *rest: decode(tokens.roll(-1, 1), *rest))
    assert sees_ahead(model)


@variants
def test_others_in_a_batch_and_padding_never_matter(kind, changes):
    """The original masked no padding, and took the first sample's shape for everybody's."""
    model = build(kind, **changes)
    alone = [answer_logits(model, [episode]) for episode in EPISODES]
    close(answer_logits(model), torch.cat(alone))


def test_without_masks_padding_would_matter(monkeypatch):
    model = build()
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, attn_mask, **rest: attend(*x, **rest))
    alone = torch.cat([answer_logits(model, [episode]) for episode in EPISODES])
    assert (answer_logits(model) - alone).nan_to_num().abs().max() > 1e-3


@pytest.mark.parametrize("bridge", BRIDGES)
def test_demonstrations_reach_the_answer_through_a_bridge(bridge):
    model, given = build(bridge=bridge, perminv="table"), batch(build())
    other = given | {"demos": torch.where(given["demos"] < NUM_COLOURS, 9 - given["demos"], given["demos"])}
    moved = (logits(model, given) - logits(model, other)).nan_to_num().abs().amax((1, 2))
    assert ((moved > 1e-4) == torch.tensor([bridge != "none"] * 3 + [False])).all(), "the last has no demonstrations"


@pytest.mark.parametrize("bridge", BRIDGES[1:])
def test_the_order_of_demonstrations_does_not_matter(bridge):
    model = build(bridge=bridge, perminv="table")
    turned = [episode._replace(demos=episode.demos[::-1]) for episode in EPISODES]
    close(answer_logits(model, turned), answer_logits(model))
    swapped = [
        e._replace(demos=tuple(pair._replace(input=pair.output, output=pair.input) for pair in e.demos))
        for e in EPISODES
    ]
    assert not torch.allclose(answer_logits(model, swapped), answer_logits(model)), "but which grid is the output does"


# --- where ---


def test_rotary_products_depend_on_differences_only():
    """RoPE; in the original its base was a number that nothing read."""
    here = torch.arange(6)
    rows, columns = here.repeat_interleave(6), here.repeat(6)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    for places, base in (((rows,), 10_000.0), ((rows, columns), 100.0)):
        shifted = [place + 3 * (i + 1) for i, place in enumerate(places)]
        one, other = (
            rotate(q.expand(36, 8), *rotary(at, 8, base)) @ rotate(k.expand(36, 8), *rotary(at, 8, base)).T
            for at in (places, shifted)
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert one.std() > 0.1


@pytest.mark.parametrize("position", ["rope", "rope2d"])
def test_rotation_makes_a_decoder_blind_to_shifts(position):
    model, given = build(ArcDecoder, position=position), batch(build(ArcDecoder))
    last = given["grids"].amax(1, keepdim=True)
    at = (torch.arange(given["tokens"].shape[1])[None], given["rows"], given["columns"])
    run = lambda places: model.decode(given["tokens"], *places, last - given["grids"], causal=True)
    shifted = run([place + by for place, by in zip(at, (7, 5, 11), strict=True)])
    torch.testing.assert_close(shifted, run(at), rtol=1e-4, atol=1e-4)  # angles are fp32
    skewed = run([place * 2 for place in at])
    assert (skewed - run(at)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "place"),
    [(ArcDecoder, "rope2d"), (ArcEncoderDecoder, "grid2d"), (Champion, "grid2d"), (Champion, "borders")],
)
def test_places_are_true_rows_and_columns(kind, place):
    """The original's stride of 30 put 98 % of its grids elsewhere. Moving the numbers alone moves the logits."""
    model = build(kind, position=place)
    given = batch(model)
    unread = "demo" if kind is ArcEncoderDecoder else "?"
    names = [name for name in given if name.endswith(("rows", "columns")) and not name.startswith(unread)]
    for name in names:
        other = logits(model, given | {name: 2 * given[name] + 1})
        assert (other - logits(model, given)).nan_to_num().abs().max() > 1e-3, name


def test_a_place_is_the_same_in_any_grid():
    model = build(position="grid2d")
    wide, narrow = (torch.meshgrid(torch.arange(3), torch.arange(w), indexing="ij") for w in (30, 4))
    assert torch.equal(model.place(*wide)[:, :4], model.place(*narrow))
    table = model.place(*wide).flatten(0, 1)
    assert torch.cdist(table, table).add(torch.eye(90)).min() > 0.05, "no two cells share one"
    y, x = 2, 17
    rates = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = torch.stack([f(at * rates) for at in (y, x) for f in (torch.sin, torch.cos)]).view(2, 2, 4).mT.flatten()
    torch.testing.assert_close(model.place(*wide)[y, x], expected)


def test_borders_are_counted_from_both_sides_of_each_grid():
    borders = Borders(8)
    nn.init.normal_(borders.far.weight)
    rows, columns = (
        place.flatten().repeat(2, 1) for place in torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    )
    there = torch.stack([torch.ones(12, dtype=torch.bool), (rows[0] < 2) & (columns[0] < 3)])
    far = borders(rows, columns, there) - borders(rows, columns)
    for grid, (height, width) in zip(far, [(3, 4), (2, 3)], strict=True):
        for (r, c), code in zip(zip(rows[0].tolist(), columns[0].tolist(), strict=True), grid, strict=True):
            if r < height and c < width:
                mirrored = torch.tensor(height - 1 - r), torch.tensor(width - 1 - c)
                torch.testing.assert_close(code, borders.far(borders(*mirrored)))


def test_sinusoids_follow_the_sequence():
    model, given = build(ArcEncoderDecoder), batch(build(ArcEncoderDecoder))
    assert torch.equal(logits(model, given), logits(model, given | {"rows": given["columns"]}))


# --- sessions ---


@variants
def test_steps_say_what_forward_says(kind, changes):
    model = build(kind, **changes)
    given, session = batch(model), model.begin(**prompt(model))
    everything = logits(model, given)
    # Step t of episode b says what stands at its t-th labelled position, for a decoder somewhere in the sequence.
    where = (given["labels"] != -100).int().argsort(dim=1, descending=True, stable=True)
    token = given["tokens" if isinstance(model, ArcDecoder) else "inputs"]
    rows, columns = given["rows"], given["columns"]
    for t in range(int((given["labels"] != -100).sum(1).max())):
        at = where[:, t : t + 1]
        take = lambda x, at=at: x.gather(1, at).squeeze(1)
        place = (take(rows), take(columns))
        said = session.step(take(token), here=place, ahead=place)
        here = (take(given["labels"]) != -100).unsqueeze(1) & (said > -torch.inf)
        expected = everything[torch.arange(len(said)), at.squeeze(1)]
        close(said[here], expected[here])
        assert here.any(1).all() or t > 2


# --- losses ---


@variants
def test_every_tensor_gets_a_gradient(kind, changes):
    model = build(kind, **changes)
    found = gradients(model, batch(model))
    assert {name for name, gradient in found.items() if not gradient.abs().sum() > 0} == set()


@pytest.mark.parametrize(("kind", "changes"), [VARIANTS[1], VARIANTS[9]])
def test_parts_of_a_batch_add_up(kind, changes):
    model = build(kind, **changes)
    whole, halves = batch(model), [batch(model, EPISODES[:1]), batch(model, EPISODES[1:])]
    items = (whole["labels"] != -100).sum()
    expected, found = gradients(model, whole), gradients(model, *halves, num_items=items)
    for name in expected:
        close(found[name], expected[name], msg=name)
    losses = [model(**half, num_items=items) for half in halves]
    for part, value in model(**whole).items():
        close(sum(loss[part] for loss in losses), value)
        assert value.ndim == 0 and value.requires_grad == (part == "loss")
    ignored = whole | {"labels": torch.full_like(whole["labels"], -100)}
    assert model(**ignored)["loss"] == 0


def test_loss_is_that_of_the_logits():
    for kind, changes in VARIANTS:
        model = build(kind, **{**changes, "perminv": "table"} if kind is not ArcDecoder else changes)
        given = batch(model)
        losses = model(**given)
        close(losses["ce_loss"], F.cross_entropy(logits(model, given).flatten(0, 1), given["labels"].flatten()))
        share = getattr(model.config, "refine", 1)
        mean = (losses["ce_loss"] + (share - 1) * losses.get("refine_loss", 0)) / share
        close(losses["loss"].detach(), mean)


def test_the_first_cell_is_scored_and_an_answer_of_one_cell_can_be_right():
    """In the original the first cell was given; nothing of a 1 x 1 answer was left to say."""
    one = EPISODES[0]._replace(query=EPISODES[0].query._replace(output=EPISODES[0].query.output[:1, :1]))
    given = batch(build(), [one])
    assert (given["labels"] != -100).sum() == 3
    model = build(decoder_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        model(**given)["loss"].backward()
        optimizer.step()
    said = logits(model, given).argmax(-1)
    assert torch.equal(said[given["labels"] != -100], given["labels"][given["labels"] != -100])


# --- sizes ---


def test_presets_have_the_originals_parameters():
    """The exact figures stand where the original's arithmetic is: its vocabulary of 11, and no cross-attention."""
    sizes = {name: parameters(ArcDecoder, config) for name, config in arc_decoder.PRESETS.items()}
    assert sizes["legacy"] == 529_792 and abs(sizes["trial69"] / 530_176 - 1) < 0.01
    assert abs(parameters(ArcDecoder, ArcDecoderConfig(position="rope2d")) / 530_176 - 1) < 0.01
    assert abs(parameters(ArcEncoderDecoder, arc_encoder_decoder.PRESETS["trial69"]) / 928_523 - 1) < 0.01
    assert abs(parameters(Champion, champion.PRESETS["trial69"]) / PARAMETERS - 1) < 0.01


@pytest.mark.parametrize(("ladder", "expected"), [("trial69", PARAMETERS), ("small", 370_000)])
def test_the_ladder_is_level(ladder, expected):
    sizes = [parameters(model, config) for model, config in LADDERS[ladder].values()]
    assert max(sizes) <= 1.01 * min(sizes) and all(abs(size / expected - 1) < 0.01 for size in sizes)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_any_bridge_can_be_matched(bridge):
    found = match(Champion, ChampionConfig(bridge=bridge), PARAMETERS)
    assert abs(parameters(Champion, found) / PARAMETERS - 1) < 0.01
    assert dataclasses.replace(found, d_ff=ChampionConfig().d_ff) == ChampionConfig(bridge=bridge)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    parameters(ArcDecoder, arc_decoder.PRESETS["tiny"])
    assert torch.equal(torch.rand(1), expected), "counting draws no random numbers of others"


def test_what_cannot_be_matched_is_said():
    with pytest.raises(ValueError, match="no d_ff brings ChampionConfig within 1% of 100,000 parameters"):
        match(Champion, ChampionConfig(), 100_000)


# --- recomputation, files ---


@pytest.mark.parametrize("kind", [ArcDecoder, Champion])
def test_recomputing_changes_no_gradient(kind):
    wet = {"dropout": 0.1} if kind is ArcDecoder else {"decoder_dropout": 0.1, "encoder_dropout": 0.1}
    model = build(kind, **wet).train()
    given = batch(model)
    torch.manual_seed(1)
    expected = gradients(model, given)
    model.gradient_checkpointing = True
    torch.manual_seed(1)
    for name, gradient in gradients(model, given).items():
        close(gradient, expected[name], msg=name)


@pytest.mark.parametrize(("kind", "changes"), [VARIANTS[1], VARIANTS[4], VARIANTS[7]])
def test_files_bring_back_the_model(tmp_path, kind, changes):
    model = build(kind, dtype=torch.float32, **changes)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(logits(again, batch(model)), logits(model, batch(model)))


# --- what does not fit ---


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (
            ArcDecoderConfig,
            {"d_ff": 0, "dropout": 1.0, "vocab_size": 12},
            "d_ff must .* dropout must .* vocab_size must",
        ),
        (
            ArcDecoderConfig,
            {"position": "rope2d", "d_model": 24},
            "rope2d needs heads of a multiple of 4 channels, not 6",
        ),
        (ArcEncoderDecoderConfig, {"refine": 10**9}, "refine must be at most 100, not 1000000000"),
        (ArcDecoderConfig, {"position": "learned"}, "position must be one of rope, rope2d, not 'learned'"),
        (
            ArcEncoderDecoderConfig,
            {"d_model": 130, "refine": 0},
            "refine must .* num_heads 4; d_model must be a multiple of 4",
        ),
        (ArcEncoderDecoderConfig, {"fix_zero": True}, "fix_zero needs perminv canonical, not 'table'"),
        (
            ChampionConfig,
            {"bridge": "x", "decoder_dropout": -1},
            "decoder_dropout must .* bridge must be one of none, ",
        ),
    ],
)
def test_configs_say_all_that_is_wrong(config, changes, sentence):
    with pytest.raises(ValueError, match=f"{config.__name__}: .*{sentence}"):
        config(**changes)


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("source_rows", lambda x: x[:, 1:], r"source_rows must be int64 \[4, 16\], not torch.int64 \[4, 15\]"),
        ("demos", lambda x: x[:, :, :1], r"demos must be \[4, pairs, 2, cells\], not \[4, 3, 1, 8\]"),
        ("inputs", lambda x: x.int(), r"inputs must be int64 \[4, 16\], not torch.int32"),
        ("labels", lambda x: x[:2], r"labels must be int64 \[4, 16\], not torch.int64 \[2, 16\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name, wrong, sentence):
    model = build()
    given = batch(model)
    with pytest.raises(ValueError, match=sentence):
        model(**given | {name: wrong(given[name])})


def test_the_vocabulary_is_the_tasks():
    for name in ("PAD", "SEP", "EOL", "EOS", "BOS", "MASK", "VOCAB_SIZE", "IGNORE_INDEX"):
        assert getattr(arc_layers, name) == getattr(tokens, name)
    assert arc_decoder.LEGACY_VOCAB_SIZE == tokens.LEGACY_VOCAB_SIZE


@pytest.mark.parametrize("bridge", ["none", "film", "cross_attn"])
def test_rope2d_tells_places_apart_wherever_there_is_attention(bridge):
    """Without it, and without places added to the cells, a model could not see where anything is."""
    told, untold = (build(Champion, bridge=bridge, rope2d=on, perminv="table") for on in (True, False))
    for model in (told, untold):
        model.place = lambda rows, columns, start=0, there=None: torch.zeros((), dtype=torch.float64)
    given = batch(told)
    moved = {**given, "source_columns": given["source_columns"] + 3 * given["source_rows"]}
    assert torch.equal(logits(untold, moved), logits(untold, given))
    assert not torch.allclose(logits(told, moved), logits(told, given))
    if bridge != "none":
        moved = {**given, "demo_columns": given["demo_columns"] + 3 * given["demo_rows"]}
        assert not torch.allclose(logits(told, moved), logits(told, given))
    else:  # all that counts is how far places are apart
        shifted = {name: v + 4 if name.endswith(("rows", "columns")) else v for name, v in given.items()}
        torch.testing.assert_close(logits(told, shifted), logits(told, given))
