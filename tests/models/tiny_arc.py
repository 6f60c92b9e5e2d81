"""Tiny ARC models, and random episodes for them."""

import numpy as np
import torch

from models.arc_decoder import ArcDecoder, ArcDecoderConfig
from models.arc_encoder_decoder import ArcEncoderDecoder, ArcEncoderDecoderConfig
from models.champion import Champion, ChampionConfig
from tasks.arc.augment import canvases
from tasks.arc.grid import Episode, Pair
from tasks.arc.tokens import Encoding

TINY = {"d_model": 16, "num_heads": 2, "d_ff": 24}
DRY = {"embedding_dropout": 0.0, "encoder_dropout": 0.0, "decoder_dropout": 0.0}
KINDS = {ArcDecoder: ArcDecoderConfig, ArcEncoderDecoder: ArcEncoderDecoderConfig, Champion: ChampionConfig}
# One of each thing that a model can be.
VARIANTS = [
    (ArcDecoder, {}),
    (ArcDecoder, {"position": "rope2d"}),
    (ArcDecoder, {"vocab_size": 11}),
    (ArcEncoderDecoder, {"refine": 2}),
    (ArcEncoderDecoder, {"position": "grid2d", "perminv": "canonical"}),
    (Champion, {"bridge": "none"}),
    (Champion, {"bridge": "film", "perminv": "table"}),
    (Champion, {"bridge": "concat_mlp", "context_layers": 2}),
    (Champion, {"perminv": "table"}),
    (Champion, {"refine": 3}),
    (Champion, {"position": "borders", "rope2d": True}),
]


def build(kind=Champion, dtype=torch.float64, **changes):
    """A tiny model without dropout, moved off its initialisation so that no path through it is too weak to be seen."""
    torch.manual_seed(0)
    dry = {"dropout": 0.0} if kind is ArcDecoder else DRY
    model = kind(KINDS[kind](**{**TINY, **dry, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def episode(seed, shapes, colours=10):
    """Random grids of these shapes, two by two; the last two are question and answer."""
    rng = np.random.default_rng(seed)
    palette = rng.permutation(10)[:colours]
    drawn = [palette[rng.integers(colours, size=shape)].astype(np.uint8) for shape in shapes]
    pairs = [Pair(*drawn[i : i + 2]) for i in range(0, len(drawn), 2)]
    return Episode(f"random/{seed}", tuple(pairs[:-1]), pairs[-1])


EPISODES = (
    episode(0, [(2, 3), (3, 2), (1, 4), (2, 2), (3, 3), (2, 4)], colours=4),
    episode(1, [(2, 2), (2, 2), (2, 3), (3, 1)]),
    episode(2, [(1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (2, 2), (1, 1), (3, 2)], colours=3),
    episode(3, [(1, 3), (4, 2)], colours=2),
)


def encoding(model):
    if isinstance(model, ArcDecoder):
        return Encoding("decoder_only", legacy=model.config.vocab_size == 11)
    return Encoding()


def batch(model, episodes=EPISODES, offset=None):
    by = None if offset is None else torch.tensor([offset]).expand(len(episodes), -1)
    return encoding(model).batch(canvases(episodes), by)


def prompt(model, episodes=EPISODES):
    return encoding(model).prompt(canvases(episodes))


def logits(model, given):
    with torch.no_grad():
        return model(**{name: value for name, value in given.items() if name != "labels"})["logits"]


def answer_logits(model, episodes=EPISODES, offset=None):
    """Of each episode's answer tokens, [n, V] one after another."""
    given = batch(model, episodes, offset)
    return logits(model, given)[given["labels"] != -100]


def gradients(model, *batches, **options):
    """Of the summed losses, by name; zeros where there is none."""
    model.zero_grad()
    for given in batches:
        model(**given, **options)["loss"].backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
