"""The ops under what rewrites programs: torch.compile of whole models that use them, and activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from models.ten import TEN, TENConfig


@pytest.fixture(autouse=True)
def nan_poisoned_empty():
    """Not here: compilers would trace the poisoning as part of the program."""


MODELS = {
    "TEN": {},
    "TEN, selective": {"selective": True},
    "HTEN": {"hten_scales": (1, 2, 4)},
    "HTEN, hold": {"hten_scales": (1, 3), "hten_mode": "hold"},
}


def results(model: torch.nn.Module, parameters: list) -> list[torch.Tensor]:
    """Every part of the loss and every gradient; some labels ignored, documents that begin inside."""
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(31, (2, 2, 20), generator=g)
    reset = torch.rand(2, 20, generator=g) < 0.1
    out = model(ids, labels=labels.masked_fill(reset, -100), num_items=torch.tensor(40), reset=reset)
    gradients = torch.autograd.grad(out["loss"], parameters)
    return [*(out[name].detach() for name in sorted(out)), *gradients]


def check_compiled(name: str, backend: str, **tolerance: float) -> None:
    torch.manual_seed(0)
    model = TEN(TENConfig(31, 16, 2, 8, 2, 24, 64, **MODELS[name]))
    parameters = list(model.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(results(compiled, parameters), results(model, parameters), **tolerance)


@pytest.mark.parametrize(
    "name", ["TEN", "HTEN", *(pytest.param(name, marks=pytest.mark.slow) for name in ("TEN, selective", "HTEN, hold"))]
)
def test_a_whole_model_is_one_graph_forward_and_backward(name):
    check_compiled(name, "aot_eager", rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TEN", "HTEN"])
def test_a_whole_model_under_inductor(name):
    check_compiled(name, "inductor", rtol=1e-4, atol=1e-6)


def test_a_graph_break_would_be_noticed():
    def broken(x):
        y = kernels.multiscale_pool(x, (2,))
        torch._dynamo.graph_break()
        return y

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="eager", fullgraph=True)(torch.zeros(1, 4, 2))


# ---- every op, computed again in backward --------------------------------------------------------------------------


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


RESET, VALID = integers(5, 2, 20) == 0, integers(2, 12, 9).bool()
OPS = {
    "eigen_scan": ((floats(2, 20, 6), -floats(3, seed=1).abs(), floats(3, seed=2)), {"reset": RESET}),
    "linear_cross_entropy": (HEAD := (floats(12, 4), floats(9, 4, seed=1), integers(9, 12)), {"label_smoothing": 0.1}),
    "linear_cross_entropy, lean": (HEAD, {"label_smoothing": 0.1, "lean": True}),
    "masked_cross_entropy": ((floats(12, 9), VALID, integers(9, 12)), {"label_smoothing": 0.1}),
    "masked_log_softmax": ((floats(12, 9), VALID), {}),
    "multiscale_pool": ((floats(2, 20, 6), (1, 3)), {"weights": floats(2, seed=1).requires_grad_(), "reset": RESET}),
    "neighbor_cross_entropy": (
        (floats(12, 4), floats(9, 4, seed=1), floats(9, seed=2), integers(9, 12, 3), integers(2, 12, 3).bool()),
        {},
    ),
}


def test_every_op_is_here():
    names = {name.removesuffix("_reference") for name in kernels.__all__ if name.endswith("_reference")}
    assert {name.partition(",")[0] for name in OPS} == names


@pytest.mark.parametrize("name", OPS)
def test_recomputed_in_backward_it_gives_the_same(name):
    op, (args, options) = getattr(kernels, name.partition(",")[0]), OPS[name]

    def run(*inputs):
        out = op(*inputs, **options)
        parts = [out] if isinstance(out, torch.Tensor) else [part for part in out if isinstance(part, torch.Tensor)]
        return [torch.where(part.isfinite(), part, 0) for part in parts if part.requires_grad]

    args = [a.clone().requires_grad_() if getattr(a, "is_floating_point", bool)() else a for a in args]
    leaves = [a for a in (*args, *options.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    runs = []
    for outputs in (run(*args), checkpoint(run, *args, use_reentrant=False)):
        upstream = [floats(*part.shape, seed=9) for part in outputs]
        runs.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_gives_the_same(name, mode):
    op, (args, options) = getattr(kernels, name.partition(",")[0]), OPS[name]
    inputs = [a.clone().requires_grad_() if getattr(a, "is_floating_point", bool)() else a for a in args]
    with mode():
        ours = op(*inputs, **options)
    # Not bit by bit: with gradients the head's loss comes from the op that makes them too.
    torch.testing.assert_close(ours, op(*inputs, **options), rtol=1e-6, atol=1e-6, equal_nan=True)
