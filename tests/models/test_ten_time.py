"""TEN over time: causality, carried state, resets, energy bound, memory, generation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import eigen_scan
from models.ten import TEN, TENConfig

PREFIXES = (1, 3, 7, 15, 31, 32, 63)


class PoolAndRepeat(nn.Module):
    """Gives every position the mean of its whole block of four: the leak of the original multi-scale model."""

    def forward(self, x):
        return x + x.unflatten(1, (-1, 4)).mean(dim=2).repeat_interleave(4, dim=1)


def leak(model: TEN, ids: torch.Tensor) -> float:
    """The most that any logit of a prefix moves when every token after the prefix is replaced."""
    logits, moved = model(ids)["logits"], 0.0
    for prefix in PREFIXES:
        changed = ids.clone()
        changed[:, prefix:] = (changed[:, prefix:] + 7) % model.config.vocab_size
        moved = max(moved, (model(changed)["logits"] - logits)[:, :prefix].abs().max().item())
    return moved


# --- causality ---


@pytest.mark.parametrize("parameterization", ["exponential", "sigmoid"])
def test_suffix_cannot_reach_the_prefix(tiny_ten, tokens, parameterization):
    assert leak(tiny_ten(parameterization=parameterization), tokens(2, 64)) < 1e-12


def test_a_leaking_model_is_caught(tiny_ten, tokens):
    model = tiny_ten()
    model.norm = nn.Sequential(model.norm, PoolAndRepeat())
    assert leak(model, tokens(2, 64)) > 1e-2


def test_jacobian_is_exactly_zero_above_the_diagonal(tiny_ten, tokens):
    model, time = tiny_ten(num_layers=1), 70
    embedded = model.embedding(tokens(1, time)).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded)
    logits = model(tokens(1, time))["logits"]
    direction = torch.randn_like(logits[0, 0])
    for t in range(time):
        (gradient,) = torch.autograd.grad(logits[0, t] @ direction, embedded, retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert (gradient[0, : t + 1].abs().amax(dim=-1) > 0).all(), "the past does reach every position"


# --- state ---


@pytest.mark.parametrize("cut", [1, 29, 64])
def test_a_split_sequence_equals_the_whole(tiny_ten, tokens, cut):
    """Values, and the gradients that flow back through the carried state."""
    model = tiny_ten(energy_reg_weight=0.3)
    ids, labels = tokens(2, 80), tokens(2, 80, seed=1)
    num_items = torch.tensor(labels.numel())
    whole = model(ids, labels=labels, return_state=True)
    first = model(ids[:, :cut], labels=labels[:, :cut], num_items=num_items, return_state=True)
    second = model(
        ids[:, cut:], labels=labels[:, cut:], num_items=num_items, initial_state=first["state"], return_state=True
    )
    loss = first["loss"] + second["loss"]
    torch.testing.assert_close(loss, whole["loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(second["state"], whole["state"], rtol=1e-9, atol=1e-10)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(whole["loss"], parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_prefill_and_steps_equal_the_full_forward(tiny_ten, tokens):
    model, ids = tiny_ten(), tokens(3, 70)
    expected = model(ids)["logits"]
    logits, state = model.prefill(ids[:, :5])
    for t in range(5, 70):
        torch.testing.assert_close(logits, expected[:, t - 1], rtol=1e-9, atol=1e-9)
        logits, state = model.step(ids[:, t], state)
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-9, atol=1e-9)


def test_padding_on_the_right_changes_nothing(tiny_ten, tokens):
    model, ids, labels = tiny_ten(), tokens(2, 20), tokens(2, 20, seed=1)
    padded = F.pad(ids, (0, 13), value=3)
    torch.testing.assert_close(model(padded)["logits"][:, :20], model(ids)["logits"], rtol=1e-10, atol=1e-10)
    losses, expected = model(padded, labels=F.pad(labels, (0, 13), value=-100)), model(ids, labels=labels)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-10, atol=0)


def test_gradients_through_state_eigenvalues_and_energy(tiny_ten, tokens):
    model = tiny_ten(vocab_size=31, d_model=4, num_layers=2, num_eigenstates=2, num_heads=1, d_ff=4)
    ids, labels = tokens(1, 4), tokens(1, 4, seed=1)
    reset = torch.tensor([[False, False, True, False]])
    names = ["blocks.0.mixer.eigenvalues.nu", "blocks.0.mixer.eigenvalues.omega", "blocks.0.mixer.resonance"]
    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    state = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)

    def outputs(state, *values):
        arguments = {"labels": labels, "initial_state": state, "reset": reset, "return_state": True}
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids,), arguments)
        return out["loss"], out["state"]

    assert torch.autograd.gradcheck(outputs, (state, *values))


# --- documents packed into one row ---


def test_packed_documents_equal_separate_ones(tiny_ten, tokens):
    model, ids = tiny_ten(), tokens(1, 90)
    starts = [0, 1, 23, 66, 90]
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[:, starts[:-1]] = True
    stale = torch.randn(2, 1, 16, dtype=torch.float64)
    packed = model(ids, reset=reset, initial_state=stale)["logits"]
    separate = torch.cat([model(ids[:, a:b])["logits"] for a, b in itertools.pairwise(starts)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-10)

    changed = ids.clone()
    changed[:, :23] = (changed[:, :23] + 7) % 31
    assert torch.equal(model(changed, reset=reset)["logits"][:, 23:], packed[:, 23:]), "not one bit crosses over"
    assert (model(ids)["logits"] - separate)[:, 23:].abs().max() > 1e-3, "without resets they do differ"


# --- energy ---


def energy_and_inputs(model: TEN, x: torch.Tensor, start: torch.Tensor):
    """sqrt(E_t) [B, T] of the first layer's own states, ‖beta_t‖ [B, T], and its largest rho."""
    mixer = model.blocks[0].mixer
    log_rho, omega, gamma = mixer.eigenvalues()
    beta = mixer.in_proj(x, gamma.repeat(2))
    states = eigen_scan(beta, log_rho, omega, initial_state=start).states
    return states.norm(dim=-1), beta.norm(dim=-1), log_rho.exp().max()


@torch.no_grad()
def test_energy_stays_below_its_bound(tiny_ten, tokens):
    """Minkowski: sqrt(E_t) <= rho^(t+1) sqrt(E_start) + sum_s rho^(t-s) ‖beta_s‖ with the largest rho of the layer."""
    model = tiny_ten()
    x = model.embedding(tokens(3, 100))
    x[0] = x[0, :1]  # one token for ever: its pushes line up wherever omega is small
    start = torch.randn(3, 16, dtype=torch.float64)
    roots, inputs, rho = energy_and_inputs(model, x, start)
    bound = start.norm(dim=-1)
    for t in range(100):
        bound = rho * bound + inputs[:, t]
        assert (roots[:, t] <= bound * (1 + 1e-12)).all()
    assert (roots / bound[:, None]).max() > 0.1, "the bound is of the right size"


@torch.no_grad()
def test_energy_linear_in_time_is_not_a_bound(tiny_ten, tokens):
    """E_t <= E_0 + t B², as the original states it, fails for a state that hardly decays or turns."""
    model = tiny_ten()
    eigenvalues = model.blocks[0].mixer.eigenvalues
    eigenvalues.nu.fill_(-12.0)
    eigenvalues.omega.zero_()
    x = model.embedding(tokens(1, 1)).expand(1, 100, -1)
    roots, inputs, _ = energy_and_inputs(model, x, torch.zeros(1, 16, dtype=torch.float64))
    assert roots[0, -1] ** 2 > 50 * 100 * inputs.max() ** 2


# --- memory ---


@torch.no_grad()
def test_only_the_exponential_parameterization_remembers_long():
    def memory(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        eigenvalues = (
            TEN(TENConfig(8, 8, 1, 64, 1, 8, max_seq_len=4096, parameterization=name)).blocks[0].mixer.eigenvalues
        )
        if name == "sigmoid":
            eigenvalues.nu.fill_(1e4)  # nothing it could learn goes further
        return -1.0 / eigenvalues()[0]

    assert memory("sigmoid").max() <= 99.5
    assert memory("exponential").max() > 2048
    assert memory("exponential").min() < 2


def longest_recall(parameterization: str, goal: int, steps: int) -> int:
    """Train one layer to name the first token at the end, on longer rows whenever it can; the longest that it could."""
    torch.manual_seed(0)
    symbols, time, solved = 4, 64, 0
    model = TEN(TENConfig(symbols + 1, 32, 1, 32, 4, 64, max_seq_len=4 * goal, parameterization=parameterization))
    # A step of δ in ω turns the far end of a row by T δ, so the eigenvalues have to learn more slowly.
    slow = [p for name, p in model.named_parameters() if name in model.fp32_parameters()]
    fast = [p for name, p in model.named_parameters() if name not in model.fp32_parameters()]
    optimizer = torch.optim.Adam([{"params": fast}, {"params": slow, "lr": 3e-4}], lr=3e-3)
    for _ in range(steps):
        ids = torch.full((symbols, time), symbols)
        ids[:, 0] = torch.arange(symbols)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, 0]
        out = model(ids, labels=labels)
        if out["ce_loss"] < 0.05:
            solved = time
            if solved == goal:
                break
            time = min(goal, time * 3 // 2)
            continue
        optimizer.zero_grad()
        out["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return solved


@pytest.mark.slow
def test_the_first_of_4096_tokens_can_be_recalled():
    assert longest_recall("exponential", goal=4096, steps=600) == 4096
    assert longest_recall("sigmoid", goal=4096, steps=600) < 100


# --- generation ---


def test_greedy_generation_follows_the_full_forward(tiny_ten, tokens):
    model, ids = tiny_ten(), tokens(2, 6)
    generated = model.generate(ids, max_new_tokens=12, temperature=0.0)
    assert torch.equal(generated[:, :6], ids) and generated.shape == (2, 18)
    for _ in range(12):
        ids = torch.cat([ids, model(ids)["logits"][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_sampling_repeats_with_its_generator(tiny_ten, tokens):
    model, ids = tiny_ten(), tokens(2, 6)

    def draw(seed: int) -> torch.Tensor:
        return model.generate(ids, 20, top_k=20, top_p=0.95, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_finished_row_repeats_its_end(tiny_ten, tokens):
    model, ids = tiny_ten(), tokens(2, 6)
    free = model.generate(ids, 12, temperature=0.0)[:, 6:]
    eos = free[0, 2].item()
    ended = model.generate(ids, 12, temperature=0.0, eos_id=eos)[:, 6:]
    for row, expected in zip(ended, free, strict=True):
        end = (expected == eos).nonzero()
        stop = end[0, 0].item() if len(end) else len(expected)
        assert torch.equal(row[:stop], expected[: min(stop, len(row))])
        assert (row[stop:] == eos).all()
    alone = model.generate(ids[:1], 12, temperature=0.0, eos_id=eos)
    assert alone[0, -1] == eos and alone.shape[1] < 18, "generation stops when every row has ended"


def test_generation_names_bad_arguments(tiny_ten, tokens):
    with pytest.raises(ValueError, match=r"temperature.*top_k.*top_p"):
        tiny_ten().generate(tokens(1, 3), 4, temperature=-1.0, top_k=0, top_p=1.5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        tiny_ten().generate(tokens(1, 3), 0)
    with pytest.raises(ValueError, match="temperature"):
        tiny_ten().generate(tokens(1, 3), 4, temperature=math.nan)
