"""Bring the documents of files or of a Hub dataset together, and split them into training and validation.

Without paths the corpus is the source code of the running interpreter's standard library: about 30 MB of real text that
every machine already has.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tasks.text.files import FileSource
from tasks.text.hub import HubSource

VAL_FRACTION = 0.05
SUBSET_SEED = 42  # the original's
NAMES_SHOWN = 20


class Source(Protocol):
    """Where documents come from: files or the Hub. Opening one reads none of them."""

    name: str

    def identity(self) -> list:
        """What changes when the documents do, found without reading them; JSON can write it."""

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(name, UTF-8 content) of every document, each whole."""

    def stream(self, place: Any = None) -> Iterator[tuple[Any, str, bytes]]:
        """(place, name, UTF-8 content) of every document from `place` on, in bounded memory; JSON can write a place."""


@dataclass(frozen=True)
class Document:
    name: str  # relative, so that a corpus has the same hash wherever it lies
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, with what identifies them and what was left out.

    `sha256` covers every name and content in order, `num_bytes` counts UTF-8 bytes, `skipped` names what is not UTF-8.
    """

    documents: tuple[Document, ...]
    source: str
    sha256: str
    num_bytes: int
    skipped: tuple[str, ...]
    num_empty: int

    def summary(self) -> str:
        """One printable paragraph: source, size, hash and everything that was skipped."""
        lines = [
            f"{self.source}: {len(self.documents):,} documents, {self.num_bytes:,} bytes, sha256 {self.sha256[:12]}"
        ]
        if self.num_empty:
            lines.append(f"left out {self.num_empty:,} empty documents")
        if self.skipped:
            lines.append(f"skipped {len(self.skipped):,} not in UTF-8: {some(self.skipped)}")
        return "\n".join(lines)


def open_source(
    paths: Sequence[str | Path] | None = None, *, dataset: str | None = None, text_field: str | None = None
) -> Source:
    """Files and folders, a Hub dataset, or with neither the standard library. Raises as `load_corpus` says."""
    if dataset is None:
        return FileSource(paths, text_field)
    if paths:
        raise ValueError(f"Text comes from files or from the Hub: give paths or dataset {dataset!r}, not both.")
    return HubSource(dataset, text_field)


def load_corpus(
    paths: Sequence[str | Path] | None = None,
    *,
    dataset: str | None = None,
    text_field: str | None = None,
    max_documents: int | None = None,
    subset_size: int = 0,
) -> Corpus:
    """Read every document below `paths` or of the Hub's `dataset`; without either, the standard library's own source.

    A `.jsonl`, `.ndjson` or `.parquet` file holds a document a line or row, in `text_field` or else in the first of
    "text", "content", "article" and "document" that it has. Any other file is one document. A folder stands for its
    files, recursively and sorted by name, without hidden ones and `__pycache__`. `dataset` is a name of
    `tasks.text.hub.DATASETS`, "owner/name" or "owner/name:config". Documents that are not UTF-8 are skipped and named
    in the result, empty ones (null in a record, too) are left out and counted. `max_documents` stops after the first so
    many; `subset_size` draws so many of them by lot, the same every time (0: takes all).

    Raises FileNotFoundError (no such path or dataset), PermissionError, ConnectionError (no Hub), ImportError (Parquet
    without pyarrow, a dataset without datasets) and ValueError (a broken line, a missing field, a field that is no
    text, or no document at all).
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {max_documents}.")
    if subset_size < 0:
        raise ValueError(f"subset_size must be at least 1, or 0 for all documents, got {subset_size}.")
    source = open_source(paths, dataset=dataset, text_field=text_field)

    skipped: list[str] = []
    num_empty = 0

    def readable() -> Iterator[Document]:
        nonlocal num_empty
        for name, content in source.documents():
            text = decode(content)
            if text:
                yield Document(name, text)
            elif text is None:
                skipped.append(name)
            else:
                num_empty += 1

    documents = list(_draw(itertools.islice(readable(), max_documents), subset_size))
    if not documents:
        reason = f"{num_empty} are empty, {len(skipped)} are not UTF-8" + (f" ({some(skipped)})" if skipped else "")
        raise ValueError(f"There is no text in {source.name}: of {num_empty + len(skipped)} documents {reason}.")
    fingerprint = Fingerprint()
    for document in documents:
        fingerprint.add(document)
    return Corpus(tuple(documents), source.name, fingerprint.sha256, fingerprint.num_bytes, tuple(skipped), num_empty)


def decode(content: bytes) -> str | None:
    """The text, None if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _draw(documents: Iterable[Document], count: int) -> Iterable[Document]:
    """`count` documents with the lowest lots, in their order; only so many are held at a time."""
    if not count:
        return documents
    lots = np.random.default_rng(SUBSET_SEED)
    drawn = heapq.nsmallest(count, ((lots.random(), place, one) for place, one in enumerate(documents)))
    return [document for _, document in sorted((place, document) for _, place, document in drawn)]


class Fingerprint:
    """SHA-256 over the names and contents of documents, and how many bytes of text they are."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def add(self, document: Document) -> None:
        content = document.text.encode()
        self.num_bytes += len(content)
        # Lengths first: no two corpora read the same.
        for part in (document.name.encode("utf-8", "surrogateescape"), content):
            self._digest.update(len(part).to_bytes(8, "little"))
            self._digest.update(part)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


# --------------------------------------------------------------------------------------------------------------- split


@dataclass(frozen=True)
class Holdout:
    """Which texts are for validation: about 5 % of them, by their content alone."""

    lowest: float
    cut: float

    @classmethod
    def of(cls, texts: Sequence[str]) -> Holdout:
        """The rule that puts at least one of `texts` on either side. Raises ValueError if they are all the same."""
        keys = [_uniform_hash(text) for text in texts]
        lowest, highest = min(keys), max(keys)
        if lowest == highest:
            raise ValueError(
                f"All {len(texts)} documents hold the same text, so none is left to validate on: give others."
            )
        return cls(lowest, min(VAL_FRACTION, highest))

    def __contains__(self, text: str) -> bool:
        key = _uniform_hash(text)
        return key < self.cut or key == self.lowest


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Split into (train, val), about 5 % of the documents in val and at least one on either side.

    A document's side depends on its content alone, not on its place among the others, and equal texts land on the same
    side, so no validation document was trained on. A single document is cut at a line boundary just before 95 % of it.

    Raises ValueError if several documents all hold the same text.
    """
    if len(documents) == 1:
        return _split_one(documents[0])
    holdout = Holdout.of([document.text for document in documents])
    train: list[Document] = []
    val: list[Document] = []
    for document in documents:
        (val if document.text in holdout else train).append(document)
    return train, val


def _split_one(document: Document) -> tuple[list[Document], list[Document]]:
    length = len(document.text)
    target = round(length * (1 - VAL_FRACTION))
    line_start = document.text.rfind("\n", round(length * (1 - 2 * VAL_FRACTION)), target) + 1
    cut = line_start or target  # lines longer than 5 % of the text: cut inside one
    head = Document(f"{document.name} (start)", document.text[:cut])
    tail = Document(f"{document.name} (end)", document.text[cut:])
    return [head], [tail]


def _uniform_hash(text: str) -> float:
    """A number in [0, 1) that is a pure function of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
