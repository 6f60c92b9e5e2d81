from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from models.hten import hten_scan
from models.spectrum import spectrum
from models.ten import TEN, TENConfig

CONFIG = TENConfig(
    vocab_size=13, d_model=16, num_layers=2, num_eigenstates=14, num_heads=2, d_ff=32, max_seq_len=64, hten_scales=(1,)
)


def make(**changes) -> TEN:
    torch.manual_seed(0)
    return TEN(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameterization": "sigmoid"},
        {"hten_scales": (1, 2, 4)},
        {"hten_scales": (3, 1), "hten_mode": "hold", "selective": True},
    ],
)
def test_it_describes_every_eigenstate_in_plain_numbers(changes):
    model = make(**changes)
    groups = spectrum(model)
    assert [(g.layer, g.scale) for g in groups] == [(layer, s) for layer in (0, 1) for s in model.config.hten_scales]
    for layer in (0, 1):
        assert [h for g in groups if g.layer == layer for h in g.head] == [0] * 7 + [1] * 7
    assert all(0 < life < math.inf for g in groups for life in g.half_life)
    assert json.loads(json.dumps([g._asdict() for g in groups])) == [g._asdict() for g in groups]


@pytest.mark.parametrize("mode", ["polyphase", "hold"])
def test_half_lives_are_in_tokens(mode):
    """Drive each state once, then feed nothing: after its half-life it is half of what it was."""
    model = make(hten_scales=(1, 4), hten_mode=mode)
    eigenvalues = model.blocks[0].mixer.eigenvalues.double()
    with torch.no_grad():  # half-lives of 12 tokens at both scales
        eigenvalues.nu.copy_(torch.log(math.log(2) * torch.tensor([1.0] * 7 + [4.0] * 7) / 12))
    push = torch.zeros(1, 32, 28, dtype=torch.float64)
    push[:, :4] = 1.0
    states = hten_scan(push, *eigenvalues()[:2], (1, 4), mode).states.unflatten(-1, (2, -1)).norm(dim=2)[0]  # [T, K]
    torch.testing.assert_close(states[3 + 12], states[3] / 2)
    for group in spectrum(model)[:2]:
        assert group.half_life == pytest.approx([12.0] * 7)
        assert group.context == pytest.approx(12 * math.log2(100))


def test_context_is_what_the_slowest_tenth_holds():
    model = make(num_eigenstates=20, num_heads=1)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.eigenvalues.nu.copy_(-torch.arange(20.0))  # memories e^k
        assert spectrum(model)[0].context == pytest.approx(-math.log(0.01) * math.exp(18), rel=1e-4)
        mixer.out_proj.weight.unflatten(1, (2, 20))[..., 5:] = 0.0  # nothing slower than this is read out
        mixer.resonance.copy_(torch.eye(20)[None])
    assert spectrum(model)[0].weighted_context <= -math.log(0.01) * math.exp(4) * 1.0001


def test_contribution_is_what_white_noise_brings_to_the_output():
    """The formula beside a measurement: states of white tokens, one at a time through the readout of all."""
    model = make(d_model=48, hten_scales=(1, 3, 2)).double()  # 5, 5 and 4 states, in heads of 7
    block = model.blocks[0]
    mixer = block.mixer
    with torch.no_grad():
        block.mixer_norm.weight.uniform_(0.5, 2.0)
        mixer.resonance.add_(0.5 * torch.randn_like(mixer.resonance)).mul_(torch.linspace(0.2, 2.0, 7)[:, None])
        mixer.eigenvalues.nu.clamp_(min=-3.0)
        tokens = torch.randn(64, 256, 48, dtype=torch.float64) * block.mixer_norm.weight
        beta, log_rho, omega = mixer.drive(tokens)
        states = (
            hten_scan(beta, log_rho, omega, model.config.hten_scales, "polyphase")
            .states[:, 128:]
            .unflatten(-1, (2, 14))
        )  # [B, T, 2, K]
        heads = states.unflatten(-1, (2, 7))
        rms = torch.einsum("btchi,hji->bthcj", heads, mixer.resonance).square().mean((0, 1, 3, 4)).sqrt()  # [H]
        claimed = [value for group in spectrum(model)[:3] for value in group.contribution]
        for k in (0, 5, 9, 13):
            alone = torch.zeros_like(states)
            alone[..., k] = states[..., k]
            coupled = torch.einsum("btchi,hji->bthcj", alone.unflatten(-1, (2, 7)), mixer.resonance)
            output = (coupled / rms[:, None, None]).flatten(2) @ mixer.out_proj.weight.T
            measured = output.square().sum(-1).mean().sqrt().item()
            assert claimed[k] == pytest.approx(measured, rel=0.05)


def test_dead_states_are_those_that_are_not_driven_or_not_read():
    model = make()
    assert all(group.dead == [] for group in spectrum(model))
    mixer = model.blocks[1].mixer
    with torch.no_grad():
        mixer.in_proj.weight.unflatten(0, (2, 14))[:, 3] = 0.0
        mixer.resonance[1, :, 2] = 0.0  # state 7 + 2
    first, second = spectrum(model)
    assert first.dead == [] and second.dead == [3, 9]


def test_duplicates_answer_alike_and_slow_states_do_not():
    model = make(num_heads=2, num_eigenstates=14)
    eigenvalues = model.blocks[0].mixer.eigenvalues
    log_tau = torch.arange(14.0) % 7
    with torch.no_grad():
        eigenvalues.nu.copy_(-log_tau)
        eigenvalues.omega.zero_()
    assert spectrum(model)[0].duplicates == []  # the same memories in the other head are no duplicates either
    with torch.no_grad():
        eigenvalues.omega[:2] = torch.tensor([0.5, -0.5])
        eigenvalues.nu[1] = eigenvalues.nu[0]  # the conjugate of 0
        eigenvalues.nu[13] = eigenvalues.nu[12] + 0.01
        eigenvalues.nu[5:7] = torch.tensor([-12.0, -13.0])  # |λ_i - λ_j| = 4e-6, yet one lasts e times as long
    assert spectrum(model)[0].duplicates == [1, 13]
