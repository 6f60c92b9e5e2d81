"""How long a run is: steps, epochs, minutes or money, made into one number of steps that is fixed once."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import psutil

from train.engine.config import TrainingConfig

# Rows, evaluations and checkpoints in a run, where their distances aren't given.
ROWS, EVALUATIONS = 100, 10
# With a clock, evaluations and checkpoints in mid-run may take this share of the time,
EVALUATION_SHARE = 0.15
# and what lies ahead is planned this much slower than it was measured: better to end a little early than half way down.
SLACK = 1.1
# Report, plot, sample and the interpreter's own end, in seconds; a hook's `seconds_at_end` come on top.
LAST_WORDS = 4.0
# A signal waits for an evaluation to end; those who send it wait 30 s (Kubernetes, Slurm) before they kill. Where an
# evaluation takes longer than this, a checkpoint is written before it.
SECONDS_TO_RISK = 10.0


@dataclass
class Intervals:
    """Steps between rows, evaluations and checkpoints."""

    log: int = 1
    evaluate: int = 0  # 0: not yet known
    save: int = 0

    @classmethod
    def of(cls, config: TrainingConfig, total: int, evaluations: int = EVALUATIONS) -> Intervals:
        evaluate = config.eval_every or math.ceil(total / max(1, evaluations))
        log = config.log_every or min(10, max(1, total // ROWS))
        return cls(log=log, evaluate=evaluate, save=config.save_every or evaluate)


class Limits:
    """When the run ends. `spent`: seconds that earlier processes of this run took, from their start to their end."""

    def __init__(self, config: TrainingConfig, steps_per_epoch: float, spent: float) -> None:
        self.config, self._spent = config, spent
        self.last_words = LAST_WORDS
        self._start = start = psutil.Process().create_time()
        ends: list[tuple[float, str]] = []
        if config.max_minutes is not None:
            ends.append((start + 60 * config.max_minutes, "max_minutes"))
        if config.max_cost is not None and config.hourly_rate is not None:
            ends.append((start + 3600 * config.max_cost / config.hourly_rate - spent, "max_cost"))
        self.deadline, self.deadline_name = min(ends, default=(math.inf, ""))
        steps: list[tuple[int, str]] = []
        if config.max_steps is not None:
            steps.append((config.max_steps, "max_steps"))
        if config.epochs is not None or (config.max_steps is None and not ends):
            steps.append((math.ceil((config.epochs or 1.0) * steps_per_epoch), "epochs"))
        self.max_steps: int | None
        self.max_steps, self.steps_name = min(steps, default=(None, ""))

    @property
    def spent(self) -> float:
        """Seconds that have been paid for, this process's included."""
        return self._spent + time.time() - self._start

    @property
    def has_clock(self) -> bool:
        return math.isfinite(self.deadline)

    @property
    def steps_to_measure(self) -> int:
        """Steps whose speed fixes the total; all lie in the warm-up, which is the same for every total."""
        return min(4, max(1, self.config.warmup_steps))

    def fix(self, done: int, step_seconds: float, pause_seconds: float) -> tuple[int, Intervals]:
        """Total steps and intervals of a run under a clock, from what its first `done` steps took.

        pause_seconds: one evaluation and one checkpoint.
        """
        pause_seconds *= SLACK
        left = self.deadline - time.time() - pause_seconds - self.last_words
        pauses = max(0, min(EVALUATIONS - 1, int(EVALUATION_SHARE * left / max(pause_seconds, 1e-3))))
        if self.config.eval_every is None:
            left -= pauses * pause_seconds
        else:
            step_seconds += pause_seconds / self.config.eval_every
        total = done + max(1, int(left / (SLACK * step_seconds)))
        if self.max_steps is not None:
            total = min(total, self.max_steps)
        return total, Intervals.of(self.config, total, evaluations=pauses + 1)

    def out_of_time(self, step_seconds: float, pause_seconds: float) -> bool:
        """Whether one more step and the end of the run would not fit before the deadline."""
        return time.time() + SLACK * (step_seconds + pause_seconds) + self.last_words > self.deadline

    def reason(self, step: int, late: bool) -> str:
        """What ended a run that stopped at `step`, by the name of its flag."""
        return self.deadline_name if late or step != self.max_steps else self.steps_name
