"""What a molecular run says while it trains, as the original said it: the banner, the bar, a block of lines for an
epoch, and a warning where a sign of trouble shows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from train.engine import Trainer
from train.engine.metrics import Bar, Row, read_rows

PARTS = ("loss", "forward_energy", "inverse_energy", "forward_logdet", "inverse_logdet", "floor")
RULE = "=" * 70

# The original's signs, in epochs as it counted them, and one of ours. Its losses were of 1e13, here nats above a floor.
WINDOW = 20  # epochs that are averaged, so that a sign is not one batch's
RISING_AFTER, STUCK_AFTER = 100, 500
RISE, MARGIN = 1.2, 0.02  # times the least loss so far, and nats more, for near 0 every wiggle is large
BELOW = -0.1  # nats, of what no map of the ensembles can be below
EXPLODED = 10.0  # nats that the inverse energy rises
STUCK = 0.9  # times the scaling map's gap


def is_logged(epoch: int) -> bool:
    """Every epoch to 10, every tenth to 100, then every hundredth."""
    return epoch >= 1 and (epoch <= 10 or (epoch <= 100 and epoch % 10 == 0) or epoch % 100 == 0)


def banner(
    model: str, temperatures: tuple[float, float], epochs: float | None, batch_size: int, lr: float
) -> list[str]:
    cold, hot = temperatures
    length = "as many as the time allows" if epochs is None else f"{epochs:g}"
    return [
        RULE,
        "Molecular Cross-Temperature Transport Training",
        RULE,
        f"Model: {model}",
        f"Transport: {cold:.1f}K → {hot:.1f}K",
        f"Epochs: {length}, Batch size: {batch_size}, LR: {lr:g}",
        RULE,
    ]


# ---- signs of trouble ------------------------------------------------------------------------------------------------


def warning_signs(history: Sequence[Row], scaling_gap: float) -> dict[str, str]:
    """What is wrong by the means of all epochs so far, as a sentence by name; mostly nothing.

    history: a row an epoch, of the loss's parts in nats and the steps that were `skipped`. scaling_gap: of the map
    without parameters, on the same frames.
    """
    found = {}
    losses = [row["loss"] for row in history]
    # Newest first.
    windows = [fmean(losses[end - WINDOW : end]) for end in range(len(losses), WINDOW - 1, -WINDOW)]
    last = history[-1]
    if last["skipped"] or not all(abs(last[name]) < float("inf") for name in PARTS):
        found["not finite"] = (
            f"{last['skipped']:.0f} steps of this epoch were left out, their loss or gradient not finite or leaping; "
            "lower --lr"
        )
    if len(history) > RISING_AFTER and windows[0] > RISE * min(windows) + MARGIN:
        found["rising"] = (
            f"the loss is rising, {windows[0]:.3f} after {min(windows):.3f}; lower --lr, or train a larger model"
        )
    if windows and windows[0] < BELOW:
        found["below its floor"] = (
            f"the loss is {windows[0]:.3f}, and no map's is below 0 but on frames that it knows by heart: make more "
            "data with --ns, or train a smaller model"
        )
    energies = {name: last[name] - history[0][name] for name in ("forward_energy", "inverse_energy")}
    if energies["inverse_energy"] > EXPLODED and energies["forward_energy"] <= 0:
        found["inverse exploding"] = (
            f"the inverse energy has risen by {energies['inverse_energy']:.1f} nats while the forward energy fell; the "
            "inverse direction fails, which a larger model or a lower --lr may mend"
        )
    if len(history) > STUCK_AFTER and windows[0] > STUCK * scaling_gap:
        found["stuck"] = (
            f"the loss is stuck at {windows[0]:.3f}, where the map without parameters has {scaling_gap:.3f}; train a "
            "larger model, as of --preset aa_300_450, or raise --lr"
        )
    return found


# ---- rows on their way to people -------------------------------------------------------------------------------------


class Epochs:
    """Takes the rows of a run as a tracker does, and says a block of lines after the epochs of `is_logged`.

    start_gap: the mean loss of the first epoch is what improvement is measured from, as the original did; that over the
    scaling map, from scaling_gap. `warnings` has each sign with the first epoch that it showed in.
    """

    def __init__(self, trainer: Trainer, scaling_gap: float) -> None:
        self.trainer, self.scaling_gap = trainer, scaling_gap
        self._restart()

    def _restart(self) -> None:
        self.history: list[Row] = []
        self.warnings: dict[str, int] = {}
        self.step, self._rows = 0, []

    def log(self, row: Row) -> None:
        if row["split"] != "train":
            return
        # After a resume or a rewind: what came before is in metrics.jsonl, and has been said.
        if row["step"] <= self.step or (self.step == 0 and row["step"] > 1):
            self._restart()
            file = self.trainer.run_dir / "metrics.jsonl"
            for earlier in read_rows(file):
                if earlier["split"] == "train" and earlier["step"] < row["step"]:
                    self._add(earlier)
        for line in self._add(row):
            self.trainer.book.say(line)

    def close(self) -> None:
        pass

    def _add(self, row: Row) -> list[str]:
        """What is to be said after this row."""
        per_epoch = self.trainer.order.steps_per_epoch
        before, epoch = (int(step / per_epoch + 1e-9) for step in (self.step, row["step"]))
        self._rows.append((row["step"] - self.step, row))
        self.step = row["step"]
        if epoch == before:
            return []
        steps = sum(count for count, _ in self._rows)
        means = {name: sum(count * r[name] for count, r in self._rows) / steps for name in PARTS}
        means |= {"skipped": sum(r["skipped"] for _, r in self._rows), "lr": row["lr"]}
        self._rows = []
        self.history += [means] * (epoch - before)  # where a step is longer than an epoch, or a row
        lines = self.block(epoch) if any(map(is_logged, range(before + 1, epoch + 1))) else []
        signs = warning_signs(self.history, self.scaling_gap)
        new = {name: said for name, said in signs.items() if name not in self.warnings}
        self.warnings |= dict.fromkeys(new, epoch)
        return lines + [f"⚠ epoch {epoch}: {said}" for said in new.values()]

    def block(self, epoch: int) -> list[str]:
        now, total = self.history[-1], self.trainer.progress.total_steps
        of = "?" if total is None else f"{total / self.trainer.order.steps_per_epoch:.0f}"
        lines = [
            f"Epoch {epoch}/{of}",
            f"  Total Loss: {now['loss']:.4e} nats above the floor of {now['floor']:.4f}",
            f"  Forward  - Energy: {now['forward_energy']:.4e}, LogDet: {now['forward_logdet']:.4f}",
            f"  Inverse  - Energy: {now['inverse_energy']:.4e}, LogDet: {now['inverse_logdet']:.4f}",
            f"  LR: {now['lr']:.2e}",
        ]
        if epoch > 1:
            lines.append(f"  Improvement from start: {improvement(self.history[0]['loss'], now['loss'])}")
        return [*lines, f"  Improvement over the scaling map: {improvement(self.scaling_gap, now['loss'])}"]


def improvement(start: float, now: float) -> str:
    """By how much of the way to the floor `now` is closer than `start`."""
    return f"{100 * (1 - now / start):.2f}%"


class OriginBar(Bar):
    """The engine's bar under the original's names; gap and acceptance are those of the last evaluation, held out."""

    held_out: dict[str, float] | None = None

    def show(self, row: Row, total: int | None) -> None:
        shown: dict[str, Any] = {"Loss": row["loss"], "Fwd_E": row["forward_energy"], "Inv_E": row["inverse_energy"]}
        for name in ("gap", "acceptance"):
            if self.held_out is not None:
                shown[name] = self.held_out[name]
        super().show({**shown, **{name: row[name] for name in ("step", "lr", "items_per_second")}}, total)
