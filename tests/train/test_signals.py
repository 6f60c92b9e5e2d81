"""Signals where no run is there to save itself: while data is made, tokenizers are trained, models are built."""

from __future__ import annotations

import signal

import pytest

from tasks.cache import renamed
from train.engine import Trainer
from train.engine.script import sentences
from train.engine.signals import NUMBERS

SCRIPTS = {
    "train/nano.py": signal.SIGTERM,
    "train/maze.py": signal.SIGINT,
    "train/champion.py": signal.SIGUSR1,
    "train/molecular.py": signal.SIGTERM,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_family_ends_with_a_sentence_and_75_before_its_run_begins(run_command, monkeypatch, tmp_path, script):
    before = [signal.getsignal(number) for number in NUMBERS]
    monkeypatch.setattr(Trainer, "__init__", lambda *args, **kwargs: signal.raise_signal(SCRIPTS[script]))
    status, said = run_command(f"accelerate launch {script} --tiny --cpu --wandb off --run_dir run")
    assert status == 75 and f"interrupted by {SCRIPTS[script].name} outside of training" in said
    assert not list((tmp_path / "run").rglob("config.json")) and "Traceback" not in said
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_what_is_half_written_is_cleared_away_though_the_signal_comes_twice(tmp_path):
    cleared = []

    def write(text: str, *signals: int) -> None:
        with renamed(tmp_path / "data") as temporary:
            try:
                temporary.write_text(text)
                for number in signals:
                    signal.raise_signal(number)
            finally:  # the first is on its way, and another comes
                for number in signals:
                    signal.raise_signal(number)
                cleared.append(text)

    with sentences():
        write("old")
    with pytest.raises(SystemExit) as stopped, sentences():
        write("new", signal.SIGTERM, signal.SIGINT)
    assert stopped.value.code == 75 and cleared == ["old", "new"]
    assert [file.name for file in tmp_path.iterdir()] == ["data"] and (tmp_path / "data").read_text() == "old"
