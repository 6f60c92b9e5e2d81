"""A worker of train/sweep.py, which starts it: takes trials from the queue, runs each as a process of its own, and
tells the study what came of it.

The queue is Optuna's: trials that wait, in SWEEP_DIR/study.db. A worker that is killed leaves one that says it runs and
has no heartbeat; after `grace` seconds another worker takes it up in the same run folder, where it goes on from its
last checkpoint. A folder that holds results is never run again. So no trial is lost, and none runs to its end twice.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from train.children import end
from train.nearest import nearest
from train.sweep_space import Sweep

T = TypeVar("T")

LOG = "log.txt"  # in each trial's folder, what its process says
SWEEP_FILE = "sweep.json"  # what the sweep is: spec, backend, seed, extra flags, workers, grace, database
POLL = 0.2  # seconds
RETRIES = 2  # of a trial whose process or worker was killed
BROKEN = 2  # exit status: no trial of this sweep can be scored

warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are, since 2021
put_back = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)


class TrialEnded(Exception):
    """A trial without a score; the message says why."""


class SweepBroken(Exception):
    """What is wrong with one trial is wrong with all."""


def open_study(folder: Path) -> optuna.Study:
    """The sweep's study, made where there is none."""
    about = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    sweep = Sweep.of(about["spec"])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = RDBStorage(
        f"sqlite:///{folder / 'study.db'}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=max(1, about["grace"] // 5),
        grace_period=about["grace"],
        heartbeat_stale_trial_callback=put_back,
    )
    rung, pruner = sweep.first_rung(), optuna.pruners.NopPruner()
    if rung is not None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rung[0], reduction_factor=rung[1])
    direction = "maximize" if sweep.maximize else "minimize"
    return optuna.create_study(
        storage=storage, study_name="sweep", direction=direction, pruner=pruner, load_if_exists=True
    )


def share(things: Sequence[T], worker: int, workers: int) -> list[T]:
    """A worker's part of the cores, or GPUs; with fewer of them than workers, one that others have too."""
    return list(things[worker::workers]) or [things[worker % len(things)]]


def run_dir_of(folder: Path, number: int) -> Path:
    return folder / f"trial-{number:04d}"


# ---- what a trial leaves ---------------------------------------------------------------------------------------------


def of_its_runs(run_dir: Path, name: str) -> list[Path]:
    """A file of a trial's run, or of each of its runs where the script makes several (models, seeds)."""
    own = run_dir / name
    return [own] if own.exists() else sorted(run_dir.glob(f"*/{name}"))


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a metrics.jsonl that may be being written."""
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)


def best_so_far(file: Path, sweep: Sweep) -> list[float]:
    """The best of the sweep's metric at each evaluation after step 0; the worst there is where none was finite."""
    split, _, name = sweep.metric.partition("/")
    sign = -1 if sweep.maximize else 1
    best, found = math.inf, []
    for row in rows_of(file):
        if row["split"] == split and row["step"] > 0 and name in row:
            if math.isfinite(row[name]):
                best = min(best, sign * row[name])
            found.append(sign * best)
    return found


def check_metric(file: Path, sweep: Sweep) -> None:
    """Raises SweepBroken where rows of the metric's split are there and none has it: no trial's will."""
    split, _, name = sweep.metric.partition("/")
    names = list(dict.fromkeys(key for row in rows_of(file) if row["split"] == split for key in row))
    if names and name not in names:
        known = [f"{split}/{key}" for key in names if key not in ("step", "split", "elapsed")]
        raise SweepBroken(
            f"no row of {file} has a {sweep.metric}, only {', '.join(known)}{nearest(sweep.metric, known)}"
        )


def score_of(run_dir: Path, sweep: Sweep) -> float:
    """The best evaluation of a trial that ended, as the run's own best checkpoint has it; the mean over its runs."""
    files = of_its_runs(run_dir, "metrics.jsonl")
    for file in files:
        check_metric(file, sweep)
    scores = [best_so_far(file, sweep)[-1:] for file in files]
    if not files or not all(scores):
        raise SweepBroken(f"{run_dir} ended without an evaluation that has {sweep.metric}; let --eval_every be less")
    return sum(score for [score] in scores) / len(scores)


# ---- a worker --------------------------------------------------------------------------------------------------------


class Worker:
    """Objective of the study, one trial at a time."""

    def __init__(self, folder: Path, index: int, workers: int) -> None:
        about = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        self.folder, self.sweep, self.seed = folder, Sweep.of(about["spec"]), about["seed"]
        self.backend, self.extra, self.db, self.shared = about["backend"], about["extra"], about["db"], workers > 1
        self.study, self.parent, self.signalled = open_study(folder), os.getppid(), False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if hasattr(os, "sched_setaffinity"):  # not on a Mac; a run takes as many threads as it has cores
            os.sched_setaffinity(0, share(sorted(os.sched_getaffinity(0)), index, workers))

    def _stop(self, *_: Any) -> None:
        self.signalled = True

    @property
    def stopping(self) -> bool:
        return self.signalled or os.getppid() != self.parent

    def work(self) -> None:
        """Until the queue is empty and no other worker has a trial that might come back to it."""
        while not self.stopping:
            # Whoever looks into the queue alone finds there what it then takes: Optuna would make up a new trial.
            with (self.folder / ".queue").open("a") as self.queue:
                fcntl.flock(self.queue, fcntl.LOCK_EX)
                optuna.storages.fail_stale_trials(self.study)
                states = {trial.state for trial in self.study.get_trials(deepcopy=False)}
                if TrialState.WAITING in states:
                    self.study.optimize(self.trial, n_trials=1, catch=(TrialEnded,), callbacks=[self.after])
                    continue
            if TrialState.RUNNING not in states:
                return
            time.sleep(POLL)

    def trial(self, trial: optuna.Trial) -> float:
        fcntl.flock(self.queue, fcntl.LOCK_UN)
        number, run_dir = trial.user_attrs["number"], run_dir_of(self.folder, trial.user_attrs["number"])
        trial.set_user_attr("again", False)
        seed = random.Random(f"{self.seed}/{number}").getrandbits(32)  # one for all would begin with equal trials
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        flags = {p.name: p.rounded(p.suggest(trial)) for p in self.sweep.parameters}
        trial.set_user_attr("flags", flags)
        end(run_dir)  # what a killed worker left running
        if not (run_dir / "results.json").exists():
            self.run(trial, flags, run_dir)
        return score_of(run_dir, self.sweep)

    def run(self, trial: optuna.Trial, flags: dict[str, Any], run_dir: Path) -> None:
        """The trial as a process, to its end. Raises TrialPruned, or TrialEnded where it leaves no results."""
        run_dir.mkdir(exist_ok=True)
        command = self.sweep.command(flags, run_dir / "flags.json")
        if self.shared and command[1:3] == ["accelerate", "launch"] and "--main_process_port" not in command:
            command[3:3] = ["--main_process_port", "0"]  # any that is free: launches beside each other want the same
        command += [f"--run_dir={run_dir}", "--wandb=off", f"--db={self.db}", *self.extra]
        with (run_dir / LOG).open("ab") as log:
            begin = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        pruned = self.follow(trial, process, run_dir)
        if (run_dir / "results.json").exists():
            return
        if pruned:
            raise optuna.TrialPruned
        said = (run_dir / LOG).read_bytes()[begin:].decode(errors="replace")
        states = {json.loads(file.read_text(encoding="utf-8"))["state"] for file in of_its_runs(run_dir, "run.json")}
        # A launcher only says that what it launched was killed, and that may be before there is a run.json.
        killed = process.returncode < 0 or "SIGKILL" in said or states & {"running", "interrupted"}
        if killed and not self.stopping:
            trial.set_user_attr("again", True)
        why = "stopped; the same command goes on with it" if self.stopping else "killed" if killed else last_words(said)
        trial.set_user_attr("why", why)
        raise TrialEnded(why)

    def follow(self, trial: optuna.Trial, process: subprocess.Popen, run_dir: Path) -> bool:
        """Report evaluations as they come, until the process ends; whether that was because the trial was pruned."""
        reported, pruned = 0, False
        try:
            while process.poll() is None and not pruned and not self.stopping:
                time.sleep(POLL)
                files = of_its_runs(run_dir, "metrics.jsonl")
                if len(files) != 1:
                    continue
                check_metric(files[0], self.sweep)
                values = best_so_far(files[0], self.sweep)
                for step, value in enumerate(values[reported:], reported + 1):
                    trial.report(value, step)
                pruned = len(values) > reported and trial.should_prune()
                reported = max(reported, len(values))
        finally:
            end(run_dir)
            process.wait()
        return pruned

    def after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A line about it; and back into the queue if it was killed."""
        about = trial.user_attrs
        came = f"{self.sweep.metric} {trial.value:.6g}" if trial.value is not None else about.get("why", "no score")
        pruned = ", pruned" if trial.state is TrialState.PRUNED else ""
        flags = " ".join(f"{p.name}={about['flags'][p.name]}" for p in self.sweep.searched)
        print(f"trial {about['number']}: {came}{pruned}  ({flags})", flush=True)
        if trial.state is TrialState.FAIL and about["again"]:
            put_back(study, trial)


def last_words(said: str) -> str:
    """Why a script failed: its own sentence where it gave one, else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    sentence = next((line for line in lines if line.startswith("error: ")), lines[-1])
    return f"failed: {sentence.removeprefix('error: ')}"


def main(folder: Path, index: int, workers: int) -> None:
    try:
        Worker(folder, index, workers).work()
    except SweepBroken as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BROKEN) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
