"""ScalableTransformerFlow: the frame that it takes off, its order, its bound and its cache."""

import math

import pytest
import torch

from models.transformer_flow import AffineFlow, TransformerFlowConfig, kabsch
from tests.models.tiny_molecules import build, frames, rotations


def test_before_it_learns_it_is_the_identity():
    """The original began as a random rotation of coordinates, with energies of 10¹¹ kT."""
    x = frames(turning=0.5)
    y, logdet = build("transformer").transport(x, 300.0, 450.0)
    assert (y - x).abs().max() < 1e-12 and logdet.abs().max() < 1e-10


def test_kabsch_turns_back():
    generator = torch.Generator().manual_seed(0)
    shape = frames(1, turning=0.5)[0]
    shape = shape - shape.mean(0)
    turns = rotations(16, generator)
    torch.testing.assert_close(kabsch(shape @ turns, shape), turns.transpose(1, 2))
    mirrored = shape * torch.tensor([1.0, 1.0, -1.0])
    assert (torch.linalg.det(kabsch(mirrored @ turns, shape)) > 0).all(), "a turn, though a mirror would be nearer"


def test_aligned_frames_have_no_place_and_no_turn():
    """54 + 6 numbers say all about the shape: the conditions of the frame hold, and the chart is orthonormal."""
    model, x = build("transformer"), frames(turning=0.5)
    q, frame, _ = model.chart(x)
    back, _ = model.unchart(q, frame)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)
    aligned = (x - frame.origin.unsqueeze(1)) @ frame.axes.transpose(1, 2)
    assert aligned.sum(1).abs().max() < 1e-12
    assert torch.linalg.cross(model.reference.expand_as(aligned), aligned).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(model.basis.T @ model.basis, torch.eye(60, dtype=torch.float64))


def test_a_shape_that_would_be_turned_elsewhere_has_no_image():
    model, x = build("transformer"), frames(2, turning=0.5)
    q, frame, _ = model.chart(x)
    far = torch.stack([q[0], -q[1]])  # the mirror image through the centre
    log_volume = model.unchart(far, frame)[1]
    assert log_volume[0].isfinite() and log_volume[1] == -math.inf


@pytest.fixture
def flow():
    torch.manual_seed(0)
    flow = AffineFlow(TransformerFlowConfig(num_atoms=4, num_layers=2, d_model=16, max_scale=0.5), 6).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow


def test_a_coordinate_depends_on_those_before_it_only(flow):
    z = torch.randn(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z[None], 1.0)[0][0], z)
    assert torch.equal(jacobian != 0, torch.ones(6, 6, dtype=torch.bool).tril())


def test_scales_are_bounded_and_the_inverse_holds_at_the_bound(flow):
    z = torch.randn(32, 6, dtype=torch.float64)
    with torch.no_grad():
        flow.head.bias[0] = 100
        y, logdet = flow(z, 1.0)
        assert 2.9 < logdet.abs().max() <= 6 * 0.5
        back, other = flow.inverse(y, 1.0)
    torch.testing.assert_close(back, z, atol=1e-9, rtol=0)
    torch.testing.assert_close(other, -logdet, atol=1e-9, rtol=0)


def test_the_inverse_reads_each_token_once(flow):
    tokens = []
    flow.blocks[0].register_forward_hook(lambda module, inputs, out: tokens.append(inputs[0].shape[1]))
    flow.inverse(torch.randn(2, 6, dtype=torch.float64), 1.0)
    assert tokens == [1] * 6
