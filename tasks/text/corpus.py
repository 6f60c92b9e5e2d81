"""Read documents from text files, JSON lines, Parquet and folders, and split them into training and validation.

Without paths the corpus is the source code of the running interpreter's standard library: about 30 MB of real text that
every machine already has.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TEXT_FIELDS = ("text", "content", "article", "document")  # looked for in this order when no field is named
VAL_FRACTION = 0.05
NAMES_SHOWN = 20

NamedBytes = Iterator[tuple[str, bytes]]


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
            lines.append(f"skipped {len(self.skipped):,} not in UTF-8: {_some(self.skipped)}")
        return "\n".join(lines)


def load_corpus(
    paths: Sequence[str | Path] | None = None, *, text_field: str | None = None, max_documents: int | None = None
) -> Corpus:
    """Read every document below `paths`; without paths, the standard library's own source.

    A `.jsonl`, `.ndjson` or `.parquet` file holds a document a line or row, in `text_field` or else in the first of
    "text", "content", "article" and "document" that it has. Any other file is one document. A folder stands for its
    files, recursively and sorted by name, without hidden ones and `__pycache__`. Documents that are not UTF-8 are
    skipped and named in the result, empty ones (null in a record, too) are left out and counted. `max_documents` stops
    after the first so many.

    Raises FileNotFoundError (no such path), PermissionError, ImportError (Parquet without pyarrow) and ValueError (a
    broken line, a missing field, a field that is no text, or no document at all).
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {max_documents}.")
    files = _files_below(paths) if paths else _standard_library()
    source = ", ".join(map(str, paths)) if paths else f"Python {platform.python_version()} standard library"

    digest = hashlib.sha256()
    documents: list[Document] = []
    skipped: list[str] = []
    num_bytes = num_empty = 0
    for name, content in _read_all(files, text_field):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            skipped.append(name)
            continue
        if not text:
            num_empty += 1
            continue
        documents.append(Document(name, text))
        num_bytes += len(content)
        for part in (name.encode("utf-8", "surrogateescape"), content):  # lengths first: no two corpora read the same
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        if len(documents) == max_documents:
            break

    if not documents:
        reason = f"{num_empty} are empty, {len(skipped)} are not UTF-8" + (f" ({_some(skipped)})" if skipped else "")
        raise ValueError(f"There is no text in {source}: of {num_empty + len(skipped)} documents {reason}.")
    return Corpus(tuple(documents), source, digest.hexdigest(), num_bytes, tuple(skipped), num_empty)


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Split into (train, val), about 5 % of the documents in val and at least one on either side.

    A document's side depends on its content alone, not on its place among the others, and equal texts land on the same
    side, so no validation document was trained on. A single document is cut at a line boundary just before 95 % of it.

    Raises ValueError if several documents all hold the same text.
    """
    if len(documents) == 1:
        return _split_one(documents[0])
    keys = [_uniform_hash(document.text) for document in documents]
    lowest, highest = min(keys), max(keys)
    if lowest == highest:
        raise ValueError(
            f"All {len(documents)} documents hold the same text, so none is left to validate on: give others."
        )
    cut = min(max(VAL_FRACTION, lowest), highest)
    in_val = [key < cut or key == lowest for key in keys]
    train = [document for document, held_out in zip(documents, in_val, strict=True) if not held_out]
    val = [document for document, held_out in zip(documents, in_val, strict=True) if held_out]
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


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


# ---------------------------------------------------------------------------------------------------------------- files


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = frozenset({"__pycache__", "site-packages", "dist-packages"})
    files = [(name, path) for name, path in _walk(root, skip) if path.suffix == ".py"]
    if not files:
        raise FileNotFoundError(
            f"This Python has no standard library sources in {root}: name some text with --data PATH."
        )
    return files


def _files_below(paths: Sequence[str | Path]) -> list[tuple[str, Path]]:
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be a list of paths, got the single path {str(paths)!r}: write [{str(paths)!r}].")
    files: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            prefix = path.resolve().name
            files += [(f"{prefix}/{name}", file) for name, file in _walk(path, frozenset({"__pycache__"}))]
        elif path.exists():
            files.append((path.name, path))
        else:
            raise FileNotFoundError(f"There is no file or folder {path}: check the path given as --data.")
    return files


def _walk(root: Path, skip: frozenset[str]) -> list[tuple[str, Path]]:
    """(relative name, path) of the files below root, sorted by name, without hidden ones and folders in `skip`."""

    def refuse(error: OSError) -> None:  # os.walk would pass over an unreadable folder in silence
        raise _unreadable(error.filename, error) from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def _unreadable(path: str | Path, error: OSError) -> OSError:
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    return kind(f"Cannot read {path} ({error.strerror}): make it readable for this user or leave it out of --data.")


# -------------------------------------------------------------------------------------------------------------- formats


def _read_all(files: list[tuple[str, Path]], text_field: str | None) -> NamedBytes:
    for name, path in files:
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                yield from _read_jsonl(name, path, text_field)
            elif path.suffix == ".parquet":
                yield from _read_parquet(name, path, text_field)
            else:
                yield name, path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error


def _read_jsonl(name: str, path: Path, text_field: str | None) -> NamedBytes:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield f"{name}:{number}", line  # the caller finds it undecodable and names it
                continue
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); a .jsonl file holds one object a line.") from error
            if not isinstance(record, dict):
                raise ValueError(f'{where}: expected an object such as {{"text": "…"}}, found {line[:40]!r}.')
            value = record[_choose_field(record, text_field, where)]
            if not isinstance(value, str | None):
                raise ValueError(f"{where}: the text field must hold a string, found {type(value).__name__}.")
            # JSON can spell lone surrogates, which are not UTF-8: let them through for the caller to find.
            yield f"{name}:{number}", (value or "").encode("utf-8", "surrogatepass")


def _read_parquet(name: str, path: Path, text_field: str | None) -> NamedBytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow.") from error
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            field = _choose_field(schema.names, text_field, str(path))
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{path}: the text field must hold strings, {field!r} holds {kind}.")
            row = 0
            for batch in table.iter_batches(columns=[field]):
                for value in batch.column(0).cast(pa.large_binary()):
                    row += 1
                    yield f"{name}:{row}", value.as_py() or b""
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}).") from error


def _choose_field(fields: Sequence[str] | dict, text_field: str | None, where: str) -> str:
    wanted = (text_field,) if text_field else TEXT_FIELDS
    for field in wanted:
        if field in fields:
            return field
    has = ", ".join(fields) or "none"
    raise ValueError(
        f"{where}: no field named {' or '.join(wanted)}; it has {has}. Name the one with the text (text_field)."
    )
