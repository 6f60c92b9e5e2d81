from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from models.internal_coordinates import InternalCoordinates, wrap
from tasks.molecule.dynamics import flip
from tasks.molecule.system import ALA2, ALA2_CENTRE, KB, beta, is_l, load_system
from tests.tasks.molecule.wells import seeded


def test_the_molecule_that_is_shipped():
    system = load_system()
    assert system.num_atoms == 22 and abs(system.charges.sum()) < 1e-9
    assert [len(table.atoms) for table in (system.bonds, system.angles, system.torsions)] == [21, 36, 42]
    named = lambda atoms: [system.atoms[i] for i in atoms]
    assert named(system.phi) == ["ACE-C", "ALA-N", "ALA-CA", "ALA-C"]
    assert named(system.psi) == ["ALA-N", "ALA-CA", "ALA-C", "NME-N"]
    assert named(ALA2_CENTRE) == ["ALA-N", "ALA-CA", "ALA-C", "ALA-CB"]


def test_the_zmatrix_follows_the_bonds_and_its_soft_rows_are_all_that_turns():
    system = load_system()
    bonds = {frozenset(pair) for pair in system.bonds.atoms.tolist()}
    assert {frozenset(row[:2]) for row in system.zmatrix} == bonds
    dihedrals = system.zmatrix[2:]
    soft = [dihedrals[i] for i in system.soft]
    assert {frozenset(row) for row in soft[:2]} == {frozenset(system.phi), frozenset(system.psi)}
    turning = [frozenset(row[1:3]) for row in soft]
    assert len(set(turning)) == 5  # one row for each bond that turns
    for i, row in enumerate(dihedrals):  # any other row about such a bond stands relative to an atom on the same side
        if i not in system.soft and frozenset(row[1:3]) in turning:
            assert frozenset((row[1], row[3])) in bonds or frozenset((row[2], row[3])) in bonds


def test_a_flip_turns_one_dihedral_and_nothing_else():
    system = load_system()
    assert [[system.atoms[i] for i in axis] for axis, _ in system.flip_axes] == [
        ["ALA-N", "ACE-C"],
        ["ALA-C", "NME-N"],
    ]
    coordinates = InternalCoordinates(system.zmatrix)
    x = torch.tensor(system.positions)[None]
    for k, axis in zip(system.flips, system.flip_axes, strict=True):
        cold = torch.full((1,), 1e9)  # where every move is accepted
        y, _, taken = flip(lambda x: x.new_zeros(len(x)), x, cold.double(), cold, *axis, generator=seeded())
        before, after = (coordinates(shape) for shape in (x, y))
        turned = wrap(after.dihedrals - before.dihedrals)
        assert taken.all() and turned[0, k].abs() == pytest.approx(math.pi)
        turned[0, k] = 0
        assert max(d.abs().max() for d in (turned, after.bonds - before.bonds, after.angles - before.angles)) < 1e-6


def test_is_l_tells_a_molecule_from_its_mirror_image():
    x = torch.tensor(load_system().positions).repeat(2, 1, 1)
    x[1, :, 2] *= -1
    assert is_l(x).tolist() == [True, False]


def test_beta():
    assert beta(300.0) == pytest.approx(0.40091, abs=1e-5)
    assert beta(300.0) * 300.0 * KB == pytest.approx(1)
    for temperature in (0.0, -300.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            beta(temperature)


def changed(tmp_path, change):
    content = json.loads(ALA2.read_text())
    change(content)
    path = tmp_path / "molecule.json"
    path.write_text(json.dumps(content))
    return path


def test_the_hash_is_of_every_number_and_of_no_layout(tmp_path):
    ours = load_system().hash
    assert load_system(changed(tmp_path, lambda content: None)).hash == ours
    assert load_system(changed(tmp_path, lambda content: content["charges"].__setitem__(3, 0.1124))).hash != ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=0), "of version 0; this code reads 2"),
        (lambda content: content.pop("masses"), "is not a molecule"),
        (lambda content: content["bonds"].pop("k"), "is not a molecule"),
        (lambda content: content["charges"].pop(), "charges needs a finite row for each of 22 atoms"),
        (lambda content: content["positions"][4].__setitem__(1, math.nan), "positions needs a finite row"),
        (lambda content: content["zmatrix"].reverse(), "row 0 of the z-matrix"),
        (lambda content: content["zmatrix"].pop(), "places 21 of 22 atoms"),
        (lambda content: content.update(flips=[19]), "flips needs dihedrals"),
        (lambda content: content.update(flips=[0]), "flips needs dihedrals"),
    ],
)
def test_what_is_not_a_molecule_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_system(changed(tmp_path, change))


# ---- from OpenMM -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def derive():
    pytest.importorskip("openmm")
    from tasks.molecule import derive

    return derive


def test_openmm_has_the_parameters_that_are_shipped(derive):
    shipped = json.loads(ALA2.read_text())
    found = derive.parameters(derive.force_field_system(derive.build()[0]))
    assert found == {name: shipped[name] for name in found}


@pytest.mark.slow
def test_the_file_that_is_shipped_can_be_made_again(derive):
    content, shipped = derive.derive(), json.loads(ALA2.read_text())
    assert np.abs(np.subtract(content.pop("positions"), shipped.pop("positions"))).max() < 1e-4  # the minimiser's
    assert content == shipped


def broken(openmm, app, name):
    from tasks.molecule import derive

    topology, _ = derive.build()
    if name == "constraints":
        return derive.force_field_system(topology, constraints=app.HBonds)
    system = derive.force_field_system(topology)
    forces = {type(force).__name__: force for force in system.getForces()}
    if name == "force":
        system.addForce(openmm.CMMotionRemover())
    elif name == "cutoff":
        forces["NonbondedForce"].setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    elif name == "salt":
        born = forces["CustomGBForce"]
        for i in range(born.getNumEnergyTerms()):
            text, kind = born.getEnergyTermParameters(i)
            born.setEnergyTermParameters(i, text.replace("kappa=0", "kappa=0.7"), kind)
    else:
        forces["CustomGBForce"].setComputedValueParameters(1, "B", "1/or", openmm.CustomGBForce.SingleParticle)
    return system


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("constraints", "has 12 constraints.*constraints=None"),
        ("force", "CMMotionRemover"),
        ("cutoff", "NoCutoff"),
        ("salt", "kappa=0.7"),
        ("solvent", "not OBC1"),
    ],
)
def test_a_system_that_the_potential_does_not_describe_is_refused(derive, name, message):
    import openmm
    from openmm import app

    with pytest.raises(ValueError, match=message):
        derive.parameters(broken(openmm, app, name))
