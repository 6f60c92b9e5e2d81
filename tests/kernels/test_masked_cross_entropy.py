from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kernels import (
    masked_cross_entropy,
    masked_cross_entropy_reference,
    masked_log_softmax,
    masked_log_softmax_reference,
)

op_file = sys.modules["kernels.masked_cross_entropy"]


def problem(*shape, dtype=torch.float64, seed=0):
    """Logits, a mask with an empty row, and targets: ignored, invalid and valid ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    valid = torch.rand(shape, generator=generator) < 0.6
    valid.view(-1, shape[-1])[0] = False
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    target.view(-1)[1::5] = -100
    return logits.requires_grad_(), valid, target


def by_hand(logits, valid, target, smoothing):
    """Loss of each row from the formula, in Python floats."""
    losses = []
    for x, mask, y in zip(logits.tolist(), valid.tolist(), target.tolist(), strict=True):
        if y == -100 or not mask[y]:
            losses.append(0.0)
            continue
        allowed = [value for value, ok in zip(x, mask, strict=True) if ok]
        lse = math.log(sum(math.exp(value) for value in allowed))
        losses.append(lse - (1 - smoothing) * x[y] - smoothing * sum(allowed) / len(allowed))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("op", [masked_cross_entropy, masked_cross_entropy_reference])
def test_rows_equal_the_formula(op, smoothing):
    logits, valid, target = problem(40, 7)
    losses = op(logits, valid, target, label_smoothing=smoothing, reduction="none")
    assert_close(losses, by_hand(logits, valid, target, smoothing))


@pytest.mark.parametrize("shape", [(1, 1), (17, 4), (3, 5, 33), (2, 257)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_equal_the_reference(monkeypatch, shape, smoothing):
    monkeypatch.setattr(op_file, "CHUNK_ELEMENTS", 64)  # several chunks, the last one short
    logits, valid, target = problem(*shape)
    weight = torch.rand(shape[:-1], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape[:-1], dtype=torch.float64)
    results = []
    for op in (masked_cross_entropy, masked_cross_entropy_reference):
        losses = op(logits, valid, target, label_smoothing=smoothing, weight=weight, reduction="none")
        results.append((losses, *torch.autograd.grad((losses * upstream).sum(), (logits, weight))))
    assert_close(*results)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax_equals_the_reference_along_any_dim(monkeypatch, dim):
    monkeypatch.setattr(op_file, "CHUNK_ELEMENTS", 20)
    logits, valid, _ = problem(5, 6, 7)
    valid.movedim(dim, -1)[0, 0] = False
    upstream = torch.randn(5, 6, 7, dtype=torch.float64)
    results = []
    for op in (masked_log_softmax, masked_log_softmax_reference):
        log_probs = op(logits, valid, dim=dim)
        results.append((log_probs, *torch.autograd.grad(log_probs, logits, upstream)))
    assert_close(*results)
    log_probs, gradient = results[0]
    assert (log_probs[~valid] == -math.inf).all() and (gradient[~valid] == 0).all()


def test_smoothing_mass_stays_on_valid_classes():
    """The usual recipe, -1e4 in the invalid slots and smoothing over all classes, pays 0.1 * 2 / 4 * 1e4 here."""
    logits, target = torch.zeros(1, 4), torch.tensor([0])
    valid = torch.tensor([[True, True, False, False]])
    assert_close(masked_cross_entropy(logits, valid, target, label_smoothing=0.1), torch.tensor(math.log(2)))
    assert F.cross_entropy(logits.masked_fill(~valid, -1e4), target, label_smoothing=0.1) > 400


def test_gradcheck():
    logits, valid, target = problem(6, 5)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    loss = lambda x, w: masked_cross_entropy(x, valid, target, label_smoothing=0.1, weight=w)
    assert torch.autograd.gradcheck(loss, (logits, weight))
    assert torch.autograd.gradcheck(lambda x: masked_log_softmax(x, valid).masked_fill(~valid, 0), (logits,))


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
def test_invalid_slots_and_uncounted_rows_never_show(content):
    clean, valid, target = problem(30, 6)
    counted = (target != -100) & valid.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    hidden = ~(valid & counted.unsqueeze(1))
    dirty = clean.detach().masked_fill(hidden, content).requires_grad_()
    weight = torch.rand(30).masked_fill(~counted, math.nan)
    for op in (masked_cross_entropy, masked_cross_entropy_reference):
        results = []
        for logits in (clean, dirty):
            loss = op(logits, valid, target, label_smoothing=0.1, weight=weight)
            results.append((loss, *torch.autograd.grad(loss, logits)))
        assert_close(*results)
        assert (results[1][1][hidden] == 0).all()
    dirty = clean.detach().masked_fill(~valid, content).requires_grad_()
    log_probs = masked_log_softmax(dirty, valid)
    assert_close(log_probs, masked_log_softmax(clean, valid))
    (gradient,) = torch.autograd.grad(log_probs, dirty, torch.ones_like(log_probs))
    assert gradient.isfinite().all() and (gradient[~valid] == 0).all()


@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_a_valid_slot_that_is_not_finite_shows_in_its_row_alone(content):
    logits = torch.zeros(2, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(content)).requires_grad_()
    losses = masked_cross_entropy(logits, torch.tensor(True), torch.tensor([0, 0]), reduction="none")
    assert losses[0].isfinite() and losses[1].isnan()
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[0].isfinite().all() and gradient[1].isnan().all()
    assert masked_log_softmax(logits, torch.tensor(True))[1].isnan().all()


def test_a_valid_minus_inf_has_probability_zero():
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    loss = masked_cross_entropy(logits, torch.tensor([[True, True, True]]), torch.tensor([0]))
    assert_close(loss, F.cross_entropy(logits, torch.tensor([0])))
    assert torch.autograd.grad(loss, logits)[0][0, 1] == 0


def test_nothing_to_count_gives_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    for valid, target in (
        (torch.tensor(False), torch.tensor([0, 1, 2])),
        (torch.tensor(True), torch.full((3,), -100)),
        (torch.tensor([[False, True, True, True]]), torch.zeros(3, dtype=torch.int64)),
    ):
        loss = masked_cross_entropy(logits, valid, target, label_smoothing=0.1)
        assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = masked_cross_entropy(empty, torch.tensor(True), torch.zeros(0, dtype=torch.int64))
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 4)
    assert masked_log_softmax(empty, torch.tensor(True)).shape == (0, 4)


def test_reductions_and_num_items():
    logits, valid, target = problem(20, 5)
    rows = masked_cross_entropy(logits, valid, target, reduction="none")
    counted = (target != -100) & valid.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    assert 0 < counted.sum() < 20
    assert_close(masked_cross_entropy(logits, valid, target, reduction="sum"), rows.sum())
    assert_close(masked_cross_entropy(logits, valid, target), rows.sum() / counted.sum())
    for num_items in (7, torch.tensor(7), torch.tensor(7, dtype=torch.int32)):
        assert_close(masked_cross_entropy(logits, valid, target, num_items=num_items), rows.sum() / 7)
    halves = [
        masked_cross_entropy(*(t[s] for t in (logits, valid, target)), num_items=counted.sum())
        for s in (slice(7), slice(7, 20))
    ]
    assert_close(sum(halves), masked_cross_entropy(logits, valid, target))


def test_layouts_broadcast_masks_and_index_types():
    logits, _, target = problem(4, 6, 5)
    valid = torch.rand(4, 1, 5) < 0.7
    expected = masked_cross_entropy(logits, valid.expand(4, 6, 5).clone(), target)
    strided = logits.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    loss = masked_cross_entropy(strided, valid, target.int())
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, strided), torch.autograd.grad(expected, logits))
    one = masked_cross_entropy(logits[0, 0], torch.tensor(True), torch.tensor(2))
    assert_close(one, F.cross_entropy(logits[0, 0], torch.tensor(2)))
    assert_close(masked_log_softmax(logits[0, 0], torch.tensor(True)), torch.log_softmax(logits[0, 0], -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_same_dtype_recipe(dtype):
    """|gold - ours| <= |gold - naive| + eps, the rule of Cut Cross-Entropy's tests."""
    logits, valid, target = problem(64, 19, dtype=dtype)
    valid[torch.arange(64), target.clamp(min=0)] = True
    results = []
    for op, x in (
        (masked_cross_entropy_reference, logits.detach().double().requires_grad_()),
        (masked_cross_entropy_reference, logits),
        (masked_cross_entropy, logits),
    ):
        loss = op(x, valid, target, label_smoothing=0.1, reduction="sum")
        results.append((loss.double(), torch.autograd.grad(loss, x)[0].double()))
        if op is masked_cross_entropy:
            assert loss.dtype == torch.float32
    for gold, naive, ours in zip(*results, strict=True):
        assert (gold - ours).abs().max() <= (gold - naive).abs().max() + 1e-6
    assert_close(results[2][0], results[0][0], rtol=1e-6, atol=0)


def test_autocast_takes_log_softmax_to_fp32_and_leaves_the_loss_exact():
    logits, valid, target = problem(8, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_log_softmax(logits, valid).dtype == torch.float32
        inside = masked_cross_entropy(logits, valid, target)
    assert_close(inside, masked_cross_entropy(logits, valid, target), rtol=0, atol=0)


def test_compiles_without_a_graph_break():
    logits, valid, target = problem(6, 5, dtype=torch.float32)

    def loss(x):
        log_probs = masked_log_softmax(x, valid).masked_fill(~valid, 0)
        return log_probs.sum() + masked_cross_entropy(x, valid, target, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(loss(logits), logits))


def test_opcheck():
    logits, valid, target = problem(6, 5, dtype=torch.float32)
    torch.library.opcheck(torch.ops.tenfold.masked_cross_entropy.default, (logits, valid, target, 0.1, -100))
    torch.library.opcheck(torch.ops.tenfold.masked_log_softmax.default, (logits, valid))


def test_bad_input_is_a_sentence():
    logits, valid, target = problem(6, 5)
    for error, message, arguments, options in (
        (TypeError, "logits must be floating point", (logits.long(), valid, target), {}),
        (TypeError, "valid must be bool", (logits, valid.long(), target), {}),
        (TypeError, "target must hold integers", (logits, valid, target.float()), {}),
        (TypeError, "0-d integer tensor", (logits, valid, target), {"num_items": torch.tensor(2.0)}),
        (ValueError, "does not broadcast", (logits, valid[:, :4], target), {}),
        (ValueError, "no classes", (logits[:, :0], valid[:, :0], target), {}),
        (ValueError, "without C", (logits, valid, target[:3]), {}),
        (ValueError, r"in \[0, 1\]", (logits, valid, target), {"label_smoothing": 1.5}),
        (ValueError, "use 'mean'", (logits, valid, target), {"reduction": "average"}),
        (ValueError, "cannot be negative", (logits, valid, target), {"num_items": -1}),
        (RuntimeError, "out of bounds", (logits, valid, target.clamp(min=5)), {}),
    ):
        with pytest.raises(error, match=message):
            masked_cross_entropy(*arguments, **options)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (gradient,) = torch.autograd.grad(masked_cross_entropy(logits, valid, target), logits, create_graph=True)
        gradient.sum().backward()
