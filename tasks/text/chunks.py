"""Pretokenized text in the original's format: a folder of chunk_000000.pt, chunk_000001.pt, … and metadata.json.

A chunk is an int64 tensor of `chunk_size` token ids. Beside what the original writes, ours holds tokenizer.json, a
folder val/ of the documents held out, an end of text before every document and after the last, the last chunk even if
it is short, and hashes. The original's folders are read too: without val/ the last 5 % of the chunks validate, and
without tokenizer.json the tokenizer is the one that metadata.json names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tasks.cache import kept_in, renamed
from tasks.reading import parsed
from tasks.text.cache import TRAIN_FILE, VAL_FILE, TokenizedText, described, folder_of, intact_meta, say, write_meta
from tasks.text.corpus import VAL_FRACTION, Document, Fingerprint, Holdout
from tasks.text.packing import PackedDataset, encode, end_of_text
from tasks.text.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

METADATA_FILE = "metadata.json"
VAL_FOLDER = "val"


# -------------------------------------------------------------------------------------------------------------- writing


class ChunkWriter:
    """Cuts a stream of token ids into chunk files, with one chunk in memory; stops after `max_chunks` (0: never)."""

    def __init__(self, folder: Path, chunk_size: int, max_chunks: int = 0) -> None:
        folder.mkdir()
        self.folder, self.chunk_size, self.max_chunks = folder, chunk_size, max_chunks
        self.documents = self.tokens = self.chunks = 0
        self._digest = hashlib.sha256()
        self._open: list[np.ndarray] = []
        self._held = 0

    @property
    def full(self) -> bool:
        return 0 < self.max_chunks <= self.chunks

    def add(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        for begins, ids in encode((document.text for document in documents), tokenizer):
            self.documents += begins
            self._add(ids)

    def close(self, tokenizer: Tokenizer) -> dict:
        """End the stream and write what is left of it; returns what metadata.json says of this split."""
        self._add(end_of_text(tokenizer))
        if self._held and not self.full:
            self._write(np.concatenate(self._open))
        return {
            "num_chunks": self.chunks,
            "documents": self.documents,
            "tokens": self.tokens,
            "sha256": self._digest.hexdigest(),
        }

    def _add(self, ids: np.ndarray) -> None:
        while len(ids) and not self.full:
            part, ids = np.split(ids, [self.chunk_size - self._held])
            self._open.append(part)
            self._held += len(part)
            if self._held == self.chunk_size:
                self._write(np.concatenate(self._open))

    def _write(self, ids: np.ndarray) -> None:
        ids = ids.astype(np.int64)
        path = self.folder / _chunk_name(self.chunks)
        try:
            torch.save(torch.from_numpy(ids), path)
        except (OSError, RuntimeError) as error:  # the latter is how torch says that a disk is full
            raise OSError(f"Cannot write {path} ({error}): free space there or give another folder.") from error
        self._digest.update(ids)
        self.chunks += 1
        self.tokens += len(ids)
        self._open, self._held = [], 0


def write_chunks(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    holdout: Holdout,
    *,
    names: dict[str, str],
    chunk_size: int,
    max_chunks: int = 0,
    batch_size: int = 2000,
    progress: bool = False,
) -> dict:
    """Write documents to `folder`, which must not exist, `batch_size` at a time; returns what metadata.json holds.

    `names` are the dataset's and the tokenizer's, for metadata.json. `max_chunks` stops after so many training chunks.
    """
    train = ChunkWriter(folder, chunk_size, max_chunks)
    val = ChunkWriter(folder / VAL_FOLDER, chunk_size)
    fingerprint = Fingerprint()
    documents = iter(documents)
    with tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None if progress else True) as bar:
        while not train.full and (batch := list(islice(documents, batch_size))):
            before = fingerprint.num_bytes
            for document in batch:
                fingerprint.add(document)
            train.add((document for document in batch if document.text not in holdout), tokenizer)
            val.add((document for document in batch if document.text in holdout), tokenizer)
            bar.update(fingerprint.num_bytes - before)
            bar.set_postfix(chunks=train.chunks)
    of_train, of_val = train.close(tokenizer), val.close(tokenizer)
    if not of_val["documents"]:
        raise ValueError("No document read so far is held out to validate with: raise max_chunks or batch_size.")
    metadata = {
        **names,
        "vocab_size": tokenizer.vocab_size,
        "chunk_size": chunk_size,
        "num_chunks": of_train["num_chunks"],
        "total_tokens": of_train["tokens"],
        "pad_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id,
        "corpus_sha256": fingerprint.sha256,
        "corpus_bytes": fingerprint.num_bytes,
        "train": of_train,
        "val": of_val,
    }
    tokenizer.save(folder)
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2))
    return metadata


def _chunk_name(number: int) -> str:
    return f"chunk_{number:06d}.pt"


# -------------------------------------------------------------------------------------------------------------- reading


def read_chunks(
    folder: str | Path, tokenizer: str | Path = "bpe", *, seq_len: int, verbose: bool = False
) -> TokenizedText:
    """The windows of a folder of chunks, which are brought into our own cache once.

    `tokenizer` is used where the folder has no tokenizer.json and what its metadata.json names is not to be had ("bpe":
    none). Raises FileNotFoundError for a missing folder or chunk, ValueError for metadata or a chunk that is damaged or
    doesn't fit the tokenizer, or a single chunk without a val/.
    """
    folder = Path(folder)
    metadata = _read_metadata(folder)
    tokens_of = _find_tokenizer(folder, metadata, tokenizer)
    train = _chunks(folder, metadata["num_chunks"])
    if "val" in metadata:
        val = _chunks(folder / VAL_FOLDER, metadata["val"]["num_chunks"])
    else:
        cut = len(train) - max(1, round(VAL_FRACTION * len(train)))
        train, val = train[:cut], train[cut:]
    if not train or not val:
        raise ValueError(f"{folder} holds {len(train) + len(val)} chunk(s), and two are needed: to train, to validate.")
    seen = [(path.stat().st_size, path.stat().st_mtime_ns) for path in (*train, *val)]
    ours = folder_of("chunks", metadata, seen, tokens_of.to_json())
    meta = intact_meta(ours, verbose)
    if meta is None:
        say(verbose, f"bringing {len(train) + len(val):,} chunks of {folder} to {ours}")
        meta = {"corpus_sha256": metadata.get("corpus_sha256")}
        with kept_in(ours):
            ours.mkdir(parents=True, exist_ok=True)
        for split, paths, file in (("train", train, TRAIN_FILE), ("val", val, VAL_FILE)):
            meta[split] = _convert(paths, ours / file, tokens_of, metadata["chunk_size"], verbose)
            if split in metadata and meta[split]["sha256"] != metadata[split]["sha256"]:
                raise ValueError(f"The {split} chunks of {folder} are not those that were written: pretokenize again.")
        with kept_in(ours):
            write_meta(ours, meta, tokens_of, (TRAIN_FILE, VAL_FILE))
    splits = [PackedDataset(ours / file, seq_len=seq_len, eos_id=tokens_of.eos_id) for file in (TRAIN_FILE, VAL_FILE)]
    return TokenizedText(
        tokens_of, *splits, {"pretokenized": str(folder), "corpus": metadata["dataset"], **described(meta)}
    )


def _read_metadata(folder: Path) -> dict:
    path = folder / METADATA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: give a folder that train/pretokenize.py wrote.")
    try:
        metadata = parsed(path.read_bytes(), path)
        missing = {"dataset", "tokenizer", "chunk_size", "num_chunks"} - set(metadata)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error}): pretokenize again.") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: pretokenize again.")
    splits = [metadata[split] for split in ("train", "val") if split in metadata]  # which the original's has not
    ours = all(isinstance(of, dict) and {"num_chunks", "sha256"} <= of.keys() for of in splits)
    counts = (
        [of[name] for of in (metadata, *splits) for name in ("chunk_size", "num_chunks") if name in of] if ours else []
    )
    if not ours or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{path} is not readable (a count of chunks is no number): pretokenize again.")
    if not isinstance(metadata["tokenizer"], str):
        raise ValueError(f"{path} is not readable (the tokenizer is no name): pretokenize again.")
    return metadata


def _chunks(folder: Path, count: int) -> list[Path]:
    """All that are counted. Raises FileNotFoundError at the first that is missing, however many are said to follow."""
    paths: list[Path] = []
    for number in range(count):
        paths.append(folder / _chunk_name(number))
        if not paths[-1].is_file():
            raise FileNotFoundError(f"{paths[-1]} is missing, which {METADATA_FILE} counts: pretokenize again.")
    return paths


def _find_tokenizer(folder: Path, metadata: dict, tokenizer: str | Path) -> Tokenizer:
    if (folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(folder)
    if tokenizer != "bpe":
        return load_tokenizer(tokenizer)
    try:
        return load_tokenizer(metadata["tokenizer"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}, and its tokenizer {metadata['tokenizer']} can't be loaded ({error}) "
            "Give the tokenizer.json it was made with as --tokenizer."
        ) from error


def _convert(paths: list[Path], file: Path, tokenizer: Tokenizer, chunk_size: int, verbose: bool) -> dict:
    """Write chunks, one at a time in memory, to one .npy file of the tokenizer's dtype."""
    total = chunk_size * (len(paths) - 1) + len(_load_chunk(paths[-1]))
    digest, num_bytes = hashlib.sha256(), 0
    header = {"descr": tokenizer.dtype.str, "fortran_order": False, "shape": (total,)}
    with kept_in(file.parent), renamed(file) as temporary, temporary.open("wb") as array:
        np.lib.format.write_array_header_1_0(array, header)  # a memory map would die of a full disk without a word
        for path in tqdm(paths, desc=file.stem, unit="chunk", disable=None if verbose else True):
            ids = _load_chunk(path)
            if path != paths[-1] and len(ids) != chunk_size:
                raise ValueError(f"{path} holds {len(ids)} tokens where {METADATA_FILE} says {chunk_size}.")
            if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise ValueError(
                    f"{path} holds ids {ids.min()} … {ids.max()}, but the tokenizer has {tokenizer.vocab_size} tokens: "
                    "give the one it was made with."
                )
            array.write(ids.astype(tokenizer.dtype))
            digest.update(ids)
            num_bytes += int(tokenizer.token_bytes[ids].sum())
    return {"tokens": total, "bytes": num_bytes, "sha256": digest.hexdigest()}


def _load_chunk(path: Path) -> np.ndarray:
    try:
        ids = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle trips over whatever it says
        raise ValueError(f"{path} is damaged: pretokenize again.") from error
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids):
        raise ValueError(f"{path} must hold a 1-D int64 tensor of token ids.")
    return ids.numpy()
