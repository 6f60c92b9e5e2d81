"""A W&B run over its resumes and processes. (That it holds every row and part of each family is in test_sweeps.py.)"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.forked import launch
from tests.train.test_metrics import as_on_wandb, offline_history, wandb_rows
from train.engine import TrainingConfig
from train.engine.experiments import ExperimentDB
from train.engine.metrics import WandbRun, read_rows
from train.engine.run_folder import read_json, write_json


@pytest.fixture(autouse=True)
def _no_say_of_the_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_resumed_run_keeps_its_id_and_no_step_is_dropped(make_trainer, tmp_path):
    class Interrupt:
        def __call__(self, trainer, row):
            if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"max_steps": 4, "log_every": 1, "eval_every": 2, "wandb": "offline"}
    cut = make_trainer(hooks=[Interrupt()], **settings)
    with pytest.raises(SystemExit):
        cut.train()
    whole = make_trainer(**settings)
    whole.train()
    assert read_json(whole.run_dir / "run.json")["state"] == "finished"
    parts = sorted((whole.run_dir / "wandb").glob("offline-run-*"), key=lambda part: part.stat().st_mtime)
    # offline-run-TIME-ID, and -1 after it where both began in the same second
    assert len(parts) == 2 and len({part.name.split("-")[3] for part in parts}) == 1
    (tmp_path / "newest" / "wandb").mkdir(parents=True)
    parts[1].rename(tmp_path / "newest" / "wandb" / parts[1].name)
    rows = [as_on_wandb(row) for row in read_rows(whole.run_dir / "metrics.jsonl")]
    assert offline_history(tmp_path / "newest") == rows
    assert offline_history(whole.run_dir) == rows[:5]  # to step 3: the signal came after 2


@pytest.mark.parametrize("step", [0, 3, 4])
def test_rows_that_died_with_wandbs_service_are_in_a_part_of_their_own_at_the_end(make_trainer, tmp_path, step):
    """A signal to every process of a job ends the service; training goes on, here to its end."""

    class End:
        def __call__(self, trainer, row):
            if row["step"] == step:
                for process in psutil.Process().children(recursive=True):
                    process.kill()
                psutil.wait_procs(psutil.Process().children(recursive=True))

    run = make_trainer(hooks=[End()], max_steps=4, log_every=1, eval_every=3, wandb="offline")
    run.train()
    logs = sorted((run.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 2 and logs[0].name == logs[1].name
    assert wandb_rows(logs[1]) == [as_on_wandb(row) for row in read_rows(run.run_dir / "metrics.jsonl")]
    assert run.run_dir.joinpath("results.json").exists()


def test_a_run_is_named_by_its_folder_and_the_one_above(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.chdir(tmp_path)
    WandbRun(TrainingConfig(wandb="offline"), Path("run"), None, print)
    assert server.name == f"{tmp_path.name}/run"


class Server:
    """W&B as its client sees it: what is logged arrives there, or is lost with a process that is killed."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.Settings = dict

    def init(self, *, mode: str | None, name: str, **about: object) -> SimpleNamespace:
        self.name = name
        self.first = 0 if mode == "offline" else len(self.rows)
        deeds = {"log": self.rows.append, "define_metric": lambda *a, **k: None, "finish": lambda: None}
        return SimpleNamespace(id="x", starting_step=self.first, **deeds)


@pytest.mark.parametrize(("mode", "lost"), [("online", 0), ("online", 3), ("online", 7), ("offline", 3)])
def test_rows_that_were_not_on_the_server_when_a_run_was_killed_are_sent_again(
    make_trainer, tmp_path, monkeypatch, mode, lost
):
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)

    def killed(trainer, row):
        if row["step"] == 5:
            raise RuntimeError("killed")

    settings = {"max_steps": 8, "log_every": 1, "eval_every": 5, "save_every": 2, "wandb": mode, "tensorboard": True}
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(hooks=[killed], **settings).train()
    assert [row["step"] for row in server.rows] == [0, 1, 2, 3, 4, 5, 5]
    del server.rows[len(server.rows) - lost :]
    before = len(server.rows)
    run = make_trainer(**settings)
    run.train()
    rows = [as_on_wandb(row) for row in read_rows(run.run_dir / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 8]
    # of steps 0 to 4, which the checkpoint has; offline a part stands alone
    sent_again = 5 if mode == "offline" else max(0, lost - 2)
    assert server.rows[before:] == rows[5 - sent_again :]
    found = EventAccumulator(str(run.run_dir / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 9))


def test_of_two_processes_only_the_first_writes_to_the_database_and_to_wandb(make_trainer, tmp_path):
    run = tmp_path / "runs" / "toy" / "run"

    def work() -> None:
        written, tracker = set(), MagicMock()
        tracker.init.return_value.id, tracker.init.return_value.starting_step = "x", 0
        sys.modules["wandb"] = tracker

        def see(event: str, about: tuple) -> None:
            if event == "sqlite3.connect" or (event == "open" and about[2] & (os.O_WRONLY | os.O_RDWR)):
                written.add(os.path.abspath(os.fspath(about[0])) if isinstance(about[0], (str, Path)) else "")

        sys.addaudithook(see)
        make_trainer("runs/toy/run", wandb="offline", db="auto", max_steps=4, log_every=1).train()
        ours = {Path(file).relative_to(tmp_path).parts[-1] for file in written if file.startswith(str(tmp_path))}
        write_json(tmp_path / f"rank-{os.environ['RANK']}.json", [sorted(ours), len(tracker.mock_calls)])

    assert launch(work, ACCELERATE_USE_CPU="1") == [0, 0]
    (first, calls), (second, calls_of_the_second) = (read_json(tmp_path / f"rank-{rank}.json") for rank in range(2))
    assert {"experiments.db", "metrics.jsonl", "run.json"} <= set(first) and calls > 6
    assert (second, calls_of_the_second) == ([], 0)
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        [found] = db.runs()
        assert found["state"] == "finished" and db.rows(found["run_id"]) == read_rows(run / "metrics.jsonl")
