"""Does a model see the future? Change what comes after a prefix and look at the prefix.

A model that pools over blocks looks superb in training and validation and cannot be sampled from: part of its targets
stand in its input. A check that has never failed shows nothing, so each comes with a control: the same model with its
embeddings pooled over blocks, which must be seen to leak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ten import TEN

PREFIXES = (1, 3, 7, 15, 31, 32, 63)
LENGTH = 34  # positions; more where a scale needs them
DOCUMENT_START = 5  # no multiple of a usual scale: blocks must be counted from here and not from 0
CONTROL_BLOCK = 4


def check_causality(model: nn.Module, *, seed: int = 0) -> dict[str, Any]:
    """Change every token after a prefix, or outside of a document's prefix, and see whether the prefix's logits move.

    Prefixes end around the edges of each scale's first two blocks, and of the first block of a document that starts
    inside. Both runs have the same shape and differ in tokens only, so the logits of a causal model agree bit for bit;
    the tolerance is one rounding of their dtype, for devices that don't always add in the same order. The precision is
    the weights' own, without autocast.

    Args:
        model: a TEN, or what DDP, FSDP2 or torch.compile make of one. With several processes all of them call this.
        seed: of the tokens.

    Returns:
        JSON-able: "causal"; "leak", the largest change of a logit that must not change, relative to the largest change
        of one that may; "control_leak", the same of the control; "tolerance"; "prefixes"; "length".

    Raises:
        RuntimeError: the control was not seen to leak, so "causal" would mean nothing.
    """
    ten = next(m for m in model.modules() if isinstance(m, TEN))
    scales = ten.config.hten_scales
    length = max(LENGTH, 2 * max(scales) + 2)
    first, second = ({blocks * s + shift for s in scales for shift in (-1, 0, 1)} for blocks in (1, 2))
    prefixes = sorted(p for p in {*first, *second, *PREFIXES} if 0 < p < length)
    documents = [(DOCUMENT_START, DOCUMENT_START + p) for p in sorted(first) if 0 < p < length - DOCUMENT_START]
    control = [(0, CONTROL_BLOCK - 1), (0, CONTROL_BLOCK + 1)]
    with _evaluation(model):
        leaks = [_leak(model, spans, length, seed) for spans in ([(0, p) for p in prefixes], documents)]
        hook = ten.embedding.register_forward_hook(_pool_and_repeat)
        try:
            control_leak, tolerance = _leak(model, control, length, seed)
        finally:
            hook.remove()
    if not control_leak > tolerance:
        raise RuntimeError(
            "the causality check is blind: the model with its embeddings pooled over blocks seems causal too (leak "
            f"{control_leak:.1e}, tolerance {tolerance:.1e}); its logits must be finite and depend on the input"
        )
    leak = max(leak for leak, _ in leaks)
    return {
        "causal": all(leak <= tolerance for leak, _ in leaks),
        "leak": leak,
        "control_leak": control_leak,
        "tolerance": tolerance,
        "prefixes": prefixes,
        "length": length,
    }


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, autocast, and compiled code, which would pass the control's hook by."""
    mode, device = model.training, next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(mode)


def _leak(model: nn.Module, spans: Sequence[tuple[int, int]], length: int, seed: int) -> tuple[float, float]:
    """Change all tokens outside of one span [start, end) a row -> its logits' relative change, and the tolerance.

    A span that starts inside is a document: there is a reset at its start.
    """
    ten = next(m for m in model.modules() if isinstance(m, TEN))
    vocab_size, device = ten.config.vocab_size, ten.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (len(spans), length), generator=generator)
    other = (ids + torch.randint(1, max(2, vocab_size), ids.shape, generator=generator)) % vocab_size
    start, end = torch.tensor(spans).T[..., None]
    t = torch.arange(length)
    inside, reset = (t >= start) & (t < end), (t == start).to(device) if start.any() else None  # [N, T]
    before, after = (model(x.to(device), reset=reset)["logits"] for x in (ids, torch.where(inside, ids, other)))
    change, inside = (after - before).abs().amax(-1), inside.to(device)
    leak = change.masked_fill(~inside, 0).amax(1) / change.masked_fill(inside, 0).amax(1)
    return leak.max().item(), torch.finfo(after.dtype).eps


def _pool_and_repeat(module: nn.Module, args: tuple, x: Tensor) -> Tensor:
    """The original's mistake: x [B, T, D] -> at every position of a block the mean of the block."""
    padded = F.pad(x, (0, 0, 0, -x.shape[1] % CONTROL_BLOCK))
    pooled = padded.unflatten(1, (-1, CONTROL_BLOCK)).mean(2)
    return pooled.repeat_interleave(CONTROL_BLOCK, 1)[:, : x.shape[1]]
