"""The experiment database holds what run folders hold, whatever happens to either, and never stops a run."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.toy import ToyTask
from train.engine import ConfigError
from train.engine.experiments import ExperimentDB
from train.engine.metrics import read_rows
from train.engine.record import database_of


@pytest.fixture
def db(tmp_path):
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        yield db


def begin(db: ExperimentDB, name: str = "nano/a", **about) -> int:
    about = {"script": "nano", "config": {}, "command": "accelerate launch train/nano.py", **about}
    return db.log_run(db.path.parent / name, **about)


def val(step: int, **scores: float) -> dict:
    return {"step": step, "split": "val", **scores}


def in_file(run_dir: Path) -> list[dict]:
    return read_rows(run_dir / "metrics.jsonl")


# ---- what a run leaves there -----------------------------------------------------------------------------------------


def test_a_run_is_there_with_its_settings_rows_results_and_files(make_trainer, tmp_path):
    trainer = make_trainer("runs/toy/first", db="auto", max_steps=4)
    results = trainer.train()
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        (run,) = db.runs()
        assert run["name"] == "toy/first" and run["state"] == "finished" and run["step"] == 4
        assert run["config"] == trainer.config.to_dict()
        assert run["results"]["final"] == results.final and run["score"] == results.best["accuracy"]
        assert run["facts"]["git_commit"] and (run["monitor"], run["mode"]) == ("accuracy", "max")
        assert db.rows(run["run_id"]) == in_file(trainer.run_dir)
        paths = [artifact["path"] for artifact in db.artifacts("first")]
        assert {"checkpoints/last", "checkpoints/best-1"} <= set(paths)
        assert all((run["run_dir"] / path).exists() for path in paths)


def test_db_off_writes_none(make_trainer, tmp_path):
    make_trainer(db="off", max_steps=1).train()
    assert not list(tmp_path.rglob("*.db"))


@pytest.mark.parametrize(
    ("run_dir", "place"),
    [
        ("/a/runs/nano/x", "/a/runs/experiments.db"),
        ("/a/runs/maze/x/poh-seed0", "/a/runs/experiments.db"),
        ("/a/runs/b/runs/x", "/a/runs/experiments.db"),
        ("/a/b/x", "/a/b/experiments.db"),
        ("/a/b/runs", "/a/b/experiments.db"),
    ],
)
def test_where_it_is(run_dir, place):
    assert database_of(Path(run_dir)) == Path(place)
    assert database_of(Path(run_dir), "off") is None and database_of(Path(run_dir), "x.db") == Path("x.db")


class Crash(ToyTask):
    """Dies in the step of that number, as if killed: nothing is saved."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def num_items(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().num_items(batch)


def test_a_resumed_run_has_no_row_twice_and_none_that_did_not_happen(make_trainer, tmp_path):
    settings = {"db": "auto", "log_every": 1, "eval_every": 100, "save_every": 5}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(task=Crash(9), **settings).train()
    with ExperimentDB(tmp_path / "experiments.db") as db:
        assert db.get_run("run")["state"] == "failed"
        before = db.rows("run")
        assert before == in_file(tmp_path / "run") and before[-1]["step"] == 9  # the checkpoint is at step 5
        with db._writing():  # and a row that the file hasn't, at a step before the checkpoint
            db.connection.execute("INSERT INTO metrics VALUES (1, 'val', 'stray', 3, 0)")

        def look(trainer, row):
            if row["step"] == 12:
                seen.append(db.get_run("run"))

        seen = []
        resumed = make_trainer(hooks=[look], **settings)
        resumed.train()
        assert seen[0]["state"] == "running" and seen[0]["step"] >= 5
        assert [run["state"] for run in db.runs()] == ["finished"]
        assert db.rows("run") == in_file(resumed.run_dir)


def test_a_rewind_takes_rows_back(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.record.SECONDS_BETWEEN_WRITES", 0.0)
    trainer = make_trainer(db="auto", log_every=2, eval_every=100, save_every=3, bad_step="rewind")
    verdict, spoilt = trainer.guard.verdict, []

    def once(step, *seen):
        good = verdict(step, *seen)
        if step == 5 and not spoilt:
            with ExperimentDB(tmp_path / "experiments.db") as db:
                spoilt.append(db.rows("run")[-1]["step"])
            return torch.ones_like(good)
        return good

    trainer.guard.verdict = once
    cut, reached = trainer.book.cut_back, []

    def cut_back(progress):
        cut(progress)
        with ExperimentDB(tmp_path / "experiments.db") as db:
            reached.append(db.rows("run")[-1]["step"])

    trainer.book.cut_back = cut_back
    trainer.train()
    assert (spoilt, reached) == ([4], [2])
    with ExperimentDB(tmp_path / "experiments.db") as db:
        assert db.rows("run") == in_file(trainer.run_dir)


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_ten_thousand_rows_are_one_transaction(db):
    statements: list[str] = []
    run = begin(db)
    db.connection.set_trace_callback(statements.append)
    db.log_metrics(run, ({"step": step, "split": "train", "loss": 1 / step} for step in range(1, 10_001)))
    assert [s for s in statements if s.startswith(("BEGIN", "COMMIT"))] == ["BEGIN IMMEDIATE", "COMMIT"]
    assert len(db.rows(run)) == 10_000


COUNT = """
import sqlite3, sys
print(sqlite3.connect(sys.argv[1], timeout=0).execute("SELECT COUNT(*) FROM metrics").fetchone()[0])
"""


def test_another_process_reads_while_one_writes(db):
    def count() -> int:
        return int(subprocess.check_output([sys.executable, "-c", COUNT, str(db.path)]))

    run = begin(db)
    db.log_metrics(run, [val(1, loss=1.0)])
    with db._writing():
        db.log_metrics(run, [val(2, loss=1.0)])
        assert count() == 1
    assert count() == 2


def in_child(work) -> int:
    """The process id of a fork that does `work` and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return child


def test_a_writer_that_is_killed_leaves_whole_transactions(tmp_path):
    path, batch = tmp_path / "experiments.db", 50

    def write():
        with ExperimentDB(path) as db:
            run = begin(db)
            for first in range(0, 10**9, batch):
                db.log_metrics(run, [val(step, loss=1.0) for step in range(first, first + batch)])

    ExperimentDB(path).close()
    child = in_child(write)
    reader = sqlite3.connect(path)
    while reader.execute("SELECT COUNT(*) FROM metrics").fetchone()[0] < 5 * batch:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with ExperimentDB(path) as db:
        assert db.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        rows = db.rows(1)
        assert len(rows) >= 5 * batch and len(rows) % batch == 0 and db.get_run(1)["state"] == "dead"
        db.log_metrics(1, [val(10**9, loss=1.0)])


def test_processes_that_make_the_database_at_once_find_one(tmp_path):
    path = tmp_path / "experiments.db"

    def write(name):
        with ExperimentDB(path) as db:
            for step in range(20):
                db.log_metrics(begin(db, name), [val(step, loss=1.0)])

    children = [in_child(lambda i=i: write(str(i))) for i in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with ExperimentDB(path) as db:
        assert [len(db.rows(run["run_id"])) for run in db.runs()] == [20] * 4


def test_a_run_is_dead_when_it_says_running_and_nobody_holds_its_folder(db, make_run_folder):
    folder = make_run_folder("runs/nano/a", state="running")
    db.import_run(folder)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert db.get_run("a")["state"] == "running" and len(db.runs(state="running")) == 1
    assert db.get_run("a")["state"] == "dead" and len(db.runs(state="dead")) == 1 and not db.runs(state="running")


# ---- what may not get in ---------------------------------------------------------------------------------------------


def test_a_damaged_folder_changes_nothing(db, make_run_folder, tmp_path):
    folder = make_run_folder("runs/nano/a", [val(1, loss=2.0)])
    db.import_run(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "val", "loss": 3.0}\n{"step": 2, "spl\n')
    with pytest.raises(ConfigError, match=r"the run in .*a is damaged: .*metrics.jsonl, line 2"):
        db.import_run(folder)
    assert db.rows("a") == [val(1, loss=2.0)]
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "val", "loss": 3.0}\n{"step": 2, "spl')  # killed
    db.import_run(folder)
    assert db.rows("a") == [val(1, loss=3.0)]
    (folder / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged: 'command'"):
        db.import_run(folder)
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config.json"):
        db.import_run(tmp_path)


def test_rows_go_with_their_run_and_none_comes_without(db):
    run = begin(db, sweep_id=db.log_sweep("s", {"method": "grid"}), trial=1)
    db.log_metrics(run, [val(1, loss=1.0)])
    db.log_artifact(run, "plot", "plots/loss.png")
    with pytest.raises(ConfigError, match="FOREIGN KEY"):
        db.log_metrics(run + 1, [val(1, loss=1.0)])
    db.connection.execute("DELETE FROM sweeps")
    assert db.get_run(run)["sweep"] is None
    db.connection.execute("DELETE FROM runs")
    for table in ("metrics", "artifacts"):
        assert db.connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] == 0


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_run_is_the_one_a_loop_finds(db, mode):
    chance = random.Random(0)
    odd = [math.nan, math.inf, -math.inf]
    sweep, said = db.log_sweep("s", {}), {}
    for number in range(12):
        about = {"script": "nano" if number % 3 else "maze", "sweep_id": sweep if number % 2 else None}
        run = begin(db, f"x/{number}", **about, trial=number)
        values = [-99.0 if mode == "min" else 99.0, *(chance.choice([*odd, chance.randrange(20)]) for _ in range(9))]
        db.log_metrics(run, [val(step, loss=value, other=-1000) for step, value in enumerate(values)])
        db.log_metrics(run, [{"step": 3, "split": "train", "loss": -1000.0 if mode == "min" else 1000.0}])
        said[run] = (about, values)
    sign = 1 if mode == "min" else -1
    for wanted in ({}, {"script": "maze"}, {"sweep": "s"}, {"sweep": sweep, "script": "nano"}):
        scores = [
            (sign * value, run, step)
            for run, (about, values) in said.items()
            for step, value in enumerate(values)
            if step > 0 and math.isfinite(value) and wanted.get("script") in (None, about["script"])
            if "sweep" not in wanted or about["sweep_id"]
        ]
        value, run, step = min(scores)
        for metric in ("loss", "val_loss", "val/loss"):
            best = db.best_run(metric, mode, **wanted)
            assert (sign * best["score"], best["run_id"], best["score_step"]) == (value, run, step)
    assert db.best_run("absent", mode) is None
    with pytest.raises(ConfigError, match="must be min or max, not least"):
        db.best_run("loss", "least")


def test_a_run_without_a_finite_score_is_never_the_best(db):
    db.log_metrics(begin(db), [val(1, loss=math.nan), val(2, loss=math.inf)])
    assert db.best_run("loss", "min") is None and db.best_run("loss", "max") is None
    assert [math.isnan(r["loss"]) or r["loss"] == math.inf for r in db.rows(1)] == [True, True]


def test_a_metric_says_its_split(db):
    names = ("loss", "val_loss", "val/loss", "train_loss", "train/loss", "val/val_loss", "training")
    assert [db.split_and_name(n) for n in names] == [
        ("val", "loss"), ("val", "loss"), ("val", "loss"), ("train", "loss"), ("train", "loss"), ("val", "val_loss"),
        ("val", "training"),
    ]  # fmt: skip
    db.log_metrics(begin(db), [val(1, val_loss=1.0)])
    assert db.split_and_name("val_loss") == ("val", "val_loss") and db.split_and_name("train_loss") == ("train", "loss")


def test_a_sweep_and_its_trials_keep_their_numbers(db, make_run_folder):
    sweep = db.log_sweep("s", {"method": "grid"})
    assert db.log_sweep("s", {"method": "random"}) == sweep != db.log_sweep("t", {})
    folder = make_run_folder("runs/nano/a", [val(1, loss=2.0)])
    run = db.import_run(folder, sweep_id=sweep, trial=7)
    assert db.import_run(folder) == run
    (found,) = db.runs(sweep="s")
    assert (found["run_id"], found["sweep_id"], found["trial"]) == (run, sweep, 7) and db.runs(sweep="t") == []


def test_tables_of_runs_are_data_frames(db, make_run_folder, monkeypatch):
    rows = [val(0, loss=3.0), {"step": 1, "split": "train", "loss": 2.5, "lr": 0.1}, val(1, loss=2.0, elapsed=1.0)]
    a = db.import_run(make_run_folder("runs/nano/a", rows, {"lr": 0.1, "max_steps": 1}))
    db.import_run(make_run_folder("runs/nano/b", rows[:1], {"lr": 0.2, "max_steps": 1}))
    frame = db.metrics(a)
    assert frame["step"].tolist() == [0, 1, 1] and frame["split"].tolist() == ["val", "train", "val"]
    assert frame["loss"].tolist() == [3.0, 2.5, 2.0]
    table = db.compare_runs([a, "b"])
    assert table.columns.tolist() == ["run", "state", "step", "lr", "val/loss"]
    assert table["lr"].tolist() == [0.1, 0.2] and table["val/loss"].tolist() == [2.0, 3.0]
    assert db.config_diff("a", "b") == {"lr": (0.1, 0.2)}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        db.metrics(a)


def test_a_run_is_found_by_number_folder_and_the_end_of_its_name(db):
    a, b = begin(db, "nano/a"), begin(db, "maze/x/poh-seed0")
    begin(db, "maze/y/poh-seed0")
    for asked in (a, str(a), "nano/a", "a", db.path.parent / "nano" / "a"):
        assert db.get_run(asked)["run_id"] == a
    assert db.get_run("x/poh-seed0")["run_id"] == b
    with pytest.raises(ConfigError, match="may be maze/x/poh-seed0 or maze/y/poh-seed0; say which"):
        db.get_run("poh-seed0")
    with pytest.raises(ConfigError, match=r"knows no run nano/b \(did you mean nano/a\?\)"):
        db.get_run("nano/b")
    with pytest.raises(ConfigError, match="knows no run 99"):
        db.get_run(99)


def test_runs_and_their_database_can_be_moved_together(db, make_run_folder, tmp_path):
    db.import_run(make_run_folder("runs/nano/a", [val(1, loss=2.0)]))
    db.close()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    with ExperimentDB(tmp_path / "elsewhere" / "experiments.db") as moved:
        assert moved.get_run("nano/a")["run_dir"] == tmp_path / "elsewhere" / "nano" / "a"
