"""The causality check passes what is causal and fails what is not; what it fails would train to impossible losses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from kernels import eigen_scan, multiscale_pool
from kernels.eigen_scan import ScanOutput
from models import eigenstates
from models.causality import check_causality
from models.hten import group_sizes, split_groups
from models.ten import TEN, TENConfig


def tiny_hten(**changes) -> TEN:
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "d_model": 16, "num_layers": 2, "num_eigenstates": 12, "num_heads": 2, "d_ff": 16}
    return TEN(TENConfig(**{**shape, "max_seq_len": 32, "hten_scales": (1, 2, 4), **changes}))


def join(groups: list[Tensor]) -> ScanOutput:
    states = torch.cat([g.unflatten(-1, (2, -1)) for g in groups], -1).flatten(2)
    return ScanOutput(states, states[:, -1], None)


def pool_and_repeat(beta, log_rho, omega, scales, mode, *, reset=None, **_) -> ScanOutput:
    """The original's HTEN: the mean of each block drives the states, and every position of the block sees them."""
    decays = zip(*(x.split(group_sizes(x.shape[-1], len(scales)), -1) for x in (log_rho, omega)), strict=True)
    groups = []
    for scale, group, decay in zip(scales, split_groups(beta, len(scales)), decays, strict=True):
        padded = nn.functional.pad(group, (0, 0, 0, -group.shape[1] % scale))
        states = eigen_scan(padded.unflatten(1, (-1, scale)).mean(2), *decay).states
        groups.append(states.repeat_interleave(scale, 1)[:, : beta.shape[1]])
    return join(groups)


def one_phase_reset(beta, log_rho, omega, scales, mode, *, reset=None, **_) -> ScanOutput:
    """Polyphase whose reset reaches only the one of the s recurrences that steps at the document's start."""
    decays = torch.polar(log_rho.exp(), omega).split(group_sizes(log_rho.shape[-1], len(scales)))
    groups = []
    for scale, group, decay in zip(scales, split_groups(beta, len(scales)), decays, strict=True):
        pushes = torch.complex(*multiscale_pool(group, (scale,), reset=reset).chunk(2, -1))
        states = [torch.zeros_like(pushes[:, 0])] * scale
        for t, push in enumerate(pushes.unbind(1)):
            previous = states[-scale] if reset is None else torch.where(reset[:, t, None], 0, states[-scale])
            states.append(decay * previous + push)
        group = torch.stack(states[scale:], 1)
        groups.append(torch.cat([group.real, group.imag], -1))
    return join(groups)


class Wrapper(nn.Module):
    """What DDP does to a model, as far as the check can see."""

    def __init__(self, model: TEN):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"hten_scales": (1,)}, torch.float32),
        ({}, torch.float64),
        ({}, torch.bfloat16),
        ({"hten_mode": "hold"}, torch.float32),
        ({"hten_scales": (18, 5), "selective": True}, torch.float32),
    ],
)
def test_causal_models_pass(changes, dtype):
    model = tiny_hten(**changes).to(dtype)
    report = check_causality(Wrapper(model))
    assert report["causal"] and report["leak"] <= 1e-9 and report["control_leak"] > 0.1
    assert json.loads(json.dumps(report)) == report
    edges = {k * s + shift for s in model.config.hten_scales for k in (1, 2) for shift in (-1, 0, 1)} - {0}
    assert edges <= set(report["prefixes"]) and max(report["prefixes"]) < report["length"]
    assert model.training and not model.embedding._forward_hooks, "left as it was found"


@pytest.mark.parametrize(
    ("broken", "dtype"),
    [(pool_and_repeat, torch.float32), (pool_and_repeat, torch.bfloat16), (one_phase_reset, torch.float32)],
)
def test_leaking_models_fail(monkeypatch, broken, dtype):
    model = tiny_hten().to(dtype)
    monkeypatch.setattr(eigenstates, "hten_scan", broken)
    report = check_causality(model)
    assert not report["causal"] and report["leak"] > 10 * report["tolerance"]


def test_a_compiled_model_is_seen_through():
    model = tiny_hten()
    model.compile(backend="eager")
    model(torch.zeros(2, 9, dtype=torch.int64))
    assert check_causality(model)["causal"]


def test_a_model_that_ignores_its_input_is_not_called_causal():
    model = tiny_hten()
    nn.init.zeros_(model.embedding.weight)
    with pytest.raises(RuntimeError, match="blind"):
        check_causality(model)


@pytest.mark.parametrize(("leaks", "mode"), [(False, "polyphase"), (False, "hold"), (True, "polyphase")])
def test_random_tokens_cannot_be_predicted(monkeypatch, leaks, mode):
    """Beside a leaking model, which beats the entropy ln V of tokens drawn evenly."""
    if leaks:
        monkeypatch.setattr(eigenstates, "hten_scan", pool_and_repeat)
    vocab_size, batch, time = 4, 32, 24
    # The broken scan returns no energy; the spectral one needs none.
    model = tiny_hten(vocab_size=vocab_size, num_layers=1, hten_mode=mode, energy_mode="spectral")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def losses() -> dict[str, Tensor]:
        tokens = torch.randint(vocab_size, (batch, time + 1))
        return model(tokens[:, :-1], labels=tokens[:, 1:])

    for _ in range(60):
        optimizer.zero_grad()
        losses()["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        validation = sum(losses()["ce_loss"].item() for _ in range(10)) / 10
    if leaks:
        assert validation < math.log(vocab_size) - 0.05
    else:
        assert validation > math.log(vocab_size) - 0.005
