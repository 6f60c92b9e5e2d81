"""A watched run that is sound is found flat, and whatever grows in one that isn't is named."""

from __future__ import annotations

import mmap
import re
import sys

import psutil
import pytest

from tests import endurance
from tests.endurance import draw, drift, problems, sample, table, watch

FOR_TOYS = dict(max_steps=60, eval_every=2, log_every=2, ema_decay=0.5)


class Leak:
    """A hook of the trainer that takes a sample, and keeps what it should not."""

    def __init__(self, what: str) -> None:
        self.what, self.samples, self.kept = what, [], []

    def __call__(self, trainer, row):
        if self.what == "memory":
            self.kept.append(mmap.mmap(-1, 2**24))  # of its own: an array may lie in memory that others gave back
            self.kept[-1].write(b"\1" * 2**24)
        elif self.what == "handles":
            self.kept.append((trainer.run_dir / "config.json").open())
        self.samples.append({"seconds": row["elapsed"]} | sample(psutil.Process(), trainer.run_dir))


@pytest.mark.parametrize("what", ["", "memory", "handles"])
def test_a_toy_that_leaks_is_caught_and_one_that_does_not_is_not(make_trainer, what):
    leak = Leak(what)
    make_trainer(hooks=[leak], **FOR_TOYS).train()
    # Its speed is that of a machine on which other tests run.
    found = [p for p in problems({"samples": leak.samples, "problem": ""}) if not p.startswith("speed")]
    assert found == [] if not what else len(found) == 1 and what in found[0], found


def flat(n: int) -> dict[str, float]:
    """Sample n of a run in which nothing drifts."""
    held = {"rss": 1e9, "handles": 20, "threads": 4, "children": 1, "checkpoints": 4}
    return {"seconds": n, "step": 10 * n, "cpu": n, "checkpoint_bytes": 1e6, "other_bytes": 1e3 * n, **held}


@pytest.mark.parametrize(
    ("drifts", "words"),
    [
        (lambda n: {}, None),
        (lambda n: {"rss": 1e9 * (1 + 0.1 * (n < 20))}, None),  # of the warm-up
        (lambda n: {"rss": 1e9 + 2e6 * n}, r"memory grew by 3\.8 %, 114\.4 MiB a minute"),
        (lambda n: {"handles": 20 + n // 10}, "2 more handles"),
        (lambda n: {"threads": 4 + n // 40}, "1 more threads"),
        (lambda n: {"children": n // 40}, "1 more children"),
        (lambda n: {"cpu": n + max(0, n - 40)}, "speed fell to 50 %"),
        (lambda n: {"step": 400}, "speed fell to 0 %"),
        (lambda n: {"checkpoints": 6 if n == 30 else 4}, "6 checkpoints at once, not 5"),
    ],
)
def test_what_drifts_is_named(drifts, words):
    found = problems({"samples": [flat(n) | drifts(n) for n in range(60)], "problem": ""})
    assert found == [] if words is None else len(found) == 1 and re.fullmatch(words, found[0]), found


STAND_IN = """
import json, pathlib, signal, sys, time
run_dir, way = pathlib.Path(sys.argv[1]), sys.argv[2]
(run_dir / "checkpoints" / "step-1").mkdir(parents=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN if way == "deaf" else lambda *about: sys.exit(75))
for step in range(1, 10**6):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "split": "train"}) + chr(10))
    if way == "ends" and step == 5:
        sys.exit("error: the disk is full")
    time.sleep(0.001)
"""


def test_runs_are_watched_until_their_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(endurance, "PATIENCE", 0.2)
    ways = ("sound", "deaf", "ends")
    runs = {way: ([sys.executable, "-c", STAND_IN, str(tmp_path / way), way], tmp_path / way) for way in ways}
    seen = watch(runs, tmp_path, seconds=0.5)
    samples = seen["sound"]["samples"]
    assert not seen["sound"]["problem"] and len(samples) >= 9 and drift(samples)["handles"] == 0
    assert samples[-1]["step"] > samples[0]["step"] > 0 and samples[-1]["checkpoints"] == 1
    assert "status -9" in problems(seen["deaf"])[0] and "status 1: error: the disk is full" in problems(seen["ends"])[0]
    assert table(seen).count("\n") == 1 + len(runs)
    draw(seen, tmp_path / "endurance.png")
    assert (tmp_path / "endurance.png").stat().st_size > 1000
