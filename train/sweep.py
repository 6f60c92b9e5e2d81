"""Search over the flags of a script, with the file that a W&B agent reads, and no server.

python train/sweep.py sweeps/language.yaml --trials 20                     # bayes in the file: Optuna's TPE
python train/sweep.py sweeps/maze.yaml --backend random --trials 30 --workers 4 --sweep_dir runs/sweeps/mazes
python train/sweep.py sweeps/language.yaml --workers 2 --trials 6 -- --tiny --max_steps 20
python train/sweep.py sweeps/language.yaml --backend wandb --workers 2     # registers the sweep, starts two agents

What stands after `--` goes to every trial. Each trial is a process of its own, launched by the file's `command`, in
SWEEP_DIR/trial-0000, -0001, …; workers share the machine's cores and GPUs evenly. A trial's score is its best
evaluation after step 0. With `early_terminate` in the file, trials that fall behind are ended early, by successive
halving (arXiv 1810.05934). The same command with the same --sweep_dir goes on where it stopped, with more --trials too,
and gives failed trials another chance. It leaves trial_results.csv, importance.png and parallel.png, the trials in the
experiment database, and prints a line of JSON at the very end.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml

from train.children import environment, held
from train.engine.config import ALIASES, TrainingConfig
from train.engine.metrics import has_wandb_credentials
from train.engine.record import database_of
from train.engine.run_folder import read_json, write_json
from train.engine.script import sentences
from train.engine.signals import EXIT_INTERRUPTED, Signals
from train.nearest import nearest
from train.sweep_space import COMMAND, Sweep

try:
    from optuna.trial import TrialState

    from train.sweep_report import Recorder, draw, rows, summary, table, trial_results, write_csv
    from train.sweep_worker import BROKEN, POLL, SWEEP_FILE, open_study, run_dir_of, share
except ImportError as error:
    raise SystemExit(f'error: a search needs Optuna: pip install -e ".[sweeps]" ({error})') from error

__all__ = ["main", "trial_results"]

DEATHS = 3  # of workers, for each that there is, before none takes the place of another
OURS = ("run_dir", "resume", "db")  # what a sweep decides for its trials


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Flags of train/sweep.py."""

    # A W&B sweep file.
    file: Annotated[Path, tyro.conf.Positional]
    # How values are chosen; as the file's `method` has it when not given.
    backend: Literal["grid", "random", "optuna", "wandb"] | None = None
    # Trials at a time.
    workers: int = 1
    # Trials in all; the file's run_cap, or the whole grid, when not given.
    trials: int | None = None
    seed: int = 0
    # runs/sweeps/<file>/<time stamp> when not given.
    sweep_dir: Path | None = None
    # The experiment database; auto: experiments.db in the topmost folder called runs above --sweep_dir, or in it.
    db: str = "auto"
    # Seconds without a sign of life after which another worker takes a trial over.
    grace: int = 20

    def problems(self) -> list[str]:
        return [
            f"--{name} must be at least {least}, not {getattr(self, name)}"
            for name, least in (("workers", 1), ("trials", 1), ("seed", 0), ("grace", 2))
            if getattr(self, name) is not None and getattr(self, name) < least
        ]


# ---- before the first trial ------------------------------------------------------------------------------------------


def how_many(config: SweepConfig, sweep: Sweep, backend: str) -> int:
    """Trials. Raises ValueError where nothing says so."""
    asked = config.trials or sweep.spec.get("run_cap")
    if backend == "grid":
        return min(asked or sweep.grid_size(), sweep.grid_size())
    if asked is None:
        raise ValueError(f"{backend} search has no end of its own; give --trials, or run_cap in {config.file}")
    return asked


def check_flags(sweep: Sweep, file: Path, extra: Sequence[str]) -> None:
    """Let the program say what it would do with a trial's flags. Raises ValueError with what it doesn't know."""
    program = sweep.spec["program"]
    if not Path(program).is_file():
        raise ValueError(f"{file}: program {program} is not there; run this from the folder that holds it")
    if ours := [word for word in extra if word.startswith("--") and _flag(word) in OURS]:
        raise ValueError(f"{ours[0]} is what a sweep decides for its trials; give --sweep_dir or --db to it instead")
    [point] = sweep.points("random", 1, seed=0)
    words = sweep.command({p.name: p.rounded(point[p.name]) for p in sweep.parameters}, Path(os.devnull))
    if program not in words:
        raise ValueError(f"{file}: command runs no program; it needs the word ${{program}}")
    asked = _ask(program, *words[words.index(program) + 1 :], *extra)
    if asked.returncode == 0:
        return
    known = (
        {_flag(name) for name in yaml.safe_load(_ask(program).stdout or "{}")} | set(ALIASES) | TrainingConfig.actions
    )
    for name in (p.name for p in sweep.parameters):
        if _flag(name) not in known:
            raise ValueError(f"{file}: {program} has no flag --{name}{nearest(_flag(name), known)}")
    raise ValueError(f"{program} refuses a trial's flags: {asked.stderr.strip().removeprefix('error: ')}")


def _flag(word: str) -> str:
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _ask(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, program, *flags, "--print_config"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def of_worker(worker: int, workers: int) -> dict[str, str]:
    """The environment with this worker's share of the GPUs."""
    env = environment()
    if torch.cuda.is_available():
        visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(share(visible.split(","), worker, workers))
    return env


def prepare(folder: Path, about: dict[str, Any], check: Any) -> None:
    """sweep.json of a new sweep, after `check`. Raises ValueError where the folder holds a sweep of something else."""
    file = folder / SWEEP_FILE
    if not file.exists():
        check()
        write_json(file, about)
        return
    old, new = (dict(flat({n: a[n] for n in ("spec", "backend", "seed", "extra")})) for a in (read_json(file), about))
    different = [
        f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} was begun as another search ({'; '.join(different)}); go on with the same, or give a new "
            "--sweep_dir"
        )
    write_json(file, about)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings, by their dotted names."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from flat(inner, key if name in ("", "spec") else f"{name}.{key}")


def fill_queue(folder: Path, points: list[dict[str, Any]]) -> None:
    """Queue every trial that is neither waiting nor running nor scored: at first all of them, later what failed."""
    study, last = open_study(folder), {}
    for trial in study.get_trials(deepcopy=False):
        last[trial.user_attrs["number"]] = trial
    for number, point in enumerate(points):
        if number not in last:
            study.enqueue_trial(point, user_attrs={"number": number})
        elif last[number].state is TrialState.FAIL:
            study.enqueue_trial({**point, **last[number].params}, user_attrs={"number": number})


# ---- while trials run ------------------------------------------------------------------------------------------------


def start_worker(folder: Path, index: int, workers: int) -> subprocess.Popen:
    words = [sys.executable, "-m", "train.sweep_worker", str(folder), str(index), str(workers)]
    return subprocess.Popen(words, env=of_worker(index, workers))


def run_workers(folder: Path, workers: int, recorder: Recorder) -> int:
    """Until the queue is empty. 0, or the exit status of a sweep that cannot go on."""
    status, deaths = 0, 0
    with Signals() as signals:
        crew = {index: start_worker(folder, index, workers) for index in range(workers)}
        while crew:
            time.sleep(POLL)
            recorder.record()
            status = status or (EXIT_INTERRUPTED if signals.received else 0)
            for index, worker in list(crew.items()):
                if status and worker.poll() is None:
                    worker.terminate()  # which ends its trial, whose run saves itself
                if worker.poll() is None:
                    continue
                del crew[index]
                if worker.returncode == BROKEN:
                    status = BROKEN
                elif worker.returncode and not status and (deaths := deaths + 1) <= DEATHS * workers:
                    print(f"worker {index} died with status {worker.returncode}; another takes its place", flush=True)
                    crew[index] = start_worker(folder, index, workers)
    return status


def start_agents(config: SweepConfig, sweep: Sweep, extra: Sequence[str]) -> int:
    """Register the sweep with W&B and run its agents to their end."""
    import wandb

    if not has_wandb_credentials():
        raise ValueError("--backend wandb needs a W&B account: run `wandb login` first, or set WANDB_API_KEY")
    spec = {**sweep.spec, "command": [*sweep.spec.get("command", COMMAND), *extra]}
    project = sweep.spec.get("project") or os.environ.get("WANDB_PROJECT", "tenfold")
    if config.trials is not None:
        spec["run_cap"] = config.trials
    name = wandb.sweep(spec, project=project, entity=sweep.spec.get("entity"))
    words = [sys.executable, "-m", "wandb", "agent", "--project", project, name]
    agents = [subprocess.Popen(words, env=of_worker(i, config.workers)) for i in range(config.workers)]
    return max(agent.wait() for agent in agents)


# ---- main ------------------------------------------------------------------------------------------------------------


def finish(folder: Path, recorder: Recorder) -> dict[str, Any]:
    """Table, files, plots and database; returns the last line."""
    sweep, found = Sweep.of(read_json(folder / SWEEP_FILE)["spec"]), rows(folder)
    recorder.record(all_again=True)
    write_csv(folder, found)
    print("", *table(found), "", *draw(folder, found), f"sweep       {folder}", sep="\n")
    return summary(found, sweep)


def search(config: SweepConfig, extra: Sequence[str]) -> int:
    """Run the search; its exit status."""
    sweep = Sweep.read(config.file)
    backend = config.backend or sweep.backend
    if backend == "wandb":
        return start_agents(config, sweep, extra)
    trials = how_many(config, sweep, backend)
    points = sweep.points(backend, trials, config.seed)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (config.sweep_dir or Path("runs/sweeps") / config.file.stem / stamp).resolve()
    db = database_of(run_dir_of(folder, 0), config.db)
    about = {"spec": sweep.spec, "backend": backend, "seed": config.seed, "extra": list(extra), "grace": config.grace}
    about["db"] = "off" if db is None else str(db.resolve())
    with held(folder, "sweep"):
        prepare(folder, about, check=lambda: check_flags(sweep, config.file, extra))
        fill_queue(folder, points)
        recorder = Recorder(folder, db)
        status = run_workers(folder, config.workers, recorder)
        last = finish(folder, recorder)
    if status == EXIT_INTERRUPTED:
        print(f"interrupted; the same command with --sweep_dir {folder} goes on")
    print(json.dumps(last), flush=True)
    return status or int(last["completed"] < trials)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(SweepConfig, args=argv[:at], description=__doc__)
    with sentences():
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        raise SystemExit(search(config, argv[at + 1 :]))


if __name__ == "__main__":
    main()
