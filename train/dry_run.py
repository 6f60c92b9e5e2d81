"""What --dry_run and --benchmark of the language scripts do in place of training."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from train.engine import Trainer
from train.engine.precision import synchronize
from train.engine.run_folder import default_run_dir, write_json
from train.engine.summary import peak_memory

LENGTHS = (512, 1024, 2048, 4096, 8192)
WARM_UP, RUNS, SECONDS_PER_LENGTH = 3, 10, 20.0


def _forward_and_backward(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    with trainer.backend.autocast():
        losses = trainer.inner(**batch)
    losses["loss"].backward()
    trainer.inner.zero_grad()
    return losses


def dry_run(trainer: Trainer, samples: int) -> None:
    """Print what `samples` items of real text look like on their way through the model, and what they take."""
    backend, task, say = trainer.backend, trainer.task, trainer.book.say
    trainer.inner.to(backend.device)
    batch = backend.move(task.collate([task.train[i] for i in range(samples)]))
    for name, value in batch.items():
        say(f"{name:<11} {list(value.shape)} {value.dtype}")
    with torch.no_grad(), backend.autocast():
        logits = trainer.inner(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
    say(f"logits      {list(logits.shape)} {logits.dtype}")
    del logits
    losses = _forward_and_backward(trainer, batch)
    say("losses      " + "  ".join(f"{name}={value.item():.4f}" for name, value in losses.items()))
    say(f"memory      {peak_memory(backend.device) / 2**30:.2f} GiB at most; a training step as planned:")
    say(*trainer.plan.lines()[-1:])


def time_lengths(trainer: Trainer) -> None:
    """Time forward and backward of one row of random tokens at each length; the table goes into benchmark.json too."""
    backend, say, model = trainer.backend, trainer.book.say, trainer.inner.to(trainer.backend.device)
    rows = []
    say("| tokens | ms | tokens/s | peak memory GiB |", "|---|---|---|---|")
    for length in LENGTHS:
        ids = torch.randint(model.config.vocab_size, (1, length), device=backend.device)
        times: list[float] = []
        deadline = time.perf_counter() + SECONDS_PER_LENGTH
        while len(times) < WARM_UP + RUNS and (len(times) <= WARM_UP or time.perf_counter() < deadline):
            synchronize(backend.device)
            started = time.perf_counter()
            _forward_and_backward(trainer, {"input_ids": ids, "labels": ids})
            synchronize(backend.device)
            times.append(time.perf_counter() - started)
        seconds = median(times[WARM_UP:])
        rows.append({
            "tokens": length, "ms": 1e3 * seconds, "tokens_per_second": length / seconds,
            "peak_memory_bytes": peak_memory(backend.device), "runs": len(times) - WARM_UP,
        })  # fmt: skip
        gib = rows[-1]["peak_memory_bytes"] / 2**30
        say(f"| {length} | {1e3 * seconds:.1f} | {length / seconds:,.0f} | {gib:.2f} |")
    folder = trainer.config.run_dir or default_run_dir()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "benchmark.json", {"precision": backend.precision, "device": str(backend.device), "rows": rows})
    say(f"written to {folder / 'benchmark.json'}")
