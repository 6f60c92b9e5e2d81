"""The decoder-only ARC model: demonstrations, question and answer are one sequence of tokens.

    model = ArcDecoder(PRESETS["trial69"])
    model(tokens, rows, columns, grids)["logits"]                               # [B, L, V]
    model(tokens, rows, columns, grids, labels=labels)["loss"].backward()
    session = model.begin(tokens, rows, columns, grids)                         # up to the separator before the answer
    logits = session.step(separator, here=(row, column), ahead=(row, column))   # [B, V], then token by token

The original's "RoPE" was no position at all, and its cross-attention looked ahead. Here `position` is RoPE by place in
the sequence, or "rope2d" by row and column, and then a token is told which grid it belongs to.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import linear_cross_entropy
from models.arc_layers import (
    IGNORE_INDEX,
    PAD,
    ROPE2D_BASE,
    SEP,
    VOCAB_SIZE,
    ArcConfig,
    ArcModel,
    Layer,
    check_integers,
)
from models.layers import rotary

LEGACY_VOCAB_SIZE = 11  # colours, and one token that is both padding and separator
ROPE_BASE = 10_000.0
# Grids are told apart by how far before the answer they stand: 10 demonstrations, the most that ARC has, and the
# question. Those before them share the last vector.
MAX_GRIDS = 22


@dataclass(frozen=True, kw_only=True)
class ArcDecoderConfig(ArcConfig):
    """The defaults are the original's 530 thousand parameters."""

    vocab_size: int = VOCAB_SIZE
    d_model: int = 128
    num_layers: int = 2
    d_ff: int = 768
    dropout: float = 0.1
    position: str = "rope"  # or "rope2d"

    def problems(self) -> list[str]:
        found = super().problems() + self.not_one_of("position", ("rope", "rope2d"))
        if self.vocab_size not in (VOCAB_SIZE, LEGACY_VOCAB_SIZE):
            found.append(f"vocab_size must be {VOCAB_SIZE} or {LEGACY_VOCAB_SIZE}, not {self.vocab_size}")
        unit = 4 if self.position == "rope2d" else 2
        if self.num_heads >= 1 and self.d_model // self.num_heads % unit:
            found.append(
                f"{self.position} needs heads of a multiple of {unit} channels, not {self.d_model // self.num_heads}"
            )
        return found


PRESETS = {
    "trial69": ArcDecoderConfig(),
    "legacy": ArcDecoderConfig(vocab_size=LEGACY_VOCAB_SIZE),
    "tiny": ArcDecoderConfig(d_model=32, num_heads=2, d_ff=64),
}


class ArcDecoder(ArcModel):
    config: ArcDecoderConfig

    def __init__(self, config: ArcDecoderConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # and the head
        self.grid = nn.Embedding(MAX_GRIDS, config.d_model) if config.position == "rope2d" else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, config.dropout) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        columns: Tensor,
        grids: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Say which token comes next.

        Args:
            tokens: int64 [B, L], episodes from the left, PAD behind them.
            rows, columns, grids: int64 [B, L]: a token's place, and the number of its grid: 0 and 1 are the first
                demonstration's, an even last one the question, the odd one after it the answer.
            labels: int64 [B, L], the token that each position should say; -100 is not counted.
            num_items: 0-d int64, what the loss is divided by; default the labels counted here.

        Returns:
            Without labels {"logits": [B, L, V]}. With labels 0-d {"loss", "ce_loss"}, of which loss has a gradient.
        """
        check_integers(tokens.shape, tokens=tokens, rows=rows, columns=columns, grids=grids)
        ages = _last_grid(tokens, grids) - grids
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = self.decode(tokens, positions, rows, columns, ages, causal=True)
        if labels is None:
            return {"logits": F.linear(hidden, self.embedding.weight)}
        check_integers(tokens.shape, labels=labels)
        losses = linear_cross_entropy(
            hidden, self.embedding.weight, labels, ignore_index=IGNORE_INDEX, num_items=num_items
        )
        return {"loss": losses.loss, "ce_loss": losses.ce_loss}

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor,
        columns: Tensor,
        ages: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        caches: list | None = None,
    ) -> Tensor:
        """Tokens [B, n] at their positions [B or 1, n] of the sequence or at their places -> hidden [B, n, D]."""
        x = self.embed(tokens)
        channels = self.config.d_model // self.config.num_heads
        if self.grid is None:
            turn = rotary((positions,), channels, ROPE_BASE)
        else:
            turn = rotary((rows, columns), channels, ROPE2D_BASE)
            x = x + self.grid(ages.clamp(0, MAX_GRIDS - 1))
        x, turn = self.dropout(x), (turn[0].unsqueeze(1), turn[1].unsqueeze(1))
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = self.run(layer, x, mask=mask, causal=causal, turn=turn, caches=cache)
        return self.norm(x)

    def begin(self, tokens: Tensor, rows: Tensor, columns: Tensor, grids: Tensor) -> "DecoderSession":
        """Read prompts, [B, L] each as in `forward`, that end with the separator before the answer."""
        check_integers(tokens.shape, tokens=tokens, rows=rows, columns=columns, grids=grids)
        return DecoderSession(self, tokens, rows, columns, grids)


class DecoderSession:
    """Prompts that were read once, and the answers as far as they are said."""

    @torch.no_grad()
    def __init__(self, model: ArcDecoder, tokens: Tensor, rows: Tensor, columns: Tensor, grids: Tensor) -> None:
        self.model = model
        self.caches = [layer.new_caches() for layer in cast(Iterable[Layer], model.layers)]
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        # The first step says the last separator, so it is left out here. In the legacy vocabulary it looks like PAD.
        said = (tokens != PAD) & (tokens != SEP)
        self.position = (positions * said).amax(1, keepdim=True) + 1  # [B, 1]
        self.visible = positions < self.position  # [B, L], growing by a column at each step
        last = _last_grid(tokens, grids)
        self.age = last - grids.gather(1, self.position)
        model.decode(tokens, positions, rows, columns, last - grids, causal=True, caches=self.caches)

    @torch.no_grad()
    def step(self, tokens: Tensor, here: tuple[Tensor, Tensor], ahead: tuple[Tensor, Tensor]) -> Tensor:
        """Say tokens [B] at their places `here`; logits [B, V] of what is said next, at `ahead`."""
        self.visible = F.pad(self.visible, (0, 1), value=True)
        rows, columns = (place.unsqueeze(1) for place in here)
        hidden = self.model.decode(
            tokens.unsqueeze(1),
            self.position,
            rows,
            columns,
            self.age,
            mask=self.visible[:, None, None],
            caches=self.caches,
        )
        self.position, self.age = self.position + 1, torch.zeros_like(self.age)
        return F.linear(hidden.squeeze(1), self.model.embedding.weight)


def _last_grid(tokens: Tensor, grids: Tensor) -> Tensor:
    """The answer's number [B, 1], whether it is there yet or not: questions are even."""
    return (grids * (tokens != PAD)).amax(1, keepdim=True) | 1
