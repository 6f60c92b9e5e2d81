from __future__ import annotations

import pytest
import torch

from tasks.maze import formats
from tasks.maze.files import MazeFiles
from tasks.maze.generate import Suite, sample
from tasks.maze.grid import Mazes, concatenate, symmetric
from tasks.maze.task import MazeTask

SUITE = Suite("randwall-8")


def some(count: int, split: str = "train", suite: Suite = SUITE) -> Mazes:
    return sample(suite, split, torch.arange(count))[0]


@pytest.mark.parametrize("kind", ["hrm", "csv"])
def test_files_are_mazes_like_any(tmp_path, kind):
    train, test = some(7), some(4, "test")
    for split, mazes in (("train", train), ("test", test)):
        if kind == "hrm":
            formats.write_hrm(tmp_path, split, mazes)
        else:
            formats.write_csv(tmp_path / f"{split}.csv", mazes)
    files = MazeFiles(tmp_path, val=2)
    for split, expected in (("train", train.take(slice(5))), ("val", train.take(slice(5, 7))), ("test", test)):
        mazes, steps = files.load(split, 100)
        assert all(torch.equal(a, b) for a, b in zip(mazes, expected, strict=True)), split
        assert (steps.flatten(1).gather(1, mazes.start.unsqueeze(1)) >= SUITE.steps_at_least).all()
    assert files.size == 8 and len(files.load("test", 3)[1]) == 3
    assert files.info["test_in_train"] == 0 and files.answers.shape == (4, 8, 8)
    task = MazeTask(files, train=100, val=2)
    assert len(task.train) == 5 and task.info["train"] == 5 and task.info["files"] == str(tmp_path)


def test_test_mazes_that_training_knows_are_counted_turned_or_not(tmp_path):
    train = some(5)
    formats.write_csv(tmp_path / "train.csv", train)
    leaked = [symmetric(train.take(slice(0, 1)), 5), train.take(slice(4, 5)), some(3, "test")]
    formats.write_csv(tmp_path / "test.csv", concatenate(leaked))
    assert MazeFiles(tmp_path, val=1).info["test_in_train"] == 2


@pytest.mark.parametrize(
    ("train", "test", "val", "sentence"),
    [
        (3, None, 1, "neither test.csv nor test/ with all__inputs.npy"),
        (3, Suite("randwall-9"), 1, "training mazes are 8 x 8, the test mazes 9 x 9"),
        (3, SUITE, 3, "of 3 training mazes 3 for validation leave none"),
    ],
)
def test_what_does_not_fit_is_a_sentence(tmp_path, train, test, val, sentence):
    formats.write_csv(tmp_path / "train.csv", some(train))
    if test is not None:
        formats.write_csv(tmp_path / "test.csv", some(2, "test", test))
    with pytest.raises(ValueError, match=sentence):
        MazeFiles(tmp_path, val=val)
