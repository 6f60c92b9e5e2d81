from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.testing import assert_close

from kernels import masked_cross_entropy, neighbor_cross_entropy, neighbor_cross_entropy_reference

op_file = sys.modules["kernels.neighbor_cross_entropy"]


def problem(rows=23, d_model=6, classes=17, slots=4, dtype=torch.float64, seed=0):
    """Row 0 has no candidate, row 1 no target, row 2 a target in an empty slot only, row 3 one candidate and target."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, d_model), (classes, d_model), (classes,))
    )
    candidates = torch.rand(rows, classes, generator=generator).argsort(1)[:, :slots]
    candidates.masked_fill_(torch.rand(rows, slots, generator=generator) < 0.2, -1)
    target = torch.rand(rows, slots, generator=generator) < 0.5
    candidates[0] = -1
    target[1] = False
    candidates[2, 0], target[2] = -1, torch.arange(slots) == 0
    candidates[3], target[3] = torch.tensor([5] + [-1] * (slots - 1)), torch.arange(slots) == 0
    return (hidden, weight, bias), candidates, target


def counted_rows(candidates, target):
    return (target & (candidates >= 0)).any(1)


@pytest.mark.parametrize("slots", [1, 4, 24])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_equal_the_reference(monkeypatch, slots, smoothing):
    monkeypatch.setattr(op_file, "CHUNK_ELEMENTS", 5 * slots * 6)  # five rows a chunk, the last one short
    inputs, candidates, target = problem(slots=slots, classes=29)
    row_weight = torch.rand(23, dtype=torch.float64, requires_grad=True)
    results = []
    for op in (neighbor_cross_entropy, neighbor_cross_entropy_reference):
        out = op(*inputs, candidates, target, label_smoothing=smoothing, row_weight=row_weight)
        results.append((*out, *torch.autograd.grad(2.5 * out.loss, (*inputs, row_weight))))
    assert_close(*results)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_masked_cross_entropy_over_all_logits(smoothing):
    (hidden, weight, bias), candidates, target = problem()
    first = (target & (candidates >= 0)).long().argmax(1, keepdim=True)
    target = torch.zeros_like(target).scatter(1, first, target.gather(1, first))  # that op knows one target a row
    classes = torch.arange(17)
    valid = (candidates.unsqueeze(-1) == classes).any(1)
    label = candidates.gather(1, first).squeeze(1).masked_fill(~counted_rows(candidates, target), -100)
    logits = hidden @ weight.T + bias
    results = []
    for loss in (
        masked_cross_entropy(logits, valid, label, label_smoothing=smoothing),
        neighbor_cross_entropy(hidden, weight, bias, candidates, target, label_smoothing=smoothing).loss,
    ):
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert_close(*results)


def test_several_targets_share_the_mass():
    hidden, weight = torch.zeros(1, 2), torch.zeros(5, 2)
    out = neighbor_cross_entropy(
        hidden, weight, None, torch.tensor([[4, 2, 0, -1]]), torch.tensor([[True, False, True, True]])
    )
    assert_close(out.loss, torch.tensor(math.log(3)))


def test_argmax_is_a_slot_and_correct_says_whether_it_is_a_target():
    weight = torch.tensor([[3.0], [1.0], [2.0], [9.0]])
    candidates = torch.tensor([[1, 0, 2], [1, -1, 2], [1, 2, -1], [-1, -1, -1], [0, 1, 2]])
    target = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    out = neighbor_cross_entropy(torch.ones(5, 1), weight, None, candidates, target)
    assert out.argmax.tolist() == [1, 2, 1, 0, 0]
    assert out.correct.tolist() == [True, True, False, False, False]


def test_gradcheck():
    inputs, candidates, target = problem(rows=7, d_model=3, classes=9)
    loss = lambda *x: neighbor_cross_entropy(*x, candidates, target, label_smoothing=0.1).loss
    assert torch.autograd.gradcheck(loss, inputs)


def test_uncounted_rows_and_classes_nobody_names_never_show():
    (hidden, weight, bias), candidates, target = problem()
    candidates[candidates == 0] = -1  # class 0 is what an empty slot might read by mistake
    counted = counted_rows(candidates, target)
    assert not counted.all()
    dirty_hidden = hidden.detach().masked_fill(~counted.unsqueeze(1), math.nan).requires_grad_()
    dirty_weight = weight.detach().index_fill(0, torch.tensor(0), math.nan).requires_grad_()
    row_weight = torch.ones(23).masked_fill(~counted, math.nan)
    results = []
    for inputs in ((hidden, weight, bias), (dirty_hidden, dirty_weight, bias)):
        loss = neighbor_cross_entropy(*inputs, candidates, target, label_smoothing=0.1, row_weight=row_weight).loss
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    assert_close(*results)
    assert (results[1][1][~counted] == 0).all()


def test_nan_in_a_candidate_shows():
    (hidden, weight, bias), candidates, target = problem()
    weight = weight.detach().index_fill(0, candidates[3, :1], math.nan)
    assert neighbor_cross_entropy(hidden, weight, bias, candidates, target).loss.isnan()


def test_nothing_to_count_gives_zero():
    inputs, candidates, target = problem()
    for out in (
        neighbor_cross_entropy(*inputs, torch.full_like(candidates, -1), target),
        neighbor_cross_entropy(*inputs, candidates, torch.zeros_like(target)),
        neighbor_cross_entropy(inputs[0][:0], *inputs[1:], candidates[:0], target[:0]),
    ):
        assert out.loss == 0 and not out.correct.any()
        assert all((g == 0).all() for g in torch.autograd.grad(out.loss, inputs))


def test_micro_batches_add_up():
    inputs, candidates, target = problem()
    whole = neighbor_cross_entropy(*inputs, candidates, target).loss
    count = counted_rows(candidates, target).sum()
    parts = [
        neighbor_cross_entropy(inputs[0][s], *inputs[1:], candidates[s], target[s], num_items=count).loss
        for s in (slice(9), slice(9, 23))
    ]
    assert_close(sum(parts), whole)
    assert_close(torch.autograd.grad(sum(parts), inputs), torch.autograd.grad(whole, inputs))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_frozen_inputs_get_no_gradient(wanted):
    inputs, candidates, target = problem()
    expected = torch.autograd.grad(neighbor_cross_entropy(*inputs, candidates, target).loss, inputs)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    neighbor_cross_entropy(*some, candidates, target).loss.backward()
    for i, (tensor, gradient) in enumerate(zip(some, expected, strict=True)):
        assert (tensor.grad is None) == (i not in wanted)
        if i in wanted:
            assert_close(tensor.grad, gradient)


def test_same_bits_twice_and_any_layout():
    (hidden, weight, bias), candidates, target = problem(dtype=torch.float32)
    runs = []
    for w in (weight, weight, weight.detach().T.contiguous().T.requires_grad_()):
        inputs = hidden, w, bias
        loss = neighbor_cross_entropy(*inputs, candidates.int(), target).loss
        runs.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert_close(runs[0], runs[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_inputs_keep_fp32_arithmetic(autocast):
    inputs, candidates, target = problem(dtype=torch.bfloat16)
    inputs = inputs[0], *(t.detach().float().requires_grad_() for t in inputs[1:])
    gold_inputs = [t.detach().double().requires_grad_() for t in inputs]
    gold = neighbor_cross_entropy_reference(*gold_inputs, candidates, target).loss
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = neighbor_cross_entropy(*inputs, candidates, target).loss
        gradients = torch.autograd.grad(ours, inputs)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), gold, rtol=1e-6, atol=0)
    for x, gradient, expected in zip(inputs, gradients, torch.autograd.grad(gold, gold_inputs), strict=True):
        assert gradient.dtype == x.dtype
        tolerance = 2**-8 if x.dtype == torch.bfloat16 else 1e-5
        assert_close(gradient.double(), expected, rtol=tolerance, atol=1e-7)


def test_compiles_without_a_graph_break():
    inputs, candidates, target = problem(dtype=torch.float32)
    loss = lambda *x: neighbor_cross_entropy(*x, candidates, target).loss
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert_close(torch.autograd.grad(compiled, inputs), torch.autograd.grad(loss(*inputs), inputs))


def test_opcheck():
    inputs, candidates, target = problem(dtype=torch.float32)
    forward = torch.ops.tenfold.neighbor_cross_entropy.default
    torch.library.opcheck(forward, (*inputs, candidates, target, 0.1))
    torch.library.opcheck(forward, (*inputs[:2], None, candidates, target, 0.0))


def test_bad_input_is_a_sentence():
    (hidden, weight, bias), candidates, target = problem()
    for error, message, arguments in (
        (TypeError, "weight must be floating point", (hidden, weight.long(), bias, candidates, target)),
        (TypeError, "candidates must hold integers", (hidden, weight, bias, candidates.double(), target)),
        (TypeError, "target must be bool", (hidden, weight, bias, candidates, target.long())),
        (ValueError, r"\[R, D\] and \[V, D\]", (hidden, weight.T, bias, candidates, target)),
        (ValueError, r"bias \[6\] must be \[V\]", (hidden, weight, bias[:6], candidates, target)),
        (ValueError, r"J in 1..24", (hidden, weight, bias, candidates.repeat(1, 7), target.repeat(1, 7))),
        (ValueError, "the shape of candidates", (hidden, weight, bias, candidates, target[:, :2])),
        (IndexError, "out of", (hidden, weight, bias, candidates + 17, target)),
    ):
        with pytest.raises(error, match=message):
            neighbor_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="row_weight"):
        neighbor_cross_entropy(hidden, weight, bias, candidates, target, row_weight=torch.ones(3))
