"""TEN as a module: its configuration, initialisation, losses, precision and files."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from models.eigenstates import EigenstateMixer
from models.ten import PRESETS, TEN, TENConfig


def with_ignored(labels: torch.Tensor) -> torch.Tensor:
    labels = labels.clone()
    labels[0, 3:7] = -100
    labels[-1, :1] = -100
    return labels


# --- configuration and size ---


def test_config_reports_every_problem_at_once():
    with pytest.raises(ValueError) as error:
        TENConfig(d_model=0, num_eigenstates=10, num_heads=4, energy_mode="none", energy_reg_weight=-1.0)
    for name in ("d_model", "num_eigenstates", "num_heads", "energy_mode", "energy_reg_weight"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "claimed"),
    [("nano", 33e6), ("micro", 85e6), ("small", 180e6), ("medium", 320e6), ("large", 520e6), ("xlarge", 1.2e9)],
)
def test_preset_has_the_size_it_claims(name, claimed):
    with FakeTensorMode():
        model = TEN(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(claimed, rel=0.02)


def test_meta_model_can_be_filled_later(tokens):
    config = TENConfig(31, 16, 2, 8, 2, 24, 64)
    with torch.device("meta"):
        model = TEN(config)
    model.to_empty(device="cpu").init_weights()
    assert model(tokens(2, 5))["logits"].isfinite().all()


# --- initialisation ---


def test_special_initialisation_survives_the_generic_one():
    torch.manual_seed(0)
    config = TENConfig(vocab_size=64, d_model=64, num_layers=3, num_eigenstates=128, num_heads=4, max_seq_len=512)
    for block in TEN(config).blocks:
        mixer = block.mixer
        assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (mixer.gate.bias == -2).all() and (mixer.skip == 0).all()
        eye = torch.eye(32).expand(4, 32, 32)
        assert (mixer.resonance - eye).std().item() == pytest.approx(0.01 / math.sqrt(32), rel=0.1)
        log_tau = mixer.eigenvalues.nu.neg().view(4, 32)
        strata = (log_tau / math.log(512) * 32).floor().sort(dim=-1).values
        assert torch.equal(strata, torch.arange(32.0).expand(4, 32)), "every head covers 1 … 512 tokens evenly"
        assert (mixer.eigenvalues.omega >= 0).all() and (mixer.eigenvalues.omega <= math.pi).all()


def test_untrained_model_knows_nothing():
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (2, 65))
    losses = TEN(PRESETS["nano"])(ids[:, :-1], labels=ids[:, 1:])
    assert losses["ce_loss"].item() == pytest.approx(math.log(50257), rel=0.02)


def test_spectral_energy_reproduces_the_originals():
    """The original printed 8.2341 and 8.3883; E[ρ²] = 0.0627 at its initialisation gives 128 · 0.0627 = 8.03."""
    torch.manual_seed(0)
    config = TENConfig(64, 32, 16, 128, 4, 8, parameterization="sigmoid", energy_mode="spectral")
    ids = torch.randint(0, 64, (2, 9))
    assert TEN(config)(ids, labels=ids)["energy_loss"].item() == pytest.approx(8.03, rel=0.1)


# --- what a layer computes ---


@torch.no_grad()
def reference_states(mixer: EigenstateMixer, x: torch.Tensor) -> torch.Tensor:
    """c_t = λ c_{t-1} + γ W_in x_t as written, one position after the other: [B, T, D] -> complex [B, T, K]."""
    nu, omega = mixer.eigenvalues.nu, mixer.eigenvalues.omega
    rho = torch.exp(-torch.exp(nu))
    real, imaginary = mixer.in_proj.weight.chunk(2)
    states, c = [], torch.zeros(())
    for x_t in x.unbind(1):
        pushes = torch.sqrt(1 - rho**2) * torch.complex(x_t @ real.T, x_t @ imaginary.T)
        c = torch.polar(rho, omega) * c + pushes
        states.append(c)
    return torch.stack(states, dim=1)


@torch.no_grad()
def test_mixer_computes_its_formulas(tiny_ten):
    mixer = tiny_ten().blocks[0].mixer
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    heads = []
    for head, states in zip(mixer.resonance, reference_states(mixer, x).chunk(2, dim=-1), strict=True):
        coupled = torch.view_as_real(states).transpose(-1, -2) @ head.T  # [B, T, 2, K/H]
        heads.append((coupled / (coupled.square().mean(dim=(-2, -1), keepdim=True) + 1e-6).sqrt()).flatten(2))
    gate = torch.sigmoid(x @ mixer.gate.weight.T + mixer.gate.bias)
    expected = gate * (torch.cat(heads, dim=-1) @ mixer.out_proj.weight.T) + mixer.skip * x
    torch.testing.assert_close(mixer(x, None, None, None)[0], expected, rtol=1e-9, atol=1e-10)


def test_partial_outputs_are_parts_of_the_whole(tiny_ten, tokens):
    model, ids = tiny_ten(), tokens(2, 9)
    logits = model(ids)["logits"]
    hidden = model(ids, skip_output_projection=True)
    torch.testing.assert_close(hidden @ model.embedding.weight.T, logits, rtol=1e-10, atol=1e-10)
    kept = model(ids, logits_to_keep=3)["logits"]
    torch.testing.assert_close(kept, logits[:, -3:], rtol=1e-10, atol=1e-10)


# --- losses ---


@pytest.mark.parametrize("energy_mode", ["state", "spectral"])
def test_loss_is_the_weighted_sum_of_its_parts(tiny_ten, tokens, energy_mode):
    model = tiny_ten(energy_mode=energy_mode, energy_reg_weight=0.3)
    ids, labels = tokens(2, 20), with_ignored(tokens(2, 20, seed=1))
    out = model(ids, labels=labels)
    expected = F.cross_entropy(model(ids)["logits"].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out["ce_loss"], expected.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(out["loss"], out["ce_loss"] + 0.3 * out["energy_loss"], rtol=0, atol=1e-10)
    assert out["energy_loss"] > 0
    assert all(value.ndim == 0 for value in out.values())
    assert not out["ce_loss"].requires_grad and not out["energy_loss"].requires_grad
    assert torch.equal(model.compute_loss(ids, labels, return_dict=False), out["loss"])


def test_state_energy_is_the_mean_over_layers_states_and_counted_positions(tiny_ten, tokens):
    model = tiny_ten()
    ids, labels = tokens(2, 12), with_ignored(tokens(2, 12, seed=1))
    energies = []

    def measure(mixer, args, output):
        states = reference_states(mixer, args[0])
        energies.append(states.abs().square().mean(dim=-1)[labels != -100].mean())

    for block in model.blocks:
        block.mixer.register_forward_hook(measure)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out["energy_loss"], torch.stack(energies).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("energy_mode", ["state", "spectral"])
def test_micro_batches_add_up_to_the_whole(tiny_ten, tokens, energy_mode):
    model = tiny_ten(energy_mode=energy_mode, energy_reg_weight=0.3)
    ids, labels = tokens(4, 10), with_ignored(tokens(4, 10, seed=1))
    num_items = (labels != -100).sum()
    whole = model(ids, labels=labels)
    whole["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = [model(ids[rows], labels=labels[rows], num_items=num_items) for rows in (slice(0, 1), slice(1, 4))]
    for part in parts:
        part["loss"].backward()
    for name in whole:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("energy_mode", ["state", "spectral"])
def test_energy_weight_zero_reports_but_does_not_train(tiny_ten, tokens, energy_mode):
    model = tiny_ten(energy_mode=energy_mode, energy_reg_weight=0.0)
    ids, labels = tokens(2, 10), tokens(2, 10, seed=1)
    out = model(ids, labels=labels)
    assert out["energy_loss"] > 0
    assert torch.equal(out["loss"], out["ce_loss"])
    nu = model.blocks[0].mixer.eigenvalues.nu
    (gradient,) = torch.autograd.grad(out["loss"], nu)
    ce = F.cross_entropy(model(ids)["logits"].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(gradient, torch.autograd.grad(ce, nu)[0], rtol=1e-9, atol=1e-12)


def test_nothing_to_predict_is_a_loss_of_zero(tiny_ten, tokens):
    for num_items in (None, torch.tensor(0)):
        out = tiny_ten()(tokens(2, 6), labels=torch.full((2, 6), -100), num_items=num_items)
        assert [value.item() for value in out.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("energy_mode", ["state", "spectral"])
@pytest.mark.parametrize("parameterization", ["exponential", "sigmoid"])
def test_every_parameter_learns(tiny_ten, tokens, parameterization, energy_mode):
    model = tiny_ten(parameterization=parameterization, energy_mode=energy_mode)
    model(tokens(2, 70), labels=tokens(2, 70, seed=1))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("energy_mode", ["state", "spectral"])
def test_checkpointing_changes_nothing(tiny_ten, tokens, energy_mode):
    model = tiny_ten(energy_mode=energy_mode)
    ids, labels = tokens(2, 20), tokens(2, 20, seed=1)
    runs = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        loss = model(ids, labels=labels)["loss"]
        loss.backward()
        runs.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_a_graph_break(tiny_ten, tokens):
    model, ids, labels = tiny_ten(), tokens(2, 20), tokens(2, 20, seed=1)
    arguments = {"labels": labels, "num_items": torch.tensor(40), "reset": ids == 0, "return_state": True}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(ids, **arguments)
    assert torch.equal(compiled["loss"], model(ids, **arguments)["loss"])


# --- precision ---


def test_eigenvalues_stay_fp32_when_the_model_is_cast(tokens):
    config = TENConfig(31, 16, 2, 8, 2, 24, 64)
    model = TEN(config)
    before = {name: p.clone() for name, p in model.named_parameters() if name in model.fp32_parameters()}
    model.to(torch.bfloat16).half().bfloat16()
    assert len(before) == 2 * config.num_layers
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in before else torch.bfloat16), name
        assert name not in before or torch.equal(parameter, before[name])
    out = model(tokens(2, 9), return_state=True)
    assert out["logits"].dtype == torch.bfloat16 and out["logits"].isfinite().all()
    assert out["state"].dtype == torch.float32


def test_autocast_keeps_states_and_losses_in_fp32(tokens):
    model = TEN(TENConfig(31, 16, 2, 8, 2, 24, 64))
    ids, labels = tokens(2, 20), tokens(2, 20, seed=1)
    exact = model(ids, labels=labels, return_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=labels, return_state=True)
    assert all(value.dtype == torch.float32 for value in out.values())
    out["loss"].backward()
    for name, value in out.items():
        torch.testing.assert_close(value, exact[name], rtol=0.03, atol=0.01)


# --- files ---


def test_save_and_load_give_the_same_logits(tmp_path, tiny_ten, tokens):
    model = tiny_ten(energy_mode="spectral").float()
    model.save_pretrained(tmp_path)
    loaded = TEN.from_pretrained(tmp_path)
    assert loaded.config == model.config and isinstance(loaded.config.hten_scales, tuple)
    assert torch.equal(loaded(tokens(2, 9))["logits"], model(tokens(2, 9))["logits"])
    assert len(load_file(tmp_path / "model.safetensors")) == len(list(model.parameters())), "tied weights saved once"


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "at least one position"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"\[batch, time\]"),
        ({"input_ids": torch.zeros(2, 5)}, TypeError, "integer"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "labels"),
        ({"reset": torch.zeros(2, 5)}, ValueError, "reset must be bool"),
        ({"initial_state": torch.zeros(2, 2, 8)}, ValueError, r"\[2, 2, 16\]"),
        ({"skip_output_projection": True, "return_state": True}, ValueError, "alone"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep"),
    ],
)
def test_bad_input_is_named(tiny_ten, arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_ten()(**{"input_ids": torch.zeros(2, 5, dtype=torch.int64), **arguments})
