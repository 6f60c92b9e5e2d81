"""What an ARC run leaves for people: free answers beside what anyone could guess, a gallery, named checkpoints."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.arc.baselines import baselines
from tasks.arc.gallery import Card, write_gallery
from tasks.arc.grid import Episode
from tasks.arc.score import mean_scores, question_scores
from tasks.arc.task import FREE_RUN, ArcTask, contexts_of, in_context, skill_of
from tasks.compare import wilson
from train.engine import Trainer
from train.engine.metrics import Row

GALLERY = 100  # questions of each set
MANY = 32  # of more skills than that, or puzzles, no score of each is told


class Report:
    """At the end, answers to every set: examples of the skills that were learned, skills that were not, compositions.

    results.json gets the means of each, those of trivial answers, exact match by skill, and exact match with the true
    demonstrations, with none, and with those of other episodes: what shows that they are used at all. Which questions
    were answered exactly is in outcomes.npz.
    """

    def __init__(self, task: ArcTask, others: Mapping[str, Sequence[Episode]], count: int) -> None:
        sets = {"examples": task.val, **others}
        self.task, self.trainer, self.seconds_at_end = task, None, 0.0
        self.sets = {name: episodes[:count] for name, episodes in sets.items()}  # skills take turns in them

    def __call__(self, trainer: Trainer, row: Row) -> None:
        if trainer is not self.trainer and (model := trainer.predict.whole()) is not None:
            few = self.sets["examples"][: self.task.eval_batch_size]
            started = time.perf_counter()
            self.task.answers(model, few)
            each = (time.perf_counter() - started) / len(few)
            contexts = len(contexts_of(self.sets["examples"])) - 1 if self.task.context_pairs else 0
            questions = sum(map(len, self.sets.values())) + contexts * len(self.sets["examples"])
            self.seconds_at_end = each * questions
        self.trainer = trainer

    def finish(self) -> None:
        model = self.trainer.predict.whole()
        if model is None:
            return
        cards, summary, self.exact = [], {}, {}
        for name, episodes in self.sets.items():
            scores, by_skill = self.answered(model, name, episodes, cards)
            guesses = {guess: _headline(guessed) for guess, guessed in baselines(episodes).items()}
            self.trainer.report[f"{name}, guessed"] = {guess: guessed["exact"] for guess, guessed in guesses.items()}
            summary |= {name: scores, **{f"{name}, {guess}": guessed for guess, guessed in guesses.items()}, **by_skill}
        if self.task.context_pairs:
            for asked, exact in self.contexts(model).items():
                self.trainer.report[f"context{asked}"] = exact
        self.trainer.report["summary"] = summary
        if self.trainer.folder is not None:
            np.savez_compressed(self.trainer.run_dir / "outcomes.npz", **self.exact)
            write_gallery(self.trainer.run_dir / "gallery.html", str(self.trainer.run_dir), cards, summary)

    def answered(
        self, model: Any, name: str, episodes: Sequence[Episode], cards: list[Card]
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Means over a set, and over each of its skills; what the gallery shows of it is added to `cards`."""
        grids = self.task.answers(model, episodes)
        rows = [
            question_scores(grid, episode.query.output, episode.query.input)
            for grid, episode in zip(grids, episodes, strict=True)
        ]
        self.exact[name] = np.array([row["exact"] for row in rows])
        by_skill: dict[str, list[dict[str, float]]] = defaultdict(list)
        for episode, row in zip(episodes, rows, strict=True):
            by_skill[skill_of(episode)].append(row)
        shown = list(zip(episodes, grids, rows, strict=True))[:GALLERY]
        cards += [Card(episode, [grid], _headline(row), skill_of(episode)) for episode, grid, row in shown]
        scores = _headline(mean_scores(rows))
        low, high = wilson(sum(row["exact"] for row in rows), len(rows))
        told = ", told the shape" if self.task.encoding.legacy else ""
        self.trainer.report[name + told] = scores | {"exact_low": low, "exact_high": high, "questions": len(rows)}
        if not 1 < len(by_skill) <= MANY:
            return scores, {}
        return scores, {skill: _headline(mean_scores(rows)) for skill, rows in sorted(by_skill.items())}

    def contexts(self, model: Any) -> dict[str, dict[str, float]]:
        """Exact match on the examples, and on those of each skill, with demonstrations that are, and are not, those of
        the question's rule."""
        episodes, exact = self.sets["examples"], {"true": self.exact["examples"]}
        for context in contexts_of(episodes)[1:]:  # the true ones have been asked with
            asked = in_context(episodes, context)
            answers = self.task.answers(model, asked)
            exact[context] = np.array(
                [np.array_equal(grid, episode.query.output) for grid, episode in zip(answers, asked, strict=True)]
            )
        skills = np.array([skill_of(episode) for episode in episodes])
        parts = {"": np.full(len(skills), True)}
        if 1 < len(set(skills)) <= MANY:
            parts |= {f", {skill}": skills == skill for skill in sorted(set(skills))}
        return {
            name: {context: right[part].mean().item() for context, right in exact.items()}
            for name, part in parts.items()
        }


def _headline(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: scores[name] for name in FREE_RUN}


class OriginNames:
    """checkpoints/<experiment>/: the best three and the last, called as the original called them.

    Lightning counted epochs from 0 and wrote the name of the metric into the file's: champion-epoch=07-val_loss=0.5926.
    """

    def __init__(self, experiment: str) -> None:
        self.experiment, self.prefix = experiment, experiment.split("_", 2)[2]

    def __call__(self, trainer: Trainer, row: Row) -> None:
        pass

    def saved(self, trainer: Trainer) -> None:
        if trainer.folder is None:
            return
        folder = trainer.snapshot.checkpoints.folder / self.experiment
        folder.mkdir(exist_ok=True)
        names = {self.name(trainer, entry): f"step-{entry['step']:08d}" for entry in trainer.progress.best}
        names["last"] = f"step-{trainer.progress.step:08d}"
        for link in folder.iterdir():
            link.unlink()
        for name, target in names.items():
            if (folder.parent / target).exists():
                (folder / name).symlink_to(Path("..") / target)

    def name(self, trainer: Trainer, entry: dict[str, Any]) -> str:
        epoch = max(0, round(entry["step"] / trainer.order.steps_per_epoch) - 1)
        return f"{self.prefix}-epoch={epoch:02d}-val_loss={entry['scores']['val_loss']:.4f}"
