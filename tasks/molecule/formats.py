"""Conformations from and to the files of other programs, through mdtraj (`pip install 'tenfold[molecule]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.molecule.system import System, is_l

WRITTEN = (".dcd", ".xtc", ".pdb")


def read_pdb(path: str | Path, system: System) -> Tensor:
    """Positions float64 [models, N, 3] in nm of a file with this molecule's atoms in this order.

    Raises ValueError, in a sentence, for other atoms or another order, for D-alanine and for numbers that are not
    finite.
    """
    if not Path(path).is_file():  # mdtraj would look for some on the internet
        raise FileNotFoundError(f"there is no file {path}")
    try:
        read = _mdtraj().load_pdb(str(path))  # which knows AMBER's and older names of these atoms too
    except (ImportError, OSError):
        raise
    except Exception as error:  # of what mdtraj doesn't expect it says whatever it trips over
        raise ValueError(f"{path} is not a PDB file that can be read: {str(error).strip() or 'an odd line'}") from None
    _check_atoms(path, tuple(f"{atom.residue.name}-{atom.name}" for atom in read.topology.atoms), system.atoms)
    x = torch.from_numpy(read.xyz).double()
    return _checked(path, x, system)


def write_trajectory(path: str | Path, x: Tensor | np.ndarray, system: System, *, frame_ps: float = 1.0) -> None:
    """Write frames [F, N, 3] in nm, `frame_ps` apart, in the format of the path's ending: .dcd, .xtc or .pdb.

    DCD keeps float32. XTC rounds to 0.0005 nm and PDB to 0.00005 nm, of which bonds make kJ/mol: fit to be looked at,
    not to compute energies from. A viewer needs a PDB of one frame beside a DCD or XTC.
    """
    path, md = Path(path), _mdtraj()
    if path.suffix not in WRITTEN:
        raise ValueError(f"{path}: frames can be written as {', '.join(WRITTEN)}")
    x = _checked(path, torch.as_tensor(x).detach().cpu().double(), system)
    md.Trajectory(x.numpy(), _topology(system), time=frame_ps * np.arange(len(x))).save(str(path))


def _checked(path: str | Path, x: Tensor, system: System) -> Tensor:
    if x.ndim != 3 or x.shape[1:] != (system.num_atoms, 3):
        raise ValueError(f"{path}: positions {tuple(x.shape)} are not those of [frames, {system.num_atoms} atoms, 3]")
    for problem, wrong in (("is not finite", ~x.isfinite().all(-1).all(-1)), ("is D-alanine, not L", ~is_l(x))):
        if wrong.any():
            raise ValueError(f"{path}: frame {int(wrong.nonzero()[0])} {problem}")
    return x


def _check_atoms(path: str | Path, found: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    if found == wanted:
        return
    missing, strange = (", ".join(sorted(set(a) - set(b))) for a, b in ((wanted, found), (found, wanted)))
    if missing or strange:
        parts = [f"{text} {names}" for text, names in (("lacks", missing), ("has the unknown", strange)) if names]
        raise ValueError(f"{path} is another molecule, or names its atoms otherwise: it {' and '.join(parts)}")
    if len(found) != len(wanted):
        raise ValueError(f"{path} has {len(found)} atoms, some of them twice; {len(wanted)} are wanted")
    first = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    raise ValueError(f"{path} has its atoms in another order: atom {first + 1} is {found[first]}, not {wanted[first]}")


def _topology(system: System) -> Any:
    md = _mdtraj()
    topology, residues = md.Topology(), {}
    chain = topology.add_chain()
    for name, element in zip(system.atoms, system.elements, strict=True):
        residue, atom = name.split("-", 1)
        if residue not in residues:
            residues[residue] = topology.add_residue(residue, chain, resSeq=len(residues) + 1)
        topology.add_atom(atom, md.element.Element.getBySymbol(element), residues[residue])
    for i, j in system.bonds.atoms:
        topology.add_bond(topology.atom(i), topology.atom(j))
    return topology


def _mdtraj() -> Any:
    """Imported here because it takes a second that most runs never need."""
    try:
        import mdtraj
    except ImportError as error:
        raise ImportError("PDB, DCD and XTC need mdtraj: pip install 'tenfold[molecule]'") from error
    return mdtraj
