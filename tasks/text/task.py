"""The text task: what a training loop needs to train and score a language model on real text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.text import packing, scores
from tasks.text.cache import TRAIN_FILE, VAL_FILE, VERSION, TokenizedText, described, tokenize
from tasks.text.chunks import read_chunks
from tasks.text.corpus import Corpus, load_corpus, open_source
from tasks.text.packing import PackedDataset
from tasks.text.stream import open_stream
from tasks.text.tokenizer import TOKENIZER_FILE, load_tokenizer


class TextTask:
    """Packed windows of real text and their score, bits per byte.

    The text is one of: `data`, a list of paths (see `load_corpus`) or a `Corpus`; `dataset`, a Hub dataset by name;
    `pretokenized`, a folder of chunks (see `tasks.text.chunks`); or the standard library's own source. `streaming`
    tokenizes files or a dataset as training goes (see `tasks.text.stream`): for text too large to wait for.
    `tokenizer` is "bpe" (trained on the training split, up to `vocab_size` tokens), "bytes", the path of a
    tokenizer.json, or the Hub's name for one; all but the first bring their own vocabulary and do not read
    `vocab_size`. Tokens are cached, see `tasks.text.cache`. Scores come from at most `eval_items` windows (None: all)
    spread evenly over the validation split.

    Attributes: `train` (`PackedDataset`, or `StreamedDataset`), `val` (`PackedDataset`), `tokenizer`, and `info`, which
    says where the text came from and identifies it.
    Raises what `load_corpus`, `tasks.text.cache.tokenize`, `open_stream` and `read_chunks` raise, and ValueError for
    text shorter than one sequence and for settings that exclude each other.
    """

    monitor = "bits_per_byte"
    mode = "min"
    item_name = "tokens"
    collate = staticmethod(packing.collate)
    num_items = staticmethod(packing.num_items)

    def __init__(
        self,
        data: Sequence[str | Path] | Corpus | None = None,
        *,
        dataset: str | None = None,
        pretokenized: str | Path | None = None,
        streaming: bool = False,
        tokenizer: str | Path = "bpe",
        vocab_size: int = 50257,
        seq_len: int = 512,
        text_field: str | None = None,
        max_documents: int | None = None,
        subset_size: int = 0,
        eval_items: int | None = 64,
        eval_batch_size: int = 2,
        verbose: bool = True,
    ) -> None:
        for name, value in (("seq_len", seq_len), ("eval_items", eval_items), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if pretokenized is not None and (data or dataset or streaming or subset_size or max_documents):
            raise ValueError("Pretokenized text is used as it is: leave out data, dataset, streaming and subset_size.")
        if isinstance(data, Corpus) and (dataset or text_field or subset_size or max_documents):
            raise ValueError("A Corpus is used as it is: give dataset, text_field and subset_size to load_corpus.")
        if streaming and (subset_size or max_documents or isinstance(data, Corpus)):
            raise ValueError("A stream is not read to its end, so no subset of it can be drawn: leave out one of them.")

        if pretokenized is not None:
            text = read_chunks(pretokenized, tokenizer, seq_len=seq_len, verbose=verbose)
        elif streaming:
            source = open_source(data, dataset=dataset, text_field=text_field)
            text = open_stream(source, tokenizer, vocab_size, seq_len=seq_len, verbose=verbose)
        else:
            corpus = data
            if not isinstance(data, Corpus):
                corpus = load_corpus(
                    data, dataset=dataset, text_field=text_field, max_documents=max_documents, subset_size=subset_size
                )
            text = _from_corpus(corpus, tokenizer, vocab_size, seq_len, verbose)

        self.tokenizer, self.train, self.val = text.tokenizer, text.train, text.val
        num_tokens = len(self.train.tokens)
        if num_tokens < seq_len + 1:
            raise ValueError(
                f"The training text has {num_tokens:,} tokens, and one sequence of seq_len {seq_len:,} needs "
                f"{seq_len + 1:,}: give more text with --data, or a seq_len of at most {num_tokens - 1:,}."
            )
        self.eval_batch_size = eval_batch_size
        self.eval_windows = scores.spread(len(self.val), eval_items)
        self.info = {"task": f"text v{VERSION}", "vocab_size": self.tokenizer.vocab_size, **text.info}

    @classmethod
    def tiny(cls, *, seq_len: int = 64, verbose: bool = False) -> TextTask:
        """Bytes of the standard library's first 40 files, ready in a fraction of a second: to test and try things."""
        return cls(tokenizer="bytes", seq_len=seq_len, max_documents=40, eval_items=8, verbose=verbose)

    def evaluate(self, predict: scores.Predict) -> dict[str, float]:
        """`loss`, `perplexity` and `bits_per_byte` of a model, see `scores.score`."""
        return scores.score(predict, self.val, self.eval_windows, self.tokenizer, batch_size=self.eval_batch_size)

    def baselines(self) -> dict[str, float]:
        """Bits per byte without a model on the bytes that `evaluate` scores, see `scores.baselines`."""
        return scores.baselines(self.train, self.val, self.eval_windows, self.tokenizer)


def _from_corpus(corpus: Corpus, tokenizer: str | Path, vocab_size: int, seq_len: int, verbose: bool) -> TokenizedText:
    if verbose:
        print(corpus.summary())
    folder, meta = tokenize(corpus, tokenizer, vocab_size, verbose=verbose)
    made = load_tokenizer(folder / TOKENIZER_FILE)
    train, val = (PackedDataset(folder / file, seq_len=seq_len, eos_id=made.eos_id) for file in (TRAIN_FILE, VAL_FILE))
    info = {"corpus": corpus.source, "skipped": list(corpus.skipped), **described(meta)}
    return TokenizedText(made, train, val, info)
