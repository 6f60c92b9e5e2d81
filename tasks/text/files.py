"""Text files, JSON lines, Parquet and folders as a source of documents, read whole or from any place on."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.reading import parsed

TEXT_FIELDS = ("text", "content", "article", "document")  # looked for in this order when no field is named
PART_BYTES = 2**18  # a stream cuts plain text files into documents of about this size

# (where it begins in its file, name, content): the first is what the reader takes as `start` to begin there.
Records = Iterator[tuple[Any, str, bytes]]


class FileSource:
    """The documents of files and folders in a fixed order; without paths, of the standard library's own source.

    Raises FileNotFoundError, PermissionError, ImportError and ValueError as `load_corpus` says.
    """

    def __init__(self, paths: Sequence[str | Path] | None, text_field: str | None) -> None:
        self.files = _files_below(paths) if paths else _standard_library()
        self.name = ", ".join(map(str, paths)) if paths else f"Python {platform.python_version()} standard library"
        self.text_field = text_field

    def identity(self) -> list:
        """What tells these files from others without reading them: names, sizes and times of change."""
        found = [(name, path.stat()) for name, path in self.files]
        return [self.text_field, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)]

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every document; a file that is neither JSON lines nor Parquet is one."""
        for name, path in self.files:
            for _, record, content in self._read(name, path, None, whole=True):
                yield record, content

    def stream(self, place: Any = None) -> Iterator[tuple[Any, str, bytes]]:
        """(place, name, content) from `place` on, in bounded memory: plain text is cut into documents at line ends."""
        first, inside = place or (0, None)
        for index, (name, path) in enumerate(self.files[first:], start=first):
            for where, record, content in self._read(name, path, inside if index == first else None, whole=False):
                yield [index, where], record, content

    def _read(self, name: str, path: Path, start: Any, whole: bool) -> Records:
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                yield from _read_jsonl(name, path, self.text_field, start or (0, 0))
            elif path.suffix == ".parquet":
                yield from _read_parquet(name, path, self.text_field, start or 0)
            elif whole:
                yield None, name, path.read_bytes()
            else:
                yield from _read_parts(name, path, start or 0)
        except OSError as error:
            raise _unreadable(path, error) from error


def _read_jsonl(name: str, path: Path, text_field: str | None, start: Sequence[int]) -> Records:
    number, offset = start
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            place, number, offset = (number, offset), number + 1, offset + len(line)
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = parsed(line.decode("utf-8"), where)
            except UnicodeDecodeError:
                yield place, f"{name}:{number}", line  # the caller finds it undecodable and names it
                continue
            except ValueError as error:
                raise ValueError(f"{error}; a .jsonl file holds one object a line.") from error
            if not isinstance(record, dict):
                raise ValueError(f'{where}: expected an object such as {{"text": "…"}}, found {line[:40]!r}.')
            value = record[choose_field(record, text_field, where)]
            if not isinstance(value, str | None):
                raise ValueError(f"{where}: the text field must hold a string, found {type(value).__name__}.")
            # JSON can spell lone surrogates, which are not UTF-8: let them through for the caller to find.
            yield place, f"{name}:{number}", (value or "").encode("utf-8", "surrogatepass")


def _read_parquet(name: str, path: Path, text_field: str | None, start: int) -> Records:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow.") from error
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            field = choose_field(schema.names, text_field, str(path))
            if schema.names.count(field) > 1:
                raise ValueError(f"{path}: two columns are called {field!r}; give each a name of its own.")
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{path}: the text field must hold strings, {field!r} holds {kind}.")
            row = 0
            for group in range(table.num_row_groups):
                if row + table.metadata.row_group(group).num_rows <= start:
                    row += table.metadata.row_group(group).num_rows
                    continue
                for batch in table.iter_batches(row_groups=[group], columns=[field]):
                    for value in batch.column(0).cast(pa.large_binary()):
                        row += 1
                        if row > start:
                            yield row - 1, f"{name}:{row}", value.as_py() or b""
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; damage is an OSError without number
            raise
        raise ValueError(f"{path}: not a readable Parquet file ({error}).") from error


def _read_parts(name: str, path: Path, start: int) -> Records:
    with path.open("rb") as file:
        file.seek(start)
        while lines := file.readlines(PART_BYTES):
            part = b"".join(lines)
            yield start, f"{name}@{start}", part
            start += len(part)


def choose_field(fields: Sequence[str] | dict, text_field: str | None, where: str) -> str:
    """The field of a record that holds the text: the one named, else the first of TEXT_FIELDS. Raises ValueError."""
    wanted = (text_field,) if text_field else TEXT_FIELDS
    for field in wanted:
        if field in fields:
            return field
    has = ", ".join(fields) or "none"
    raise ValueError(
        f"{where}: no field named {' or '.join(wanted)}; it has {has}. Name the one with the text (text_field)."
    )


# -------------------------------------------------------------------------------------------------------------- folders


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
