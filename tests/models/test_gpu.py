"""TEN on the GPU: as on the CPU, and in bf16 close to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.ten import PRESETS, TEN

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "changes",
    [{}, {"hten_scales": (1, 2, 4)}, {"hten_scales": (1, 2, 4), "hten_mode": "hold"}, {"selective": True}],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 2e-2)])
def test_nano_has_the_loss_and_gradient_of_the_cpu(dtype, tolerance, changes):
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["nano"], vocab_size=1003, **changes)
    model = TEN(config)
    ids = torch.randint(1003, (2, 257))
    gradients, losses = [], []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype is not None and device == "cuda"):
            loss = model(ids[:, :-1].to(device), labels=ids[:, 1:].to(device))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert (gradients[1] - gradients[0]).norm() < 5 * tolerance * gradients[0].norm()
