"""HTEN and selective eigenvalues: formulas, causality, carried state, resets, energy, precision."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from kernels import eigen_scan, multiscale_pool
from models.energy import energy_bound
from models.hten import group_sizes, hten_scan, state_size
from models.ten import PRESETS, TEN, TENConfig

SCALES = [(1, 2, 4), (1, 2, 4, 8, 16), (1, 3, 6), (5, 2), (3,)]
MODES = ("polyphase", "hold")
STARTS = (0, 5, 6, 20)  # of the documents in row 1


def documents(time: int) -> Tensor:
    reset = torch.zeros(2, time, dtype=torch.bool)
    reset[1, [s for s in STARTS if s < time]] = True
    return reset


def drive(scales, *, time: int = 37, selective: bool = False, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """beta [2, T, 2K], log_rho and omega [K] or [2, T, K], float64, with one state more than splits evenly."""
    torch.manual_seed(seed)
    num_states = 2 * len(scales) + 1
    shape = (2, time, num_states) if selective else (num_states,)
    beta = torch.randn(2, time, 2 * num_states, dtype=torch.float64)
    return beta, -torch.rand(shape, dtype=torch.float64), 3 * torch.rand(shape, dtype=torch.float64)


def reference(beta, log_rho, omega, scales, mode, starts) -> Tensor:
    """The formulas as written, for one row of beta [T, 2K] whose documents begin at `starts` -> [T, 2K]."""
    time, num_states = beta.shape[0], beta.shape[1] // 2
    beta = torch.complex(*beta.chunk(2, -1))
    decay = torch.polar(log_rho.exp(), omega).expand(time, num_states)
    scale_of = [s for s, n in zip(scales, group_sizes(num_states, len(scales)), strict=True) for _ in range(n)]
    states = torch.zeros(time, num_states, dtype=torch.complex128)
    for k, s in enumerate(scale_of):
        for start, stop in itertools.pairwise((*starts, time)):
            for t in range(start, stop):
                mean = beta[max(start, t - s + 1) : t + 1, k].mean()
                if mode == "polyphase":
                    previous = states[t - s, k] if t - s >= start else 0
                    states[t, k] = decay[t, k] * previous + mean
                else:
                    previous = states[t - 1, k] if t > start else 0
                    states[t, k] = decay[t, k] * previous + mean if (t - start + 1) % s == 0 else previous
    return torch.cat([states.real, states.imag], -1)


# --- what a layer computes ---


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scales", SCALES)
def test_scan_computes_its_formula(scales, mode, selective):
    beta, log_rho, omega = drive(scales, selective=selective)
    counted = torch.rand(2, 37) < 0.7
    out = hten_scan(beta, log_rho, omega, scales, mode, reset=documents(37), counted=counted)
    decays = zip(log_rho, omega, strict=True) if selective else [(log_rho, omega)] * 2
    rows = [
        reference(b, *decay, scales, mode, starts)
        for b, decay, starts in zip(beta, decays, ((0,), STARTS), strict=True)
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(out.states, expected, rtol=1e-11, atol=1e-11)
    energy = (expected.square().sum(-1) * counted).sum(1)
    torch.testing.assert_close(out.energy, energy, rtol=1e-11, atol=0)
    assert out.final_state.shape == (2, state_size(log_rho.shape[-1], scales, mode))
    if not selective:
        free = hten_scan(beta[:1], log_rho, omega, scales, mode).states
        torch.testing.assert_close(free, expected[:1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("selective", [False, True])
def test_hold_equals_a_scan_over_every_position(selective):
    """Where no block completes the decay is 1 and the push 0; values and gradients."""
    beta, log_rho, omega = drive((4,), selective=selective)
    reset, inputs = documents(37), [beta, log_rho, omega]
    for x in inputs:
        x.requires_grad_()
    t = torch.arange(37)
    age = t - torch.where(reset, t, 0).cummax(1).values
    complete = ((age + 1) % 4 == 0)[..., None]
    pushes = torch.where(complete, multiscale_pool(beta, (4,), reset=reset), 0)
    slow = eigen_scan(pushes, torch.where(complete, log_rho, 0), torch.where(complete, omega, 0), reset=reset).states
    fast = hten_scan(beta, log_rho, omega, (4,), "hold", reset=reset).states
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scales", [(1, 2, 4), (5, 2), (8, 1)])
def test_scan_can_be_cut_anywhere(scales, mode):
    """Into one token at a time and into pieces, with documents; values, and gradients through the carried state."""
    beta, log_rho, omega = drive(scales, time=23)
    reset = documents(23)
    inputs = [x.requires_grad_() for x in (beta, log_rho, omega)]

    def run(cuts) -> tuple[Tensor, Tensor, Tensor]:
        state, states, energy = None, [], 0
        for a, b in itertools.pairwise(cuts):
            counted = torch.ones(2, b - a, dtype=torch.bool)
            out = hten_scan(
                beta[:, a:b], log_rho, omega, scales, mode, initial_state=state, reset=reset[:, a:b], counted=counted
            )
            state, energy = out.final_state, energy + out.energy
            states.append(out.states)
        return torch.cat(states, 1), state, energy

    whole = run((0, 23))
    weights = [torch.randn_like(x) for x in whole]
    wanted = torch.autograd.grad(sum((x * w).sum() for x, w in zip(whole, weights, strict=True)), inputs)
    for cuts in (range(24), (0, 3, 4, 10, 23), (0, 22, 23)):
        parts = run(cuts)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        got = torch.autograd.grad(sum((x * w).sum() for x, w in zip(parts, weights, strict=True)), inputs)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# --- the model: the scales of every preset and others, both modes, fixed and selective ---


PRESET_SCALES = {preset.hten_scales for preset in PRESETS.values()}
VARIANTS = [
    (scales, mode, selective)
    for scales in sorted(PRESET_SCALES | {(1, 2, 4, 8, 16), (6, 1, 3), (5, 2)})
    for mode in (MODES if scales != (1,) else MODES[:1])
    for selective in (False, True)
]


@pytest.fixture
def variant(tiny_ten):
    """Build a tiny float64 model; a selective one with decays and phases that do depend on the token."""

    def build(scales: tuple[int, ...], mode: str, selective: bool) -> TEN:
        model = tiny_ten(d_model=8, d_ff=8, num_eigenstates=10, hten_scales=scales, hten_mode=mode, selective=selective)
        if selective:
            for block in model.blocks:
                torch.nn.init.normal_(block.mixer.eigenvalues.selection.weight, std=0.5)
        return model

    return build


@pytest.mark.parametrize(("scales", "mode", "selective"), VARIANTS)
def test_model_is_causal_decodes_and_keeps_its_bound(variant, tokens, scales, mode, selective):
    model, time = variant(scales, mode, selective), 2 * max(scales) + 5
    # Causal: one row for every prefix, so all block edges are among them.
    ids = tokens(1, time).expand(time - 1, -1)
    prefix = torch.arange(time) < torch.arange(1, time)[:, None]
    changed = torch.where(prefix, ids, (ids + 7) % 31)
    logits = model(ids)["logits"]
    moved = (model(changed)["logits"] - logits).abs().amax(-1)
    assert moved[prefix].max() < 1e-9 < moved[~prefix].max()

    # prefill and steps equal the full forward.
    out, state = model.prefill(ids[:1, :3])
    for t in range(3, time):
        torch.testing.assert_close(out, logits[:1, t - 1], rtol=1e-9, atol=1e-9)
        out, state = model.step(ids[:1, t], state)
    torch.testing.assert_close(out, logits[:1, -1], rtol=1e-9, atol=1e-9)

    # Energy real and bounded at every scale.
    energies = energy_bound(model, tokens(2, time), documents(time))
    assert [(e.layer, e.scale) for e in energies] == list(itertools.product(range(2), scales))
    for energy in energies:
        assert energy.root.max() > 0 and 0.1 < energy.ratio <= 1 + 1e-9

    # And every parameter learns.
    model(tokens(2, time), labels=tokens(2, time, seed=1))["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(("mode", "selective"), list(itertools.product(MODES, (False, True))))
def test_model_can_be_cut_and_packed(variant, tokens, mode, selective):
    model, ids, labels = variant((1, 2, 4), mode, selective), tokens(2, 37), tokens(2, 37, seed=1)
    reset, num_items = documents(37), torch.tensor(74)
    whole = model(ids, labels=labels, reset=reset, return_state=True)
    parts = {"initial_state": None}
    loss = 0
    for a, b in itertools.pairwise((0, 3, 19, 37)):
        parts = {"labels": labels[:, a:b], "reset": reset[:, a:b], "num_items": num_items, **parts}
        out = model(ids[:, a:b], return_state=True, **parts)
        parts, loss = {"initial_state": out["state"]}, loss + out["loss"]
    torch.testing.assert_close(loss, whole["loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(out["state"], whole["state"], rtol=1e-9, atol=1e-10)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(whole["loss"], parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)

    packed = model(ids, reset=reset)["logits"][1]
    separate = torch.cat([model(ids[1:, a:b])["logits"][0] for a, b in itertools.pairwise((*STARTS, 37))])
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-10)
    changed = torch.where(torch.arange(37) < STARTS[-1], (ids + 7) % 31, ids)
    assert torch.equal(model(changed, reset=reset)["logits"][1, STARTS[-1] :], packed[STARTS[-1] :])


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_and_compiling_change_nothing(variant, tokens, mode):
    model, ids = variant((1, 2, 4), mode, selective=True), tokens(2, 21)
    arguments = {"labels": tokens(2, 21, seed=1), "reset": documents(21), "return_state": True}
    runs = []
    for model.gradient_checkpointing in (False, True):
        loss = model(ids, **arguments)["loss"]
        runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    model.gradient_checkpointing = False
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(ids, **arguments)
    torch.testing.assert_close(compiled["loss"], loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mode", "selective"), list(itertools.product(MODES, (False, True))))
def test_eigenvalues_states_and_losses_stay_fp32(variant, tokens, mode, selective):
    model, ids = variant((1, 2, 4), mode, selective).float(), tokens(2, 21)
    arguments = {"labels": tokens(2, 21, seed=1), "reset": documents(21), "return_state": True}
    exact = model(ids, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, **arguments)
    assert all(value.dtype == torch.float32 for value in out.values())
    torch.testing.assert_close(out["loss"], exact["loss"], rtol=0.03, atol=0)
    model.bfloat16()
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if ".eigenvalues." in name}
    assert kept >= model.fp32_parameters() and len(kept) == (8 if selective else 4)
    out = model(ids, **arguments)
    assert out["state"].dtype == torch.float32 and out["loss"].isfinite()


def test_an_untrained_selective_model_is_the_fixed_one(tiny_ten, tokens):
    fixed, selective = tiny_ten(), TEN(dataclasses.replace(tiny_ten().config, selective=True)).double()
    selective.load_state_dict(fixed.state_dict(), strict=False)
    for block in selective.blocks:
        assert block.mixer.eigenvalues.selection.weight.std() < 0.01
        torch.nn.init.zeros_(block.mixer.eigenvalues.selection.weight)
    torch.testing.assert_close(selective(tokens(2, 40))["logits"], fixed(tokens(2, 40))["logits"], rtol=1e-6, atol=1e-6)


def test_memory_at_initialisation_is_counted_in_tokens_at_every_scale():
    torch.manual_seed(0)
    scales = (1, 2, 4, 8)
    config = TENConfig(8, 8, 1, 256, 4, 8, max_seq_len=1024, hten_scales=scales)
    log_rho, omega, _ = TEN(config).blocks[0].mixer.eigenvalues()
    for scale, group, turns in zip(scales, log_rho.split(64), omega.split(64), strict=True):
        tau = -scale / group  # one head's, which the strata fill evenly
        assert scale <= tau.min() < 1.2 * scale and 850 < tau.max() <= 1024
        assert turns.min() >= 0 and turns.max() <= math.pi


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hten_scales": (1, 0)}, "whole numbers of at least 1"),
        ({"hten_scales": ()}, "one or more whole numbers"),
        ({"hten_scales": (1, 2.5)}, "whole numbers"),
        ({"hten_scales": (1, 2, 2)}, "differ"),
        ({"hten_scales": (1, 2, 4), "num_eigenstates": 2, "num_heads": 1}, "more than the num_eigenstates 2"),
        ({"hten_mode": "interpolate"}, "polyphase, hold"),
        ({"selective": True, "parameterization": "sigmoid"}, "selective needs parameterization exponential"),
    ],
)
def test_config_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        TENConfig(**changes)
    assert TENConfig(hten_scales=[4, 1]).hten_scales == (4, 1)


# --- what selection is for ---


def parity_accuracy(selective: bool, steps: int = 300, time: int = 32) -> float:
    """Train one layer to say whether it has read an odd number of ones; how often it is right at the end of a row."""
    torch.manual_seed(0)
    config = TENConfig(2, 32, 1, 16, 4, 64, max_seq_len=time, selective=selective, energy_reg_weight=0.0)
    model = TEN(config)
    slow = [p for name, p in model.named_parameters() if name in model.fp32_parameters()]
    fast = [p for name, p in model.named_parameters() if name not in model.fp32_parameters()]
    optimizer = torch.optim.Adam([{"params": fast}, {"params": slow, "lr": 1e-3}], lr=1e-2, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, 5 - 5 * step / steps)
    )
    for _ in range(steps):
        bits = torch.randint(2, (32, time))
        optimizer.zero_grad()
        model(bits, labels=bits.cumsum(1) % 2)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    bits = torch.randint(2, (256, time))
    with torch.no_grad():
        return (model(bits)["logits"][:, -1].argmax(-1) == bits.sum(1) % 2).float().mean().item()


@pytest.mark.slow
def test_only_selective_eigenvalues_track_parity():
    assert parity_accuracy(selective=True) > 0.95
    assert parity_accuracy(selective=False) < 0.65
