"""The molecular scripts from the command line to their files, on real dynamics of some femtoseconds."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil

import pytest
import torch

from train import temper
from train.engine.run_folder import read_json, write_json
from train.molecular import MoleculeRun, build, main, preset_of, task_of, with_warmup
from train.molecular_epochs import PARTS, improvement, is_logged, warning_signs

TINY = ["--tiny", "--max_steps", "6", "--eval_every", "3", "--ema_decay", "0.5", "--cpu", "--wandb", "off"]
NAMED = "checkpoints/molecular_pt_aa_300_450/molecular_pt_300_450.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("molecular") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        results = main([*TINY, "--run_dir", str(folder)])
    return folder, results, said.getvalue()


def test_final_is_of_the_test_groups_beside_the_maps_to_beat(finished):
    folder, results, _ = finished
    final = results.final
    for name in ("gap", "acceptance", "ess_forward", "ess_inverse", "k_hat", "validity", "chirality", "phi_error"):
        assert name in final and {f"scaling_{name}", f"affine_{name}", f"plain_{name}"} <= final.keys(), name
    assert final["gap_gain"] == pytest.approx(final["scaling_gap"] - final["gap"])
    assert final["chirality"] == 1 and final["acceptance_bound"] <= final["acceptance"]
    assert results.final != results.best and read_json(folder / "results.json")["final"]["gap"] == final["gap"]
    data = read_json(folder / "run.json")["data"]
    assert (
        data["pairs"] == {"train": 12, "val": 4, "test": 8} and data["energy_calls"] > 0 and data["max_seconds"] is None
    )


def test_a_plan_counts_what_the_flow_computes(finished):
    """On tensors without data: nothing on the way may read one, which on a GPU would wait for it."""
    assert " TFLOP per step" in finished[2]


def test_the_untrained_flow_is_the_scaling_map(finished):
    folder, results, _ = finished
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["gap"] == pytest.approx(results.report["baselines"]["scaling"], rel=1e-9)


def test_it_says_what_the_original_said(finished):
    _, _, said = finished
    for words in (
        "Molecular Cross-Temperature Transport Training",
        "Transport: 300.0K → 450.0K",
        "Epoch 1/2\n  Total Loss: ",
        "  Forward  - Energy: ",
        "  Improvement from start: ",
        "  Improvement over the scaling map: ",
        "step 1/6  Loss=",
        " Fwd_E=",
        " acceptance=",
        "| scaling | ",
    ):
        assert words in said, words


def test_pictures_and_weights_bear_the_names_of_the_original(finished):
    folder, results, _ = finished
    for name in ("loss_curves", "ramachandran", "energy_validation", "free_energy", "molecules"):
        assert (folder / "plots" / f"{name}_300_450.png").stat().st_size > 10_000, name
    state = torch.load(folder / NAMED, weights_only=True)
    run = MoleculeRun(**{k: v for k, v in read_json(folder / "config.json").items() if k != "betas"})
    task = task_of(run)
    model = build(run, task)
    start = task.scores(task.mapped(model.double().transport, task.val))["gap"]
    model.load_state_dict(state)
    again = task.scores(task.mapped(model.double().transport, task.val))["gap"]
    assert again == pytest.approx(results.best["gap"], abs=1e-12) and again != start


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("train.molecular_report.Report.draw", lambda *args: None)  # seconds, and looked at elsewhere
    whole, results, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(whole, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    (copy / "results.json").unlink()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        again = main([*TINY, "--run_dir", str(copy)])
    assert again.final.keys() == results.final.keys()
    assert all(again.final[n] == value for n, value in results.final.items() if not math.isnan(value))
    assert "Epoch 2/2" in said.getvalue() and "Epoch 1/2" not in said.getvalue()
    assert "Improvement from start" in said.getvalue()  # the first epoch was read from metrics.jsonl


def test_a_run_that_goes_on_must_have_its_data(finished, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.mkdir()
    facts = read_json(finished[0] / "run.json")
    facts["data"]["ps"] *= 2
    write_json(copy / "run.json", facts)
    with pytest.raises(SystemExit):
        main([*TINY, "--run_dir", str(copy)])
    assert "was begun with 0.04 ps of every group, and there are 0.02 ps now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "launched", "sentence"),
    [
        (["--mixed_precision", "bf16"], "no", "--mixed_precision bf16: 16 bits leave energies off"),
        (["--mixed_precision", "fp16"], "no", "--mixed_precision fp16"),
        ([], "bf16", "the launch config asks for bf16"),
        (["--t_cold", "450", "--t_hot", "300"], "no", "the cold one comes first"),
        (["--groups", "2"], "no", "--groups must be at least 3"),
        (["--ns", "0", "--frame_ps", "-1"], "no", "--frame_ps must be more than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(flags, launched, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(SystemExit):
        main([*TINY, "--run_dir", str(tmp_path / "run"), *flags])
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_presets_and_warmup():
    light = preset_of(["--preset=aa_300_450_gpu_light"])
    assert (light.t_hot, light.batch_size, light.lr, light.epochs) == (450.0, 16, 5e-4, 3000)
    assert preset_of(["--preset", "aa_300_1000"]).t_hot == 1000.0
    assert with_warmup(light, steps_per_epoch=4.0).warmup_steps == 200  # 50 epochs
    assert with_warmup(MoleculeRun(epochs=200), steps_per_epoch=4.0).warmup_steps == 40  # a twentieth of 200
    assert with_warmup(light, steps_per_epoch=40.0).warmup_steps == 500


# ---- what is said, and when ------------------------------------------------------------------------------------------


def test_blocks_come_often_at_first_and_seldom_later():
    said = [epoch for epoch in range(321) if is_logged(epoch)]
    assert said == [*range(1, 11), *range(20, 101, 10), 200, 300]
    assert improvement(2.0, 0.5) == "75.00%"


def history(losses, forward=lambda k: -9.0, inverse=lambda k: -28.0, skipped=0):
    rows = [dict.fromkeys(PARTS, 0.0) | {"loss": loss, "skipped": skipped} for loss in losses]
    return [r | {"forward_energy": forward(k), "inverse_energy": inverse(k)} for k, r in enumerate(rows)]


FALLING = [0.5 * math.exp(-k / 100) + 0.02 for k in range(600)]


@pytest.mark.parametrize(
    ("rows", "sign"),
    [
        (history(FALLING), None),
        (history(FALLING[:130] + [0.4] * 30), "rising"),
        (history(FALLING[:50] + [0.9] * 30), None),  # before epoch 100 that may be
        (history([0.54] * 501), "stuck"),
        (history([0.54] * 499), None),
        (history(FALLING, lambda k: -9 - k / 100, lambda k: -28 + k / 10), "inverse exploding"),
        (history(FALLING, lambda k: -9 + k / 10, lambda k: -28 + k / 10), None),  # both: that is not the inverse alone
        (history(FALLING[:40] + [-0.2] * 20), "below its floor"),
        (history(FALLING[:40] + [-0.05] * 20), None),
        (history([0.5, math.nan]), "not finite"),
        (history([0.5], skipped=1), "not finite"),
    ],
)
def test_warning_signs_show_where_they_should_and_nowhere_else(rows, sign):
    assert list(warning_signs(rows, scaling_gap=0.55)) == ([sign] if sign else [])


# ---- tempering -------------------------------------------------------------------------------------------------------


def test_modes_of_tempering_are_compared_at_equal_energy_calls(finished, tmp_path, capsys):
    pytest.importorskip("mdtraj")
    folder = finished[0]
    flags = ["--cycles", "6", "--groups", "3", "--swap_ps", "0.002", "--temperatures", "300", "360", "450"]
    files = ["--output", str(tmp_path / "temper.json"), "--write", str(tmp_path / "cold.dcd")]
    modes = temper.main([str(folder), *flags, *files])
    assert "| flow | " in capsys.readouterr().out and (tmp_path / "temper.png").exists()
    assert (tmp_path / "cold.dcd").stat().st_size > 12 * 22 * 3  # positions of float32
    kept = read_json(tmp_path / "temper.json")["modes"]
    assert list(kept) == ["plain", "scaled", "flow"]
    budget = kept["plain"]["calls"][-1]
    assert budget == 6 * 3 * 3 * 4
    for name, of in kept.items():
        cycle = max(b - a for a, b in zip(of["calls"], of["calls"][1:], strict=False))
        assert budget <= of["calls"][-1] < budget + cycle and len(of["trips"]) == len(of["calls"])
        assert len(of["acceptance"]) == 2 and (sum(of["spent"].values()) > 0) == (name != "plain")
    # 6 steps of 4 pairs and 3 evaluations of 4, two frames each.
    assert modes["flow"]["spent"]["training"] == 2 * (6 * 4 * (1 + 3) + 3 * 4)


def test_break_even_is_where_the_lines_cross():
    flow = {"trips_per_million": 3.0, "spent": {"data": 1_000_000, "training": 1_000_000}}
    calls = temper.break_even(flow, {"trips_per_million": 1.0})
    assert calls == 3_000_000 and 3.0 * (calls - 2_000_000) == 1.0 * calls
    assert temper.break_even(flow, {"trips_per_million": 3.0}) is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--cycles", "0"], "--cycles must be more than 0"),
        (["--mode", "flow", "flow"], "once at most"),
        (["--temperatures", "300"], "needs two at least"),
        (["--write", "cold.xyz"], "frames can be written as"),
    ],
)
def test_tempering_refuses_what_cannot_be(flags, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit):
        temper.main([str(tmp_path), *flags])
    said = capsys.readouterr().err
    assert sentence in said and "holds no finished run" in said
