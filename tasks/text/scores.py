"""Score a language model in nats per token and bits per byte, and what costs nothing to compare it with."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.text.packing import IGNORE_INDEX, PackedDataset, collate
from tasks.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 512  # rows of logits that are turned to fp32 together


class Predict(Protocol):
    """What the training loop hands to `evaluate`: the model without gradients, and its place among the processes."""

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`{"logits": [B, T, V]}` of a batch without labels, which it moves to the device itself."""

    def share(self, num_batches: int) -> list[int]:
        """The batches that this process scores."""

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over all processes."""


def spread(num_windows: int, eval_items: int | None) -> list[int]:
    """At most `eval_items` windows at equal distances over all of them, first and last included; None: all."""
    count = min(num_windows, eval_items or num_windows)
    return np.linspace(0, num_windows - 1, count).round().astype(int).tolist()


def score(
    predict: Predict, dataset: PackedDataset, windows: Sequence[int], tokenizer: Tokenizer, *, batch_size: int
) -> dict[str, float]:
    """`loss` (nats per target), `perplexity` = exp(loss) and `bits_per_byte` of a model on some windows of a dataset.

    bits_per_byte = nats / ln 2 / bytes of the targets. The end of a text costs nats and has no bytes. Sums are float64.
    Raises ValueError if the logits have fewer classes than the tokenizer has tokens.
    """
    nats, targets, num_bytes = 0.0, 0, 0
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    for index in predict.share(len(batches)):
        batch = collate([dataset[window] for window in batches[index]])
        labels = batch.pop("labels")  # [B, T]
        logits = predict(batch)["logits"]  # [B, T, V]
        if logits.shape[-1] < tokenizer.vocab_size:
            raise ValueError(
                f"The model scores {logits.shape[-1]} classes but the tokenizer has {tokenizer.vocab_size} tokens: "
                "build the model with the tokenizer's vocab_size."
            )
        nats += _sum_nats(logits.flatten(0, 1), labels.flatten())
        scored = labels[labels != IGNORE_INDEX].numpy()
        targets += len(scored)
        num_bytes += int(tokenizer.token_bytes[scored].sum())
    total = predict.total({"nats": nats, "targets": float(targets), "bytes": float(num_bytes)})
    loss = total["nats"] / total["targets"]
    return {
        "loss": loss,
        "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),  # inf where math.exp would raise
        "bits_per_byte": total["nats"] / math.log(2) / total["bytes"],
    }


def _sum_nats(logits: Tensor, labels: Tensor) -> float:
    """Sum of the cross-entropies of rows [R, V] with labels [R], ignored ones 0."""
    labels = labels.to(logits.device)
    rows = [
        F.cross_entropy(some.float(), label, ignore_index=IGNORE_INDEX, reduction="none")
        for some, label in zip(logits.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(rows).cpu().double().sum().item()  # on the CPU, because MPS has no float64


def baselines(
    train: PackedDataset, val: PackedDataset, windows: Sequence[int], tokenizer: Tokenizer
) -> dict[str, float]:
    """Bits per byte that need no model, on exactly the validation bytes that `score` counts.

    `uniform`: all tokens equally likely, what an untrained model gets. `byte_unigram` and `token_unigram`: counts of
    the training split plus one (the former need not say where a text ends). `xz`: what `xz -9e` makes of the bytes,
    without having seen the training split.
    """
    targets = np.concatenate(list(_targets(val, windows)))
    text = np.frombuffer(tokenizer.decode_bytes(targets), dtype=np.uint8)
    token_counts = _count(train.tokens[1:], tokenizer.vocab_size)  # [V]
    byte_counts = np.bincount(
        np.frombuffer(b"".join(tokenizer.pieces), dtype=np.uint8),
        weights=np.repeat(token_counts, tokenizer.token_bytes),
        minlength=256,
    )
    bits = {
        "uniform": len(targets) * math.log2(tokenizer.vocab_size),
        "byte_unigram": _unigram_bits(byte_counts, text),
        "token_unigram": _unigram_bits(token_counts, targets),
        "xz": 8 * len(lzma.compress(text.tobytes(), preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: float(value / len(text)) for name, value in bits.items()}


def _targets(dataset: PackedDataset, windows: Sequence[int]) -> Iterator[np.ndarray]:
    for window in windows:
        labels = dataset[window]["labels"]
        yield labels[labels != IGNORE_INDEX].numpy()


def _count(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs, [V] int64, a block at a time: bincount would copy all of them to int64."""
    starts = range(0, len(tokens), 2**22)
    return sum(np.bincount(tokens[start : start + 2**22], minlength=vocab_size) for start in starts)


def _unigram_bits(counts: np.ndarray, symbols: np.ndarray) -> float:
    probabilities = (counts + 1) / (counts.sum() + len(counts))
    return float(-np.log2(probabilities[symbols]).sum())
