from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.engine import ConfigError, TrainingConfig
from train.engine.backend import Backend
from train.engine.fit import fit
from train.engine.plan import make_plan, measure
from train.engine.precision import choose_precision, matmul_rate
from train.engine.run_folder import write_json

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bf16", "chosen"), [(3e11, "bf16"), (1.2e11, "no"), (2e10, "no")])
def test_auto_takes_bf16_only_where_it_was_measured_to_pay(monkeypatch, bf16, chosen):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    rates = {torch.float32: 1e11, torch.bfloat16: bf16}
    monkeypatch.setattr("train.engine.precision.matmul_rate", lambda device, dtype: rates[dtype])
    precision, reason = choose_precision("auto", CPU)
    assert precision == chosen and f"{bf16 / 1e9:.0f} GFLOP/s" in reason


def test_a_flag_wins_over_the_launch_config_and_that_over_measuring(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision("no", CPU)[0] == "no"
    assert choose_precision("auto", torch.device("mps"))[0] == "fp16"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_precision("auto", CPU)


def test_the_rate_is_flops_over_the_best_time(monkeypatch):
    now = iter([0.0, 0.0, 0.0, 0.5, 0.6, 0.6, 0.7, 9.0])  # deadline; (check, start, end) twice; check
    monkeypatch.setattr("train.engine.precision.time.perf_counter", lambda: next(now))
    assert matmul_rate(CPU, torch.float32, size=10, seconds=1.0) == pytest.approx(2 * 10**3 / 0.1)


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    matmul_rate(CPU, torch.float32, size=8, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x, num_items=None):
        return {"loss": self.b(torch.relu(self.a(x))).sum()}


def test_flops_and_bytes_are_counted_without_computing():
    batch = {"x": torch.zeros(32, 8)}
    cost = measure(TwoLayers(), batch, None)
    forward = 2 * 32 * (8 * 16 + 16 * 4)
    assert cost.flops == 2 * forward + 2 * 32 * 16 * 4  # the first layer's input needs no gradient
    # When relu's gradient is made: its output, that one's gradient, the result; b's gradient; the loss and its own.
    assert cost.peak_bytes == 4 * (3 * 32 * 16 + 16 * 4 + 2)
    assert measure(TwoLayers(), batch, torch.bfloat16).peak_bytes < cost.peak_bytes
    # From the second micro-batch on, all gradients are there.
    second = measure(TwoLayers(), batch, None, micro_batches=2)
    assert second.peak_bytes == 4 * (3 * 32 * 16 + 8 * 16 + 16 + 16 * 4 + 2) and second.flops == cost.flops


class Recomputed(TwoLayers):
    def forward(self, x, num_items=None):
        return {"loss": checkpoint(lambda x: self.b(torch.relu(self.a(x))), x, use_reentrant=False).sum()}


class Chain(nn.Module):
    """Activations of eight blocks are kept or, with `gradient_checkpointing`, made again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(8))
        self.gradient_checkpointing = False

    def forward(self, x, num_items=None):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return {"loss": x.square().sum()}


def test_recomputing_trades_bytes_for_flops():
    batch = {"x": torch.zeros(512, 64)}
    plain, saving = (measure(model(), {"x": torch.zeros(32, 8)}, None) for model in (TwoLayers, Recomputed))
    # The second matmul isn't made again: torch stops where backward has what it needs.
    assert saving.flops == plain.flops + 2 * 32 * 8 * 16
    model = Chain()
    kept = measure(model, batch, None)
    model.gradient_checkpointing = True
    assert measure(model, batch, None).peak_bytes < kept.peak_bytes


def test_training_and_evaluation_run_in_the_precision_they_say(make_trainer):
    trainer = make_trainer(mixed_precision="bf16", max_steps=2)
    seen = set()
    trainer.inner.head.register_forward_hook(lambda module, args, out: seen.add((module.training, out.dtype)))
    trainer.train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {p.dtype for p in trainer.inner.parameters()} == {torch.float32}


class Halting(TwoLayers):
    def forward(self, x, num_items=None):
        return {"loss": super().forward(x)["loss"] * (2 if (x.sum() > 0).item() else 1)}


def test_a_model_whose_work_depends_on_its_data_still_gets_a_plan(make_trainer):
    trainer = make_trainer()
    plan = make_plan(Halting(), trainer.config, {"x": torch.zeros(32, 8)}, 1, trainer.backend)
    assert plan.flops_per_step is None and plan.fits and "n/a" in "".join(plan.lines())


def test_the_plans_flops_leave_recomputation_out_as_mfu_does():
    batch, plans = {"x": torch.zeros(512, 64)}, []
    for recompute in (False, True):
        model, config = Chain(), TrainingConfig(gradient_checkpointing=recompute, cpu=True, mixed_precision="no")
        model.gradient_checkpointing = recompute
        plans.append(make_plan(model, config, batch, 1, Backend(config)))
        assert model.gradient_checkpointing == recompute
    assert plans[0].flops_per_step == plans[1].flops_per_step
    assert plans[1].memory["activations"] < plans[0].memory["activations"]


def test_the_plan_adds_up(make_trainer):
    trainer = make_trainer(ema_decay=0.9, optimizer="adam", micro_batch_size=3)
    plan = make_plan(TwoLayers(), trainer.config, {"x": torch.zeros(32, 8)}, 3, trainer.backend)
    parameters = 8 * 16 + 16 + 16 * 4
    assert plan.parameters == {"decay": 8 * 16 + 16 * 4, "no_decay": 16} and plan.num_parameters == parameters
    assert plan.memory["weights"] == plan.memory["gradients"] == plan.memory["EMA"] == 4 * parameters
    assert plan.memory["optimizer"] == 8 * parameters
    assert plan.flops_per_step == 3 * measure(TwoLayers(), {"x": torch.zeros(32, 8)}, None).flops
    assert plan.fits


def toy(config: TrainingConfig) -> Chain:
    return Chain()


class Vectors:
    """1,024 items of 64 numbers."""

    train = val = range(1024)

    def collate(self, items):
        return {"x": torch.zeros(len(items), 64)}


def fitted(make_trainer, monkeypatch, free_bytes: int, say=lambda *lines: None, **settings):
    trainer = make_trainer(batch_size=512, **settings)
    monkeypatch.setattr("train.engine.plan.free_memory", lambda device: free_bytes)
    monkeypatch.setattr("train.engine.plan.process_bytes", lambda device: 0)
    monkeypatch.setattr("train.engine.plan.LATER_BYTES", 0)
    return fit(trainer.config, toy, Vectors(), trainer.backend, say)


def test_a_run_is_changed_no_more_than_its_memory_demands(make_trainer, monkeypatch):
    said: list[str] = []
    config, plan = fitted(make_trainer, monkeypatch, 10_000_000, lambda *lines: said.extend(lines))
    assert plan.fits and (config.micro_batch_size, config.gradient_checkpointing) == (None, False) and not said

    config, plan = fitted(make_trainer, monkeypatch, 3_500_000, lambda *lines: said.extend(lines))
    assert plan.fits and (config.micro_batch_size, config.gradient_checkpointing) == (256, False)
    assert "as given: does not fit" in said[0] and said[-1].endswith("taken: --micro_batch_size 256")

    # What the user decided stays; recomputing is all that is left.
    config, plan = fitted(make_trainer, monkeypatch, 3_500_000, micro_batch_size=512)
    assert plan.fits and (config.micro_batch_size, config.gradient_checkpointing) == (512, True)


def test_what_cannot_fit_is_a_sentence_with_numbers_before_anything_is_built(make_trainer, monkeypatch):
    with pytest.raises(ConfigError, match=r"(?s)does not fit this machine.*given.*GiB.*size 1.*checkpoint"):
        fitted(make_trainer, monkeypatch, 1000)


def test_a_resumed_run_keeps_what_it_was_fitted_to(make_trainer, monkeypatch):
    config, _ = fitted(make_trainer, monkeypatch, 3_500_000)
    config.run_dir.mkdir()
    write_json(config.run_dir / "config.json", config.to_dict())
    again, _ = fitted(make_trainer, monkeypatch, 10_000_000)
    assert again.micro_batch_size == 256


@dataclass(frozen=True, kw_only=True)
class Frugal(TrainingConfig):
    def fittings(self, sharded: bool) -> list[dict]:
        return [*super().fittings(sharded), {"optimizer": "adafactor"}]


def test_needless_changes_are_undone_and_a_resumed_run_knows_it(make_trainer, monkeypatch, tmp_path):
    """Activations are a hundredth of this run's memory: only the optimizer's state is worth a change."""
    trainer = make_trainer()
    asked = Frugal(run_dir=tmp_path / "frugal", batch_size=2, cpu=True, mixed_precision="no")
    monkeypatch.setattr("train.engine.plan.process_bytes", lambda device: 0)
    monkeypatch.setattr("train.engine.plan.LATER_BYTES", 0)
    for free in (1_000_000, 10_000_000):
        monkeypatch.setattr("train.engine.plan.free_memory", lambda device, free=free: free)
        config, _ = fit(asked, toy, Vectors(), trainer.backend, lambda *lines: None)
        assert (config.optimizer, config.micro_batch_size, config.gradient_checkpointing) == ("adafactor", None, False)
        asked.run_dir.mkdir(exist_ok=True)
        write_json(asked.run_dir / "config.json", config.to_dict())
