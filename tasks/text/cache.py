"""Keep a tokenized corpus on disk, so that only the first run of a setting pays for it.

A folder `<cache>/text/<key>/` holds tokenizer.json, train.npy, val.npy and, written last, meta.json with the size and
hash of the others. Every file is written under another name and renamed, and its content follows from the key, so that
processes may build the same folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np

from tasks.text.corpus import Corpus, Document, split_documents
from tasks.text.packing import pack
from tasks.text.tokenizer import TOKENIZER_FILE, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

VERSION = 1  # raise it with any change to the split, the training of tokenizers or the packing
TRAIN_FILE, VAL_FILE, META_FILE = "train.npy", "val.npy", "meta.json"


def cache_folder() -> Path:
    """`$TENFOLD_CACHE`, else `~/.cache/tenfold`."""
    return Path(os.environ.get("TENFOLD_CACHE") or "~/.cache/tenfold").expanduser()


def tokenize(corpus: Corpus, tokenizer: str | Path, vocab_size: int, *, verbose: bool = False) -> tuple[Path, dict]:
    """Return the folder of the tokenized corpus and its meta.json, building both unless they are there and intact.

    `tokenizer` is "bpe" (trained on the training split, up to `vocab_size`), "bytes", or a tokenizer.json; the last two
    bring their own vocabulary. `verbose` prints what takes time.

    Raises OSError (or its PermissionError, …) naming the folder if it cannot be read or written, and ValueError for an
    unusable tokenizer.
    """
    given = None  # to be trained
    if tokenizer == "bytes":
        given = ByteTokenizer()
    elif tokenizer != "bpe":
        given = load_tokenizer(tokenizer)
    identity = vocab_size if given is None else given.to_json()
    key = hashlib.sha256(json.dumps([VERSION, corpus.sha256, identity]).encode()).hexdigest()
    folder = cache_folder() / "text" / key[:24]
    try:
        if (folder / META_FILE).exists():
            problem = _problem(folder)
            if problem is None:
                return folder, json.loads((folder / META_FILE).read_text())
            _say(verbose, f"rebuilding {folder}: {problem}")
        return folder, _build(folder, corpus, given, vocab_size, verbose)
    except OSError as error:
        raise type(error)(
            f"Cannot keep tokens in {folder} ({error.strerror or error}): free space there, make it writable, "
            "or let the environment variable TENFOLD_CACHE name another folder."
        ) from error


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int, verbose: bool) -> dict:
    folder.mkdir(parents=True, exist_ok=True)  # first: a disk that refuses should do so before the work
    started = perf_counter()
    train, val = split_documents(corpus.documents)
    if tokenizer is None:
        _say(verbose, f"training a byte-level BPE of {vocab_size:,} tokens on {len(train):,} documents")
        tokenizer = BPETokenizer.train((document.text for document in train), vocab_size)
        _say(verbose, f"trained {tokenizer.vocab_size:,} tokens in {perf_counter() - started:.1f} s")

    with _renamed(folder / TOKENIZER_FILE) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
    meta: dict = {"version": VERSION, "corpus_sha256": corpus.sha256}
    for split, documents, file in (("train", train, TRAIN_FILE), ("val", val, VAL_FILE)):
        meta[split] = _write_split(folder / file, documents, tokenizer, verbose)
        _say(verbose, f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in meta[split].items()))
    meta["files"] = {name: _fingerprint(folder / name) for name in (TOKENIZER_FILE, TRAIN_FILE, VAL_FILE)}
    with _renamed(folder / META_FILE) as temporary:
        temporary.write_text(json.dumps(meta, indent=2))
    _say(verbose, f"kept in {folder} after {perf_counter() - started:.1f} s")
    return meta


def _write_split(path: Path, documents: list[Document], tokenizer: Tokenizer, verbose: bool) -> dict[str, int]:
    texts = [document.text for document in documents]
    stream = pack(texts, tokenizer, progress=verbose)
    with _renamed(path) as temporary, temporary.open("wb") as file:
        np.save(file, stream)
    num_bytes = sum(len(text.encode()) for text in texts)
    return {"documents": len(texts), "bytes": num_bytes, "tokens": len(stream)}


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` when all went well and removed when not."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _problem(folder: Path) -> str | None:
    """What is wrong with a cached folder, None if it is intact."""
    try:
        files = json.loads((folder / META_FILE).read_text())["files"]
        for name in (TOKENIZER_FILE, TRAIN_FILE, VAL_FILE):
            if _fingerprint(folder / name) != files[name]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{META_FILE} is not readable"
    return None


def _say(verbose: bool, line: str) -> None:
    if verbose:
        print(line, flush=True)
