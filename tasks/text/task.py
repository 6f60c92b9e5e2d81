"""The text task: what a training loop needs to train and score a language model on real text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.text import packing, scores
from tasks.text.cache import TRAIN_FILE, VAL_FILE, VERSION, tokenize
from tasks.text.corpus import Corpus, load_corpus
from tasks.text.packing import PackedDataset
from tasks.text.tokenizer import TOKENIZER_FILE, load_tokenizer


class TextTask:
    """Packed windows of real text and their score, bits per byte.

    `data` is a list of paths (see `load_corpus`), a `Corpus`, or None for the standard library's own source.
    `tokenizer` is "bpe" (trained on the training split, up to `vocab_size` tokens), "bytes", or the path of a
    tokenizer.json; the last two bring their own vocabulary and do not read `vocab_size`. Tokens are cached, see
    `tasks.text.cache`. Scores come from at most `eval_items` windows (None: all) spread evenly over the validation
    split.

    Attributes: `train` and `val` (`PackedDataset`), `tokenizer`, and `info`, which identifies the data.
    Raises what `load_corpus` and `tasks.text.cache.tokenize` raise, and ValueError for text shorter than one sequence.
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
        tokenizer: str | Path = "bpe",
        vocab_size: int = 50257,
        seq_len: int = 512,
        text_field: str | None = None,
        max_documents: int | None = None,
        eval_items: int | None = 64,
        eval_batch_size: int = 2,
        verbose: bool = True,
    ) -> None:
        for name, value in (("seq_len", seq_len), ("eval_items", eval_items), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if isinstance(data, Corpus):
            corpus = data
        else:
            corpus = load_corpus(data, text_field=text_field, max_documents=max_documents)
        if verbose:
            print(corpus.summary())
        folder, meta = tokenize(corpus, tokenizer, vocab_size, verbose=verbose)

        num_tokens = meta["train"]["tokens"]
        if num_tokens < seq_len + 1:
            raise ValueError(
                f"The training text has {num_tokens:,} tokens, and one sequence of seq_len {seq_len:,} needs "
                f"{seq_len + 1:,}: give more text with --data, or a seq_len of at most {num_tokens - 1:,}."
            )
        self.tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        self.train = PackedDataset(folder / TRAIN_FILE, seq_len=seq_len, eos_id=self.tokenizer.eos_id)
        self.val = PackedDataset(folder / VAL_FILE, seq_len=seq_len, eos_id=self.tokenizer.eos_id)
        self.eval_batch_size = eval_batch_size
        self.eval_windows = scores.spread(len(self.val), eval_items)
        self.info = {
            "task": f"text v{VERSION}",
            "corpus": corpus.source,
            "corpus_sha256": corpus.sha256,
            "skipped": list(corpus.skipped),
            "tokenizer_sha256": meta["files"][TOKENIZER_FILE]["sha256"],
            "vocab_size": self.tokenizer.vocab_size,
            "train": meta["train"],
            "val": meta["val"],
        }

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
