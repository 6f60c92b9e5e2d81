"""Champion: an encoder-decoder that takes the rule from demonstrations, places by row and column, colours alike.

    model = Champion(PRESETS["trial69"])
    model(**batch)["loss"].backward()           # batch and sessions as of models/arc_encoder_decoder.py

Any number of demonstrations: the cells of a pair look at each other, pairs do not, and nothing numbers them. What a
`bridge` makes of them:

    cross_attn   every layer attends to all their cells
    film         a summary of them scales and shifts what each layer of the decoder reads (arXiv 1709.07871)
    concat_mlp   the original's place for it: x + W2 relu(W1 [x; summary]) on what the decoder has made
    none         nothing: the control

In the original, of 32 numbers the summary of two fixed demonstrations, "PermInv" was a table and rows and columns were
right for grids 30 wide.
"""

# No `from __future__ import annotations` here: PyTorchModelHubMixin reads the type of `config` from each __init__.

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.arc_decoder import ArcDecoder, ArcDecoderConfig
from models.arc_encoder_decoder import ArcEncoderDecoder, ArcEncoderDecoderConfig, Context
from models.arc_layers import PAD, Layer, Memory, Placed

BRIDGES = ("none", "concat_mlp", "film", "cross_attn")
PARAMETERS = 1_724_619  # the original's, and what the ladder's models have within 1 %


@dataclass(frozen=True, kw_only=True)
class ChampionConfig(ArcEncoderDecoderConfig):
    """The defaults are the original's widths and dropouts, of its trial 69; d_ff is what its parameters leave."""

    d_model: int = 160
    encoder_layers: int = 1
    decoder_layers: int = 3
    d_ff: int = 296
    embedding_dropout: float = 0.16712351989226623
    encoder_dropout: float = 0.1
    decoder_dropout: float = 0.014891948478374184
    position: str = "grid2d"
    perminv: str = "canonical"
    bridge: str = "cross_attn"
    context_layers: int = 1  # of the encoder of demonstrations

    def problems(self) -> list[str]:
        return super().problems() + self.not_one_of("bridge", BRIDGES)


class Champion(ArcEncoderDecoder):
    config: ChampionConfig

    def __init__(self, config: ChampionConfig):
        super().__init__(config)

    def _build(self, config: ArcEncoderDecoderConfig, demo_memories: int = 0) -> None:
        c = self.config
        super()._build(config, demo_memories=int(c.bridge == "cross_attn"))
        if c.bridge != "none":
            self.role = nn.Embedding(2, c.d_model)  # input, output
            self.pair, self.nothing = nn.Embedding(1, c.d_model), nn.Embedding(1, c.d_model)
            self.demo_layers = nn.ModuleList(Layer(c, c.encoder_dropout) for _ in range(c.context_layers))
            self.demo_norm = nn.LayerNorm(c.d_model)
        bridges: dict[int, nn.Module] = {}  # by the layer of the decoder that they stand before
        if c.bridge == "film":
            bridges = {depth: Film(c.d_model) for depth in range(c.decoder_layers)}
        elif c.bridge == "concat_mlp":
            bridges = {c.decoder_layers: ConcatMLP(c.d_model)}
        self.pool = Pool(c) if bridges else None
        self.bridges = nn.ModuleDict({str(depth): bridge for depth, bridge in bridges.items()})

    def encode(self, question: Placed, demos: Placed) -> Context:
        if self.config.bridge == "none":
            return Context([self.encode_question(question)])
        shown = self.encode_demos(demos)
        if self.pool is not None:
            return Context([self.encode_question(question)], self.pool(shown.cells, shown.there))
        return Context([self.encode_question(question, [shown]), shown])

    def encode_demos(self, cells: Placed) -> Memory:
        """Cells [B, P, 2, M] as a memory of nothing at all, and of each pair and all of its cells.

        Without a demonstration there would be nothing to attend to, hence the last of these.
        """
        demos, rows, columns = cells
        batch, pairs = demos.shape[:2]
        role, one = self.role(torch.arange(2, device=demos.device)), demos.new_zeros(batch, 1)
        x = self.embed_grid(cells) + role.unsqueeze(1)
        there = (demos != PAD).flatten(2)  # [B, P, 2M]
        x = torch.cat([self.pair(one.expand(-1, pairs).unsqueeze(2)), x.flatten(2, 3)], 2)  # [B, P, 1 + 2M, D]
        x, mask = self.dropout(x).flatten(0, 1), F.pad(there, (1, 0), value=True).flatten(0, 1)[:, None, None]
        rows, columns = (F.pad(place.flatten(2), (1, 0)) for place in (rows, columns))  # a pair is at (0, 0)
        turn = self.turn(rows.flatten(0, 1), columns.flatten(0, 1))
        for layer in self.demo_layers if pairs else ():
            x = self.run(layer, x, mask=mask, turn=turn)
        there = torch.cat([there.any(2, keepdim=True), there], 2).flatten(1)
        x = torch.cat([self.nothing(one), x.reshape(batch, -1, x.shape[-1])], 1)
        turn = self.turn(*(F.pad(place.flatten(1), (1, 0)) for place in (rows, columns)))
        return Memory(self.demo_norm(x), F.pad(there, (1, 0), value=True)[:, None, None], turn)

    def condition(self, x: Tensor, context: Context, depth: int) -> Tensor:
        bridge = str(depth)
        return self.bridges[bridge](x, context.rule) if bridge in self.bridges else x


class Pool(nn.Module):
    """What each of some heads finds worth attending to, in one vector."""

    def __init__(self, config: ChampionConfig):
        super().__init__()
        self.score = nn.Linear(config.d_model, config.num_heads)
        self.value = nn.Linear(config.d_model, config.d_model)

    def forward(self, memory: Tensor, there: Tensor) -> Tensor:
        """memory [B, m, D], there bool [B, 1, 1, m] -> [B, 1, D]."""
        scores = self.score(memory).transpose(1, 2).unsqueeze(2).masked_fill(~there, -torch.inf)  # [B, H, 1, m]
        values = self.value(memory).unflatten(-1, (scores.shape[1], -1)).transpose(1, 2)  # [B, H, m, C]
        return (scores.softmax(-1) @ values).flatten(1).unsqueeze(1)


class Film(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.scale_shift = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        scale, shift = self.scale_shift(rule).chunk(2, -1)
        return x * (1 + scale) + shift


class ConcatMLP(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.first, self.second = nn.Linear(2 * d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(torch.cat([x, rule.expand_as(x)], -1))))


PRESETS = {
    "trial69": ChampionConfig(),
    "small": ChampionConfig(d_model=64, d_ff=256),  # 0.37 M, for a CPU
    "tiny": ChampionConfig(d_model=32, num_heads=2, decoder_layers=2, d_ff=64),
}


def _ladder(size: str, decoder: dict[str, Any], wide: dict[str, Any], d_ff: int) -> dict[str, tuple]:
    """Experiments -1 … 3, each with what the one before has, and two that add something to the Champion: as many
    parameters in all, so that a step tells what it brings. d_ff is the last one's, which pays for codes of borders."""
    wide, ours = {**wide, "encoder_layers": 1, "decoder_layers": 3}, PRESETS[size]
    return {
        "decoder_only": (ArcDecoder, ArcDecoderConfig(**decoder, num_layers=4)),
        "encoder_decoder": (ArcEncoderDecoder, ArcEncoderDecoderConfig(**wide)),
        "grid2d": (ArcEncoderDecoder, ArcEncoderDecoderConfig(**wide, position="grid2d")),
        "perminv": (ArcEncoderDecoder, ArcEncoderDecoderConfig(**wide, position="grid2d", perminv="canonical")),
        "champion": (Champion, ours),
        "refine": (Champion, dataclasses.replace(ours, refine=2)),
        "borders": (Champion, dataclasses.replace(ours, d_ff=d_ff, position="borders", rope2d=True)),
    }


LADDERS = {
    "trial69": _ladder("trial69", {"d_model": 160, "d_ff": 1016}, {"d_model": 168, "d_ff": 680}, d_ff=272),
    "small": _ladder("small", {"d_model": 80, "d_ff": 408}, {"d_model": 72, "d_ff": 376}, d_ff=240),
}
