"""Keep a tokenized corpus on disk, so that only the first run of a setting pays for it.

A folder `<cache>/text/<key>/` holds tokenizer.json, train.npy, val.npy and, written last, meta.json with the size and
hash of the others; `stream.py` and `chunks.py` keep folders of the same kind. Every file is written under another name
and renamed, and its content follows from the key, so that processes may build the same folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from tasks.cache import cache_folder, kept_in, renamed
from tasks.reading import parsed
from tasks.text.corpus import Corpus, Document, split_documents
from tasks.text.packing import PackedDataset, Windows, pack
from tasks.text.tokenizer import TOKENIZER_FILE, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

VERSION = 1  # raise it with any change to the split, the training of tokenizers or the packing
TRAIN_FILE, VAL_FILE, META_FILE = "train.npy", "val.npy", "meta.json"


class TokenizedText(NamedTuple):
    """What a way to bring text hands to the task."""

    tokenizer: Tokenizer
    train: Windows
    val: PackedDataset
    info: dict


def tokenize(corpus: Corpus, tokenizer: str | Path, vocab_size: int, *, verbose: bool = False) -> tuple[Path, dict]:
    """Return the folder of the tokenized corpus and its meta.json, building both unless they are there and intact.

    `tokenizer` is "bpe" (trained on the training split, up to `vocab_size`), "bytes", or a tokenizer.json; the last two
    bring their own vocabulary. `verbose` prints what takes time.

    Raises OSError (or its PermissionError, …) naming the folder if it cannot be read or written, and ValueError for an
    unusable tokenizer.
    """
    given = given_tokenizer(tokenizer)
    folder = folder_of("text", corpus.sha256, vocab_size if given is None else given.to_json())
    with kept_in(folder):
        return folder, intact_meta(folder, verbose) or _build(folder, corpus, given, vocab_size, verbose)


def given_tokenizer(tokenizer: str | Path) -> Tokenizer | None:
    """The tokenizer that `tokenizer` names, None for "bpe": that one is to be trained."""
    if tokenizer == "bytes":
        return ByteTokenizer()
    return None if tokenizer == "bpe" else load_tokenizer(tokenizer)


def folder_of(kind: str, *identity: object) -> Path:
    """Where tokens of this identity lie, or will."""
    key = hashlib.sha256(json.dumps([VERSION, *identity]).encode()).hexdigest()
    return cache_folder() / kind / key[:24]


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int, verbose: bool) -> dict:
    folder.mkdir(parents=True, exist_ok=True)  # first: a disk that refuses should do so before the work
    started = perf_counter()
    train, val = split_documents(corpus.documents)
    tokenizer = tokenizer or train_bpe(train, vocab_size, verbose)
    meta: dict = {"corpus_sha256": corpus.sha256}
    for split, documents, file in (("train", train, TRAIN_FILE), ("val", val, VAL_FILE)):
        meta[split] = write_split(folder / file, documents, tokenizer, verbose)
    write_meta(folder, meta, tokenizer, (TRAIN_FILE, VAL_FILE))
    say(verbose, f"kept in {folder} after {perf_counter() - started:.1f} s")
    return meta


def train_bpe(documents: Sequence[Document], vocab_size: int, verbose: bool) -> BPETokenizer:
    started = perf_counter()
    say(verbose, f"training a byte-level BPE of {vocab_size:,} tokens on {len(documents):,} documents")
    tokenizer = BPETokenizer.train((document.text for document in documents), vocab_size)
    say(verbose, f"trained {tokenizer.vocab_size:,} tokens in {perf_counter() - started:.1f} s")
    return tokenizer


def write_split(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, verbose: bool) -> dict[str, int]:
    """Pack documents into `path`, NAME.npy; returns how many documents, bytes and tokens they are."""
    texts = [document.text for document in documents]
    stream = pack(texts, tokenizer, progress=verbose)
    write_array(path, stream)
    counts = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": len(stream)}
    say(verbose, f"{path.stem}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return counts


def write_array(path: Path, array: np.ndarray) -> None:
    with renamed(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def write_meta(folder: Path, meta: dict, tokenizer: Tokenizer, files: Sequence[str]) -> None:
    """Write tokenizer.json and, last, meta.json; adds to `meta` how to tell later that the files are intact."""
    with renamed(folder / TOKENIZER_FILE) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
    meta["files"] = {name: _fingerprint(folder / name) for name in (TOKENIZER_FILE, *files)}
    with renamed(folder / META_FILE) as temporary:
        temporary.write_text(json.dumps(meta, indent=2))


def described(meta: dict) -> dict:
    """What a run's record says of a meta.json: all of it, and the tokenizer's hash for those of the files."""
    kept = {name: value for name, value in meta.items() if name != "files"}
    return {**kept, "tokenizer_sha256": meta["files"][TOKENIZER_FILE]["sha256"]}


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def intact_meta(folder: Path, verbose: bool) -> dict | None:
    """The meta.json of a folder whose files are as they were written, else None, with a word about what is wrong."""
    if not (folder / META_FILE).exists():
        return None
    try:
        meta = parsed((folder / META_FILE).read_bytes(), folder / META_FILE)
        wrong = [name for name, written in meta["files"].items() if _fingerprint(folder / name) != written]
        problem = f"{wrong[0]} is not what was written" if wrong else None
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = f"{META_FILE} is not readable"
    if problem is None:
        return meta
    say(verbose, f"rebuilding {folder}: {problem}")
    return None


def say(verbose: bool, line: str) -> None:
    if verbose:
        print(line, flush=True)
