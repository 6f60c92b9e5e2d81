"""Derive the parameters of ACE-ALA-NME from OpenMM and write them as JSON; needs the extra `[molecule]`.

    python -m tasks.molecule.derive -o ala2.json

Nothing is downloaded: the atoms are placed from ideal bonds and angles, OpenMM gives the force field and minimises, and
every number of every force is read back. Bonds are flexible. A System with constraints is refused: it has no energy
along a constrained bond and no density in the coordinates of the atoms, so that no swap by its energies would be exact.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openmm
from openmm import app, unit

from tasks.molecule.system import VERSION

FORCE_FIELD = ("amber99sbildn.xml", "implicit/obc1.xml")

# Atoms in the order of most published data of this molecule, so that φ is 4 6 8 14 and ψ 6 8 14 16.
ATOMS = {
    "ACE": ("H1", "CH3", "H2", "H3", "C", "O"),
    "ALA": ("N", "H", "CA", "HA", "CB", "HB1", "HB2", "HB3", "C", "O"),
    "NME": ("N", "H", "C", "H1", "H2", "H3"),
}
# The z-matrix with ideal values: atom; the atoms that its bond, angle and dihedral refer to; nm, degrees, degrees. The
# first bonds are the molecule's bonds. Of the atoms behind a bond that turns, one carries the turn ("soft") and the
# others stand relative to it; so behind a peptide bond, which can turn over ("flip") from trans to cis. φ and ψ are
# those of C7eq, the deepest basin; CB at -122.5 makes the residue L.
ROOT = "ALA-N"
ZMATRIX = """
ALA-CA   ALA-N                        0.1449
ALA-C    ALA-CA  ALA-N                0.1522  110.1
ACE-C    ALA-N   ALA-CA   ALA-C       0.1335  121.9   -80.0  soft
NME-N    ALA-C   ALA-CA   ALA-N       0.1335  116.6    75.0  soft
ALA-CB   ALA-CA  ALA-N    ALA-C       0.1526  109.7  -122.5
ALA-HA   ALA-CA  ALA-N    ALA-C       0.1090  109.5   118.0
ALA-O    ALA-C   ALA-CA   NME-N       0.1229  120.4   180.0
ALA-H    ALA-N   ALA-CA   ACE-C       0.1010  118.0   180.0
ACE-CH3  ACE-C   ALA-N    ALA-CA      0.1522  116.6   180.0  flip
ACE-O    ACE-C   ALA-N    ACE-CH3     0.1229  122.9   180.0
NME-C    NME-N   ALA-C    ALA-CA      0.1449  121.9   180.0  flip
NME-H    NME-N   ALA-C    NME-C       0.1010  120.0   180.0
ALA-HB1  ALA-CB  ALA-CA   ALA-N       0.1090  109.5    60.0  soft
ALA-HB2  ALA-CB  ALA-CA   ALA-HB1     0.1090  109.5   120.0
ALA-HB3  ALA-CB  ALA-CA   ALA-HB1     0.1090  109.5  -120.0
ACE-H1   ACE-CH3 ACE-C    ALA-N       0.1090  109.5   180.0  soft
ACE-H2   ACE-CH3 ACE-C    ACE-H1      0.1090  109.5   120.0
ACE-H3   ACE-CH3 ACE-C    ACE-H1      0.1090  109.5  -120.0
NME-H1   NME-C   NME-N    ALA-C       0.1090  109.5   180.0  soft
NME-H2   NME-C   NME-N    NME-H1      0.1090  109.5   120.0
NME-H3   NME-C   NME-N    NME-H1      0.1090  109.5  -120.0
"""
PHI = ("ACE-C", "ALA-N", "ALA-CA", "ALA-C")
PSI = ("ALA-N", "ALA-CA", "ALA-C", "NME-N")

# OpenMM states its Born model as formulas. These, and no others, are what potential.py computes.
BORN_VALUES = (
    "select(step(r+sr2-or1), 0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r), 0);"
    "U=r+sr2;L=max(or1, D);D=abs(r-sr2)",
    "1/(1/or-tanh(0.8*psi+2.909125*psi^3)/radius);psi=I*or; radius=or+offset; offset=0.009",
)
BORN_ENERGIES = (
    "-0.5*138.935485*(1/soluteDielectric-1/solventDielectric)*charge^2/B",
    "28.3919551*(radius+0.14)^2*(radius/B)^6; radius=or+offset",
    "-138.935485*(1/soluteDielectric-1/solventDielectric)*charge1*charge2/f;f=sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))",
)
BORN_CONSTANTS = {"offset": 0.009, "alpha": 0.8, "gamma": 2.909125, "coulomb": 138.935485}
BORN_CONSTANTS |= {"surface": 28.3919551, "probe": 0.14}


class Row(NamedTuple):
    """Of the z-matrix, by names."""

    atom: str
    refers: list[str]
    values: list[float]  # nm, degrees, degrees
    turns: str  # soft, flip, or empty


def rows() -> list[Row]:
    parsed = []
    for line in ZMATRIX.strip().splitlines():
        words = line.split()
        names = [word for word in words if word.split("-")[0] in ATOMS]
        turns = words[-1] if words[-1] in ("soft", "flip") else ""
        values = [float(word) for word in words[len(names) : len(words) - bool(turns)]]
        parsed.append(Row(names[0], names[1:], values, turns))
    return parsed


def build() -> tuple[app.Topology, np.ndarray]:
    """The molecule by its ideal values: topology and positions in nm [22, 3]."""
    topology, atoms = app.Topology(), {}
    chain = topology.addChain()
    for residue_name, names in ATOMS.items():
        residue = topology.addResidue(residue_name, chain)
        for name in names:
            element = app.Element.getBySymbol(name[0])
            atoms[f"{residue_name}-{name}"] = topology.addAtom(name, element, residue)
    places = {ROOT: np.zeros(3)}
    for row in rows():
        topology.addBond(atoms[row.refers[0]], atoms[row.atom])
        places[row.atom] = _placed([places[name] for name in row.refers], row.values)
    return topology, np.array([places[name] for name in atoms])


def _placed(refers: list[np.ndarray], values: list[float]) -> np.ndarray:
    """At a distance from the first, an angle with the second and a dihedral with the third of its references.

    The second and third atom of a molecule have fewer: any will do.
    """
    second, third = [*refers[1:], refers[-1] + [1.0, 0.0, 0.0], refers[-1] + [0.0, 1.0, 0.0]][:2]
    distance, (angle, dihedral) = values[0], np.radians([*values[1:], 180.0, 0.0][:2])
    bond = refers[0] - second
    bond = bond / np.linalg.norm(bond)
    normal = np.cross(second - third, bond)
    normal = normal / np.linalg.norm(normal)
    around = np.cos(dihedral) * np.cross(normal, bond) + np.sin(dihedral) * normal
    return refers[0] + distance * (np.sin(angle) * around - np.cos(angle) * bond)


def parameters(system: openmm.System) -> dict[str, Any]:
    """Every number of every force of an OpenMM System, as `load_system` reads them.

    Raises ValueError for a System with constraints or forces that potential.py does not know.
    """
    if system.getNumConstraints():
        raise ValueError(
            f"this System has {system.getNumConstraints()} constraints, which take the energy of those bonds away: "
            "make it with constraints=None and rigidWater=False"
        )
    readers = {
        openmm.HarmonicBondForce: _bonds,
        openmm.HarmonicAngleForce: _angles,
        openmm.PeriodicTorsionForce: _torsions,
        openmm.NonbondedForce: _nonbonded,
        openmm.CustomGBForce: _born,
    }
    found = sorted(type(force).__name__ for force in system.getForces())
    if found != sorted(kind.__name__ for kind in readers) or system.usesPeriodicBoundaryConditions():
        known = ", ".join(kind.__name__ for kind in readers)
        raise ValueError(f"this System has the forces {', '.join(found)}; one each of {known} is known, not periodic")
    content: dict[str, Any] = {"masses": [_number(system.getParticleMass(i)) for i in range(system.getNumParticles())]}
    for force in system.getForces():
        content |= readers[type(force)](force)
    return content


def _number(value: Any) -> float:
    """In nm, kJ/mol, amu, rad and e, without the last digits, which are those of a subtraction in OpenMM."""
    value = value.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(value) else value
    return float(f"{value:.12g}")


def _table(names: tuple[str, ...], num_atoms: int, terms: list[Any]) -> dict[str, list]:
    """Columns of an OpenMM force's terms, which begin with their atoms."""
    columns = {"atoms": [list(map(int, term[:num_atoms])) for term in terms]}
    values = zip(*[[_number(value) for value in term[num_atoms:]] for term in terms], strict=True)
    return columns | {name: list(column) for name, column in zip(names, values, strict=True)}


def _bonds(force: openmm.HarmonicBondForce) -> dict[str, Any]:
    return {"bonds": _table(("r0", "k"), 2, [force.getBondParameters(i) for i in range(force.getNumBonds())])}


def _angles(force: openmm.HarmonicAngleForce) -> dict[str, Any]:
    return {"angles": _table(("theta0", "k"), 3, [force.getAngleParameters(i) for i in range(force.getNumAngles())])}


def _torsions(force: openmm.PeriodicTorsionForce) -> dict[str, Any]:
    terms = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
    table = _table(("periodicity", "phase", "k"), 4, terms)
    return {"torsions": table | {"periodicity": [int(value) for value in table["periodicity"]]}}


def _nonbonded(force: openmm.NonbondedForce) -> dict[str, Any]:
    if force.getNonbondedMethod() != force.NoCutoff or force.getNumGlobalParameters():
        raise ValueError("this NonbondedForce has a cutoff or parameters that vary: make it with NoCutoff")
    atoms = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
    charges, sigma, epsilon = ([_number(value) for value in column] for column in zip(*atoms, strict=True))
    pairs = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
    exceptions = _table(("chargeprod", "sigma", "epsilon"), 2, pairs)
    return {
        "charges": charges,
        "sigma": sigma,
        "epsilon": epsilon,
        "exceptions": exceptions,
        "coulomb": coulomb_constant(),
    }


def coulomb_constant() -> float:
    """kJ/mol nm/e² as OpenMM has it: the energy of two unit charges 1 nm apart."""
    pair, force = openmm.System(), openmm.NonbondedForce()
    for _ in range(2):
        pair.addParticle(1.0)
        force.addParticle(1.0, 1.0, 0.0)
    pair.addForce(force)
    return float(reference_energy(pair, np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])))


def _born(force: openmm.CustomGBForce) -> dict[str, Any]:
    values = [force.getComputedValueParameters(i)[1] for i in range(force.getNumComputedValues())]
    terms = [force.getEnergyTermParameters(i)[0] for i in range(force.getNumEnergyTerms())]
    bodies, tails = zip(*[term.split("; solventDielectric=") for term in terms], strict=True)
    if tuple(values) != BORN_VALUES or bodies != BORN_ENERGIES or force.getNonbondedMethod() != force.NoCutoff:
        raise ValueError(
            "this CustomGBForce is not OBC1 with the ACE surface term and no cutoff: use implicit/obc1.xml"
        )
    settings = dict(setting.split("=") for setting in f"solventDielectric={tails[0]}".replace(" ", "").split(";"))
    if float(settings["kappa"]):
        raise ValueError(
            f"this CustomGBForce has salt (kappa={settings['kappa']}/nm), which is not known: leave it out"
        )
    offset = BORN_CONSTANTS["offset"]
    own = [force.getParticleParameters(i)[1:] for i in range(force.getNumParticles())]
    return {
        "gb": BORN_CONSTANTS
        | {
            "radius": [_number(reduced + offset) for reduced, _ in own],
            "scale": [_number(scaled / reduced) for reduced, scaled in own],
            "solvent_dielectric": float(settings["solventDielectric"]),
            "solute_dielectric": float(settings["soluteDielectric"]),
        }
    }


def context_of(system: openmm.System, positions: np.ndarray) -> openmm.Context:
    """On OpenMM's Reference platform, which computes in float64."""
    context = openmm.Context(system, openmm.VerletIntegrator(1e-3), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context


def reference_energy(system: openmm.System, positions: np.ndarray) -> float:
    """kJ/mol."""
    energy = context_of(system, positions).getState(getEnergy=True).getPotentialEnergy()
    return energy.value_in_unit(unit.kilojoule_per_mole)


def force_field_system(topology: app.Topology, constraints: Any = None) -> openmm.System:
    field = app.ForceField(*FORCE_FIELD)
    return field.createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=constraints, removeCMMotion=False)


def derive() -> dict[str, Any]:
    """All of the JSON."""
    topology, positions = build()
    system = force_field_system(topology)
    context = context_of(system, positions)
    openmm.LocalEnergyMinimizer.minimize(context, tolerance=1e-3)
    minimum = context.getState(getPositions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    minimum = np.round(minimum - minimum.mean(0), 6)
    names = [f"{residue}-{name}" for residue, group in ATOMS.items() for name in group]
    index = {name: i for i, name in enumerate(names)}
    table = rows()
    return {
        "version": VERSION,
        "name": "ACE-ALA-NME",
        "force_field": "amber99sbildn + OBC1",
        "atoms": names,
        "elements": [atom.element.symbol for atom in topology.atoms()],
        "phi": [index[name] for name in PHI],
        "psi": [index[name] for name in PSI],
        "zmatrix": [([index[name] for name in (row.atom, *row.refers)] + [-1, -1])[:4] for row in table],
        "soft": [i for i, row in enumerate(table[2:]) if row.turns == "soft"],
        "flips": [i for i, row in enumerate(table[2:]) if row.turns == "flip"],
        "positions": minimum.tolist(),
        **parameters(system),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON file to write")
    output = parser.parse_args().output
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in derive().items())
    output.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
