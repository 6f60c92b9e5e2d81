"""The engine from Python: the origin's names, and the defects of its notebook that ours must not have."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import datetime
import io
import math
import re
import tokenize
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toy import CLASSES, ToyModel, ToyTask
from train.engine.backend import Backend
from train.engine.config import ConfigError
from train.engine.evaluation import Predictor
from train.engine.experiments import ExperimentDB
from train.engine.face import (
    MetricsTracker,
    OptimizerFactory,
    SchedulerFactory,
    TaskSpec,
    Trainer,
    TrainingConfig,
    TrainingConfigBuilder,
    TrainingLoop,
    UniversalDataModule,
)
from train.engine.run_folder import ROOT, default_run_dir, read_json

pandas = pytest.importorskip("pandas")
NO_CODE = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
SPEC = TaskSpec(name="sums", loss="mse", metrics={"right": lambda out, y: ((out - y).abs() < 0.5).sum()})


def sums(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return list(zip(x, x.sum(-1, keepdim=True), strict=True))


TRAIN, VAL = sums(64, 0), sums(21, 1)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> TrainingConfig:
    monkeypatch.chdir(tmp_path)
    steps = {"epochs": 2.0, "batch_size": 8, "warmup_steps": 2, "eval_every": 4, "log_every": 2}
    return TrainingConfig(lr=0.05, weight_decay=0.0, mixed_precision="no", cpu=True, wandb="off", **steps)


def line(_=None) -> nn.Module:
    return nn.Linear(3, 1)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_the_call_of_the_origin_leaves_all_it_promised(settings, tmp_path):
    model = line()
    trainer = Trainer(model=model, config=None, training_config=settings, task_spec=SPEC)
    results = trainer.train(train_data=TRAIN, val_data=VAL)
    summary = results["metrics_summary"]
    assert results["final_loss"] < 0.5 * summary["val/loss"].iloc[0]
    assert results["final_loss"] == summary["val/loss"].dropna().iloc[-1] == results["final"]["loss"]
    assert summary["epoch"].iloc[-1] == 2 and results["training_time"] > 0 and results["run_name"].startswith("sums/")
    # Training rows and validation rows keep their own columns, and the best epoch goes by the latter.
    best = summary["val/loss"].iloc[1:].idxmin()
    assert results["best_epoch"] == summary["epoch"][best]
    assert not summary["train/loss"].dropna().equals(summary["val/loss"].dropna())

    saved = torch.load(results["checkpoint_path"], weights_only=True)
    assert saved["training_config"]["lr"] == 0.05 and saved["results"]["final_loss"] == results["final_loss"]
    again = line()
    again.load_state_dict(saved["model_state_dict"])
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with ExperimentDB(tmp_path / "runs" / "experiments.db") as db:
        [run] = db.runs()
        assert {"kind": "model", "path": "final_model.pt"} in db.artifacts(run["run_id"])
        assert (run["script"], run["state"]) == ("sums", "finished")
    with ExperimentDB(tmp_path / "another.db") as db:  # made anew from the folder, it knows the file too
        made = db.import_run(Path(results["checkpoint_path"]).parent)
        assert {"kind": "model", "path": "final_model.pt"} in db.artifacts(made)


def test_validation_is_the_mean_over_items_whatever_the_batches(settings):
    model = line()
    x, y = (torch.stack(column) for column in zip(*VAL, strict=True))
    results = Trainer(model, None, dataclasses.replace(settings, max_steps=3), SPEC).train(TRAIN, VAL)
    with torch.no_grad():  # 21 items: two batches of 8 and one of 5
        assert results["final"]["loss"] == pytest.approx((model(x) - y).square().mean().item(), rel=1e-5)
        assert results["final"]["right"] == pytest.approx(((model(x) - y).abs() < 0.5).float().mean().item())


def test_a_finished_run_gives_its_results_and_weights_again(settings, tmp_path):
    settings = dataclasses.replace(settings, run_dir=tmp_path / "run", ema_decay=0.5)
    first = Trainer(line, None, settings, SPEC).train(TRAIN, VAL)
    model = line()
    again = Trainer(model, None, settings, SPEC).train(TRAIN, VAL)
    assert again["final_loss"] == first["final_loss"] and again["best_epoch"] == first["best_epoch"]
    x, y = (torch.stack(column) for column in zip(*VAL, strict=True))
    assert (model(x) - y).square().mean().item() == pytest.approx(first["final_loss"], rel=1e-5)  # the averaged ones


def test_a_tensor_that_a_model_has_twice_is_in_the_final_model_twice(settings):
    def tied(_=None):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        model[1].weight = model[0].weight
        return model

    path = Trainer(tied, None, dataclasses.replace(settings, max_steps=2), SPEC).train(TRAIN, VAL)["checkpoint_path"]
    state = torch.load(path, weights_only=True)["model_state_dict"]
    assert torch.equal(state["0.weight"], state["1.weight"]) and tied().load_state_dict(state)


def test_the_models_own_loss_is_scored_by_its_parts(settings):
    spec = TaskSpec(name="next", input_fields=("tokens",), monitor="ce_loss", item_name="tokens")
    results = Trainer(lambda _: ToyModel(), None, settings, spec).train(ToyTask().train, ToyTask().val)
    assert results["final"].keys() == {"loss", "ce_loss", "energy_loss"}
    assert results["final"]["ce_loss"] < math.log(CLASSES)


def test_a_task_brings_its_data_and_hooks_are_the_engines(settings):
    seen = []
    hook = lambda trainer, row: seen.append(row["accuracy"])
    results = Trainer(lambda _: ToyModel(), None, settings, ToyTask(), hooks=[hook]).train()
    assert seen[-1] == results["final"]["accuracy"] and results["run_name"].startswith("ToyTask/")
    assert results["final_loss"] == results["metrics_summary"]["train/loss"].dropna().iloc[-1]  # it scores no loss
    with pytest.raises(ConfigError, match="brings its own data"):
        Trainer(line, None, settings, ToyTask()).train(TRAIN, VAL)


# ---- weights (defects 1, 2) ------------------------------------------------------------------------------------------


def test_every_trial_of_a_factory_starts_from_the_same_fresh_weights(settings, capsys):
    settings = dataclasses.replace(settings, max_steps=4)
    losses = []
    for lr in (0.05, 0.1, 0.05):
        config = TrainingConfigBuilder.from_config(settings).with_training(learning_rate=lr).build()
        losses.append(Trainer(line, None, config, SPEC).train(TRAIN, VAL)["metrics_summary"]["val/loss"])
    assert losses[0][0] == losses[1][0] and losses[0].equals(losses[2]) and not losses[0].equals(losses[1])
    assert "trained before" not in capsys.readouterr().out


def test_a_model_that_was_trained_says_that_it_goes_on(settings, capsys):
    trainer = Trainer(line(), None, dataclasses.replace(settings, max_steps=4), SPEC)
    first = trainer.train(TRAIN, VAL)
    assert "trained before" not in capsys.readouterr().out
    second = trainer.train(TRAIN, VAL)
    assert "trained before: this run goes on from them" in capsys.readouterr().out
    assert second["metrics_summary"]["val/loss"][0] == first["final_loss"] and second["run_name"] != first["run_name"]


# ---- settings (defects 1, 4, 9) --------------------------------------------------------------------------------------


def test_the_builder_changes_copies_and_names_what_it_does_not_know():
    begun = TrainingConfigBuilder.preset("quick_prototype")
    config = begun.with_optimizer("sgd", learning_rate=0.1).with_scheduler("linear", warmup_steps=3).build()
    assert config.diff(begun.build()) == {
        "optimizer": ("sgd", "adamw"), "lr": (0.1, 3e-4), "schedule": ("linear", "cosine"), "warmup_steps": (3, 10)
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"early_stoping_patience \(did you mean early_stopping_patience\?\)"):
        begun.with_training(early_stoping_patience=3)
    with pytest.raises(ConfigError, match=r"no preset prodution \(did you mean production\?\)"):
        TrainingConfigBuilder.preset("prodution")
    for name in ("baseline", "production"):
        TrainingConfigBuilder.preset(name).build()


def test_every_bad_value_is_named_at_once_also_those_that_only_python_lets_pass(settings):
    with pytest.raises(ConfigError, match=r"optimizer must be one of adamw, (.|\n)*--schedule must be one of"):
        TrainingConfigBuilder().with_optimizer("adamm").with_scheduler(True).build()
    with pytest.raises(ConfigError, match=r"--lr must be more than 0(.|\n)*--ema_decay"):
        Trainer(line, None, dataclasses.replace(settings, lr=0.0, ema_decay=1.0), SPEC)


def test_the_factories_make_what_the_engine_uses(settings):
    optimizer = OptimizerFactory.create(line(), dataclasses.replace(settings, optimizer="sgd"))
    assert isinstance(optimizer, torch.optim.SGD)
    rate = SchedulerFactory.create(dataclasses.replace(settings, schedule="linear", final_lr_ratio=0.0), total_steps=12)
    assert [rate(0), rate(1), rate(7)] == pytest.approx([0.025, 0.05, 0.025])


def test_the_schedule_counts_optimizer_steps_not_batches(settings):
    rates = []
    for micro in (8, 2):
        config = dataclasses.replace(settings, micro_batch_size=micro, schedule="linear")
        rates.append(Trainer(line, None, config, SPEC).train(TRAIN, VAL)["metrics_summary"]["train/lr"].dropna())
    assert rates[0].equals(rates[1]) and rates[0].iloc[-1] < rates[0].iloc[0]


# ---- what is logged (defects 6, 8, 15) -------------------------------------------------------------------------------


def test_the_logged_norm_is_that_of_the_whole_gradient_before_clipping(make_trainer, rows):
    trainer, by_hand = make_trainer(micro_batch_size=3, dropout=0.0, grad_clip=0.1, log_every=1, max_steps=4), []
    step = trainer.step

    def and_by_hand(window):
        model = copy.deepcopy(trainer.inner).double()
        items = sum((batch["labels"] != -100).sum() for batch in window)
        sum(model(**batch, num_items=items)["loss"] for batch in window).backward()
        by_hand.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        return step(window)

    trainer.step = and_by_hand
    trainer.train()
    logged = [row["grad_norm"] for row in rows(trainer.run_dir) if row["split"] == "train"]
    assert logged == pytest.approx(by_hand, rel=1e-5) and min(logged) > 2 * 0.1


def test_a_folder_may_be_text(settings, tmp_path):
    settings = dataclasses.replace(settings, run_dir="x", max_steps=1)
    assert TrainingLoop(ToyModel(), settings, ToyTask()).config.run_dir == Path("x")
    results = Trainer(line, None, settings, SPEC).train(TRAIN, VAL)
    assert (results["checkpoint_path"], results["run_name"]) == ("x/final_model.pt", f"{tmp_path.name}/x")


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = SimpleNamespace(now=lambda: datetime.datetime(2026, 1, 1))
    monkeypatch.setattr("train.engine.run_folder.datetime", SimpleNamespace(datetime=clock))
    found = [default_run_dir("sums") for _ in range(3) if not default_run_dir("sums").mkdir(parents=True)]
    assert [folder.name for folder in found] == ["20260101-000000-2", "20260101-000000-3", "20260101-000000-4"]


def swallowed(source: str) -> list[int]:
    """Lines of handlers that take any exception there is and raise none."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    broad = [h for h in handlers if h.type is None or ast.unparse(h.type) in ("Exception", "BaseException")]
    return [h.lineno for h in broad if not any(isinstance(node, ast.Raise) for node in ast.walk(h))]


def test_no_failure_looks_like_success():
    assert swallowed("try:\n    f()\nexcept Exception as e:\n    print(e)") == [3]
    floors = (ROOT / floor for floor in ("kernels", "models", "tasks", "train"))
    found = {
        file.relative_to(ROOT).as_posix(): len(lines)
        for floor in floors
        for file in floor.rglob("*.py")
        if (lines := swallowed(file.read_text()))
    }
    assert found == {"train/engine/metrics.py": 2}  # wandb's errors have no common class; that it is lost is said


def lines_of_code(source: str) -> int:
    """Lines that are no comment, docstring or import and not empty."""
    words = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in NO_CODE]
    lines = {line for word in words for line in range(word.start[0], word.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, (ast.Import, ast.ImportFrom)):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    return len(lines)


def test_it_is_a_face_and_no_second_engine():
    assert lines_of_code('"""A\nB"""\nimport ast\n\n# C\nx = [\n    1,\n]\n') == 3
    files = (ROOT / "train" / "engine" / name for name in ("face.py", "task_spec.py"))
    assert sum(lines_of_code(file.read_text()) for file in files) <= 175


def test_a_run_leaves_the_plots_of_a_notebook_alone():
    """pyplot's backend is the notebook's: what a run draws goes into files without it."""
    through_pyplot = re.compile(r"^ *(import matplotlib.pyplot|from matplotlib import .*pyplot)", re.MULTILINE)
    assert through_pyplot.search("def f():\n    import matplotlib.pyplot as plt")
    files = [file for floor in ("tasks", "train") for file in (ROOT / floor).rglob("*.py")]
    assert [file.name for file in files if through_pyplot.search(file.read_text())] == []


# ---- data ------------------------------------------------------------------------------------------------------------


def test_ragged_items_are_padded_with_what_does_not_count():
    spec = TaskSpec(name="tags", loss="cross_entropy")
    items = [{"x": torch.tensor([1, 2, 3]), "labels": torch.tensor([0, 1, 0])}, {"x": [4], "labels": [1]}]
    data = UniversalDataModule(spec, items, items)
    batch = data.collate(items)
    assert batch["x"].tolist() == [[1, 2, 3], [4, 0, 0]] and batch["labels"][1].tolist() == [1, -100, -100]
    assert data.num_items(batch) == 4
    logits = torch.randn(2, 3, 5)
    alone = spec.summed_loss(logits[1:, :1], batch["labels"][1:, :1]) + spec.summed_loss(
        logits[:1], batch["labels"][:1]
    )
    assert spec.summed_loss(logits, batch["labels"]) == pytest.approx(alone.item())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: SPEC.summed_loss(torch.zeros(4, 1), torch.zeros(4)), r"shape \[4\], not \[4, 1\]"),
        (lambda: UniversalDataModule(SPEC, TRAIN, None), "val_data has no items"),
        (lambda: dataclasses.replace(SPEC, loss="model"), "metrics of sums need loss cross_entropy or mse"),
        (lambda: UniversalDataModule(SPEC, [], VAL), "train_data has no items"),
        (lambda: UniversalDataModule(SPEC, TRAIN, VAL).collate([([0.0], [1.0]), ([0.0], [1.0, 2.0])]), "one length"),
    ],
)
def test_data_that_cannot_work_are_a_sentence(call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        call()


def test_a_batch_of_which_nothing_counts_costs_no_score():
    spec = TaskSpec(name="tags", loss="cross_entropy", metrics={"right": lambda out, y: (out.argmax(-1) == y).sum()})
    model, x, labels = spec.with_loss(nn.Linear(3, 5)).eval(), torch.ones(4, 3), torch.tensor([1, 1, -100, -100])
    data = UniversalDataModule(spec, TRAIN, list(zip(x, labels, strict=True)), batch_size=2)
    with torch.no_grad():
        logits = model.model(x[:2])
    expected = {"loss": F.cross_entropy(logits, labels[:2]).item(), "right": (logits.argmax(-1) == 1).sum().item() / 2}
    assert data.evaluate(Predictor(model, OneOf([]), {})) == pytest.approx(expected)


class OneOf(Backend):
    """Of process 0, whose part in an evaluation goes into `told`, or of process 1, which reads it there."""

    def __init__(self, told: list, rank: int = 0, world_size: int = 1) -> None:
        self.told, self.rank, self.world_size, self.device = told, rank, world_size, torch.device("cpu")

    def autocast(self):
        return contextlib.nullcontext()

    def broadcast(self, value):
        return self.told[0] if self.rank else self.told.append(value) or value

    def sum(self, value):
        return value + self.told[1] if self.rank else self.told.append(value) or value


def test_a_process_for_which_no_validation_batch_is_left_has_the_same_scores():
    model, data, told = SPEC.with_loss(line()).eval(), UniversalDataModule(SPEC, TRAIN, VAL), []
    first, second = (data.evaluate(Predictor(model, OneOf(told, rank, 2), {})) for rank in (0, 1))
    assert first == second and first.keys() == {"loss", "right"}


def test_the_best_epoch_is_trained_and_finite(make_run_folder):
    losses = [(0, 0.1), (4, 0.5), (8, float("nan")), (12, 0.4), (16, 0.4)]
    folder = make_run_folder("run", [{"step": s, "split": "val", "loss": v} for s, v in losses])
    tracker = MetricsTracker(folder, steps_per_epoch=4)
    assert tracker.get_best_epoch("loss", "min") == 3 and tracker.get_best_epoch("loss", "max") == 1
    assert tracker.get_best_epoch("accuracy", "max") is None


def test_a_database_that_fails_costs_no_result(settings, tmp_path, capsys):
    (tmp_path / "broken.db").write_text("this is no database at all")
    results = Trainer(line, None, dataclasses.replace(settings, max_steps=2, db="broken.db"), SPEC).train(TRAIN, VAL)
    assert (tmp_path / results["checkpoint_path"]).exists() and "broken.db cannot be used" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_in_its_folder(settings, tmp_path):
    settings = dataclasses.replace(settings, run_dir=tmp_path / "cut", save_every=2)
    whole = Trainer(line, None, dataclasses.replace(settings, run_dir=tmp_path / "whole"), SPEC).train(TRAIN, VAL)

    def crash(trainer, row):
        if row["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(line, None, settings, SPEC, hooks=[crash]).train(TRAIN, VAL)
    assert read_json(tmp_path / "cut" / "run.json")["state"] == "failed"
    assert Trainer(line, None, settings, SPEC).train(TRAIN, VAL)["final_loss"] == whole["final_loss"]
