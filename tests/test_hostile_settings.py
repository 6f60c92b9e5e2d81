"""Settings, sweeps and run folders that wish us ill, and a Weights & Biases that goes away in mid-run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import strategies as st

from tests.hostile import accepts_or_refuses, damaged, damaged_bytes, damaged_json, hostile
from tests.toy import ToyModel, ToyTask
from train import runs
from train.champion import ChampionRun
from train.engine import ConfigError, Trainer, TrainingConfig, parse
from train.engine.experiments import ExperimentDB
from train.engine.metrics import read_rows
from train.engine.order import DataOrder
from train.engine.run_folder import read_json
from train.language import LanguageConfig
from train.report import report
from train.sweep_space import Sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# ---- settings --------------------------------------------------------------------------------------------------------

WORDS = (
    "", "0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e400", "9" * 25, "9" * 5000, "²", "é", "\udcff", "a,b", "None",
    "True", "--", "-", "--lr", "x y", "[]", "{}", "/", "1e3", "0x10", "1_0", "\0",
)  # fmt: skip
SETTINGS = TrainingConfig().to_dict()


def settle(config_class: type, *argv: str) -> None:
    """Parse, and hold what was accepted against what a run folder and a database can hold. tyro exits with 2."""
    try:
        config = parse(config_class, argv, fill=getattr(config_class, "filled_in", lambda config: config))
    except SystemExit as stopped:
        assert stopped.code in (0, 2)
        return
    assert yaml.safe_load(json.dumps(config.to_dict(), allow_nan=False).encode()) is not None
    assert all(abs(v) <= 2**53 for v in config.to_dict().values() if isinstance(v, (int, float)))


@hostile(12)
def test_the_command_line(data, capfd):  # its stderr, like a real one, writes what UTF-8 cannot
    flags: list[str] = []
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*SETTINGS, "zzz", "", "learning_rate", "²", "no-compile", "print_config"]))
        values = data.draw(st.lists(st.sampled_from(WORDS), max_size=2))
        flags += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    accepts_or_refuses(settle, TrainingConfig, *flags)


@hostile(12)
def test_settings_files(data, folder, capfd):
    file, sound = folder / "settings.yaml", yaml.safe_dump(SETTINGS).encode()
    as_bytes = data.draw(st.booleans())
    file.write_bytes(damaged_bytes(data, sound) if as_bytes else json.dumps(damaged(data, SETTINGS)).encode())
    accepts_or_refuses(settle, TrainingConfig, "--settings", str(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2001-99-99: 1", "neither YAML nor JSON"),
        ("seed: " + "9" * 5000, "neither YAML nor JSON"),
        ("[" * 1500, "too deep"),
        ("1: 2", "unknown names: 1"),
        ("data: [x, --run_dir=elsewhere]", "holds --run_dir=elsewhere, a flag"),
        ('prompt: "a\\0b"', "--prompt must be text in UTF-8 without a zero byte"),
    ],
)
def test_what_settings_files_may_not_say(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        parse(LanguageConfig, ["--settings", str(tmp_path / "a.yaml")])


def test_numbers_without_measure_and_text_that_no_file_holds_are_named_at_once():
    """Each of these ended in a traceback, a run folder already begun: an overflow, a codec, a million processes."""
    flags = ["--epochs=inf", "--seed=" + "9" * 25, "--weight_decay=1e300", "--prompt=\udcff"]
    with pytest.raises(ConfigError) as caught:
        parse(LanguageConfig, flags)
    assert all(f"--{name} must be" in str(caught.value) for name in ("epochs", "seed", "weight_decay", "prompt"))
    with pytest.raises(
        ConfigError, match=r"(?s)--num_workers must be at most 1024.*--batch_size must be at most 16777216"
    ):
        parse(TrainingConfig, ["--num_workers=1000000", "--batch_size=1000000000000"])
    with pytest.raises(ConfigError, match="--context_pairs must be at most 100"):
        parse(ChampionRun, ["--context_pairs=1000000"])
    with pytest.raises(ConfigError, match="an epoch of 1,000,000,000 items cannot be shuffled"):
        DataOrder(10**9, 8, seed=0)


# ---- sweeps ----------------------------------------------------------------------------------------------------------

SWEEP = {
    "program": "train/nano.py",
    "method": "random",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "n": {"min": 1, "max": 9},
        "c": {"values": [1, "a", True], "probabilities": [0.5, 0.25, 0.25]},
        "k": {"value": 3},
        "q": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
        "l": {"distribution": "log_normal", "mu": 0.0, "sigma": 1.0},
        "i": {"distribution": "inv_log_uniform", "min": 1.0, "max": 2.0},
    },
    "early_terminate": {"type": "hyperband", "max_iter": 27, "eta": 3, "s": 2},
    "run_cap": 4,
    "command": ["${env}", "python", "${program}", "${args}"],
}


@hostile(60)
def test_sweep_files(data, folder):
    file = folder / "sweep.yaml"
    sound = yaml.safe_dump(SWEEP).encode()
    file.write_bytes(damaged_bytes(data, sound) if not data.draw(st.integers(0, 4)) else damaged_json(data, SWEEP))

    def read() -> None:
        sweep = Sweep.read(file)
        assert sweep.first_rung() is None or sweep.first_rung()[0] >= 1
        points = sweep.points("random", 2, seed=0)
        for point in points:
            sweep.command({p.name: p.rounded(point[p.name]) for p in sweep.parameters}, folder / "args.json")
        sweep.points("grid", 2, seed=0)

    accepts_or_refuses(read)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"early_terminate": "hyperband"}, "must be a mapping"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter must be a whole number of at least 1"),
        ({"metric": {"name": 5}}, "metric needs a name"),
        ({"method": []}, "unknown method"),
        ({"program": ["a"]}, "program must be the path"),
        ({"run_cap": "many"}, "run_cap must be a number of trials"),
        ({"parameters": {"c": {"values": [1, 2], "probabilities": ["a", "b"]}}}, "probabilities must be 2 numbers"),
        ({"parameters": {"x": {"distribution": "log_normal", "mu": 1e4, "sigma": 1.0}}}, "math range error"),
    ],
)
def test_what_sweep_files_may_not_say(tmp_path, change, words):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP | change))
    with pytest.raises(ValueError, match=words):
        Sweep.read(tmp_path / "s.yaml")


def test_a_grid_without_end_is_refused_before_it_is_made():
    sweep = Sweep.of(SWEEP | {"parameters": {"n": {"min": 1, "max": 10**15}}})
    with pytest.raises(ValueError, match="no end of values"):
        sweep.grid_size()


# ---- run folders -----------------------------------------------------------------------------------------------------

ROWS = [
    {"step": 0, "split": "val", "loss": 2.0, "elapsed": 0.1},
    {"step": 1, "split": "train", "loss": 1.5, "lr": 0.1, "items_per_second": 3.0, "elapsed": 0.2},
    {"step": 1, "split": "val", "loss": 1.0, "elapsed": 0.3},
]
RUN = {
    "config.json": {"lr": 0.1, "tags": ["a"]},
    "run.json": {"command": "accelerate launch train/nano.py", "state": "finished", "monitor": "loss", "mode": "min"},
    "results.json": {"steps": 1, "final": {"loss": 1.0}, "best": {"loss": 1.0}, "report": {"baselines": {"a": 1.0}}},
}


@hostile(40)
def test_run_folders(data, folder):
    """A report of it, and its way into the database and out again."""
    run, name = folder / "runs" / "toy" / "run", data.draw(st.sampled_from([*RUN, "metrics.jsonl"]))
    run.mkdir(parents=True, exist_ok=True)
    for file, content in RUN.items():
        (run / file).write_bytes(damaged_json(data, content) if file == name else json.dumps(content).encode())
    rows = [damaged_json(data, row) if name == "metrics.jsonl" else json.dumps(row).encode() for row in ROWS]
    (run / "metrics.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    accepts_or_refuses(report, [run], folder / "report.html")

    def ask() -> None:
        with ExperimentDB(folder / "runs.db") as db:
            db.import_run(run)
            runs.list_runs(db, runs.parser().parse_args(["list"]))
            db.comparison(["run"])

    accepts_or_refuses(ask)


@pytest.mark.parametrize("name", RUN)
def test_brackets_without_end_are_damage_like_any_other(tmp_path, name):
    for file, content in RUN.items():
        (tmp_path / file).write_text("[" * 100_000 if file == name else json.dumps(content))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with ExperimentDB(tmp_path / "runs.db") as db, pytest.raises(ConfigError, match=rf"{name} is damaged"):
        db.import_run(tmp_path)


@pytest.mark.parametrize("asked", ["9" * 25, "²", "\udcff", "", "/", "1"])
def test_runs_that_the_database_does_not_know(tmp_path, asked):
    with ExperimentDB(tmp_path / "runs.db") as db, pytest.raises(ConfigError, match="knows no run"):
        db.get_run(asked)


@pytest.mark.parametrize("limit", ["-1", "²", "9" * 25, "x"])
def test_a_limit_is_a_whole_number(limit, capsys):
    with pytest.raises(SystemExit):
        runs.parser().parse_args(["list", "--limit", limit])
    assert "give a whole number" in capsys.readouterr().err


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ConnectionResetError("broken pipe"), TimeoutError()])
def test_training_goes_on_where_wandb_is_lost_in_mid_run(tmp_path, monkeypatch, capsys, error):
    logged = []

    class Run:
        id, starting_step = "x", 0

        def define_metric(self, *args: object, **options: object) -> None: ...

        def log(self, row: dict) -> None:
            if len(logged) == 3:
                raise error
            logged.append(row)

        def finish(self) -> None:
            raise error

    wandb = SimpleNamespace(init=lambda **o: Run(), Settings=lambda **o: None, teardown=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("train.engine.summary.matmul_rate", lambda *args, **kwargs: 1e12)
    monkeypatch.setattr("train.engine.summary.plot_curves", lambda *args: None)
    flags = ["--max_steps=6", "--log_every=1", "--mixed_precision=no", "--cpu", "--wandb=offline", "--db=off"]
    config = parse(TrainingConfig, [*flags, f"--run_dir={tmp_path / 'run'}"])
    torch.manual_seed(0)
    Trainer(ToyModel(), config, ToyTask()).train()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6] and len(logged) == 3
    assert read_json(tmp_path / "run" / "run.json")["state"] == "finished"
    assert capsys.readouterr().out.count("training goes on without it") == 2  # and at the end, tried again
