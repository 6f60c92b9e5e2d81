"""Colours by order of appearance: what makes a model treat all ten of them alike, bit for bit.

An episode's colours are renamed 0, 1, 2, … as they first appear, the model works on those names, and its logits are
renamed back. Permuted colours give the same names, hence the same numbers. A colour that first appears in the answer
gets the next name at that moment: the names before it do not depend on it. Which of the colours that nobody has shown
comes next cannot be known by such a model, so in its logits they share what it gives to the next name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.arc_layers import NUM_COLOURS, VOCAB_SIZE

NEVER = 1 << 40


class Naming:
    """The names in a batch of episodes, as far as they were read.

    With `fix_zero` colour 0 keeps name 0 from the start: the other nine are treated alike.
    """

    def __init__(self, tokens: Tensor, fix_zero: bool = False) -> None:
        """tokens: int64 [B, n], the prompt in order; what is no colour is passed over."""
        self.first = tokens.new_full((len(tokens), NUM_COLOURS), NEVER)  # when each colour appeared, in tokens
        if fix_zero:
            self.first[:, 0] = -1
        self.length = 0
        self.read(tokens)

    def read(self, tokens: Tensor) -> None:
        """Go on with tokens [B, n]."""
        end = self.length + tokens.shape[1]
        times = torch.arange(self.length, end, device=tokens.device).expand_as(tokens)
        first = self.first.new_full((len(tokens), VOCAB_SIZE), NEVER).scatter_reduce(1, tokens, times, "amin")
        self.first, self.length = torch.minimum(self.first, first[:, :NUM_COLOURS]), end

    def names(self, tokens: Tensor) -> Tensor:
        """Rename tokens [B, ...] that were read. What is no colour stays."""
        others = torch.arange(NUM_COLOURS, VOCAB_SIZE, device=tokens.device).expand(len(tokens), -1)
        return torch.cat([self._ranks(), others], 1).gather(1, tokens.flatten(1)).view_as(tokens)

    def choices(self, n: int) -> Choices:
        """What may be said after each of the last n tokens that were read."""
        times = torch.arange(self.length - n, self.length, device=self.first.device)
        known = self.first.unsqueeze(1) <= times.view(-1, 1)  # [B, n, 10]
        count = known.sum(-1, keepdim=True)
        return Choices(known, count, torch.where(known, self._ranks().unsqueeze(1), count))

    def _ranks(self) -> Tensor:
        """[B, 10]; of colours not read yet in no order that means anything."""
        return self.first.argsort(1).argsort(1)


class Choices(NamedTuple):
    known: Tensor  # bool [B, n, 10]: the colours that have appeared
    count: Tensor  # type: ignore[assignment]  # int64 [B, n, 1]: how many; no use for tuple's own
    names: Tensor  # int64 [B, n, 10]: of each colour; all that have not appeared have the next one, `count`

    def possible(self) -> Tensor:
        """bool [B, n, 10]: the names in use, and the next."""
        return torch.arange(NUM_COLOURS, device=self.count.device) <= self.count

    def of(self, tokens: Tensor) -> Tensor:
        """Names of the tokens [B, n] to be said here. What is no colour stays, also an ignored -100."""
        colours = tokens.clamp(0, NUM_COLOURS - 1).unsqueeze(-1)
        is_colour = (tokens >= 0) & (tokens < NUM_COLOURS)
        return torch.where(is_colour, self.names.gather(2, colours).squeeze(-1), tokens)

    def colour_logits(self, logits: Tensor) -> Tensor:
        """Logits [B, n, V] of names -> of colours. Those that have not appeared share the next name's evenly."""
        unseen = (NUM_COLOURS - self.count).clamp(min=1).to(logits.dtype)
        shared = torch.where(self.known, 0.0, unseen.log())
        colours = logits.gather(2, self.names.clamp(max=NUM_COLOURS - 1)) - shared
        return torch.cat([colours, logits[..., NUM_COLOURS:]], -1)

    def nameless(self) -> Tensor:
        """bool [B, n, 10]: colours that cannot be told from each other, for which argmax would prefer the lowest."""
        return ~self.known & (self.count < NUM_COLOURS - 1)
