"""Byte-level tokenizers: BPE (Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2) and plain bytes.

Both are exact: any UTF-8 text comes back from its tokens, so scores per byte compare across tokenizers.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tasks.reading import parsed

EOS_TOKEN = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
BYTES_FORMAT = {"type": "tenfold-bytes"}  # all that the file of a byte tokenizer says
MIN_BPE_VOCAB_SIZE = 257  # every byte, and the end of text
MAX_BPE_VOCAB_SIZE = 2**20  # four times what the largest have; the library makes room for all at once
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(?<!\.json)")
MOST_IDS = 2**22  # sixteen times the largest vocabularies there are; a damaged id would have us hold as many rows
# Every byte that UTF-8 uses, and what tokenizers like to change: spaces, line ends, combining accents, special tokens.
PROBE = f"  e\u0301\r\n {EOS_TOKEN} " + "".join(map(chr, (*range(0x801), *range(0x1000, 0x110000, 0x1000))))


class Tokenizer(ABC):
    """What both kinds share: a table of the bytes that each id stands for.

    `pieces[id]` are those bytes, empty for `eos_id` and other special tokens; `token_bytes` [V] int64 their lengths.
    `eos_id` separates documents. A text that spells "<|endoftext|>" is text like any other.
    """

    def __init__(self, pieces: Sequence[bytes], eos_id: int) -> None:
        self.pieces = tuple(pieces)
        self.eos_id = eos_id
        self.vocab_size = len(self.pieces)
        self.token_bytes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, without the end of text. [n] uint16, or uint32 if the vocabulary needs it."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts, on all cores."""

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The exact bytes of the ids, none for special tokens. Raises ValueError for ids outside 0 … V-1."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"Token ids must lie in 0 … {self.vocab_size - 1}, got {ids.min()} … {ids.max()}.")
        return b"".join(map(self.pieces.__getitem__, ids.tolist()))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of the ids. Bytes that are no UTF-8, as a model may sample them, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def to_json(self) -> str:
        """What `tokenizer.json` holds."""

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into an existing folder, for `load_tokenizer`."""
        path = Path(folder, TOKENIZER_FILE)
        path.write_text(self.to_json(), encoding="utf-8")
        return path


class ByteTokenizer(Tokenizer):
    """Ids 0–255 are the bytes, 256 is the end of text."""

    def __init__(self) -> None:
        super().__init__([*(bytes([value]) for value in range(256)), b""], eos_id=256)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype) for text in texts]

    def to_json(self) -> str:
        return json.dumps(BYTES_FORMAT)


class BPETokenizer(Tokenizer):
    """Byte-level BPE in the Hugging Face format: ours (`BPETokenizer.train`), GPT-2's, or any other that is exact."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ValueError if `backend` has no <|endoftext|> or does not give back every byte of a text."""
        pieces = _pieces(backend)
        eos_id = backend.token_to_id(EOS_TOKEN)
        if eos_id is None or pieces[eos_id]:
            raise ValueError(f"The tokenizer has no special token {EOS_TOKEN} to separate documents: add it as one.")
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):  # merges left out by lot: no text would have the same tokens twice
            backend.model.dropout = None
        backend.encode_special_tokens = True  # a document that spells a special token must not end there
        super().__init__(pieces, eos_id)
        self.backend = backend
        try:
            backend.encode(PROBE)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"The tokenizer lacks what some text needs ({error}): bits per byte need all.") from None
        # Without its spaces too: some tokenizers put one before a text that begins with none.
        if any(self.decode_bytes(self.encode(text)) != text.encode() for text in (PROBE, PROBE.strip())):
            raise ValueError(
                "The tokenizer changes text (it normalizes, or lacks some bytes): bits per byte need an exact one."
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 50257) -> BPETokenizer:
        """Learn merges from `texts`; the same texts give the same tokenizer.

        Id 0 is the end of text. The vocabulary stays below `vocab_size` if the texts repeat too few pairs to fill it.
        Raises ValueError for a `vocab_size` below 257 or above 2^20.
        """
        if not MIN_BPE_VOCAB_SIZE <= vocab_size <= MAX_BPE_VOCAB_SIZE:
            raise ValueError(
                f"A byte-level BPE has {MIN_BPE_VOCAB_SIZE} (bytes, end of text) to {MAX_BPE_VOCAB_SIZE} tokens, and "
                f"vocab_size is {vocab_size}."
            )
        _configure_threads()
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()  # for other programs that read the file
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once would only memorize its document
            special_tokens=[EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        _configure_threads()
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def to_json(self) -> str:
        return self.backend.to_str()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read `tokenizer.json`, or the one in a folder: written by `save`, or a byte-level BPE of the Hugging Face format.

    What is neither and reads like a name of the Hub's, "gpt2" or "owner/name", is fetched from there, once.

    Raises FileNotFoundError if there is none, ValueError if it is unreadable or not exact (see `BPETokenizer`).
    """
    file = Path(path)
    if file.is_dir():
        file = file / TOKENIZER_FILE
    elif not file.exists() and HUB_NAME.fullmatch(str(path)):
        file = _fetch(str(path))
    if not file.is_file():
        raise FileNotFoundError(f"There is no tokenizer {file}: name bpe, bytes, a tokenizer.json or one of the Hub's.")
    content = file.read_bytes()
    try:
        if parsed(content, file) == BYTES_FORMAT:
            return ByteTokenizer()
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): give a tokenizer.json.") from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises nothing narrower, and where its Rust panics something wider
        raise ValueError(f"{file} is not a tokenizer of the Hugging Face format ({error}).") from None
    return BPETokenizer(backend)


def _fetch(name: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(name, TOKENIZER_FILE))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no tokenizer {name} here, and the Hub can't be reached or has none to give "
            f"({type(error).__name__}): name bpe, bytes, a tokenizer.json or one of the Hub's."
        ) from error


def _pieces(backend: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes behind every id, undoing the printable stand-ins that GPT-2 uses; ids without a token get none."""
    # Printable bytes stand for themselves; the others, in order, for the characters from U+0100 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(symbol) for symbol in alphabet if ord(symbol) < 256]
    others = [value for value in range(256) if value not in printable]
    byte_of = dict(zip(alphabet, printable + others, strict=True))

    vocabulary = backend.get_vocab()
    if not len(vocabulary) <= max(vocabulary.values(), default=-1) + 1 <= MOST_IDS:
        raise ValueError(f"The tokenizer's {len(vocabulary)} tokens have ids that are damaged: each needs its own.")
    pieces = [b""] * (max(vocabulary.values()) + 1)
    added = backend.get_added_tokens_decoder()
    for token, index in vocabulary.items():
        if index in added:
            pieces[index] = b"" if added[index].special else token.encode()
        elif all(symbol in byte_of for symbol in token):
            pieces[index] = bytes(byte_of[symbol] for symbol in token)
        else:
            raise ValueError(f"The tokenizer is not byte-level: its token {token!r} stands for no bytes.")
    return pieces


_threads_used = False


def _configure_threads() -> None:
    # Left unset, the library warns and goes single-threaded when a loader forks its workers.
    global _threads_used
    _threads_used = True
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _after_fork() -> None:
    if _threads_used:  # a forked child has none of the library's threads, and would wait for them for ever
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


os.register_at_fork(after_in_child=_after_fork)
