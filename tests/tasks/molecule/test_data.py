from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.molecule import data
from tasks.molecule.data import make_data
from tasks.molecule.potential import Potential
from tasks.molecule.system import KB, is_l, load_system


class Springs:
    """Four particles, each pair of them on a spring: nothing holds the whole, as nothing holds a molecule.

    U is 4.5 k T in the mean, of the nine degrees of freedom that are left.
    """

    STIFFNESS = 1000.0  # kJ/mol/nm^2

    def __call__(self, x):
        return 2 * self.STIFFNESS * (x - x.mean(-2, keepdim=True)).square().sum((-2, -1))

    def energy_and_forces(self, x):
        return self(x), -4 * self.STIFFNESS * (x - x.mean(-2, keepdim=True))


POTENTIAL = Springs()
SPRINGS = SimpleNamespace(
    name="springs",
    force_field="harmonic",
    masses=np.array([1.0, 2.0, 4.0, 8.0]),
    positions=0.01 * np.eye(4)[:, :3],
    phi=(0, 1, 2, 3),
    psi=(3, 2, 1, 0),
    flip_axes=[([0, 1], [2, 3])],
    hash="springs",
)
LADDER = (300.0, 450.0, 670.0)
SMALL = {
    "groups": 3,
    "ps": 0.4,
    "frame_every_ps": 0.1,
    "swap_every_ps": 0.1,
    "equilibration_ps": 0.2,
    "ladder": LADDER,
    "dt": 0.005,
    "progress": False,
}


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))
    return tmp_path / "molecule"


def springs(temperatures=(300.0, 450.0), **settings):
    return make_data(SPRINGS, POTENTIAL, temperatures, **(SMALL | settings))


def files(folder):
    return sorted(file for file in folder.iterdir() if file.suffix != ".lock")


def test_frames_are_kept_by_group_and_temperature_with_their_energies(kept):
    made = springs()
    assert made.x.shape == (3, 2, 4, 4, 3) and made.x.dtype == torch.float32
    assert made.energies.shape == (3, 2, 4) and made.energies.dtype == torch.float64
    assert torch.equal(made.energies, POTENTIAL(made.x.double()))
    torch.testing.assert_close(made.x.mean(-2), torch.zeros(3, 2, 4, 3), atol=1e-7, rtol=0)
    assert made.info["ns"] == 0.0024 and made.info["ps"] == 0.4 and made.info["equilibration_ps"] == 0.2
    # 6 cycles of 20 steps at 3 temperatures in 3 groups; annealing, the first, has no swaps and no flips.
    assert made.info["energy_calls"] == 9 * (21 + 5 * 23)
    assert set(made.info["tau_ps"]) == {"energy", "phi", "psi"} and len(made.info["swap_acceptance"]) == 2


def test_the_same_settings_give_the_same_frames_and_another_seed_others(kept):
    first = springs()
    (file,) = files(kept)
    file.unlink()
    again, other = springs(), springs(seed=1)
    assert torch.equal(first.x, again.x) and torch.equal(first.energies, again.energies)
    assert (first.x != other.x).any(-1).any(-1).all()
    assert len(files(kept)) == 2
    pairs = itertools.combinations(first.x.flatten(2).unbind(0), 2)
    assert all((a != b).all(1).all() for a, b in pairs)  # no group is another's copy


def test_kept_frames_are_read_back_at_any_temperature_of_the_ladder(kept, monkeypatch):
    made = springs()
    monkeypatch.setattr(data, "_simulate", None)
    again, hot = springs(), springs((670.0, 300.0))
    assert torch.equal(made.x, again.x) and torch.equal(made.energies, again.energies) and made.info == again.info
    assert hot.temperatures == (670.0, 300.0) and torch.equal(hot.x[:, 1], made.x[:, 0])
    with pytest.raises(TypeError):
        springs(seed=1)


def test_who_asks_meanwhile_waits_for_what_is_being_made(monkeypatch):
    real, calls = data._simulate, []
    monkeypatch.setattr(data, "_simulate", lambda *args: calls.append(1) or real(*args))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: springs(), range(2))
    assert torch.equal(first.x, second.x) and len(calls) == 1


def other_energies(file):
    """A whole file that is not what was written."""
    with np.load(file) as kept:
        arrays = dict(kept)
    np.savez(file, **(arrays | {"energies": arrays["energies"] + 1e-9}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes().replace(b"energies", b"energy--")),
        other_energies,
    ],
    ids=["cut", "empty", "renamed", "other energies"],
)
def test_damaged_files_are_made_again_and_said_to_be(kept, capsys, damage):
    made = springs()
    (file,) = files(kept)
    damage(file)
    assert torch.equal(springs(progress=True).energies, made.energies)
    assert f"making trajectories again: {file} is not what was written" in capsys.readouterr().out
    assert files(kept) == [file]


def test_an_interrupted_making_leaves_nothing_behind(kept, monkeypatch):
    class Stopped(Springs):
        cycles = 0

        def __call__(self, x):
            self.cycles += x.shape[:2] == (3, 3)
            if self.cycles == 4:
                raise KeyboardInterrupt
            return super().__call__(x)

    with pytest.raises(KeyboardInterrupt):
        make_data(SPRINGS, Stopped(), **SMALL)
    assert files(kept) == []
    monkeypatch.setattr(data.np, "savez", lambda file, **arrays: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        springs()
    assert files(kept) == []


def test_limited_time_gives_fewer_frames_and_says_so(kept, monkeypatch, capsys):
    """A clock by which a cycle of dynamics takes a second: of 12 s, a third goes to equilibration."""
    real = data.langevin
    monkeypatch.setattr(data, "perf_counter", lambda: clock.now)
    clock = SimpleNamespace(now=0.0)

    def slow(*args, **settings):
        clock.now += 1
        return real(*args, **settings)

    for module in ("data", "tempering"):
        monkeypatch.setattr(f"tasks.molecule.{module}.langevin", slow)
    asked = {"ps": 3.04, "equilibration_ps": 2.0}
    made = springs(**asked, max_seconds=12.0, progress=True)
    assert made.info["seconds"] == 12 and made.info["ps"] == 0.8 and made.info["equilibration_ps"] == 0.4
    assert made.x.shape[2] == 8
    assert "as much as 12 s allow" in capsys.readouterr().out
    short = springs(**asked, max_seconds=0.0)
    assert short.x.shape[2] == 2  # the least that there can be
    whole = springs(**asked, max_seconds=1000.0)
    assert whole.info["ps"] == 3.1 and whole.info["equilibration_ps"] == 2.0
    monkeypatch.setattr(data, "_simulate", None)
    assert springs(**asked, max_seconds=12.0).info == whole.info  # what is whole serves every limit


def test_lines_tell_of_the_progress_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(data, "SECONDS_BETWEEN_LINES", 0.0)
    springs(progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "making 3 trajectories of 0.6 ps at 300, 450, 670 K"
    assert lines[3].startswith("0.3 of 0.6 ps after ") and lines[-1].startswith("made 0.6 ps of each in ")
    springs(progress=False, seed=2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"groups": 0, "dt": 0.0}, r"groups=0: more than 0 is needed; dt=0\.0: more than 0 is needed"),
        ({"ps": 0.1}, r"ps=0\.1: 2 frames, 0\.2 ps, are the least"),
        ({"ladder": (450.0, 300.0)}, "the coldest first"),
        ({"equilibration_ps": -1.0}, "0 or more is needed"),
        ({"temperatures": (300.0, 500.0)}, "500 K is not on the ladder of 300, 450, 670 K"),
        ({"dt": 0.2, "frame_every_ps": 20.0, "ps": 200.0}, "not finite after .* a smaller dt"),
    ],
)
def test_settings_that_cannot_be(settings, problem):
    with pytest.raises(ValueError, match=problem):
        springs(**settings)


@pytest.mark.parametrize(
    ("frame", "moves", "steps", "swaps"), [(0.1, (1, 5), 20, 4), (0.5, (1, 1), 100, 4), (1.0, (2, 1), 100, 4)]
)
def test_frames_may_be_nearer_or_farther_than_swaps(frame, moves, steps, swaps):
    recipe = data.Recipe("springs", LADDER, 2, 2.0, frame, 0.5, 0.0, 0.005, 0, "cpu")
    assert recipe.moves == moves and recipe.steps == steps
    made = springs(ps=2.0, frame_every_ps=frame, swap_every_ps=0.5, equilibration_ps=0.0)
    assert made.info["energy_calls"] == 9 * (recipe.frames * moves[0] * (steps + 1) + 2 * swaps)


def test_every_temperature_has_its_own_energies():
    """After five relaxation times; means of 400 samples, three standard errors of which are 8 %."""
    made = springs(LADDER, groups=200, ps=1.0, frame_every_ps=0.5, equilibration_ps=5.0)
    found = made.energies.mean((0, 2)) / (4.5 * KB)
    np.testing.assert_allclose(found, LADDER, rtol=0.08)


def test_a_little_of_the_real_molecule():
    system = load_system()
    potential = Potential(system)
    settings = {"groups": 3, "ps": 0.06, "frame_every_ps": 0.02, "equilibration_ps": 0.04, "progress": False}
    made = make_data(system, potential, **settings)
    assert made.x.shape == (3, 2, 3, 22, 3)
    assert is_l(made.x.flatten(0, 2)).all()
    torch.testing.assert_close(made.energies, potential(made.x.double()), rtol=1e-12, atol=0)
    assert made.info["system"] == system.hash
