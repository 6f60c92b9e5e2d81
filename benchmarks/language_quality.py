"""Bits per byte of the language benchmark's models at equal parameters, tokens and trials of the learning rate.

Every model is trained by the loop below on the same windows in the same order (of the standard library's source, see
`tasks.text`): AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices), a tenth of the run as warm-up, then a cosine to
a tenth of the rate, gradients clipped at norm 1. Short runs under a seed of their own choose each model's rate from the
same list; long runs at that rate, one per seed, are what is compared. A seed fixes both the weights and the order, so
differences to the TEN are paired by seed; their 95 % interval is Student's.

Finished runs are kept in a csv file, and a run that is found there is not repeated: an interrupted comparison goes on
where it was. Take another file after a change of the code.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.language_peers import build_model, count_parameters
from benchmarks.language_speed import Device, Row, build_all
from models.ten import TENConfig
from tasks.text import TextTask

SWEEP_SEED = 1000
WARMUP, LEAST_LR, CLIP, WEIGHT_DECAY = 0.1, 0.1, 1.0, 0.1
EIGENVALUE_LR = 0.1  # share of the rate that TEN's eigenvalues learn at, as in train/engine/optim.py
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom, from 1
MAX_SEEDS = len(STUDENT_975) + 1


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    base: TENConfig  # the TEN whose parameters all models have; its max_seq_len is the length of a window
    tokenizer: str
    batch_size: int  # windows
    device: Device
    threads: int
    tiny: bool = False

    def task(self) -> TextTask:
        if self.tiny:
            return TextTask.tiny(seq_len=self.base.max_seq_len)
        return TextTask(
            tokenizer=self.tokenizer,
            vocab_size=self.base.vocab_size,
            seq_len=self.base.max_seq_len,
            eval_items=64,
            verbose=False,
        )


@dataclass(frozen=True)
class Run:
    peer: str
    lr: float
    seed: int
    tokens: int

    def key(self, recipe: Recipe) -> Row:
        """What tells this run from others in the csv file."""
        shape = recipe.base
        return {
            "peer": self.peer,
            "lr": f"{self.lr:g}",
            "seed": str(self.seed),
            "tokens": str(self.tokens),
            "tokenizer": recipe.tokenizer,
            "shape": f"{shape.num_layers} x {shape.d_model}",
            "batch": f"{recipe.batch_size} x {shape.max_seq_len}",
        }


# -------------------------------------------------------------------------------------------------------------- one run


class Predict:
    """What `TextTask.evaluate` asks for, in one process."""

    def __init__(self, model: nn.Module, device: Device) -> None:
        self.model, self.device = model.eval(), device

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.device.autocast():
            return self.model(**{name: value.to(self.device.name) for name, value in batch.items()})

    def share(self, num_batches: int) -> list[int]:
        return list(range(num_batches))

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        return sums


def train(run: Run, recipe: Recipe) -> Row:
    """One run from its first weights to its score."""
    if recipe.device.name == "cpu":
        torch.set_num_threads(recipe.threads)
    task = recipe.task()
    model = build_model(run.peer, recipe.base, recipe.base.max_seq_len, seed=run.seed).to(recipe.device.name).train()
    optimizer = make_optimizer(model)
    num_steps = max(1, run.tokens // (recipe.batch_size * recipe.base.max_seq_len))
    feed = batches(task, recipe.batch_size, run.seed)
    start = time.perf_counter()
    for step in range(num_steps):
        batch = {name: value.to(recipe.device.name) for name, value in next(feed).items()}
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * run.lr * schedule(step, num_steps)
        with recipe.device.autocast():
            loss = model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    recipe.device.synchronize()
    seconds = time.perf_counter() - start
    scores = task.evaluate(Predict(model, recipe.device))
    seen = num_steps * recipe.batch_size * recipe.base.max_seq_len
    return {
        "parameters": str(count_parameters(model)),
        "bits_per_byte": f"{scores['bits_per_byte']:.5f}",
        "seconds": f"{seconds:.1f}",
        "tokens_per_s": f"{seen / seconds:.1f}",
    }


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    eigenvalues = set(model.fp32_parameters()) if hasattr(model, "fp32_parameters") else set()
    named = list(model.named_parameters())
    groups = [
        ([p for n, p in named if p.ndim >= 2 and n not in eigenvalues], WEIGHT_DECAY, 1.0),
        ([p for n, p in named if p.ndim < 2 and n not in eigenvalues], 0.0, 1.0),
        ([p for n, p in named if n in eigenvalues], 0.0, EIGENVALUE_LR),
    ]
    groups = [{"params": p, "weight_decay": decay, "share": share} for p, decay, share in groups if p]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def schedule(step: int, num_steps: int) -> float:
    """Share of the rate: up in a line, then down in half a cosine."""
    warmup = max(1, round(WARMUP * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return LEAST_LR + (1 - LEAST_LR) * 0.5 * (1 + math.cos(math.pi * done))


def batches(task: TextTask, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Training windows in an order that the seed fixes, each once per pass."""
    order = torch.Generator().manual_seed(seed)
    while True:
        windows = torch.randperm(len(task.train), generator=order).tolist()
        for start in range(0, len(windows) - batch_size + 1, batch_size):
            yield task.collate([task.train[i] for i in windows[start : start + batch_size]])


# ------------------------------------------------------------------------------------------------------------ many runs


class Ledger:
    """Rows of finished runs, in a csv file if there is one."""

    def __init__(self, path: Path | None, recipe: Recipe, facts: Row) -> None:
        self.path, self.recipe, self.facts = path, recipe, facts
        self.rows: list[Row] = []
        if path is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def find(self, run: Run) -> Row | None:
        key = run.key(self.recipe).items()
        return next((row for row in self.rows if key <= row.items()), None)

    def add(self, run: Run, result: Row) -> None:
        row = run.key(self.recipe) | result | self.facts
        self.rows.append(row)
        if self.path is not None:
            is_new = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(row))
                if is_new:
                    writer.writeheader()
                writer.writerow(row)


def run_all(runs: list[Run], ledger: Ledger, jobs: int, say: Callable[[str], None]) -> dict[Run, float]:
    """Bits per byte of every run, `jobs` of them side by side; infinite where training came to nothing."""
    recipe = ledger.recipe

    def finished(run: Run, row: Row) -> None:
        ledger.add(run, row)
        say(f"{run.peer} lr {run.lr:g} seed {run.seed}: {row['bits_per_byte']} bits per byte, {row['seconds']} s")

    todo = [run for run in runs if ledger.find(run) is None]
    if jobs == 1:
        for run in todo:
            finished(run, train(run, recipe))
    elif todo:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(train, run, recipe): run for run in todo}
            for future in as_completed(futures):
                finished(futures[future], future.result())
    scores = {run: float(ledger.find(run)["bits_per_byte"]) for run in runs}
    return {run: score if math.isfinite(score) else math.inf for run, score in scores.items()}


def compare(
    peers: Iterable[str],
    rates: list[float],
    seeds: list[int],
    tokens: int,
    sweep_tokens: int,
    ledger: Ledger,
    jobs: int,
    say: Callable[[str], None] = print,
) -> Iterator[Row]:
    """A row for each model, then one for each baseline. The first model is what the others are compared with."""
    recipe = ledger.recipe
    recipe.task()  # tokenizes once, before several processes would
    models, notes = build_all(peers, recipe.base, recipe.device, recipe.base.max_seq_len)
    peers = list(models)
    sweeps = {name: [Run(name, lr, SWEEP_SEED, sweep_tokens) for lr in rates] for name in peers}
    swept = run_all([run for runs in sweeps.values() for run in runs], ledger, jobs, say)
    best = {name: min(runs, key=swept.__getitem__).lr for name, runs in sweeps.items()}
    runs = {name: [Run(name, best[name], seed, tokens) for seed in seeds] for name in peers}
    # Seed by seed, so that what an interruption leaves can be compared.
    scores = run_all([run for some in zip(*runs.values(), strict=True) for run in some], ledger, jobs, say)
    by_seed = {name: torch.tensor([scores[run] for run in runs[name]], dtype=torch.float64) for name in peers}
    for name in peers:
        differences = by_seed[name] - by_seed[peers[0]]
        at_edge = len(rates) > 2 and best[name] in (min(rates), max(rates))
        yield {
            "peer": name,
            "parameters": ledger.find(runs[name][0])["parameters"],
            "lr": f"{best[name]:g}",
            "bits_per_byte": f"{by_seed[name].mean():.4f}",
            "sd": f"{by_seed[name].std():.4f}" if len(seeds) > 1 else "-",
            "difference": f"{differences.mean():+.4f}",
            "interval_95": interval(differences),
            "seeds": str(len(seeds)),
            "note": "the best rate lies at an end of the list" if at_edge else "",
        }
    empty = dict.fromkeys(("parameters", "lr", "bits_per_byte", "sd", "difference", "interval_95", "seeds"), "-")
    for name, reason in notes.items():
        yield {"peer": name, **empty, "note": reason}
    for name, value in recipe.task().baselines().items():
        yield {"peer": name, **empty, "bits_per_byte": f"{value:.4f}", "note": "baseline"}


def interval(differences: Tensor) -> str:
    """Student's 95 % interval of the mean of [n]."""
    n = len(differences)
    if n < 2:
        return "-"
    mean, half = differences.mean(), STUDENT_975[n - 2] * differences.std() / math.sqrt(n)
    return f"{mean - half:+.4f} … {mean + half:+.4f}"
