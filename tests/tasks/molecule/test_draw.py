from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tasks.molecule import draw
from tasks.molecule.free_energy import plane, profile

ANGLES = np.random.default_rng(0).normal(-1.5, 0.5, (4, 500))


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that would be saved: saving takes a second, which one test spends."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file: kept.append(self))
    return kept


def row(step: int, gap: float) -> dict[str, Any]:
    parts = {"forward_energy": 1e3 * gap - 9, "inverse_energy": -28.0, "forward_logdet": 11.0, "inverse_logdet": -11.0}
    return {"split": "train", "step": step, "loss": gap, **parts}


def labels(axes: Any) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_the_four_panels_of_a_loss(tmp_path, figures):
    rows = [row(step, 1e12 * math.exp(-step)) for step in range(40)]
    rows += [{"split": "val", "step": 20, "gap": 0.7}, {"split": "val", "step": 39, "gap": 0.06}]
    draw.loss_curves(rows, tmp_path / "a.png", {"√T map": 0.543})
    total, ways, energies, logdets = figures[0].axes
    assert [axes.get_yscale() for axes in figures[0].axes] == ["symlog"] * 4
    assert labels(total) == ["training", "held out", "√T map: 0.543"]
    assert total.lines[1].get_ydata().tolist() == [0.7, 0.06]
    forward, inverse = ways.lines
    assert forward.get_ydata()[-1] == pytest.approx(rows[39]["forward_energy"] - 11) and inverse.get_ydata()[0] == -17
    assert energies.lines[1].get_ydata()[0] == -28 and logdets.lines[0].get_ydata()[0] == 11
    low, high = total.get_ylim()
    assert -1 < low < 0.06 and 1e12 < high < 1e14


@pytest.mark.parametrize("first", [0.5, 1e13])
def test_labels_of_the_loss_do_not_overlap(first, tmp_path, figures):
    rows = [row(step, first * 0.9**step + 0.05) for step in range(300)]
    draw.loss_curves(rows, tmp_path / "a.png")
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:
        low, high = axes.get_ylim()
        ticks = [tick for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = sorted((tick.label1.get_window_extent() for tick in ticks), key=lambda box: box.y0)
        assert len(boxes) >= 3
        assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_a_loss_may_be_missing_or_not_finite(tmp_path):
    file = tmp_path / "a.png"
    draw.loss_curves([row(0, math.nan), row(1, math.inf), {**row(2, 0.4), "loss": None}], file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_planes_share_their_colours_and_are_periodic(tmp_path, figures):
    planes = {
        "300 K": plane(ANGLES, ANGLES + 3, 300),
        "450 K": plane(ANGLES, 2 * ANGLES, 450),
        "mapped": plane(ANGLES + 0.1, ANGLES, 300),
        "reweighted": plane(ANGLES, ANGLES, 300),
    }
    draw.ramachandran(planes, tmp_path / "a.png")
    images = [axes.images[0] for axes in figures[0].axes if axes.images]
    assert [axes.get_title() for axes in figures[0].axes if axes.images] == list(planes)
    assert {image.get_clim() for image in images} == {(0, draw.HIGHEST)}
    assert images[0].get_extent() == [-180, 180, -180, 180]
    shown = images[0].get_array()
    assert shown.min() == 0
    row, column = np.unravel_index(shown.argmin(), shown.shape)
    assert column < 30 < row  # φ < 0 is on the left, ψ > 0 above


def test_histograms_say_what_they_share_and_what_they_do_not_show(tmp_path, figures):
    data = -70 + 13 * np.linspace(-2, 2, 4000).reshape(4, 1000)
    torn = np.where(np.arange(4000).reshape(4, 1000) % 10 == 0, 1e12, data)
    draw.energies({"300 K": {"data": data, "mapped": data + 2, "torn": torn}}, tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert labels(axes)[0] == "data" and labels(axes)[2] == "torn: overlap 90.0%, 10.1% not shown"
    assert axes.get_xlim()[1] < 100
    areas = [np.sum(stairs.get_data().values * np.diff(stairs.get_data().edges)) for stairs in axes.patches[1:]]
    assert areas == pytest.approx([1, 1, 0.9], abs=0.01)


def test_profiles_have_bands_and_leave_out_what_is_not_known(tmp_path, figures):
    named = {"data": profile(ANGLES, 300), "mapped": profile(ANGLES + 0.1, 300), "one group": profile(ANGLES[:1], 300)}
    draw.free_energies({"φ": named, "ψ": named}, tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert labels(axes) == list(named) and len(axes.collections) == 3
    data = axes.lines[0].get_ydata()
    assert np.nanmin(data) == 0 and np.isnan(data[-1])
    unknown = np.isinf(named["data"].high)
    assert np.isnan(data[unknown]).all() and np.isfinite(named["data"].free_energy[unknown]).any()
    assert np.isfinite(axes.lines[2].get_ydata()).any()


def test_a_molecule_is_seen_from_above_its_root(tmp_path, figures):
    x = np.array([[0.0, 0, 0], [0.1, 0.1, 0], [0.2, 0, 0], [0.1, 0.2, 0.1]])
    turn, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    frames = {"as it is": x, "turned": x @ turn + 5}
    draw.molecules(frames, ["N", "C", "C", "H"], np.array([[0, 1], [1, 2], [1, 3]]), (0, 1, 2), tmp_path / "a.png")
    one, other = figures[0].axes
    centers = [np.array([ball.center for ball in axes.patches]) for axes in (one, other)]
    np.testing.assert_allclose(centers[0], (x - x[1])[:, :2] * [1, -1], atol=1e-12)
    np.testing.assert_allclose(centers[1], centers[0], atol=1e-9)
    near, far = one.patches[3], one.patches[1]
    assert near.get_zorder() != far.get_zorder()
