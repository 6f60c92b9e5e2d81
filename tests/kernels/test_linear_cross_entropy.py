from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kernels import chunked_head, lean_head, linear_cross_entropy, linear_cross_entropy_reference


@pytest.fixture(params=["fast", "lean"])
def head(request):
    return partial(linear_cross_entropy, lean=request.param == "lean")


def problem(rows=37, d_model=12, classes=53, dtype=torch.float64, seed=0):
    """Hidden, weight, bias and targets, some ignored; hidden leans towards its class so that the softmax is peaked."""
    generator = torch.Generator().manual_seed(seed)
    weight, noise, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((classes, d_model), (rows, d_model), (classes,))
    )
    target = torch.randint(classes, (rows,), generator=generator)
    hidden = 0.7 * weight[target] + 0.3 * noise
    target[::6] = -100
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], target


def small_chunks(monkeypatch, rows=8, classes=53):
    """Chunks of `rows`, in blocks of 3; lean, tiles of `rows` and at most 16 classes, in blocks of 3."""
    monkeypatch.setattr(chunked_head, "FALLBACK", chunked_head.Budget(0, rows, rows, 1))
    monkeypatch.setattr(chunked_head, "BLOCK_BYTES", 3 * classes * 4)
    monkeypatch.setattr(lean_head, "FALLBACK", lean_head.Most(rows, 16, 1))
    monkeypatch.setattr(lean_head, "BLOCK_BYTES", 3 * 16 * 4)


def loss_and_gradients(op, inputs, target, scale=2.5, **options):
    hidden, weight, bias = inputs
    parts = op(hidden, weight, target, bias=bias, **options)
    wanted = [t for t in (*inputs, options.get("energy")) if t is not None and t.requires_grad]
    return *parts, *torch.autograd.grad(scale * parts.loss, wanted)


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all_smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss_weight": 0.02},
    "softcap": {"softcap": 4.0},
    "everything": {"label_smoothing": 0.1, "z_loss_weight": 0.02, "softcap": 4.0, "num_items": 50},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [1, 8, 37])
def test_values_and_gradients_equal_the_reference(monkeypatch, rows, options, head):
    small_chunks(monkeypatch)
    inputs, target = problem(rows=rows)
    energy = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    options = {**options, "energy": energy, "energy_weight": 0.3}
    ours = loss_and_gradients(head, inputs, target, **options)
    assert_close(ours, loss_and_gradients(linear_cross_entropy_reference, inputs, target, **options))
    loss, ce, raw_energy, z_loss = ours[:4]
    assert_close(loss, ce + 0.3 * raw_energy + options.get("z_loss_weight", 0) * z_loss)
    assert [part.requires_grad for part in ours[:4]] == [True, False, False, False]
    with torch.no_grad():
        only_loss = head(inputs[0], inputs[1], target, bias=inputs[2], **options)
    assert_close(tuple(only_loss), ours[:4])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reference_equals_torch(smoothing):
    (hidden, weight, bias), target = problem()
    parts = linear_cross_entropy_reference(hidden, weight, target, bias=bias, label_smoothing=smoothing)
    logits = F.linear(hidden, weight, bias)
    assert_close(parts.loss, F.cross_entropy(logits, target, label_smoothing=smoothing))
    assert_close(parts.z_loss, logits.logsumexp(1)[target >= 0].square().mean())
    assert parts.energy_loss == 0


def test_gradcheck(head):
    inputs, target = problem(rows=5, d_model=4, classes=7)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.1, "softcap": 3.0}
    loss = lambda h, w, b: head(h, w, target, bias=b, **options).loss
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_frozen_inputs_get_no_gradient(wanted, head):
    inputs, target = problem()
    expected = loss_and_gradients(head, inputs, target, scale=1.0)[4:]
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    head(*some[:2], target, bias=some[2]).loss.backward()
    for i, (tensor, gradient) in enumerate(zip(some, expected, strict=True)):
        assert (tensor.grad is None) == (i not in wanted)
        if i in wanted:
            assert_close(tensor.grad, gradient)


def torch_ops(function):
    """(name, input shapes) of every torch op that `function` runs, those inside a custom op included."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        function()
    return [(event.name, event.input_shapes) for event in profile.function_events]


def test_a_frozen_side_skips_its_matmul():
    (hidden, weight, _), target = problem()
    for h, w, fast, lean in (
        (hidden, weight, 3, 4),
        (hidden.detach(), weight, 2, 3),
        (hidden, weight.detach(), 2, 3),
        (hidden.detach(), weight.detach(), 1, 1),
    ):
        for mode, expected in ((False, fast), (True, lean)):

            def run(h=h, w=w, mode=mode):
                loss = linear_cross_entropy(h, w, target, lean=mode).loss
                if loss.requires_grad:
                    torch.autograd.grad(loss, [t for t in (h, w) if t.requires_grad])

            assert sum(name in ("aten::mm", "aten::addmm") for name, _ in torch_ops(run)) == expected


def test_tied_weights_get_both_gradients(head):
    (_, weight, _), target = problem()
    tokens = torch.arange(37) % 53
    results = []
    for op in (head, linear_cross_entropy_reference):
        results.append(torch.autograd.grad(op(weight[tokens].tanh(), weight, target).loss, weight))
    assert_close(*results)


def test_backward_twice_and_into_an_existing_grad(head):
    inputs, target = problem()
    once = loss_and_gradients(head, inputs, target, scale=1.0)[4:]
    loss = head(*inputs[:2], target, bias=inputs[2]).loss
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    for tensor, gradient in zip(inputs, once, strict=True):
        assert_close(tensor.grad, 4 * gradient)


def test_double_backward_says_no(head):
    (hidden, weight, _), target = problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(head(hidden, weight, target).loss, hidden, create_graph=True)


def test_ignored_rows_never_show(head):
    inputs, target = problem()
    dirty = inputs[0].detach().masked_fill((target < 0).unsqueeze(1), math.nan).requires_grad_()
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.01}
    ours = loss_and_gradients(head, [dirty, *inputs[1:]], target, **options)
    assert_close(ours, loss_and_gradients(head, inputs, target, **options))
    assert (ours[4][target < 0] == 0).all()


def test_nan_in_a_counted_row_shows(head):
    (hidden, weight, _), target = problem()
    hidden = hidden.detach().index_fill(0, torch.tensor(1), math.nan)
    assert head(hidden, weight, target).loss.isnan()


def test_classes_ruled_out_by_the_bias(monkeypatch, head):
    small_chunks(monkeypatch)
    (hidden, weight, bias), target = problem()
    bias, target = bias.detach().index_fill(0, torch.arange(20), -math.inf), target.clamp(min=20)
    results = []
    for op in (head, linear_cross_entropy_reference):
        loss = op(hidden, weight, target, bias=bias).loss
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert_close(*results)
    assert_close(results[0][0], F.cross_entropy(F.linear(hidden, weight, bias), target))


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_count_gives_zero(rows, head):
    inputs, _ = problem(rows=rows)
    target = torch.full((rows,), -7)
    options = {"label_smoothing": 0.1, "z_loss_weight": 1.0, "ignore_index": -7}
    for result in loss_and_gradients(head, inputs, target, **options):
        assert (result == 0).all()


def test_micro_batches_add_up_to_the_whole(monkeypatch, head):
    small_chunks(monkeypatch)
    inputs, target = problem()
    whole = loss_and_gradients(head, inputs, target, scale=1.0)
    count = (target >= 0).sum()
    hidden, weight, bias = inputs
    parts = [
        head(hidden[s], weight, target[s], bias=bias, num_items=count)
        for s in (slice(11), slice(11, 12), slice(12, 37))
    ]
    for name in ("ce_loss", "z_loss", "loss"):
        assert_close(sum(getattr(p, name) for p in parts), getattr(head(hidden, weight, target, bias=bias), name))
    assert_close(torch.autograd.grad(sum(p.loss for p in parts), inputs), whole[4:])


def test_never_holds_the_logits_of_all_rows(monkeypatch):
    small_chunks(monkeypatch)
    (hidden, weight, _), target = problem(rows=64)
    largest = {}
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = lambda op=op: op(hidden, weight, target, softcap=5.0, label_smoothing=0.1).loss
        ops = torch_ops(lambda loss=loss: loss().backward())
        largest[op] = max(math.prod(shape) for _, shapes in ops for shape in shapes if shape)
    assert largest[linear_cross_entropy] <= max(8 * 53, weight.numel(), hidden.numel())
    assert largest[linear_cross_entropy_reference] == 64 * 53  # the check can fail


def peak_bytes(function):
    """Most that tensors held at once beyond what there was, on the CPU."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_holds_nothing_of_the_size_of_the_weight_but_its_gradient(monkeypatch, dtype):
    monkeypatch.setattr(lean_head, "FALLBACK", lean_head.Most(32, 128, 1))
    (hidden, weight, _), _ = problem(64, 64, 4096, dtype)
    target, peak = torch.arange(64), {}
    for lean in (False, True):
        loss = lambda lean=lean: linear_cross_entropy(hidden, weight, target, lean=lean).loss
        peak[lean] = peak_bytes(lambda loss=loss: torch.autograd.grad(loss(), (hidden, weight)))
    gradients, zero = (64 + 4096) * 64 * dtype.itemsize, hidden.new_zeros(())
    workspace = torch.ops.tenfold.linear_cross_entropy_lean_bwd.default.workspace_bytes(
        zero, hidden, weight, None, target, zero, 0.0, 0.0, None, -100, [True, True, False]
    )
    assert workspace < weight.numel() * 4 / 4
    assert gradients < peak[True] < gradients + workspace + (1 << 16)  # and a block that shares the cache
    assert peak[False] > gradients + weight.numel() * 4  # the check can fail


@pytest.mark.parametrize("budget", [chunked_head.FALLBACK, chunked_head.TRITON], ids=["fallback", "triton"])
def test_chunks_are_even_and_within_the_budget(budget):
    for rows, classes in ((2048, 50304), (1, 7), (100_000, 300), (513, 256_000), (0, 7)):
        chunk = chunked_head.chunk_rows(rows, classes * 4, budget)
        assert chunk * classes * 4 <= max(budget.bytes, budget.min_rows * classes * 4)
        assert chunk > 0 and chunk % budget.multiple == 0
        count = max(1, -(-rows // chunk))
        assert count * chunk - rows < max(count, 1) * budget.multiple or not rows  # the last is short by little


def test_layouts_and_index_types(head):
    (hidden, weight, bias), target = problem(rows=36)
    expected = loss_and_gradients(head, [hidden, weight, bias], target)
    h = hidden.detach().view(4, 9, 12).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    w = weight.detach().T.contiguous().T.requires_grad_()
    ours = loss_and_gradients(head, [h, w, bias], target.view(4, 9).int())
    assert_close([r.reshape(e.shape) for r, e in zip(ours, expected, strict=True)], list(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["same", "fp32"])
def test_low_precision_is_as_good_as_the_same_dtype_naive(monkeypatch, dtype, weight_dtype, head):
    """|gold - ours| <= |gold - naive| + eps, the rule of Cut Cross-Entropy's tests; eps is an ulp of the largest."""
    small_chunks(monkeypatch, rows=16)
    inputs, target = problem(rows=48, d_model=32, classes=101, dtype=dtype)
    if weight_dtype == "fp32":
        inputs = inputs[0], *(t.detach().float().requires_grad_() for t in inputs[1:])
    gold_inputs = [t.detach().double().requires_grad_() for t in inputs]
    naive_inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    gold = loss_and_gradients(linear_cross_entropy_reference, gold_inputs, target, label_smoothing=0.1)
    naive = loss_and_gradients(linear_cross_entropy_reference, naive_inputs, target, label_smoothing=0.1)
    ours = loss_and_gradients(head, inputs, target, label_smoothing=0.1)
    assert ours[0].dtype == torch.float32
    assert [r.dtype for r in ours[4:]] == [t.dtype for t in inputs]
    for g, n, o in zip(gold, naive, ours, strict=True):
        ulp = torch.finfo(dtype).eps * g.abs().max()
        assert (g - o).abs().max() <= (g - n).abs().max() + ulp


def test_fp16_keeps_gradients_of_the_size_of_one_over_num_items(head):
    """1 / 10^6 is below fp16's normal numbers; the loss scale arrives in backward and must find the gradient whole."""
    inputs, target = problem(dtype=torch.float16)
    (hidden, weight, _), scale, count = inputs, 2.0**16, 10**6
    (ours,) = torch.autograd.grad(head(hidden, weight, target, num_items=count).loss * scale, hidden)
    gold_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    gold = torch.autograd.grad(
        linear_cross_entropy_reference(*gold_inputs, target, num_items=count).loss * scale, gold_inputs[0]
    )[0]
    assert (ours.double() - gold).abs().max() < 2e-3 * gold.abs().max()


def test_autocast_runs_the_matmuls_low_and_keeps_the_weight_gradient_wide(head):
    (hidden, weight, _), target = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, weight, target).loss
    low = head(hidden.bfloat16(), weight, target).loss
    assert_close(loss, low, rtol=0, atol=0)
    assert loss != head(hidden, weight, target).loss
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    assert_close(gradients, torch.autograd.grad(low, (hidden, weight)), rtol=0, atol=0)


def test_compiles_without_a_graph_break(head):
    inputs, target = problem(dtype=torch.float32)
    count = (target >= 0).sum()
    loss = lambda h, w, b: head(h, w, target, bias=b, num_items=count).loss
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert_close(torch.autograd.grad(compiled, inputs), torch.autograd.grad(loss(*inputs), inputs))


def test_opcheck():
    (hidden, weight, bias), target = problem(dtype=torch.float32)
    ops = torch.ops.tenfold
    torch.library.opcheck(
        ops.linear_cross_entropy.default, (hidden.detach(), weight.detach(), bias.detach(), target, 0.1, 5.0, -100)
    )
    arguments = (target, 0.1, 0.01, 5.0, -100)
    with_gradients = ops.linear_cross_entropy_with_gradients.default
    torch.library.opcheck(with_gradients, (hidden, weight, bias, *arguments, [True, True, True]))
    torch.library.opcheck(with_gradients, (hidden, weight.detach(), None, *arguments, [True, False, False]))
    inputs = [t.detach() for t in (hidden, weight, bias)]
    *_, lse = lean_head.lean_loss(*inputs, *arguments)
    grad = torch.tensor(2.5)
    for b in (bias, None):
        torch.library.opcheck(ops.linear_cross_entropy_lean_fwd.default, (hidden, weight, b, *arguments))
        wants = [True, b is None, b is not None]
        lean_arguments = (grad, *inputs[:2], None if b is None else inputs[2], target, lse, *arguments[1:], wants)
        torch.library.opcheck(ops.linear_cross_entropy_lean_bwd.default, lean_arguments)


def test_bad_input_is_a_sentence(head):
    (hidden, weight, bias), target = problem()
    for error, message, arguments, options in (
        (TypeError, "hidden must be floating point", (hidden.long(), weight, target), {}),
        (TypeError, "target must hold integers", (hidden, weight, target.double()), {}),
        (TypeError, "0-d integer tensor", (hidden, weight, target), {"num_items": torch.ones(1, dtype=torch.int64)}),
        (ValueError, r"\[\.\.\., D\] and \[V, D\]", (hidden, weight.T, target), {}),
        (ValueError, "without D", (hidden, weight, target[:5]), {}),
        (ValueError, r"bias \[4\] must be \[V\]", (hidden, weight, target), {"bias": bias[:4]}),
        (ValueError, "energy must be a 0-d tensor", (hidden, weight, target), {"energy": torch.ones(2)}),
        (ValueError, "must be positive", (hidden, weight, target), {"softcap": 0.0}),
        (ValueError, r"in \[0, 1\]", (hidden, weight, target), {"label_smoothing": -0.1}),
        (RuntimeError, "out of bounds", (hidden, weight, target + 53), {}),
    ):
        with pytest.raises(error, match=message):
            head(*arguments, **options)


@pytest.mark.parametrize(("wants", "matmuls"), [((False, False), 1), ((True, True), 3), ((False, True), 2)])
def test_the_flop_counter_sees_the_matmuls_that_are_made(wants, matmuls):
    for lean in (False, True):
        hidden, weight = torch.randn(6, 4, requires_grad=wants[0]), torch.randn(11, 4, requires_grad=wants[1])
        with FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy(hidden, weight, torch.arange(6), lean=lean).loss
            if any(wants):
                loss.backward()
        assert counter.get_total_flops() == (matmuls + (lean and any(wants))) * 2 * 6 * 4 * 11
