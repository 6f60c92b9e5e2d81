"""The same numbers on every place that keeps rows."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from wandb.proto import wandb_internal_pb2

from train.engine.metrics import Meter, Stopwatch, read_rows


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log (32 KiB blocks; crc, length, kind), the container of an offline .wandb file."""
    block, header = 32768, struct.Struct("<IHB")
    at, record = header.size, b""  # the file's own header happens to have a record header's size
    while at + header.size <= len(data):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        record += data[at + header.size : at + header.size + length]
        at += header.size + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_rows(log: Path) -> list[dict]:
    """What was logged, from the .wandb file of an offline part."""
    rows = []
    for data in log_records(log.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


def offline_history(run_dir: Path) -> list[dict]:
    (log,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return wandb_rows(log)


def as_on_wandb(row: dict) -> dict:
    return {"step": row["step"], **{f"{row['split']}/{k}": v for k, v in row.items() if k not in ("step", "split")}}


def test_wandb_offline_tensorboard_and_csv_hold_the_rows_of_metrics_jsonl(make_trainer, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trainer = make_trainer(max_steps=4, wandb="offline", tensorboard=True)
    trainer.train()
    rows = read_rows(trainer.run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 1, 2, 2, 3, 3, 4, 4]

    assert offline_history(trainer.run_dir) == [as_on_wandb(row) for row in rows]

    with (trainer.run_dir / "metrics.csv").open() as file:
        table = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    assert table == [{k: str(v) for k, v in row.items()} for row in rows]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trainer.run_dir / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in rows if r["split"] == "train"]


def test_a_row_is_the_mean_of_its_good_steps():
    meter = Meter(torch.device("cpu"))
    for loss, bad in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        meter.add({"loss": torch.tensor(loss)}, torch.tensor(loss), torch.tensor(7), torch.tensor(bad))
    half_way = Meter(torch.device("cpu"))
    half_way.load_state_dict(meter.state_dict())
    for one in (meter, half_way):
        assert one.read(lambda t: t) == {"loss": 2.0, "grad_norm": 2.0, "items": 14.0, "skipped": 1}
    meter.add({"loss": torch.tensor(5.0)}, torch.tensor(1.0), torch.tensor(1), torch.tensor(0.0))
    assert meter.read(lambda t: t)["loss"] == 5.0


def test_the_stopwatch_adds_up(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("train.engine.metrics.time.perf_counter", lambda: next(now))
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with clock("forward"):
            pass
    clock.add("evaluation", 1.5)
    assert clock.collect() == {"forward": 5.0, "evaluation": 1.5}
