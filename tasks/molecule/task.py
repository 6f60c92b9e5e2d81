"""The molecule task: pairs of frames at two temperatures to learn from, and how well a map carries one to the other.

Scores are of frames that nothing was learned from, in float64 from the frame to the number. What is held out are whole
groups: a group is one run of parallel tempering with a start of its own, so that no held-out frame is a picosecond away
from one that was learned. Their `gap`, in nats, is the loss less its floor b_cold <U>_cold + b_hot <U>_hot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.molecule.data import Trajectories
from tasks.molecule.dynamics import hmc
from tasks.molecule.observables import log_ratio, swap_scores
from tasks.molecule.potential import Potential
from tasks.molecule.system import System, beta, is_l

VERSION = 1
VAL_SHARE, TEST_SHARE = 1 / 8, 1 / 4  # of the groups
CHECKED = 64  # frames whose energy is computed anew, to see that the data are of this force field
SPREAD = 0x9E3779B1  # 2^32 by the golden ratio: the numbers of different seeds do not meet soon
TOLERANCE = 1e-3  # kJ/mol; another force field is off by tens

# x [B, N, 3] in nm, temperature in K that it is of, temperature to take it to -> y [B, N, 3], log|det dy/dx| [B]
Transport = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]


def identity(x: Tensor, t_from: float, t_to: float) -> tuple[Tensor, Tensor]:
    """The map of a plain swap."""
    return x, x.new_zeros(len(x))


class Pairs:
    """Frames of some groups at both temperatures. Item i is frame i % F of group i // F, cold and hot: positions
    float32 [N, 3] in nm, energies float64 in kJ/mol.

    Replicas of parallel tempering are independent of each other at any one time, so a pair is a draw from both.
    """

    def __init__(self, x: Tensor, energies: Tensor) -> None:
        self.x, self.energies = x, energies  # [G, 2, F, N, 3], [G, 2, F]
        self.groups, self.frames = len(x), x.shape[2]

    def __len__(self) -> int:
        return self.groups * self.frames

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        group, frame = divmod(i, self.frames)
        return *self.x[group, :, frame], *self.energies[group, :, frame]

    def ends(self) -> Tensor:
        """All cold frames and all hot ones: float32 [2, P, N, 3]."""
        return self.x.transpose(0, 1).flatten(1, 2)

    def thinned(self, count: int) -> Pairs:
        """At most `count` pairs, or one a group if that is more: as many of each group, evenly spread in time."""
        each = min(self.frames, max(1, count // self.groups))
        frames = torch.linspace(0, self.frames - 1, each).round().long()
        return Pairs(self.x[:, :, frames], self.energies[:, :, frames])


class Learned(Pairs):
    """Pairs to learn from: of each also the number it was asked for by, i + e * len(pairs) in epoch e, from which it is
    drawn anew (`MoleculeTask.moved_on`)."""

    counted_on = True

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return *super().__getitem__(i % len(self)), i


class Mapped(NamedTuple):
    """Pairs, and where a map carries them: positions float64 [G, F, N, 3], everything else float64 [G, F] of NumPy."""

    cold: Tensor
    hot: Tensor
    to_hot: Tensor  # T(cold)
    to_cold: Tensor  # T^-1(hot)
    cold_energy: np.ndarray  # U in kJ/mol
    hot_energy: np.ndarray
    to_hot_energy: np.ndarray
    to_cold_energy: np.ndarray
    forward_logdet: np.ndarray
    inverse_logdet: np.ndarray

    def log_ratios(self, betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """a(x) of the cold frames and b(y) of the hot ones, in nats (`observables.log_ratio`)."""
        cold, hot = betas
        return (
            log_ratio(cold, self.cold_energy, hot, self.to_hot_energy, self.forward_logdet),
            log_ratio(hot, self.hot_energy, cold, self.to_cold_energy, self.inverse_logdet),
        )


class MoleculeTask:
    """Pairs of frames of one molecule at two temperatures, split by groups, and scores of maps between them.

    Args:
        trajectories: of `tasks.molecule.data`, at least three groups, with `temperatures` among theirs.
        temperatures: cold, hot, in K.
        eval_pairs: pairs of the validation groups that an evaluation maps, at most.
        move_fs: femtoseconds of a move of hybrid Monte Carlo that a frame makes each time it is learned from, so that
            what is seen in later epochs are other draws from the same ensembles. 0: frames as they are.
        seed: of those moves.

    Attributes: `train`, `val`, `test` (`Pairs`), `betas` in mol/kJ, and `info`, which identifies the data.
    Raises ValueError for temperatures in the wrong order or that the data lack, and for data of another force field, of
    the other handedness, or with numbers that are not finite.
    """

    monitor, mode, item_name = "gap", "min", "pairs"

    def __init__(
        self,
        system: System,
        potential: Potential,
        trajectories: Trajectories,
        temperatures: tuple[float, float] = (300.0, 450.0),
        *,
        eval_pairs: int = 1024,
        eval_batch_size: int = 256,
        move_fs: int = 0,
        seed: int = 0,
    ) -> None:
        check_temperatures(*temperatures)
        self.system, self.potential, self.temperatures = system, potential, temperatures
        self.betas = tuple(beta(temperature) for temperature in temperatures)
        self.eval_batch_size, self.move_fs, self.seed = eval_batch_size, move_fs, seed
        data = trajectories.at(temperatures)
        check_frames(system, potential, data)
        groups = split_groups(len(data.x))
        self.train, self.val, self.test = (
            kind(data.x[rows], data.energies[rows])
            for kind, rows in zip((Learned, Pairs, Pairs), groups.values(), strict=True)
        )
        self.val = self.val.thinned(eval_pairs)
        self.info = {"task": f"molecule v{VERSION}", "molecule": system.name, "temperatures": list(temperatures)}
        self.info |= {**data.info, "pairs": {name: len(getattr(self, name)) for name in groups}, "move_fs": move_fs}

    def collate(self, items: list[tuple[Tensor, Tensor, Tensor, Tensor, int]]) -> dict[str, Tensor]:
        """cold, hot [B, N, 3] in nm and their energies [B] in kJ/mol, all float32: rounding moves an energy of some 100
        kJ/mol by 4e-6 at most, and the floor by 2e-6 nats."""
        *columns, numbers = zip(*items, strict=True)
        cold, hot, cold_energy, hot_energy = (torch.stack(column).float() for column in columns)
        if self.move_fs:
            x, energy = self.moved_on(torch.stack([cold, hot], 1), numbers)
            (cold, hot), (cold_energy, hot_energy) = x.unbind(1), energy.unbind(1)
        return {"cold": cold, "hot": hot, "cold_energy": cold_energy, "hot_energy": hot_energy}

    def moved_on(self, x: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Frames [B, 2, N, 3] after a move each, a function of the item's number alone, and their energies [B, 2]."""
        noise, uniform = torch.empty_like(x), torch.empty(len(x), 2)
        for row, number in enumerate(numbers):
            # Of a seed PyTorch's generator on the CPU reads the last 32 bits.
            generator = torch.Generator().manual_seed((self.seed * SPREAD + number) % 2**32)
            noise[row].normal_(generator=generator)
            uniform[row].uniform_(generator=generator)
        kelvin = torch.tensor(self.temperatures)
        x, energy, _ = hmc(self.potential, self.system.masses, x, kelvin, self.move_fs, noise=noise, uniform=uniform)
        return x - x.mean(-2, keepdim=True), energy

    @staticmethod
    def num_items(batch: dict[str, Tensor]) -> Tensor:
        """Pairs."""
        cold = batch["cold"]
        return torch.full((), len(cold), dtype=torch.int64, device=cold.device)

    # ---- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mapped(self, transport: Transport, pairs: Pairs) -> Mapped:
        """Pairs carried both ways by a map, which is given float64 tensors."""
        cold_t, hot_t = self.temperatures
        parts = []
        for frames in pairs.ends().split(self.eval_batch_size, 1):
            cold, hot = frames.double()
            to_hot, forward = transport(cold, cold_t, hot_t)
            to_cold, inverse = transport(hot, hot_t, cold_t)
            energies = [self.potential(x) for x in (cold, hot, to_hot, to_cold)]
            parts.append([t.cpu() for t in (cold, hot, to_hot, to_cold, *energies, forward, inverse)])
        whole = [torch.cat(part).unflatten(0, (pairs.groups, pairs.frames)) for part in zip(*parts, strict=True)]
        return Mapped(*whole[:4], *(part.numpy() for part in whole[4:]))

    def scores(self, mapped: Mapped) -> dict[str, float]:
        """`observables.swap_scores`; the loss's parts in nats, by the names that training has for them; and the share
        of mapped frames that are still L."""
        cold, hot = self.betas
        parts = {
            "forward_energy": hot * mapped.to_hot_energy,
            "inverse_energy": cold * mapped.to_cold_energy,
            "forward_logdet": mapped.forward_logdet,
            "inverse_logdet": mapped.inverse_logdet,
            "chirality": is_l(torch.cat([mapped.to_hot, mapped.to_cold]).flatten(0, 1)).double().numpy(),
        }
        return swap_scores(*mapped.log_ratios(self.betas)) | {name: float(part.mean()) for name, part in parts.items()}

    def evaluate(self, predict: Any) -> dict[str, float]:
        """Scores of the model's map on the validation pairs, on process 0; none on the others."""
        model = predict.whole()
        return {} if model is None else self.scores(self.mapped(in_float64(model), self.val))


def in_float64(model: Any) -> Transport:
    """The map of a copy of a model in float64, on the model's device."""
    exact = copy.deepcopy(model).eval()
    device = next(chain(exact.parameters(), exact.buffers())).device
    if device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    exact.to(device, torch.float64)

    def transport(x: Tensor, t_from: float, t_to: float) -> tuple[Tensor, Tensor]:
        return exact.transport(x.to(device), t_from, t_to)

    return transport


def split_groups(count: int) -> dict[str, slice]:
    """Which groups to learn from, to choose by and to report on: the last eighth and quarter, and at least one each."""
    if count < 3:
        raise ValueError(f"{count} groups: at least 3 are needed, to learn from, to choose by and to report on")
    val, test = max(1, round(count * VAL_SHARE)), max(1, round(count * TEST_SHARE))
    train = count - val - test
    return {"train": slice(0, train), "val": slice(train, train + val), "test": slice(train + val, count)}


def check_frames(system: System, potential: Potential, data: Trajectories) -> None:
    """Frames are finite, of L molecules, and their energies those of the potential; ValueError where not."""
    x, energies = data.x.flatten(0, 2), data.energies.flatten()
    if bad := int((~(x.isfinite().all(-1).all(-1) & energies.isfinite())).sum()):
        raise ValueError(f"{bad} of {len(x)} frames hold numbers that are not finite: the data must be made anew")
    if wrong := int((~is_l(x)).sum()):
        raise ValueError(f"{wrong} of {len(x)} frames are of D-alanine: {system.name} is the L form")
    few = torch.linspace(0, len(x) - 1, min(CHECKED, len(x))).long()
    off = (potential(x[few].double()) - energies[few]).abs().max().item()
    if not off < TOLERANCE:
        raise ValueError(
            f"the energies in the data are off by {off:.3g} kJ/mol from those of {system.force_field}: they are of "
            "another force field, and must be made anew"
        )


def check_temperatures(cold: float, hot: float) -> None:
    if not 0 < cold < hot:
        raise ValueError(f"temperatures {cold:g} K and {hot:g} K: the cold one comes first, and is above 0 K")
