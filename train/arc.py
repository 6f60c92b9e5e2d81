"""What the ARC scripts share: their flags, the episodes to learn and to be scored on, and one run of the engine.

Launch train/decoder_only.py, train/encoder_decoder.py or train/champion.py, or train/arc_ladder.py for all of them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from models.arc_layers import ArcConfig, ArcModel
from tasks.arc.augment import Augmentation
from tasks.arc.formats import load_puzzles, split_by_sorted_id
from tasks.arc.grid import MAX_SIZE, Episode, Puzzle, leave_one_out, questions
from tasks.arc.leak import without_leaks
from tasks.arc.skills import HELD_OUT, SKILLS, TRAINED, SkillData
from tasks.arc.task import ArcTask
from train.arc_report import OriginNames, Report
from train.engine import ConfigError, Results, Trainer, TrainingConfig, parse
from train.engine.config import named_preset
from train.engine.optim import OptimizerName, ScheduleName
from train.engine.processes import process_state
from train.engine.script import sentences

TRIAL69_LR = 0.0018498849832733245
TRIAL69_FLOOR = 1.6816632143867157e-06
# What --preset puts in place of the flags' defaults, which are those of trial69. Flags win over both.
PRESETS: dict[str, dict[str, Any]] = {
    "trial69": {},
    "tenfold": {
        "epochs": None,
        "optimizer": "adamw",
        "betas": (0.9, 0.98),
        "lr": 1e-3,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "final_lr_ratio": 0.05,
        "warmup_steps": 100,
        "early_stopping_patience": None,
        "episodes": 100_000,
        "mask_answer": True,
        "dropout": False,
        "tensorboard": False,
        "seed": 0,
    },
}
MOST_PAIRS = 100  # to show; ARC has ten at most
SKILL_SIZE = 10  # cells of the skills' grids each way, unless told
TINY = {"skills": ("reflect", "colour_map"), "episodes": 8, "val_episodes": 2, "grid_size": 8, "free_run": 2}


@dataclass(frozen=True, kw_only=True)
class ArcRun(TrainingConfig):
    """Flags of the ARC scripts. The defaults are the original's recipe, its trial 69, to the last digit."""

    # Of the script, for the folder and the names of the best checkpoints, as the original had them.
    experiment: ClassVar[str]
    kind: ClassVar[str] = "encoder_decoder"
    # What --preset tenfold means for it beside what it means for all.
    tenfold: ClassVar[dict[str, Any]] = {}

    # tenfold: AdamW with warm-up and one cosine, new episodes without end, answers hidden in part, no dropout.
    preset: Literal["trial69", "tenfold"] = "trial69"

    # Puzzles to learn in place of our skills: a file, a folder, a Kaggle bundle, or arc1-training, arc2-training
    # (pip install -e ".[arc]"). Four fifths of them, by sorted id, are learned unless --val_data says what to score.
    data: str | None = None
    # Puzzles to be scored on, in any of those forms: arc1-evaluation, arc2-evaluation, …
    val_data: str | None = None
    # Skills to learn; without any all fourteen that are not held out.
    skills: tuple[str, ...] = ()
    # Episodes of each skill to learn from, and of each in a validation set.
    episodes: int = 400
    val_episodes: int = 20
    # Cells of grids each way, at most: of the skills' (10 unless given), or of the puzzles of --data and --val_data
    # that are used (all unless given).
    grid_size: int | None = None
    # Demonstrations that are shown.
    context_pairs: int = 2
    # Symmetries, colours, order of pairs and translation drawn anew for each item, as far as its rule allows.
    augment: bool = False
    # In training hide a random share of the answer so far, so that the rule has to come from the demonstrations.
    mask_answer: bool = False
    # Choices of question, demonstrations and augmentation of an episode in one epoch.
    copies: int = 1
    # Validation episodes answered freely at every evaluation, and of every set at the end; 0 for none.
    free_run: int = 64
    free_run_at_end: int = 200
    # The dropout rates of trial 69; --no-dropout trains without any.
    dropout: bool = True

    epochs: float | None = 100
    optimizer: OptimizerName = "adam"
    betas: tuple[float, float] | None = (0.95, 0.999)
    lr: float = TRIAL69_LR
    weight_decay: float = 0.0
    schedule: ScheduleName = "cosine_restarts"
    restart_every: int = 6
    final_lr_ratio: float = TRIAL69_FLOOR / TRIAL69_LR
    warmup_steps: int = 0
    early_stopping_patience: int | None = 7
    tensorboard: bool = True
    seed: int = 307

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("episodes", "val_episodes", "copies"):
            if getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.grid_size is not None and not 1 <= self.grid_size <= MAX_SIZE:
            found.append(f"--grid_size must be 1 to {MAX_SIZE}, not {self.grid_size}")
        if self.context_pairs > MOST_PAIRS:
            found.append(f"--context_pairs must be at most {MOST_PAIRS}, not {self.context_pairs}")
        for name in ("context_pairs", "free_run", "free_run_at_end"):
            if getattr(self, name) < 0:
                found.append(f"--{name} must not be negative, not {getattr(self, name)}")
        if strange := [name for name in self.skills if name not in TRAINED]:
            found.append(f"--skills {' '.join(strange)}: the skills to learn are {', '.join(TRAINED)}")
        if self.mask_answer and self.legacy:
            found.append("--mask_answer with --legacy_vocab: that vocabulary has no token to hide others with")
        if self.data is not None and self.skills:
            found.append("--data and --skills both say what to learn; give one of them")
        if self.val_data is not None and self.data is None:
            found.append("--val_data goes with --data; our skills have validation sets of their own")
        try:
            self.shape()
        except ValueError as error:
            found.append(str(error))
        return found

    def filled_in(self) -> ArcRun:
        """With what --tiny decides."""
        if not self.tiny:
            return self
        data = {} if self.data is not None else TINY
        few = {"free_run_at_end": min(self.free_run_at_end, 4), "batch_size": min(self.batch_size, 8)}
        return dataclasses.replace(self, **data, **few)

    def shape(self) -> ArcConfig:
        """The config of the model that the flags ask for."""
        raise NotImplementedError

    def build(self) -> ArcModel:
        raise NotImplementedError

    @property
    def legacy(self) -> bool:
        return False

    @property
    def canonical(self) -> bool:
        """Whether the model is blind to the names of colours."""
        return getattr(self.shape(), "perminv", "table") == "canonical"


Run = TypeVar("Run", bound=ArcRun)


def preset_of(config_class: type[Run], argv: Sequence[str]) -> Run:
    """The defaults that --preset names, on the command line or in --settings."""
    name = named_preset(config_class, argv)
    fields = {f.name for f in dataclasses.fields(config_class)}
    values = PRESETS.get(name or "trial69", {})  # a name that is not known, the parser refuses
    if name == "tenfold":
        values = values | config_class.tenfold
    return config_class(**{name: value for name, value in values.items() if name in fields})


# ---- data ------------------------------------------------------------------------------------------------------------


def learnable(puzzles: Sequence[Puzzle]) -> list[Episode]:
    """Every pair whose answer is known as a question about the others of its puzzle."""
    asked = [episode for puzzle in puzzles for episode in (*leave_one_out(puzzle), *questions(puzzle))]
    return [episode for episode in asked if episode.query.output is not None]


def small_enough(puzzles: Sequence[Puzzle], side: int | None) -> list[Puzzle]:
    """Puzzles none of whose grids has more than `side` rows or columns."""

    def side_of(puzzle: Puzzle) -> int:
        grids = (grid for pair in (*puzzle.train, *puzzle.test) for grid in pair if grid is not None)
        return max(max(grid.shape) for grid in grids)

    return [puzzle for puzzle in puzzles if side is None or side_of(puzzle) <= side]


def data_of(run: ArcRun) -> dict[str, Sequence[Episode]]:
    """Episodes to learn from as "train", and sets of others by name, the first of them "val".

    Puzzles that would give those to be scored on away are left out of training. Raises ConfigError if none is left.
    """
    if run.data is None:
        names = run.skills or TRAINED
        # As many demonstrations as are shown decide the answer. All of one seed: runs of any --seed have the same data.
        size = {"max_size": run.grid_size or SKILL_SIZE, "demos": (2, max(2, run.context_pairs))}
        sets = {
            "train": SkillData("train", run.episodes, skills=names, **size),
            "val": list(SkillData("examples", run.val_episodes, skills=names, **size)),
            "skills": list(SkillData("skills", run.val_episodes, skills=HELD_OUT, **size)),
        }
        return sets | ({} if run.skills else {"compose": list(SkillData("compose", run.val_episodes, **size))})
    learned = load_puzzles(run.data)
    if run.val_data is None:
        learned, scored = split_by_sorted_id(learned)
    else:
        scored = load_puzzles(run.val_data)
    learned, leaking = without_leaks(learned, scored)
    if not learned:
        raise ConfigError(f"all puzzles of --data {run.data} are among those to be scored on; there is none to learn")
    sizes = f"{len(learned)} and {len(scored)}"
    learned, scored = small_enough(learned, run.grid_size), small_enough(scored, run.grid_size)
    if not (learned and scored):
        raise ConfigError(
            f"--grid_size {run.grid_size} leaves {len(learned)} and {len(scored)} of {sizes} puzzles to learn and to "
            "be scored on; give a larger one, or leave it out"
        )
    if process_state(run).is_main_process:
        if leaking:
            print(f"data        {len(leaking)} puzzles are not learned: they are, or show, puzzles to be scored on")
        if run.grid_size is not None:
            print(
                f"data        {len(learned)} and {len(scored)} of {sizes} puzzles to learn and to be scored on are "
                f"within {run.grid_size} x {run.grid_size}"
            )
    solved = [episode for puzzle in scored for episode in questions(puzzle) if episode.query.output is not None]
    return {"train": learnable(learned), "val": solved or learnable(scored)}


def make_task(run: ArcRun, data: dict[str, Sequence[Episode]]) -> ArcTask:
    skills = {name: SKILLS[name] for name in (run.skills or TRAINED)} if run.data is None else {}
    return ArcTask(
        {name: data[name] for name in ("train", "val")},
        kind=run.kind,
        context_pairs=run.context_pairs,
        any_query=run.data is not None,  # a skill's episode has a question that its demonstrations decide
        copies=run.copies,
        # A model that names colours by their first appearance would not notice other names.
        augment=Augmentation(colours=not run.canonical) if run.augment else None,
        mask_answer=run.mask_answer,
        symmetries={name: skill.symmetries for name, skill in skills.items()},
        fixed_colours={name: frozenset() if s.colours == "all" else frozenset({0}) for name, s in skills.items()},
        legacy_vocab=run.legacy,
        loss_on_input=getattr(run, "loss_on_input", False),
        free_run=run.free_run,
        # No answer is larger, and a model that has not learned to stop is stopped the sooner.
        max_size=run.grid_size or (SKILL_SIZE if skills else MAX_SIZE),
        seed=run.seed,
    )


# ---- a run -----------------------------------------------------------------------------------------------------------


def train(run: ArcRun, data: dict[str, Sequence[Episode]]) -> Results:
    task = make_task(run, data)
    if run.eval_every is None and run.preset == "trial69":  # whose patience counts epochs
        run = dataclasses.replace(run, eval_every=max(1, round(len(task.train) / run.batch_size)))
    others = {name: episodes for name, episodes in data.items() if name not in ("train", "val")}
    hooks = [Report(task, others, run.free_run_at_end)] if run.free_run_at_end else []
    trainer = Trainer(lambda settings: settings.build(), run, task, [*hooks, OriginNames(run.experiment)])
    trainer.facts |= {"data": task.info, "model": {"script": run.experiment, **dataclasses.asdict(run.shape())}}
    trainer.report["baselines"] = task.baselines()
    return trainer.train()


def main(config_class: type[Run], argv: Sequence[str] | None = None) -> Results:
    with sentences():
        argv = sys.argv[1:] if argv is None else argv
        run = parse(config_class, argv, preset_of(config_class, argv), fill=config_class.filled_in)
        return train(run, data_of(run))
