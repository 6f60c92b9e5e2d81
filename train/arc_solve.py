"""Answer puzzles that a trained run has never seen: no retraining, no puzzle id, a file that Kaggle would take.

    python train/arc_solve.py puzzle.json --checkpoint runs/champion/RUN                 # one, or a folder of them
    python train/arc_solve.py challenges.json -o submission.json --checkpoint RUN        # a Kaggle bundle
    python train/arc_solve.py arc1-evaluation -o submission.json --checkpoint RUN --ttt 100 --gallery answers.html

--ttt STEPS trains a copy of the model on the demonstrations of each puzzle first, each in turn as the question. A run
that is stopped goes on where it was when its command is given again: answers so far are in OUTPUT.partial.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from models.arc_decoder import ArcDecoder, ArcDecoderConfig
from models.arc_encoder_decoder import ArcEncoderDecoder, ArcEncoderDecoderConfig
from models.arc_layers import ArcModel
from models.champion import Champion, ChampionConfig
from tasks.arc.augment import Augmentation
from tasks.arc.formats import inputs_of, load_puzzles, solutions_of, write_submission
from tasks.arc.gallery import Card, write_gallery
from tasks.arc.grid import Grid, Puzzle, checked_grid, leave_one_out, questions
from tasks.arc.score import question_scores, score
from tasks.arc.task import ArcTask
from tasks.arc.tokens import LEGACY_VOCAB_SIZE, Encoding
from tasks.arc.vote import attempts, solve
from tasks.reading import parsed
from train.engine import ConfigError
from train.engine.checkpoint import find_checkpoint, load_weights
from train.engine.run_folder import read_json, weights_of, write_whole
from train.engine.script import sentences

KINDS = {ArcDecoderConfig: ArcDecoder, ArcEncoderDecoderConfig: ArcEncoderDecoder, ChampionConfig: Champion}
AT_ONCE = 16  # puzzles between two lines of OUTPUT.partial, where each needs no training
TTT_BATCH = 8
GRAD_CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """Flags of train/arc_solve.py."""

    # A task file, a folder of them, a Kaggle challenges file, or arc1-evaluation, arc2-evaluation, …
    puzzles: Annotated[str, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("submission.json")
    # A run of an ARC script, or a folder in its checkpoints/.
    checkpoint: Path
    # Turned, mirrored and recoloured forms in which each question is asked; the answers vote.
    views: int = 32
    # Rank answers by what all views think of them, at a forward pass each.
    rescore: bool = False
    # Steps of training on the demonstrations of each puzzle, at this learning rate.
    ttt: int = 0
    ttt_lr: float = 3e-4
    seed: int = 0
    # A page with every question and its answers.
    gallery: Path | None = None
    cpu: bool = False

    def problems(self) -> list[str]:
        found = [f"--views must be at least 1, not {self.views}"] if self.views < 1 else []
        found += [
            f"--{n} must not be negative, not {getattr(self, n)}" for n in ("ttt", "seed") if getattr(self, n) < 0
        ]
        if not self.ttt_lr > 0:
            found.append(f"--ttt_lr must be more than 0, not {self.ttt_lr}")
        return found


@dataclass(frozen=True)
class Solver:
    """A trained model and how it was shown episodes."""

    model: ArcModel
    context_pairs: int
    checkpoint: Path

    @property
    def kind(self) -> str:
        return "decoder_only" if isinstance(self.model, ArcDecoder) else "encoder_decoder"

    @property
    def canonical(self) -> bool:
        return getattr(self.model.config, "perminv", "table") == "canonical"

    @property
    def fix_zero(self) -> bool:
        return getattr(self.model.config, "fix_zero", False)

    def candidates(self, model: nn.Module, puzzles: Sequence[Puzzle], config: SolveConfig) -> list[list[Any]]:
        """Ranked answers to every question of the puzzles, in order."""
        asked = [episode for puzzle in puzzles for episode in questions(puzzle)]
        shown = [episode._replace(demos=episode.demos[: self.context_pairs]) for episode in asked]
        return solve(
            model,
            shown,
            Encoding(self.kind),
            num_views=config.views,
            canonical=self.canonical,
            fix_zero=self.fix_zero,
            rescore=config.rescore,
            seed=config.seed,
        )

    def adapted(self, puzzle: Puzzle, config: SolveConfig) -> nn.Module:
        """A copy of the model, trained on the puzzle's own demonstrations: each as a question about others."""
        if len(puzzle.train) < 2:
            return self.model  # there is no other demonstration to take the rule from
        episodes = leave_one_out(puzzle)
        task = ArcTask(
            {"train": episodes, "val": episodes},
            kind=self.kind,
            context_pairs=self.context_pairs,
            augment=Augmentation(colours=not self.canonical, fix_zero=self.fix_zero),
            seed=config.seed,
        )
        model = copy.deepcopy(self.model).train()
        device = next(model.parameters()).device
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.ttt_lr, weight_decay=0.0)
        for step in range(config.ttt):
            for group in optimizer.param_groups:
                group["lr"] = config.ttt_lr * (1 - step / config.ttt)
            batch = task.collate([task.train[i] for i in range(step * TTT_BATCH, (step + 1) * TTT_BATCH)])
            batch = {name: value.to(device) for name, value in batch.items()}
            model(**batch, num_items=task.num_items(batch))["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()


def load(path: Path, cpu: bool) -> Solver:
    """The solver of a run folder or checkpoint. Raises ConfigError where it cannot answer a question."""
    folder = find_checkpoint(path, lambda line: print(line, file=sys.stderr))
    values = read_json(folder / "config.json")
    made = [kind for kind in KINDS if {f.name for f in dataclasses.fields(kind)} == set(values)]
    if not made:
        raise ConfigError(f"{folder} holds no ARC model; give a run of train/champion.py or another ARC script")
    if values.get("vocab_size") == LEGACY_VOCAB_SIZE:
        raise ConfigError(
            f"{folder} was trained with --legacy_vocab, in which the shape of an answer cannot be said, so it cannot "
            "answer new puzzles; train without it"
        )
    model = KINDS[made[0]](made[0](**values))
    load_weights(model, weights_of(folder))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not cpu else "cpu"
    settings = read_json(folder / "run" / "config.json")
    return Solver(model.to(device).eval(), settings["context_pairs"], folder)


# ---- answers so far --------------------------------------------------------------------------------------------------


class Partial:
    """Answers so far, one puzzle a line, below a line that says what they are answers to and of whom."""

    def __init__(self, file: Path, header: dict[str, Any]) -> None:
        self.file, self.answers = file, {}
        if not file.exists():
            file.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        first, *lines = file.read_text(encoding="utf-8", errors="replace").splitlines() or ["{}"]
        if parsed(first, file) != header:
            raise ConfigError(
                f"{file} holds answers to other puzzles, of another checkpoint or with other flags; remove it, or give "
                "another -o"
            )
        for line in lines:
            try:
                self.answers |= self._read(line)
            except (ValueError, TypeError, AttributeError):
                break  # the process ended in the middle of its last line, or the file was damaged
        write_whole(file, "\n".join([first, *(json.dumps({i: a}) for i, a in self.answers.items()), ""]))

    def _read(self, line: str) -> dict[str, Any]:
        answers = parsed(line, self.file)
        for id, tests in answers.items():
            for grid in (grid for tried in tests for grid in tried):
                checked_grid(grid, id)
        return answers

    def add(self, puzzle: Puzzle, tests: list[list[Grid]]) -> None:
        self.answers[puzzle.id] = [[grid.tolist() for grid in tried] for tried in tests]
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({puzzle.id: self.answers[puzzle.id]}) + "\n")


def header_of(config: SolveConfig, solver: Solver, puzzles: Sequence[Puzzle]) -> dict[str, Any]:
    flags = {name: getattr(config, name) for name in ("views", "rescore", "ttt", "ttt_lr", "seed")}
    asked = hashlib.sha256(repr([(p.id, [x.input.tobytes() for x in p.test]) for p in puzzles]).encode()).hexdigest()
    return {"checkpoint": str(solver.checkpoint), "puzzles": asked, **flags}


# ---- main ------------------------------------------------------------------------------------------------------------


def answer_all(config: SolveConfig, solver: Solver, puzzles: Sequence[Puzzle]) -> dict[str, list[list[Any]]]:
    """Up to two answers to every test input of every puzzle, best first."""
    partial = Partial(config.output.with_name(config.output.name + ".partial"), header_of(config, solver, puzzles))
    left = [puzzle for puzzle in puzzles if puzzle.id not in partial.answers]
    at_once = 1 if config.ttt else AT_ONCE
    with tqdm(total=len(puzzles), initial=len(puzzles) - len(left), unit="puzzle", disable=None) as bar:
        for group in (left[i : i + at_once] for i in range(0, len(left), at_once)):
            model = solver.adapted(group[0], config) if config.ttt else solver.model
            found = iter(solver.candidates(model, group, config))
            for puzzle in group:
                partial.add(puzzle, [attempts(next(found)) for _ in puzzle.test])
            bar.update(len(group))
    return partial.answers


def report(config: SolveConfig, puzzles: Sequence[Puzzle], answers: dict[str, list[list[Any]]]) -> None:
    """Scores by the three rules, where the answers to the puzzles are known, and the gallery."""
    known = [puzzle for puzzle in puzzles if all(pair.output is not None for pair in puzzle.test)]
    if known:
        found = score(solutions_of(known), {p.id: answers[p.id] for p in known}, inputs_of(known))
        for k in (name for name in found if name.startswith("pass@")):
            for rule, value in found[k].items():
                print(f"{k}, {rule}: {value['value']:.2%} (95 % {value['low']:.2%} to {value['high']:.2%})")
    if config.gallery is not None:
        cards = []
        for puzzle in puzzles:
            for episode, tried in zip(questions(puzzle), answers[puzzle.id], strict=True):
                truth = episode.query.output
                scores = {} if truth is None else question_scores(tried[0], truth, episode.query.input)
                cards.append(Card(episode, tried, {n: scores[n] for n in ("exact", "shape") if n in scores}))
        write_gallery(config.gallery, f"{config.puzzles}, {config.checkpoint}", cards, {})


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(SolveConfig, args=argv, description=__doc__)
    with sentences():
        if problems := config.problems():
            raise ConfigError("; ".join(problems))
        started = time.perf_counter()
        puzzles = load_puzzles(config.puzzles)
        solver = load(config.checkpoint, config.cpu)
        lists = answer_all(config, solver, puzzles)
        answers = {
            id: [[np.array(grid, dtype=np.uint8) for grid in tried] for tried in tests] for id, tests in lists.items()
        }
        write_submission(config.output, answers, {puzzle.id: len(puzzle.test) for puzzle in puzzles})
        report(config, puzzles, answers)
        config.output.with_name(config.output.name + ".partial").unlink()
        device = next(solver.model.parameters()).device.type
        minutes = (time.perf_counter() - started) / 60
        print(f"{len(puzzles)} puzzles in {minutes:.1f} minutes on {device}; answers in {config.output}")


if __name__ == "__main__":
    main()
