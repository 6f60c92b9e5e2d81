"""Pictures of a TEN in training, as hooks of the Trainer: what its eigenvalues remember, and its energy.

Trainer(model, config, task, hooks=[SpectrumPicture(), EnergyPicture()])

After every evaluation they write RUN/spectrum.json, as the model then is, and add to RUN/energy.jsonl; once a minute at
most, and at the end, they draw RUN/plots/spectrum.png and energy.png of these.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.energy import energy_bound
from models.spectrum import ScaleSpectrum, spectrum
from models.ten import TEN
from train.engine import Trainer
from train.engine.metrics import read_rows
from train.engine.run_folder import write_json, write_whole

ENERGY_TOKENS = 256  # of one validation window: a forward of these is what an evaluation pays for energy.png
HALF_LIFE_BINS = 24
SECONDS_BETWEEN_DRAWINGS = 60.0


def new_figure(width: float, height: float) -> Any:
    """Of so many inches, for a file. Without pyplot, whose backend is the choice of the notebook we may be called from;
    imported here because matplotlib takes half a second that only process 0 needs."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


class Picture:
    """What is drawn takes a second of process 0: not after every evaluation where they are close."""

    def __init__(self) -> None:
        self._drawn, self._draw = time.monotonic(), None

    def due(self, draw: Callable[[], None]) -> None:
        self._draw = draw
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS:
            self.finish()

    def finish(self) -> None:
        """Draw the newest, if it hasn't been drawn."""
        if self._draw is not None:
            self._draw()
            self._drawn, self._draw = time.monotonic(), None


class SpectrumPicture(Picture):
    """A hook: the half-lives and eigenvalues of every layer, head and scale, with those that do nothing counted."""

    def __call__(self, trainer: Trainer, row: dict[str, Any]) -> None:
        model = trainer.predict.whole()
        if model is None:
            return
        groups = spectrum(model)
        write_json(trainer.run_dir / "spectrum.json", {"step": row["step"], "groups": [g._asdict() for g in groups]})
        file, title = trainer.run_dir / "plots" / "spectrum.png", f"step {row['step']}"
        self.due(lambda: draw_spectrum(groups, file, title))


def draw_spectrum(groups: list[ScaleSpectrum], path: Path, title: str) -> None:
    """Half-lives by head, one panel a scale, above; eigenvalues in the unit disc, one panel a layer, below."""
    scales = list(dict.fromkeys(group.scale for group in groups))
    layers = list(dict.fromkeys(group.layer for group in groups))
    columns = min(len(layers), 6)
    rows_of_discs = -(-len(layers) // columns)
    width = max(2.7 * columns, 10.0)
    below_height = rows_of_discs * (0.55 * width / columns + 0.5)  # half a disc, its title and its ticks
    figure = new_figure(width, 3.6 + below_height)
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, below_height])
    for axis, scale in zip(above.subplots(1, len(scales), sharey=True, squeeze=False).flat, scales, strict=True):
        _half_lives(axis, [group for group in groups if group.scale == scale])
    discs = below.subplots(rows_of_discs, columns, squeeze=False).flat
    for axis in discs[len(layers) :]:
        axis.set_visible(False)
    for axis, layer in zip(discs, layers, strict=False):
        _disc(axis, [group for group in groups if group.layer == layer], scales)
    if len(scales) > 1:
        discs[0].legend(loc="lower center", fontsize="x-small", title="scale", title_fontsize="x-small")
    count = sum(len(group.head) for group in groups)
    dead, doubled = (sum(len(getattr(group, name)) for group in groups) for name in ("dead", "duplicates"))
    figure.suptitle(f"{title}: {count} eigenstates, {dead} dead (red), {doubled} duplicates (orange)")
    figure.savefig(path, dpi=110)


def _half_lives(axis: Any, groups: list[ScaleSpectrum]) -> None:
    """Histogram over all layers of one scale, stacked by head."""
    from matplotlib import colormaps

    heads = sorted({head for group in groups for head in group.head})
    of_head = [[t for g in groups for h, t in zip(g.head, g.half_life, strict=True) if h == head] for head in heads]
    every = [t for times in of_head for t in times]
    low, high = torch.tensor([min(every), max(every) * 1.001]).log10().tolist()
    colors = colormaps["viridis"](torch.linspace(0.1, 0.9, len(heads)).numpy())
    bins = torch.logspace(low, high, HALF_LIFE_BINS).tolist()
    axis.hist(of_head, bins=bins, stacked=True, color=colors, label=[f"head {head}" for head in heads])
    context, weighted = (statistics.median(getattr(g, n) for g in groups) for n in ("context", "weighted_context"))
    axis.set(
        xscale="log",
        xlabel="half-life in tokens",
        ylabel="eigenstates, all layers",
        title=f"scale {groups[0].scale}: context {context:,.0f} tokens, by contribution {weighted:,.0f}",
    )
    axis.title.set_fontsize("small")
    axis.legend(fontsize="x-small", ncols=-(-len(heads) // 8))


def _disc(axis: Any, groups: list[ScaleSpectrum], scales: list[int]) -> None:
    """Eigenvalues of one layer; a conjugate does the same, so all are drawn in the upper half."""
    angle = torch.linspace(0, torch.pi, 200)
    axis.plot(angle.cos(), angle.sin(), color="0.7", linewidth=0.8)
    for group in groups:
        eigenvalue = torch.polar(torch.tensor(group.magnitude), torch.tensor(group.phase))
        x, y = eigenvalue.real, eigenvalue.imag.abs()
        color = f"C{scales.index(group.scale)}" if len(scales) > 1 else "C0"
        axis.scatter(x, y, s=9, color=color, alpha=0.7, linewidths=0, label=str(group.scale))
        for positions, mark in ((group.duplicates, "orange"), (group.dead, "red")):
            axis.scatter(x[positions], y[positions], s=28, facecolors="none", edgecolors=mark, linewidths=0.9)
    axis.set(
        title=f"layer {groups[0].layer}", xlim=(-1.05, 1.05), ylim=(-0.05, 1.05), aspect="equal", xticks=[-1, 0, 1]
    )
    axis.title.set_fontsize("small")


class EnergyPicture(Picture):
    """A hook: how much the eigenstates hold of a validation window, beside what they could hold at most."""

    def __call__(self, trainer: Trainer, row: dict[str, Any]) -> None:
        model = trainer.predict.whole()
        if model is None:
            return
        window = trainer.backend.move(trainer.task.collate([trainer.task.val[0]]))
        with trainer.backend.autocast():
            new = energy_row(model, *(window[name][:, :ENERGY_TOKENS] for name in ("input_ids", "reset")))
        file = trainer.run_dir / "energy.jsonl"
        rows = [earlier for earlier in self._earlier(file, trainer) if _keys(earlier.get("scales")) == _keys(new)]
        # Rows of this step or later are from before a resume or a rewind, and did not happen.
        rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
        rows.append({"step": row["step"], "split": "val", "scales": new})
        write_whole(file, "".join(json.dumps(r) + "\n" for r in rows))
        self.due(lambda: draw_energy(rows, trainer.run_dir / "plots" / "energy.png"))

    @staticmethod
    def _earlier(file: Path, trainer: Trainer) -> list[dict[str, Any]]:
        try:
            return read_rows(file) if file.exists() else []
        except ValueError as error:  # nothing goes on from it: no reason to end a run
            trainer.book.say(f"damaged     {error}; the picture of energies begins anew")
            return []


def _keys(value: Any) -> Any:
    """What a JSON value is called inside, without its numbers."""
    return {key: _keys(inner) for key, inner in value.items()} if isinstance(value, dict) else isinstance(value, float)


def energy_row(model: TEN, input_ids: Tensor, reset: Tensor) -> dict[str, dict[str, float]]:
    """For each scale, over its layers and the positions where its states move: median sqrt(E) and bound, and the median
    and the largest ratio of the two."""
    found = energy_bound(model, input_ids, reset)
    row = {}
    for scale in dict.fromkeys(energy.scale for energy in found):
        root, bound = (
            torch.stack([getattr(energy, name) for energy in found if energy.scale == scale])
            for name in ("root", "bound")
        )
        # A document's first state and one that is held equal their bounds by definition: they say nothing, unless a
        # window is too short for any other.
        moved = (root - bound).abs() > 1e-5 * bound
        moved = moved if moved.any() else torch.ones_like(moved)
        root, bound = root[moved], bound[moved].clamp(min=torch.finfo(bound.dtype).tiny)
        row[str(scale)] = {
            "root": root.median().item(),
            "bound": bound.median().item(),
            "typical_ratio": (root / bound).median().item(),
            "max_ratio": (root / bound).max().item(),
        }
    return row


def draw_energy(rows: list[dict[str, Any]], path: Path) -> None:
    """Left sqrt(E) and its bound over training, right the ratio of the two, which nothing may take above 1."""
    figure = new_figure(11, 3.8)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for number, scale in enumerate(rows[0]["scales"]):
        lines = {name: [row["scales"][scale][name] for row in rows] for name in rows[0]["scales"][scale]}
        color, label = f"C{number}", f"scale {scale}"
        left.plot(steps, lines["root"], "o-", markersize=3, color=color, label=f"{label}: √E")
        left.plot(steps, lines["bound"], "--", color=color, linewidth=1.0, label=f"{label}: bound")
        right.plot(steps, lines["max_ratio"], "o-", markersize=3, color=color, label=f"{label}: largest")
        right.plot(steps, lines["typical_ratio"], ":", color=color, linewidth=1.2, label=f"{label}: median")
    right.axhline(1.0, color="0.3", linewidth=0.8)
    left.set(title="√E over layers and positions, median", xlabel="optimizer step", ylim=(0, None))
    right.set(title="√E / bound", xlabel="optimizer step", ylim=(0, 1.05))
    for axis in (left, right):
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
