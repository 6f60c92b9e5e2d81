from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.toy import ToyModel
from train.engine import TrainingConfig
from train.engine.optim import TAKES_BETAS, OptimizerName, ScheduleName, learning_rate, make_optimizer, parameter_groups

CONFIG = TrainingConfig(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)


def curve(total: int | None = 110, steps: int = 110, **changes) -> list[float]:
    config = replace(CONFIG, **changes)
    return [learning_rate(config, step, total, steps_per_epoch=7.5) for step in range(steps)]


@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_the_warm_up_is_linear_and_the_same_for_every_total(schedule):
    expected = [(step + 1) / 10 for step in range(10)]
    for total in (None, 50, 110):
        assert curve(total, steps=10, schedule=schedule) == pytest.approx(expected)


def test_the_shapes():
    assert curve(schedule="constant")[10:] == [1.0] * 100
    linear, cosine, wsd = (curve(schedule=s) for s in ("linear", "cosine", "wsd"))
    assert linear[60] == pytest.approx(0.55) and cosine[60] == pytest.approx(0.55)
    assert cosine[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))
    assert wsd[10:90] == [1.0] * 80 and wsd[100] == pytest.approx(0.55)
    for shape in (linear, cosine, wsd):
        assert shape[10:] == sorted(shape[10:], reverse=True)
        assert 0.1 <= shape[-1] < 0.2  # the step after the last would be at the floor
    assert learning_rate(CONFIG, 110, 110, 1.0) == pytest.approx(0.1)


def test_warm_restarts_by_step_and_by_epoch():
    by_step = curve(schedule="cosine_restarts", restart_unit="step", restart_every=20, restart_mult=2)[10:]
    peaks = [i for i, lr in enumerate(by_step) if lr == 1.0]
    assert peaks == [0, 20, 60]  # cycles of 20, 40, 80
    by_epoch = curve(schedule="cosine_restarts", restart_unit="epoch", restart_every=4)[10:]
    assert len(set(by_epoch[:8])) == 1 and by_epoch[8] < by_epoch[7]  # held within an epoch of 7.5 steps
    assert by_epoch[30] == 1.0 and by_epoch[29] < 1.0


class WithEigenvalues(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.omega = torch.nn.Parameter(torch.zeros(3, 3))

    def fp32_parameters(self) -> set[str]:
        return {"omega"}


def test_groups_hold_every_parameter_once_and_only_matrices_decay():
    model = WithEigenvalues()
    groups = {g["name"]: g for g in parameter_groups(model, 0.5)}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [p.ndim for p in groups["no_decay"]["params"]] == [1, 1]
    assert groups["fp32"]["params"] == [model.omega]
    assert [g["weight_decay"] for g in groups.values()] == [0.5, 0.0, 0.0]
    assert groups["fp32"]["lr_scale"] < 1


def test_eight_bit_states_need_a_library_and_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for found, sentence in ((object(), "needs a GPU; on a CPU take"), (None, "pip install bitsandbytes")):
        monkeypatch.setattr("train.engine.optim.find_spec", lambda name, found=found: found)
        with pytest.raises(ValueError, match=sentence):
            make_optimizer(ToyModel(), TrainingConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize("name", [name for name in get_args(OptimizerName) if name != "adamw8bit"])
def test_every_optimizer_takes_a_step_downhill(name):
    torch.manual_seed(0)
    model = ToyModel()
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, lr=1e-2))
    tokens = torch.randint(5, (8, 6))
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=(tokens + 1) % 5)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", TAKES_BETAS[:2])
def test_betas_as_asked_for_and_the_usual_ones_otherwise(name):
    asked = make_optimizer(ToyModel(), TrainingConfig(optimizer=name, betas=(0.95, 0.999)))
    usual = make_optimizer(ToyModel(), TrainingConfig(optimizer=name))
    assert asked.defaults["betas"] == (0.95, 0.999)
    assert usual.defaults["betas"] == {"adamw": (0.9, 0.95), "adam": (0.9, 0.999)}[name]


def test_betas_that_would_be_ignored_or_diverge_are_refused():
    assert "say nothing to --optimizer sgd" in TrainingConfig(optimizer="sgd", betas=(0.9, 0.95)).problems()[0]
    assert "must both lie in [0, 1), not 0.9 1.0" in TrainingConfig(betas=(0.9, 1.0)).problems()[0]
