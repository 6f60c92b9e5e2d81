"""Windows over a stream: every token a target once, resets where documents start, padding never a target."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.text import BPETokenizer, ByteTokenizer, PackedDataset, packing
from tasks.text.packing import IGNORE_INDEX, collate, num_items, pack

TEXTS = ["first text", "x", "the third and longest text of all", "é"]
EOS = 256


@pytest.fixture
def stream(tmp_path):
    tokens = pack(TEXTS, ByteTokenizer())
    np.save(tmp_path / "train.npy", tokens)
    return tokens


def dataset(tmp_path, seq_len):
    return PackedDataset(tmp_path / "train.npy", seq_len=seq_len, eos_id=EOS)


def test_stream_is_documents_between_ends_of_text(stream):
    assert stream.dtype == np.uint16
    assert stream.tolist() == [EOS] + [token for text in TEXTS for token in (*text.encode(), EOS)]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 49, 52, 53, 1000])
def test_every_token_after_the_first_is_a_target_once(stream, tmp_path, seq_len):
    windows = list(dataset(tmp_path, seq_len))
    targets = torch.cat([window["labels"] for window in windows])
    kept = targets != IGNORE_INDEX
    assert targets[kept].tolist() == stream[1:].tolist()
    assert kept[: len(stream) - 1].all() and not kept[len(stream) - 1 :].any()
    inputs = torch.cat([window["input_ids"] for window in windows])
    assert inputs[kept].tolist() == stream[:-1].tolist()
    assert (inputs[~kept] == EOS).all()
    # Each target is what follows its own input: labels are shifted here, and nowhere else.
    assert [window["input_ids"][1:].tolist() for window in windows[:-1]] == [
        window["labels"][:-1].tolist() for window in windows[:-1]
    ]


def test_resets_are_document_starts_and_no_target_crosses_one(stream, tmp_path):
    [window] = dataset(tmp_path, 100)
    starts = window["reset"][: len(stream) - 1].nonzero().flatten().tolist()
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    assert starts == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert window["reset"][len(stream) - 1 :].all()
    for start, length in zip(starts, lengths, strict=True):
        assert window["labels"][start + length - 1] == EOS  # the last token of a document predicts its end


def test_items_are_pure_functions_and_typed(stream, tmp_path):
    data = dataset(tmp_path, 8)
    in_order = [data[i] for i in range(len(data))]
    for index in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist():
        for name, dtype in (("input_ids", torch.int64), ("labels", torch.int64), ("reset", torch.bool)):
            assert torch.equal(data[index][name], in_order[index][name])
            assert data[index][name].dtype == dtype and data[index][name].shape == (8,)
    for index in (-1, len(data)):
        with pytest.raises(IndexError):
            data[index]


def test_pickles_without_its_tokens(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(10_000, dtype=np.uint16))
    data = dataset(tmp_path, 16)
    pickled = pickle.dumps(data)
    copy = pickle.loads(pickled)
    assert len(pickled) < 2000 and len(copy) == len(data) == 625
    assert torch.equal(copy[624]["labels"], data[624]["labels"])


def test_collate_and_count(stream, tmp_path):
    data = dataset(tmp_path, 20)
    batch = collate([data[0], data[len(data) - 1]])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 20),
        "labels": (2, 20),
        "reset": (2, 20),
    }
    count = num_items(batch)
    assert count.dtype == torch.int64 and count.shape == ()
    assert count.item() == 20 + (len(stream) - 1) % 20


@settings(max_examples=30, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=40), min_size=1, max_size=8))
def test_long_texts_are_tokenized_in_pieces(texts):
    tokenizer = ByteTokenizer()
    whole = pack(texts, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE_CHARS", 7)
        patch.setattr(packing, "BATCH_CHARS", 20)
        np.testing.assert_array_equal(pack(texts, tokenizer), whole)


def test_pieces_end_with_lines(monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARS", 10)
    text = "def f(x):\n    return x\n" * 30
    tokenizer = BPETokenizer.train([text], vocab_size=280)
    stream = pack([text], tokenizer)
    assert tokenizer.decode(stream) == text and (stream == tokenizer.eos_id).sum() == 2
    [batch] = packing._batches(["ab\ncdefgh\nij", "k"])
    assert batch == [(True, "ab\ncdefgh\n"), (False, "ij"), (True, "k")]


def test_bad_arguments(stream, tmp_path):
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        dataset(tmp_path, 0)
    np.save(tmp_path / "train.npy", stream[:1])
    with pytest.raises(ValueError, match="holds 1 tokens"):
        dataset(tmp_path, 4)
