"""Maze files: those of HRM and TRM, of maze-dataset and of MLM-U, and drawings that people read and write.

    write_hrm, read_hrm                  folders of .npy files and dataset.json, what HRM and TRM train on
    write_csv, read_csv                  source,q,a,rating: what these are built from
    write_connections, read_connections  maze-dataset's arrays
    write_mlmu                           a line of JSON for each maze, with the words that MLM-U trains on
    as_text, write_text, read_text       a drawing of one maze

The first two and the drawings are made of characters: # wall, space floor, S, G, and o for the way between them. Each
is a cell; where walls lie between cells, as in perfect-N, `pixels` makes cells of the walls first.

Writers mark the shortest way of `distance.shortest_path` unless given another. Readers refuse what cannot be trusted,
mazes without a way to the goal included, with a ValueError that says where it is and what is wrong with it. A floor
cell without neighbours comes back as a wall: passages don't tell them apart, and nobody can walk on either.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tasks import random
from tasks.maze.distance import distances, shortest_path
from tasks.maze.generate import drawn
from tasks.maze.grid import Mazes, exits, marked, passages_of_connections, passages_of_floor
from tasks.maze.score import start_distance
from tasks.reading import read_arrays

CHARSET = "# SGo"
WALL, FLOOR, START, GOAL, PATH = range(1, 6)  # ids in the order of CHARSET; 0 pads
CHARACTERS = np.frombuffer(b"\0" + CHARSET.encode(), np.uint8)  # by id
IDS = np.zeros(256, np.uint8)  # by character
IDS[CHARACTERS] = np.arange(6)
CSV_HEADER = ["source", "q", "a", "rating"]
MAX_SIZE = 181  # of mazes each way: a way through all N * N cells is counted in int16

Place = Callable[[int], str]  # where maze i of a batch stands


def _refuse(bad: Tensor, place: Place, why: str) -> None:
    """A ValueError about the first of the mazes that are `bad`, bool [B], if any is."""
    if bad.any():
        raise ValueError(f"{place(int(bad.byte().argmax()))}: {why}")


def _place(file: Path | str, unit: str = "row", first: int = 0) -> Place:
    return lambda maze: f"{file}, {unit} {maze + first}"


# ---- cells, pixels, ways ---------------------------------------------------------------------------------------------


def connections_of_passages(passages: Tensor) -> Tensor:
    """bool [B, 2, N, N], open to below and open to the right: the inverse of `passages_of_connections`."""
    return exits(passages)[..., [1, 3]].permute(0, 3, 1, 2)


def is_floor_grid(mazes: Mazes) -> bool:
    """No wall lies between two cells: walls are cells themselves."""
    return torch.equal(mazes.passages, passages_of_floor(mazes.passages > 0))


def pixels(mazes: Mazes) -> Mazes:
    """The same mazes on 2N + 1 x 2N + 1 cells, which are the old ones and the walls and passages around them."""
    size = mazes.size
    floor = pad(drawn(mazes.passages)[:, :-2, :-2], (1, 0, 1, 0))
    ends = [(2 * (cell // size) + 1) * (2 * size + 1) + 2 * (cell % size) + 1 for cell in (mazes.start, mazes.goal)]
    return Mazes(passages_of_floor(floor), *ends)


def _pixel_marks(path: Tensor) -> Tensor:
    """bool [B, 2N + 1, 2N + 1] of bool [B, N, N]: marked cells, and what lies between two of them."""
    marks = path.new_zeros(len(path), *(2 * n + 1 for n in path.shape[1:]))
    marks[:, 1::2, 1::2] = path
    marks[:, 2:-1:2, 1::2] = path[:, 1:] & path[:, :-1]
    marks[:, 1::2, 2:-1:2] = path[:, :, 1:] & path[:, :, :-1]
    return marks


def _steps(mazes: Mazes, place: Place) -> Tensor:
    """Steps to the goals, int16 [B, N, N], of mazes that can be solved; refuses others."""
    too_large = torch.full_like(mazes.start, mazes.size > MAX_SIZE, dtype=torch.bool)
    _refuse(too_large, place, f"{mazes.size} x {mazes.size} cells are too many; there may be {MAX_SIZE} each way")
    _refuse(mazes.start == mazes.goal, place, "start and goal are the same cell")
    steps = distances(mazes.passages, mazes.goal)
    _refuse(start_distance(mazes, steps) < 0, place, "no way leads from the start to the goal")
    return steps


def _check_way(mazes: Mazes, path: Tensor, place: Place) -> None:
    """Over marked cells one gets from start to goal, and only by entering all of them. path: bool [B, N, N]."""
    steps = start_distance(mazes, distances(mazes.passages * path, mazes.goal))
    _refuse(steps + 1 != path.sum((1, 2)), place, "the marked cells are not one way from S to G, without a branch")


# ---- mazes as characters ---------------------------------------------------------------------------------------------


def _ids(mazes: Mazes, path: Tensor | None = None) -> np.ndarray:
    """Ids of the characters of floor grids, uint8 [B, N * N]; what `path` marks of the floor becomes an o."""
    ids = torch.where(mazes.passages > 0, FLOOR, WALL)
    if path is not None:
        ids[path & (ids == FLOOR)] = PATH
    ids = ids.flatten(1).scatter(1, mazes.start.unsqueeze(1), START).scatter(1, mazes.goal.unsqueeze(1), GOAL)
    return ids.to("cpu", torch.uint8).numpy()


def _questions_and_answers(mazes: Mazes, path: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, N * N] each."""
    if not is_floor_grid(mazes):
        raise ValueError("these mazes have walls between cells, this format has walls for cells: write pixels(mazes)")
    place = "maze {}".format
    steps = _steps(mazes, place)
    path = marked(shortest_path(mazes, steps), mazes.size) if path is None else path
    _check_way(mazes, path, place)
    return _ids(mazes), _ids(mazes, path)


def _ids_of(text: str, place: str) -> np.ndarray:
    """uint8 [len(text)]."""
    unknown = sorted(set(text) - set(CHARSET))
    if unknown:
        raise ValueError(f"{place}: unknown character {unknown[0]!r}; those of a maze are {CHARSET!r}")
    return IDS[np.frombuffer(text.encode(), np.uint8)]


def _mazes(ids: Tensor, place: Place) -> Mazes:
    """Of questions, uint8 [B, N * N]."""
    size = math.isqrt(ids.shape[1])
    _refuse(torch.full((len(ids),), size**2 != ids.shape[1]), place, f"{ids.shape[1]} cells are no square")
    _refuse((ids == PATH).any(1), place, "the question has an o in it")
    for letter, end in (("S", START), ("G", GOAL)):
        _refuse((ids == end).sum(1) != 1, place, f"a maze has one {letter}, this one none or several")
    floor = (ids != WALL).view(-1, size, size)
    mazes = Mazes(passages_of_floor(floor), *((ids == end).byte().argmax(1) for end in (START, GOAL)))
    _steps(mazes, place)
    return mazes


def _solved(questions: np.ndarray, answers: np.ndarray, place: Place) -> tuple[Mazes, Tensor]:
    """Mazes and their marked paths, of ids."""
    asked, said = torch.from_numpy(questions), torch.from_numpy(answers)
    mazes = _mazes(asked, place)
    marks = (asked == FLOOR) & (said == PATH)
    _refuse(((asked != said) & ~marks).any(1), place, "the answer changes more of the maze than floor to o")
    path = (marks | (asked == START) | (asked == GOAL)).view_as(mazes.passages)
    _check_way(mazes, path, place)
    return mazes, path


# ---- HRM and TRM -----------------------------------------------------------------------------------------------------


def write_hrm(folder: Path | str, split: str, mazes: Mazes, path: Tensor | None = None, *, trm: bool = False) -> None:
    """FOLDER/SPLIT/all__*.npy and dataset.json, FOLDER/identifiers.json; `trm` adds the total_puzzles that TRM reads.

    Args:
        mazes: on floor grids; `pixels(mazes)` of others.
        path: bool [B, N, N], what the answers mark.
    """
    questions, answers = _questions_and_answers(mazes, path)
    count, cells = questions.shape
    every = np.arange(count + 1, dtype=np.int32)  # a group is one puzzle, which is one example
    arrays = {"inputs": questions, "labels": answers, "group_indices": every, "puzzle_indices": every}
    arrays["puzzle_identifiers"] = np.zeros(count, np.int32)
    metadata = {"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": len(CHARSET) + 1}
    metadata |= {"seq_len": cells, "num_puzzle_identifiers": 1, "total_groups": count, "mean_puzzle_examples": 1.0}
    metadata |= {"total_puzzles": count, "sets": ["all"]} if trm else {"sets": ["all"]}
    there = Path(folder, split)
    there.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(there / f"all__{name}.npy", array)
    (there / "dataset.json").write_text(json.dumps(metadata))
    Path(folder, "identifiers.json").write_text(json.dumps(["<blank>"]))


def read_hrm(folder: Path | str, split: str) -> tuple[Mazes, Tensor]:
    """Mazes on floor grids, and the paths their labels mark, bool [B, N, N]."""
    there = Path(folder, split)
    names = ("all__inputs", "all__labels")
    questions, answers = read_arrays(there, names)
    for name, ids in zip(names, (questions, answers), strict=True):
        file = there / f"{name}.npy"
        if ids.dtype != np.uint8 or ids.ndim != 2 or not len(ids):
            raise ValueError(f"{file}: {ids.dtype} {list(ids.shape)} is not uint8 [mazes, cells]")
        if ids.shape != questions.shape:
            raise ValueError(f"{file}: the shape {list(ids.shape)} is not that of the inputs, {list(questions.shape)}")
        strange = torch.from_numpy((ids < WALL) | (ids > PATH)).any(1)
        _refuse(strange, _place(file), f"an id is none of 1 to 5, which stand for {CHARSET!r}")
    return _solved(questions, answers, _place(there))


# ---- CSV -------------------------------------------------------------------------------------------------------------


def write_csv(file: Path | str, mazes: Mazes, path: Tensor | None = None, *, source: str = "tenfold") -> None:
    """A line for each maze, N * N characters of question and of answer; the rating is the length of the marked path."""
    questions, answers = (CHARACTERS[ids] for ids in _questions_and_answers(mazes, path))
    with open(file, "w", newline="") as lines:
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(CSV_HEADER)
        for q, a in zip(questions, answers, strict=True):
            rating = int((a == ord("o")).sum()) + 1
            rows.writerow([source, q.tobytes().decode(), a.tobytes().decode(), rating])


def read_csv(file: Path | str) -> tuple[Mazes, Tensor]:
    """Mazes on floor grids, and the paths their answers mark, bool [B, N, N]."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        try:
            header, *rows = [*csv.reader(lines)] or [[]]
        except csv.Error as error:
            raise ValueError(f"{file}: {error}") from None
    if header != CSV_HEADER or not rows:
        raise ValueError(f"{file}: the first line is {','.join(CSV_HEADER)}, and in each after it stands a maze")
    place = _place(file, "line", 2)
    columns: list[list[np.ndarray]] = [[], []]
    for i, row in enumerate(rows):
        if len(row) != len(CSV_HEADER):
            raise ValueError(f"{place(i)}: {len(row)} fields, not {len(CSV_HEADER)}")
        for name, text, column in zip("qa", row[1:3], columns, strict=True):
            column.append(_ids_of(text, f"{place(i)}, {name}"))
            if len(text) != len(columns[0][0]):
                raise ValueError(f"{place(i)}, {name}: {len(text)} characters, the first maze has {len(columns[0][0])}")
    return _solved(*map(np.stack, columns), place)


# ---- maze-dataset ----------------------------------------------------------------------------------------------------


def write_connections(file: Path | str, mazes: Mazes) -> None:
    """connection_list, start_pos and end_pos, the names that maze-dataset's mazes have for them, in an .npz file."""
    passages, *ends = mazes.to("cpu")
    start, goal = (torch.stack([cell // mazes.size, cell % mazes.size], 1).numpy() for cell in ends)
    np.savez(file, connection_list=connections_of_passages(passages).numpy(), start_pos=start, end_pos=goal)


def read_connections(file: Path | str) -> Mazes:
    """Of an .npz file, or of a folder of .npy files: connection_list bool [B, 2, N, N], which is open to below and open
    to the right, start_pos and end_pos int [B, 2], rows and columns."""
    names = ("connection_list", "start_pos", "end_pos")
    connections, *ends = read_arrays(Path(file), names)
    shape = connections.shape
    if connections.dtype != bool or len(shape) != 4 or shape[1] != 2 or shape[2] != shape[3] or not len(connections):
        raise ValueError(f"{file}: connection_list is {connections.dtype} {list(shape)}, not bool [mazes, 2, N, N]")
    for name, cell in zip(names[1:], ends, strict=True):
        if cell.dtype.kind not in "iu" or cell.shape != (shape[0], 2):
            raise ValueError(f"{file}: {name} is {cell.dtype} {list(cell.shape)}, not integers [{shape[0]}, 2]")
    place, size = _place(file), shape[-1]
    connections, *ends = (torch.from_numpy(x) for x in (connections, *(cell.astype(np.int64) for cell in ends)))
    outside = connections[:, 0, -1].any(1) | connections[:, 1, :, -1].any(1)
    _refuse(outside, place, "a connection leads out of the maze")
    for name, cell in zip(names[1:], ends, strict=True):
        _refuse(((cell < 0) | (cell >= size)).any(1), place, f"{name} lies outside of {size} x {size} cells")
    mazes = Mazes(passages_of_connections(connections), *(cell @ torch.tensor([size, 1]) for cell in ends))
    _steps(mazes, place)
    return mazes


# ---- MLM-U -----------------------------------------------------------------------------------------------------------


def write_mlmu(file: Path | str, mazes: Mazes, seed: int = 0) -> None:
    """{"text": adjacency list, origin, target and the shortest way, in words with spaces between} for each maze.

    As in maze-dataset's tokens, whose arrows MLM-U leaves out, connections come in a random order and either way round.
    """
    mazes, size, count = mazes.to("cpu"), mazes.size, len(mazes.start)
    path = shortest_path(mazes, _steps(mazes, "maze {}".format)).tolist()
    open_ = connections_of_passages(mazes.passages).flatten(1)  # [B, 2 * N * N]
    key = random.keys(seed, torch.arange(count))
    order, turned = random.order(key, 2 * size**2), random.integers(key, 2 * size**2, 2, stream=1).bool().tolist()
    words = [f"({row},{column})" for row in range(size) for column in range(size)]
    with open(file, "w", newline="\n") as lines:
        for i in range(count):
            text = ["<ADJLIST_START>"]
            for edge in order[i, open_[i, order[i]]].tolist():
                cell = edge % size**2
                pair = [words[cell], words[cell + (size if edge < size**2 else 1)]]
                text += [*(reversed(pair) if turned[i][edge] else pair), ";"]
            way = [words[cell] for cell in path[i] if cell >= 0]
            text += ["<ADJLIST_END>", "<ORIGIN_START>", way[0], "<ORIGIN_END>", "<TARGET_START>", way[-1]]
            text += ["<TARGET_END>", "<PATH_START>", *way, "<PATH_END>"]
            lines.write(json.dumps({"text": " ".join(text)}) + "\n")


# ---- drawings --------------------------------------------------------------------------------------------------------


def as_text(mazes: Mazes, path: Tensor | None = None) -> list[str]:
    """A drawing of each maze, N lines of N characters or, of mazes with walls between cells, 2N + 1 of 2N + 1.

    Args:
        path: bool [B, N, N], what is marked.
    """
    if not is_floor_grid(mazes):
        mazes, path = pixels(mazes), None if path is None else _pixel_marks(path)
    drawings = CHARACTERS[_ids(mazes, path)].reshape(len(mazes.start), mazes.size, mazes.size)
    return ["\n".join(row.tobytes().decode() for row in drawing) for drawing in drawings]


def write_text(file: Path | str, maze: Mazes, path: Tensor | None = None) -> None:
    """The drawing of a batch of one maze."""
    (drawing,) = as_text(maze, path)
    Path(file).write_text(drawing + "\n", newline="\n")


def read_text(file: Path | str) -> tuple[Mazes, Tensor | None]:
    """One maze, and the path that is marked in it, bool [1, N, N], if there is one.

    A drawing of 2N + 1 lines has walls between N x N cells if every character at an even row and column, from 0, and
    all around is a wall, and none at an odd row and column.
    """
    lines = Path(file).read_text(encoding="utf-8-sig", errors="replace").removesuffix("\n").split("\n")
    wide, rows = len(lines), []
    for number, line in enumerate(lines, 1):
        rows.append(_ids_of(line, f"{file}, line {number}"))
        if len(line) != wide:
            raise ValueError(
                f"{file}, line {number}: {len(line)} characters in a drawing of {wide} lines, which has to be square; "
                "spaces at the end of a line count"
            )
    answer = np.concatenate(rows)[None]  # [1, N * N]
    question = np.where(answer == PATH, np.uint8(FLOOR), answer)

    def place(_: int) -> str:
        return str(file)

    path = _solved(question, answer, place)[1] if PATH in answer else None
    mazes = _mazes(torch.from_numpy(question), place)
    cells = _cells(mazes, torch.from_numpy(question != WALL).view(-1, wide, wide))
    return cells, path if path is None or cells is mazes else path[:, 1::2, 1::2]


def _cells(mazes: Mazes, floor: Tensor) -> Mazes:
    """The cells of a maze that is drawn in pixels; any other as it is. floor: bool [1, N, N]."""
    wide, ends = mazes.size, torch.cat([mazes.start, mazes.goal])
    border = floor[:, [0, -1]].any() | floor[:, :, [0, -1]].any()
    between = (ends // wide % 2 == 0) | (ends % wide % 2 == 0)
    if wide % 2 == 0 or border or floor[:, ::2, ::2].any() or not floor[:, 1::2, 1::2].all() or between.any():
        return mazes
    connections = torch.stack([floor[:, 2::2, 1::2], floor[:, 1::2, 2::2]], 1)
    return Mazes(passages_of_connections(connections), *(ends // wide // 2 * (wide // 2) + ends % wide // 2).split(1))
