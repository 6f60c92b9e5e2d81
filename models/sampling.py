"""Drawing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise one ValueError that names every argument which `sample_token` could not use."""
    problems = []
    if not 0.0 <= temperature < float("inf"):
        problems.append(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k must be at least 1, or None to keep every token, not {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        problems.append(f"top_p must lie in (0, 1], or be None to keep every token, not {top_p}")
    if problems:
        raise ValueError("; ".join(problems))


def sample_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row: logits [B, V] in any float dtype -> tokens [B] int64.

    Temperature 0 takes the most likely token. `top_k` keeps the k most likely tokens; `top_p` then keeps the fewest of
    those whose probability reaches p (nucleus sampling, arXiv 1904.09751), always at least one. `generator` lives on
    the logits' device. Raises ValueError for arguments outside their range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    logits, tokens = (logits.float() / temperature).topk(kept)  # [B, kept], most likely first
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)
    choice = torch.multinomial(probabilities, num_samples=1, generator=generator)  # [B, 1], a rank
    return tokens.gather(-1, choice).squeeze(-1)
