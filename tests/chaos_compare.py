"""Whether two runs left the same behind: the folders of a run that was never disturbed, and of one that was."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.train.test_metrics import as_on_wandb, wandb_rows
from train.engine.experiments import ExperimentDB
from train.engine.metrics import read_rows
from train.engine.run_folder import read_json

# What depends on the clock, on the machine's other work, or on which process it was.
PASSING = {
    *("items_per_second", "elapsed", "seconds", "seconds_by_phase", "spent", "metrics_bytes", "wandb_id", "command"),
    *("ceiling_items_per_second", "mfu", "peak_memory_bytes", "planned_memory_bytes"),
}


def lasting(value: Any) -> Any:
    """`value` without what is passing; NaN as a word, for it is not equal to itself."""
    if isinstance(value, dict):
        return {str(name): lasting(v) for name, v in value.items() if name not in PASSING}
    if isinstance(value, (list, tuple)):
        return [lasting(v) for v in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything in nested containers; tensors as their bytes, so that NaN equals NaN."""
    if isinstance(value, dict):
        for key, v in value.items():
            yield from tensors_of(v, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from tensors_of(v, f"{name}.{i}")
    elif isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        yield name, (str(value.dtype), list(value.shape), flat.numpy().tobytes())
    else:
        yield name, value


def contents(file: Path) -> dict[str, Any]:
    """A checkpoint's file by the names of what is in it."""
    if file.suffix == ".safetensors":
        return dict(tensors_of(load_file(file)))
    if file.suffix == ".pt":
        return dict(tensors_of(torch.load(file, map_location="cpu", weights_only=True)))
    return dict(tensors_of(lasting(read_json(file))))


def checkpoint_differences(whole: Path, cut: Path) -> list[str]:
    """Weights, averages, optimizer, generators, sums and tables of every checkpoint that has a name."""
    found = []
    links = {link.name for run in (whole, cut) for link in (run / "checkpoints").iterdir() if link.is_symlink()}
    for name in sorted(links):
        a, b = ((run / "checkpoints" / name) for run in (whole, cut))
        if not (a.exists() and b.exists()) or a.resolve().name != b.resolve().name:
            found.append(f"checkpoints/{name} is another step's, or missing")
            continue
        files = {f.name for folder in (a, b) for f in folder.iterdir() if f.is_file()} - {"manifest.json"}
        for file in sorted(files):
            if not ((a / file).exists() and (b / file).exists()):
                found.append(f"checkpoints/{name}/{file} is missing")
                continue
            mine, theirs = contents(a / file), contents(b / file)
            unequal = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
            found += [f"checkpoints/{name}/{file}: {', '.join(unequal[:3])}"] if unequal else []
    return found


def differences(whole: Path, cut: Path, database: bool = True) -> list[str]:
    """What differs between two run folders, or sub-runs below them, in words; nothing where nothing was lost."""
    found = []
    runs = {f.parent.relative_to(root) for root in (whole, cut) for f in run_files(root, "run.json")}
    for run in sorted(runs):
        a, b = whole / run, cut / run
        if not ((a / "results.json").exists() and (b / "results.json").exists()):
            found.append(f"{run}: not finished")
            continue
        here = [] if _rows(a) == _rows(b) else ["metrics.jsonl has other rows"]
        here += checkpoint_differences(a, b)
        here += own_differences(b, database)
        if read_json(b / "run.json")["state"] != "finished":
            here.append("run.json does not say that it is finished")
        if leftover := [f.name for f in (b / "checkpoints").iterdir() if f.name.startswith(".")]:
            here.append(f"checkpoints/ holds what a killed save left: {', '.join(leftover)}")
        found += [f"{run}: {what}" for what in here]
    for file in sorted({f.relative_to(root) for root in (whole, cut) for f in run_files(root, "results.json")}):
        mine, theirs = (_text(root / file, root) for root in (whole, cut))
        found += [] if mine == theirs else [f"{file} differs: {_first_difference(mine, theirs)}"]
    return found


def own_differences(run: Path, database: bool) -> list[str]:
    """Where a run's table and its part of the database are not its metrics.jsonl."""
    rows, found = read_rows(run / "metrics.jsonl"), []
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    if table != [{k: str(v) for k, v in row.items()} for row in rows]:
        found.append("metrics.csv is not metrics.jsonl")
    if database:
        path = next(folder for folder in (run, *run.parents) if (folder / "experiments.db").exists()) / "experiments.db"
        with ExperimentDB(path) as db:
            if lasting(db.rows(run)) != lasting(rows):
                found.append("the database has other rows")
            if db.get_run(run)["state"] != "finished":
                found.append("the database does not know that it is finished")
    return found


def run_files(root: Path, name: str) -> list[Path]:
    """Files of runs by that name, and not the copies in their checkpoints."""
    return [file for file in root.rglob(name) if "checkpoints" not in file.relative_to(root).parts]


def _rows(run: Path) -> list[Any]:
    return lasting(read_rows(run / "metrics.jsonl"))


def _text(file: Path, root: Path) -> str:
    """results.json without what is passing, and without where it lies."""
    if not file.exists():
        return "missing"
    return json.dumps(lasting(read_json(file)), indent=1, sort_keys=True).replace(str(root), "RUN")


def _first_difference(a: str, b: str) -> str:
    pairs = zip([*a.splitlines(), "the end"], [*b.splitlines(), "the end"], strict=False)
    return next((f"{x.strip()} -> {y.strip()}" for x, y in pairs if x != y), "one is longer")


def wandb_differences(root: Path) -> list[str]:
    """Where a run, or a sub-run, is not one on W&B, or its newest offline part has not each row once, in order."""
    found = []
    for file in run_files(root, "metrics.jsonl"):
        run, rows = file.parent, read_rows(file)
        logs = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
        if len({log.name for log in logs}) != 1:  # run-ID.wandb
            found.append(f"{run.name} is {len({log.name for log in logs})} runs on W&B")
            continue
        if lasting(wandb_rows(logs[-1])) != lasting([as_on_wandb(row) for row in rows]):
            found.append(f"{run.name} has other rows on W&B")
    return found
