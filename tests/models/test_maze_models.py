"""Maze models: what they see, what they compute, their losses, files and complaints."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.maze_layers import HorizonHead, offset_classes, rotate
from models.maze_transformer import MazeTransformer, MazeTransformerConfig
from models.poh import PoH, PoHConfig
from models.trm import TRM, TRMConfig
from tasks.maze.grid import neighbors
from tests.models.tiny_mazes import KINDS, TINY, build, gradients, mazes, scores

# --- what they see ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maze_enc", [False, True])
def test_walls_reach_the_model(kind, maze_enc):
    model, batch = build(kind, maze_enc=maze_enc).eval(), {**mazes(1), "candidates": neighbors(4).view(1, 16, 1, 4)}
    for bit in range(4):
        other = {**batch, "passages": batch["passages"] ^ torch.tensor(1 << bit, dtype=torch.uint8)}
        assert (scores(model, batch) - scores(model, other)).nan_to_num().abs().max() > 1e-4


@pytest.mark.parametrize("kind", [MazeTransformer, PoH])
def test_legacy_is_blind_to_walls_but_not_to_ends(kind):
    model, batch = build(kind, legacy=True, maze_enc=True).eval(), mazes(1)
    without = {**batch, "passages": torch.zeros_like(batch["passages"])}
    assert torch.equal(scores(model, batch), scores(model, without))
    for end in ("start", "goal"):
        moved = {**batch, end: (batch[end] + 1) % 16}
        assert not torch.equal(scores(model, batch), scores(model, moved))


# --- every part learns ---

VARIANTS = [
    (MazeTransformer, {"maze_enc": True, "horizons": 3}),
    (MazeTransformer, {"loops": 3, "position": "rope2d", "validity_mask": True}),
    (PoH, {"maze_enc": True}),
    (PoH, {"T": 2, "route_mode": "topk", "horizons": 2, "validity_mask": True}),
    (PoH, {"route_per": "token", "halting": True, "position": "rope2d"}),
    (PoH, {"routing": "uniform"}),
    (PoH, {"routing": "frozen", "route_ent_weight": 0.1}),
    (TRM, {"horizons": 2}),
]


def without_gradient_after_two_steps(kind, changes) -> set[str]:
    """α starts at 0, as it does in training: the first step reaches little else."""
    torch.manual_seed(0)
    model = kind(KINDS[kind](**{**TINY, **changes})).double()
    batch = mazes(horizons=model.config.horizons)
    for _ in range(2):
        model.zero_grad()
        model(**batch)["loss"].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0}


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_every_trainable_tensor_gets_a_gradient(kind, changes):
    assert without_gradient_after_two_steps(kind, changes) == set()


def test_what_never_learned_in_the_original():
    dead = without_gradient_after_two_steps(PoH, {"legacy": True, "maze_enc": True})
    inside = {n.split("controller.")[1] for n in dead if ".0.controller." in n}
    slow = {f"slow.{w}_{g}h" for w in ("weight", "bias") for g in "ih"} | {"slow_norm.weight", "slow_norm.bias"}
    assert inside == slow | {"fast.weight_hh"}
    assert {n for n in dead if "controller" not in n} == {"embedding.cell.weight", "embedding.encoder.first.weight"}


# --- losses ---


@pytest.mark.parametrize("masked", [True, False])
def test_cross_entropy_is_uniform_over_all_shortest_ways(masked):
    batch = mazes(braid=1.0)
    model = build(MazeTransformer, validity_mask=masked, label_smoothing=0.1)
    hidden = model.norm(model.encode(model.embedding(batch["passages"], batch["start"], batch["goal"]))[0])
    logits = F.linear(hidden, model.heads[0].weight, model.heads[0].bias)  # [B, n, n]
    candidates, labels = batch["candidates"][:, :, 0], batch["labels"][:, :, 0]
    rows = labels.any(-1)
    assert (labels.sum(-1) > 1).any(), "there are forks with two best ways"
    true = F.one_hot(candidates.clamp(min=0), 16).mul(labels.unsqueeze(-1)).sum(2).double()
    valid = F.one_hot(candidates.clamp(min=0), 16).mul((candidates >= 0).unsqueeze(-1)).sum(2).double()
    smooth = valid if masked else torch.ones_like(true)
    target = 0.9 * true / true.sum(-1, keepdim=True) + 0.1 * smooth / smooth.sum(-1, keepdim=True)
    logits = logits.masked_fill(valid == 0, -1e9) if masked else logits
    expected = F.cross_entropy(logits[rows], target[rows])
    losses = model(**batch)
    torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(losses["ce_loss"], losses["loss"].detach())


def test_each_horizon_has_its_head_and_the_loss_is_their_mean():
    batch = mazes(horizons=3)
    model = build(MazeTransformer, horizons=3, validity_mask=True, label_smoothing=0.0)
    log_probs = scores(model, batch).log_softmax(-1)
    labels = batch["labels"]
    per_row = -log_probs.masked_fill(~labels, 0).sum(-1) / labels.sum(-1).clamp(min=1)  # [B, n, K]
    assert labels[:, :, 2].any(-1).sum() < labels[:, :, 0].any(-1).sum(), "near the goal there is no third step"
    expected = per_row.sum() / labels[:, :, 0].any(-1).sum() / 3
    torch.testing.assert_close(model(**batch)["loss"], expected)
    assert len(model.heads) == 3 and len(build(MazeTransformer, horizons=3, legacy=True).heads) == 1


def test_loss_is_the_weighted_sum_of_its_parts():
    model = build(route_ent_weight=0.3, halting=True, ponder_weight=0.2)
    model.entropy_scale.fill_(0.5)
    out = model(**mazes())
    assert set(out) == {"loss", "ce_loss", "route_entropy", "ponder_loss"}
    expected = out["ce_loss"] + 0.5 * 0.3 * out["route_entropy"] + 0.2 * out["ponder_loss"]
    torch.testing.assert_close(out["loss"], expected)
    assert 0 < out["route_entropy"] < math.log(4) and 2 < out["ponder_loss"] < 6
    assert all(v.ndim == 0 and v.requires_grad == (n == "loss") for n, v in out.items())
    sharper = gradients(build(route_ent_weight=0.3), mazes())["blocks.0.controller.router.weight"]
    assert not torch.equal(sharper, gradients(build(), mazes())["blocks.0.controller.router.weight"])


@pytest.mark.parametrize("masked", [True, False])
def test_halves_of_a_batch_add_up_to_the_whole(masked):
    model = build(validity_mask=masked, route_ent_weight=0.3, halting=True)
    batch = mazes(5)
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(2), slice(2, 5))]
    whole = gradients(model, batch)
    items = batch["labels"][:, :, 0].any(-1).sum()
    split = gradients(model, *halves, num_items=items)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.allclose(gradients(model, *halves)["heads.0.weight"], whole["heads.0.weight"])


@pytest.mark.parametrize("masked", [True, False])
def test_empty_slots_never_matter(masked):
    model, batch = build(validity_mask=masked), mazes()
    more = {name: F.pad(batch[name], (2, 3), value=fill) for name, fill in (("candidates", -1), ("labels", True))}
    other = {**batch, **more}
    assert torch.equal(scores(model, other)[..., 2:6], scores(model, batch))
    assert (scores(model, other)[..., :2] == -math.inf).all()
    for (name, a), b in zip(gradients(model, batch).items(), gradients(model, other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_batch_without_labels_costs_nothing():
    batch = {**mazes(), "labels": torch.zeros_like(mazes()["labels"])}
    for masked in (True, False):
        model = build(validity_mask=masked)
        assert model(**batch)["loss"] == 0
        assert all((g == 0).all() for g in gradients(model, batch).values())


# --- precision, recomputation, other sizes, files ---


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_gradient(kind):
    model, batch = build(kind, dropout=0.1), mazes()
    torch.manual_seed(0)
    stored = gradients(model, batch)
    model.gradient_checkpointing = True
    torch.manual_seed(0)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, stored[name], rtol=1e-12, atol=1e-14, msg=name)


def test_rotation_is_relative():
    """<rotate(q) at a, rotate(k) at b> depends on the rows and columns between a and b only."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(-1, -1, -1, 25, -1)
    products = (rotate(q) @ rotate(k).transpose(-1, -2))[0, 0].view(5, 5, 5, 5)
    torch.testing.assert_close(
        products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2], rtol=1e-5, atol=1e-6
    )  # angles are fp32
    here, right, below = products[0, 0, 0, 0], products[0, 0, 0, 1], products[0, 0, 1, 0]
    assert min((here - right).abs(), (here - below).abs(), (right - below).abs()) > 1e-3


def test_relative_classes_are_offsets():
    candidates = torch.full((1, 16, 12), -1)
    candidates[0, 5, :5] = torch.tensor([1, 9, 4, 6, 13])  # up, down, left, right, two down
    assert offset_classes(candidates, 4, 2)[0, 5, :6].tolist() == [7, 17, 11, 13, 22, -1]
    far = offset_classes(neighbors(7).unsqueeze(0), 7, 1)
    assert far[0, 24].tolist() == [1, 7, 3, 5], "the same at any size"


def test_a_relative_model_takes_any_size():
    model = build(position="rope2d", maze_enc=True)
    for size in (3, 6):
        out = scores(model, mazes(2, size))
        assert out.shape == (2, size * size, 1, 4) and (out > -math.inf).any(-1).all()


@pytest.mark.parametrize(
    ("kind", "changes"), [(MazeTransformer, {"loops": 2}), (PoH, {"halting": True}), (PoH, {"legacy": True}), (TRM, {})]
)
def test_files_bring_back_the_model(tmp_path, kind, changes):
    model = build(kind, **changes).float().eval()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(scores(again, mazes()), scores(model, mazes()))


# --- what does not fit ---


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (MazeTransformerConfig, {"d_model": 10, "loops": 0, "dropout": 1.0}, "d_model 10 .*; dropout .*; loops must"),
        (MazeTransformerConfig, {"horizons": 4}, "horizons must be 1, 2 or 3, not 4"),
        (MazeTransformerConfig, {"d_model": 24, "position": "rope2d"}, "rope2d needs heads of a multiple of 4"),
        (MazeTransformerConfig, {"legacy": True, "loops": 2}, "no looped baseline"),
        (PoHConfig, {"routing": "x", "R": 0, "route_temp": 0.0}, "routing must be one of .*; R must .*; route_temp"),
        (PoHConfig, {"R": 10**9}, "R must be 1 to 1000, not 1000000000"),
        (PoHConfig, {"route_mode": "topk", "route_topk": 1}, "route_topk must be one of 2 … 4 heads, not 1"),
        (PoHConfig, {"legacy": True, "maze_size": 30}, "legacy has 512 positions, too few"),
        (TRMConfig, {"H_cycles": 0, "legacy": True}, "H_cycles must be at least 1, not 0; the original"),
    ],
)
def test_configs_say_what_is_wrong(config, changes, sentence):
    with pytest.raises(ValueError, match=f"{config.__name__}: .*{sentence}"):
        config(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("passages", lambda x: x[:, :3], "passages must be uint8"),
        (
            "passages",
            lambda x: x[:, :3, :3],
            "a maze of 3 x 3 cells does not fit a model of 4 x 4; take a model of that",
        ),
        ("goal", lambda x: x[:1], r"goal must be int64 \[2\]"),
        ("candidates", lambda x: x.repeat(1, 1, 2, 1), r"candidates must be int64 \[2, 16, 1, J\]"),
        ("labels", lambda x: x[..., :3], r"labels must be bool \[2, 16, 1, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name, wrong, sentence):
    batch = mazes(2)
    with pytest.raises(ValueError, match=sentence):
        build(MazeTransformer)(**{**batch, name: wrong(batch[name])})


def test_a_head_does_all_its_work_in_forward():
    """FSDP2 shards each of a list of modules on its own, so that a weight is whole in its forward only."""
    model, calls = build(MazeTransformer, validity_mask=True), []
    model.heads[0].register_forward_hook(lambda module, inputs, out: calls.append(module))
    model(**mazes())
    scores(model, mazes())
    assert len(calls) == 2 and all(isinstance(head, HorizonHead) for head in calls)
