"""The encoder-decoder ARC model: it reads the question's cells and says the answer, token by token.

    model = ArcEncoderDecoder(PRESETS["trial69"])
    model(**prompt, inputs=inputs, rows=rows, columns=columns)["logits"]                     # [B, T, V]
    model(**prompt, inputs=inputs, rows=rows, columns=columns, labels=labels)["loss"].backward()
    session = model.begin(**prompt)
    logits = session.step(bos, here=(row, column), ahead=(row, column))                      # [B, V], token by token

It looks at no demonstration (models/champion.py does), so it can learn rules by heart only. The original's decoder was
given the very token that it had to say; here position t is given the tokens before t, and the place of token t.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels import masked_cross_entropy
from models.arc_colours import Choices, Naming
from models.arc_layers import (
    EOL,
    EOS,
    IGNORE_INDEX,
    NUM_COLOURS,
    PAD,
    ROPE2D_BASE,
    VOCAB_SIZE,
    ArcConfig,
    ArcModel,
    Borders,
    Cache,
    Layer,
    Memory,
    Placed,
    Turn,
    check_integers,
    grid2d,
    sinusoids,
)
from models.layers import rotary

MOST_PASSES = 100  # more is a slip, and only planning them would take hours


@dataclass(frozen=True, kw_only=True)
class ArcEncoderDecoderConfig(ArcConfig):
    """The defaults are the original's 928 thousand parameters."""

    d_model: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    d_ff: int = 512
    embedding_dropout: float = 0.1
    encoder_dropout: float = 0.1
    decoder_dropout: float = 0.1
    position: str = "sinusoidal"  # by order in the sequence; "grid2d": by row and column; "borders": see `Borders`
    perminv: str = "table"  # a vector for each colour; or "canonical": for each in order of appearance
    fix_zero: bool = False  # canonical: colour 0 keeps a vector of its own
    rope2d: bool = False  # in attention, places are told by how far they are apart, too
    refine: int = 1  # passes of the decoder, each shown what the one before would say

    def problems(self) -> list[str]:
        found = super().problems()
        found += self.not_one_of("position", ("sinusoidal", "grid2d", "borders"))
        found += self.not_one_of("perminv", ("table", "canonical"))
        if self.d_model % 4:
            found.append(f"d_model must be a multiple of 4, for sines and cosines both ways, not {self.d_model}")
        if self.rope2d and self.num_heads >= 1 and self.d_model // self.num_heads % 4:
            found.append(f"rope2d needs heads of a multiple of 4 channels, not {self.d_model // self.num_heads}")
        if self.refine > MOST_PASSES:
            found.append(f"refine must be at most {MOST_PASSES}, not {self.refine}")
        if self.fix_zero and self.perminv != "canonical":
            found.append(f"fix_zero needs perminv canonical, not {self.perminv!r}")
        return found


PRESETS = {
    "trial69": ArcEncoderDecoderConfig(),
    "tiny": ArcEncoderDecoderConfig(d_model=32, num_heads=2, encoder_layers=1, decoder_layers=1, d_ff=64),
}


class Context(NamedTuple):
    """What a decoder is told about its question."""

    memories: Sequence[Memory]
    rule: Tensor | None = None  # [B, 1, D], from the demonstrations


class ArcEncoderDecoder(ArcModel):
    config: ArcEncoderDecoderConfig

    def __init__(self, config: ArcEncoderDecoderConfig):
        super().__init__(config)
        self._build(config)
        self.init_weights()

    def _build(self, config: ArcEncoderDecoderConfig, demo_memories: int = 0) -> None:
        """demo_memories: 1 where every layer looks at the demonstrations as well."""
        c = config
        self.embedding = nn.Embedding(VOCAB_SIZE, c.d_model)
        self.borders = Borders(c.d_model) if c.position == "borders" else None
        self.dropout = nn.Dropout(c.embedding_dropout)
        self.encoder = nn.ModuleList(Layer(c, c.encoder_dropout, demo_memories) for _ in range(c.encoder_layers))
        self.encoder_norm = nn.LayerNorm(c.d_model)
        self.decoder = nn.ModuleList(Layer(c, c.decoder_dropout, 1 + demo_memories) for _ in range(c.decoder_layers))
        self.norm = nn.LayerNorm(c.d_model)
        self.head = nn.Linear(c.d_model, VOCAB_SIZE)

    def forward(
        self,
        source: Tensor,
        source_rows: Tensor,
        source_columns: Tensor,
        demos: Tensor,
        demo_rows: Tensor,
        demo_columns: Tensor,
        inputs: Tensor,
        rows: Tensor,
        columns: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Say the answer, given what of it stands before.

        Args:
            source, source_rows, source_columns: int64 [B, S], the question's cells and their places, PAD behind them.
            demos, demo_rows, demo_columns: int64 [B, P, 2, M], the cells of each demonstration's input and output. With
                perminv canonical they name colours, also for a model that does not look at them.
            inputs: int64 [B, T], BOS, then the answer but for its last token.
            rows, columns: int64 [B, T], the place of the token that follows each input.
            labels: int64 [B, T], that token; -100 is not counted.
            num_items: 0-d int64, what the losses are divided by; default the labels counted here.

        Returns:
            Without labels {"logits": [B, T, V]}, -inf for what no answer holds. Normalised, with perminv canonical
            colours that have not appeared share the probability of a new one evenly. With labels 0-d {"loss",
            "ce_loss"}, of which loss has a gradient. ce_loss is that of the last pass; with refine K there is also
            refine_loss, the mean of the other passes, and loss is the mean of all. With perminv canonical the losses
            are those of the colours' names: which of them a new colour is costs nothing.

        Raises:
            ValueError for shapes and dtypes that do not fit.
        """
        question, shown = Placed(source, source_rows, source_columns), Placed(demos, demo_rows, demo_columns)
        check_prompt(question, shown)
        check_integers((len(source), inputs.shape[-1]), inputs=inputs, rows=rows, columns=columns)
        naming, context = self.read(question, shown)
        choices, tokens = None, inputs
        if naming is not None:
            naming.read(inputs)
            choices, tokens = naming.choices(inputs.shape[1]), naming.names(inputs)
        passes = self.decode(tokens, rows, columns, context, self.possible(choices))
        if labels is None:
            return {"logits": passes[-1] if choices is None else choices.colour_logits(passes[-1])}
        check_integers(inputs.shape, labels=labels)
        return self._losses(passes, choices, labels, num_items)

    def _losses(
        self, passes: list[Tensor], choices: Choices | None, labels: Tensor, num_items: Tensor | None
    ) -> dict[str, Tensor]:
        num_items = (labels != IGNORE_INDEX).sum() if num_items is None else num_items
        targets, possible = labels if choices is None else choices.of(labels), self.possible(choices)
        losses = [masked_cross_entropy(logits, possible, targets, num_items=num_items) for logits in passes]
        out = {"loss": torch.stack(losses).mean(), "ce_loss": losses[-1].detach()}
        if len(losses) > 1:
            out["refine_loss"] = torch.stack(losses[:-1]).mean().detach()
        return out

    # ---- parts of forward that sessions use too

    def read(self, question: Placed, demos: Placed) -> tuple[Naming | None, Context]:
        naming = None
        if self.config.perminv == "canonical":
            naming = Naming(torch.cat([demos.tokens.flatten(1), question.tokens], 1), self.config.fix_zero)
            question, demos = (cells._replace(tokens=naming.names(cells.tokens)) for cells in (question, demos))
        return naming, self.encode(question, demos)

    def encode(self, question: Placed, demos: Placed) -> Context:
        return Context([self.encode_question(question)])

    def encode_question(self, cells: Placed, memories: Sequence[Memory] = ()) -> Memory:
        """Cells [B, S] as a memory."""
        there = cells.tokens != PAD
        x, mask = self.dropout(self.embed_grid(cells)), there[:, None, None]
        turn = self.turn(cells.rows, cells.columns)
        for layer in self.encoder:
            x = self.run(layer, x, memories, mask=mask, turn=turn)
        return Memory(self.encoder_norm(x), mask, turn)

    def embed_grid(self, cells: Placed) -> Tensor:
        """Whole grids [..., n] -> [..., n, D]."""
        return self.embed(cells.tokens) + self.place(cells.rows, cells.columns, there=cells.tokens != PAD)

    def turn(self, rows: Tensor, columns: Tensor) -> Turn | None:
        """Of heads at places [B, n]: RoPE by row and column (arXiv 2403.13298)."""
        if not self.config.rope2d:
            return None
        cos, sin = rotary((rows, columns), self.config.d_model // self.config.num_heads, ROPE2D_BASE)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def place(self, rows: Tensor, columns: Tensor, start: int = 0, there: Tensor | None = None) -> Tensor:
        """For tokens [..., n], of which the first is number `start` of its sequence: [..., n, D] or [n, D].

        there: of whole grids, the tokens that are cells.
        """
        if self.borders is not None:
            return self.borders(rows, columns, there)
        if self.config.position == "grid2d":
            return grid2d(rows, columns, self.config.d_model)
        return sinusoids(torch.arange(start, start + rows.shape[-1], device=rows.device), self.config.d_model)

    def possible(self, choices: Choices | None) -> Tensor:
        """What the model may say: bool [B, T, V], or [V] if it is always the same."""
        classes = torch.arange(VOCAB_SIZE, device=self.head.weight.device)
        answers = (classes < NUM_COLOURS) | (classes == EOL) | (classes == EOS)
        if choices is None:
            return answers
        colours = choices.possible()
        return torch.cat([colours, answers[NUM_COLOURS:].expand(*colours.shape[:2], -1)], -1)

    def decode(
        self,
        tokens: Tensor,
        rows: Tensor,
        columns: Tensor,
        context: Context,
        possible: Tensor,
        caches: list[list[list[Cache]]] | None = None,
        start: int = 0,
    ) -> list[Tensor]:
        """Logits [B, n, V] of each pass. With caches, of each pass's layers, tokens [B, 1] go on where they end."""
        x, turn = self.dropout(self.embed(tokens) + self.place(rows, columns, start)), self.turn(rows, columns)
        passes: list[Tensor] = []
        for k in range(self.config.refine):
            h = x
            if passes:  # what would be said here, seen at this very position: it depends on earlier tokens only
                h = h + passes[-1].softmax(-1).to(x.dtype) @ self.embed(torch.arange(VOCAB_SIZE, device=x.device))
            for i, layer in enumerate(self.decoder):
                h = self.condition(h, context, i)
                cache = None if caches is None else caches[k][i]
                h = self.run(layer, h, context.memories, causal=caches is None, turn=turn, caches=cache)
            h = self.condition(h, context, len(self.decoder))
            passes.append(self.head(self.norm(h)).masked_fill(~possible, -math.inf))
        return passes

    def condition(self, x: Tensor, context: Context, depth: int) -> Tensor:
        """x as it comes to layer `depth` of the decoder, or to the head: a bridge may tell it the rule."""
        return x

    # ---- one token at a time

    def begin(
        self,
        source: Tensor,
        source_rows: Tensor,
        source_columns: Tensor,
        demos: Tensor,
        demo_rows: Tensor,
        demo_columns: Tensor,
    ) -> "AnswerSession":
        """Read a prompt, as in `forward`."""
        question, shown = Placed(source, source_rows, source_columns), Placed(demos, demo_rows, demo_columns)
        check_prompt(question, shown)
        return AnswerSession(self, question, shown)


class AnswerSession:
    """Questions that were read once, and their answers as far as they are said."""

    @torch.no_grad()
    def __init__(self, model: ArcEncoderDecoder, question: Placed, demos: Placed) -> None:
        self.model, self.said = model, 0
        self.naming, self.context = model.read(question, demos)
        layers = cast(Iterable[Layer], model.decoder)
        self.caches = [[layer.new_caches() for layer in layers] for _ in range(model.config.refine)]

    @torch.no_grad()
    def step(self, tokens: Tensor, here: tuple[Tensor, Tensor], ahead: tuple[Tensor, Tensor]) -> Tensor:
        """Say tokens [B], BOS first; logits [B, V] of what is said next, at the places `ahead`.

        They are those of `forward`, but for colours that have not appeared: with perminv canonical they cannot be told
        from each other and are -inf, unless there is only one.
        """
        tokens, choices = tokens.unsqueeze(1), None
        if self.naming is not None:
            self.naming.read(tokens)
            choices, tokens = self.naming.choices(1), self.naming.names(tokens)
        rows, columns = (place.unsqueeze(1) for place in ahead)
        possible = self.model.possible(choices)
        logits = self.model.decode(tokens, rows, columns, self.context, possible, self.caches, self.said)[-1]
        self.said += 1
        if choices is not None:
            logits = choices.colour_logits(logits)
            logits[..., :NUM_COLOURS].masked_fill_(choices.nameless(), -math.inf)
        return logits.squeeze(1)


def check_prompt(question: Placed, demos: Placed) -> None:
    source, shown = question.tokens, demos.tokens
    if source.dim() != 2:
        raise ValueError(f"source must be [batch, cells], not {list(source.shape)}")
    if shown.dim() != 4 or shown.shape[0] != len(source) or shown.shape[2] != 2:
        raise ValueError(f"demos must be [{len(source)}, pairs, 2, cells], not {list(shown.shape)}")
    check_integers(source.shape, source=source, source_rows=question.rows, source_columns=question.columns)
    check_integers(shown.shape, demos=shown, demo_rows=demos.rows, demo_columns=demos.columns)
