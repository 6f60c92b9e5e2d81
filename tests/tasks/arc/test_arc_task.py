from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.arc.augment import Augmentation, symmetric
from tasks.arc.decode import Rectangle
from tasks.arc.grid import PAD, Episode, Pair, episode_hash, from_canvas
from tasks.arc.task import ArcTask, TrainData, contexts_of, in_context
from tasks.arc.tokens import IGNORE_INDEX, colours_at
from tests.tasks.arc.stand_in import ByPlace, copy, noise


def episodes(skill: str, count: int, seed: int = 0, pairs: int = 4) -> list[Episode]:
    """Questions whose answer is the question; no two grids of a skill are the same."""
    rng = np.random.default_rng(seed)

    def pair() -> Pair:
        grid = rng.integers(0, 10, (rng.integers(2, 5), rng.integers(2, 5)), dtype=np.uint8)
        return Pair(grid, grid.copy())

    return [Episode(f"{skill}/{i}", tuple(pair() for _ in range(pairs)), pair()) for i in range(count)]


DATA = {
    "train": episodes("copy", 12),
    "val": episodes("copy", 10, 1) + episodes("other", 6, 2),
    "skills": episodes("held_out", 5, 3),
}


class Alone:
    """What the engine hands to `evaluate`, for one process."""

    def __init__(self, model):
        self.model = model

    def __call__(self, batch):
        return self.model(**batch)

    def whole(self):
        return self.model

    def share(self, n):
        return list(range(n))

    def total(self, sums):
        return {name: float(value) for name, value in sums.items()}


def key_of(pair: Pair) -> bytes:
    return pair.input.tobytes()


# ---- items -----------------------------------------------------------------------------------------------------------


def test_an_item_is_a_function_of_its_number():
    data, again = TrainData(DATA["train"], copies=3, seed=1), TrainData(DATA["train"], copies=3, seed=1)
    assert len(data) == 36
    for i in (35, 0, 17, 0):
        one, other = data[i], again[i]
        assert one.key == other.key and episode_hash(one.episode) == episode_hash(other.episode)
    assert data[5].episode.id == data[17].episode.id == "copy/5"
    assert len({data[i].key for i in range(36)}) == 36
    assert TrainData(DATA["train"], copies=3, seed=2)[0].key != data[0].key


def test_every_pair_comes_to_be_the_question_and_no_two_pairs_are_always_the_context():
    data = TrainData(DATA["train"][:1], context_pairs=2, copies=200)
    asked, shown = {}, {}
    for i in range(200):
        episode, _ = data[i]
        assert len(episode.demos) == 2 and key_of(episode.query) not in map(key_of, episode.demos)
        asked[key_of(episode.query)] = asked.get(key_of(episode.query), 0) + 1
        context = tuple(map(key_of, episode.demos))
        shown[context] = shown.get(context, 0) + 1
    assert len(asked) == 5 and min(asked.values()) > 20
    assert len(shown) == 10 and min(shown.values()) > 5  # 5 choose 2, in the order in which the puzzle has them


def test_the_question_and_all_demonstrations_may_be_kept():
    data = TrainData(DATA["train"], context_pairs=None, any_query=False, copies=2)
    assert all(episode_hash(data[i].episode) == episode_hash(DATA["train"][i % 12]) for i in range(24))


def test_a_question_without_an_answer_is_never_asked_in_training():
    known = DATA["train"][0]
    puzzle = known._replace(query=Pair(known.query.input, None))
    data = TrainData([puzzle], context_pairs=None, copies=50)
    for i in range(50):
        episode, _ = data[i]
        assert episode.query.output is not None and len(episode.demos) == 3
    with pytest.raises(ValueError, match="copy/0: no answer is known"):
        TrainData([puzzle], any_query=False)[0]


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_a_batch_is_its_items_however_they_are_put_together(kind):
    task = ArcTask(DATA, kind=kind, augment=Augmentation())
    items = [task.train[i] for i in range(12)]
    together = task.collate(items)
    for b in (0, 5, 11):
        for name, alone in task.collate(items[b : b + 1]).items():
            inside = tuple(slice(n) for n in alone.shape[1:])
            assert torch.equal(together[name][b][inside], alone[0]), name
    assert task.num_items(together) == (together["labels"] >= 0).sum() > 0
    assert task.num_items(together) == sum(task.num_items(task.collate([item])) for item in items)


def test_augmented_answers_are_the_answers_turned_and_coloured():
    task = ArcTask(DATA, augment=Augmentation(translation=False), copies=20)
    items = [task.train[i] for i in range(0, 240, 12)]
    batch = task.collate(items)
    answers = colours_at(batch["labels"], batch["rows"], batch["columns"])
    seen = set()
    for item, canvas in zip(items, answers, strict=True):
        grid, truth = from_canvas(canvas), item.episode.query.output
        assert sorted(np.bincount(grid.flatten(), minlength=10)) == sorted(np.bincount(truth.flatten(), minlength=10))
        assert sorted(grid.shape) == sorted(truth.shape)
        seen.add(grid.tobytes())
    assert len(seen) > 15


def test_only_legal_symmetries_and_colours_reach_a_batch():
    settings = {"symmetries": {"copy": frozenset({0, 2})}, "fixed_colours": {"copy": frozenset({0, 1, 2, 3})}}
    task = ArcTask(DATA, augment=Augmentation(translation=False), copies=10, **settings)
    items = [task.train[i] for i in range(120)]
    batch = task.collate(items)
    answers = colours_at(batch["labels"], batch["rows"], batch["columns"])
    turned = symmetric(answers, torch.full((120,), 2))
    found = set()
    for item, canvas, back in zip(items, answers, turned, strict=True):
        truth = item.episode.query.output
        fits = [
            g.shape == truth.shape and np.array_equal(np.where(g < 4, g, 9), np.where(truth < 4, truth, 9))
            for g in (from_canvas(canvas), from_canvas(back))
        ]
        assert any(fits)
        found.add(tuple(fits))
    assert {(True, False), (False, True)} <= found


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_who_copies_is_right_where_copying_is():
    task = ArcTask(DATA, free_run=4)
    scores = task.evaluate(Alone(ByPlace(copy)))
    for prefix in ("", "skills/"):
        assert scores[f"{prefix}val_loss"] < 1e-5
        for name in ("cell_teacher_forced", "exact_teacher_forced", "exact_free_run", "shape", "cell_accuracy"):
            assert scores[prefix + name] == 1, name
        assert scores[f"{prefix}copy_rate"] == 1
        assert f"{prefix}change_accuracy" not in scores  # nothing is to be changed
    assert set(scores) == set(task.evaluate(Alone(ByPlace(noise(0)))))


def test_scores_of_noise_are_what_a_loop_finds():
    task = ArcTask(DATA, free_run=0, eval_batch_size=3)
    scores, table = task.evaluate(Alone(ByPlace(noise(0)))), noise(0)({"x": torch.zeros(1)})[0]
    nats, tokens, right, cells = 0.0, 0, 0, 0
    for episode in DATA["val"]:
        batch = task.collate([task.train[0]._replace(episode=episode)])
        for label, r, c in zip(*(batch[name][0] for name in ("labels", "rows", "columns")), strict=True):
            if label != IGNORE_INDEX:
                nats, tokens = nats - float(table[r, c].log_softmax(0)[label]), tokens + 1
                if label < PAD:
                    right, cells = right + int(table[r, c].argmax() == label), cells + 1
    assert scores["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert scores["cell_teacher_forced"] == pytest.approx(right / cells)
    assert "exact_free_run" not in scores


def test_the_validation_loss_is_of_answers_whatever_is_trained_on():
    one, other = (ArcTask(DATA, kind="decoder_only", loss_on_input=x, free_run=0) for x in (False, True))
    assert one.evaluate(Alone(ByPlace(noise(2)))) == other.evaluate(Alone(ByPlace(noise(2))))
    batches = [task.collate([task.train[0]]) for task in (one, other)]
    assert one.num_items(batches[0]) < other.num_items(batches[1])


def test_a_model_that_is_told_the_shape_is_not_scored_as_if_it_had_said_it():
    task = ArcTask(DATA, kind="decoder_only", legacy_vocab=True, free_run=3)
    scores = task.evaluate(Alone(ByPlace(noise(0, vocab_size=11))))
    assert "exact_free_run_given_shape" in scores and "cell_accuracy_given_shape" in scores
    assert not any(name in scores for name in ("exact_free_run", "shape", "shape_given_shape"))


def test_the_uniform_baseline_counts_what_may_be_said():
    task, nats, tokens = ArcTask(DATA), 0.0, 0
    for episode in DATA["val"]:
        rectangle = Rectangle(1)
        labels = task.collate([task.train[0]._replace(episode=episode)])["labels"][0]
        for label in labels[labels != IGNORE_INDEX]:
            nats, tokens = nats + float(rectangle.allowed().sum().log()), tokens + 1
            rectangle.push(label.view(1))
    assert task.baselines()["uniform"] == pytest.approx(nats / tokens)


# ---- context ---------------------------------------------------------------------------------------------------------


def test_other_demonstrations_come_from_the_same_skill_or_from_another():
    val, owner = DATA["val"][:12], {}
    for episode in val:
        owner |= {key_of(pair): episode.id for pair in episode.demos}
    for context, same in (("shuffled", True), ("wrong", False)):
        for episode, true in zip(in_context(val, context), val, strict=True):
            assert episode.query is true.query and episode.id == true.id
            donor = owner[key_of(episode.demos[0])]
            assert donor != true.id and (donor.split("/")[0] == true.id.split("/")[0]) == same
    assert all(episode.demos == () for episode in in_context(val, "none"))
    assert in_context(val, "true") == val


def test_a_model_that_reads_its_context_loses_it():
    """It answers with the input of the first demonstration, which here is the answer."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(20):
        grid = rng.integers(0, 10, (3, 3), dtype=np.uint8)
        made.append(Episode(f"{'ab'[i % 2]}/{i}", (Pair(grid, grid),), Pair(np.zeros((3, 3), np.uint8), grid)))

    def reads(prompt):
        if not prompt["demos"].shape[1]:
            return copy(prompt)
        names = ("demos", "demo_rows", "demo_columns")
        return copy(
            dict(zip(("source", "source_rows", "source_columns"), (prompt[n][:, 0, 1] for n in names), strict=True))
        )

    task, model = ArcTask({"train": made, "val": made}), ByPlace(reads)
    exact = {
        context: task.free_scores(model, in_context(made, context))["exact_free_run"]
        for context in ("true", "none", "shuffled", "wrong")
    }
    assert exact == {"true": 1.0, "none": 0.0, "shuffled": 0.0, "wrong": 0.0}


# ---- data ------------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_left_out_and_counted():
    task = ArcTask(DATA, kind="decoder_only", max_length=80, context_pairs=2)
    left = task.info["too_long"]
    assert 0 < left["train"] < 12 and left["train"] == 12 - task.info["episodes"]["train"]
    for i in range(len(task.train)):
        assert (task.collate([task.train[i]])["tokens"] != PAD).sum() <= 80
    assert ArcTask(DATA, kind="decoder_only").info["too_long"] == {"train": 0, "val": 0, "skills": 0}


def test_info_identifies_the_data():
    info, again = ArcTask(DATA).info, ArcTask(dict(DATA)).info
    assert info == again and info["episodes"] == {"train": 12, "val": 16, "skills": 5}
    other = ArcTask(DATA | {"val": DATA["val"][::-1]}).info["hash"]
    assert other["val"] != info["hash"]["val"] and other["train"] == info["hash"]["train"]


@pytest.mark.parametrize(
    ("changed", "settings", "sentence"),
    [
        ({"val": []}, {}, "no 'val' episodes; it has train, val"),
        ({}, {"copies": 0}, "copies=0: at least 1"),
        ({}, {"free_run": -1}, "free_run=-1: at least 0"),
        ({}, {"kind": "champion"}, "encoder_decoder, decoder_only"),
        ({}, {"kind": "decoder_only", "legacy_vocab": True, "mask_answer": True}, "has no token to hide others with"),
        ({}, {"max_length": 3}, "no episode of 'train' fits a max_length of 3"),
        ({"val": [DATA["val"][0]._replace(query=Pair(DATA["val"][0].query.input, None))]}, {}, "not known: copy/0"),
    ],
)
def test_a_task_that_cannot_be_is_a_sentence(changed, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ArcTask(DATA | changed, **settings)


def test_a_context_that_cannot_be_is_a_sentence_and_is_not_on_the_list():
    alone = DATA["train"][:1]
    assert contexts_of(alone) == ["true", "none"] and contexts_of(DATA["val"]) == ["true", "none", "shuffled", "wrong"]
    for context, sentence in (
        ("right", "true, none"),
        ("shuffled", "no other episode"),
        ("wrong", "no skill but 'copy'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            in_context(alone, context)
