"""All families train side by side for a while, watched: memory, file handles, speed and disk must not drift.

    python tests/endurance.py --minutes 20 -o endurance            # endurance.json and .png
    python tests/endurance.py --minutes 120 -o long --families language maze --wandb offline

Other flags go to the scripts. Each begins with --tiny, saves every 50 steps and is told to stop by SIGTERM. The first
third of what is seen is the warm-up: caches fill and the allocator finds its size. Of the other two, the later may not
have more than the earlier: of memory 2 %, of handles, threads and processes none; and speed, in steps per second of
processor time so that other work on the machine doesn't count, may not fall below nine tenths. Checkpoints at any
moment are the last, the best and one that is being written. It runs where psutil does, on Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started as a script, with only tests/ on the path

from tests.faults import FAMILIES  # noqa: E402
from train.engine.checkpoint import KEEP_BEST  # noqa: E402
from train.engine.signals import EXIT_INTERRUPTED  # noqa: E402

FLAGS = "--tiny --cpu --max_steps 100000000 --log_every 10 --eval_every 100 --save_every 50 --num_workers 1 --wandb off"
FLAGS += " --early_stopping_patience None --epochs None"  # champion has limits of its own
MEMORY, SPEED = 1.02, 0.9  # of the last third over the one before: at most, at least
COUNTS = ("handles", "threads", "children")
SAMPLES, LEAST = 240, 9  # of a watch, however long, and on however busy a machine
PATIENCE = 120.0  # seconds to save and stop

Sample = dict[str, float]


def newest_step(run_dir: Path) -> int:
    """Of the last whole row in metrics.jsonl; 0 where there is none yet."""
    with suppress(FileNotFoundError), (run_dir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
        with suppress(IndexError, ValueError):
            return json.loads(lines[-1])["step"]
    return 0


def bytes_below(folder: Path) -> int:
    """Of all files; those that vanish meanwhile count as nothing."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(os.path.join(path, name)).st_size
    return size


def sample(process: psutil.Process, run_dir: Path) -> Sample:
    """What a run holds now; loader workers and the like count with it. Raises psutil.Error when it has ended."""
    family = [process, *process.children(recursive=True)]
    found: Sample = {"rss": 0, "handles": 0, "threads": 0, "children": len(family) - 1, "cpu": 0.0}
    for member in family:
        try:
            with member.oneshot():
                held = {"rss": member.memory_info().rss, "handles": member.num_fds(), "threads": member.num_threads()}
                held["cpu"] = sum(member.cpu_times()[:2])
        except psutil.Error:
            if member is process:
                raise
            continue  # a child that has just ended
        found |= {name: found[name] + value for name, value in held.items()}
    checkpoints = bytes_below(run_dir / "checkpoints")
    found |= {"checkpoints": sum(1 for _ in (run_dir / "checkpoints").glob("*step-*")), "checkpoint_bytes": checkpoints}
    return found | {"other_bytes": bytes_below(run_dir) - checkpoints, "step": newest_step(run_dir)}


def watch(runs: Mapping[str, tuple[Sequence[str], Path]], folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Start (command, run folder) by name, sample them until the time is over, and stop them; what each left.

    Time begins when all have made a step. `problem` says of a run that it ended early, or not when it was told to.
    """
    started, seen = {}, {}
    # One thread each: they share the machine, and threads that wait for each other would be all that is measured.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["LOCAL_WORLD_SIZE"] = str(psutil.cpu_count())
    for name in runs:
        with (folder / f"{name}.log").open("w") as log:
            started[name] = psutil.Popen(runs[name][0], cwd=ROOT, env=environment, stdout=log, stderr=log)
        seen[name] = {"samples": [], "problem": ""}
    alive = lambda: [name for name in runs if started[name].poll() is None]
    while alive() and not all(newest_step(runs[name][1]) for name in alive()):
        time.sleep(0.2)
    begun = time.monotonic()
    too_few = lambda: any(len(seen[name]["samples"]) < LEAST for name in alive())
    while alive() and ((passed := time.monotonic() - begun) < seconds or too_few()):
        for name in alive():
            with suppress(psutil.Error):
                seen[name]["samples"].append({"seconds": passed} | sample(started[name], runs[name][1]))
        time.sleep(seconds / SAMPLES)
    for name in alive():
        started[name].send_signal(signal.SIGTERM)
    for name, process in started.items():
        with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
            process.wait(PATIENCE)
        if process.poll() is None:
            process.kill()
        if process.wait() != EXIT_INTERRUPTED:
            last = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
            seen[name]["problem"] = f"ended with status {process.returncode}: {last}"
    return seen


# ---- verdicts --------------------------------------------------------------------------------------------------------


def drift(samples: Sequence[Sample]) -> dict[str, float]:
    """The last third of the samples beside the third before it, by name."""
    third = len(samples) // 3
    before, after = samples[third : 2 * third], samples[2 * third : 3 * third]
    middle = lambda part, name: median(s[name] for s in part)
    speed = lambda part: (part[-1]["step"] - part[0]["step"]) / max(part[-1]["cpu"] - part[0]["cpu"], 1e-3)
    found = {name: middle(after, name) - middle(before, name) for name in COUNTS}
    found |= {"memory": middle(after, "rss") / middle(before, "rss"), "speed": speed(after) / max(speed(before), 1e-9)}
    later = samples[third:]
    slope = np.polyfit([s["seconds"] / 60 for s in later], [s["rss"] / 2**20 for s in later], 1)[0]
    return found | {"mib_per_minute": float(slope), "checkpoints": max(s["checkpoints"] for s in samples)}


def problems(seen: Mapping[str, Any]) -> list[str]:
    """What a watched run did that it can't do for ever."""
    if seen["problem"]:
        return [seen["problem"]]
    found, now = [], drift(seen["samples"])
    if now["memory"] > MEMORY:
        found.append(f"memory grew by {100 * (now['memory'] - 1):.1f} %, {now['mib_per_minute']:.1f} MiB a minute")
    found += [f"{now[name]:.0f} more {name}" for name in COUNTS if now[name] > 0]
    if now["speed"] < SPEED:
        found.append(f"speed fell to {100 * now['speed']:.0f} %")
    if now["checkpoints"] > (kept := KEEP_BEST + 2):  # the last, the best, and one being written
        found.append(f"{now['checkpoints']:.0f} checkpoints at once, not {kept}")
    return found


def table(seen: Mapping[str, Any]) -> str:
    lines = ["| family | minutes | steps | steps/s | speed | RSS MiB | MiB/min | handles | threads | processes |"]
    lines[0] += " checkpoints MiB | other MiB | verdict |"
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, run in seen.items():
        samples, verdict = run["samples"], "; ".join(" ".join(p.split()) for p in problems(run)) or "flat"
        if len(samples) < LEAST:
            lines.append(f"| {name} {'| - ' * (lines[0].count('|') - 3)}| {verdict} |")
            continue
        first, last, now = samples[0], samples[-1], drift(samples)
        seconds, steps = last["seconds"] - first["seconds"], last["step"] - first["step"]
        disk = [max(s[of] for s in samples) / 2**20 for of in ("checkpoint_bytes", "other_bytes")]
        cells = [name, f"{seconds / 60:.1f}", f"{steps:.0f}", f"{steps / seconds:.1f}", f"{100 * now['speed']:.0f} %"]
        cells += [f"{last['rss'] / 2**20:.0f}", f"{now['mib_per_minute']:+.2f}", f"{last['handles']:.0f}"]
        cells += [f"{last['threads']:.0f}", f"{last['children'] + 1:.0f}", *(f"{size:.1f}" for size in disk), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(seen: Mapping[str, Any], file: Path) -> None:
    """Memory, handles, speed and disk of each family over the minutes."""
    figure = Figure((10, 6), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for name, run in seen.items():
        column = lambda key, run=run: np.array([s[key] for s in run["samples"]])
        minutes, pairs = column("seconds") / 60, max(1, len(run["samples"]) // 20)
        steps, work = (column(of)[pairs:] - column(of)[:-pairs] for of in ("step", "cpu"))
        disk = (column("checkpoint_bytes") + column("other_bytes")) / 2**20
        shown = (
            (minutes, column("rss") / 2**20),
            (minutes, column("handles")),
            (minutes[pairs:], steps / np.maximum(work, 1e-3)),
        )
        for axes, (x, y) in zip(panels, (*shown, (minutes, disk)), strict=True):
            axes.plot(x, y, linewidth=1.2, label=name)
    labels = ("memory, MiB", "file handles", "steps per second of processor time", "run folder, MiB")
    for axes, label in zip(panels, labels, strict=True):
        axes.set(ylabel=label, ylim=(0, None))
    for axes in panels[2:]:
        axes.set_xlabel("minutes")
    panels[0].legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="without .json and .png")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, runs = Path(temporary), {}
        for family in options.families:
            script, own, below = FAMILIES[family]
            flags = [*FLAGS.split(), *own.split(), "--run_dir", str(folder / family), *more]
            flags += ["--db", str(folder / "experiments.db")]
            runs[family] = ([sys.executable, f"train/{script}.py", *flags], folder / family / below)
        seen = watch(runs, folder, 60 * options.minutes)
    print(text := table(seen))
    about = {"command": shlex.join(["python", *sys.argv]), "table": text, "runs": seen}
    options.output.with_suffix(".json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    draw(seen, options.output.with_suffix(".png"))
    raise SystemExit(any(problems(run) for run in seen.values()))


if __name__ == "__main__":
    main()
