"""What is wrong with an experiment database is said once and stops no run."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from train.engine import ConfigError
from train.engine.experiments import SCHEMA_VERSION, ExperimentDB
from train.engine.metrics import read_rows


@contextlib.contextmanager
def held(path: Path):
    """Another writer that doesn't end."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield other
    other.close()


def test_a_locked_database_stops_nothing_and_is_filled_afterwards(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.engine.experiments.WAIT_SECONDS", 0.02)
    path = tmp_path / "experiments.db"
    ExperimentDB(path).close()
    with held(path):
        trainer = make_trainer(db="auto", max_steps=4)
        assert trainer.train().steps == 4
    assert capsys.readouterr().out.count("database is locked") == 1
    with ExperimentDB(path) as db:
        assert db.runs() == []
        db.import_run(trainer.run_dir)
        db.import_run(trainer.run_dir)
        assert (
            db.rows("run") == read_rows(trainer.run_dir / "metrics.jsonl") and db.get_run("run")["state"] == "finished"
        )


def test_one_that_was_locked_for_a_while_is_whole_at_the_end(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.engine.experiments.WAIT_SECONDS", 0.02)

    def hold(trainer, row):
        if row["step"] == 2:
            stack.enter_context(held(tmp_path / "experiments.db"))
        if row["step"] == 8:
            stack.close()

    with contextlib.ExitStack() as stack:
        trainer = make_trainer(db="auto", hooks=[hold], max_steps=12, eval_every=2)
        trainer.train()
    assert capsys.readouterr().out.count("database is locked") == 1
    with ExperimentDB(tmp_path / "experiments.db") as db:
        assert db.rows("run") == read_rows(trainer.run_dir / "metrics.jsonl")


def test_a_full_disk_is_said_once(make_trainer, tmp_path, capsys):
    def fill(trainer, row):
        if row["step"] == 0:
            connection = trainer.book._record._db.connection
            connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")

    trainer = make_trainer(db="auto", hooks=[fill], max_steps=40, eval_every=20, log_every=1)
    assert trainer.train().steps == 40
    assert capsys.readouterr().out.count("database or disk is full") == 1
    with ExperimentDB(tmp_path / "experiments.db") as db:
        assert db.rows("run") == read_rows(trainer.run_dir / "metrics.jsonl")


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)


def newer(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE runs (pace REAL)")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (garbage, "file is not a database"),
        (newer, f"has schema {SCHEMA_VERSION + 1}, of a newer Tenfold"),
        (foreign, "is the database of something else"),
        (Path.mkdir, "unable to open database file"),
    ],
)
def test_a_file_that_is_no_database_of_ours_is_a_sentence_and_stays_as_it_is(
    make_trainer, tmp_path, capsys, spoil, sentence
):
    path = tmp_path / "experiments.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=sentence):
        ExperimentDB(path)
    assert make_trainer(db="auto", max_steps=1).train().steps == 1
    assert capsys.readouterr().out.count(sentence) == 1
    assert (path.read_bytes() if path.is_file() else None) == before
