"""What a molecule is: atoms, force-field parameters and internal coordinates, read from a small versioned JSON.

The JSON is derived from OpenMM by `tasks/molecule/derive.py`, so that running needs torch and numpy alone. Units
everywhere: nm, kJ/mol, K, ps, amu, rad, and charges in units of the elementary charge.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.reading import parsed

VERSION = 2  # of the format of the JSON
ALA2 = Path(__file__).with_name("ala2.json")
ALA2_CENTRE = (6, 8, 14, 10)  # N, CA, C and CB of the alanine, of which `is_l` asks the hand
KB = 8.314462618e-3  # kJ/mol/K
LARGEST = 1e9  # number of a molecule; constants of bonds, the largest there are, come to 5e5


class Bonds(NamedTuple):
    """Each with energy k (r - r0)² / 2."""

    atoms: np.ndarray  # int [n, 2]
    r0: np.ndarray  # nm [n]
    k: np.ndarray  # kJ/mol/nm² [n]


class Angles(NamedTuple):
    """Each with energy k (θ - θ0)² / 2."""

    atoms: np.ndarray  # int [n, 3], the vertex in the middle
    theta0: np.ndarray  # rad [n]
    k: np.ndarray  # kJ/mol/rad² [n]


class Torsions(NamedTuple):
    """Each with energy k (1 + cos(periodicity φ - phase)); some share their four atoms."""

    atoms: np.ndarray  # int [n, 4]
    periodicity: np.ndarray  # int [n]
    phase: np.ndarray  # rad [n]
    k: np.ndarray  # kJ/mol [n]


class Exceptions(NamedTuple):
    """Pairs whose Coulomb and Lennard-Jones parameters are not combined from their atoms': neighbours in the bonds."""

    atoms: np.ndarray  # int [n, 2]
    chargeprod: np.ndarray  # e² [n]
    sigma: np.ndarray  # nm [n]
    epsilon: np.ndarray  # kJ/mol [n]


class Born(NamedTuple):
    """Generalized Born solvent of Onufriev, Bashford and Case (2004), with the surface term of Schaefer and Karplus."""

    radius: np.ndarray  # nm [N], the atom's own
    scale: np.ndarray  # [N], of radius - offset, where the atom displaces the solvent of others
    solvent_dielectric: float
    solute_dielectric: float
    offset: float  # nm
    alpha: float  # of ψ in the effective radius; OBC1 has no term in ψ²
    gamma: float  # of ψ³
    coulomb: float  # kJ/mol nm/e²: OpenMM's text has fewer digits than its Coulomb force
    surface: float  # kJ/mol/nm²
    probe: float  # nm


TABLES = {"bonds": Bonds, "angles": Angles, "torsions": Torsions, "exceptions": Exceptions, "gb": Born}
ARRAYS = ("masses", "positions", "charges", "sigma", "epsilon")  # float64, a row for each atom


@dataclass(frozen=True, eq=False)
class System:
    """A molecule of N atoms without constraints.

    `zmatrix` has N - 1 rows (atom, bonded-to, angle-to, dihedral-to), each atom after those that it refers to; the
    first row has -1 for the angle and the dihedral, the second for the dihedral, and zmatrix[0][1] is at the root.
    `soft` are the dihedrals, counted from the third row, that turn rather than vibrate; `flips` vibrate about either of
    two states half a turn apart, as a peptide bond's does about trans and cis.
    """

    name: str
    force_field: str
    atoms: tuple[str, ...]  # "ACE-CH3": residue and name
    elements: tuple[str, ...]
    masses: np.ndarray  # amu [N]
    positions: np.ndarray  # nm [N, 3], a minimum of the L form
    charges: np.ndarray  # e [N]
    sigma: np.ndarray  # nm [N]
    epsilon: np.ndarray  # kJ/mol [N]
    bonds: Bonds
    angles: Angles
    torsions: Torsions
    exceptions: Exceptions
    gb: Born
    coulomb: float  # kJ/mol nm/e²
    zmatrix: tuple[tuple[int, int, int, int], ...]
    soft: tuple[int, ...]
    flips: tuple[int, ...]
    phi: tuple[int, int, int, int]
    psi: tuple[int, int, int, int]
    hash: str  # sha256 of all the above

    @property
    def num_atoms(self) -> int:
        return len(self.atoms)

    @property
    def flip_axes(self) -> list[tuple[list[int], list[int]]]:
        """Of each of `flips`: the two atoms of its bond, and those behind the second, which turn over with it."""
        return [self._behind(self.zmatrix[k + 2]) for k in self.flips]

    def _behind(self, row: tuple[int, int, int, int]) -> tuple[list[int], list[int]]:
        _, second, first, _ = row
        behind = {second}
        for atom, parent, *_ in self.zmatrix:  # parents come before
            if parent in behind:
                behind.add(atom)
        return [first, second], sorted(behind - {second})


def load_system(path: str | Path = ALA2) -> System:
    """Read a molecule. Raises ValueError, in a sentence, for a file that is not one or does not fit together."""
    content = parsed(Path(path).read_bytes(), path)
    try:
        found = content.pop("version")
        if found != VERSION:
            raise ValueError(f"it is of version {found}; this code reads {VERSION}: derive it anew")
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        names = {name: tuple(content.pop(name)) for name in ("atoms", "elements")}
        count = len(names["atoms"])
        if len(names["elements"]) != count or not all(isinstance(n, str) for of in names.values() for n in of):
            raise ValueError("atoms and elements must be as many names")
        fields = {name: table(**_columns(name, content.pop(name), count)) for name, table in TABLES.items()}
        for name in ARRAYS:
            shape, wanted = (count, *(3,) * (name == "positions")), f"a finite row for each of {count} atoms"
            fields[name] = _numbers(name, content.pop(name), shape, wanted)
        fields["coulomb"] = float(_numbers("coulomb", content.pop("coulomb"), (), "a finite number"))
        for name, length in (("soft", None), ("flips", None), ("phi", 4), ("psi", 4)):
            places = _numbers(name, content.pop(name), (length,), f"places below {count}", below=count)
            fields[name] = tuple(places.tolist())
        rows = _numbers("zmatrix", content.pop("zmatrix"), (None, 4), "rows of 4 atoms or -1", below=count, least=-1)
        fields["zmatrix"] = tuple(map(tuple, rows.tolist()))
        system = System(**content, **names, **fields, hash=hashlib.sha256(text.encode()).hexdigest())
        _check(system)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = str(error) if type(error) is ValueError else repr(error)
        raise ValueError(f"{path} is not a molecule of tasks/molecule/derive.py: {said}") from error
    return system


def is_l(x: Tensor, centre: tuple[int, int, int, int] = ALA2_CENTRE) -> Tensor:
    """Whether the residue has the hand of natural proteins: (N-CA)×(C-CA)·(CB-CA) > 0. x [B, N, 3] gives bool [B]."""
    n, alpha, c, beta_ = x[..., list(centre), :].unbind(-2)
    return (torch.linalg.cross(n - alpha, c - alpha) * (beta_ - alpha)).sum(-1) > 0


def beta(temperature: float) -> float:
    """1 / (KB T) in mol/kJ."""
    if not temperature > 0:
        raise ValueError(f"a temperature of {temperature} K: it has to be above 0")
    return 1 / (KB * temperature)


def _numbers(
    name: str, value: Any, shape: tuple[int | None, ...], wanted: str, *, below: int | None = None, least: int = 0
) -> np.ndarray:
    """Float64 within LARGEST of a shape, None for any length, or int64 in [least, below); else raises ValueError."""
    try:
        array = np.array(value)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    whole = below is not None or name.endswith("periodicity")
    if whole and not array.size:  # of which NumPy knows no kind
        array = array.astype(int)
    fits = len(array.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in ("iu" if whole else "iuf") or not np.isfinite(array).all():
        raise ValueError(f"{name} needs {wanted}")
    if below is not None and not ((least <= array) & (array < below)).all():
        raise ValueError(f"{name} needs {wanted}")
    if array.size and (largest := np.abs(array.astype(float)).max()) > LARGEST:
        raise ValueError(f"{name} has {largest:.3g}: in nm, kJ/mol, ps, amu, rad no number is beyond {LARGEST:.0e}")
    return array if whole else array.astype(float)


def _columns(name: str, table: dict[str, Any], count: int) -> dict[str, Any]:
    """Of one of TABLES: a row for each term; of the solvent's for each atom, and its other fields are numbers."""
    found: dict[str, Any] = {}
    rows = count
    if name != "gb":
        width = {"angles": 3, "torsions": 4}.get(name, 2)
        found["atoms"] = atoms = _numbers(
            f"{name}.atoms", table["atoms"], (None, width), f"rows of {width} atoms", below=count
        )
        rows = len(atoms)
        if not np.diff(np.sort(atoms, axis=1), axis=1).all():
            raise ValueError(f"{name}.atoms has a row that names an atom twice")
    for field, value in table.items():
        if field in found:
            continue
        alone = name == "gb" and field not in ("radius", "scale")
        wanted = "a finite number" if alone else f"a finite number for each of {rows} rows"
        array = _numbers(f"{name}.{field}", value, () if alone else (rows,), wanted)
        found[field] = float(array) if alone else array
    return found


def _check(system: System) -> None:
    """Raises ValueError for signs that no molecule has, and for a z-matrix that does not place every atom once."""
    dielectrics = system.gb.solvent_dielectric, system.gb.solute_dielectric
    if min(*system.masses, *dielectrics) <= 0 or min(*system.sigma, *system.epsilon) < 0:
        raise ValueError("masses and dielectric constants have to be above 0, sigma and epsilon not below")
    placed = {system.zmatrix[0][1]}
    for k, (atom, *refers) in enumerate(system.zmatrix):
        known = refers[: k + 1]
        if atom in placed or not placed.issuperset(known) or any(other != -1 for other in refers[k + 1 :]):
            raise ValueError(f"row {k} of the z-matrix refers to atoms that have no place yet, or has one already")
        placed.add(atom)
    if placed != set(range(system.num_atoms)):
        raise ValueError(f"the z-matrix places {len(placed)} of {system.num_atoms} atoms")
    parents = {atom: parent for atom, parent, *_ in system.zmatrix}
    dihedrals = dict(enumerate(system.zmatrix[2:]))
    if any(k not in dihedrals or parents.get(dihedrals[k][1]) != dihedrals[k][2] for k in system.flips):
        raise ValueError(
            "flips needs dihedrals, from the third row, whose angle goes to the parent of their own parent"
        )
