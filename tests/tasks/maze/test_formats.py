from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import random
from tasks.maze import formats
from tasks.maze.distance import distances, shortest_path
from tasks.maze.generate import Suite, attempt
from tasks.maze.grid import Mazes, passages_of_connections
from tasks.maze.score import shortest_path_grid, start_distance

SUITES = [Suite("perfect-7"), Suite("perfect-7", braid=0.5), Suite("randwall-9"), Suite("perfect30px"), Suite("hard30")]
every_suite = pytest.mark.parametrize("suite", SUITES, ids=str)
SMALL = ["S #", "# #", "# G"]  # its way: right, down, down, right
SOLVED = ["So#", "#o#", "#oG"]


@cache
def some(suite: Suite, count: int = 4) -> tuple[Mazes, torch.Tensor]:
    """Solvable mazes of a kind, and the cells of their shortest ways, bool [B, N, N]."""
    mazes = attempt(suite, random.keys(1, torch.arange(3 * count)))
    mazes = mazes.take(start_distance(mazes, distances(mazes.passages, mazes.goal)) > 0).take(slice(count))
    assert len(mazes.start) == count
    return mazes, formats.marked(shortest_path(mazes, distances(mazes.passages, mazes.goal)), mazes.size)


def same(mazes: Mazes, others: Mazes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(mazes, others, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def on_floor(suite: Suite) -> tuple[Mazes, torch.Tensor]:
    mazes, path = some(suite)
    if suite.kind != "perfect":
        return mazes, path
    assert not formats.is_floor_grid(mazes)
    mazes = formats.pixels(mazes)
    return mazes, formats.marked(shortest_path(mazes, distances(mazes.passages, mazes.goal)), mazes.size)


# ---- there and back --------------------------------------------------------------------------------------------------


@every_suite
def test_hrm_and_csv_come_back_bit_for_bit(suite, tmp_path):
    mazes, path = on_floor(suite)
    formats.write_hrm(tmp_path / "hrm", "test", mazes)
    formats.write_csv(tmp_path / "a.csv", mazes)
    for read, marks in (formats.read_hrm(tmp_path / "hrm", "test"), formats.read_csv(tmp_path / "a.csv")):
        assert same(read, mazes) and torch.equal(marks, path)
        assert shortest_path_grid(read, distances(read.passages, read.goal), marks).all()
    formats.write_hrm(tmp_path / "again", "test", *formats.read_csv(tmp_path / "a.csv"))
    formats.write_csv(tmp_path / "b.csv", *formats.read_hrm(tmp_path / "hrm", "test"))
    assert contents(tmp_path / "again") == contents(tmp_path / "hrm")
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


@every_suite
def test_drawings_and_connections_come_back_bit_for_bit(suite, tmp_path):
    mazes, path = some(suite)
    formats.write_connections(tmp_path / "c.npz", mazes)
    assert same(formats.read_connections(tmp_path / "c.npz"), mazes)
    assert torch.equal(passages_of_connections(formats.connections_of_passages(mazes.passages)), mazes.passages)
    for i in range(2):
        maze = mazes.take(slice(i, i + 1))
        formats.write_text(tmp_path / "maze.txt", maze)
        read, marks = formats.read_text(tmp_path / "maze.txt")
        assert same(read, maze) and marks is None
        formats.write_text(tmp_path / "maze.txt", maze, path[i : i + 1])
        read, marks = formats.read_text(tmp_path / "maze.txt")
        assert same(read, maze) and torch.equal(marks, path[i : i + 1])


def test_connections_may_lie_in_a_folder(tmp_path):
    mazes, _ = some(SUITES[0])
    formats.write_connections(tmp_path / "c.npz", mazes)
    for name, array in np.load(tmp_path / "c.npz").items():
        np.save(tmp_path / f"{name}.npy", array)
    assert same(formats.read_connections(tmp_path), mazes)


def test_another_way_than_the_first_shortest_is_kept(tmp_path):
    (tmp_path / "maze.txt").write_text("S  \n   \n  G\n")
    (tmp_path / "solved.txt").write_text("So \n o \n oG\n")
    maze, path = formats.read_text(tmp_path / "solved.txt")
    assert same(maze, formats.read_text(tmp_path / "maze.txt")[0])
    formats.write_csv(tmp_path / "a.csv", maze, path)
    assert "So  o  oG" in (tmp_path / "a.csv").read_text()
    assert torch.equal(formats.read_csv(tmp_path / "a.csv")[1], path)


# ---- bytes that others read ------------------------------------------------------------------------------------------


def npy(dtype: str, shape: str, body: bytes) -> bytes:
    """An .npy file of version 1.0, whose header is 128 bytes long."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00\x76\x00" + header.encode() + body


def small(tmp_path: Path) -> Mazes:
    (tmp_path / "small.txt").write_text("\n".join(SMALL))
    return formats.read_text(tmp_path / "small.txt")[0]


def test_hrm_bytes(tmp_path):
    formats.write_hrm(tmp_path / "hrm", "train", small(tmp_path))
    formats.write_hrm(tmp_path / "trm", "train", small(tmp_path), trm=True)
    metadata = (
        '{"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 6, "seq_len": 9, '
        '"num_puzzle_identifiers": 1, "total_groups": 1, "mean_puzzle_examples": 1.0, "sets": ["all"]}'
    )
    wanted = {
        "identifiers.json": b'["<blank>"]',
        "train/dataset.json": metadata.encode(),
        "train/all__inputs.npy": npy("|u1", "(1, 9)", bytes([3, 2, 1, 1, 2, 1, 1, 2, 4])),
        "train/all__labels.npy": npy("|u1", "(1, 9)", bytes([3, 5, 1, 1, 5, 1, 1, 5, 4])),
        "train/all__puzzle_identifiers.npy": npy("<i4", "(1,)", bytes(4)),
        "train/all__puzzle_indices.npy": npy("<i4", "(2,)", bytes([0, 0, 0, 0, 1, 0, 0, 0])),
        "train/all__group_indices.npy": npy("<i4", "(2,)", bytes([0, 0, 0, 0, 1, 0, 0, 0])),
    }
    assert contents(tmp_path / "hrm") == wanted
    with_puzzles = metadata.replace('"sets"', '"total_puzzles": 1, "sets"').encode()
    assert contents(tmp_path / "trm") == wanted | {"train/dataset.json": with_puzzles}


def test_csv_bytes(tmp_path):
    formats.write_csv(tmp_path / "a.csv", small(tmp_path), source="hand")
    assert (tmp_path / "a.csv").read_bytes() == b"source,q,a,rating\nhand,S ## ## G,So##o##oG,4\n"


def test_walls_between_cells_are_drawn_in_pixels():
    maze = Mazes(torch.tensor([[[8, 6], [8, 5]]], dtype=torch.uint8), torch.tensor([0]), torch.tensor([2]))
    assert formats.as_text(maze) == ["#####\n#S  #\n### #\n#G  #\n#####"]
    assert formats.as_text(maze, torch.ones(1, 2, 2, dtype=torch.bool)) == ["#####\n#Soo#\n###o#\n#Goo#\n#####"]
    assert formats.as_text(formats.pixels(maze)) == formats.as_text(maze)


@pytest.mark.parametrize(
    "drawing", ["#####\n# S #\n### #\n#  G#\n#####", "#####\n#S  #\n# # #\n#G   \n#####", "S  \n # \n  G"]
)
def test_what_is_no_drawing_in_pixels_is_cells(drawing, tmp_path):
    (tmp_path / "maze.txt").write_text(drawing)
    maze, _ = formats.read_text(tmp_path / "maze.txt")
    assert maze.size == len(drawing.split("\n")) and formats.as_text(maze) == [drawing]


@pytest.mark.parametrize("suite", SUITES[1:3], ids=str)
def test_mlmu_words_say_the_same_maze(suite, tmp_path):
    mazes, _ = some(suite)
    formats.write_mlmu(tmp_path / "a.jsonl", mazes)
    lines = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    cell = lambda word: int(np.ravel_multi_index(json.loads(f"[{word[1:-1]}]"), (mazes.size, mazes.size)))
    shortest = shortest_path(mazes, distances(mazes.passages, mazes.goal))
    turned = 0
    for i, line in enumerate(lines):
        parts = re.fullmatch(
            r"<ADJLIST_START> (.+) ; <ADJLIST_END> <ORIGIN_START> (\S+) <ORIGIN_END> <TARGET_START> (\S+) "
            r"<TARGET_END> <PATH_START> (.+) <PATH_END>",
            line,
        ).groups()
        connections = torch.zeros(1, 2, mazes.size**2, dtype=torch.bool)
        for pair in parts[0].split(" ; "):
            one, other = (cell(word) for word in pair.split())
            turned += one > other
            first, step = min(one, other), abs(one - other)
            assert not connections[0, int(step == 1), first]
            connections[0, int(step == 1), first] = True
        passages = passages_of_connections(connections.view(1, 2, mazes.size, mazes.size))
        assert torch.equal(passages[0], mazes.passages[i])
        assert (cell(parts[1]), cell(parts[2])) == (mazes.start[i], mazes.goal[i])
        assert [cell(word) for word in parts[3].split()] == shortest[i, shortest[i] >= 0].tolist()
    assert 0.4 < turned / sum(line.count(";") for line in lines) < 0.6
    formats.write_mlmu(tmp_path / "b.jsonl", mazes, seed=1)
    assert (tmp_path / "b.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()


# ---- what cannot be trusted ------------------------------------------------------------------------------------------

BAD_MAZES = {  # question, answer, what is wrong with them
    "no S": (["   ", "   ", "  G"], ["   ", "   ", "  G"], "a maze has one S, this one none or several"),
    "two G": (["S G", "   ", "  G"], ["SoG", "   ", "  G"], "a maze has one G, this one none or several"),
    "unsolvable": (["S# ", "## ", "  G"], ["S# ", "## ", "  G"], "no way leads from the start to the goal"),
    "gap": (SMALL, ["So#", "# #", "#oG"], "the marked cells are not one way from S to G"),
    "branch": (["S  ", "   ", "  G"], ["Soo", " o ", " oG"], "the marked cells are not one way from S to G"),
    "loop": (["S  ", "   ", "  G"], ["Soo", "ooo", "  G"], "the marked cells are not one way from S to G"),
}
bad_mazes = pytest.mark.parametrize(("question", "answer", "why"), BAD_MAZES.values(), ids=BAD_MAZES)

HEADER = "source,q,a,rating\n"


def refused(read: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        read()
    assert "\n" not in str(caught.value)


def line_of(question: list[str], answer: list[str]) -> str:
    return f"x,{''.join(question)},{''.join(answer)},1\n"


@bad_mazes
def test_a_bad_maze_is_named_wherever_it_stands(question, answer, why, tmp_path):
    drawing, csv, folder = tmp_path / "maze.txt", tmp_path / "a.csv", tmp_path / "hrm" / "test"
    drawing.write_text("\n".join(answer))
    refused(lambda: formats.read_text(drawing), f"^{drawing}: {why}")
    csv.write_text(HEADER + line_of(SMALL, SOLVED) + line_of(question, answer))
    refused(lambda: formats.read_csv(csv), f"^{csv}, line 3: {why}")
    folder.mkdir(parents=True)
    for name, mazes in (("inputs", (SMALL, question)), ("labels", (SOLVED, answer))):
        ids = [["_# SGo".index(letter) for letter in "".join(rows)] for rows in mazes]
        np.save(folder / f"all__{name}.npy", np.array(ids, np.uint8))
    refused(lambda: formats.read_hrm(tmp_path / "hrm", "test"), f"^{folder}, row 1: {why}")


BAD_CSV = {
    "": "the first line is source,q,a,rating",
    HEADER: "and in each after it stands a maze",
    "q,a\n" + line_of(SMALL, SOLVED): "the first line is source,q,a,rating",
    HEADER + "x,y,z\n": "line 2: 3 fields, not 4",
    HEADER + line_of(SMALL, [*SOLVED, "#"]): "line 2, a: 10 characters, the first maze has 9",
    HEADER + line_of(SMALL, SOLVED) + line_of(SMALL[:2], SOLVED): "line 3, q: 6 characters, the first maze has 9",
    HEADER + line_of(SMALL[:2], SOLVED[:2]): "line 2: 6 cells are no square",
    HEADER + line_of(["S x", "   ", "  G"], SOLVED): "line 2, q: unknown character 'x'; those of a maze are '# SGo'",
    HEADER + line_of(SMALL, ["So#", "#ö#", "#oG"]): "line 2, a: unknown character 'ö'",
    HEADER + line_of(SOLVED, SOLVED): "line 2: the question has an o in it",
    HEADER + line_of(SMALL, ["So ", "#o#", "#oG"]): "line 2: the answer changes more of the maze than floor to o",
    HEADER + "x," + 200_000 * "#": "field larger than field limit",
}


@pytest.mark.parametrize(("text", "why"), BAD_CSV.items(), ids=BAD_CSV.values())
def test_bad_csv(text, why, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    refused(lambda: formats.read_csv(tmp_path / "a.csv"), rf"a\.csv.*{why}")


BAD_DRAWINGS = {
    "": "line 1: 0 characters in a drawing of 1 lines",
    "S #\n# #\n": "line 1: 3 characters in a drawing of 2 lines, which has to be square",
    "S #\n#\n# G\n": "line 2: 1 characters in a drawing of 3 lines.*spaces at the end of a line count",
    "S #\n#.#\n# G\n": "line 2: unknown character '.'",
    "\udcff": "line 1: unknown character '\ufffd'",
}


@pytest.mark.parametrize(("text", "why"), BAD_DRAWINGS.items(), ids=BAD_DRAWINGS.values())
def test_bad_drawings(text, why, tmp_path):
    (tmp_path / "maze.txt").write_bytes(text.encode(errors="surrogateescape"))
    refused(lambda: formats.read_text(tmp_path / "maze.txt"), rf"maze\.txt, {why}")


IDS = np.array([[3, 2, 1, 1, 2, 1, 1, 2, 4]], np.uint8)
LABELS = np.array([[3, 5, 1, 1, 5, 1, 1, 5, 4]], np.uint8)
BAD_HRM = {
    "float32 .1, 9. is not uint8": (IDS.astype(np.float32), LABELS),
    "uint8 .1, 3, 3. is not uint8 .mazes, cells.": (IDS.reshape(1, 3, 3), LABELS),
    "the shape .2, 9. is not that of the inputs, .1, 9.": (IDS, np.tile(LABELS, (2, 1))),
    "row 1: an id is none of 1 to 5": (np.stack([IDS[0], 0 * IDS[0]]), np.tile(LABELS, (2, 1))),
    "it doesn't hold the arrays all__inputs, all__labels": (IDS, np.array([{}])),
}


@pytest.mark.parametrize(("why", "arrays"), BAD_HRM.items(), ids=BAD_HRM)
def test_bad_hrm(why, arrays, tmp_path):
    (tmp_path / "test").mkdir()
    for name, array in zip(("inputs", "labels"), arrays, strict=True):
        np.save(tmp_path / "test" / f"all__{name}.npy", array)
    refused(lambda: formats.read_hrm(tmp_path, "test"), why)


def connections(**changes: object) -> dict[str, np.ndarray]:
    """Two mazes of 2 x 2 cells, the way from top left to bottom left through all of them."""
    maze = np.array([[[False, True], [False, False]], [[True, False], [True, False]]])
    arrays = {"connection_list": np.stack([maze, maze]), "start_pos": [[0, 0], [0, 0]], "end_pos": [[1, 0], [1, 0]]}
    return {name: np.array(array) for name, array in (arrays | changes).items()}


BAD_CONNECTIONS = {
    "connection_list is int64 .2, 2., not bool": {"connection_list": [[1, 0], [0, 1]]},
    "start_pos is int64 .2., not integers .2, 2.": {"start_pos": [0, 0]},
    "end_pos is float64 .2, 2., not integers": {"end_pos": [[1.0, 0.0], [1.0, 0.0]]},
    "row 1: end_pos lies outside of 2 x 2 cells": {"end_pos": [[1, 0], [2, 0]]},
    "row 1: start_pos lies outside": {"start_pos": [[0, 0], [0, -1]]},
    "row 1: start and goal are the same cell": {"end_pos": [[1, 0], [0, 0]]},
    "row 0: no way leads from the start to the goal": {"connection_list": np.zeros((2, 2, 2, 2), bool)},
    "row 0: a connection leads out of the maze": {"connection_list": np.ones((2, 2, 2, 2), bool)},
}


@pytest.mark.parametrize(("why", "changes"), BAD_CONNECTIONS.items(), ids=BAD_CONNECTIONS)
def test_bad_connections(why, changes, tmp_path):
    np.savez(tmp_path / "c.npz", **connections(**changes))
    refused(lambda: formats.read_connections(tmp_path / "c.npz"), rf"c\.npz.*{why}")


def test_files_of_another_kind(tmp_path):
    np.savez(tmp_path / "good.npz", **connections())
    assert formats.as_text(formats.read_connections(tmp_path / "good.npz"))[0] == "#####\n#S  #\n### #\n#G  #\n#####"
    np.savez(tmp_path / "other.npz", start_pos=[0, 0])
    (tmp_path / "text.npz").write_text("S G")
    for name in ("other.npz", "text.npz"):
        refused(lambda name=name: formats.read_connections(tmp_path / name), f"{name}: it doesn't hold the arrays")
    with pytest.raises(FileNotFoundError):
        formats.read_connections(tmp_path / "none.npz")


def test_writers_refuse_too(tmp_path):
    cells, _ = some(SUITES[0])
    refused(lambda: formats.write_csv(tmp_path / "a.csv", cells), r"have walls between cells.*write pixels\(mazes\)")
    mazes = formats.pixels(cells)
    refused(lambda: formats.write_hrm(tmp_path, "x", mazes, mazes.passages > 0), "maze 0: the marked cells are not")
    mazes.passages[2] = 0
    for write in (formats.write_csv, formats.write_mlmu):
        refused(lambda write=write: write(tmp_path / "a", mazes), "maze 2: no way leads from the start to the goal")
    assert not list(tmp_path.iterdir())
