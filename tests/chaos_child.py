"""`chaos_child.py SCRIPT FLAGS…` runs a training script and strikes when a counted event happens; for chaos.py.

Where the strike falls is a count and never a time: the same seed kills the same run at the same place.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import train.engine.checkpoint as checkpoint
import train.engine.snapshot as snapshot
from train.engine.backend import Backend
from train.engine.checkpoint import Checkpoints
from train.engine.evaluation import Predictor
from train.engine.experiments import ExperimentDB
from train.engine.metrics import JsonlFile
from train.engine.run_folder import RunFolder
from train.engine.summary import Results
from train.engine.trainer import Trainer

# An event happens when a call of the engine has just begun, or is just over.
BEGINS = {
    "signal: before the model is built": (Trainer, "__init__"),
    "end: before results.json": (Results, "save"),
    "end: before run.json": (RunFolder, "describe"),
    "save: before the links": (Checkpoints, "_link"),
}
OVER = {
    "step: between micro-batches": (Backend, "backward"),
    "step: between optimizer and EMA": (Backend, "step"),
    "evaluation: between batches": (Predictor, "__call__"),
    "evaluation: before the hooks": (JsonlFile, "log"),
    "save: folder made": (Checkpoints, "begin"),
    "save: a part written": (torch, "save"),
    "save: weights written": (snapshot, "save_weights"),
    "save: sealed": (checkpoint, "write_json"),
    "save: between the renames": (Path, "rename"),
    "save: among the links": (Checkpoints, "_link"),
    "save: done": (Checkpoints, "seal"),
    "end: after results.json": (Results, "save"),
    "resume: state read": (snapshot.Snapshot, "read"),
    "resume: rows cut back": (JsonlFile, "cut_back"),
    "database: rows written": (ExperimentDB, "log_metrics"),
}
# The forward of any module within these calls.
WITHIN = {"step: in a forward": "step", "evaluation: in a hook": "tell_hooks"}
TORN = "row: half of it written"


@dataclass
class Aim:
    """The `number`-th time that `event` happens on `rank`, what is sent to whom, and where to say what happened.

    signals: none is SIGKILL. target: rank (this process alone), ranks (all that the launcher started, their helpers
    too), or all (and the launcher). Without an event nothing is sent, and events are counted.
    """

    said: str
    rank: int = 0
    event: str = ""
    number: int = 0
    signals: list[str] = field(default_factory=list)
    target: str = "all"

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.mine = int(os.environ.get("RANK", "0"))
        atexit.register(lambda: self.say("counts", self.counts))

    def say(self, name: str, value: Any) -> None:
        Path(self.said, f"{name}-{self.mine}.json").write_text(json.dumps(value))

    def happens(self, event: str) -> None:
        self.counts[event] += 1
        if (event, self.counts[event], self.mine) == (self.event, self.number, self.rank):
            self.say("struck", event)
            self.strike()

    def strike(self) -> None:
        me = psutil.Process()
        launcher = me.parent()
        others = [p for p in launcher.children(recursive=True) if p != me]
        struck = {"rank": [], "ranks": others, "all": [launcher, *others]}[self.target]
        for name in self.signals or ["SIGKILL"]:
            for process in [*struck, me]:  # itself last: SIGKILL leaves it no time
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.Signals[name])


def watch(aim: Aim) -> None:
    """Patch the engine so that `aim` is told of every event."""
    for events, over in ((BEGINS, False), (OVER, True)):
        for event, (owner, name) in events.items():
            setattr(owner, name, _told(getattr(owner, name), aim, event, over))
    inside: list[str] = []
    for event, name in WITHIN.items():
        setattr(Trainer, name, _inside(getattr(Trainer, name), inside, event))
    torch.nn.modules.module.register_module_forward_hook(lambda *call: aim.happens(inside[-1]) if inside else None)
    write = JsonlFile.log

    def torn(self: JsonlFile, row: dict) -> None:
        if (TORN, aim.counts[TORN] + 1, aim.mine) == (aim.event, aim.number, aim.rank):
            self._file.write(json.dumps(row)[: len(row)])
            self._file.flush()
        aim.happens(TORN)
        write(self, row)

    JsonlFile.log = torn


def _told(call: Callable, aim: Aim, event: str, over: bool) -> Callable:
    def told(*args: Any, **kwargs: Any) -> Any:
        if not over:
            aim.happens(event)
        value = call(*args, **kwargs)
        if over:
            aim.happens(event)
        return value

    return told


def _inside(call: Callable, inside: list[str], event: str) -> Callable:
    def within(*args: Any, **kwargs: Any) -> Any:
        inside.append(event)
        try:
            return call(*args, **kwargs)
        finally:
            inside.pop()

    return within


def main() -> None:
    aim = Aim(**json.loads(os.environ["CHAOS"]))
    watch(aim)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as for a script that is launched itself
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stopped:
        aim.say("exit", stopped.code)
        raise


if __name__ == "__main__":
    main()
