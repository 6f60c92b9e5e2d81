"""train/runs.py: what it prints, what it draws, and what it says when there is no such run."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from train.engine.experiments import ExperimentDB
from train.engine.metrics import read_rows
from train.engine.run_folder import write_json
from train.runs import main, without_folder


def rows(*losses: float) -> list[dict]:
    train = [{"step": step, "split": "train", "loss": loss + 1, "lr": 0.1} for step, loss in enumerate(losses, 1)]
    val = [{"step": step, "split": "val", "loss": loss, "share": loss / 10} for step, loss in enumerate(losses, 1)]
    return [row for pair in zip(train, val, strict=True) for row in pair]


@pytest.fixture
def three(make_run_folder, tmp_path, monkeypatch) -> Path:
    """Runs nano/a, nano/b and maze/x/poh-seed0 below the current folder's runs/, in the database but for b's rows."""
    monkeypatch.chdir(tmp_path)
    versions = {"versions": {"torch": "2.0"}}
    made = [
        make_run_folder("runs/nano/a", rows(3.0, 1.0, 2.0), {"lr": 0.1}, **versions),
        make_run_folder("runs/nano/b", rows(3.0, 2.5), {"lr": 0.2}, git_commit="def", state="running", **versions),
        make_run_folder("runs/maze/x/poh-seed0", rows(0.5), {"R": 4}, mode="max", monitor="share"),
    ]
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        sweep = db.log_sweep("sweep-1", {})
        for number, folder in enumerate(made):
            db.import_run(folder, rows=number != 1, sweep_id=sweep if number else None, trial=number)
    return tmp_path


def said(capsys, *words: str) -> list[str]:
    main(words)
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_list(three, capsys):
    head, *lines = said(capsys, "list")
    assert head.split() == ["run", "name", "state", "step", "best", "sweep", "started"]
    assert [line.split()[1:5] for line in lines] == [
        ["maze/x/poh-seed0", "finished", "1", "share=0.05"],
        ["nano/b", "dead", "–", "–"],
        ["nano/a", "finished", "3", "loss=1"],
    ]
    assert len(said(capsys, "list", "--script", "nano")) == 3 and len(said(capsys, "list", "--limit", "1")) == 2
    assert [line.split()[1] for line in said(capsys, "list", "--state", "dead")[1:]] == ["nano/b"]
    assert len(said(capsys, "list", "--sweep", "sweep-1")) == 3 == len(said(capsys, "list", "--sweep", "1"))
    assert said(capsys, "list", "--script", "large") == ["no such runs"]


def test_show_has_settings_facts_and_command(three, capsys):
    text = "\n".join(said(capsys, "show", "runs/nano/a"))
    for part in ("name: nano/a", "state: finished", "lr: 0.1", "git_commit: abc", "accelerate launch train/nano.py"):
        assert part in text


def test_compare_and_diff(three, capsys):
    main(["import", "runs/nano/b"])
    capsys.readouterr()
    head, a, b = said(capsys, "compare", "a", "b")
    assert head.split() == ["run", "state", "step", "lr", "val/loss", "val/share"]
    assert a.split()[3:] == ["0.1", "2", "0.2"] and b.split()[3:] == ["0.2", "2.5", "0.25"]
    lines = [line.split() for line in said(capsys, "diff", "a", "b")]
    assert lines == [["nano/a", "nano/b"], ["lr", "0.1", "0.2"], ["git_commit", "abc", "def"]]
    assert ["versions.torch", "2.0", "–"] in [line.split() for line in said(capsys, "diff", "a", "poh-seed0")]
    assert said(capsys, "diff", "a", "a") == ["same settings, commit, versions and machine"]


def test_best_knows_which_way_is_better(three, capsys):
    (line,) = said(capsys, "best", "--metric", "val_loss", "--script", "nano")
    assert line.startswith("nano/a  val_loss 1 at step 2")
    assert said(capsys, "best", "--metric", "share")[0].startswith("nano/a  share 0.3 at step 1")  # maze says max
    assert said(capsys, "best", "--metric", "share", "--mode", "min")[0].startswith("maze/x/poh-seed0")
    assert said(capsys, "best", "--metric", "train/loss")[0].startswith("maze/x/poh-seed0  train/loss 1.5")
    assert "the least or the most" in refused(capsys, "best", "--metric", "lr")
    assert "no such run has a finite val/los (did you mean loss?)" in refused(
        capsys, "best", "--metric", "los", "--mode", "min"
    )


def test_plot_draws_every_run_and_metric(three, capsys, monkeypatch):
    drawn, draw = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **named: drawn.append(xy[:2]) or draw(self, *xy, **named))
    said(capsys, "plot", "a", "poh-seed0", "--metric", "loss", "train/loss", "--output", "plots/new.png")
    assert (three / "plots" / "new.png").stat().st_size > 1000
    assert drawn == [((1, 2, 3), (3, 1, 2)), ((1,), (0.5,)), ((1, 2, 3), (4, 2, 3)), ((1,), (1.5,))]
    assert "run nano/a has no val/shar (did you mean share?)" in refused(capsys, "plot", "a", "--metric", "shar")


def test_rerun_is_the_command_in_a_new_folder(three, capsys, monkeypatch):
    command = "accelerate launch train/nano.py --run_dir=runs/nano/a --output_dir x --lr 0.1 --run-dir 'y z' --tiny"
    assert shlex.join(without_folder(command)) == "accelerate launch train/nano.py --lr 0.1 --tiny"
    assert said(capsys, "rerun", "a") == ["accelerate launch train/nano.py"]
    called = []
    monkeypatch.setattr(subprocess, "run", lambda words: called.append(words) or subprocess.CompletedProcess(words, 3))
    monkeypatch.setattr("train.runs.provenance", lambda: {"git_commit": "def"})
    with pytest.raises(SystemExit) as stopped:
        main(["rerun", "a", "--go", "--run_dir", "runs/new"])
    assert stopped.value.code == 3 and called == [["accelerate", "launch", "train/nano.py", "--run_dir", "runs/new"]]
    assert "made at commit abc, and this is def" in capsys.readouterr().err


def test_import_fills_the_gaps_of_all_runs_below(three, capsys):
    with ExperimentDB("runs/experiments.db") as db:
        assert db.rows("b") == []
        assert [line.split()[-1] for line in said(capsys, "import", "runs")] == ["maze/x/poh-seed0", "nano/a", "nano/b"]
        assert db.rows("b") == read_rows(Path("runs/nano/b/metrics.jsonl")) and len(db.runs()) == 3
    said(capsys, "import", "runs/nano", "--db", "other.db")
    assert len(said(capsys, "list", "--db", "other.db")) == 3


def test_what_cannot_be_is_a_sentence(three, capsys, tmp_path):
    assert "knows no run nano/c (did you mean nano/" in refused(capsys, "show", "nano/c")
    assert "holds no run: there is no run.json" in refused(capsys, "import", "runs/large")
    assert "there is no absent.db; name it with --db" in refused(capsys, "list", "--db", "absent.db")
    Path("bad.db").write_text("no database" * 100)
    assert "file is not a database" in refused(capsys, "list", "--db", "bad.db")
    write_json(tmp_path / "runs" / "nano" / "b" / "config.json", None)
    (tmp_path / "runs" / "nano" / "b" / "config.json").write_text("{")
    assert "the run in runs/nano/b is damaged" in refused(capsys, "import", "runs/nano/b")


def test_a_run_elsewhere_brings_its_own_database(make_run_folder, run_command):
    folder = make_run_folder("elsewhere/a", rows(1.0))
    assert run_command(f"python train/runs.py import {folder}")[0] == 0
    status, text = run_command(f"python train/runs.py show {folder}")
    assert status == 0 and "name: a\n" in text
