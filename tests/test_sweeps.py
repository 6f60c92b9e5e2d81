"""What `wandb agent` would run for each file of sweeps/ is what our own search runs; it trains, and W&B gets it all."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.train.test_metrics import offline_history
from train.engine.metrics import read_rows
from train.molecular_epochs import PARTS
from train.sweep_space import Sweep
from train.sweep_worker import of_its_runs, score_of

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
# Of each family: flags that turn every part of its loss on, and those that it must tell apart.
FAMILIES = {
    "language": ("--hten_scales=1,2,4 --energy_reg_weight=0.05", {"loss", "ce_loss", "energy_loss"}),
    "maze": ("--route_ent_weight=5e-4", {"loss", "ce_loss", "route_entropy"}),
    "arc": ("--no-tensorboard", {"loss", "ce_loss"}),
    "molecular": ("", {*PARTS}),
}
# A run's minutes count from the start of its process, which here is that of all tests.
TINY = "--tiny --max_steps=2 --max_minutes=600 --log_every=1 --eval_every=1 --cpu --wandb=offline --db=off"


@pytest.fixture(autouse=True)
def _no_seconds_spent_on_pictures(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    for drawn in ("pictures.draw_spectrum", "pictures.draw_energy", "engine.summary.plot_curves"):
        monkeypatch.setattr(f"train.{drawn}", lambda *args: None)


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
def test_the_command_of_an_agent_trains_and_its_wandb_run_holds_all_rows_and_parts(file, tmp_path, run_command):
    sweep, run_dir, (more, parts) = Sweep.read(file), tmp_path / "run", FAMILIES[file.stem]
    [flags] = sweep.points("random", 1, seed=0)
    words = sweep.command(flags, tmp_path / "flags.json")
    assert words == as_an_agent_would(sweep, flags)
    assert words[:3] == ["/usr/bin/env", "accelerate", "launch"]
    # Absolute: the service behind wandb outlives a run, and stays in the folder where this process began its first one.
    status, said = run_command(f"{shlex.join(words[1:])} {TINY} {more} --run_dir={run_dir}")
    assert status == 0, said
    assert (run_dir / "results.json").exists()
    assert -100 < score_of(run_dir, sweep) < 100  # the metric is one that the program has
    [file] = of_its_runs(run_dir, "metrics.jsonl")
    rows = read_rows(file)
    assert {(0, "val"), (1, "train"), (2, "train"), (2, "val")} <= {(row["step"], row["split"]) for row in rows}
    flat = [
        {"step": r["step"], **{f"{r['split']}/{k}": v for k, v in r.items() if k not in ("step", "split")}}
        for r in rows
    ]
    assert offline_history(file.parent) == flat
    assert all({*parts, "lr", "items_per_second", "grad_norm"} <= r.keys() for r in rows if r["split"] == "train")


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
