"""Every file of a run folder damaged in every way, and what becomes of the run.

    python tests/faults.py -o faults.json                                  # all families, all files: takes hours
    python tests/faults.py -o faults.json --families language --kinds flipped removed --tries 3

Each family's real script runs to its end with --tiny. Its folder is then cut back to where it stood before the last
checkpoint, one file is damaged, and the same command goes on. It survives if it ends bit for bit as the run that
nothing befell, or if it refuses in one sentence and leaves the checkpoints alone. Everything else is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STEPS = 8
FLAGS = f"--tiny --cpu --max_steps {STEPS} --eval_every 2 --log_every 1 --wandb off --mixed_precision no".split()
# The script, what it needs besides FLAGS to train one model, and where the run lies in --run_dir.
FAMILIES = {
    "language": ("nano", "--ema_decay 0.9", "."),
    "maze": ("maze_12x12", "--models poh", "poh-seed0"),
    "arc": ("champion", "", "."),
    "molecular": ("molecular", "", "."),
}
TIMES = ("items_per_second", "elapsed")


def _flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


KINDS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "truncated": lambda data, chance: data[: len(data) // 2],
    "zeroed": lambda data, chance: bytes(len(data)),
    "flipped": _flip,
    "removed": lambda data, chance: None,
}


def damage(file: Path, kind: str, chance: random.Random) -> None:
    """One of KINDS done to a file that isn't empty, or to a link: a link is removed, or points to nothing."""
    if file.is_symlink():
        file.unlink()
        if kind != "removed":
            file.symlink_to("step-99999999")
        return
    harmed = KINDS[kind](file.read_bytes(), chance)
    file.unlink()
    if harmed is not None:
        file.write_bytes(harmed)


def damageable(run_dir: Path) -> list[str]:
    """Files and links of a run folder; of the checkpoints, those of the newest."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    files = [f for f in run_dir.rglob("*") if f.is_symlink() or (f.is_file() and f.stat().st_size)]
    inside = [f for f in files if f.parent == run_dir / "checkpoints" or newest in f.parents]
    outside = [f for f in files if run_dir / "checkpoints" not in f.parents]
    return sorted(f.relative_to(run_dir).as_posix() for f in inside + outside)


def cut_back(finished: Path, copy: Path) -> None:
    """A copy of a finished run as it was when killed just before its last checkpoint."""
    shutil.copytree(finished, copy, symlinks=True)
    shutil.rmtree(max((copy / "checkpoints").glob("step-*")))
    (copy / "results.json").unlink()


def ending(run_dir: Path) -> list:
    """What must be the same however often a run was interrupted: rows without times, and all weights."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [repr({k: v for k, v in json.loads(line).items() if k not in TIMES}) for line in lines]
    return rows + [f.read_bytes() for f in sorted((run_dir / "checkpoints" / "last").glob("*.safetensors"))]


@dataclass
class Attempt:
    family: str
    file: str
    kind: str
    outcome: str  # exact, refused, or what was lost
    said: str  # the line that names the damage


def judge(run_dir: Path, status: int, output: str, whole: list, file: str) -> tuple[str, str]:
    """(outcome, what was said of it) of a run that went on with a damaged `file`."""
    name = Path(file).name
    words = ("damaged", "passing over", "cannot be used", "error:", "database")
    said = next((line for line in output.splitlines() if any(word in line for word in words) and name in line), "")
    if "Traceback" in output:
        return "lost: a traceback", output.strip().splitlines()[-1]
    if status == 0:
        return ("exact" if ending(run_dir) == whole else "lost: ended otherwise"), said
    sound = any((run_dir / "checkpoints").glob("step-*"))
    return ("refused" if output.strip().splitlines()[-1].startswith("error: ") and sound else "lost: no sentence"), said


# ---- real scripts ----------------------------------------------------------------------------------------------------


def run_script(script: str, flags: list[str], log: Path) -> int:
    """The script in a forked process, which has all imports already; its exit status, and in `log` what it said."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv, status = [f"train/{script}.py", *flags], 0
        try:
            runpy.run_path(str(ROOT / "train" / f"{script}.py"), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempts(family: str, kinds: list[str], tries: int, only: list[str], folder: Path) -> Iterator[Attempt]:
    script, more, below = FAMILIES[family]
    base, tried, log = folder / "whole", folder / "tried", folder / "log.txt"
    flags = [*FLAGS, *more.split()]

    def run(run_dir: Path) -> int:
        database = run_dir / below / "experiments.db"
        return run_script(script, [*flags, "--run_dir", str(run_dir), "--db", str(database)], log)

    runpy.run_path(str(ROOT / "train" / f"{script}.py"))  # its imports
    if run(base):
        raise SystemExit(f"{family} does not run: {log.read_text()[-2000:]}")
    whole, files = ending(base / below), damageable(base / below)
    for file in [f for f in files if not only or any(word in f for word in only)]:
        for kind in kinds:
            for chance in map(random.Random, range(tries if kind == "flipped" else 1)):
                shutil.rmtree(tried, ignore_errors=True)
                if file == "results.json":
                    shutil.copytree(base, tried, symlinks=True)
                else:
                    cut_back(base / below, tried / below)
                target = file.replace(f"step-{STEPS:08d}", f"step-{STEPS - 2:08d}")
                if not os.path.lexists(tried / below / target):
                    continue  # of the last evaluation
                damage(tried / below / target, kind, chance)
                yield Attempt(family, target, kind, *judge(tried / below, run(tried), log.read_text(), whole, target))


def table(found: list[Attempt]) -> str:
    """kind of fault x tried x survived x lost, as Markdown."""
    lines = ["| damage | tried | exact | refused in a sentence | lost |", "|---|---|---|---|---|"]
    for kind in KINDS:
        outcomes = [a.outcome for a in found if a.kind == kind]
        counts = [len(outcomes), outcomes.count("exact"), outcomes.count("refused")]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} | {counts[0] - counts[1] - counts[2]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--files", nargs="+", default=[], help="only files with one of these words in their path")
    parser.add_argument("--tries", type=int, default=1, help="bits to flip in each file, one at a time")
    flags = parser.parse_args()
    found: list[Attempt] = []
    for family in flags.families:
        with tempfile.TemporaryDirectory() as folder:
            for attempt in attempts(family, flags.kinds, flags.tries, flags.files, Path(folder)):
                print(f"{time.strftime('%H:%M:%S')} {family:10} {attempt.kind:10} {attempt.file:45} {attempt.outcome}")
                found.append(attempt)
                text = json.dumps({"attempts": [asdict(a) for a in found], "table": table(found)}, indent=2)
                flags.output.write_text(text + "\n", encoding="utf-8")
    print(table(found))
    raise SystemExit(any(a.outcome.startswith("lost") for a in found))


if __name__ == "__main__":
    main()
