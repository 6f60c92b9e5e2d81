"""What a molecular run leaves for people: scores of held-out groups beside baselines, pictures, the weights as .pt."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.cache import renamed
from tasks.molecule import draw
from tasks.molecule.estimates import over_groups
from tasks.molecule.free_energy import basin_free_energy, free_energy_error, in_basin, plane, profile, total_variation
from tasks.molecule.observables import acceptance_across, dihedral, ensemble_slope, gap_by_group, overlap
from tasks.molecule.task import Mapped, MoleculeTask, Transport, in_float64
from train.engine import Trainer
from train.engine.checkpoint import load_weights
from train.engine.metrics import Row, read_rows
from train.molecular_epochs import Epochs

TIMED_PAIRS = 64
SECONDS_OF_PICTURES = 15.0  # four pictures, and the intervals of some thousand pairs
SHOWN_MOLECULES = 4
# Of other maps, what `final` has beside the flow's; all of it is in the report's "maps".
COLUMNS = ("acceptance_bound", "validity", "ess_forward", "ess_inverse", "k_hat", "chirality", "phi_error", "psi_error")
HEADLINE = ("gap", "gap_se", "acceptance", "acceptance_low", "acceptance_high", *COLUMNS)


class Report:
    """At the end, what the best checkpoint's map is worth on the test groups, by which nothing was chosen: it becomes
    the `final` of results.json, with the same of the maps that it must beat under scaling_, affine_ and plain_.

    baselines: such maps of float64 tensors, by name. `seconds_at_end`: see `Trainer`.
    """

    def __init__(self, task: MoleculeTask, baselines: Mapping[str, Transport], epochs: Epochs, preset: str) -> None:
        self.task, self.baselines, self.epochs = task, baselines, epochs
        self.preset, self.suffix = preset, "_".join(f"{t:g}" for t in task.temperatures)
        self.trainer: Trainer | None = None
        self.seconds_at_end = 0.0

    def __call__(self, trainer: Trainer, row: Row) -> None:
        first, self.trainer = self.trainer is None, trainer
        trainer.book.bar.held_out = row
        if first and (model := trainer.predict.whole()) is not None:
            few = self.task.test.thinned(TIMED_PAIRS)
            started = time.perf_counter()
            self.task.mapped(in_float64(model), few)
            each = (time.perf_counter() - started) / len(few)
            self.seconds_at_end = SECONDS_OF_PICTURES + each * len(self.task.test) * (1 + len(self.baselines))

    def saved(self, trainer: Trainer) -> None:
        """The newest weights, as the original kept them."""
        if (model := trainer.predict.whole()) is not None:
            self.write_weights(trainer, model)

    def write_weights(self, trainer: Trainer, model: nn.Module) -> Path:
        file = weights_file(trainer.run_dir, self.preset, self.task)
        file.parent.mkdir(exist_ok=True)
        with renamed(file) as temporary:
            torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, temporary)
        return file

    def finish(self) -> None:
        trainer = self.trainer
        model = trainer.predict.whole()
        if model is None:
            return
        model = best_of(trainer, model)
        file = self.write_weights(trainer, model)
        maps = {"flow": in_float64(model), **self.baselines}
        mapped = {name: self.task.mapped(transport, self.task.test) for name, transport in maps.items()}
        scores = {name: test_scores(self.task, of) for name, of in mapped.items()}
        scores["flow"] |= gain(self.task, mapped["flow"], mapped["scaling"])
        final = dict(scores["flow"])
        for name in self.baselines:
            final |= {f"{name}_{column}": scores[name][column] for column in HEADLINE}
        trainer.progress.last["scores"] = final
        trainer.report |= {"maps": scores, "warnings": self.epochs.warnings}
        trainer.report["data_check"] = data_check(self.task, mapped["plain"])
        trainer.book.say(*table(scores), f"weights     {file}")
        self.draw(trainer.run_dir / "plots", mapped["flow"], mapped["scaling"])

    def draw(self, plots: Path, flow: Mapped, scaling: Mapped) -> None:
        """Four pictures under the original's names, and one of molecules before and after."""
        task, (cold, hot) = self.task, self.task.temperatures
        forward, inverse = flow.log_ratios(task.betas)
        rows = read_rows(plots.parent / "metrics.jsonl")
        draw.loss_curves(rows, plots / f"loss_curves_{self.suffix}.png", self.trainer.report["baselines"])
        angles = {name: torsions(task, getattr(flow, name)) for name in ("cold", "hot", "to_hot", "to_cold")}
        planes = {
            f"{cold:g} K": plane(*angles["cold"], cold),
            f"{cold:g} K from {hot:g} K": plane(*angles["to_cold"], cold),
            f"{cold:g} K from {hot:g} K, reweighted": plane(*angles["to_cold"], cold, inverse),
            f"{hot:g} K": plane(*angles["hot"], hot),
            f"{hot:g} K from {cold:g} K": plane(*angles["to_hot"], hot),
            f"{hot:g} K from {cold:g} K, reweighted": plane(*angles["to_hot"], hot, forward),
        }
        draw.ramachandran(planes, plots / f"ramachandran_{self.suffix}.png")
        energies = {
            f"{t:g} K": {"data": data, "flow": getattr(flow, name), "scaling map": getattr(scaling, name)}
            for t, data, name in ((cold, flow.cold_energy, "to_cold_energy"), (hot, flow.hot_energy, "to_hot_energy"))
        }
        draw.energies(energies, plots / f"energy_validation_{self.suffix}.png")
        profiles = {
            letter: {
                f"{cold:g} K": profile(angles["cold"][k], cold),
                f"from {hot:g} K": profile(angles["to_cold"][k], cold),
                "and reweighted": profile(angles["to_cold"][k], cold, inverse),
            }
            for k, letter in enumerate("φψ")
        }
        draw.free_energies(profiles, plots / f"free_energy_{self.suffix}.png")
        frames = {}
        for k in torch.linspace(0, flow.cold.shape[1] - 1, SHOWN_MOLECULES).long().tolist():
            frames |= {
                f"frame {k} at {cold:g} K": flow.cold[0, k].numpy(),
                f"frame {k} at {hot:g} K": flow.to_hot[0, k].numpy(),
            }
        system = task.system
        root = system.phi[1:]  # N, CA, C
        draw.molecules(frames, system.elements, system.bonds.atoms, root, plots / f"molecules_{self.suffix}.png")


def weights_file(run_dir: Path, preset: str, task: MoleculeTask) -> Path:
    """What a model's `load_state_dict` takes, as the original called it: of the best checkpoint once a run is over."""
    cold, hot = task.temperatures
    return run_dir / "checkpoints" / f"molecular_pt_{preset}" / f"molecular_pt_{cold:g}_{hot:g}.pt"


def best_of(trainer: Trainer, model: nn.Module) -> nn.Module:
    """A copy with the weights of the best checkpoint; those of the model where no evaluation was finite."""
    best = copy.deepcopy(model)
    folder = trainer.snapshot.checkpoints.folder / "best-1"
    if folder.exists():
        load_weights(best, folder / ("ema.safetensors" if trainer.config.ema_decay else "model.safetensors"))
    return best


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores(task: MoleculeTask, mapped: Mapped) -> dict[str, float]:
    """The task's scores, and how mapped frames are spread: free energies in kJ/mol at the cold temperature, of hot
    frames that were mapped and reweighted, set against those of the cold frames themselves."""
    scores, cold, (forward, weights) = task.scores(mapped), task.temperatures[0], mapped.log_ratios(task.betas)
    direct, again, hot = (torsions(task, x) for x in (mapped.cold, mapped.to_cold, mapped.hot))
    scores["acceptance_across"] = acceptance_across(forward, weights, in_basin(direct[0]), in_basin(hot[0]))
    for name, truth, found in zip(("phi", "psi"), direct, again, strict=True):
        pair = profile(found, cold, weights).free_energy, profile(truth, cold).free_energy
        scores[f"{name}_error_max"], scores[f"{name}_error"] = free_energy_error(*pair)
    scores["ramachandran_tv"] = total_variation(again, direct, weights)
    for name, phi, of in (("left_handed", again[0], weights), ("left_handed_direct", direct[0], None)):
        basin = basin_free_energy(phi, cold, of)
        known = {name: float(basin.value), f"{name}_se": float(basin.error)}
        # No error is known where a group never was there: JSON has no NaN.
        scores |= {key: value for key, value in known.items() if np.isfinite(value)}
    scores["energy_overlap"] = overlap(mapped.hot_energy, mapped.to_hot_energy)
    return scores


def torsions(task: MoleculeTask, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """phi and psi of frames [G, F, N, 3]: float64 [G, F] each, rad."""
    return dihedral(x, task.system.phi).numpy(), dihedral(x, task.system.psi).numpy()


def gain(task: MoleculeTask, flow: Mapped, scaling: Mapped) -> dict[str, float]:
    """Nats by which the flow's gap is below the scaling map's on the same frames, with the error of the difference."""
    gaps = [gap_by_group(*mapped.log_ratios(task.betas)) for mapped in (scaling, flow)]
    found = over_groups(gaps[0] - gaps[1])
    return {"gap_gain": float(found.value), "gap_gain_se": float(found.error)}


def data_check(task: MoleculeTask, data: Mapped) -> dict[str, float]:
    """Whether the test frames are canonical at their temperatures: d ln(P_cold / P_hot) / dU, mol/kJ, beside what it
    must be (Shirts, JCTC 2013)."""
    slope, (cold, hot) = ensemble_slope(data.cold_energy, data.hot_energy), task.betas
    return {"slope": float(slope.value), "slope_se": float(slope.error), "slope_of_canonical": hot - cold}


def table(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Markdown: a row for each map."""
    head = ["map", "gap", "acceptance", *(name.replace("_", " ") for name in COLUMNS)]
    lines = ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, of in scores.items():
        gap = f"{of['gap']:.3f} ± {of['gap_se']:.3f}"
        acceptance = f"{of['acceptance']:.3f} [{of['acceptance_low']:.3f}, {of['acceptance_high']:.3f}]"
        cells = [name, gap, acceptance, *(f"{of[column]:.3f}" for column in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]
