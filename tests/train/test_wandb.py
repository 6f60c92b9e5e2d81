"""What a W&B run holds, read back from its offline file: for every family each row and each part of its loss."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from tests.train.test_metrics import offline_history
from train.engine.logbook import Logbook
from train.engine.metrics import read_rows
from train.engine.run_folder import read_json
from train.engine.snapshot import Progress
from train.molecular_epochs import PARTS

TINY = "--tiny --max_steps 2 --log_every 1 --eval_every 1 --cpu --wandb offline --db off"
# Script, its flags, and the parts of the loss that it must tell apart.
FAMILIES = {
    "language": ("nano", "--use_hten --energy_reg_weight 0.05", {"loss", "ce_loss", "energy_loss"}),
    "maze": ("maze", "--models poh --rollout_mazes 0 --route_ent_weight 5e-4", {"loss", "ce_loss", "route_entropy"}),
    "arc": ("encoder_decoder", "--no-tensorboard", {"loss", "ce_loss"}),
    "molecular": ("molecular", "", set(PARTS)),
}


def flat(row: dict) -> dict:
    return {"step": row["step"], **{f"{row['split']}/{k}": v for k, v in row.items() if k not in ("step", "split")}}


@pytest.fixture(autouse=True)
def _no_say_of_the_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offline_run_holds_the_rows_of_metrics_jsonl_and_every_part_of_the_loss(
    family, run_command, monkeypatch, tmp_path
):
    for drawn in ("draw_spectrum", "draw_energy"):
        monkeypatch.setattr(f"train.pictures.{drawn}", lambda *args: None)
    monkeypatch.setattr("train.engine.summary.plot_curves", lambda *args: None)
    # Absolute: the service behind wandb outlives a run, and stays in the folder where this process began its first one.
    run, (script, flags, parts) = tmp_path / "run", FAMILIES[family]
    status, said = run_command(f"accelerate launch train/{script}.py {TINY} {flags} --run_dir {run}")
    assert status == 0, said
    (folder,) = [file.parent for file in (*run.glob("run.json"), *run.glob("*/run.json"))]
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    assert offline_history(folder) == [flat(row) for row in rows]
    trained = [row for row in rows if row["split"] == "train"]
    assert all(parts <= row.keys() for row in trained), trained[0].keys()
    assert {"lr", "items_per_second", "grad_norm"} <= trained[0].keys()


def test_a_resumed_run_keeps_its_id_and_no_step_is_dropped(make_trainer, tmp_path):
    class Interrupt:
        def __call__(self, trainer, row):
            if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"max_steps": 4, "log_every": 1, "eval_every": 2, "wandb": "offline"}
    cut = make_trainer(hooks=[Interrupt()], **settings)
    with pytest.raises(SystemExit):
        cut.train()
    whole = make_trainer(**settings)
    whole.train()
    assert read_json(whole.run_dir / "run.json")["state"] == "finished"
    parts = sorted((whole.run_dir / "wandb").glob("offline-run-*"), key=lambda part: part.stat().st_mtime)
    history = []
    for number, part in enumerate(parts):
        (tmp_path / str(number) / "wandb").mkdir(parents=True)
        part.rename(tmp_path / str(number) / "wandb" / part.name)
        history += offline_history(tmp_path / str(number))
    assert len(parts) == 2 and len({part.name.rpartition("-")[2] for part in parts}) == 1  # which is the id
    assert history == [flat(row) for row in read_rows(whole.run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("is_main", [True, False])
def test_only_process_0_has_a_wandb_run(make_trainer, tmp_path, monkeypatch, is_main):
    trainer = make_trainer(wandb="offline")
    begun = []
    monkeypatch.setattr(
        "train.engine.logbook.WandbRun", lambda *args: begun.append(args) or SimpleNamespace(id="x", close=lambda: None)
    )
    backend = SimpleNamespace(is_main=is_main, device=trainer.backend.device)
    book = Logbook(trainer.config, backend, "items")
    book.open(tmp_path, Progress())
    book.close()
    assert len(begun) == is_main
