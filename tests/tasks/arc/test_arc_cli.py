"""`python -m tasks.arc`: each command on small files, its exit status, and a sentence for what cannot be."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.arc.__main__ import main
from tasks.arc.formats import load_puzzles, write_bundle, write_puzzle, write_submission
from tasks.arc.grid import Pair, Puzzle


def puzzle(id: str, seed: int, tests: int = 1) -> Puzzle:
    grids = np.random.default_rng(seed).integers(0, 10, (2 + tests, 2, 3, 3)).astype(np.uint8)
    pairs = [Pair(*pair) for pair in grids]
    return Puzzle(id, tuple(pairs[:2]), tuple(pairs[2:]))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three puzzles, as a folder and as Kaggle's files; a submission solves the first and half of the second."""
    monkeypatch.chdir(tmp_path)
    puzzles = [puzzle("a", 0), puzzle("b", 1, tests=2), puzzle("c", 2)]
    Path("folder").mkdir()
    for each in puzzles:
        write_puzzle(f"folder/{each.id}.json", each)
    write_bundle("challenges.json", "solutions.json", puzzles)
    (a,), (b, _), _ = ([pair.output for pair in each.test] for each in puzzles)
    wrong = np.zeros((1, 1), dtype=np.uint8)
    answers = {"a": [[a]], "b": [[wrong, b], [wrong]], "c": [[wrong]]}
    write_submission("submission.json", answers, {"a": 1, "b": 2, "c": 1})
    return puzzles


@pytest.fixture
def command(capsys):
    def run(words: str) -> tuple[int, str, str]:
        try:
            status = main(words.split())
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("solutions", ["solutions.json", "solutions.json --challenges challenges.json", "folder"])
def test_score(files, command, solutions):
    status, out, _ = command(f"score submission.json {solutions} -o scores.json")
    assert status == 0
    assert "3 puzzles, 4 questions, 2 answers to each" in out and "puzzles solved" in out
    scores = json.loads(Path("scores.json").read_text())
    assert scores["pass@1"]["questions"]["value"] == 1 / 4
    assert [scores["pass@2"][rule]["value"] for rule in ("puzzles", "mean_of_puzzles", "questions")] == [
        1 / 3,
        0.5,
        0.5,
    ]
    inputs_are_known = solutions != "solutions.json"
    assert (scores["first"]["change_accuracy"] is not None) == inputs_are_known
    assert ("n/a" in out) != inputs_are_known


def test_a_submission_with_missing_ids_is_refused(files, command):
    content = json.loads(Path("submission.json").read_text())
    Path("submission.json").write_text(json.dumps({"a": content["a"]}))
    status, out, err = command("score submission.json solutions.json")
    assert (status, out) == (2, "")
    assert err == "python -m tasks.arc: submission.json: 2 of 3 puzzles have no answer: b, c\n"


def test_generate_writes_task_files_that_are_the_same_every_time(files, command):
    assert command("generate --skills reflect upscale --count 2 --seed 3 --output one")[0] == 0
    assert command("generate --skills reflect upscale --count 2 --seed 3 --output other")[0] == 0
    names = [f"{skill}-{i:05}" for skill in ("reflect", "upscale") for i in range(2)]
    assert [p.id for p in load_puzzles("one")] == names
    assert all(Path("one", f"{n}.json").read_bytes() == Path("other", f"{n}.json").read_bytes() for n in names)
    assert all(len(p.test) == 1 and p.test[0].output is not None for p in load_puzzles("one"))


def test_render(files, command):
    status, out, _ = command("render folder/a.json")
    assert status == 0 and "a" in out and len(out.splitlines()) > 6
    assert command("render challenges.json --id b -o b.svg")[0] == 0
    assert Path("b.svg").read_text().startswith("<svg")
    assert command("render folder --id b -o b.png")[0] == 0
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")


def test_baselines(files, command):
    status, out, _ = command("baselines folder")
    assert status == 0 and out.startswith("4 questions\n")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "100.0 %" in rows["copy input"] and "repeat previous cell teacher forced" in rows


def test_leakcheck_fails_where_there_is_a_leak(files, command):
    status, out, _ = command("leakcheck folder challenges.json")
    assert status == 1 and out.startswith("3 of 3 puzzles of challenges.json are among the 3 of folder\n")
    assert out.endswith("a b c\n")
    write_puzzle("new.json", puzzle("new", 9))
    status, out, _ = command("leakcheck folder new.json")
    assert status == 0 and out.startswith("0 of 1 puzzles of new.json are among the 3 of folder\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("score nowhere.json solutions.json", "nowhere.json"),
        ("score submission.json challenges.json", "puzzle a, test pair 0: the output is not known"),
        ("score submission.json submission.json", "puzzle a: not a list of grids"),
        ("generate --skills juggle --output out", "no skill is called 'juggle'"),
        ("generate --count 0 --output out", "--count 0: at least 1 is needed"),
        ("render folder", "holds 3 puzzles; name one of them with --id: a, b, c"),
        ("render folder --id z", "holds 3 puzzles; name one"),
        ("render folder/a.json -o a.gif", "a.gif: a picture ends in .png or .svg"),
        ("baselines challenges.json", "question a/0: the answer is not known"),
        ("leakcheck arc3-training folder", "arc3-training: neither a file or folder nor a set"),
    ],
)
def test_bad_input_is_one_sentence(files, command, words, sentence):
    status, out, err = command(words)
    assert (status, out) == (2, "") and err.startswith("python -m tasks.arc: ")
    assert sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["", "solve x", "score submission.json", "render folder/a.json --out a.png", "baselines folder --colour"]
)
def test_unknown_and_missing_flags_are_errors(files, command, words):
    status, _, err = command(words)
    assert status == 2 and "usage:" in err and "error:" in err


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tasks.arc", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(sys.modules[main.__module__].__file__, run_name="__main__")
    assert "leakcheck arc2-training arc1-evaluation" in capsys.readouterr().out
