from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.toy import ToyModel, ToyTask
from train.engine import Trainer, TrainingConfig
from train.engine.metrics import read_rows
from train.engine.run_folder import write_json

TIMES = ("items_per_second", "elapsed")


@pytest.fixture(autouse=True)
def _no_seconds_spent_on_ceiling_and_plot(monkeypatch):
    monkeypatch.setattr("train.engine.summary.matmul_rate", lambda *args, **kwargs: 1e12)
    monkeypatch.setattr("train.engine.summary.plot_curves", lambda *args: None)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Trainer of the toy in fp32 on the CPU; keyword arguments go to its config."""

    def make(name: str = "run", task: ToyTask | None = None, hooks=(), dropout: float = 0.2, **settings) -> Trainer:
        defaults = {"max_steps": 12, "batch_size": 8, "warmup_steps": 2, "lr": 1e-2, "mixed_precision": "no"}
        defaults |= {"cpu": True, "wandb": "off", "db": "off"}
        config = TrainingConfig(run_dir=tmp_path / name, **{**defaults, **settings})
        torch.manual_seed(0)
        return Trainer(ToyModel(dropout), config, task or ToyTask(), hooks)

    return make


@pytest.fixture
def rows() -> Callable[[Path], list[dict]]:
    """Rows of a run folder without what depends on the clock."""

    def read(run_dir: Path) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run_dir / "metrics.jsonl")]

    return read


@pytest.fixture
def make_run_folder(tmp_path: Path) -> Callable[..., Path]:
    """A run folder by name as a finished run leaves it, without the run: settings, rows, facts over the usual ones."""

    def make(name: str, rows: list[dict] = (), config: dict | None = None, **facts) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
        usual = {"command": f"accelerate launch train/{folder.parent.name}.py", "state": "finished"}
        usual |= {"monitor": "loss", "mode": "min", "started": "2026-01-01T00:00:00+00:00", "git_commit": "abc"}
        write_json(folder / "config.json", {"lr": 0.1, "seed": 0, **(config or {})})
        write_json(folder / "run.json", {**usual, **facts})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make
