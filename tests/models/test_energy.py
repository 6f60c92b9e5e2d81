"""The energy bound is met where it can be, and the original's is not one."""

from __future__ import annotations

import pytest
import torch

from models.energy import energy_bound
from models.ten import TEN


def aligned(tiny_ten, mode: str, nu: float) -> TEN:
    """Every eigenstate as slow as the others and without a turn, so that one token for ever pushes all one way."""
    model = tiny_ten(num_layers=1, hten_scales=(1, 3), hten_mode=mode)
    eigenvalues = model.blocks[0].mixer.eigenvalues
    torch.nn.init.constant_(eigenvalues.nu, nu)
    torch.nn.init.zeros_(eigenvalues.omega)
    return model


@pytest.mark.parametrize("mode", ["polyphase", "hold"])
def test_pushes_in_line_reach_the_bound(tiny_ten, mode):
    reset = torch.arange(100)[None] == 50
    for energy in energy_bound(aligned(tiny_ten, mode, -4.0), torch.zeros(1, 100, dtype=torch.int64), reset):
        assert energy.ratio == pytest.approx(1.0, abs=1e-9)
        torch.testing.assert_close(energy.root, energy.bound, rtol=1e-9, atol=0)
        assert energy.root[0, 49] > 2 * energy.root[0, 52] > 0, "a document begins from nothing"


@pytest.mark.parametrize("mode", ["polyphase", "hold"])
def test_energy_linear_in_time_is_no_bound(tiny_ten, mode):
    """E_t <= E_0 + t B² fails for states that hardly decay or turn."""
    for energy in energy_bound(aligned(tiny_ten, mode, -12.0), torch.zeros(1, 100, dtype=torch.int64)):
        push = energy.root[0, energy.scale - 1]  # the first mean of all s positions
        assert energy.root[0, -1] ** 2 > 5 * 100 * push**2 / energy.scale


def test_bf16_weights_keep_the_bound_and_leave_no_hook(tiny_ten, tokens):
    model = tiny_ten(hten_scales=(1, 2, 4)).bfloat16()
    for energy in energy_bound(model, tokens(2, 50)):
        assert energy.root.dtype == torch.float32 and 0 < energy.ratio <= 1 + 1e-6
    assert not any(block.mixer._forward_hooks for block in model.blocks)
