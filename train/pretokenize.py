"""Tokenize text once, into chunks that later runs train on.

    python train/pretokenize.py --dataset tinystories --tokenizer gpt2 --output_dir tokens/tinystories
    python train/pretokenize.py --data my_corpus/ notes.jsonl --tokenizer bpe --output_dir tokens/mine
    python train/pretokenize.py --dataset imdb --tokenizer bytes --subset_size 5000 --output_dir tokens/imdb --force
    accelerate launch train/nano.py --pretokenized --tokenized_dir tokens/imdb

DIR gets chunk_000000.pt, … (int64 token ids), metadata.json, tokenizer.json and the documents held out, in val/. It
appears when it is complete. Text is read in one pass and never held in whole, but for the documents of --subset_size.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from tasks.text.cache import given_tokenizer, train_bpe
from tasks.text.chunks import METADATA_FILE, write_chunks
from tasks.text.corpus import Document, Holdout, decode, load_corpus, open_source
from tasks.text.stream import PREFIX_BYTES
from train.engine import ConfigError
from train.engine.script import sentences

MOST = 2**31  # of anything that is counted
STANDARD_LIBRARY = "the Python standard library"


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig:
    """Flags of train/pretokenize.py."""

    # Folder for the chunks; it must not hold anything yet.
    output_dir: Path
    # A Hub dataset: imdb, ag_news, wikitext-103, tinystories, finewebedu, pg19, openwebtext, or owner/name[:config].
    dataset: str | None = None
    # Text files, .jsonl, .parquet or folders; the Python standard library's own source when neither is given.
    data: tuple[Path, ...] = ()
    # Field of rows that holds the text; text, content, article or document when not given.
    text_field: str | None = None
    # bpe (trained on the first 64 MiB of training documents), bytes, a tokenizer.json or a Hub name such as gpt2.
    tokenizer: str = "bpe"
    # Most tokens that bpe may learn.
    vocab_size: int = 50257
    # Tokens in a chunk.
    chunk_size: int = 32768
    # Stop after so many training chunks; 0: at the end of the text.
    max_chunks: int = 0
    # Draw so many documents by lot, the same every time; 0: all.
    subset_size: int = 0
    # Documents tokenized at a time.
    batch_size: int = 2000
    # Threads that tokenize; as many as there are cores when not given.
    num_proc: int | None = None
    # Replace the chunks that --output_dir holds.
    force: bool = False

    def check(self) -> None:
        least = {"chunk_size": 2, "max_chunks": 0, "subset_size": 0, "batch_size": 1, "num_proc": 1}
        found = [
            f"--{name} must be {low} to {MOST}, not {getattr(self, name)}"
            for name, low in least.items()
            if getattr(self, name) is not None and not low <= getattr(self, name) <= MOST
        ]
        if self.output_dir.exists() and not self.output_dir.is_dir():
            found.append(f"--output_dir {self.output_dir} is a file; give a folder")
        elif self.output_dir.is_dir() and any(self.output_dir.iterdir()):
            chunks = (self.output_dir / METADATA_FILE).exists()
            if not chunks:
                found.append(f"--output_dir {self.output_dir} holds something other than chunks; give an empty folder")
            elif not self.force:
                found.append(f"--output_dir {self.output_dir} holds chunks already; --force replaces them")
        try:
            self.output_dir.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found.append(f"--output_dir {self.output_dir} cannot be made: {error.strerror}; give a folder of yours")
        if found:
            raise ConfigError("; ".join(found))


def read_documents(config: PretokenizeConfig) -> Iterator[Document]:
    if config.subset_size:
        yield from load_corpus(
            config.data, dataset=config.dataset, text_field=config.text_field, subset_size=config.subset_size
        ).documents
        return
    source = open_source(config.data, dataset=config.dataset, text_field=config.text_field)
    for _, name, content in source.stream():
        text = decode(content)
        if text is None:
            print(f"skipped {name}: it is not in UTF-8", flush=True)
        elif text:
            yield Document(name, text)


def read_beginning(documents: Iterator[Document]) -> list[Document]:
    """The first documents, 64 MiB of text or a little more: what is learned about the text is learned from them."""
    beginning: list[Document] = []
    size = 0
    while (size < PREFIX_BYTES or len(beginning) < 2) and (document := next(documents, None)):
        beginning.append(document)
        size += len(document.text.encode())
    if len(beginning) < 2:
        raise ConfigError(f"the text is {len(beginning)} document(s), and two are needed: to train, to validate")
    return beginning


def pretokenize(config: PretokenizeConfig) -> dict:
    """Write the chunks; returns their metadata. Raises ConfigError, and what reading, tokenizing and writing raise."""
    config.check()
    if config.num_proc is not None:
        os.environ["RAYON_NUM_THREADS"] = str(config.num_proc)  # read by the tokenizers' threads when they start
    documents = read_documents(config)
    beginning = read_beginning(documents)
    holdout = Holdout.of([document.text for document in beginning])
    train = [document for document in beginning if document.text not in holdout]
    tokenizer = given_tokenizer(config.tokenizer) or train_bpe(train, config.vocab_size, verbose=True)

    target = config.output_dir
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        metadata = write_chunks(
            aside,
            itertools.chain(beginning, documents),
            tokenizer,
            holdout,
            names={
                "dataset": config.dataset or ", ".join(map(str, config.data)) or STANDARD_LIBRARY,
                "tokenizer": config.tokenizer,
            },
            chunk_size=config.chunk_size,
            max_chunks=config.max_chunks,
            batch_size=config.batch_size,
            progress=True,
        )
        if target.exists():  # empty, or replaced as --force says
            shutil.rmtree(target)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return metadata


def main() -> None:
    config = tyro.cli(PretokenizeConfig, description=__doc__)
    with sentences():
        metadata = pretokenize(config)
        for split in ("train", "val"):
            of = metadata[split]
            print(f"{split}: {of['documents']:,} documents, {of['tokens']:,} tokens, {of['num_chunks']:,} chunks")
        print(f"written to {config.output_dir}")


if __name__ == "__main__":
    main()
