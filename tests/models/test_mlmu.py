"""MLM-U: what is hidden and counted, that it cannot be peeked at, and that a way is said as it was learned."""

import pytest
import torch
import torch.nn.functional as F

from models.mlmu import MLMU, MLMUConfig
from models.parity import parameters
from tasks.maze.distance import shortest_path
from tasks.maze.generate import Suite, sample
from tests.models.tiny_mazes import TINY, gradients


def build(**changes) -> MLMU:
    torch.manual_seed(0)
    model = MLMU(MLMUConfig(**{**TINY, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # embeddings are drawn so small that little shows
    return model


def ways(count=6, rate=0.5) -> dict[str, torch.Tensor]:
    """A batch with labels at about `rate` of the cells."""
    found, steps = sample(Suite("perfect-4", min_path=6), "train", torch.arange(count))
    way = shortest_path(found, steps)[:, 1:]
    hidden = torch.rand(way.shape, generator=torch.Generator().manual_seed(1)) < rate
    path, labels = way.masked_fill(hidden, -1), way.where(hidden & (way >= 0), -100)
    return {**found._asdict(), "path": path, "labels": labels}


def scores(model, batch) -> torch.Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"})["scores"]


# --- the loss ---


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_of_hidden_cells(smoothing):
    model, batch = build(label_smoothing=smoothing), ways()
    losses = model(**batch)
    expected = F.cross_entropy(scores(model, batch).flatten(0, 1), batch["labels"].flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(losses["ce_loss"], losses["loss"].detach()) and set(losses) == {"loss", "ce_loss"}
    nothing = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert nothing["loss"] == 0


def test_parts_of_a_batch_add_up_to_the_whole():
    model, batch = build(), ways()
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(2), slice(2, 6))]
    items = (batch["labels"] >= 0).sum()
    split = gradients(model, *halves, num_items=items)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.abs().sum() > 0, name


def test_what_is_hidden_does_not_say_how_much_of_it_there_is():
    """Else a model would learn from the number of hidden cells how long the way is, and miss it when it says one."""
    model, batch = build(), {k: v[:, :12] if k in ("path", "labels") else v for k, v in ways().items()}
    longer = {**batch, "path": F.pad(batch["path"], (0, 3), value=-1)}
    length = batch["path"].shape[1]
    torch.testing.assert_close(scores(model, longer)[:, :length], scores(model, batch))
    fewer = batch["path"].clone()
    row, column = (batch["path"] >= 0).nonzero()[0]
    fewer[row, column] = -1
    others = torch.arange(length) != column
    change = (scores(model, {**batch, "path": fewer}) - scores(model, batch)).abs().amax(2)[row, others]
    assert (change > 1e-4).all(), "what is known is seen from everywhere, also from before it"


@pytest.mark.parametrize("maze_enc", [False, True])
def test_maze_and_ends_reach_every_step(maze_enc):
    model, batch = build(maze_enc=maze_enc), ways(rate=1.0)
    before = scores(model, batch)
    for name, other in (
        ("passages", batch["passages"] ^ 1),
        ("start", (batch["start"] + 1) % 16),
        ("goal", (batch["goal"] + 1) % 16),
    ):
        assert ((scores(model, {**batch, name: other}) - before).abs().amax(2) > 1e-4).all(), name


# --- saying ---


@pytest.fixture(scope="module")
def learned() -> tuple[MLMU, dict[str, torch.Tensor]]:
    """Three mazes learned by heart, whose ways differ in length."""
    batch = ways(3, 1.0)
    way = batch.pop("labels")
    torch.manual_seed(0)
    model = MLMU(MLMUConfig(**{**TINY, "d_model": 32, "label_smoothing": 0.0}))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(120):
        hidden = torch.rand(way.shape) < torch.rand(3, 1)
        masked = {"path": way.where(~hidden & (way >= 0), -1), "labels": way.masked_fill(~hidden, -100)}
        optimizer.zero_grad()
        model(**{**batch, **masked})["loss"].backward()
        optimizer.step()
    return model.eval(), {**batch, "path": way}


@torch.no_grad()
def test_mazes_are_learned_by_heart_and_said(learned):
    model, batch = learned
    ends = {name: batch[name] for name in ("passages", "start", "goal")}
    said, way = model(**ends)["path"], batch["path"]
    lengths = (way >= 0).sum(1)
    assert len(lengths.unique()) > 1 and said.shape == (3, 15)
    assert torch.equal(said, F.pad(way.clamp(min=-1), (0, 15 - way.shape[1]), value=-1))
    for step in range(int(lengths.max())):  # each cell is the best one after those that were said before it
        best = scores(model, {**ends, "path": F.pad(said[:, :step], (0, 1), value=-1)})[:, step].argmax(1)
        assert torch.equal(best[step < lengths], said[step < lengths, step])


# --- files, recomputation, what does not fit ---


def test_files_bring_back_the_model(tmp_path):
    model = build().float().eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(MLMU.from_pretrained(tmp_path).eval(), ways()), scores(model, ways()))
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config)


def test_recomputing_changes_no_gradient():
    model, batch = build(), ways()
    stored = gradients(model, batch)
    model.gradient_checkpointing = True
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, stored[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"position": "rope2d"}, "position must be table"),
        ({"validity_mask": True}, "leave out horizons, validity_mask and legacy"),
    ],
)
def test_configs_say_what_is_wrong(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        MLMUConfig(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"path": torch.zeros(6, 16, dtype=torch.int64)}, r"path must be int64 \[6, at most 15 steps\]"),
        ({"labels": torch.zeros(6, 2, dtype=torch.int64)}, r"labels must be int64 \[6, "),
        ({"path": None}, "labels belong to a path"),
        ({"goal": torch.zeros(2, dtype=torch.int64)}, r"goal must be int64 \[6\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()(**{**ways(), **wrong})
