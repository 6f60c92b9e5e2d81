"""train/nano.py from the command line: what a run leaves behind, and what bad input is told."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.ten import TEN
from train.engine import parse
from train.engine.metrics import read_rows
from train.engine.run_folder import read_json
from train.language import LanguageConfig, model_config

ROOT = Path(__file__).resolve().parents[2]
TINY = "accelerate launch train/nano.py --tiny --wandb off --cpu --run_dir run"


@pytest.fixture(autouse=True)
def _no_seconds_spent_on_pictures(monkeypatch):
    for name in ("draw_spectrum", "draw_energy"):
        monkeypatch.setattr(f"train.pictures.{name}", lambda *args: None)


def test_a_run_leaves_everything_and_its_sample_can_be_had_again(tmp_path, run_command):
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "nano.py")]
    flags = ["--tiny", "--max_steps", "8", "--run_dir", "run", "--ema_decay", "0.5", "--wandb", "off", "--cpu"]
    done = subprocess.run([*launch, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    for said in (
        "precision ",
        "parameters  23,168",
        "loss=",
        " ce=",
        " energy=",
        " lr=",
        "matmul ceiling",
        "MFU n/a",
        "eigen_scan runs on PyTorch",
    ):
        assert said in done.stdout, said
    results, about = read_json(run / "results.json"), read_json(run / "run.json")
    assert about["state"] == "finished" and len(about["data"]["corpus_sha256"]) == 64
    assert {"loss", "perplexity", "bits_per_byte"} == set(results["final"])
    assert {"token_unigram", "byte_unigram", "xz", "uniform"} == set(results["report"]["baselines"])
    causality = results["report"]["causality"]
    assert causality["causal"] and causality["leak"] <= causality["tolerance"] < 0.01 < causality["control_leak"]
    assert {"loss.png", "spectrum.png", "energy.png"} == {p.name for p in (run / "plots").iterdir()}
    for row in read_rows(run / "metrics.jsonl"):
        if row["split"] == "train":
            assert row["loss"] == pytest.approx(row["ce_loss"] + 0.01 * row["energy_loss"], rel=1e-5)

    status, sampled = run_command("python train/sample.py run")
    assert status == 0, sampled
    assert TEN.from_pretrained(run / "checkpoints" / "last").config.vocab_size == 257
    assert sampled == (run / "samples" / "step-00000008.txt").read_text(encoding="utf-8")


def test_where_nothing_else_fits_the_weights_are_bf16_and_learn(run_command, monkeypatch):
    """Weights and gradients of 23,168 parameters are 2 x 93 kB in fp32, and activations 160 kB."""
    monkeypatch.setattr("train.engine.plan.free_memory", lambda device: 300_000)
    monkeypatch.setattr("train.engine.plan.process_bytes", lambda device: 0)
    monkeypatch.setattr("train.engine.plan.LATER_BYTES", 0)
    status, said = run_command(f"{TINY} --max_steps 8 --batch_size 1 --lr 0.01 --warmup_steps 1 --mixed_precision no")
    assert status == 0 and "taken: --optimizer adafactor --weights bf16" in said, said
    weights = load_file("run/checkpoints/last/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    before, *_, after = (row["loss"] for row in read_rows(Path("run/metrics.jsonl")) if row["split"] == "val")
    assert after < before


def test_what_was_found_is_told_though_the_process_that_found_it_was_killed_at_the_end(run_command):
    command = f"{TINY} --max_steps 2"
    run_command(command)
    results = Path("run/results.json")
    before = read_json(results)
    results.unlink()
    run_command(command)
    assert read_json(results)["report"] == before["report"] and before["report"]["causality"]["causal"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data nowhere.txt", "nowhere.txt"),
        ("--data short.txt --seq_len 4096", "one sequence of seq_len 4,096"),
        ("--data empty.txt", "empty.txt"),
        ("--data latin.txt", "UTF-8"),
        ("--vocab_size 100", "the tokenizer has 257 tokens and the model only 100 rows"),
        ("--config larg", "--config must be one of nano, micro, small, medium, large, xlarge, not larg; the nearest"),
        ("--hten_scales 1,0,2", "hten_scales must be one or more whole numbers of at least 1"),
        ("--hten_scales 2,4,2", "hten_scales"),
        ("--hten_scales 1,two", "--hten_scales must be whole numbers with commas between"),
        ("--hten_scales 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17", "hten_scales"),
        ("--dataset imdb", "pip install datasets"),
        ("--dataset imdb --data short.txt", "--data and --dataset both name the text"),
        ("--use_8bit_optim --optimizer sgd", "--use_8bit_optim is --optimizer adamw8bit"),
        ("--lr -1 --batch_size 0", "--lr must be more than 0"),
        ("--run_dir empty.txt/run", "cannot be written"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(run_command, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it isn't installed
    (tmp_path / "short.txt").write_text("a few words\nand a second line\n" * 8)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    status, output = run_command(f"{TINY} {flags}")
    assert status == 2 and sentence in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


# The original's example commands, verbatim but for the path, and the model that each means: (layers, scales, weight).
ORIGINAL = [
    ("--config medium", 16, (1,), 0.01),
    ("--config medium --use_hten", 16, (1, 2, 4), 0.01),
    ("--config large --energy_reg_weight 0.05", 18, (1, 2, 4), 0.05),
    (
        '--config xlarge --use_hten --hten_scales "1,2,4,8,16" --energy_reg_weight 0.03 '
        "--mixed_precision --gradient_checkpointing",
        26,
        (1, 2, 4, 8, 16),
        0.03,
    ),
    ("--config xlarge --use_hten", 26, (1, 2, 4, 8), 0.02),
]


@pytest.mark.parametrize(("flags", "layers", "scales", "weight"), ORIGINAL)
def test_the_originals_commands_mean_what_they_meant(flags, layers, scales, weight):
    settings = parse(LanguageConfig, shlex.split(flags), fill=LanguageConfig.filled_in)
    model = model_config(settings, tokenizer_size=50257)
    assert (model.num_layers, model.hten_scales, model.energy_reg_weight) == (layers, scales, weight)


def test_the_originals_longest_command_trains(run_command, tmp_path):
    flags = (
        "--learning_rate 1e-3 --gradient_accumulation 2 --max_seq_len 24 --save_steps 1 --no_compile --num_workers 1"
    )
    status, output = run_command(
        f"accelerate launch train/language.py {ORIGINAL[3][0]} {flags} --selective --hten_mode hold "
        "--tiny --max_steps 1 --wandb off --cpu --output_dir run"
    )
    assert status == 0, output
    settings = read_json(tmp_path / "run" / "config.json")
    assert settings["gradient_checkpointing"] and settings["seq_len"] == 24 and settings["optimizer"] == "adamw"
    model = read_json(tmp_path / "run" / "checkpoints" / "last" / "config.json")
    assert model["hten_scales"] == [1, 2, 4, 8, 16] and model["hten_mode"] == "hold" and model["selective"]


def test_a_dry_run_shows_shapes_and_leaves_nothing(run_command, tmp_path):
    status, output = run_command(f"{TINY} --dry_run --dry_samples 3")
    assert status == 0 and "input_ids   [3, 32]" in output and "logits      [3, 32, 257]" in output
    assert "ce_loss=" in output and not (tmp_path / "run").exists()


def test_the_benchmark_flag_writes_a_table(run_command, tmp_path, monkeypatch):
    monkeypatch.setattr("train.dry_run.LENGTHS", (8, 16))
    assert run_command(f"{TINY} --benchmark")[0] == 0
    rows = read_json(tmp_path / "run" / "benchmark.json")["rows"]
    assert [row["tokens"] for row in rows] == [8, 16] and all(row["tokens_per_second"] > 0 for row in rows)


def test_too_little_memory_is_said_before_any_is_taken(run_command, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.plan.free_memory", lambda device: -(1 << 40))
    monkeypatch.setattr("models.ten.TEN.to", lambda *args: pytest.fail("the model was built"))
    status, output = run_command(f"{TINY} --weights fp32")
    assert status == 2 and "does not fit this machine" in output and "--optimizer adafactor" in output
    assert run_command(f"{TINY} --weights fp32 --plan")[0] == 1
    assert not (tmp_path / "run").exists()


def test_a_leaking_model_gets_no_score(run_command, tmp_path, monkeypatch):
    def pool_and_repeat(module, args, x):
        return x.unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1) if x.shape[1] % 2 == 0 else x

    build = TEN.__init__
    monkeypatch.setattr(
        TEN, "__init__", lambda self, c: (build(self, c), self.embedding.register_forward_hook(pool_and_repeat))[0]
    )
    status, output = run_command(f"{TINY} --max_steps 1")
    assert status == 2 and "the model sees the future" in output and "Traceback" not in output
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")


def test_a_stream_goes_on_exactly_though_its_shards_are_gone(run_command, tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "big.jsonl").write_text("".join(f'{{"text": "number {i} of many lines"}}\n' for i in range(3000)))
    stream = "accelerate launch train/nano.py --tiny --wandb off --cpu --data big.jsonl --streaming --seq_len 16"
    assert run_command(f"{stream} --run_dir run")[0] == 2  # a stream has no epochs
    steps = f"{stream} --max_steps 4 --log_every 1 --eval_every 2 --run_dir run"
    assert run_command(steps)[0] == 0
    rows = [[r.get("loss"), r["step"]] for r in read_rows(tmp_path / "run" / "metrics.jsonl")]
    (tmp_path / "run" / "results.json").unlink()
    for gone in ("run/checkpoints/step-00000004", *(tmp_path / "cache").rglob("shard-*.npy")):
        path = tmp_path / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status, output = run_command(steps)
    assert status == 0 and "resumed     after step 2 of 4" in output
    assert [[r.get("loss"), r["step"]] for r in read_rows(tmp_path / "run" / "metrics.jsonl")] == rows


def test_the_originals_loss_can_be_had(run_command, tmp_path):
    flags = "--max_steps 1 --parameterization sigmoid --energy_mode spectral --energy_reg_weight 0.05"
    status, output = run_command(f"{TINY} {flags}")
    assert status == 0, output
    row = next(r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train")
    assert row["loss"] == pytest.approx(row["ce_loss"] + 0.05 * row["energy_loss"], rel=1e-5)


def test_a_cut_run_goes_on_from_the_command_line(run_command, tmp_path):
    assert run_command(f"{TINY} --max_steps 6 --save_every 2")[0] == 0
    (tmp_path / "run" / "results.json").unlink()
    status, output = run_command(f"{TINY} --max_steps 6 --save_every 2")
    assert status == 0 and "resumed     after step 6 of 6" in output
    status, output = run_command(f"{TINY} --max_steps 6 --save_every 2 --lr 1")
    assert status == 2 and "begun with other settings (lr: 0.002 -> 1.0)" in output


@pytest.mark.slow
def test_max_minutes_keeps_its_word(tmp_path):
    started = time.monotonic()
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "nano.py")]
    flags = ["--tiny", "--max_minutes", "0.5", "--run_dir", "run", "--wandb", "off"]
    subprocess.run([*launch, *flags], cwd=tmp_path, check=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert 15 < time.monotonic() - started < 40  # accelerate's own start is not the script's
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stopped_by"] == "max_minutes"


@pytest.mark.slow
def test_two_steps_of_xlarge_in_24_gib(tmp_path):
    """All 1.2 B parameters move, on a machine without a GPU, in the memory that was planned."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "xlarge.py")]
    flags = ["--max_steps", "2", "--batch_size", "1", "--seq_len", "256", "--eval_items", "2", "--wandb", "off"]
    done = subprocess.run([*launch, *flags, "--run_dir", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "run" / "results.json")
    assert results["steps"] == 2 and results["parameters"] == pytest.approx(1.2e9, rel=0.02)
    assert results["peak_memory_bytes"] == pytest.approx(results["planned_memory_bytes"], rel=0.15)
