"""Pictures of a map between temperatures: its losses, what it makes of torsions and energies, and molecules.

The colours are those of Okabe and Ito, which people who confuse red and green can tell apart; what belongs to a
temperature bears its colour, and what a map made of it another dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.molecule.free_energy import Profile
from tasks.molecule.observables import overlap

INK, GREY, BLUE, VERMILION, GREEN, ORANGE = "#222222", "#999999", "#0072B2", "#D55E00", "#009E73", "#E69F00"
LINES = ((INK, "-"), (VERMILION, "--"), (GREEN, "-."), (BLUE, ":"), (ORANGE, (0, (5, 1, 1, 1, 1, 1))))
DPI = 110
DEGREES = np.linspace(-180, 180, 5)
HIGHEST = 20.0  # kJ/mol of the colours of a plane; of 20,000 frames a single one in a bin stands some 12 high at 300 K
ENERGY_BINS = 60
# Radii in nm and colours of the balls; hydrogen's is white in every book, and so is its background.
BALLS = {"H": (0.03, "#FFFFFF"), "C": (0.05, "#666666"), "N": (0.05, BLUE), "O": (0.05, VERMILION)}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here, because it takes half a second that only who draws needs

    return Figure((width, height), dpi=DPI, layout="constrained")


# ---- training --------------------------------------------------------------------------------------------------------


def loss_curves(
    rows: Sequence[Mapping[str, Any]], file: Path | str, baselines: Mapping[str, float] | None = None
) -> None:
    """The four panels: the loss above its floor, its two directions, their energies and their log-determinants.

    Args:
        rows: of metrics.jsonl, with `step`, `loss`, `forward_energy`, `inverse_energy`, `forward_logdet` and
            `inverse_logdet` where `split` is "train", and with `gap` where it is "val".
        baselines: gaps of other maps by name, drawn as lines.
    """
    train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    steps = [row["step"] for row in train]
    parts = ("loss", "forward_energy", "inverse_energy", "forward_logdet", "inverse_logdet")
    nats = {name: np.array([row[name] for row in train], dtype=np.float64) for name in parts}
    figure = _figure(12, 8)
    total, ways, energies, logdets = figure.subplots(2, 2).flat
    total.plot(steps, nats["loss"], color=GREY, linewidth=1, label="training")
    total.plot(
        [row["step"] for row in val], [row["gap"] for row in val], "o-", color=INK, markersize=3, label="held out"
    )
    for (name, gap), (color, dash) in zip((baselines or {}).items(), LINES[1:], strict=False):
        total.axhline(gap, color=color, linestyle=dash, linewidth=1.2, label=f"{name}: {gap:.3g}")
    for way, color, dash in (("forward", BLUE, "-"), ("inverse", VERMILION, "--")):
        style = {"color": color, "linestyle": dash, "linewidth": 1.2, "label": way}
        energy, logdet = nats[f"{way}_energy"], nats[f"{way}_logdet"]
        ways.plot(steps, energy - logdet, **style)
        energies.plot(steps, energy, **style)
        logdets.plot(steps, logdet, **style)
    names = (
        "Loss above its floor (gap)",
        "Forward and inverse loss",
        "Energies βU of mapped frames",
        "Log-determinants",
    )
    for axes, name in zip((total, ways, energies, logdets), names, strict=True):
        axes.set(title=name, xlabel="optimizer step", ylabel="nats")
        axes.grid(color="0.92")
        _symlog(axes)
        axes.legend(fontsize="small", framealpha=1)
    figure.savefig(file)


def _symlog(axes: Any) -> None:
    """Logarithmic but around 0, where it is linear up to the decade of the smallest values but 2 %."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

    heights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    heights = heights[np.isfinite(heights) & (heights != 0)]
    least, most = np.quantile(np.abs(heights), [0.02, 1.0]) if heights.size else (1.0, 1.0)
    linear = 10.0 ** math.floor(math.log10(least))
    # As wide around 0 as the labels of -linear, 0 and linear need.
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5 + 0.05 * math.log10(most / linear))
    axes.autoscale_view()
    ticks = SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 2, 5) if most < 1000 * least else (1,))
    of_one_size = most < 10 * least and abs(np.sign(heights).sum()) == heights.size  # where powers of ten say little
    axes.yaxis.set_major_locator(MaxNLocator(6) if of_one_size else ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


# ---- ensembles -------------------------------------------------------------------------------------------------------


def ramachandran(planes: Mapping[str, np.ndarray], file: Path | str, columns: int = 3) -> None:
    """F(φ, ψ) of `free_energy.plane` by title, each above its own minimum, in colours that mean the same in all."""
    rows = -(-len(planes) // columns)
    figure = _figure(3.4 * columns + 1, 3.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(planes) :]:
        axes.set_axis_off()
    for axes, (title, energy) in zip(grid.flat, planes.items(), strict=False):
        shown = np.where(np.isfinite(energy), energy - energy.min(), np.nan).T  # φ to the right
        style = {"origin": "lower", "extent": (-180, 180, -180, 180), "cmap": "viridis", "interpolation": "nearest"}
        image = axes.imshow(shown, vmin=0, vmax=HIGHEST, **style)
        axes.set(title=title, xticks=DEGREES, yticks=DEGREES)
    for axes in grid[-1]:
        axes.set_xlabel("φ (degrees)")
    for axes in grid[:, 0]:
        axes.set_ylabel("ψ (degrees)")
    figure.colorbar(image, ax=grid, label="free energy above the minimum (kJ/mol)", shrink=0.8, extend="max")
    figure.savefig(file)


def energies(panels: Mapping[str, Mapping[str, np.ndarray]], file: Path | str) -> None:
    """Histograms of potential energies (kJ/mol, any shape) by panel and name. The first of a panel are the data: beside
    each of the others stands how far it overlaps with them, and what is so far off that it is not shown."""
    figure = _figure(5.8 * len(panels), 4.2)
    for axes, (title, named) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        truth = np.ravel(next(iter(named.values())))
        shown = np.quantile([np.quantile(np.ravel(values), [0.001, 0.999]) for values in named.values()], [0, 1])
        reach = truth.max() - truth.min()  # a frame that a map tore apart may be at 1e9
        edges = np.linspace(max(shown[0], truth.min() - reach), min(shown[1], truth.max() + reach), ENERGY_BINS + 1)
        for k, (name, values) in enumerate(named.items()):
            values, (color, dash) = np.ravel(values), LINES[k % len(LINES)]
            label = f"{name}: overlap {overlap(truth, values):.1%}" if k else name
            off = ((values < edges[0]) | (values > edges[-1])).mean()
            label += f", {off:.1%} not shown" if off > 0.003 else ""
            density = np.histogram(values, edges)[0] / (values.size * np.diff(edges))
            if not k:
                axes.stairs(density, edges, fill=True, color="0.88")
            axes.stairs(density, edges, color=color, linestyle=dash, linewidth=1.5, label=label)
        axes.set(title=title, xlabel="potential energy (kJ/mol)", ylabel="probability per kJ/mol", ylim=(0, None))
        axes.margins(x=0)
        _legend_above_the_lines(axes)
    figure.savefig(file)


def free_energies(panels: Mapping[str, Mapping[str, Profile]], file: Path | str) -> None:
    """Profiles with their 95 % bands by panel ("φ") and name. The minimum of a panel's first, the reference, is 0.

    Bins that some resamples have no frame in, whose bands have no upper end, are left out.
    """
    figure = _figure(5.8 * len(panels), 4.4)
    for axes, (angle, named) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        zero = next(iter(named.values())).free_energy.min()
        for (name, profile), (color, dash) in zip(named.items(), LINES, strict=False):
            degrees = np.rad2deg(profile.centers)
            known = np.isfinite(profile.free_energy) & ~np.isinf(profile.high)
            value, low, high = (np.where(known, energy - zero, np.nan) for energy in profile[1:])
            axes.fill_between(degrees, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(degrees, value, color=color, linestyle=dash, linewidth=1.5, label=name)
        axes.set(xlabel=f"{angle} (degrees)", ylabel=f"F({angle}) (kJ/mol)", xlim=(-180, 180), xticks=DEGREES)
        axes.grid(color="0.92")
        _legend_above_the_lines(axes)
    figure.savefig(file)


def _legend_above_the_lines(axes: Any) -> None:
    low, high = axes.get_ylim()
    names = axes.get_legend_handles_labels()[1]
    axes.set_ylim(low, high + (high - low) * 0.08 * len(names))
    axes.legend(fontsize="small", loc="upper left", frameon=False)


# ---- molecules -------------------------------------------------------------------------------------------------------


def molecules(
    frames: Mapping[str, np.ndarray],
    elements: Sequence[str],
    bonds: np.ndarray,
    root: Sequence[int],
    file: Path | str,
    columns: int = 4,
) -> None:
    """Balls and sticks of frames [N, 3] in nm by title, seen from above the plane of the three `root` atoms, of which
    the first and the last lie on a level. bonds: int [M, 2]."""
    turned = {title: _from_above(np.asarray(x, dtype=np.float64), root) for title, x in frames.items()}
    places = np.concatenate(list(turned.values()))[:, :2]
    (left, bottom), (right, top) = places.min(axis=0) - 0.06, places.max(axis=0) + 0.06
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    figure = _figure(3 * columns, (3 * (top - bottom) / (right - left) + 0.3) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, x) in zip(grid.flat, turned.items(), strict=False):
        _draw_molecule(axes, x, elements, bonds)
        axes.set(title=title, xlim=(left, right), ylim=(bottom, top), aspect="equal")
        axes.title.set_fontsize("small")
    figure.savefig(file)


def _from_above(x: np.ndarray, root: Sequence[int]) -> np.ndarray:
    left, middle, right = x[list(root)]
    along = (right - left) / np.linalg.norm(right - left)
    up = np.cross(middle - left, along)
    up /= np.linalg.norm(up)
    return (x - middle) @ np.stack([along, np.cross(up, along), up], axis=1)


def _draw_molecule(axes: Any, x: np.ndarray, elements: Sequence[str], bonds: np.ndarray) -> None:
    """The near over the far: each stick is drawn at its middle's height."""
    from matplotlib.patches import Circle

    for i, j in np.asarray(bonds):
        axes.plot(
            *x[[i, j], :2].T, color=INK, linewidth=2.2, solid_capstyle="round", zorder=2 + (x[i, 2] + x[j, 2]) / 2
        )
    for place, element in zip(x, elements, strict=True):
        radius, color = BALLS[element]
        axes.add_patch(Circle(place[:2], radius, facecolor=color, edgecolor=INK, linewidth=1, zorder=2 + place[2]))
