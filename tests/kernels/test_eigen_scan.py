from __future__ import annotations

import math

import pytest
import torch

from kernels import chunked_scan
from kernels.eigen_scan import eigen_scan, eigen_scan_reference

B, K = 2, 3


def make_inputs(length, *, num_states=K, per_position=False, full=False, seed=0, dtype=torch.float64):
    """Leaves and options of one call; full adds an initial state, resets and an energy mask."""
    g = torch.Generator().manual_seed(seed)
    decay_shape = (B, length, num_states) if per_position else (num_states,)
    leaves = {
        "beta": torch.randn(B, length, 2 * num_states, generator=g, dtype=torch.float64),
        "log_rho": -0.1 * torch.rand(decay_shape, generator=g, dtype=torch.float64),
        "omega": math.pi * torch.rand(decay_shape, generator=g, dtype=torch.float64),
    }
    options = {}
    if full:
        leaves["initial_state"] = torch.randn(B, 2 * num_states, generator=g, dtype=torch.float64)
        options["reset"] = torch.rand(B, length, generator=g) < 0.05
        options["energy_mask"] = torch.rand(B, length, generator=g) < 0.7
    return {name: x.to(dtype) for name, x in leaves.items()}, options


def run(op, leaves, options=None, dtype=None):
    """Every output and every leaf's gradient under one random upstream gradient, by name."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    out = op(**leaves, **(options or {}), with_energy=True)
    g = torch.Generator().manual_seed(99)
    upstream = [torch.randn(y.shape, generator=g).bfloat16().to(y.dtype) for y in out]  # the same in every dtype
    grads = torch.autograd.grad(list(out), list(leaves.values()), upstream)
    return {**out._asdict(), **{f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_close(ours, gold, tolerance):
    for name, truth in gold.items():
        error = (ours[name].double() - truth).norm() / truth.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def fft_oracle(beta, log_rho, omega):
    """The same states as a causal convolution with lambda^n, zero-padded so that nothing wraps around."""
    length, n = beta.shape[1], torch.arange(beta.shape[1], dtype=torch.float64)[:, None]
    u = torch.complex(*beta.double().chunk(2, -1))
    kernel = torch.exp(n * torch.complex(log_rho.double(), omega.double()))
    spectrum = torch.fft.fft(u, n=2 * length, dim=1) * torch.fft.fft(kernel, n=2 * length, dim=0)
    c = torch.fft.ifft(spectrum, dim=1)[:, :length]
    return torch.cat([c.real, c.imag], -1)


# ---- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("per_position", [False, True], ids=["K", "BTK"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 15, 16, 63, 64, 65, 129, 300])
def test_matches_the_float64_reference(length, per_position, full):
    leaves, options = make_inputs(length, per_position=per_position, full=full, dtype=torch.float32)
    gold = run(eigen_scan_reference, leaves, options, torch.float64)
    assert_close(run(eigen_scan, leaves, options, torch.float64), gold, 1e-12)
    assert_close(run(eigen_scan, leaves, options), gold, 1e-5)


@pytest.mark.parametrize("per_position", [False, True], ids=["K", "BTK"])
def test_gradcheck(per_position):
    leaves, options = make_inputs(7, num_states=2, per_position=per_position, full=True)
    options["reset"][0, 3] = True

    def scan(*tensors):
        return tuple(eigen_scan(**dict(zip(leaves, tensors, strict=True)), **options, with_energy=True))

    assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in leaves.values()])


def test_one_decay_may_vary_over_positions_and_the_other_not():
    leaves, options = make_inputs(9, per_position=True, full=True)
    leaves["omega"] = leaves["omega"][0, 0]
    assert_close(run(eigen_scan, leaves, options), run(eigen_scan_reference, leaves, options), 1e-12)


@pytest.mark.parametrize("output", ["states", "final_state", "energy"])
def test_gradients_through_one_output_only(output):
    leaves, options = make_inputs(21, full=True)
    grads = []
    for op in (eigen_scan, eigen_scan_reference):
        inputs = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        y = getattr(op(**inputs, **options, with_energy=True), output)
        grads.append(torch.autograd.grad(y.square().sum(), list(inputs.values())))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_long_memory_agrees_with_the_fft_oracle():
    # At |lambda| ~ 1 and T far beyond one chunk, a carry that is one step off cannot hide.
    leaves, _ = make_inputs(3000)
    leaves["log_rho"] = torch.tensor([-1e-5, -1e-4, -1e-3], dtype=torch.float64)
    gold = fft_oracle(**leaves)
    assert (eigen_scan(**leaves).states - gold).norm() / gold.norm() < 1e-11
    single = {name: x.float() for name, x in leaves.items()}
    gold = fft_oracle(**single)
    assert (eigen_scan(**single).states - gold).norm() / gold.norm() < 5e-5


@pytest.mark.parametrize("chunks", ["root", "one"])
@pytest.mark.parametrize("length", [65536, 65537])
def test_tens_of_thousands_of_positions(length, chunks, monkeypatch):
    monkeypatch.setattr(chunked_scan, "STEP_SIZE", 2**15 if chunks == "root" else 1)
    leaves, _ = make_inputs(length, num_states=1)
    leaves["beta"], leaves["log_rho"] = leaves["beta"][:1], torch.tensor([-1e-4], dtype=torch.float64)
    gold = fft_oracle(**leaves)
    assert (eigen_scan(**leaves).states - gold).norm() / gold.norm() < 1e-10
    single = {name: x.float() for name, x in leaves.items()}
    gold = fft_oracle(**single)
    assert (eigen_scan(**single).states - gold).norm() / gold.norm() < 5e-5 * (1 if chunks == "root" else 20)


@pytest.mark.parametrize("split", [1, 8, 63, 64, 65, 99])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_split_anywhere_and_carry_the_state(split, full):
    leaves, options = make_inputs(100, full=full)
    whole = eigen_scan(**leaves, **options, with_energy=True)
    beta, state, parts = leaves.pop("beta"), leaves.pop("initial_state", None), []
    for piece in (slice(0, split), slice(split, None)):
        cut = {name: mask[:, piece] for name, mask in options.items()}
        parts.append(eigen_scan(beta[:, piece], **leaves, initial_state=state, with_energy=True, **cut))
        state = parts[-1].final_state
    torch.testing.assert_close(torch.cat([p.states for p in parts], 1), whole.states, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, whole.final_state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[0].energy + parts[1].energy, whole.energy, rtol=1e-12, atol=1e-12)


# ---- the edges of lambda, and Theorem 1 ------------------------------------------------------------------------------


def test_lambda_of_exactly_one_counts():
    out = eigen_scan(torch.ones(1, 1000, 2), torch.zeros(1), torch.zeros(1))
    assert torch.equal(out.states[0], torch.arange(1.0, 1001.0)[:, None].expand(-1, 2))


@pytest.mark.parametrize("log_rho", [-math.inf, -1e30])
def test_lambda_of_zero_forgets_everything_and_stays_finite(log_rho):
    leaves, _ = make_inputs(20, full=True)
    leaves["log_rho"] = torch.full((K,), log_rho, dtype=torch.float64)
    out = run(eigen_scan, leaves)
    assert torch.equal(out["states"], leaves["beta"])
    assert not out["d log_rho"].any() and not out["d omega"].any() and not out["d initial_state"].any()
    assert out["d beta"].isfinite().all()


def energy_over_time(states):
    return states.double().square().sum(-1)  # [B, T]


def energy_bound(beta, rho, initial_state):
    """rho^(t+1) sqrt(E_-1) + sum_{s <= t} rho^(t-s) ||beta_s||, for sqrt(E_t): Minkowski, step by step."""
    bound, bounds = initial_state.norm(dim=-1), []
    for norm in beta.norm(dim=-1).unbind(1):
        bound = rho * bound + norm
        bounds.append(bound)
    return torch.stack(bounds, 1)


@pytest.mark.parametrize("adversarial", [False, True], ids=["random", "phase-aligned"])
def test_energy_stays_below_its_bound(adversarial):
    leaves, _ = make_inputs(200, full=True)
    rho = 0.97
    leaves["log_rho"] = torch.full((K,), math.log(rho), dtype=torch.float64)
    if adversarial:  # beta turns with the state, so every step adds in phase: nothing can grow faster
        phase = torch.arange(200, dtype=torch.float64)[:, None] * leaves["omega"]
        leaves["beta"] = torch.cat([phase.cos(), phase.sin()], -1).expand(B, -1, -1)
        leaves["initial_state"] = torch.cat([leaves["omega"].cos(), -leaves["omega"].sin()]).expand(B, -1)
    out = eigen_scan(**leaves)
    ratio = energy_over_time(out.states).sqrt() / energy_bound(leaves["beta"], rho, leaves["initial_state"])
    assert ratio.max() <= 1 + 1e-12
    assert (ratio.min() > 1 - 1e-12) == adversarial  # the bound is sharp


def test_energy_may_exceed_the_linear_bound_that_is_sometimes_claimed():
    # E_t <= E_0 + t B^2 holds on average for uncorrelated beta; constant beta at lambda = 1 breaks it.
    energy = energy_over_time(eigen_scan(torch.ones(1, 50, 2), torch.zeros(1), torch.zeros(1)).states)[0]
    linear = energy[0] + torch.arange(50) * 2.0
    assert (energy[1:] > linear[1:]).all()


# ---- bad values, layouts, dtypes -------------------------------------------------------------------------------------


def test_nan_stays_in_its_channel_and_its_document():
    leaves, _ = make_inputs(100)
    reset = torch.zeros(B, 100, dtype=torch.bool)
    reset[0, 80] = True
    leaves["beta"][0, 37, 1] = math.nan
    broken = eigen_scan(**leaves, reset=reset).states.isnan()
    expected = torch.zeros_like(broken)
    expected[0, 37, 1] = True  # its own plane at first, then rotation mixes both
    expected[0, 38:80, [1, 1 + K]] = True
    assert torch.equal(broken, expected)


@pytest.mark.parametrize("per_position", [False, True], ids=["K", "BTK"])
def test_nan_before_a_reset_reaches_no_gradient(per_position):
    leaves, _ = make_inputs(30, per_position=per_position)
    leaves["beta"][0, 11, 1] = math.nan
    reset, counted = torch.zeros(B, 30, dtype=torch.bool), torch.ones(B, 30, dtype=torch.bool)
    reset[0, 12], counted[0, 11] = True, False
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    out = eigen_scan(**leaves, reset=reset, with_energy=True, energy_mask=counted)
    masked = torch.where(counted[..., None], out.states, 0)
    grads = torch.autograd.grad(out.energy.sum() + masked.sum(), list(leaves.values()))
    assert out.energy.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_a_reset_cuts_the_past_exactly():
    leaves, _ = make_inputs(90, full=True)
    for t in (0, 1, 8, 63, 64, 89):
        reset = torch.zeros(B, 90, dtype=torch.bool)
        reset[:, t] = True
        fresh = eigen_scan(leaves["beta"][:, t:], leaves["log_rho"], leaves["omega"]).states
        states = eigen_scan(**leaves, reset=reset).states
        torch.testing.assert_close(states[:, t:], fresh, rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter():
    leaves, options = make_inputs(70, full=True)
    gold = run(eigen_scan, leaves, options)
    leaves["beta"] = leaves["beta"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    leaves["initial_state"] = leaves["initial_state"].repeat_interleave(2, 1)[:, ::2]
    assert not leaves["beta"].is_contiguous()
    assert_close(run(eigen_scan, leaves, options), gold, 1e-14)


def test_bf16_beta_is_no_worse_than_rounding_the_whole_recurrence():
    leaves, options = make_inputs(200, full=True, dtype=torch.float32)
    leaves["beta"] = leaves["beta"].bfloat16()
    gold = run(eigen_scan_reference, leaves, options, torch.float64)
    naive = run(eigen_scan_reference, leaves, options, torch.bfloat16)
    ours = run(eigen_scan, leaves, options)
    assert ours["states"].dtype == ours["d beta"].dtype == torch.bfloat16
    for name in ("final_state", "energy", "d log_rho", "d omega", "d initial_state"):
        assert ours[name].dtype == torch.float32
    for name, truth in gold.items():
        error, allowed = ((x[name].double() - truth).norm() / truth.norm() for x in (ours, naive))
        assert error <= allowed + 1e-6, name
        assert error < 1e-2, name


def test_autocast_leaves_state_and_phase_alone():
    leaves, options = make_inputs(50, full=True, dtype=torch.float32)
    gold = run(eigen_scan, leaves, options)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(eigen_scan, leaves, options)
    for name in gold:
        assert torch.equal(ours[name], gold[name]), name


def test_empty_time_returns_the_initial_state():
    leaves, _ = make_inputs(0, full=True)
    out = eigen_scan(**leaves, with_energy=True)
    assert out.states.shape == (B, 0, 2 * K) and torch.equal(out.final_state, leaves["initial_state"])
    assert torch.equal(out.energy, torch.zeros(B, dtype=torch.float64))
    leaves.pop("initial_state")
    assert not eigen_scan(**leaves).final_state.any()


# ---- a well-behaved op -----------------------------------------------------------------------------------------------


def test_the_same_bits_every_time():
    leaves, options = make_inputs(130, num_states=16, full=True, dtype=torch.float32)
    first, second = run(eigen_scan, leaves, options), run(eigen_scan, leaves, options)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_outputs_are_tensors_of_their_own():
    leaves, _ = make_inputs(1, full=True)
    out = eigen_scan(**leaves)
    states = out.states.clone()
    out.final_state.zero_()
    assert torch.equal(out.states, states) and out.energy is None


def test_backward_twice_and_for_a_subset():
    leaves, _ = make_inputs(30)
    beta = leaves.pop("beta").requires_grad_()
    loss = eigen_scan(beta, **leaves).states.square().sum()
    (first,) = torch.autograd.grad(loss, beta, retain_graph=True)
    (second,) = torch.autograd.grad(loss, beta, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="eigen_scan_bwd"):
        second.sum().backward()


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("per_position", [False, True], ids=["K", "BTK"])
def test_opcheck(per_position, full):
    leaves, options = make_inputs(11, per_position=per_position, full=full, dtype=torch.float32)
    args = [x.requires_grad_() for x in leaves.values()] + [None] * (4 - len(leaves))
    args += [options.get("reset"), options.get("energy_mask"), full]
    torch.library.opcheck(torch.ops.tenfold.eigen_scan_fwd.default, args)


def compiled_run(backend):
    leaves, options = make_inputs(40, full=True, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend=backend)
    def scan(**kwargs):
        return eigen_scan(**kwargs)

    assert_close(run(scan, leaves, options), run(eigen_scan, leaves, options), 1e-6)


def test_no_graph_break_under_compile():
    compiled_run("aot_eager")


@pytest.mark.slow
def test_under_inductor():
    compiled_run("inductor")


def test_the_backend_is_chosen_at_every_call(monkeypatch):
    leaves, _ = make_inputs(3)
    monkeypatch.setenv("TENFOLD_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="Triton cannot run eigen_scan"):
        eigen_scan(**leaves)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"beta": torch.zeros(2, 5, 7)}, ValueError, r"beta must be \[B, T, 2K\]"),
        ({"beta": torch.zeros(5, 6)}, ValueError, r"beta must be \[B, T, 2K\]"),
        ({"beta": torch.zeros(2, 5, 6, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"log_rho": torch.zeros(4)}, ValueError, r"log_rho must be \[3\] or \[2, 5, 3\]"),
        ({"omega": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, "omega must be float32 or float64"),
        ({"initial_state": torch.zeros(2, 3)}, ValueError, r"initial_state must be \[2, 6\]"),
        ({"reset": torch.zeros(2, 5)}, ValueError, r"reset must be bool \[2, 5\]"),
        ({"energy_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "with_energy=True"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(change, error, sentence):
    good = {"beta": torch.zeros(2, 5, 6), "log_rho": torch.zeros(3), "omega": torch.zeros(3)}
    with pytest.raises(error, match=sentence):
        eigen_scan(**{**good, **change})
