from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from kernels import linear_cross_entropy, linear_cross_entropy_reference
from kernels.dispatch import launch, launches

pytest.importorskip("triton")
import triton.language as tl

from kernels.chunked_head import Budget
from kernels.gpu import lean_head as lean_file
from kernels.gpu import linear_cross_entropy as gpu_file
from kernels.lean_head import Most

# Exact in fp32, in which a kernel gets its options.
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.125},
    "all_smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss_weight": 0.0625},
    "softcap": {"softcap": 4.0},
    "everything": {"label_smoothing": 0.125, "z_loss_weight": 0.0625, "softcap": 4.0, "num_items": 50},
}


@pytest.fixture(params=["fast", "lean"])
def head(request):
    return partial(linear_cross_entropy, lean=request.param == "lean")


def problem(device, rows=37, d_model=12, classes=53, dtype=torch.float64, seed=0):
    """Hidden, weight, bias and targets, some ignored; hidden leans towards its class so that the softmax is peaked."""
    generator = torch.Generator().manual_seed(seed)
    weight, noise, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((classes, d_model), (rows, d_model), (classes,))
    )
    target = torch.randint(classes, (rows,), generator=generator)
    hidden = 0.7 * weight[target] + 0.3 * noise
    target[::6] = -100
    return [t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)], target.to(device)


def small_chunks(monkeypatch, rows=16):
    monkeypatch.setattr(gpu_file, "TRITON", Budget(0, rows, rows, 1))
    monkeypatch.setattr(lean_file, "TRITON", Most(rows, 27, 1))


def loss_and_gradients(op, inputs, target, scale=2.5, **options):
    hidden, weight, bias = inputs
    parts = op(hidden, weight, target, bias=bias, **options)
    return *parts, *torch.autograd.grad(scale * parts.loss, [t for t in inputs if t is not None])


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(
    ("head", "options"),
    [*(("fast", name) for name in OPTIONS), ("lean", "plain"), ("lean", "everything")],
    indirect=["head"],
)
def test_values_and_gradients_equal_the_reference(monkeypatch, device, rows, options, head):
    small_chunks(monkeypatch)
    options = OPTIONS[options]
    inputs, target = problem(device, rows=rows)
    gold = loss_and_gradients(linear_cross_entropy_reference, inputs, target, **options)
    assert_close(loss_and_gradients(head, inputs, target, **options), gold, rtol=1e-12, atol=1e-12)
    assert launches in ({"linear_cross_entropy": -(-rows // 16)}, {"linear_cross_entropy_lean": 4 * -(-rows // 16)})
    with torch.no_grad():
        only_loss = head(inputs[0], inputs[1], target, bias=inputs[2], **options)
    assert_close(tuple(only_loss), gold[:4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 64, 2048, 2049, 5003])
def test_any_vocabulary(device, classes, head):
    inputs, target = problem(device, rows=5, classes=classes)
    options = OPTIONS["everything"]
    gold = loss_and_gradients(linear_cross_entropy_reference, inputs, target, **options)
    assert_close(loss_and_gradients(head, inputs, target, **options), gold, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 12, 53), (37, 40, 130), (70, 33, 32)], ids=str)
@pytest.mark.parametrize("options", [(0.0, None), (0.125, 4.0)], ids=["plain", "everything"])
def test_loss_without_logits_equals_the_reference(device, shape, options):
    """The public op takes this kernel for 16-bit hidden states; by itself it is held to the truth."""
    dtype, tolerance = (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 1e-5)
    rows, d_model, classes = shape
    (hidden, weight, bias), target = problem(device, rows, d_model, classes, dtype)
    target[-1] = 0
    smoothing, cap = options
    for b in (None, bias):
        arguments = {"bias": b, "label_smoothing": smoothing, "softcap": cap, "num_items": 1}
        gold = linear_cross_entropy_reference(hidden, weight, target, **arguments)
        sums = gpu_file.fused_loss(hidden.detach(), weight.detach(), b, target, smoothing, cap, -100)
        assert_close(sums, (gold.ce_loss, gold.z_loss), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight_dtype", ["same", "fp32"])
def test_low_precision_is_as_good_as_the_same_dtype_naive(monkeypatch, device, weight_dtype, head):
    """|gold - ours| <= |gold - naive| + eps, the rule of Cut Cross-Entropy's tests; eps is an ulp of the largest."""
    small_chunks(monkeypatch)
    inputs, target = problem(device, rows=40, d_model=32, classes=101, dtype=torch.float16)
    if weight_dtype == "fp32":
        inputs = inputs[0], *(t.detach().float().requires_grad_() for t in inputs[1:])
    options = {"label_smoothing": 0.1, "softcap": 20.0}
    gold_inputs = [t.detach().double().requires_grad_() for t in inputs]
    naive_inputs = [t.detach().half().requires_grad_() for t in inputs]
    gold = loss_and_gradients(linear_cross_entropy_reference, gold_inputs, target, **options)
    naive = loss_and_gradients(linear_cross_entropy_reference, naive_inputs, target, **options)
    ours = loss_and_gradients(head, inputs, target, **options)
    for g, n, o in zip(gold, naive, ours, strict=True):
        assert (g - o).abs().max() <= (g - n).abs().max() + torch.finfo(torch.float16).eps * g.abs().max()


def test_the_loss_alone_in_low_precision_has_no_logits(device):
    """They are summed in fp32 and never rounded."""
    inputs, target = problem(device, rows=40, d_model=32, classes=101, dtype=torch.float16)
    losses = []
    for op, dtype in ((linear_cross_entropy, torch.float16), (linear_cross_entropy_reference, torch.float64)):
        hidden, weight, bias = (t.detach().to(dtype) for t in inputs)
        losses.append(op(hidden, weight, target, bias=bias, label_smoothing=0.1, softcap=20.0).loss.double())
    assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert launches == {"linear_cross_entropy": 1}


def test_fp32_is_exact_to_its_rounding(device, head):
    inputs, target = problem(device, dtype=torch.float32)
    gold = loss_and_gradients(
        linear_cross_entropy_reference, [t.detach().double().requires_grad_() for t in inputs], target
    )
    ours = loss_and_gradients(head, inputs, target)
    assert_close([t.double() for t in ours], list(gold), rtol=1e-5, atol=1e-6)


def test_ignored_rows_never_show(device, head):
    inputs, target = problem(device, classes=130)
    dirty = inputs[0].detach().masked_fill((target < 0).unsqueeze(1), math.nan).requires_grad_()
    options = {"label_smoothing": 0.125, "z_loss_weight": 0.0625}
    ours = loss_and_gradients(head, [dirty, *inputs[1:]], target, **options)
    assert_close(ours, loss_and_gradients(head, inputs, target, **options), rtol=0, atol=0)
    assert (ours[4][target < 0] == 0).all()
    sums = [gpu_file.fused_loss(h.half(), inputs[1].half(), None, target, 0.1, None, -100) for h in (dirty, inputs[0])]
    assert_close(*sums, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_count_gives_zero(device, rows, head):
    for dtype in (torch.float64, torch.float16):
        inputs, _ = problem(device, rows=rows, dtype=dtype)
        target = torch.full((rows,), -7, device=device)
        options = {"label_smoothing": 0.125, "z_loss_weight": 1.0, "ignore_index": -7}
        for result in loss_and_gradients(head, inputs, target, **options):
            assert (result == 0).all()
        with torch.no_grad():
            assert head(inputs[0], inputs[1], target, **options).loss == 0
    assert bool(launches) == bool(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_nan_in_a_counted_row_and_a_target_that_is_no_class_show(device, dtype, head):
    (hidden, weight, _), target = problem(device, dtype=dtype)
    dirty = hidden.detach().index_fill(0, torch.tensor([1], device=device), math.nan)
    wrong = target.index_fill(0, torch.tensor([1], device=device), 53)
    for h, w in ((dirty, weight), (dirty, weight.detach())):
        assert head(h, w, target).loss.isnan()
    for w in (weight, weight.detach()):
        assert head(hidden.detach(), w, wrong).loss == math.inf


def test_classes_ruled_out_by_the_bias(monkeypatch, device, head):
    """A whole block of -inf, the first that a row meets, is no NaN; nor is a whole tile."""
    monkeypatch.setattr(lean_file, "TRITON", Most(16, 1024, 1))
    inputs, target = problem(device, rows=5, classes=2300)
    bias = inputs[2].detach().index_fill(0, torch.arange(2100, device=device), -math.inf)
    target = target.clamp(min=2200)
    results = []
    for op in (head, linear_cross_entropy_reference):
        parts = op(inputs[0], inputs[1], target, bias=bias)
        results.append((parts.loss, *torch.autograd.grad(parts.loss, inputs[:2])))
    assert_close(*results, rtol=1e-12, atol=1e-12)


def test_classes_ruled_out_by_the_bias_without_logits(device):
    (hidden, weight, bias), target = problem(device, rows=5, classes=300, dtype=torch.float32)
    bias, target = bias.detach().index_fill(0, torch.arange(200, device=device), -math.inf), target.clamp(min=200)
    sums = gpu_file.fused_loss(hidden.detach(), weight.detach(), bias, target, 0.0, None, -100)
    gold = linear_cross_entropy_reference(hidden, weight, target, bias=bias, num_items=1)
    assert_close(sums[0], gold.ce_loss, rtol=1e-5, atol=1e-5)


def test_layouts_and_index_types(device, head):
    (hidden, weight, bias), target = problem(device, rows=36)
    expected = loss_and_gradients(head, [hidden, weight, bias], target)
    h = hidden.detach().view(4, 9, 12).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    w = weight.detach().T.contiguous().T.requires_grad_()
    b = torch.stack([bias.detach()] * 2, 1)[:, 0].requires_grad_()
    y = torch.stack([target] * 2, 1)[:, 1].view(4, 9).int()
    ours = loss_and_gradients(head, [h, w, b], y)
    assert_close([r.reshape(e.shape) for r, e in zip(ours, expected, strict=True)], list(expected))
    fused = [
        gpu_file.fused_loss(h.reshape(-1, 12).float(), w.float(), b.float(), y.view(-1).long(), 0.0, None, -100)[0]
        for h, w, b, y in ((h, w, b, y), (hidden, weight, bias, target))
    ]
    assert_close(*fused, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_frozen_inputs_and_two_backwards(monkeypatch, device, wanted, head):
    small_chunks(monkeypatch)
    inputs, target = problem(device)
    expected = loss_and_gradients(linear_cross_entropy_reference, inputs, target, scale=4.0)[4:]
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    loss = head(*some[:2], target, bias=some[2]).loss
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    for i, (tensor, gradient) in enumerate(zip(some, expected, strict=True)):
        assert (tensor.grad is None) == (i not in wanted)
        if i in wanted:
            assert_close(tensor.grad, gradient)


def test_bitwise_the_same_twice(monkeypatch, device, head):
    small_chunks(monkeypatch)
    inputs, target = problem(device, dtype=torch.float16)
    once, again = (loss_and_gradients(head, inputs, target, **OPTIONS["everything"]) for _ in range(2))
    assert_close(once, again, rtol=0, atol=0)
    with torch.no_grad():
        once, again = (head(inputs[0], inputs[1], target).loss for _ in range(2))
    assert once == again


def test_logits_past_two_to_the_31(device):
    stride, classes = 2**30 + 64, 53
    z = torch.empty_strided((3, 64), (stride, 1), dtype=torch.float16, device=device)  # 4.3 GB, of which 3 rows exist
    near = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half().to(device)
    z.copy_(near)
    target, results = torch.tensor([5, -100, 7], device=device), []
    for logits in (z, near):
        nll, square = torch.empty(3, device=device), torch.empty(3, device=device)
        launch(
            "linear_cross_entropy",
            gpu_file.linear_cross_entropy_bwd_kernel,
            (3,),
            *(logits, target, None, nll, square, 3, logits.stride(0), 64, classes, 0.1, 0.0, None, -100),
            num_warps=4,
            **{"ROWS": 1, "BLOCK": 64, "WIDE": tl.float32, "SMOOTHING": True, "GRADIENT": True},
        )
        results.append((nll, square, logits.clone()))
    assert_close(*results, rtol=0, atol=0)
    assert results[0][0][2] > 0 and (results[0][2][:, classes:] == 0).all()
