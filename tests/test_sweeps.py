"""What `wandb agent` would run for each file of sweeps/ is what our own search runs, and it trains."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from train.sweep_space import Sweep
from train.sweep_worker import score_of

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_seconds_spent_on_pictures(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


def as_an_agent_would(sweep: Sweep, flags: dict) -> list[str]:
    """By W&B's own functions."""
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in flags.items()}})
    macros |= {"env": ["/usr/bin/env"], "program": [sweep.spec["program"]]}
    words = []
    for word in create_sweep_command(list(sweep.spec["command"])):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    return words


def ends(sweep: Sweep, last: bool) -> dict:
    return {
        p.name: p.choices[-1 if last else 0] if p.choices else p.rounded(p.high if last else p.low)
        for p in sweep.parameters
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_of_an_agent_trains(file, tmp_path, run_command):
    sweep, run_dir = Sweep.read(file), tmp_path / "run"
    [flags] = sweep.points("random", 1, seed=0)
    words = sweep.command(flags, tmp_path / "flags.json")
    assert words == as_an_agent_would(sweep, flags)
    assert words[:3] == ["/usr/bin/env", "accelerate", "launch"]
    tiny = ["--tiny", "--max_steps=2", "--wandb=off", "--db=off", "--cpu", f"--run_dir={run_dir}"]
    status, said = run_command(shlex.join([*words[1:], *tiny]))
    assert status == 0, said
    assert (run_dir / "results.json").exists()
    assert -100 < score_of(run_dir, sweep) < 100  # the metric is one that the program has


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_ends_of_every_range_are_values_that_the_program_takes(file, run_command):
    sweep = Sweep.read(file)
    for last in (False, True):
        words = sweep.command(ends(sweep, last), Path("flags.json"))
        status, said = run_command(shlex.join([*words[1:], "--print_config"]))
        assert status == 0, said


def test_trial_69_lies_in_the_space_that_it_was_found_in():
    from train.champion import ChampionRun

    trial69, rng = ChampionRun(), random.Random(0)
    for p in Sweep.read(ROOT / "sweeps" / "arc.yaml").searched:
        value = getattr(trial69, p.name)
        assert value in p.choices if p.choices else p.low <= value <= p.high, p.name
        assert p.draw(rng) is not None
