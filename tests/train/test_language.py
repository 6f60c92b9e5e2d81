"""train/nano.py from the command line: what a run leaves behind, and what bad input is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.ten import TEN
from train.engine.metrics import read_rows
from train.engine.run_folder import read_json

ROOT = Path(__file__).resolve().parents[2]
TINY = "accelerate launch train/nano.py --tiny --wandb off --cpu --run_dir run"


def test_a_run_leaves_everything_and_its_sample_can_be_had_again(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "nano.py")]
    flags = ["--tiny", "--max_steps", "8", "--run_dir", "run", "--ema_decay", "0.5", "--wandb", "off", "--cpu"]
    done = subprocess.run([*launch, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    for said in ("precision ", "parameters  23,168", "loss=", " ce=", " energy=", " lr=", "matmul ceiling", "MFU n/a"):
        assert said in done.stdout, said
    results, about = read_json(run / "results.json"), read_json(run / "run.json")
    assert about["state"] == "finished" and len(about["data"]["corpus_sha256"]) == 64
    assert {"loss", "perplexity", "bits_per_byte"} == set(results["final"])
    assert {"token_unigram", "byte_unigram", "xz", "uniform"} == set(results["report"]["baselines"])
    for row in read_rows(run / "metrics.jsonl"):
        if row["split"] == "train":
            assert row["loss"] == pytest.approx(row["ce_loss"] + 0.01 * row["energy_loss"], rel=1e-5)

    sampled = subprocess.run(
        [sys.executable, str(ROOT / "train" / "sample.py"), "run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert sampled.returncode == 0, sampled.stderr
    assert TEN.from_pretrained(run / "checkpoints" / "last").config.vocab_size == 257
    assert sampled.stdout == (run / "samples" / "step-00000008.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--data nowhere.txt", "nowhere.txt"),
        ("--data short.txt --seq_len 4096", "one sequence of seq_len 4,096"),
        ("--data empty.txt", "empty.txt"),
        ("--data latin.txt", "UTF-8"),
        ("--vocab_size 100", "the tokenizer has 257 tokens and the model only 100 rows"),
        ("--config huge", "--config must be one of nano"),
        ("--lr -1 --batch_size 0", "--lr must be more than 0"),
        ("--run_dir empty.txt/run", "cannot be written"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(run_command, tmp_path, flags, sentence):
    (tmp_path / "short.txt").write_text("a few words\nand a second line\n" * 8)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    status, output = run_command(f"{TINY} {flags}")
    assert status == 2 and sentence in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


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
