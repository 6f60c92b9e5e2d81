from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.molecule.formats import read_pdb, write_trajectory
from tasks.molecule.system import load_system

mdtraj = pytest.importorskip("mdtraj")
SYSTEM = load_system()


@pytest.fixture(scope="module")
def frames():
    noise = 0.005 * torch.randn(3, SYSTEM.num_atoms, 3, generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(SYSTEM.positions) + noise


@pytest.fixture
def pdb(tmp_path, frames):
    write_trajectory(tmp_path / "a.pdb", frames[:1], SYSTEM)
    return tmp_path / "a.pdb"


def rewritten(pdb, change):
    """The file with its ATOM records changed: a function of the list of lines."""
    lines = pdb.read_text().splitlines()
    atoms = [i for i, line in enumerate(lines) if line.startswith(("ATOM", "HETATM"))]
    changed = change([lines[i] for i in atoms])
    pdb.write_text("\n".join([*lines[: atoms[0]], *changed, "END"]) + "\n")
    return pdb


@pytest.mark.parametrize(("suffix", "error"), [(".dcd", 1e-7), (".xtc", 6e-4), (".pdb", 6e-5)])
def test_frames_come_back_as_they_were_written(tmp_path, frames, pdb, suffix, error):
    path = tmp_path / f"b{suffix}"
    write_trajectory(path, frames, SYSTEM, frame_ps=2.0)
    again = mdtraj.load(str(path), **({} if suffix == ".pdb" else {"top": str(pdb)}))
    np.testing.assert_allclose(again.xyz, frames, rtol=0, atol=error)
    if suffix == ".xtc":
        np.testing.assert_allclose(again.time, [0, 2, 4])


def test_a_pdb_of_ours_is_read_and_one_of_openmm_too(pdb, frames, tmp_path):
    np.testing.assert_allclose(read_pdb(pdb, SYSTEM), frames[:1], rtol=0, atol=6e-5)
    app = pytest.importorskip("openmm.app")
    openmm = pytest.importorskip("openmm")
    loaded = app.PDBFile(str(pdb))
    with (tmp_path / "o.pdb").open("w") as file:
        app.PDBFile.writeFile(loaded.topology, frames[0].numpy() * openmm.unit.nanometer, file, keepIds=True)
    np.testing.assert_allclose(read_pdb(tmp_path / "o.pdb", SYSTEM)[0], frames[0], rtol=0, atol=6e-5)


def test_the_names_that_amber_gives_are_known(pdb, frames):
    methyl = {" C   NME": " CH3 NME"}
    methyl |= {f" H{i}  {name}": f"HH3{i} {name}" for i in (1, 2, 3) for name in ("ACE", "NME")}
    text = pdb.read_text()
    for ours, theirs in methyl.items():
        assert ours in text
        text = text.replace(ours, theirs)
    pdb.write_text(text)
    np.testing.assert_allclose(read_pdb(pdb, SYSTEM), frames[:1], rtol=0, atol=6e-5)


def swapped(lines):
    return [lines[1], lines[0], *lines[2:]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swapped, r"another order: atom 1 is \S+, not \S+"),
        (lambda lines: lines[:-1], r"another molecule.*lacks NME-\S+$"),
        (lambda lines: [line.replace(" CB ", " CX ") for line in lines], "lacks ALA-CB and has the unknown ALA-CX"),
        (lambda lines: [line.replace("ALA", "GLY") for line in lines], "has the unknown GLY-C"),
    ],
)
def test_other_atoms_are_refused(pdb, change, problem):
    rewritten(pdb, change)
    with pytest.raises(ValueError, match=problem):
        read_pdb(pdb, SYSTEM)


def test_the_other_hand_and_numbers_that_are_none_are_refused(tmp_path, frames, pdb):
    mirrored = frames * torch.tensor([1.0, 1.0, -1.0])
    for x, problem in (
        (mirrored, "frame 0 is D-alanine"),
        (frames.index_fill(0, torch.tensor(1), torch.nan), "frame 1 is not finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            write_trajectory(tmp_path / "c.dcd", x, SYSTEM)
    assert not (tmp_path / "c.dcd").exists()
    text = pdb.read_text()
    pdb.write_text(text.replace(text[text.index("ATOM") + 30 :][:8], "     nan", 1))
    with pytest.raises(ValueError, match="frame 0 is not finite"):
        read_pdb(pdb, SYSTEM)
    pdb.write_text(text)
    rewritten(pdb, lambda lines: [f"{line[:46]}{-float(line[46:54]):8.3f}{line[54:]}" for line in lines])
    with pytest.raises(ValueError, match="frame 0 is D-alanine, not L"):
        read_pdb(pdb, SYSTEM)


def test_other_endings_and_shapes_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"\.dcd, \.xtc, \.pdb"):
        write_trajectory(tmp_path / "a.mp4", frames, SYSTEM)
    with pytest.raises(ValueError, match=r"\(3, 21, 3\) are not those of \[frames, 22 atoms, 3\]"):
        write_trajectory(tmp_path / "a.dcd", frames[:, 1:], SYSTEM)
