"""Kill training runs at counted events, resume them with the same command, and compare with a run that was left alone.

python tests/chaos.py --kills 50 --processes 1 2 -o kills.json
python tests/chaos.py --signals --families language maze -o signals.json

Every kill is SIGKILL to all processes of the launch, wandb's too, or where there are several to one of them alone; with
--signals it is SIGTERM, SIGINT or SIGUSR1 to one process, to all, or to all and the launcher, once or twice. A run is
struck again and again, each time at an event and a count that the seed chooses, until it comes to its end; if then
anything differs from the run that was left alone, each strike of it counts as lost. On a CPU it is bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started as a script, with only tests/ on the path

from tests.chaos_compare import differences, run_files, wandb_differences  # noqa: E402
from train.engine.run_folder import read_json  # noqa: E402

# Hard on purpose: rows, evaluations and checkpoints at steps of their own, windows of several micro-batches, averaged
# weights, workers, and whatever dropout a family has.
COMMON = (
    "--tiny --cpu --max_steps 10 --batch_size 8 --micro_batch_size 2 --ema_decay 0.9 --log_every 2 --eval_every 3 "
    "--save_every 4 --num_workers 1 --mixed_precision no"
)
FAMILIES = {
    "language": "train/nano.py --use_hten",
    "maze": "train/maze.py --models baseline poh --rollout_mazes 2 --route_ent_weight 5e-4 --ent_anneal",
    "arc": "train/champion.py --no-tensorboard",
    "molecular": "train/molecular.py",
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# Where signals are sent; what belongs to the end of a run would find nothing to save.
SIGNALLED = ("step: in a forward", "step: between micro-batches", "evaluation: between batches")
SIGNALLED += ("evaluation: in a hook", "save: a part written", "save: sealed", "signal: before the model is built")
PATIENCE = 900.0  # seconds for one launch, on a machine that may be busy


class Runs:
    """Launches of one family with one number of processes, in a folder of their own."""

    def __init__(self, folder: Path, family: str, processes: int, flags: Sequence[str]) -> None:
        self.folder, self.family, self.processes, self.flags = folder, family, processes, flags
        self.whole = folder / "whole" / "runs" / "run"
        folder.mkdir(parents=True)

    def launch(self, run_dir: Path, **aim: Any) -> dict[str, Any]:
        """Launch once, wait for all that it started, and return what was seen: `said` by the child, exit status."""
        said = Path(tempfile.mkdtemp(dir=self.folder))
        ways = ["--multi_gpu", "--num_processes", str(self.processes), "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
        command += [*(ways if self.processes > 1 else []), "tests/chaos_child.py"]
        command += [*f"{FAMILIES[self.family]} {COMMON}".split(), *self.flags, "--run_dir", str(run_dir)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "WANDB_MODE": "offline"}
        environment["CHAOS"] = json.dumps({"said": str(said), **aim})
        with (said / "output").open("w") as output:
            started = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            known, deadline = {started.pid: psutil.Process(started.pid)}, time.monotonic() + PATIENCE
            while started.poll() is None and time.monotonic() < deadline:  # it may die before what it started
                known |= {child.pid: child for child in known[started.pid].children(recursive=True)}
                try:
                    started.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
            _, hanging = psutil.wait_procs(known.values(), timeout=max(1.0, deadline - time.monotonic()))
        for process in hanging:
            process.kill()
        found = {file.stem: json.loads(file.read_text()) for file in said.glob("*.json")}
        return {"said": found, "status": started.returncode, "hung": len(hanging), "output": said / "output"}

    def reference(self) -> dict[int, Counter[str]]:
        """Run to the end without a strike; how often each event happened, by rank."""
        seen = self.launch(self.whole)
        if seen["status"] != 0:
            raise RuntimeError(f"the undisturbed run failed: {seen['output'].read_text()[-3000:]}")
        return {rank: Counter(seen["said"][f"counts-{rank}"]) for rank in range(self.processes)}


def strike_until_done(runs: Runs, strikes: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Resume one run as often as it is struck, and once more; a row for each strike that fell."""
    run_dir, rows = runs.folder / name / "runs" / "run", []
    for aim in strikes:
        seen = runs.launch(run_dir, **aim)
        if f"struck-{aim['rank']}" in seen["said"]:
            about = {"family": runs.family, "processes": runs.processes, "run": name, **aim}
            rows.append({**about, "status": seen["status"], "problem": problem_of(seen, aim, run_dir)})
        elif seen["status"] != 0:
            break
    seen = runs.launch(run_dir)
    differ = [*differences(runs.whole, run_dir), *wandb_differences(run_dir)]
    if seen["status"] != 0:
        differ = [f"it did not come to its end: {seen['output'].read_text()[-1500:]}"]
    for row in rows:
        lost = [*([row["problem"]] if row["problem"] else []), *differ]
        row |= {"survived": not lost, "differs": lost}
    return rows


def problem_of(seen: dict[str, Any], aim: dict[str, Any], run_dir: Path) -> str:
    """What a signalled launch did wrong; a killed one can't."""
    if seen["hung"]:
        return "it hung"
    if not aim["signals"]:
        return ""
    exits = {value for name, value in seen["said"].items() if name.startswith("exit")}
    states = {read_json(file)["state"] for file in run_files(run_dir, "run.json")}
    begun = not aim["event"].startswith("signal")  # or there was nothing yet that could be saved
    if exits == {75} and (states <= {"finished", "interrupted"} or not begun):
        return ""
    finished = begun and states == {"finished"}  # it came at the last step
    return "" if finished else f"exits {exits or 'none'}, run.json {states}: {seen['output'].read_text()[-600:]}"


def plan_kills(counts: dict[int, Counter[str]], draw: random.Random, kinds: list[str], most: int) -> list[dict]:
    """Up to `most` strikes for one run: the kinds take turns, and each falls later the further the run is."""
    chosen = []
    for _ in range(draw.randint(1, most)):
        event, rank = kinds.pop(0), draw.randrange(len(counts))
        kinds.append(event)
        if counts[rank][event] == 0:  # process 0 alone writes
            rank = 0
        number = draw.randint(1, max(1, counts[rank][event] // (len(chosen) + 1)))
        target = draw.choice(["all", "all", "rank"]) if len(counts) > 1 else "all"
        chosen.append({"event": event, "number": number, "rank": rank, "signals": [], "target": target})
    return chosen


def plan_signals(counts: dict[int, Counter[str]], draw: random.Random, kinds: list[str]) -> list[dict]:
    event = kinds.pop(0)
    kinds.append(event)
    rank, often = draw.randrange(len(counts)), draw.choice([1, 2])
    rank = rank if counts[rank][event] else 0
    signals = [draw.choice(SIGNALS) for _ in range(often)]
    target = draw.choice(["rank", "ranks", "all"])
    number = draw.randint(1, max(1, counts[rank][event] // 2))
    return [{"event": event, "number": number, "rank": rank, "signals": signals, "target": target}]


def table(rows: list[dict[str, Any]]) -> str:
    """Kind of fault x tried x survived x lost."""
    lines = [f"| {'kind of fault':<44} | tried | survived | lost |", f"|{'-' * 46}|------:|---------:|-----:|"]
    kinds = sorted({kind_of(row) for row in rows})
    for kind in [*kinds, "all"]:
        of = [row["survived"] for row in rows if kind in (kind_of(row), "all")]
        lines.append(f"| {kind:<44} | {len(of):>5} | {sum(of):>8} | {len(of) - sum(of):>4} |")
    return "\n".join(lines)


def kind_of(row: dict[str, Any]) -> str:
    to = {"rank": "one process", "ranks": "all processes", "all": "all and the launcher"}[row["target"]]
    if row["signals"]:
        return f"{' '.join(row['signals'])} to {to}"
    return f"SIGKILL, {row['event']}" if row["target"] == "all" else f"SIGKILL to {to} of {row['processes']}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="strikes over all families, at least")
    parser.add_argument("--signals", action="store_true", help="signals that ask for a stop, in place of SIGKILL")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--in_a_row", type=int, default=4, help="strikes that one run may suffer")
    parser.add_argument("--events", nargs="+", help="only these kinds of events, by the beginning of their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are made, and stay; a temporary one if not given")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON with a row for each strike")
    parser.add_argument("flags", nargs="*", help="after --: flags for the scripts")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    draw, rows, kinds = random.Random(args.seed), [], []
    groups = []
    for family in args.families:
        for processes in args.processes:
            runs = Runs(folder / f"{family}-{processes}", family, processes, args.flags)
            groups.append((runs, runs.reference()))
            print(f"{family} with {processes} process(es): {sum(groups[-1][1][0].values())} events", flush=True)
    kinds = (
        list(SIGNALLED) if args.signals else sorted({e for _, counts in groups for e in counts[0]} - {SIGNALLED[-1]})
    )
    kinds = [kind for kind in kinds if not args.events or kind.startswith(tuple(args.events))]
    draw.shuffle(kinds)
    number = 0
    while len(rows) < args.kills:
        runs, counts = groups[number % len(groups)]
        plan = plan_signals(counts, draw, kinds) if args.signals else plan_kills(counts, draw, kinds, args.in_a_row)
        new = strike_until_done(runs, plan, f"struck-{number}")
        rows, number = rows + new, number + 1
        for row in new:
            came_of_it = "survived" if row["survived"] else "LOST " + "; ".join(row["differs"])
            where = f"{row['event']} #{row['number']}, {row['family']} with {row['processes']} process(es)"
            print(f"{len(rows):>4} {kind_of(row)}, {where}: {came_of_it}", flush=True)
        args.output.write_text(json.dumps(rows, indent=1))
        if all(row["survived"] for row in new):
            shutil.rmtree(runs.folder / f"struck-{number - 1}")
    print(table(rows))
    args.output.with_suffix(".md").write_text(table(rows) + "\n")
    if args.folder is None and all(row["survived"] for row in rows):
        shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    raise SystemExit(any(not row["survived"] for row in main()))
