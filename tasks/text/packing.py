"""Pack documents into one stream of tokens and cut it into windows of equal length.

The stream is `<eos> document <eos> document … <eos>`: the end of one text is the start of the next. Window i of length
T has the inputs stream[iT : iT+T] and the targets stream[iT+1 : iT+T+1], so every token but the first is a target
exactly once, and the last token of a document predicts that it ends, never what the next one says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tasks.text.tokenizer import Tokenizer

IGNORE_INDEX = -100
PIECE_CHARS = 2**20  # a longer document is tokenized in pieces: on all cores, and in bounded memory
BATCH_CHARS = 2**22


def pack(texts: Sequence[str], tokenizer: Tokenizer, *, progress: bool = False) -> np.ndarray:
    """Tokenize `texts` into one stream, [N] of the tokenizer's dtype.

    `progress` shows a bar where stderr is a terminal. A text beyond 2^20 characters is tokenized in pieces that end
    with a line, so no token spans their seams.
    """
    total = sum(map(len, texts))
    with tqdm(total=total, unit="char", unit_scale=True, desc="tokenizing", disable=None if progress else True) as bar:

        def counted() -> Iterator[str]:
            for text in texts:
                yield text
                bar.update(len(text))

        parts = [ids for _, ids in encode(counted(), tokenizer)]
    return np.concatenate([*parts, end_of_text(tokenizer)])


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[bool, np.ndarray]]:
    """(whether a text begins here, the ids of a piece of it); the first piece of a text starts with eos.

    Reads about BATCH_CHARS characters ahead of what it gives.
    """
    eos = end_of_text(tokenizer)
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch([piece for _, piece in batch])
        for (begins, _), ids in zip(batch, encoded, strict=True):
            yield begins, np.concatenate([eos, ids]) if begins else ids


def end_of_text(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([tokenizer.eos_id], dtype=tokenizer.dtype)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[bool, str]]]:
    """Lists of (starts a document, piece of text), about BATCH_CHARS characters each."""
    batch: list[tuple[bool, str]] = []
    size = 0
    for text in texts:
        start, stop = 0, -1
        while stop < len(text):
            stop = min(start + PIECE_CHARS, len(text))
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            batch.append((start == 0, text[start:stop]))
            size += stop - start
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
            start = stop
    if batch:
        yield batch


def window(tokens: np.ndarray, index: int, seq_len: int, eos_id: int) -> dict[str, Tensor]:
    """Window `index` of tokens [N], as `PackedDataset` gives it."""
    start = index * seq_len
    chunk = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))
    num_targets = len(chunk) - 1
    input_ids = torch.full((seq_len,), eos_id, dtype=torch.int64)
    labels = torch.full((seq_len,), IGNORE_INDEX, dtype=torch.int64)
    input_ids[:num_targets] = chunk[:-1]
    labels[:num_targets] = chunk[1:]
    return {"input_ids": input_ids, "labels": labels, "reset": input_ids == eos_id}


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Windows of seq_len targets, the last one perhaps shorter, in a stream of so many tokens."""
    return -(-(num_tokens - 1) // seq_len)


class Windows(Protocol):
    """A split: items by index, and the tokens that stand for it when tokens are counted."""

    tokens: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class PackedDataset:
    """Windows over a stream of tokens in a `.npy` file, which stays on disk.

    Item i, a pure function of (file, seq_len, i), holds 1-D tensors of length T = seq_len: `input_ids` int64, `labels`
    int64 (each position's own target: the next token) and `reset` bool (True where a document starts). The last window
    is filled up with inputs eos, labels -100 and reset True.

    Raises ValueError for a seq_len below 1 or a stream without a target, IndexError outside 0 … len-1.
    """

    def __init__(self, path: str | Path, *, seq_len: int, eos_id: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
        self.path = Path(path)
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.tokens = np.load(self.path, mmap_mode="r")  # [N]
        if len(self.tokens) < 2:
            raise ValueError(f"{path} holds {len(self.tokens)} tokens: a window needs an input and a target.")

    def __len__(self) -> int:
        return num_windows(len(self.tokens), self.seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return window(self.tokens, index, self.seq_len, self.eos_id)

    # A loader's workers get the path, not the tokens.
    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tokens = np.load(self.path, mmap_mode="r")


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack B items into a batch of `input_ids`, `labels` and `reset`, each [B, T]."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def num_items(batch: dict[str, Tensor]) -> Tensor:
    """How many targets a batch has: 0-d int64, padding not counted."""
    return (batch["labels"] != IGNORE_INDEX).sum()
