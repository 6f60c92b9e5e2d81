"""Pairs and their scores, on a molecule in a harmonic well about its minimum, where the scaling map is exact."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from tasks.molecule.data import Trajectories
from tasks.molecule.system import KB, beta, load_system
from tasks.molecule.task import MoleculeTask, identity, split_groups

SYSTEM = load_system()
MINIMUM = torch.from_numpy(SYSTEM.positions)
STIFFNESS = 1e5  # kJ/mol/nm^2: deviations of some thousandths of a nanometre, which leave it L
TEMPERATURES = (300.0, 450.0)
LADDER = (300.0, 370.0, 450.0)
DIMENSIONS = MINIMUM.numel()


def well(x):
    return STIFFNESS / 2 * (x - MINIMUM.to(x)).square().sum((-2, -1))


def scaled(x, t_from, t_to):
    ratio = math.sqrt(t_to / t_from)
    return MINIMUM + ratio * (x - MINIMUM), torch.full((len(x),), DIMENSIONS * math.log(ratio), dtype=x.dtype)


def frames(groups=8, count=6):
    deviation = torch.tensor([math.sqrt(KB * t / STIFFNESS) for t in LADDER]).view(-1, 1, 1, 1)
    noise = torch.randn(groups, len(LADDER), count, *MINIMUM.shape, generator=torch.Generator().manual_seed(0))
    x = (MINIMUM + deviation * noise).float()
    return Trajectories(x, well(x.double()), LADDER, {"frame_every_ps": 1.0})


@pytest.fixture(scope="module")
def data():
    return frames()


@pytest.fixture(scope="module")
def task(data):
    return MoleculeTask(SYSTEM, well, data, TEMPERATURES, eval_pairs=4, eval_batch_size=5)


def test_an_item_is_a_frame_of_each_temperature_and_splits_share_no_group(task, data):
    assert [len(split) for split in (task.train, task.val, task.test)] == [5 * 6, 4, 2 * 6]
    cold, hot, cold_energy, *_ = task.train[13]
    assert torch.equal(cold, data.x[2, 0, 1]) and torch.equal(hot, data.x[2, 2, 1])  # the third rung is the hot one
    assert cold_energy == data.energies[2, 0, 1] and torch.equal(task.train[13][0], cold)
    seen = [{x.sum().item() for x in split.ends().flatten(0, 1)} for split in (task.train, task.val, task.test)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    batch = task.collate([task.train[i] for i in (0, 7, 9)])
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "cold": (3, 22, 3), "hot": (3, 22, 3), "cold_energy": (3,), "hot_energy": (3,)
    }  # fmt: skip
    assert {t.dtype for t in batch.values()} == {torch.float32}
    count = task.num_items(batch)
    assert count == 3 and count.dtype == torch.int64 and count.dim() == 0


class FreeWell:
    """The well, wherever the molecule is."""

    def __call__(self, x):
        return self.energy_and_forces(x)[0]

    @staticmethod
    def energy_and_forces(x):
        deviation = x - MINIMUM.to(x)
        deviation = deviation - deviation.mean(-2, keepdim=True)
        return STIFFNESS / 2 * deviation.square().sum((-2, -1)), -STIFFNESS * deviation


def test_a_frame_moves_on_each_time_it_is_drawn_by_its_number_alone():
    free = FreeWell()
    data = frames()
    data = dataclasses.replace(data, energies=free(data.x.double()))
    still, moving, other = (
        MoleculeTask(SYSTEM, free, data, TEMPERATURES, move_fs=fs, seed=seed) for fs, seed in ((0, 0), (5, 0), (5, 1))
    )
    count = len(moving.train)

    def batch(task, *numbers):
        return task.collate([task.train[i] for i in numbers])

    whole = batch(moving, 7, 8, count + 7)  # none of them was refused
    for name, of_whole in whole.items():
        assert torch.equal(of_whole[:2], batch(moving, 7, 8)[name])
        for later in (of_whole[2:], batch(other, 7)[name], batch(still, 7)[name]):
            assert not torch.allclose(of_whole[:1], later)
        assert torch.equal(batch(still, 7)[name], batch(still, count + 7)[name])
    for end in ("cold", "hot"):
        torch.testing.assert_close(whole[f"{end}_energy"], free(whole[end]), rtol=1e-4, atol=1e-3)


def test_groups_are_split_whole(task):
    for count in range(3, 40):
        split = split_groups(count)
        assert [i for rows in split.values() for i in range(count)[rows]] == list(range(count))
        assert all(range(count)[rows] for rows in split.values())


def test_a_plain_swap_is_scored_by_its_formula(task):
    mapped = task.mapped(identity, task.test)
    energies = mapped.hot_energy.mean() - mapped.cold_energy.mean()
    assert task.scores(mapped)["gap"] == pytest.approx((task.betas[0] - task.betas[1]) * energies, rel=1e-12)
    assert task.betas == (beta(300.0), beta(450.0))


def test_the_exact_map_of_a_well_closes_the_gap_and_a_wrong_determinant_is_seen(task):
    scores = task.scores(task.mapped(scaled, task.test))
    assert scores["gap"] == pytest.approx(0, abs=1e-9) and scores["acceptance"] == pytest.approx(1, abs=1e-9)
    assert scores["ess_forward"] == pytest.approx(1) and scores["chirality"] == 1
    # Of the loss's parts, the energies and determinants have the gap as their sum above the floor.
    floor = sum(
        b * u.mean() for b, u in zip(task.betas, (task.test.energies[:, 0], task.test.energies[:, 1]), strict=True)
    )
    parts = scores["forward_energy"] + scores["inverse_energy"] - scores["forward_logdet"] - scores["inverse_logdet"]
    assert parts - floor.item() == pytest.approx(scores["gap"], abs=1e-9)

    def off(x, t_from, t_to):
        y, logdet = scaled(x, t_from, t_to)
        return y, logdet + 0.3

    wrong = task.scores(task.mapped(off, task.test))
    assert wrong["gap"] == pytest.approx(-0.6) and wrong["validity"] == pytest.approx(1)


class Model(nn.Module):
    seen: ClassVar[list] = []  # by the model and its copies

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.5))

    def transport(self, x, t_from, t_to):
        self.seen.append((x.dtype, self.log_scale.dtype, self.training))
        return scaled(x, t_from, t_to)


def test_a_model_is_scored_in_float64_and_left_as_it_was(task):
    model = Model()
    scores = task.evaluate(SimpleNamespace(whole=lambda: model))
    assert scores["gap"] == pytest.approx(0, abs=1e-9)
    assert set(model.seen) == {(torch.float64, torch.float64, False)}
    assert model.log_scale.dtype == torch.float32 and model.training
    assert task.evaluate(SimpleNamespace(whole=lambda: None)) == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: dataclasses.replace(d, x=d.x * torch.tensor([1.0, 1.0, -1.0])), "are of D-alanine"),
        (lambda d: dataclasses.replace(d, energies=d.energies * 1.01), "of another force field"),
        (lambda d: dataclasses.replace(d, x=d.x.index_fill(2, torch.tensor(1), torch.nan)), "16 of 96 frames hold"),
        (lambda d: dataclasses.replace(d, energies=d.energies + torch.inf), "not finite"),
        (lambda d: dataclasses.replace(d, x=d.x[:2], energies=d.energies[:2]), "at least 3 are needed"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data, change, sentence):
    used = change(data)
    with pytest.raises(ValueError, match=sentence):
        MoleculeTask(SYSTEM, well, used, TEMPERATURES)


@pytest.mark.parametrize(
    ("temperatures", "sentence"),
    [((450.0, 300.0), "the cold one comes first"), ((300.0, 300.0), "the cold one"), ((300.0, 500.0), "500 K is not")],
)
def test_temperatures_are_in_order_and_among_the_datas(data, temperatures, sentence):
    with pytest.raises(ValueError, match=sentence):
        MoleculeTask(SYSTEM, well, data, temperatures)
