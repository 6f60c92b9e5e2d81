"""Data that wish us ill. Each test damages sound files; with `-m slow` in twenty times as many ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tasks.arc.formats import load_puzzles, load_solutions, read_submission
from tasks.maze.formats import (
    MAX_SIZE,
    pixels,
    read_connections,
    read_csv,
    read_hrm,
    read_text,
    write_connections,
    write_csv,
    write_hrm,
    write_text,
)
from tasks.maze.generate import Suite, sample
from tasks.molecule import Potential, load_system
from tasks.molecule.formats import read_pdb, write_trajectory
from tasks.molecule.system import ALA2
from tasks.text.chunks import read_chunks, write_chunks
from tasks.text.corpus import Document, Holdout, load_corpus
from tasks.text.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from tests.hostile import accepts_or_refuses, damaged, damaged_bytes, damaged_json, hostile


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# ---- ARC -------------------------------------------------------------------------------------------------------------

TASK = {
    "train": [{"input": [[0, 1], [2, 3]], "output": [[1]]}, {"input": [[0]], "output": [[1, 2]]}],
    "test": [{"input": [[5]], "output": [[1]]}],
}
BUNDLE = {"a": TASK, "b": {"train": TASK["train"], "test": [{"input": [[1]]}]}}
ANSWERS = {"a": [{"attempt_1": [[1]], "attempt_2": [[2]]}], "b": [{"attempt_1": [[1]], "attempt_2": [[2]]}]}


@hostile(60)
def test_arc_files(data, folder):
    read, sound = data.draw(
        st.sampled_from(
            [
                (load_puzzles, TASK),
                (load_puzzles, BUNDLE),
                (load_solutions, {"a": [[[1]]], "b": [[[1, 2]]]}),
                (lambda file: read_submission(file, {"a": 1, "b": 1}), ANSWERS),
            ]
        )
    )
    file = folder / "arc.json"
    file.write_bytes(damaged_json(data, sound))
    accepts_or_refuses(read, file)


def test_a_puzzle_whose_id_no_file_can_hold_is_refused(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"\ud800": TASK}))
    with pytest.raises(ValueError, match=r"puzzle '\\ud800': an id is text"):
        load_puzzles(tmp_path / "bundle.json")


# ---- mazes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maze_files(folder) -> dict[str, tuple[Callable, Path]]:
    mazes = sample(Suite("perfect-3"), "test", torch.arange(3))[0]
    write_hrm(folder / "hrm", "train", pixels(mazes))
    write_csv(folder / "mazes.csv", pixels(mazes))
    write_connections(folder / "mazes.npz", mazes)
    write_text(folder / "maze.txt", mazes.take(torch.tensor([0])))
    hrm = lambda file: read_hrm(folder / "hrm", "train")
    return {
        "inputs": (hrm, folder / "hrm" / "train" / "all__inputs.npy"),
        "labels": (hrm, folder / "hrm" / "train" / "all__labels.npy"),
        "csv": (read_csv, folder / "mazes.csv"),
        "npz": (read_connections, folder / "mazes.npz"),
        "drawing": (read_text, folder / "maze.txt"),
    }


@hostile(150)
def test_maze_files(data, maze_files):
    read, file = maze_files[data.draw(st.sampled_from(sorted(maze_files)))]
    sound = file.read_bytes()
    file.write_bytes(damaged_bytes(data, sound))
    accepts_or_refuses(read, file)
    file.write_bytes(sound)


def test_an_archive_under_an_arrays_name_is_refused(maze_files, tmp_path):
    read, file = maze_files["inputs"]
    sound = file.read_bytes()
    with file.open("wb") as stream:
        np.savez(stream, x=np.ones(3))
    with pytest.raises(ValueError, match="archives"):
        read(file)
    file.write_bytes(sound)


def test_a_maze_whose_way_is_too_long_to_count_is_refused_at_once(tmp_path):
    """A search over 400 x 400 cells would take minutes, and more than 2^15 steps wrap around in int16."""
    wide = MAX_SIZE + 1
    (tmp_path / "maze.txt").write_text("\n".join(["SG" + " " * (wide - 2), *[" " * wide] * (wide - 1)]))
    with pytest.raises(ValueError, match=f"{wide} x {wide} cells are too many"):
        read_text(tmp_path / "maze.txt")


# ---- molecules -------------------------------------------------------------------------------------------------------

MOLECULE = json.loads(ALA2.read_text())


@hostile(60)
def test_molecules(data, folder):
    file = folder / "molecule.json"
    file.write_bytes(damaged_json(data, MOLECULE))
    accepts_or_refuses(lambda: Potential(load_system(file))(torch.zeros(1, 22, 3)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["bonds"]["atoms"].__setitem__(0, [6, 99]), "bonds.atoms needs rows of 2 atoms"),
        (lambda m: m["bonds"]["atoms"].__setitem__(0, [6, 6]), "names an atom twice"),
        (lambda m: m["angles"]["k"].pop(), "angles.k needs a finite number for each of 36 rows"),
        (lambda m: m["charges"].__setitem__(0, 1e200), "charges has 1e.200: in nm, kJ/mol, ps, amu"),
        (lambda m: m["gb"].update(solute_dielectric=0.0), "dielectric constants have to be above 0"),
        (lambda m: m["masses"].__setitem__(0, -1.0), "masses"),
        (lambda m: m.update(zmatrix=[]), "zmatrix needs rows of 4"),
        (lambda m: m.update(soft=[[0]]), "soft needs places"),
    ],
)
def test_numbers_that_fit_no_molecule_are_named(tmp_path, change, words):
    molecule = copy.deepcopy(MOLECULE)
    change(molecule)
    (tmp_path / "m.json").write_text(json.dumps(molecule))
    with pytest.raises(ValueError, match=words):
        load_system(tmp_path / "m.json")


@pytest.fixture(scope="module")
def pdb(folder) -> bytes:
    pytest.importorskip("mdtraj")
    system = load_system()
    write_trajectory(folder / "sound.pdb", torch.from_numpy(system.positions)[None], system)
    return (folder / "sound.pdb").read_bytes()


@hostile(60)
def test_pdb_files(data, folder, pdb):
    file = folder / "damaged.pdb"
    file.write_bytes(damaged_bytes(data, pdb))
    accepts_or_refuses(read_pdb, file, load_system())


def test_a_pdb_is_not_looked_for_on_the_internet():
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_pdb("http://localhost:1/x.pdb", load_system())


# ---- text ------------------------------------------------------------------------------------------------------------

ROWS = b"\n".join(json.dumps(row).encode() for row in ({"text": "a"}, {"text": "é", "x": 1}, {"text": None}))


@hostile(60)
def test_json_lines_and_plain_text(data, folder):
    file = folder / data.draw(st.sampled_from(("rows.jsonl", "plain.txt")))
    rows = [json.dumps(damaged(data, {"text": "a", "y": [1]})).encode(), damaged_bytes(data, ROWS)]
    file.write_bytes(b"\n".join(data.draw(st.permutations(rows))))
    accepts_or_refuses(load_corpus, [file])


@pytest.fixture(scope="module")
def parquet(folder) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(arrow.table({"text": ["a", "b", "c"] * 50, "n": [1, 2, 3] * 50}), folder / "sound.parquet")
    return (folder / "sound.parquet").read_bytes()


@hostile(50)
def test_parquet_files(data, folder, parquet):
    file, footer = folder / "damaged.parquet", len(parquet) - 500
    file.write_bytes(data.draw(st.sampled_from((b"", parquet[:footer]))) + damaged_bytes(data, parquet[footer:]))
    accepts_or_refuses(load_corpus, [file])


TOKENIZER = json.loads(BPETokenizer.train(["hello world the cat " * 30], 262).to_json())


@hostile(60)
def test_tokenizers(data, folder):
    file = folder / "tokenizer.json"
    file.write_bytes(damaged_json(data, TOKENIZER))

    def read() -> None:
        tokenizer = load_tokenizer(file)
        for text in ("abc é", " hello  world\n", "the cat"):
            assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()

    accepts_or_refuses(read)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # A space before every text that begins with none: bits per byte would count bytes that nobody wrote.
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "changes text"),
        (lambda t: t["model"]["vocab"].update(zz=2**31), "ids that are damaged"),
        (lambda t: t["model"]["merges"].insert(0, ["a", ""]), "tokenizer"),
    ],
)
def test_tokenizers_that_only_seem_sound_are_refused(tmp_path, change, words):
    tokenizer = copy.deepcopy(TOKENIZER)
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=words):
        load_tokenizer(tmp_path)


def test_merges_are_not_left_out_by_lot(tmp_path):
    """BPE dropout (arXiv 1910.13267) would give a text other tokens each time, and a shard made again another hash."""
    model = TOKENIZER["model"] | {"dropout": 0.5}
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"model": model}))
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode("hello world the cat").tolist()) for _ in range(20)}) == 1


@pytest.fixture(scope="module")
def chunks(folder) -> Path:
    documents = [Document(str(i), f"document number {i} says hello " * 3) for i in range(40)]
    holdout = Holdout.of([document.text for document in documents])
    names = {"dataset": "d", "tokenizer": "bytes"}
    write_chunks(folder / "chunks", documents, ByteTokenizer(), holdout, names=names, chunk_size=1024)
    return folder / "chunks"


@hostile(60)
def test_chunks(data, chunks):
    file = chunks / data.draw(st.sampled_from(("metadata.json", "chunk_000000.pt")))
    sound = file.read_bytes()
    as_json = file.suffix == ".json"
    file.write_bytes(damaged_json(data, json.loads(sound)) if as_json else damaged_bytes(data, sound))
    accepts_or_refuses(lambda: read_chunks(chunks, seq_len=16))
    file.write_bytes(sound)
