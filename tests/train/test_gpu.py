"""Exact resume on what accelerator there is, CUDA, ROCm or Apple's MPS: `pytest -m gpu tests/train/test_gpu.py`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.toy import ToyTask

pytestmark = pytest.mark.gpu

EXACT = {"micro_batch_size": 3, "ema_decay": 0.9, "log_every": 3, "eval_every": 4, "save_every": 5, "num_workers": 1}


@pytest.fixture
def on_the_accelerator():
    """The state that tests on the CPU leave in this process says that there is none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Struck(ToyTask):
    def __init__(self, number: int, strike: Callable[[], object]) -> None:
        super().__init__()
        self.left, self.strike = number, strike

    def num_items(self, batch):
        self.left -= 1
        if self.left == 0:
            self.strike()
        return super().num_items(batch)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def die() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_that_was_stopped_and_killed_is_the_one_that_was_not(make_trainer, rows, on_the_accelerator, precision):
    def trained(name: str, task: ToyTask | None = None):
        trainer = make_trainer(name, task=task, cpu=False, mixed_precision=precision, **EXACT)
        assert trainer.backend.device.type in ("cuda", "mps")
        trainer.train()
        return trainer

    whole = trained("whole")
    for number, strike in ((5, ask_to_stop), (15, die)):  # inside steps 2 and, after it went on from there, 7
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            trained("cut", Struck(number, strike))
    cut = trained("cut")
    assert rows(cut.run_dir) == rows(whole.run_dir) and cut.progress.best == whole.progress.best
    for mine, theirs in ((cut.inner, whole.inner), (cut.ema, whole.ema)):
        pairs = zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    states = (trainer.optimizer.state_dict()["state"] for trainer in (cut, whole))
    moments = [[value for of in state.values() for value in of.values()] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
