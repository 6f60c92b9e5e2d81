"""Every op on the GPU against its float64 reference on the CPU: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels

pytestmark = pytest.mark.gpu


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


RESETS = integers(40, 2, 300) == 0
CASES = {
    "eigen_scan": (
        (random(2, 300, 32), -0.1 * random(16, seed=1).abs(), random(16, seed=2)),
        {"initial_state": random(2, 32, seed=3), "reset": RESETS, "with_energy": True},
    ),
    "multiscale_pool": ((random(2, 300, 33), (1, 3, 8)), {"weights": random(3, 33, seed=1), "reset": RESETS}),
    "linear_cross_entropy": (
        (random(300, 64), random(1003, 64, seed=1), integers(1003, 300)),
        {"label_smoothing": 0.1, "z_loss_weight": 1e-3, "softcap": 20.0},
    ),
    "masked_cross_entropy": (
        (random(300, 90), integers(2, 300, 90, seed=1).bool(), integers(90, 300)),
        {"label_smoothing": 0.1},
    ),
    "masked_log_softmax": ((random(300, 90), torch.ones(90, dtype=torch.bool)), {}),
    "neighbor_cross_entropy": (
        (random(300, 64), random(90, 64, seed=1), random(90, seed=2), integers(90, 300, 4), integers(2, 300, 4).bool()),
        {},
    ),
}


def place(value, device: str, dtype: torch.dtype):
    """A leaf on `device`; integers, masks and plain values as they are."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    return value.to(device, dtype).requires_grad_()


def results(op, case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Floating outputs, then gradients of a weighted sum of the differentiable ones."""
    args, options = case
    args = [place(a, device, dtype) for a in args]
    options = {name: place(value, device, dtype) for name, value in options.items()}
    out = op(*args, **options)
    outputs = [
        o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor) and o.is_floating_point()
    ]
    weighted = sum((o * random(*o.shape, seed=9).to(o)).nan_to_num(neginf=0).sum() for o in outputs if o.requires_grad)
    leaves = [v for v in (*args, *options.values()) if isinstance(v, Tensor) and v.requires_grad]
    grads = torch.autograd.grad(weighted, leaves)
    return [t.detach().double().cpu() for t in (*outputs, *grads)]


@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_the_reference(name):
    gold = results(getattr(kernels, f"{name}_reference"), CASES[name], "cpu", torch.float64)
    ours = results(getattr(kernels, name), CASES[name], "cuda", torch.float32)
    for expected, got in zip(gold, ours, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
