"""NaN, Inf and leaps in loss, gradients, data and weights of one process of two; what a step asks of the device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.forked import launch
from tests.toy import ToyModel, ToyTask
from train.engine import Trainer, TrainingConfig, guard
from train.engine.backend import Backend
from train.engine.guard import TrainingBroken
from train.engine.metrics import read_rows
from train.engine.optim import make_optimizer
from train.engine.run_folder import read_json

STEPS, BAD = 16, 9  # optimizer steps, and the first that something befalls
ROOT = Path(__file__).resolve().parents[2]
NAN, INF, LEAP = float("nan"), float("inf"), 1e6


@dataclass(frozen=True)
class Fault:
    """On process 1: `value` times what `where` names, in step BAD (counted from 0) or, of data, in item BAD."""

    where: str = ""  # loss, gradient, data, weights
    value: float = 1.0
    bad_step: str = "skip"
    optimizer: str = "adamw"


FAULTS = {
    "none": Fault(),
    "loss nan": Fault("loss", NAN),
    "loss leap": Fault("loss", LEAP, optimizer="sgd"),
    "gradient inf": Fault("gradient", INF),
    "gradient nan, rewind": Fault("gradient", NAN, "rewind"),
    "loss inf, stop": Fault("loss", INF, "stop"),
    "data nan": Fault("data", NAN, optimizer="sgd"),
    "weights nan": Fault("weights", NAN),
    "weights leap, rewind": Fault("weights", LEAP, "rewind"),
}


class Faulty(ToyModel):
    """The toy, with a factor on every loss that comes with the data."""

    def forward(self, tokens, labels=None, num_items=None, factor=None):
        out = super().forward(tokens, labels, num_items)
        return out if factor is None else out | {"loss": out["loss"] * factor.mean()}


class FaultyTask(ToyTask):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def collate(self, items):
        batch = super().collate(items)
        bad = (batch["tokens"] == self.train.tokens[BAD]).all(1) if self.fault.where == "data" else torch.zeros(1)
        return batch | {"factor": torch.where(bad.bool(), self.fault.value, 1.0)}


def faulty_trainer(run_dir: Path, fault: Fault, **settings) -> Trainer:
    """The fault strikes once, on the last process: what comes of a machine's error does not come again."""
    config = TrainingConfig(
        run_dir=run_dir, max_steps=STEPS, batch_size=8, micro_batch_size=2, warmup_steps=2, lr=1e-2, log_every=1,
        eval_every=5, bad_step=fault.bad_step, optimizer=fault.optimizer, mixed_precision="no", wandb="off", db="off",
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(Faulty(), replace(config, **settings), FaultyTask(fault))
    step, trainer.struck = trainer.step, False

    def strike(window: list[dict]) -> bool:
        if trainer.struck or trainer.progress.step != BAD or trainer.backend.rank != trainer.backend.world_size - 1:
            return step(window)
        trainer.struck, weight = True, trainer.inner.head.weight
        if fault.where == "loss":
            window[-1]["factor"] = torch.full_like(window[-1]["factor"], fault.value)
        if fault.where == "weights":
            weight.data[0, 0] = weight.data[0, 0] * fault.value
        handle = weight.register_hook(lambda grad: grad * (fault.value if fault.where == "gradient" else 1.0))
        try:
            return step(window)
        finally:
            handle.remove()

    trainer.step = strike
    return trainer


def outcome(trainer: Trainer) -> dict:
    """What this process saw: the bad steps, those left out, its weights, and the sentence that ended it."""
    bad, judged, error = [], trainer.guard.verdict, None

    def judge(step: int, *seen: torch.Tensor) -> torch.Tensor:
        verdict = judged(step, *seen)
        bad.extend([step] if verdict else [])
        return verdict

    trainer.guard.verdict = judge
    try:
        trainer.train()
    except TrainingBroken as broken:
        error = str(broken)
    weights = torch.cat([p.detach().flatten() for p in trainer.inner.parameters()]).tolist()
    return {"bad": bad, "banned": trainer.progress.banned_steps, "weights": weights, "error": error}


@contextmanager
def quick() -> Iterator[None]:
    """A guard that judges after a few steps, and a report without a plot."""
    with (
        patch.multiple(guard, ENOUGH=4),
        patch("train.engine.trainer.PATIENCE", 3),
        patch.multiple("train.engine.summary", matmul_rate=lambda *a, **k: 1e12, plot_curves=lambda *a: None),
    ):
        yield


class Watch(TorchDispatchMode):
    """Counts how often the host waits for a tensor (`.item()`, `bool()`, `float()`, C++'s too, and `.tolist()`), and
    how often the processes sum one (but for DDP's gradients, in C++)."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.sums = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Watch:
        def tolist(tensor: torch.Tensor, plain: Callable = torch.Tensor.tolist) -> list:
            self.reads += 1
            return plain(tensor)

        def sum_up(tensor: torch.Tensor, plain: Callable = torch.distributed.all_reduce) -> None:
            self.sums += 1
            plain(tensor)

        self.patches = ExitStack()
        self.patches.enter_context(patch.object(torch.Tensor, "tolist", tolist))
        self.patches.enter_context(patch.object(torch.distributed, "all_reduce", sum_up))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.patches.close()


def asked_of_the_device(folder: Path, **settings) -> list[list[int]]:
    """(reads, sums) of each step between two rows."""
    trainer = faulty_trainer(folder, Fault(), log_every=6, eval_every=6, max_steps=6, **settings)
    seen, watch, between, loop = [], Watch(), trainer._between_steps, trainer._loop

    def counted() -> str:
        if trainer.progress.step < 6:  # the last one has a row
            # Reading which items make up a micro-batch costs no wait: those tensors never were on the device.
            seen.append((watch.reads, watch.sums))
        return between()

    def watched() -> str:
        with watch:
            return loop()

    trainer._between_steps, trainer._loop = counted, watched
    trainer.train()
    return [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(seen)]


WAYS = [(optimizer, bad_step) for optimizer in ("adamw", "sgd") for bad_step in ("skip", "rewind", "stop")]


def befall(folder: Path) -> None:
    """Train the toy with each of FAULTS, and leave what this process saw of it."""
    with quick():
        seen: dict = {name: outcome(faulty_trainer(folder / name, fault)) for name, fault in FAULTS.items()}
        seen["asked"] = [asked_of_the_device(folder / "-".join(w), optimizer=w[0], bad_step=w[1]) for w in WAYS]
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict, dict]:
    """Folder of the runs, and what each process saw of them."""
    folder = tmp_path_factory.mktemp("two")
    assert launch(lambda: befall(folder), ACCELERATE_USE_CPU="1") == [0, 0]
    return folder, *(read_json(folder / f"rank-{rank}.json") for rank in range(2))


@pytest.mark.parametrize("name", FAULTS)
def test_what_befalls_one_process_is_judged_by_both_alike(two, name):
    folder, first, second = two
    a, b, fault = first[name], second[name], FAULTS[name]
    assert (a["bad"], a["banned"], a["error"]) == (b["bad"], b["banned"], b["error"])
    skipped = [r["skipped"] for r in read_rows(folder / name / "metrics.jsonl") if r["split"] == "train"]
    if fault.where == "data":  # the item comes once an epoch of five steps
        assert len(a["bad"]) in (3, 4) and sum(skipped) == len(a["bad"])
    elif name == "none":
        assert a["bad"] == [] and sum(skipped) == 0
    else:
        assert a["bad"][0] == BAD and skipped[BAD] == 1
    if name == "weights nan":  # skipping does not help: both stop where they would save them
        assert "the weights are not finite, and are not saved" in a["error"] and a["bad"] == [BAD]
    elif fault.bad_step == "stop":
        assert "--bad_step stop ends the run" in a["error"] and len(skipped) == BAD + 1
    else:
        assert a["error"] is None and a["weights"] == b["weights"]
        assert all(map(math.isfinite, a["weights"]))
        assert a["banned"] == ([BAD] if fault.bad_step == "rewind" else [])
        # It learns on: what was left out is a step of sixteen (measured: within 0.02 of the loss of the sound run).
        ends = [read_rows(folder / n / "metrics.jsonl")[-2]["loss"] for n in (name, "none")]
        assert fault.optimizer == "sgd" or abs(ends[0] - ends[1]) < 0.2


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_add_up_twice_and_read_once_a_step(two, rank):
    """The items to come, and then loss, signals and clock in one."""
    assert two[1 + rank]["asked"] == [[[1, 2]] * 4] * len(WAYS)


# ---- one process -----------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The checkpoint after the bad step would be the one that a resumed run begins with."""
    with quick():
        trainer = faulty_trainer(tmp_path / "run", Fault("weights", NAN), save_every=1)
        seen = outcome(trainer)
        assert "weights" in seen["error"] and "not finite" in seen["error"]
        newest = trainer.snapshot.checkpoints.newest(print)
        assert newest.name == f"step-{BAD:08d}"
        assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())
        sound = faulty_trainer(tmp_path / "run", Fault(), save_every=1)  # the same command goes on
        assert outcome(sound)["error"] is None and sound.progress.step == STEPS


def test_rewinding_without_end_is_given_up(tmp_path):
    """Weights that one step breaks, whatever its batch: each rewind would leave out one step more."""
    with quick():
        trainer = faulty_trainer(tmp_path / "run", Fault(bad_step="rewind"), eval_every=BAD - 1)
        step = trainer.backend.step

        def overflow(bad: torch.Tensor, is_bad: bool) -> None:
            step(bad, is_bad)
            if trainer.progress.step >= BAD:
                trainer.inner.head.weight.data.fill_(INF)

        trainer.backend.step = overflow
        seen = outcome(trainer)
        assert "rewind" in seen["error"] and seen["banned"] == [BAD + 1, BAD + 2]


@pytest.mark.parametrize(("optimizer", "bad_step"), WAYS)
def test_one_process_reads_once_a_step_or_not_at_all(tmp_path, optimizer, bad_step):
    """Fused Adam skips on the device; SGD cannot, and rewind and stop are the host's to do."""
    with quick():
        seen = asked_of_the_device(tmp_path / "run", optimizer=optimizer, bad_step=bad_step)
    assert seen == [[int((optimizer, bad_step) != ("adamw", "skip")), 0]] * 4


def test_a_step_that_reads_the_device_once_more_is_noticed(tmp_path, monkeypatch):
    clip = Backend.clip
    monkeypatch.setattr(Backend, "clip", lambda self, norm: clip(self, norm) * float(torch.ones(()) > 0))
    with quick():
        assert asked_of_the_device(tmp_path / "run") == [[1, 0]] * 4


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_scale_shrinks_where_gradients_overflow_and_nobody_waits_for_it(tmp_path, optimizer):
    """fp16, of which accelerate has none on a CPU: the scaler by hand, unscaling as `Backend.clip` has it done."""
    trainer = faulty_trainer(tmp_path / "run", Fault(), optimizer=optimizer)
    backend, model, scaler = trainer.backend, trainer.inner, torch.amp.GradScaler("cpu", init_scale=4.0)
    backend.prepare(model, make_optimizer(model, trainer.config), 1)
    backend.scaler, before = scaler, model.head.weight.detach().clone()
    for bad, scale in ((True, 2.0), (False, 2.0)):
        scaler.scale(model.head.weight.sum() * (INF if bad else 1.0)).backward()
        scaler.unscale_(backend.optimizer)
        with Watch() as watch:
            backend.step(torch.tensor(float(bad)), bad)
        assert watch.reads == 0 and scaler.get_scale() == scale
        assert torch.equal(model.head.weight, before) == bad
