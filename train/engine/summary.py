"""What is left when a run ends: results.json, a report a person can read, and the loss curves."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.engine.backend import Backend
from train.engine.evaluation import aside
from train.engine.metrics import read_rows
from train.engine.plan import peak_flops
from train.engine.precision import matmul_rate
from train.engine.run_folder import command_line, read_json, write_json

if TYPE_CHECKING:
    from train.engine.trainer import Trainer


@dataclass
class Results:
    """results.json. `final` and `best` hold validation scores by name; `seconds` include resumed parts."""

    steps: int
    parameters: int
    final: dict[str, float]
    best: dict[str, float]
    items_per_second: float | None
    peak_memory_bytes: int
    planned_memory_bytes: int
    seconds: float
    command: str
    stopped_by: str
    # What items_per_second counts, e.g. tokens, and what it could be at most: the whole step as matmuls alone.
    item_name: str = "items"
    ceiling_items_per_second: float | None = None
    # Share of the device's data-sheet FLOP/s, None where that isn't known.
    mfu: float | None = None
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    # What a script adds: baselines, checks.
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / "results.json", asdict(self))

    @classmethod
    def load(cls, run_dir: Path) -> Results:
        return cls(**read_json(run_dir / "results.json"))

    def lines(self) -> list[str]:
        used, planned = (size / 2**30 for size in (self.peak_memory_bytes, self.planned_memory_bytes))
        speed = "n/a"
        if self.items_per_second:
            speed = f"{self.items_per_second:,.0f} {self.item_name}/s (warm-up left out)"
        if self.items_per_second and self.ceiling_items_per_second:
            share = self.items_per_second / self.ceiling_items_per_second
            speed += f", {share:.0%} of this machine's matmul ceiling of {self.ceiling_items_per_second:,.0f}"
        total = sum(self.seconds_by_phase.values()) or 1.0
        phases = ", ".join(f"{name} {s / total:.0%}" for name, s in self.seconds_by_phase.items())
        return [
            f"steps       {self.steps} in {self.seconds:.0f} s, ended by {self.stopped_by}",
            f"speed       {speed}; MFU {'n/a' if self.mfu is None else f'{self.mfu:.1%}'}",
            f"memory      {used:.2f} GiB at most, {planned:.2f} planned",
            f"time        {phases}",
            f"final       {_scores(self.final)}",
            f"best        {_scores(self.best)}",
            *(f"{name:<11} {_scores(value)}" for name, value in self.report.items() if _is_flat(value)),
            f"again       {self.command}",
        ]


def _is_flat(value: Any) -> bool:
    """Scores by name, short enough for a line."""
    return isinstance(value, dict) and not any(isinstance(v, (dict, list)) for v in value.values())


def _scores(scores: dict[str, float]) -> str:
    return "  ".join(f"{k}={_number(v)}" for k, v in scores.items())


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finish(trainer: Trainer, stopped_by: str) -> Results:
    """Last evaluation and checkpoint, then results.json, metrics.csv, the plot and the printed report."""
    progress, backend, book = trainer.progress, trainer.backend, trainer.book
    if progress.last.get("step") != progress.step:
        trainer.evaluate()
    elif trainer.told_step != progress.step:  # an earlier process evaluated and saved the last step, and then died
        row = {"step": progress.step, "split": "val", **progress.last["scores"], "elapsed": book.elapsed}
        with aside(trainer.predict.model):
            trainer.tell_hooks(row)
    if trainer.saved_step != progress.step:
        trainer.save()
    for hook in trainer.hooks:
        if hasattr(hook, "finish"):
            hook.finish()
    ceiling, mfu = _against_the_machine(trainer)
    results = Results(
        steps=progress.step,
        parameters=trainer.plan.num_parameters,
        final=progress.last["scores"],
        best=progress.best[0]["scores"] if progress.best else {},
        items_per_second=book.items_per_second,
        peak_memory_bytes=peak_memory(backend.device),
        planned_memory_bytes=trainer.plan.needed,
        seconds=book.elapsed,
        command=command_line(),
        stopped_by=stopped_by,
        item_name=trainer.task.item_name,
        ceiling_items_per_second=ceiling,
        mfu=mfu,
        seconds_by_phase=trainer.clock.collect(),
        skipped_steps=progress.skipped_steps,
        report=trainer.report,
    )
    book.complete()
    book.close()
    if trainer.folder is not None:
        plot_curves(trainer.run_dir, trainer.report.get("baselines", {}), trainer.task.monitor)
        results.save(trainer.run_dir)
        trainer.folder.describe(state="finished", stopped_by=stopped_by)
        for line in results.lines():
            book.say(line)
    return results


def already_finished(trainer: Trainer) -> Results:
    """What a run came to. Its process may have died after results.json, before others were told of the end."""
    results = Results.load(trainer.run_dir)
    if trainer.folder is not None:
        trainer.folder.describe(state="finished", stopped_by=results.stopped_by)
        trainer.book.enter_in_database(trainer.run_dir)
    trainer.book.say(f"{trainer.run_dir} is finished; its results are in {trainer.run_dir / 'results.json'}")
    trainer.close()
    return results


def cpu_matmul_rate(backend: Backend) -> float:
    """FLOP/s of a large matmul in the run's precision, 0 where the device isn't a CPU."""
    if backend.device.type != "cpu":
        return 0.0
    return matmul_rate(backend.device, backend.autocast_dtype or torch.float32, size=2048, seconds=0.5)


def _against_the_machine(trainer: Trainer) -> tuple[float | None, float | None]:
    """(items per second if a step were its matmuls alone, measured on a CPU; share of a GPU's data-sheet FLOP/s)."""
    backend, book = trainer.backend, trainer.book
    if book.items_per_step is None or not trainer.plan.flops_per_step:
        return None, None
    flops_per_item = trainer.plan.flops_per_step / book.items_per_step
    if backend.device.type == "cpu":
        # A shared machine's speed drifts: the better of two measurements, one before training and one after.
        rate = max(trainer.matmul_rate_before, cpu_matmul_rate(backend))
        return rate * backend.world_size / flops_per_item, None
    peak = peak_flops(backend.device, backend.precision)
    if peak is None or book.items_per_second is None:
        return None, None
    return None, book.items_per_second * flops_per_item / backend.world_size / peak


def plot_curves(run_dir: Path, floors: dict[str, float], monitor: str) -> None:
    """plots/loss.png: every training part, and the monitored validation score with its floors as lines."""
    from matplotlib.figure import Figure  # no pyplot, whose backend is a notebook's own choice; here, for it is slow

    rows = read_rows(run_dir / "metrics.jsonl")
    train = [r for r in rows if r["split"] == "train"]
    val = [r for r in rows if r["split"] == "val"]
    parts = [n for n in (train[0] if train else {}) if n == "loss" or n.endswith("_loss")]
    rows_of_axes = -(-(len(parts) + 2) // 3)
    figure = Figure(figsize=(12, 3.4 * rows_of_axes), layout="constrained")
    axes = list(figure.subplots(rows_of_axes, 3).flat)
    for unused in axes[len(parts) + 2 :]:
        unused.set_visible(False)
    axes = axes[: len(parts) + 2]
    for axis, name in zip(axes, [*parts, "lr"], strict=False):
        axis.plot([r["step"] for r in train], [r[name] for r in train], linewidth=1.2)
        axis.set(title=name, xlabel="optimizer step")
        if name == "loss" and val and "loss" in val[0]:
            axis.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", markersize=3, label="validation")
            axis.legend()
    axes[-1].plot([r["step"] for r in val], [r[monitor] for r in val], "o-", markersize=3)
    for number, (name, value) in enumerate(floors.items()):
        axes[-1].axhline(value, linestyle="--", linewidth=0.8, color=f"C{number + 1}", label=name)
    if floors:
        axes[-1].legend(fontsize="small")
    axes[-1].set(title=f"validation {monitor}", xlabel="optimizer step")
    figure.savefig(run_dir / "plots" / "loss.png", dpi=110)
