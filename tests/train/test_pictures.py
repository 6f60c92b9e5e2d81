from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from models.energy import energy_bound
from models.ten import TEN, TENConfig
from train.engine import Trainer, TrainingConfig
from train.engine.metrics import read_rows
from train.pictures import EnergyPicture, SpectrumPicture, energy_row

CONFIG = TENConfig(vocab_size=17, d_model=16, num_layers=2, num_eigenstates=12, num_heads=2, d_ff=32, max_seq_len=24)


class Windows:
    """A task of random tokens, for what the hooks see of one."""

    monitor, mode, item_name = "loss", "min", "tokens"

    def __init__(self) -> None:
        tokens = torch.randint(17, (8, 25), generator=torch.Generator().manual_seed(0))
        self.train = self.val = [
            {"input_ids": t[:-1], "labels": t[1:], "reset": torch.arange(24) == 11} for t in tokens
        ]

    def collate(self, items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def num_items(self, batch):
        return torch.tensor(batch["labels"].numel())

    def evaluate(self, predict):
        return {"loss": 1.0}


def make(**changes) -> TEN:
    torch.manual_seed(0)
    return TEN(TENConfig(**{**CONFIG.__dict__, **changes}))


def test_a_run_leaves_both_pictures_and_their_numbers(tmp_path):
    model = make(hten_scales=(1, 2))
    config = TrainingConfig(
        run_dir=tmp_path / "run", max_steps=1, batch_size=2, mixed_precision="no", cpu=True, wandb="off"
    )
    trainer = Trainer(model, config, Windows(), hooks=[SpectrumPicture(), EnergyPicture()])
    trainer.train()
    for name in ("spectrum", "energy"):
        assert (tmp_path / "run" / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "run" / "spectrum.json").read_text())
    assert found["step"] == 1 and [(g["layer"], g["scale"]) for g in found["groups"]] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    rows = read_rows(tmp_path / "run" / "energy.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert set(row["scales"]) == {"1", "2"}
        for scale in row["scales"].values():
            assert 0 < scale["typical_ratio"] <= scale["max_ratio"] < 1 and scale["root"] < scale["bound"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """What a hook uses of a Trainer."""
    monkeypatch.setattr("train.pictures.draw_energy", lambda *args: None)
    (tmp_path / "plots").mkdir()
    backend = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False), move=lambda batch: batch)
    predict = SimpleNamespace(whole=make)
    return SimpleNamespace(predict=predict, backend=backend, task=Windows(), run_dir=tmp_path)


def test_energy_rows_after_the_step_a_run_went_back_to_are_forgotten(stand_in):
    for step in (0, 10, 20, 10, 15):
        EnergyPicture()(stand_in, {"step": step})
    assert [row["step"] for row in read_rows(stand_in.run_dir / "energy.jsonl")] == [0, 10, 15]


def test_only_the_process_with_the_whole_model_writes(stand_in):
    stand_in.predict.whole = lambda: None
    for hook in (SpectrumPicture(), EnergyPicture()):
        hook(stand_in, {"step": 0})
    assert [path.name for path in stand_in.run_dir.rglob("*")] == ["plots"]


@pytest.mark.parametrize("mode", ["polyphase", "hold"])
def test_an_energy_above_its_bound_is_not_hidden(mode, monkeypatch):
    """What equals its bound by definition is left out; a state that breaks it must not be."""
    model, tokens, reset = make(hten_scales=(1, 3), hten_mode=mode), torch.zeros(1, 24, dtype=torch.int64), None
    assert energy_row(model, tokens, reset)["3"]["max_ratio"] < 1

    def broken(*args):
        return [energy._replace(bound=energy.bound * 0.5) for energy in energy_bound(*args)]

    monkeypatch.setattr("train.pictures.energy_bound", broken)
    assert energy_row(model, tokens, reset)["3"]["max_ratio"] > 1
