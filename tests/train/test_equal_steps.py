from __future__ import annotations

import dataclasses
import json

import pytest

from tests.toy import ToyModel, ToyTask
from train.engine import ConfigError, Trainer, TrainingConfig
from train.engine.equal_steps import cut_short, with_equal_steps


def test_a_table_says_which_runs_the_clock_cut_short():
    assert cut_short({"champion": [1257, 1257], "borders": [1257, 1257]}) == []
    (line,) = cut_short({"champion": [1257, 1257], "grid2d": [1257, 186]})
    assert line.startswith("Not at equal steps") and "their 1,257 (grid2d 1,257, 186)" in line


@pytest.mark.parametrize("damaged", [None, b"", b'{"max_st', b'{"max_steps": 9, "warmup_steps": 0}'])
def test_what_was_planned_is_known_from_the_runs_whatever_became_of_its_file(tmp_path, damaged):
    """The last is a bit that flipped: by itself nobody could tell."""

    def planned(**limits) -> tuple[TrainingConfig, dict]:
        config = TrainingConfig(cpu=True, wandb="off", db="off", batch_size=8, mixed_precision="no", **limits)
        config = with_equal_steps(config, {"toy": (ToyModel, ToyTask())}, seeds=1, epoch=40, root=tmp_path)
        return config, json.loads((tmp_path / "length.json").read_text())

    config, length = planned(max_steps=4, warmup_steps=0)
    Trainer(ToyModel(), dataclasses.replace(config, run_dir=tmp_path / "toy-seed0"), ToyTask()).train()
    file = tmp_path / "length.json"
    file.unlink() if damaged is None else file.write_bytes(damaged)
    assert planned(max_minutes=1.0, warmup_steps=0) == (dataclasses.replace(config, max_minutes=1.0), length)
    assert planned(max_steps=4, warmup_steps=0) == (config, length)
    with pytest.raises(ConfigError, match="begun with 4 steps each, not 5"):
        planned(max_steps=5, warmup_steps=0)


def test_a_damaged_plan_of_which_nothing_was_trained_is_made_anew(tmp_path, capsys):
    (tmp_path / "length.json").write_bytes(b"\0" * 9)
    config = TrainingConfig(cpu=True, max_steps=3, warmup_steps=0)
    assert with_equal_steps(config, {}, seeds=1, epoch=40, root=tmp_path).max_steps == 3
    assert json.loads((tmp_path / "length.json").read_text())["max_steps"] == 3
    assert f"nothing was trained yet: {tmp_path / 'length.json'} is damaged" in capsys.readouterr().out
