"""The ARC task: what a training loop needs to train and score a model that answers questions about grids.

A score says how its answer came about. `exact_free_run` and what stands beside it are of answers said freely, shape and
all, without voting: the headline. `exact_teacher_forced` is of tokens each of which was told all true ones before it,
which flatters; `val_loss` is in nats per token of the answers, whatever else is trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.arc.augment import NUM_SYMMETRIES, Augmentation, Legal, canvases
from tasks.arc.decode import allowed, decode
from tasks.arc.grid import MAX_SIZE, NUM_COLOURS, Episode, Grid, episode_hash, from_canvas, shapes
from tasks.arc.score import mean_scores, question_scores
from tasks.arc.tokens import EOL, IGNORE_INDEX, Batch, Encoding, masked

VERSION = 1
FREE_RUN = ("exact", "shape", "cell_accuracy", "change_accuracy", "copy_rate")
CONTEXTS = ("true", "none", "shuffled", "wrong")
HASHED = 256  # episodes of a set that its hash is of, evenly spread: a set may make them as they are asked for


class Item(NamedTuple):
    episode: Episode
    key: int  # of all that is drawn for it


class TrainData:
    """Episodes to learn from, each `copies` times over in other choices: another pair as the question, other pairs as
    the `context_pairs` demonstrations, another augmentation.

    Item i is episode i % n in choice i // n, for any i >= 0. The original showed the same two pairs of a puzzle every
    time; a model can then know the puzzle by them and learn its rule by heart.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        *,
        context_pairs: int | None = 2,
        any_query: bool = True,
        copies: int = 1,
        seed: int = 0,
    ) -> None:
        self.episodes, self.context_pairs, self.any_query = episodes, context_pairs, any_query
        self.copies, self.seed = copies, seed

    def __len__(self) -> int:
        return len(self.episodes) * self.copies

    def __getitem__(self, i: int) -> Item:
        episode = self.episodes[i % len(self.episodes)]
        rng = np.random.default_rng((self.seed, i))
        demos, query = list(episode.demos), episode.query
        if self.any_query:
            demos = [pair for pair in (*demos, query) if pair.output is not None]
            query = demos.pop(rng.integers(len(demos))) if demos else query
        if query.output is None:
            raise ValueError(f"puzzle {episode.id}: no answer is known to learn from")
        if self.context_pairs is not None:
            chosen = rng.permutation(len(demos))[: self.context_pairs]
            demos = [demos[k] for k in sorted(chosen)]
        return Item(Episode(episode.id, tuple(demos), query), int(rng.integers(1 << 62)))


class ArcTask:
    """Episodes to learn from and sets of them to be scored on, as batches of a model's kind.

    Args:
        data: sequences of episodes by name: "train", "val", and any number of others to score, whose names their scores
            bear ("skills/exact_free_run"). Those but "train" are read once and kept.
        kind, legacy_vocab, loss_on_input: see `Encoding`.
        context_pairs: demonstrations shown, at most; None for all. Validation shows the first ones.
        any_query, copies: see `TrainData`; without any_query the question is always the episode's own.
        augment: of the training episodes; None for nothing.
        mask_answer: in training, hide some of what was said before; see `tokens.masked`.
        symmetries, fixed_colours: by skill, the symmetries that leave its rules rules of it, and the colours that must
            keep their names; others may be turned and coloured freely. An episode's skill is its id up to the last "/".
        max_length: leaves out episodes with a longer sequence in some choice of pairs; how many is in `info`. It reads
            all training episodes once.
        free_run: validation episodes of each set that are answered freely, with at most `max_size` cells each way: a
            model that has not learned when to stop takes as long as it may.

    Attributes: `train`, `val`, `sets` (all but "train", by name), `encoding`, and `info`, which identifies the data.
    Raises ValueError for settings and data that cannot be.
    """

    monitor, mode, item_name = "val_loss", "min", "tokens"

    def __init__(
        self,
        data: Mapping[str, Sequence[Episode]],
        *,
        kind: str = "encoder_decoder",
        context_pairs: int | None = 2,
        any_query: bool = True,
        copies: int = 1,
        augment: Augmentation | None = None,
        mask_answer: bool = False,
        symmetries: Mapping[str, frozenset[int]] | None = None,
        fixed_colours: Mapping[str, frozenset[int]] | None = None,
        legacy_vocab: bool = False,
        loss_on_input: bool = False,
        max_length: int | None = None,
        free_run: int = 64,
        max_size: int = MAX_SIZE,
        eval_batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        at_least = {"context_pairs": (context_pairs or 0, 0), "copies": (copies, 1), "free_run": (free_run, 0)}
        for name, (value, least) in (at_least | {"eval_batch_size": (eval_batch_size, 1)}).items():
            if value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed")
        for name in ("train", "val"):
            if not len(data.get(name, ())):
                raise ValueError(f"data has no {name!r} episodes; it has {', '.join(data) or 'nothing'}")
        if mask_answer and legacy_vocab:
            raise ValueError("mask_answer=True: the legacy vocabulary has no token to hide others with")
        self.encoding = Encoding(kind, legacy_vocab, loss_on_input)
        self.augment, self.symmetries, self.fixed_colours = augment, symmetries or {}, fixed_colours or {}
        self.context_pairs, self.free_run, self.max_size = context_pairs, free_run, max_size
        self.eval_batch_size, self.mask_answer = eval_batch_size, mask_answer
        sets = {name: self._fitting(episodes, max_length) for name, episodes in data.items()}
        left = {name: len(data[name]) - len(episodes) for name, episodes in sets.items()}
        if empty := [name for name, episodes in sets.items() if not len(episodes)]:
            raise ValueError(f"no episode of {empty[0]!r} fits a max_length of {max_length}")
        self.train = TrainData(
            sets.pop("train"), context_pairs=context_pairs, any_query=any_query, copies=copies, seed=seed
        )
        self.sets = {name: list(episodes) for name, episodes in sets.items()}
        for name, episodes in self.sets.items():
            if unknown := [episode.id for episode in episodes if episode.query.output is None]:
                raise ValueError(f"{name!r} has episodes whose answer is not known: {', '.join(unknown[:3])}")
        self.val = self.sets["val"]
        self.info = {"task": f"arc v{VERSION}", **dataclasses.asdict(self.encoding), "context_pairs": context_pairs}
        self.info |= {"any_query": any_query, "copies": copies, "mask_answer": mask_answer}
        self.info |= {"episodes": {"train": len(self.train.episodes)} | {n: len(e) for n, e in self.sets.items()}}
        self.info |= {"hash": {n: _hash(e) for n, e in ({"train": self.train.episodes} | self.sets).items()}}
        self.info |= {"augment": None if augment is None else dataclasses.asdict(augment), "too_long": left}

    def _fitting(self, episodes: Sequence[Episode], max_length: int | None) -> Sequence[Episode]:
        if max_length is None:
            return episodes
        return [episode for episode in episodes if self._length(episode) <= max_length]

    def _length(self, episode: Episode) -> int:
        """Of its longest sequence, whichever pairs are chosen."""
        known = [pair for pair in (*episode.demos, episode.query) if pair.output is not None]
        return self.encoding.length(known, len(known) if self.context_pairs is None else 1 + self.context_pairs)

    # ---- batches -----------------------------------------------------------------------------------------------------

    def collate(self, items: list[Item]) -> Batch:
        grids, key = canvases([item.episode for item in items]), torch.tensor([item.key for item in items])
        offset = None
        if self.augment is not None:
            draw = self.augment.draw(key, grids.demos.shape[1], self._legal([skill_of(item.episode) for item in items]))
            grids = draw.apply(grids)
            offset = draw.offset(grids)
        batch = self.encoding.batch(grids, offset)
        return masked(batch, key) if self.mask_answer else batch

    def _legal(self, skills: Sequence[str]) -> Legal:
        every = range(NUM_SYMMETRIES)
        symmetries = [[g in self.symmetries.get(skill, every) for g in every] for skill in skills]
        fixed = [[c in self.fixed_colours.get(skill, ()) for c in range(NUM_COLOURS)] for skill in skills]
        return Legal(torch.tensor(symmetries), torch.tensor(fixed))

    @staticmethod
    def num_items(batch: Batch) -> Tensor:
        """Tokens that are to be said."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    # ---- scores ------------------------------------------------------------------------------------------------------

    def evaluate(self, predict: Any) -> dict[str, float]:
        """Teacher-forced scores over all validation episodes, and those of `free_scores`."""
        sums = {}
        for name, episodes in self.sets.items():
            for key, value in self._teacher_forced(predict, episodes).items():
                sums[f"{name} {key}"] = value
        totals = predict.total(sums)
        scores = {}
        for name in self.sets:
            per = {"val_loss": "tokens", "cell_teacher_forced": "cells", "exact_teacher_forced": "episodes"}
            for key, unit in per.items():
                scores[_named(name, key)] = totals[f"{name} {key}"] / totals[f"{name} {unit}"]
        model = predict.whole() if self.free_run else None
        if model is not None:  # on one process, whose scores are those that count
            for name in self.sets:
                scores |= {
                    _named(name, key): value
                    for key, value in self.free_scores(model, self.sets[name][: self.free_run]).items()
                }
        return scores

    def _teacher_forced(self, predict: Any, episodes: Sequence[Episode]) -> dict[str, Tensor | float]:
        """Sums over this process's share of the episodes."""
        names = ("val_loss", "tokens", "cell_teacher_forced", "cells", "exact_teacher_forced", "episodes")
        sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
        for i in predict.share(-(-len(episodes) // self.eval_batch_size)):
            batch = self._answers_only(episodes[i * self.eval_batch_size : (i + 1) * self.eval_batch_size])
            labels = batch.pop("labels")
            logits = predict(batch)["logits"].float()
            labels = labels.to(logits.device)
            counted, cell = labels != IGNORE_INDEX, (labels >= 0) & (labels < NUM_COLOURS)
            right = logits.argmax(-1) == labels
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
            exact = (right | ~counted).all(1).sum()
            parts = (loss, counted.sum(), (right & cell).sum(), cell.sum(), exact, len(labels))
            sums = {name: sums[name] + part for name, part in zip(names, parts, strict=True)}
        return sums

    def _answers_only(self, episodes: Sequence[Episode]) -> Batch:
        encoding = dataclasses.replace(self.encoding, loss_on_input=False)
        return encoding.batch(canvases([self._shown(episode) for episode in episodes]))

    def _shown(self, episode: Episode) -> Episode:
        return episode._replace(demos=episode.demos[: self.context_pairs])

    def free_scores(self, model: Any, asked: Sequence[Episode]) -> dict[str, float]:
        """Means of FREE_RUN. A model of the legacy vocabulary is told the shape of each answer, and its scores are
        called so."""
        answers = zip(self.answers(model, asked), (episode.query for episode in asked), strict=True)
        rows = [question_scores(answer, query.output, query.input) for answer, query in answers]
        means = mean_scores(rows)
        scores = {key: means[key] for key in FREE_RUN if not math.isnan(means[key])}
        scores["exact_free_run"] = scores.pop("exact")
        if self.encoding.legacy:
            del scores["shape"]
            return {f"{key}_given_shape": value for key, value in scores.items()}
        return scores

    def answers(self, model: Any, episodes: Sequence[Episode]) -> list[Grid]:
        """What the model says, greedily and in one view, to episodes with as many demonstrations as it is used to."""
        device, found = next(model.parameters()).device, []
        for i in range(0, len(episodes), self.eval_batch_size):
            grids = canvases([self._shown(episode) for episode in episodes[i : i + self.eval_batch_size]])
            grids = grids.map(lambda canvas: canvas.to(device))
            shape = shapes(grids.answer) if self.encoding.legacy else None
            said, _ = decode(model, self.encoding.prompt(grids), max_size=self.max_size, shape=shape)
            found += [from_canvas(canvas) for canvas in said]
        return found

    def baselines(self) -> dict[str, float]:
        """The validation loss of who knows only that an answer is a rectangle."""
        if self.encoding.legacy:
            return {"uniform": math.log(NUM_COLOURS)}
        batch = Encoding().batch(canvases([episode._replace(demos=()) for episode in self.val]))
        counted, columns = batch["labels"] != IGNORE_INDEX, batch["columns"]
        width = torch.where(batch["labels"] == EOL, columns, 0).amax(1, keepdim=True).expand_as(columns)
        choices = allowed(batch["rows"], columns, width).sum(-1)
        return {"uniform": choices[counted].double().log().mean().item()}


# ---- other demonstrations --------------------------------------------------------------------------------------------


def in_context(episodes: Sequence[Episode], context: str) -> list[Episode]:
    """The episodes with other demonstrations: "none"; "shuffled", those of the next episode of the same skill, whose
    rule is another; "wrong", those of another skill's; or the "true" ones.

    Raises ValueError where there is no such episode.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context={context!r}: it is one of {', '.join(CONTEXTS)}")
    if context == "true":
        return list(episodes)
    if context == "none":
        return [episode._replace(demos=()) for episode in episodes]
    skills = [skill_of(episode) for episode in episodes]
    others = (episodes[_next(skills, i, same=context == "shuffled")] for i in range(len(episodes)))
    return [episode._replace(demos=other.demos) for episode, other in zip(episodes, others, strict=True)]


def contexts_of(episodes: Sequence[Episode]) -> list[str]:
    """Those that `in_context` can give: puzzles are a skill each, so that none has another question to shuffle with."""
    counts = Counter(map(skill_of, episodes)).values()
    possible = {"shuffled": min(counts) > 1, "wrong": len(counts) > 1}
    return [context for context in CONTEXTS if possible.get(context, True)]


def skill_of(episode: Episode) -> str:
    """The skill or the puzzle that an episode is of."""
    return episode.id.rpartition("/")[0]


def _next(skills: Sequence[str], i: int, *, same: bool) -> int:
    """The first after i, and round again, that is of the same skill, or of another."""
    for step in range(1, len(skills)):
        j = (i + step) % len(skills)
        if (skills[j] == skills[i]) == same:
            return j
    raise ValueError(f"{skills[i]!r} has no other episode" if same else f"there is no skill but {skills[i]!r}")


def _named(name: str, score: str) -> str:
    return score if name == "val" else f"{name}/{score}"


def _hash(episodes: Sequence[Episode]) -> str:
    """Of HASHED episodes, evenly spread."""
    count = min(HASHED, len(episodes))
    digest = hashlib.sha256()
    for i in range(count):
        digest.update(episode_hash(episodes[i * len(episodes) // count]).encode())
    return digest.hexdigest()
