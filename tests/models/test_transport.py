"""What both flows promise: an exact inverse and log-determinant, composition, and a loss whose parts add up."""

import math

import pytest
import torch

from models.ic_transport import ICSplineTransport, ICTransportConfig
from models.transformer_flow import ScalableTransformerFlow, TransformerFlowConfig
from models.transport import KB, ClippedEnergy
from tests.models.tiny_molecules import SYSTEM, build, frames, jacobian, rotations

KINDS = pytest.mark.parametrize("kind", ["ic", "transformer"])
ENDS = pytest.mark.parametrize(("t_from", "t_to"), [(300.0, 450.0), (450.0, 300.0), (380.0, 1000.0)])
MOVED = 0.05


def shapes(count=16, seed=3):
    return frames(count, seed=seed, turning=0.5, cis=True)


# --- the map ---


@KINDS
@ENDS
def test_the_inverse_is_exact(kind, t_from, t_to):
    model, x = build(kind, moved=MOVED), shapes()
    with torch.no_grad():
        y, logdet = model.transport(x, t_from, t_to)
        back, other = model.transport(y, t_to, t_from)
        assert (y - x).abs().max() > 1e-3
        assert (back - x).abs().max() < 1e-10
        assert (logdet + other).abs().max() < 1e-8
        centred = (x - x.mean(1, keepdim=True)).float()
        y, _ = model.float().transport(centred, t_from, t_to)
        assert (model.transport(y, t_to, t_from)[0] - centred).abs().max() < 1e-5


def logdet_error(model, t_from, t_to) -> float:
    """Against autograd, in all 66 Cartesian coordinates."""
    errors = []
    for row in shapes(2)[-1:].flatten(1):  # cis
        full = jacobian(lambda x: model.transport(x.unflatten(1, (-1, 3)), t_from, t_to)[0].flatten(1), row)
        _, logdet = model.transport(row.view(1, -1, 3), t_from, t_to)
        errors.append((torch.linalg.slogdet(full)[1] - logdet).abs().max().item())
    return max(errors)


@KINDS
@ENDS
def test_the_log_determinant_is_that_of_the_whole_jacobian(kind, t_from, t_to):
    assert logdet_error(build(kind, moved=MOVED), t_from, t_to) < 1e-8


@KINDS
def test_a_mixing_matrix_that_is_not_orthogonal_is_found_out(kind):
    """The original's: it took log|det W| for 0, and its inverse was right all the same."""
    model = build(kind)
    inner, size = model.flow, model.unit.numel()
    turn = torch.tensor([[0.0, 0.1], [-0.1, 0.0]], dtype=torch.float64).matrix_exp()

    def mixed(scale):
        w = torch.eye(size, dtype=torch.float64)
        w[:2, :2] = scale * turn

        def flow(q, temperature, *, inverse=False):
            return inner(q @ torch.linalg.inv(w), temperature, inverse=True) if inverse else mix(q, temperature)

        def mix(q, temperature):
            q, logdet = inner(q, temperature)
            return q @ w, logdet

        return flow

    model.flow = mixed(1.05)
    x = shapes()
    there, _ = model.transport(x, 300.0, 450.0)
    assert (model.transport(there, 450.0, 300.0)[0] - x).abs().max() < 1e-10, "which the inverse does not show"
    assert logdet_error(model, 300.0, 450.0) == pytest.approx(2 * math.log(1.05))
    model.flow = mixed(1.0)
    assert logdet_error(model, 300.0, 450.0) < 1e-8


@KINDS
def test_one_map_for_a_ladder(kind):
    """T_{B→C} ∘ T_{A→B} = T_{A→C}, and T_{A→A} = 1: by its short cut and by its formula."""
    model, x = build(kind, moved=MOVED), shapes()
    with torch.no_grad():
        assert torch.equal(model.transport(x, 450.0, 450.0)[0], x)
        q, _, _ = model.chart(x)
        for inverse in (False, True):
            same, logdet = model.flow(q, 300.0, inverse=inverse)
            assert (same - q).abs().max() < 1e-10 and logdet.abs().max() < 1e-10
        middle, first = model.transport(x, 300.0, 370.0)
        end, second = model.transport(middle, 370.0, 450.0)
        at_once, whole = model.transport(x, 300.0, 450.0)
    torch.testing.assert_close(end, at_once, atol=1e-10, rtol=0)
    torch.testing.assert_close(first + second, whole, atol=1e-8, rtol=0)


@KINDS
def test_it_turns_and_moves_with_the_molecule(kind):
    model, x = build(kind, moved=MOVED), shapes()
    turn = rotations(1, torch.Generator().manual_seed(7))[0]
    y, logdet = model.transport(x, 300.0, 450.0)
    turned, same = model.transport(x @ turn + 2.0, 300.0, 450.0)
    torch.testing.assert_close(turned, y @ turn + 2.0, atol=1e-10, rtol=0)
    torch.testing.assert_close(same, logdet, atol=1e-8, rtol=0)


# --- the loss ---


def springs(x):
    """A potential that does not see where the molecule is: each pair of atoms at rest where the minimum has it."""
    i, j = torch.triu_indices(SYSTEM.num_atoms, SYSTEM.num_atoms, 1)
    minimum = torch.as_tensor(SYSTEM.positions, dtype=x.dtype)
    return 200 * ((x[:, i] - x[:, j]).norm(dim=-1) - (minimum[i] - minimum[j]).norm(dim=-1)).square().sum(1)


def pairs(count=8):
    cold, hot = shapes(count, 5), frames(count, seed=6, hotter=1.2, turning=0.5)
    return {"cold": cold, "hot": hot, "cold_energy": springs(cold), "hot_energy": springs(hot)}


def scored(kind, **options):
    model = build(kind, moved=0.02, **options)
    model.energy_fn = springs
    return model


@KINDS
def test_the_loss_is_the_gap(kind):
    model, batch = scored(kind), pairs()
    out, maps = model(**batch), model(batch["cold"], batch["hot"])
    y, up = model.transport(batch["cold"], 300.0, 450.0)
    x, down = model.transport(batch["hot"], 450.0, 300.0)
    for name, value in {"hot": y, "cold": x, "forward_logdet": up, "inverse_logdet": down}.items():
        torch.testing.assert_close(maps[name], value)
    b_cold, b_hot = 1 / (KB * 300), 1 / (KB * 450)
    swap = b_cold * batch["cold_energy"] + b_hot * batch["hot_energy"] - b_cold * springs(x) - b_hot * springs(y)
    delta = swap + up + down
    torch.testing.assert_close(out["loss"], -delta.mean())
    torch.testing.assert_close(out["acceptance"], delta.exp().clamp(max=1).mean())
    names = {"forward_energy": 1, "inverse_energy": 1, "forward_logdet": -1, "inverse_logdet": -1, "floor": -1}
    torch.testing.assert_close(out["loss"], sum(weight * out[name] for name, weight in names.items()))
    assert all(not value.requires_grad for name, value in out.items() if name != "loss")


@KINDS
def test_parts_of_micro_batches_add_up(kind):
    model, batch = scored(kind), pairs()
    whole = model(**batch)
    count = torch.tensor(8)
    split = [model(**{n: v[i] for n, v in batch.items()}, num_items=count) for i in (slice(3), slice(3, 8))]
    for name, value in whole.items():
        torch.testing.assert_close(split[0][name] + split[1][name], value)


@KINDS
def test_gradients_reach_every_parameter(kind):
    model = scored(kind)
    model(**pairs())["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@KINDS
def test_the_gradient_is_that_of_the_loss(kind):
    model, batch = scored(kind), pairs(4)
    parameter = next(model.parameters())
    (gradient,) = torch.autograd.grad(model(**batch)["loss"], parameter)
    direction, step, values = torch.randn_like(parameter), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * direction
            values.append(model(**batch)["loss"])
            parameter -= sign * step * direction
    torch.testing.assert_close((gradient * direction).sum(), (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=1e-6)


def test_clipping_forces_leaves_the_energy_exact():
    x = shapes().requires_grad_()
    (full,) = torch.autograd.grad(springs(x).sum(), x)
    norm = full.norm(dim=-1, keepdim=True)
    limit = norm.median().item()
    energy, clipped = ClippedEnergy.apply(x, springs, limit)
    assert torch.equal(energy, springs(x)) and torch.equal(clipped, (norm > limit).any(1)[:, 0])
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    torch.testing.assert_close(gradient, full * (limit / norm).clamp(max=1))
    (gradient,) = torch.autograd.grad(ClippedEnergy.apply(x, springs, 1e30)[0].sum(), x)
    torch.testing.assert_close(gradient, full)
    assert (
        torch.autograd.grad(ClippedEnergy.apply(x, lambda x: x.sum((1, 2)) / 0, limit)[0].sum(), x)[0].isfinite().all()
    )


@KINDS
def test_pairs_without_an_image_are_counted_and_faults_are_not_hidden(kind):
    model, batch = scored(kind), pairs()
    rest = model(**{name: value[1:] for name, value in batch.items()}, num_items=torch.tensor(8))
    for fault, outside in ((math.inf, 1 / 8), (math.nan, 0.0)):

        def energy(x, fault=fault):
            return torch.cat([springs(x[:1]) + fault, springs(x[1:])])

        model.energy_fn = energy
        out = model(**batch)
        assert out["outside"] == outside
        assert bool(out["loss"].isnan()) == math.isnan(fault)
        if outside:
            torch.testing.assert_close(out["loss"], rest["loss"])
            model.zero_grad()
            out["loss"].backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())


# --- configs and files ---


@KINDS
def test_a_saved_flow_is_the_same_flow(kind, tmp_path):
    model, x = build(kind, moved=MOVED).float(), shapes().float()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config
    for mine, other in zip(model.transport(x, 300.0, 450.0), loaded.transport(x, 300.0, 450.0), strict=True):
        assert torch.equal(mine, other)


def test_all_faults_of_a_config_are_told_at_once():
    with pytest.raises(ValueError, match=r"t_cold.*d_model 10.*zmatrix.*num_bins"):
        ICTransportConfig(zmatrix=((1, 0, -1, -1),), soft=(), t_cold=450, t_hot=300, d_model=10, num_bins=1)
    with pytest.raises(ValueError, match=r"soft and flips must name some of the 19"):
        ICTransportConfig(zmatrix=SYSTEM.zmatrix, soft=(19,))
    with pytest.raises(ValueError, match=r"once each, not \(3,\) and \(3,\)"):
        ICTransportConfig(zmatrix=SYSTEM.zmatrix, soft=(3,), flips=(3,))
    with pytest.raises(ValueError, match=r"max_force.*num_atoms.*max_scale"):
        TransformerFlowConfig(num_atoms=3, max_scale=0.0, max_force=-1.0)


@KINDS
def test_what_cannot_be_moved_is_refused(kind):
    model = build(kind)
    with pytest.raises(ValueError, match=r"\[B, 22, 3\] in nm, not \[4, 66\]"):
        model.transport(torch.zeros(4, 66), 300.0, 450.0)
    with pytest.raises(ValueError, match="not -1"):
        model.transport(shapes(), 300.0, -1.0)
    with pytest.raises(ValueError, match="energy_fn"):
        model(**pairs())


@pytest.mark.parametrize(
    "model",
    [
        ICSplineTransport(ICTransportConfig(zmatrix=SYSTEM.zmatrix, soft=SYSTEM.soft)),
        ScalableTransformerFlow(TransformerFlowConfig(num_atoms=22)),
    ],
)
def test_a_flow_that_was_told_no_means_gives_no_number(model):
    model.energy_fn = springs
    x = shapes(2).float()
    assert model(x, x, springs(x), springs(x))["loss"].isnan()
