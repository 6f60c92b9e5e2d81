"""Which files become documents, what is skipped, how they are split, and what bad input says."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.text import Document, load_corpus, split_documents
from tasks.text.corpus import VAL_FRACTION


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents}


# ------------------------------------------------------------------------------------------------------------- reading


def test_folder_is_read_in_order_without_hidden_files_and_line_ends_survive(tmp_path):
    root = tmp_path / "books"
    write(root / "b.txt", "b\r\n")
    write(root / "a" / "z.md", "z")
    write(root / "a.py", "a")
    write(root / ".git" / "config", "hidden")
    write(root / "__pycache__" / "a.pyc", "compiled")
    write(root / "void.txt", "")
    corpus = load_corpus([root])
    assert list(texts(corpus).items()) == [("books/a.py", "a"), ("books/a/z.md", "z"), ("books/b.txt", "b\r\n")]
    assert corpus.num_bytes == 5 and corpus.num_empty == 1 and corpus.skipped == ()


def test_hash_moves_with_folder_and_changes_with_names_contents_and_borders(tmp_path):
    def sha256(where: str, files: dict[str, str]) -> str:
        for name, content in files.items():
            write(tmp_path / where / "data" / name, content)
        return load_corpus([tmp_path / where / "data"]).sha256

    original = sha256("1", {"a": "xy", "b": "z"})
    assert sha256("2", {"a": "xy", "b": "z"}) == original
    others = [{"a": "xy", "c": "z"}, {"a": "xy", "b": "Z"}, {"a": "x", "b": "yz"}, {"a": "xydata/bz"}]
    assert original not in {sha256(f"other{i}", files) for i, files in enumerate(others)}


def test_what_is_not_utf8_is_skipped_and_named(tmp_path):
    write(tmp_path / "d" / "good.txt", "good")
    write(tmp_path / "d" / "latin.txt", "é".encode("latin-1"))
    write(tmp_path / "d" / "lines.jsonl", b'{"text": "fine"}\n{"text": "\xe9"}\n{"text": "\\ud800 alone"}\n')
    corpus = load_corpus([tmp_path / "d"])
    assert texts(corpus) == {"d/good.txt": "good", "d/lines.jsonl:1": "fine"}
    assert corpus.skipped == ("d/latin.txt", "d/lines.jsonl:2", "d/lines.jsonl:3")
    assert "skipped 3 not in UTF-8: d/latin.txt, d/lines.jsonl:2, d/lines.jsonl:3" in corpus.summary()


def test_jsonl_lines_are_documents(tmp_path):
    records = [{"content": "c", "text": "t"}, {"id": 1, "article": "two\u2028lines"}, {"document": None}]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path = write(tmp_path / "data.jsonl", lines)
    corpus = load_corpus([path])
    assert texts(corpus) == {"data.jsonl:1": "t", "data.jsonl:3": "two\u2028lines"}
    assert corpus.num_empty == 1
    write(path, '{"text": "t", "title": "named"}')
    assert texts(load_corpus([path], text_field="title")) == {"data.jsonl:1": "named"}


def test_parquet_rows_are_documents(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "content": ["one", None, "trois é"]}), path)
    assert texts(load_corpus([path])) == {"data.parquet:1": "one", "data.parquet:3": "trois é"}


def test_default_is_the_standard_library_and_max_documents_takes_the_first():
    corpus = load_corpus(max_documents=5)
    names = [document.name for document in corpus.documents]
    assert len(names) == 5 and names == sorted(names) and all(name.endswith(".py") for name in names)
    assert not any("packages" in name for name in names)
    assert corpus.sha256 == load_corpus(max_documents=5).sha256


def test_subset_is_drawn_by_lot_once_and_for_all(tmp_path):
    lines = "\n".join(json.dumps({"text": f"text {i}"}) for i in range(200))
    path = write(tmp_path / "data.jsonl", lines)
    whole, drawn = load_corpus([path]), load_corpus([path], subset_size=50)
    names = list(texts(drawn))
    assert len(names) == 50 and names == [name for name in texts(whole) if name in names]  # in their order
    assert drawn.sha256 == load_corpus([path], subset_size=50).sha256 != whole.sha256
    assert set(texts(load_corpus([path], subset_size=20))) < set(names)
    places = [int(name.split(":")[1]) for name in names]
    assert 60 < np.mean(places) < 140 and max(places) > 150
    assert load_corpus([path], subset_size=1000).sha256 == load_corpus([path], subset_size=0).sha256 == whole.sha256


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("lines.jsonl", '{"text": "a"}\n{"text": ', ValueError, r"lines.jsonl:2: not JSON"),
        ("lines.jsonl", '["a"]', ValueError, r"lines.jsonl:1: expected an object"),
        ("lines.jsonl", '{"title": "a", "n": 1}', ValueError, r"lines.jsonl:1: no field named .*it has title, n"),
        ("lines.jsonl", '{"text": 3}', ValueError, r"lines.jsonl:1: .*must hold a string, found int"),
        ("rows.parquet", "no parquet", ValueError, r"rows.parquet: not a readable Parquet file"),
        ("empty.txt", "", ValueError, r"There is no text in .*1 are empty, 0 are not UTF-8"),
        ("binary.bin", b"\xff\xfe", ValueError, r"0 are empty, 1 are not UTF-8 \(binary.bin\)"),
    ],
)
def test_bad_file_is_named_in_a_sentence(tmp_path, name, content, error, words):
    with pytest.raises(error, match=words):
        load_corpus([write(tmp_path / name, content)])


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"title": ["a"], "text": [7]}), path)
    with pytest.raises(ValueError, match="'text' holds int64"):
        load_corpus([path])
    with pytest.raises(ValueError, match="no field named body; it has title, text"):
        load_corpus([path], text_field="body")


def test_bad_paths(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        load_corpus([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="There is no text in"):
        load_corpus([tmp_path])
    with pytest.raises(TypeError, match="list of paths"):
        load_corpus("single.txt")
    with pytest.raises(ValueError, match="max_documents must be at least 1"):
        load_corpus(max_documents=0)
    with pytest.raises(ValueError, match="subset_size must be at least 1"):
        load_corpus(subset_size=-1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    secret = write(tmp_path / "secret.txt", "text")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so file modes prove nothing
    with pytest.raises(PermissionError, match=r"Cannot read .*secret.txt .*Permission denied"):
        load_corpus([secret])


# --------------------------------------------------------------------------------------------------------------- split


def documents(count: int) -> list[Document]:
    return [Document(f"{i}.txt", f"text {i}") for i in range(count)]


def test_split_is_disjoint_complete_and_independent_of_order():
    given = documents(1000)
    train, val = split_documents(given)
    assert sorted(train + val, key=given.index) == given and not set(train) & set(val)
    assert 0.5 * VAL_FRACTION < len(val) / len(given) < 2 * VAL_FRACTION
    shuffled = random.Random(0).sample(given, len(given))
    assert set(split_documents(shuffled)[1]) == set(val)
    # A document keeps its side when others come or go.
    assert set(split_documents(given[:500])[1]) == set(val) & set(given[:500])


@pytest.mark.parametrize("count", range(2, 40))
def test_both_sides_get_a_document(count):
    train, val = split_documents(documents(count))
    assert train and val


def test_equal_texts_never_straddle():
    given = [Document(f"{name}/{document.name}", document.text) for name in "ab" for document in documents(30)]
    train, val = split_documents(given)
    assert train and val and not {document.text for document in train} & {document.text for document in val}
    with pytest.raises(ValueError, match="All 3 documents hold the same text"):
        split_documents([Document(str(i), "same") for i in range(3)])


def test_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    [head], [tail] = split_documents([Document("book.txt", text)])
    assert head.text + tail.text == text and head.text.endswith("\n")
    assert 0.9 * len(text) < len(head.text) <= 0.95 * len(text)
    [head], [tail] = split_documents([Document("one line", "x" * 1000)])
    assert (len(head.text), len(tail.text)) == (950, 50)
