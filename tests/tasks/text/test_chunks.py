"""Chunks: what is written comes back as windows, the original's folders are read, and damage is found."""

import json

import numpy as np
import pytest
import torch

from tasks.text import BPETokenizer, ByteTokenizer, Document, TextTask, chunks, load_tokenizer, split_documents
from tasks.text.chunks import read_chunks, write_chunks
from tasks.text.corpus import Holdout
from tasks.text.packing import pack


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))


DOCUMENTS = [Document(str(i), f"the text of document {i}\n" * (1 + i % 3)) for i in range(60)]
TEXTS = [document.text for document in DOCUMENTS]
BPE = BPETokenizer.train(TEXTS, 280)
EOS = [ByteTokenizer().eos_id]


def write(folder, tokenizer=BPE, **options):
    settings = {"names": {"dataset": "mine", "tokenizer": "bpe"}, "chunk_size": 100, "batch_size": 7, **options}
    return write_chunks(folder, DOCUMENTS, tokenizer, Holdout.of(TEXTS), **settings)


def test_chunks_hold_every_token_once_and_come_back_as_windows(tmp_path):
    metadata = write(tmp_path / "c")
    files = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "c").glob("chunk_*.pt"))]
    assert all(ids.dtype == torch.int64 for ids in files) and [len(ids) for ids in files[:-1]] == [100] * len(
        files[:-1]
    )
    assert (tmp_path / "c" / "chunk_000000.pt").exists() and len(files) == metadata["num_chunks"] > 3
    splits = split_documents(DOCUMENTS)
    want = [pack([document.text for document in split], BPE) for split in splits]
    assert torch.cat(files).tolist() == want[0].tolist() and metadata["total_tokens"] == len(want[0])
    assert metadata["vocab_size"] == 280 and metadata["eos_token_id"] == BPE.eos_id

    task = TextTask(pretokenized=tmp_path / "c", seq_len=16, verbose=False)
    assert task.train.tokens.tolist() == want[0].tolist() and task.val.tokens.tolist() == want[1].tolist()
    assert task.train.tokens.dtype == np.uint16 and task.tokenizer.to_json() == BPE.to_json()
    assert task.info["val"]["bytes"] == sum(len(document.text.encode()) for document in splits[1])
    assert task.info["pretokenized"] == str(tmp_path / "c") and json.dumps(task.info)
    plain = TextTask(pretokenized=tmp_path / "c", seq_len=16, verbose=False).baselines()
    assert plain == task.baselines() and 0 < plain["token_unigram"] < plain["uniform"]


def test_converted_once(tmp_path, monkeypatch):
    write(tmp_path / "c")
    first = read_chunks(tmp_path / "c", seq_len=16)
    monkeypatch.setattr(chunks, "_load_chunk", None)
    assert read_chunks(tmp_path / "c", seq_len=16).info == first.info


@pytest.mark.parametrize(("max_chunks", "count"), [(2, 2), (1000, 0)])
def test_max_chunks_stops_at_full_ones(tmp_path, max_chunks, count):
    metadata = write(tmp_path / "c", max_chunks=max_chunks, batch_size=60)
    assert metadata["num_chunks"] == count or max_chunks == 1000
    assert read_chunks(tmp_path / "c", seq_len=16).train.tokens.shape == (metadata["total_tokens"],)
    if count:
        assert metadata["total_tokens"] == 100 * count


def the_originals(folder, count=40, vocab_size=257, tokenizer="bytes", **metadata):
    """Chunks as the original's script writes them: no separators, no tail, no tokenizer, no validation."""
    folder.mkdir()
    tokens = torch.randint(0, 256, (count, 50), generator=torch.Generator().manual_seed(0))
    for number, ids in enumerate(tokens):
        torch.save(ids.clone(), folder / f"chunk_{number:06d}.pt")
    about = {"dataset": "imdb", "tokenizer": tokenizer, "vocab_size": vocab_size, "chunk_size": 50}
    about |= {"num_chunks": count, "total_tokens": count * 50 + 13, "pad_token_id": 257, **metadata}
    (folder / "metadata.json").write_text(json.dumps(about))
    return tokens


def test_the_originals_folders_are_read(tmp_path):
    tokens = the_originals(tmp_path / "c")
    ByteTokenizer().save(tmp_path)
    task = TextTask(pretokenized=tmp_path / "c", tokenizer=tmp_path, seq_len=16, verbose=False)
    assert task.train.tokens.tolist() == tokens[:38].flatten().tolist()
    assert task.val.tokens.tolist() == tokens[38:].flatten().tolist() and task.info["corpus"] == "imdb"
    named = json.loads((tmp_path / "c" / "metadata.json").read_text()) | {"tokenizer": str(tmp_path)}
    (tmp_path / "c" / "metadata.json").write_text(json.dumps(named))
    assert load_tokenizer(tmp_path).vocab_size == read_chunks(tmp_path / "c", seq_len=16).tokenizer.vocab_size


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda c: (c / "chunk_000001.pt").unlink(), FileNotFoundError, "chunk_000001.pt is missing"),
        (lambda c: (c / "chunk_000001.pt").write_bytes(b"PK"), ValueError, "chunk_000001.pt is damaged"),
        (lambda c: torch.save(torch.ones(100), c / "chunk_000001.pt"), ValueError, "1-D int64 tensor"),
        (lambda c: torch.save(torch.ones(7).long(), c / "chunk_000001.pt"), ValueError, "holds 7 tokens where .* 100"),
        (lambda c: torch.save(torch.full((100,), 280), c / "chunk_000001.pt"), ValueError, "has 280 tokens"),
        (
            lambda c: torch.save(torch.ones(100).long(), c / "chunk_000001.pt"),
            ValueError,
            "train chunks .* are not those",
        ),
        (lambda c: (c / "metadata.json").unlink(), FileNotFoundError, "There is no .*metadata.json"),
        (lambda c: (c / "metadata.json").write_text("{"), ValueError, "metadata.json is not readable"),
        (lambda c: (c / "metadata.json").write_text("{}"), ValueError, "lacks chunk_size, dataset, num_chunks"),
    ],
)
def test_damage_is_named(tmp_path, damage, error, words):
    write(tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(error, match=words):
        read_chunks(tmp_path / "c", seq_len=16)


def test_bad_folders(tmp_path, monkeypatch):
    the_originals(tmp_path / "c", tokenizer="no/such/tokenizer")
    with pytest.raises(ValueError, match=r"has no tokenizer.json, and its tokenizer no/such/tokenizer can't be loaded"):
        read_chunks(tmp_path / "c", seq_len=16)
    ByteTokenizer().save(tmp_path)
    the_originals(tmp_path / "one", count=1, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="holds 1 chunk"):
        read_chunks(tmp_path / "one", seq_len=16)
    with pytest.raises(ValueError, match="leave out data, dataset"):
        TextTask(pretokenized=tmp_path / "c", dataset="imdb")
    with pytest.raises(ValueError, match="No document read so far is held out"):
        write(tmp_path / "none", max_chunks=1, batch_size=1)

    def full(tensor, path):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"Cannot write .*chunk_000000.pt .*free space"):
        write(tmp_path / "full")
