"""The same training under every launch config and split of its batch, beside one process on its own.

    python tests/launches.py -o benchmarks/results/launches-cpu   # launches-cpu.md and .csv; a quarter of an hour
    python tests/launches.py -o zero --only zero fsdp2 --precisions bf16 --steps 20

An HTEN of train/nano.py --tiny, with the same seed and the same eight windows a step, all gradients clipped, and a
learning rate that rises and falls. `d_` columns are the largest differences from the single process over all steps and
evaluations: of any part of the loss, of the learning rate, and of the gradient's norm before clipping. All is done on
the CPU, and with clocks that other work disturbs: tokens per second say what a launch costs here, not on its GPUs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started as a script, with only tests/ on the path

from benchmarks.ops import machine  # noqa: E402
from tests.train.test_launchers import launch_environment  # noqa: E402
from train.engine.metrics import read_rows  # noqa: E402
from train.engine.run_folder import read_json  # noqa: E402

BATCH, CLIP = 8, 0.1  # windows of a step; every gradient is longer than CLIP
FLAGS = (
    f"--tiny --use_hten --batch_size {BATCH} --lr 3e-3 --warmup_steps 4 --grad_clip {CLIP} --log_every 1 --eval_every 8"
    " --wandb off --db off --num_workers 0"
)
# Of losses and of the gradient's norm. Sums in another order (measured: 1e-6, 1e-6); in bf16 a product is now and then
# rounded the other way (3e-4, 1e-2).
BOUNDS = {"no": (1e-5, 1e-5), "bf16": (1e-3, 2e-2)}
PRODUCTS = {"no": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Launch:
    """By a file of accelerate_configs, or by none."""

    config: str
    processes: int = 1
    splits: tuple[int, ...] = (1,)  # micro-batches of a step in each process
    note: str = ""
    by: str = "accelerate"  # accelerate, torchrun, or nothing at all

    def commands(self, child: list[str]) -> list[tuple[list[str], dict[str, str]]]:
        """(command, environment) of what has to be started: one, or one for each machine."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if not self.by:
            return [([sys.executable, *child], {})]
        if self.by == "torchrun":
            ways = ["--nproc_per_node", str(self.processes), "--master_port", port]
            return [([sys.executable, "-m", "torch.distributed.run", *ways, *child], launch_environment(self.config))]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
        command += ["--config_file", f"accelerate_configs/{self.config}.yaml", "--num_processes", str(self.processes)]
        if self.config == "multi_node":
            return [([*command, "--machine_rank", r, "--main_process_port", port, *child], {}) for r in "01"]
        return [([*command, *child], {})]


ALONE = Launch("none", splits=(1, 2, 4), by="")
LAUNCHES = (
    Launch("cpu"),
    Launch("single_gpu", note="on the CPU: what it is for needs CUDA or ROCm"),
    Launch("mps", note="on the CPU: what it is for needs a Mac"),
    Launch("cpu_two_processes", 2, (1, 2, 4)),
    Launch("multi_gpu", 2, note="DDP over gloo: what it is for needs several GPUs"),
    Launch("multi_node", 2, note="two launchers on one machine, as on two"),
    Launch("deepspeed_zero1", splits=(1, 4)),
    Launch("deepspeed_zero2", splits=(1, 4)),
    Launch("deepspeed_zero3", splits=(1, 4)),
    Launch("deepspeed_zero3_offload", splits=(1, 4)),
    Launch("deepspeed_zero1", 2, by="torchrun"),
    Launch("deepspeed_zero2", 2, by="torchrun"),
    Launch("deepspeed_zero3", 2, (1, 4), by="torchrun"),
    Launch("fsdp2", 2, (1, 2, 4)),
)


@dataclass(frozen=True)
class Run:
    """What a launch left behind."""

    rows: list[dict[str, Any]]
    results: dict[str, Any]
    seen: list[dict[str, Any]]  # by each process, launches_child.py


class Failed(RuntimeError):
    pass


def train(launch: Launch, split: int, precision: str, steps: int, folder: Path) -> Run:
    """Raises Failed with the end of what was printed."""
    run_dir = folder / "run"
    flags = [*FLAGS.split(), "--max_steps", str(steps), "--mixed_precision", precision, "--run_dir", str(run_dir)]
    flags += ["--micro_batch_size", str(BATCH // (launch.processes * split))]
    if not launch.config.startswith("cpu"):  # these say it themselves
        flags.append("--cpu")
    started, environment = [], {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "output").open("w+") as output:
        for command, more in launch.commands(["tests/launches_child.py", str(folder), "train/nano.py", *flags]):
            ways = {"cwd": ROOT, "env": environment | more, "stdout": output, "stderr": output}
            started.append(subprocess.Popen(command, **ways))
        if any([process.wait() for process in started]):
            raise Failed((folder / "output").read_text()[-1500:])
    seen = [json.loads(file.read_text()) for file in sorted(folder.glob("seen-*.json"))]
    return Run(read_rows(run_dir / "metrics.jsonl"), read_json(run_dir / "results.json"), seen)


def furthest(run: Run, alone: Run, names: set[str]) -> float:
    """The largest difference between two runs in columns of these names; inf where their rows are of other steps."""
    if [(r["step"], r["split"]) for r in run.rows] != [(r["step"], r["split"]) for r in alone.rows]:
        return math.inf
    pairs = [(a[n], b[n]) for a, b in zip(run.rows, alone.rows, strict=True) for n in names & a.keys() & b.keys()]
    return max((abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs), default=math.inf)


def problems(run: Run, alone: Run, processes: int, precision: str) -> list[str]:
    """What a launch does not do as a single process does."""
    found, (of_losses, of_norms) = [], BOUNDS[precision]
    losses = {n for row in run.rows for n in row if n == "loss" or n.endswith("_loss")}
    for names, limit in ((losses, of_losses), ({"lr"}, 0.0), ({"grad_norm"}, of_norms)):
        if (far := furthest(run, alone, names)) > limit:
            found.append(f"{'/'.join(sorted(names))} is off by {far:.1e}")
    if any(row["grad_norm"] <= CLIP for row in run.rows if row["split"] == "train"):
        found.append("some gradient was too short to be clipped")
    if [seen["processes"] for seen in run.seen] != [processes] * processes:
        found.append(f"{len(run.seen)} processes had a part in it")
    for seen in run.seen:
        if seen["eigenvalues"] != ["torch.float32"] or seen["products"] != [f"torch.{PRODUCTS[precision]}"]:
            found.append(f"eigenvalues are {seen['eigenvalues']} and products {seen['products']}")
    return found


def table(launches: Sequence[Launch], precisions: Sequence[str], steps: int) -> Iterator[dict[str, str]]:
    for precision in precisions:
        alone: Run | None = None
        for launch in (ALONE, *launches):
            for split in launch.splits:
                row = {"launch": launch.config, "processes": str(launch.processes), "split": str(split)}
                row |= {"precision": precision, "bounds": "{:.0e}, {:.0e}".format(*BOUNDS[precision])}
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        run = train(launch, split, precision, steps, Path(folder))
                    except Failed as error:
                        if alone is None:
                            raise SystemExit(f"a single process does not train: {error}") from error
                        yield row | measures(None, alone) | {"note": f"FAILED: {' '.join(str(error).split())}"}
                        continue
                alone = alone or run
                wrong = problems(run, alone, launch.processes, precision)
                note = f"FAILED: {'; '.join(wrong)}" if wrong else launch.note
                yield row | measures(run, alone) | {"note": note}


def measures(run: Run | None, alone: Run) -> dict[str, str]:
    names = ("d_loss", "d_lr", "d_grad_norm", "eigenvalues", "products", "tokens_per_s", "peak_mib_per_process")
    if run is None:
        return dict.fromkeys(names, "-")
    losses = {n for row in run.rows for n in row if n == "loss" or n.endswith("_loss")}
    values = [f"{furthest(run, alone, columns):.1e}" for columns in (losses, {"lr"}, {"grad_norm"})]
    values += [" ".join(run.seen[0][of]).replace("torch.", "") for of in ("eigenvalues", "products")]
    peak = max(seen["peak_bytes"] for seen in run.seen)
    values += [f"{run.results['items_per_second']:.0f}", f"{peak / 2**20:.0f}"]
    return dict(zip(names, values, strict=True))


def versions() -> dict[str, str]:
    found = {"date": datetime.date.today().isoformat()}
    for name in ("accelerate", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="without .md and .csv")
    parser.add_argument("--only", nargs="+", default=[], help="launch configs with one of these words in their name")
    parser.add_argument("--precisions", nargs="+", choices=BOUNDS, default=list(BOUNDS))
    parser.add_argument("--steps", type=int, default=24)
    flags = parser.parse_args()
    facts = machine("cpu") | versions()
    lines, rows = [f"- {key}: {value}" for key, value in facts.items()], []
    chosen = [launch for launch in LAUNCHES if not flags.only or any(word in launch.config for word in flags.only)]
    print("\n".join(lines))
    for row in table(chosen, flags.precisions, flags.steps):
        more = [f"| {' | '.join(row.values())} |"]
        if not rows:
            more = ["", f"| {' | '.join(row)} |", "|---" * len(row) + "|", *more]
        print("\n".join(more), flush=True)
        lines += more
        rows.append(row | facts)
        flags.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with flags.output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    raise SystemExit(any(row["note"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    main()
