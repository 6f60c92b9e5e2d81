"""Costs by formula against what the models are and do, and configs at equal cost."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.maze_transformer import PRESETS, MazeTransformer, MazeTransformerConfig
from models.mlmu import MLMU, MLMUConfig
from models.parity import flops, legacy_match, match, parameters, typical_steps
from models.poh import PoH, PoHConfig
from models.trm import TRM, TRMConfig

SHAPE = {"maze_size": 6, "d_model": 48, "num_heads": 4, "d_ff": 56, "num_layers": 3, "dropout": 0.0}
MODELS = {MazeTransformerConfig: MazeTransformer, PoHConfig: PoH, TRMConfig: TRM, MLMUConfig: MLMU}
VARIANTS = [
    MazeTransformerConfig(**SHAPE),
    MazeTransformerConfig(**SHAPE, loops=3, maze_enc=True, horizons=2),
    MazeTransformerConfig(**SHAPE, position="rope2d", horizons=3),
    MazeTransformerConfig(**SHAPE, legacy=True, maze_enc=True),
    PoHConfig(**SHAPE, R=5, T=2),
    PoHConfig(**SHAPE, route_per="token", halting=True, R=3, T=3),
    PoHConfig(**SHAPE, routing="uniform"),
    PoHConfig(**SHAPE, routing="frozen"),
    PoHConfig(**SHAPE, legacy=True, horizons=3, maze_enc=True),
    TRMConfig(**SHAPE),
    MLMUConfig(**SHAPE),
    MLMUConfig(**SHAPE, maze_enc=True),
]


def trainable(config) -> int:
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: type(c).__name__)
def test_formulas_count_what_the_model_has_and_does(config):
    assert parameters(config) == trainable(config)
    ends = torch.zeros(1, dtype=torch.int64)
    passages = torch.zeros(1, config.maze_size, config.maze_size, dtype=torch.uint8)
    if isinstance(config, MLMUConfig):
        asked = torch.zeros(1, typical_steps(config), dtype=torch.int64)
    else:
        asked = torch.zeros(1, config.maze_size**2, config.horizons, 24, dtype=torch.int64)
    # In training, and with attention as two products: the counter knows no fused op of a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        MODELS[type(config)](config)(passages, ends, ends, asked)
    assert flops(config) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MazeTransformerConfig(legacy=True), 7_210_896),
        (MazeTransformerConfig(legacy=True, maze_enc=True), 7_412_688),
        (PoHConfig(legacy=True, d_model=320, num_heads=5, d_ff=1280), 7_040_825),
        (PoHConfig(legacy=True, d_model=320, num_heads=5, d_ff=1280, maze_enc=True), 7_209_785),
        (PoHConfig(legacy=True), 10_071_745),
        (PoHConfig(legacy=True, num_layers=3), 7_631_221),
        (dataclasses.replace(PRESETS["large"], legacy=True, maze_enc=True), 43_324_096),
        (dataclasses.replace(PRESETS["xl"], legacy=True, maze_enc=True), 101_830_592),
    ],
)
def test_legacy_has_the_originals_parameters(config, expected):
    assert parameters(config) == trainable(config) == expected


@pytest.mark.parametrize("shape", [{}, {"routing": "uniform"}, {"R": 2, "route_per": "token"}, {"maze_size": 8}])
@pytest.mark.parametrize("cost", [parameters, flops])
def test_a_match_costs_the_same_within_a_hundredth(shape, cost):
    template = PoHConfig(**shape)
    target = cost(MazeTransformerConfig(maze_size=template.maze_size))
    found = match(template, target, cost)
    assert abs(cost(found) / target - 1) <= 0.01
    assert found.d_model % (8 * found.num_heads) == 0
    assert 2 < found.d_ff / found.d_model < 8
    assert dataclasses.replace(found, d_model=template.d_model, d_ff=template.d_ff) == template, "nothing else changed"


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_has_matches(name):
    baseline = PRESETS[name]
    template = PoHConfig(
        **{f.name: getattr(baseline, f.name) for f in dataclasses.fields(baseline) if f.name != "loops"}
    )
    # At 32 channels even the narrowest PoH-HRM, of 16, runs through more attention than the baseline's FLOPs.
    for cost in (parameters,) if name == "micro" else (parameters, flops):
        assert abs(cost(match(template, cost(baseline), cost)) / cost(baseline) - 1) <= 0.01


def test_mlmu_has_matches_too():
    baseline = MazeTransformerConfig()
    for cost in (parameters, flops):
        assert cost(match(MLMUConfig(), cost(baseline), cost)) == pytest.approx(cost(baseline), rel=0.01)


def test_the_deep_baseline_has_the_flops_and_the_width():
    baseline = MazeTransformerConfig()
    poh = match(PoHConfig(), parameters(baseline), parameters)
    deep = match(baseline, flops(poh), flops, free="num_layers")
    assert abs(flops(deep) / flops(poh) - 1) <= 0.01
    assert deep.d_model == baseline.d_model and 10 <= deep.num_layers <= 13
    assert flops(poh) / flops(baseline) > 2.5, "equal parameters are not equal FLOPs"


def test_what_cannot_be_matched_is_said():
    with pytest.raises(ValueError, match=r"no d_model brings PoHConfig within 1% of 1,000 parameters"):
        match(PoHConfig(), 1000, parameters)


def test_legacy_match_chooses_as_the_original_did():
    found = legacy_match(PoHConfig(legacy=True), MazeTransformerConfig(legacy=True), by="heads")
    assert (found.d_model, found.num_heads, found.d_ff) == (320, 5, 1280)
    for name, expected in (("large", (648, 2611, 42_810_785)), ("xl", (912, 3686, 111_935_985))):
        baseline = dataclasses.replace(PRESETS[name], legacy=True, maze_enc=True)
        shape = {n: getattr(baseline, n) for n in ("maze_size", "d_model", "num_heads", "d_ff", "num_layers")}
        found = legacy_match(PoHConfig(**shape, legacy=True, maze_enc=True), baseline, by="scale")
        assert (found.d_model, found.d_ff, parameters(found)) == expected
