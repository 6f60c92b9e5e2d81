"""Two processes on the CPU stop together. (That they train as one does is in test_launchers.py.)"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from train.engine.run_folder import read_json

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy.py"


def start(run_dir: Path, *flags: str, processes: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(TOY), "--run_dir", str(run_dir), "--wandb", "off", "--mixed_precision", "no"]
    started = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT, "ACCELERATE_USE_CPU": "1"}
        env = {**os.environ, **{k: str(v) for k, v in variables.items()}}
        started.append(
            subprocess.Popen([*command, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return started


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [p.communicate(timeout=600)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), outputs[0]
    return outputs


FLAGS = ["--batch_size=8", "--micro_batch_size=2", "--optimizer=sgd", "--lr=0.1", "--warmup_steps=2"]


def test_a_signal_to_one_process_stops_both_and_resume_is_exact(tmp_path, rows):
    flags = [*FLAGS, "--ema_decay=0.5", "--log_every=2", "--eval_every=100"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    outputs = finish(start(whole, *flags, "--max_steps=40"))
    assert "2 process(es)" in outputs[0] and "step" not in outputs[1].split("warnings.warn(")[-1]
    pair = start(cut, *flags, "--max_steps=40")
    for line in pair[0].stdout:
        if line.startswith("step 2/"):
            pair[1].send_signal(signal.SIGTERM)
            break
    assert {p.wait(timeout=600) for p in pair} == {75}
    assert read_json(cut / "run.json")["state"] == "interrupted"
    stopped_at = read_json(cut / "checkpoints" / "last" / "trainer.json")["step"]
    assert 2 <= stopped_at < 40
    finish(start(cut, *flags, "--max_steps=40"))
    assert rows(cut) == rows(whole)
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = (load_file(d / "checkpoints" / "last" / name) for d in (whole, cut))
        assert all(torch.equal(a[k], b[k]) for k in a)
