"""The one training loop. `Trainer.step` is what happens to a batch; the rest decides where to start, pause and end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train.engine.checkpoint import Checkpoints, find_checkpoint
from train.engine.config import ConfigError, TrainingConfig
from train.engine.evaluation import Predictor, aside
from train.engine.fit import first_micro_batch, fit, recompute_if_asked
from train.engine.guard import PATIENCE, Guard, TrainingBroken
from train.engine.launch import open_backend
from train.engine.limits import LAST_WORDS, SECONDS_TO_RISK, Intervals, Limits
from train.engine.logbook import Logbook, introduce
from train.engine.metrics import Row, Stopwatch
from train.engine.optim import learning_rate, make_optimizer, set_learning_rate
from train.engine.order import MicroBatches, micro_batches_per_step, order_of, windows
from train.engine.plan import make_plan
from train.engine.precision import synchronize
from train.engine.run_folder import RunFolder, begun, default_run_dir, read_json
from train.engine.signals import EXIT_INTERRUPTED, Agreed, Signals
from train.engine.snapshot import Progress, Snapshot, seed_generators
from train.engine.summary import Results, already_finished, cpu_matmul_rate, finish


class Task(Protocol):
    """The world a model is trained in. Item i of train or val is a pure function of i."""

    train: Sequence[Any]
    val: Sequence[Any]
    monitor: str  # the score of `evaluate` that best-k and early stopping go by
    mode: str  # "min" or "max": which way it is better
    item_name: str  # what num_items counts: tokens, cells, samples

    def collate(self, items: list[Any]) -> dict[str, Any]: ...
    def num_items(self, batch: dict[str, Any]) -> Tensor: ...
    def evaluate(self, predict: Predictor) -> dict[str, float]: ...


class Trainer:
    """Trains `model` on `task`. hooks: called as hook(trainer, row) after every evaluation, on every process; one that
    has a `finish()` is told the end, for which --max_minutes leaves it the `seconds_at_end` that it has by then; one
    that has a `saved(trainer)` is told of every checkpoint.

    `model` may be a function of the config that builds one: it is then fitted to the machine's memory (`fit`) and built
    once it is known to fit; `trainer.config` holds the settings that came of it. A script may fill `facts` (for
    run.json, e.g. the corpus hash) and `report` (for results.json and the last lines, e.g. {"baselines": {...}}; a
    baseline of the monitored score is drawn in the plot too) before `train`.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Any], nn.Module],
        config: TrainingConfig,
        task: Task,
        hooks: Sequence[Callable[[Trainer, Row], None]] = (),
    ) -> None:
        self.config, self.task, self.hooks = config, task, hooks
        self.facts: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.backend = open_backend(config, begun_in=self._precision_so_far())
        self.book = Logbook(config, self.backend, task.item_name)
        self.inner = self._planned(model)
        self.order = order_of(task, config)
        self.per_step = micro_batches_per_step(self.config, self.backend.world_size)
        self.progress = Progress()
        self.clock = Stopwatch(self.backend.device)
        self.guard = Guard(self.backend.device)
        self.signals = Signals()
        self.agreed = Agreed()
        self.folder: RunFolder | None = None
        self.feed: Generator[list[dict]] | None = None
        self.saved_step: int | None = None  # where all that is known is in a checkpoint
        self.told_step: int | None = None  # of the newest evaluation that this process's hooks have seen

    def _planned(self, model: nn.Module | Callable[[Any], nn.Module]) -> nn.Module:
        """The model, with `plan` and, where it was left open, `config` made to fit. --plan ends here."""
        if isinstance(model, nn.Module):
            recompute_if_asked(model, self.config)
            batch, per_step = first_micro_batch(self.task, self.config, self.backend.world_size)
            self.plan = make_plan(model, self.config, batch, per_step, self.backend)
            if self.config.plan:
                self.book.say(*self.plan.lines())
                raise SystemExit(0 if self.plan.fits else 1)
            return model
        try:
            self.config, self.plan = fit(self.config, model, self.task, self.backend, self.book.say)
        except ConfigError as error:
            if not self.config.plan:
                raise
            self.book.say(str(error))
            raise SystemExit(1) from error
        if self.config.plan:
            self.book.say(*self.plan.lines())
            raise SystemExit(0)
        torch.manual_seed(self.config.seed)
        built = model(self.config)
        recompute_if_asked(built, self.config)
        return built

    def _precision_so_far(self) -> str | None:
        """What the run in --run_dir was begun in: a resumed run must not be measured into another precision."""
        return begun(self.config.run_dir, "run.json").get("precision")

    # ---- from the first line to the last -------------------------------------------------------------------------

    def train(self) -> Results:
        """Run to the end of the limits. Exits with status 75 when a signal came, after saving."""
        self.run_dir = self.backend.broadcast(self.config.run_dir or default_run_dir())
        if self.backend.on_main(self._open_folder):
            return already_finished(self)
        with self.signals:  # to the end: a launcher passes on to its processes what the whole group has had already
            try:
                self._prepare()
                if not self.progress.last:
                    self.evaluate()
                results = finish(self, stopped_by=self._loop())
            except BaseException as error:
                # On a full disk these fail too, and the first error is what must be seen.
                if self.folder is not None and not isinstance(error, SystemExit):
                    with suppress(OSError):
                        self.folder.describe(state="failed", error=f"{type(error).__name__}: {error}")
                with suppress(Exception):
                    self.close()
                raise
            self.close()
        return results

    def _open_folder(self) -> bool:
        """Take the run folder; whether the run in it is finished. Only process 0 has it."""
        self.folder = RunFolder(self.run_dir, self.config)
        return self.folder.finished

    def _prepare(self) -> None:
        """Model, optimizer and trackers as they were at the checkpoint to go on from, or as new."""
        config, backend = self.config, self.backend
        checkpoints = Checkpoints(self.run_dir / "checkpoints")
        source = backend.on_main(lambda: self._source(checkpoints))
        seed_generators(config.seed + backend.rank)
        ema = None
        if config.ema_decay:
            ema = AveragedModel(self.inner, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
            backend.place(ema.module)
        backend.place(self.inner)
        if config.compile:
            self.inner.compile()
        optimizer = make_optimizer(self.inner, config)
        self.model = backend.prepare(self.inner, optimizer, self.per_step)
        self.optimizer, self.ema = optimizer, ema
        spare, _ = first_micro_batch(self.task, config, backend.world_size)
        self.predict = Predictor(ema.module if ema else self.inner, backend, spare)
        self.snapshot = Snapshot(
            self.inner, ema, optimizer, self.guard, self.book.meter, self.progress, backend, checkpoints
        )
        if source is not None:
            self.snapshot.read(source)
            if source.is_relative_to(self.run_dir):
                self.saved_step = self.progress.step
                backend.on_main(lambda: checkpoints.link(source, self.progress.best))
            else:
                self.progress.keep_only_step()
        self.limits = Limits(config, self.order.steps_per_epoch, self.progress.spent)
        self._seconds = {"evaluation": 0.0, "save": 12 * self.plan.num_parameters / 2e8}  # until they are measured
        self.matmul_rate_before = cpu_matmul_rate(backend)
        introduce(self)
        steps = self.limits.max_steps
        if self.progress.total_steps is None and steps is not None and not self.limits.has_clock:
            self._fix_length(steps, Intervals.of(config, steps))
        if self.folder is not None and self.progress.wandb_id is None:
            self.progress.wandb_id = read_json(self.run_dir / "run.json").get("wandb_id")
        self.book.open(self.run_dir, self.progress)
        if self.folder is not None:  # or a run that is killed before its first checkpoint would be two on W&B
            self.folder.describe(wandb_id=self.progress.wandb_id)

    def _source(self, checkpoints: Checkpoints) -> Path | None:
        found = checkpoints.newest(self.book.say)
        if found is None and self.config.resume not in ("auto", "never"):
            found = find_checkpoint(Path(self.config.resume), self.book.say)
        return found

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _loop(self) -> str:
        """Steps until the limits or a signal say otherwise; returns the name of the limit."""
        progress = self.progress
        self.feed = self._windows()
        first_steps: list[float] = []
        while progress.step != progress.total_steps:
            if progress.step and (stopped_by := self._evaluate_and_save()):
                return stopped_by
            self.step_began = time.perf_counter()
            with self.clock("data"):
                window = next(self.feed)
            if progress.step in progress.banned_steps:
                self.book.meter.left_out()
            elif not self.step(window):
                self.feed.close()
                self.feed = self._windows()
                continue
            progress.step += 1
            if progress.total_steps is None:
                synchronize(self.backend.device)
                first_steps.append(time.perf_counter() - self.step_began)
                if progress.step >= self.limits.steps_to_measure:
                    # The very first pays for allocation and compilation: it counts only where it is all there is.
                    each = mean(first_steps[1:] or first_steps)
                    self._fix_length(*self.limits.fix(progress.step, each, sum(self._seconds.values())))
            if stopped_by := self._between_steps():
                return stopped_by
        return self.limits.reason(progress.step, late=False)

    def step(self, window: list[dict]) -> bool:
        """One optimizer step over a window of micro-batches; False if it led back to an earlier checkpoint."""
        set_learning_rate(self.optimizer, self.learning_rate())
        window = [self.backend.move(batch) for batch in window]
        items = self._count_items(window)
        parts: dict[str, Tensor] = {}
        for i, batch in enumerate(window):
            with self.backend.micro_batch(last=i == len(window) - 1):
                with self.clock("forward"), self.backend.autocast():
                    losses = self.model(**batch, num_items=items)
                with self.clock("backward"):
                    self.backend.backward(losses["loss"])
            parts = {name: value.detach() + parts.get(name, 0) for name, value in losses.items()}
        with self.clock("optimizer"):
            norm = self.backend.clip(self.config.grad_clip)
            bad = self._agree(parts["loss"], norm)
            self.backend.step(bad, self.agreed.bad)
            if self.ema is not None:
                self.ema.update_parameters(self.inner)
        self.book.meter.add(parts, norm, items, bad)
        return self.config.bad_step == "skip" or not self.agreed.bad or self._bad_step()

    def _agree(self, loss: Tensor, norm: Tensor) -> Tensor:
        """The verdict on this step, 0-d, and `agreed`: one small sum over the processes, read once or not at all.

        It is read before the optimizer steps: the host then prepares the next batch while the device still works.
        """
        step_seconds = time.perf_counter() - self.step_began  # the optimizer's part is within the limits' slack
        late = self.limits.out_of_time(step_seconds, sum(self._seconds.values()))
        flags = [self.signals.received is not None, late]
        votes = self.backend.sum(torch.stack([loss, *(torch.full_like(loss, flag) for flag in flags)]))
        bad = self.guard.verdict(self.progress.step, votes[0], norm)
        is_bad = False
        if self.backend.world_size > 1 or not self.backend.skips_on_device or self.config.bad_step != "skip":
            votes[0] = bad
            is_bad, *flags = (votes > 0).tolist()
        self.agreed = Agreed(is_bad, *flags)
        return bad

    def learning_rate(self) -> float:
        progress = self.progress
        return learning_rate(self.config, progress.step, progress.total_steps, self.order.steps_per_epoch)

    def _count_items(self, window: list[dict]) -> Tensor:
        """Items of the whole step over all processes, 0-d int64; at least 1, so that nothing is divided by 0."""
        mine = torch.stack([self.task.num_items(batch) for batch in window]).sum()
        return self.backend.sum(mine).clamp(min=1)

    def _windows(self) -> Generator[list[dict]]:
        backend = self.backend
        sampler = MicroBatches(self.order, self.progress.step, backend.rank, backend.world_size, self.per_step)
        return windows(self.task, sampler, self.config.num_workers, pin_memory=backend.device.type == "cuda")

    def _bad_step(self) -> bool:
        """--bad_step stop and rewind: end the run, or go back and leave this step's batch out from then on."""
        step = self.progress.step
        source = self.backend.on_main(lambda: self.snapshot.checkpoints.newest(self.book.say))
        banned = sorted({*self.progress.banned_steps, step})
        in_vain = banned[-PATIENCE:] == list(range(step - PATIENCE + 1, step + 1))
        if self.config.bad_step == "stop" or source is None or in_vain:
            self.progress.step += 1
            self._log_row()
            raise TrainingBroken(
                f"the loss or gradient of step {step} is not finite or has leapt, and --bad_step "
                f"{self.config.bad_step} ends the run; its newest sound checkpoint: {source or 'none yet'}"
            )
        self.snapshot.read(source)
        self.saved_step = self.progress.step
        self.progress.banned_steps = banned
        self.book.cut_back(self.progress)
        self.book.say(f"rewind      step {step} was bad; going on from step {self.progress.step} without its batch")
        return False

    # ---- between steps -------------------------------------------------------------------------------------------

    def _between_steps(self) -> str:
        """A row where one is due, and whether to go on. Returns the name of the limit that ends the run, or ""."""
        progress, late = self.progress, self.agreed.late
        ending = late or progress.step in (progress.total_steps, self.limits.max_steps)
        if ending or progress.step % progress.intervals.log == 0:
            self._log_row()
        if ending:
            return self.limits.reason(progress.step, late)
        if self.agreed.signal:
            self._interrupt()
        return ""

    def _evaluate_and_save(self) -> str:
        """What is due after this step and not done: a signal may have come before it, and a run goes on from there.

        Returns the name of the limit that ends the run, or "".
        """
        progress, every = self.progress, self.progress.intervals
        due = every.evaluate and progress.step % every.evaluate == 0 and progress.last.get("step") != progress.step
        better = due and self.evaluate()
        if better or (every.save and progress.step % every.save == 0 and self.saved_step != progress.step):
            self.save()
        patience = self.config.early_stopping_patience
        return "early_stopping" if patience and progress.evaluations_since_best >= patience else ""

    def _log_row(self) -> None:
        self.book.train_row(self.progress, self.learning_rate_of_last_step)
        self.clock.collect()
        if self.guard.streak.item() >= PATIENCE:
            raise TrainingBroken(
                f"the last {PATIENCE} optimizer steps were all skipped, their loss or gradient not finite or leaping; "
                f"lower --lr, look at the data, or go on from a checkpoint in {self.snapshot.checkpoints.folder}"
            )

    @property
    def learning_rate_of_last_step(self) -> float:
        return self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"]

    def evaluate(self) -> bool:
        """A validation row; whether it is among the best. The hooks see it before it returns."""
        progress, task = self.progress, self.task
        if progress.step and self.saved_step != progress.step:
            risky = self._seconds["evaluation"] > SECONDS_TO_RISK
            signal, risky = self.backend.any(self.signals.received is not None, risky)
            if signal:
                self._interrupt()
            if risky:
                self.save()
        started = time.perf_counter()
        with self.book.pause(), aside(self.predict.model):
            scores = self.backend.broadcast(task.evaluate(self.predict))
            self.tell_hooks(self.book.val_row(progress, scores))
        self.clock.add("evaluation", time.perf_counter() - started)
        self._seconds["evaluation"] = time.perf_counter() - started
        self.saved_step = None
        return progress.note(scores, task.monitor, task.mode)

    def tell_hooks(self, row: Row) -> None:
        for hook in self.hooks:
            hook(self, row)
        self.told_step = row["step"]
        self.limits.last_words = LAST_WORDS + sum(getattr(hook, "seconds_at_end", 0.0) for hook in self.hooks)

    def save(self) -> None:
        with self.book.pause(), self.clock("saving"):
            self.progress.seconds, self.progress.spent = self.book.elapsed, self.limits.spent
            self.progress.metrics_bytes, self.progress.rows_logged = self.book.metrics_bytes, self.book.rows_logged
            self._seconds["save"] = self.snapshot.write()
            for hook in self.hooks:
                getattr(hook, "saved", lambda trainer: None)(self)
        self.saved_step = self.progress.step

    def _interrupt(self) -> None:
        self.save()
        if self.folder is not None:
            self.folder.describe(state="interrupted")
        self.book.say(f"interrupted by {self.signals.received or 'another process'} and saved; the same command with "
                  f"--run_dir {self.run_dir} goes on after step {self.progress.step}")  # fmt: skip
        raise SystemExit(EXIT_INTERRUPTED)

    def _fix_length(self, total: int, intervals: Intervals) -> None:
        self.progress.total_steps, self.progress.intervals = self.backend.broadcast((total, intervals))
        every = self.progress.intervals
        self.book.say(f"length      {self.progress.total_steps} steps; a row every {every.log}, an evaluation every "
                  f"{every.evaluate}, a checkpoint every {every.save}")  # fmt: skip

    def close(self) -> None:
        """Let go of trackers, the run folder's lock, model and optimizer: of each, whatever becomes of the others."""
        with ExitStack() as last_first:
            last_first.callback(self.backend.close)
            if self.folder is not None:
                last_first.callback(self.folder.release)
            last_first.callback(self.book.conclude)
            last_first.callback(self.book.close)
            if self.feed is not None:
                # Workers ignore the SIGTERM that is to end them when the interpreter does: it would wait for ever.
                last_first.callback(self.feed.close)
