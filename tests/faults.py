"""Every file of a run folder damaged in every way, and what becomes of the run.

    python tests/faults.py -o faults.json                                  # all families, all files: an hour or two
    python tests/faults.py -o faults.json --families language --kinds flipped removed --tries 3

Each family's real script runs to its end with --tiny. Its folder is then cut back to where it stood before the last
checkpoint, one file is damaged, and the same command goes on. It survives if it leaves behind, bit for bit, the rows,
scores and checkpoints of the run that nothing befell, or if it refuses in a sentence and leaves the checkpoints alone.
Everything else is lost. A sample or picture of an earlier evaluation cannot be made anew: such a file is left as it is.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started as a script, with only tests/ on the path

from tests.chaos_compare import differences  # noqa: E402

STEPS = 8
FLAGS = f"--tiny --cpu --max_steps {STEPS} --eval_every 2 --log_every 1 --wandb off --mixed_precision no".split()
# The script, what it needs besides FLAGS to train one model, and where the run lies in --run_dir.
FAMILIES = {
    "language": ("nano", "--ema_decay 0.9", "."),
    "maze": ("maze_12x12", "--models poh", "poh-seed0"),
    "arc": ("champion", "", "."),
    "molecular": ("molecular", "", "."),
}
# What a run imports while it goes: it forks off a process that has them, instead of half its seconds going there.
LATE = ("torch._dynamo", "matplotlib.pyplot", "deepspeed", "torch.utils.tensorboard")


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


def content(file: Path) -> bytes | str | None:
    """Of a file, or of a link; None where there is neither."""
    return os.readlink(file) if file.is_symlink() else file.read_bytes() if file.exists() else None


def damageable(folder: Path, below: str = ".") -> list[str]:
    """Files and links of a run, which lies `below` the folder of its launch; of checkpoints, those of the newest."""
    *older, _ = sorted((folder / below / "checkpoints").glob("step-*"))
    files = [f for f in folder.rglob("*") if f.is_symlink() or f.is_file()]
    return sorted(f.relative_to(folder).as_posix() for f in files if not {*older} & {*f.parents})


def cut_back(finished: Path, copy: Path, below: str = ".") -> None:
    """A copy of a finished run as it was when killed just before its last checkpoint."""
    shutil.copytree(finished, copy, symlinks=True)
    shutil.rmtree(max((copy / below / "checkpoints").glob("step-*")))
    (copy / below / "results.json").unlink()


@dataclass
class Attempt:
    family: str
    file: str
    kind: str
    outcome: str  # exact, refused, or what was lost
    said: str  # the line that names the damage
    left: bool  # whether the file is afterwards what the damage made of it


def judge(whole: Path, copy: Path, file: str, status: int, output: str) -> tuple[str, str]:
    """(outcome, what was said of it) of the run in `copy`, which went on with a damaged `file`."""
    name = Path(file).name
    words = ("damaged", "passing over", "cannot be used", "error:", "database")
    said = next((line for line in output.splitlines() if any(word in line for word in words) and name in line), "")
    if "Traceback" in output:
        return "lost: a traceback", output.strip().splitlines()[-1]
    if status == 0:
        # The database is an index: a run goes on without it, and `runs.py import` makes it anew.
        differs = differences(whole, copy, database="experiments.db" not in name)
        return ("exact" if not differs else f"lost: {'; '.join(differs)}"), said
    sound = any(copy.rglob("checkpoints/step-*"))
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


def attempts(
    family: str, kinds: Sequence[str], tries: int, only: Sequence[str], folder: Path
) -> Iterator[tuple[Attempt, float]]:
    """What became of each fault, and the seconds that it took; `only`: files with one of these words in their path."""
    script, more, below = FAMILIES[family]
    whole, tried, log = folder / "whole", folder / "tried", folder / "log.txt"
    flags = [*FLAGS, *more.split()]

    def run(run_dir: Path) -> int:
        return run_script(script, [*flags, "--run_dir", str(run_dir), "--db", str(run_dir / "experiments.db")], log)

    runpy.run_path(str(ROOT / "train" / f"{script}.py"))  # its imports
    for module in LATE:
        with suppress(ImportError):
            import_module(module)
    if run(whole):
        raise SystemExit(f"{family} does not run: {log.read_text()[-2000:]}")
    for file in [f for f in damageable(whole, below) if not only or any(word in f for word in only)]:
        empty = not (whole / file).is_symlink() and not (whole / file).stat().st_size
        for kind in [kind for kind in kinds if kind == "removed" or not empty]:
            for chance in map(random.Random, range(tries if kind == "flipped" else 1)):
                started = time.monotonic()
                shutil.rmtree(tried, ignore_errors=True)
                if Path(file).name == "results.json":
                    shutil.copytree(whole, tried, symlinks=True)
                else:
                    cut_back(whole, tried, below)
                target = file.replace(f"step-{STEPS:08d}", f"step-{STEPS - 2:08d}")
                if not os.path.lexists(tried / target):
                    continue  # of the last evaluation
                damage(tried / target, kind, chance)
                harmed = content(tried / target)
                outcome, said = judge(whole, tried, target, run(tried), log.read_text())
                sound = content(whole / target)
                left = sound is not None and content(tried / target) == harmed != sound
                yield Attempt(family, target, kind, outcome, said, left), time.monotonic() - started


def table(found: list[Attempt]) -> str:
    """Family and kind of fault x tried x survived x lost, as Markdown."""
    lines = ["| family | damage | tried | exact | refused in a sentence | lost | file left so |", "|---" * 7 + "|"]
    for family in FAMILIES:
        for kind in KINDS:
            those = [a for a in found if (a.family, a.kind) == (family, kind)]
            counts = [len(those), *(sum(a.outcome == outcome for a in those) for outcome in ("exact", "refused"))]
            counts += [counts[0] - counts[1] - counts[2], sum(a.left for a in those)]
            if those:
                lines.append(f"| {family} | {kind} | {' | '.join(map(str, counts))} |")
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
            for attempt, seconds in attempts(family, flags.kinds, flags.tries, flags.files, Path(folder)):
                outcome = attempt.outcome + ", left so" * attempt.left
                print(f"{seconds:4.0f} s  {family:10}{attempt.kind:10}{attempt.file:50} {outcome}", flush=True)
                found.append(attempt)
                text = json.dumps({"attempts": [asdict(a) for a in found], "table": table(found)}, indent=2)
                flags.output.write_text(text + "\n", encoding="utf-8")
    print(table(found))
    raise SystemExit(any(a.outcome.startswith("lost") for a in found))


if __name__ == "__main__":
    main()
