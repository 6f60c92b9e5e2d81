"""Train on more text than is worth tokenizing ahead: shards of tokens, made when first needed, a few of them kept.

The stream of documents is read once, in order. Its tokens, packed as in `packing.py`, fall into shards of a fixed
number of windows; an index keeps where in the stream each shard begins and its hash, for ever, while the shards
themselves come and go. So window i is a function of i alone, on any number of processes and after any restart: a shard
that was deleted is made again, byte for byte, or it is said that the text has changed. At its end the stream begins
again.

`<cache>/stream/<key>/` holds tokenizer.json, val.npy and meta.json, written first, then index.json and shard-*.npy.
Text that the stream's first 64 MiB hold out is the validation split; what is held out further on is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tasks.cache import kept_in, locked, renamed
from tasks.reading import parsed
from tasks.text.cache import (
    VAL_FILE,
    TokenizedText,
    described,
    folder_of,
    given_tokenizer,
    intact_meta,
    say,
    train_bpe,
    write_array,
    write_meta,
    write_split,
)
from tasks.text.corpus import Document, Fingerprint, Holdout, Source, decode, some
from tasks.text.packing import PackedDataset, encode, end_of_text, num_windows, window
from tasks.text.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

PREFIX_BYTES = 2**26  # of the stream, to train the tokenizer on and to validate with
SHARD_TOKENS = 2**22
SHARDS_KEPT = 32  # those used last; two runs or an epoch's end need shards of two places
SHARDS_OPEN = 4
NOMINAL_SHARDS = 2**20
INDEX_FILE = "index.json"

# Where a shard begins: the document's number in the stream, the source's place of it, tokens of it to leave out.
Start = list[Any]
BEGINNING: Start = [0, None, 0]


def open_stream(
    source: Source, tokenizer: str | Path, vocab_size: int, *, seq_len: int, verbose: bool = False
) -> TokenizedText:
    """The stream of a source as a training split without end, and its validation split.

    `tokenizer` is as in `cache.tokenize`; "bpe" is trained on the training documents of the first 64 MiB. Raises
    OSError naming a folder that can't be written, and ValueError for a single document or one text many times.
    """
    given = given_tokenizer(tokenizer)
    block = max(1, SHARD_TOKENS // seq_len)
    identity = vocab_size if given is None else given.to_json()
    folder = folder_of("stream", source.identity(), identity, seq_len, block, PREFIX_BYTES)
    say(verbose, f"streaming {source.name} through {folder}")
    meta = intact_meta(folder, verbose) or _prepare(folder, source, given, vocab_size, verbose)
    made = load_tokenizer(folder / TOKENIZER_FILE)
    train = StreamedDataset(
        folder, source, Holdout(*meta["holdout"]), seq_len=seq_len, eos_id=made.eos_id, shuffle_block=block
    )
    val = PackedDataset(folder / VAL_FILE, seq_len=seq_len, eos_id=made.eos_id)
    return TokenizedText(made, train, val, {"corpus": source.name, "streaming": True, **described(meta)})


def _prepare(folder: Path, source: Source, tokenizer: Tokenizer | None, vocab_size: int, verbose: bool) -> dict:
    fingerprint, skipped = Fingerprint(), []
    documents: list[Document] = []
    for _, name, content in source.stream():
        text = decode(content)
        if text is None:
            skipped.append(name)
        elif text:
            documents.append(Document(name, text))
            fingerprint.add(documents[-1])
        if fingerprint.num_bytes >= PREFIX_BYTES and len(documents) > 1:
            break
    if len(documents) < 2:
        raise ValueError(f"{source.name} holds {len(documents)} documents with text, and a stream needs two or more.")
    holdout = Holdout.of([document.text for document in documents])
    train = [document for document in documents if document.text not in holdout]
    val = [document for document in documents if document.text in holdout]
    tokenizer = tokenizer or train_bpe(train, vocab_size, verbose)
    meta = {
        "holdout": [holdout.lowest, holdout.cut],
        "corpus_sha256": fingerprint.sha256,  # of the stream's beginning, which is all that is read now
        "beginning": {"documents": len(documents), "bytes": fingerprint.num_bytes},
        "skipped": skipped,
    }
    with kept_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        meta["val"] = write_split(folder / VAL_FILE, val, tokenizer, verbose)
        write_meta(folder, meta, tokenizer, (VAL_FILE,))
    return meta


class StreamedDataset:
    """Windows over a stream of tokens that is read as far as windows are asked for, see the top of this file.

    Items are those of `PackedDataset`. From the stream's end on the windows begin again: once `windows`, their number,
    is known, item i is window i mod `windows`. `len` is nominal, 2^20 shards. `shuffle_block` is the windows of a
    shard: an order that permutes within such blocks needs one or two shards at a time. Several processes and loader
    workers may share a folder; one makes a shard, under an OS lock, and the others wait for it. Each reads the stream
    itself, which costs a remote dataset its bandwidth once a process.

    Raises IndexError outside 0 … len-1, ValueError if the text is not what it was, OSError if a shard can't be kept.
    """

    def __init__(
        self, folder: Path, source: Source, holdout: Holdout, *, seq_len: int, eos_id: int, shuffle_block: int
    ) -> None:
        self.folder, self.source, self.holdout = folder, source, holdout
        self.seq_len, self.eos_id, self.shuffle_block = seq_len, eos_id, shuffle_block
        self.windows: int | None = None
        self._open: dict[int, np.ndarray] = {}
        self._reader: _TokenReader | None = None
        self._reader_of = 0

    def __len__(self) -> int:
        return NOMINAL_SHARDS * self.shuffle_block

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        if self.windows is not None:
            index %= self.windows
        number, row = divmod(index, self.shuffle_block)
        tokens = self._shard(number)
        if self.windows is not None and index >= self.windows:  # that is known only now
            return self[index]
        return window(tokens, row, self.seq_len, self.eos_id)

    @property
    def tokens(self) -> np.ndarray:
        """The first shard's, to count tokens in: [N], one more than its windows have targets."""
        return self._shard(0)

    # A loader's workers read the stream themselves.
    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_reader": None}

    def _shard(self, number: int) -> np.ndarray:
        """Tokens of a shard, none beyond the stream's end; made unless they are on disk and intact."""
        if number not in self._open:
            tokens = self._load(number, self._read_index())
            if tokens is None:
                with locked(self.folder / "lock"):
                    tokens = self._load(number, index := self._read_index())  # another process may have made it
                    while tokens is None:
                        self._make(min(number, len(index["sha256"])), index)
                        tokens = self._load(number, index)
            while len(self._open) >= SHARDS_OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = tokens
        return self._open[number]

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.npy"

    def _load(self, number: int, index: dict) -> np.ndarray | None:
        """The shard on disk, None where it must be made; empty beyond the stream's end."""
        self.windows = index["windows"]
        if number >= len(index["sha256"]):
            return None if self.windows is None else np.empty(0)
        path = self._path(number)
        try:
            tokens = np.load(path, mmap_mode="r")
            os.utime(path)  # when it was last used
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):  # what numpy says of a file cut short
            tokens = np.empty(0)
        if _sha256(tokens) == index["sha256"][number]:
            return tokens
        say(True, f"making {path} again: it is not what was written")
        return None

    def _make(self, number: int, index: dict) -> None:
        """Write a shard, for the first time or again, and what follows from it to the index."""
        if self._reader is None or self._reader_of != os.getpid():  # after a fork two would read from one file handle
            tokenizer = load_tokenizer(self.folder / TOKENIZER_FILE)
            self._reader, self._reader_of = _TokenReader(self.source, self.holdout, tokenizer), os.getpid()
        tokens, following = self._reader.take(index["starts"][number], self.shuffle_block * self.seq_len)
        if self._reader.skipped:
            say(True, f"skipped in shard {number}, not in UTF-8: {some(self._reader.skipped)}")
        made_before = number < len(index["sha256"])
        if made_before and _sha256(tokens) != index["sha256"][number]:
            raise ValueError(
                f"{self.source.name} is not the text it was when {self._path(number)} was first made: bring it back, "
                f"or delete {self.folder} and begin a new run."
            )
        with kept_in(self.folder):
            if len(tokens) > 1:  # else the shard before had the last window
                write_array(self._path(number), tokens)
                self._prune()
            if not made_before:
                if len(tokens) > 1:
                    index["sha256"].append(_sha256(tokens))
                if following is None:
                    index["windows"] = number * self.shuffle_block + num_windows(len(tokens), self.seq_len)
                else:
                    index["starts"].append(following)
                with renamed(self.folder / INDEX_FILE) as temporary:
                    temporary.write_text(json.dumps(index))

    def _prune(self) -> None:
        def last_used(path: Path) -> int:
            return path.stat().st_mtime_ns

        for path in sorted(self.folder.glob("shard-*.npy"), key=last_used)[:-SHARDS_KEPT]:
            path.unlink()  # who has it open keeps it

    def _read_index(self) -> dict:
        try:
            return parsed((self.folder / INDEX_FILE).read_bytes(), self.folder / INDEX_FILE)
        except FileNotFoundError:
            pass
        except ValueError:
            say(True, f"{self.folder / INDEX_FILE} is not readable: reading {self.source.name} from its beginning")
        return {"starts": [BEGINNING], "sha256": [], "windows": None}


class _TokenReader:
    """Tokens of the training documents of a source, from any start on; fastest where the last one ended."""

    def __init__(self, source: Source, holdout: Holdout, tokenizer: Tokenizer) -> None:
        self.source, self.holdout, self.tokenizer = source, holdout, tokenizer
        self.skipped: list[str] = []
        self._at: tuple[int, int] | None = None  # number and tokens to leave out of the start that comes next
        self._records: Iterator[tuple[Any, str, bytes]] = iter(())
        self._number = -1  # of the record that comes next
        # Pieces of documents: number and place of the document, offset of the piece in its tokens, and those.
        self._pieces: Iterator[tuple[int, Any, int, np.ndarray]] = iter(())
        self._left: deque[tuple[int, Any, int, np.ndarray]] = deque()

    def take(self, start: Start, count: int) -> tuple[np.ndarray, Start | None]:
        """`count` tokens from `start` on and the one after them, which the next take begins with; and its start.

        At the stream's end they are fewer, and the start is None.
        """
        self.skipped = []
        if (start[0], start[2]) != self._at:
            self._go_to(start)
        parts: list[np.ndarray] = []
        missing = count + 1
        following = self._at = None
        while missing and (piece := self._piece()) is not None:
            number, place, offset, ids = piece
            parts.append(ids[:missing])
            missing -= len(parts[-1])
            if not missing:
                used = len(parts[-1]) - 1
                self._left.append((number, place, offset + used, ids[used:]))
                following, self._at = [number, place, offset + used], (number, offset + used)
        return np.concatenate(parts), following

    def _piece(self) -> tuple[int, Any, int, np.ndarray] | None:
        return self._left.popleft() if self._left else next(self._pieces, None)

    def _go_to(self, start: Start) -> None:
        number, place, skip = start
        if not 0 <= self._number <= number:
            self._records, self._number = self.source.stream(place), number
        while self._number < number:  # reading on is cheap beside opening a remote file in its middle
            next(self._records, None)
            self._number += 1
        self._pieces = self._tokens()
        self._left.clear()
        while skip and (piece := next(self._pieces, None)) is not None:
            number, place, offset, ids = piece
            if len(ids) > skip:
                self._left.append((number, place, offset + skip, ids[skip:]))
            skip -= min(skip, len(ids))

    def _tokens(self) -> Iterator[tuple[int, Any, int, np.ndarray]]:
        read_ahead: deque[tuple[int, Any]] = deque()
        number, place, offset = self._number, None, 0
        for begins, ids in encode(self._texts(read_ahead), self.tokenizer):
            if begins:
                (number, place), offset = read_ahead.popleft(), 0
            yield number, place, offset, ids
            offset += len(ids)
        yield number, place, offset, end_of_text(self.tokenizer)  # the stream's end, counted to its last document

    def _texts(self, read_ahead: deque[tuple[int, Any]]) -> Iterator[str]:
        for place, name, content in self._records:
            number, self._number = self._number, self._number + 1
            text = decode(content)
            if text is None:
                self.skipped.append(name)
            elif text and text not in self.holdout:
                read_ahead.append((number, place))
                yield text


def _sha256(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
