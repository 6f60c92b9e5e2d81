"""Checkpoints that are whole or absent: written aside, flushed, sealed with a manifest, renamed, and only then pruned.

checkpoints/step-00000200/     model.safetensors (raw), ema.safetensors, config.json: the model, whole under any launch
                               optimizer.pt, trainer.json, rank-0.pt: everything else, to go on exactly; where each
                               process keeps a shard of the optimizer's state, it is in that process's rank-N.pt
                               run/: the run's settings, facts and rows until then, should the folder's own be damaged
                               manifest.json: sizes and checksums, written last
checkpoints/{last,best-1..3}   links to such folders
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from train.engine.config import ConfigError
from train.engine.run_folder import KEPT, MANIFEST, OUTDATED, crc32, read_json, write_json

KEEP_BEST = 3


def save_weights(model: nn.Module, folder: Path) -> None:
    """model.safetensors, and config.json where the model is one of the Hub's kind."""
    save = getattr(model, "save_pretrained", None)
    if save is not None:
        save(folder)
        (folder / "README.md").unlink()  # a model card that says the model was pushed to the Hub
    else:
        save_model(model, str(folder / "model.safetensors"))


def load_weights(model: nn.Module, file: Path) -> None:
    """Raises ConfigError where the file is damaged, or with the first differences where it is of another shape."""
    try:
        load_model(model, str(file), device="cpu")
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{file} does not fit this model: {' '.join(lines[1:3]) or lines[0]}; "
            "train with the settings in the config.json beside its run, or start a new --run_dir"
        ) from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} holds no weights that can be read: {error}") from error


def load_state(file: Path) -> dict[str, Any]:
    """What torch.save wrote, on the CPU; nothing in the file is run. Raises ConfigError where it is anything else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, LookupError, EOFError, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{file} is not of a checkpoint of ours, and nothing in it was run: {said}") from error


def random_state() -> dict[str, Any]:
    """State of every generator that training may draw from, as types that load with weights_only=True."""
    name, keys, *rest = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, step: int) -> Path:
        """An empty folder to write the files of `step` into; process 0 calls it, all may write."""
        aside = self.folder / f".step-{step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "run").mkdir(parents=True)
        for name in KEPT:
            if (file := self.folder.parent / name).exists():
                shutil.copyfile(file, aside / "run" / name)
        return aside

    def seal(self, aside: Path, best: list[dict]) -> Path:
        """Make a written folder the newest checkpoint, move the links, then drop what no link names."""
        files = sorted(f for f in aside.rglob("*") if f.is_file())
        for file in files:
            _flush(file)
        sums = {f.relative_to(aside).as_posix(): [f.stat().st_size, crc32(f)] for f in files}
        write_json(aside / MANIFEST, sums)
        _flush(aside / "run")
        _flush(aside)
        sealed = aside.with_name(aside.name[1:])
        outdated = aside.with_name(OUTDATED + sealed.name)
        shutil.rmtree(outdated, ignore_errors=True)  # of a process that was killed while it dropped it
        if sealed.exists():  # a step is saved again after a rewind; its old folder goes when the new one is there
            sealed.rename(outdated)
        aside.rename(sealed)
        keep = self.link(sealed, best)
        _flush(self.folder)
        for old in self.folder.glob("*step-*"):  # and what killed processes left
            if old.name not in keep:
                shutil.rmtree(old, ignore_errors=True)  # what somebody holds open goes the next time
        return sealed

    def link(self, newest: Path, best: list[dict]) -> set[str]:
        """Let the links name the newest checkpoint and those of its table; returns the names of these folders.

        After a kill between a rename and the links no later save might do it.
        """
        self._link("last", newest.name)
        # After a fall back to an older checkpoint its table may name folders that are gone.
        names = [name for e in best if (self.folder / (name := f"step-{e['step']:08d}")).exists()][:KEEP_BEST]
        for place in range(KEEP_BEST):
            self._link(f"best-{place + 1}", names[place] if place < len(names) else None)
        return {newest.name, *names}

    def _link(self, name: str, target: str | None) -> None:
        link = self.folder / name
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)  # the folder was copied by something that follows links
        if target is None:
            link.unlink(missing_ok=True)
            return
        temporary = self.folder / f".{name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest sound checkpoint, None where there is none yet; what is damaged is named and passed over.

        Raises ConfigError where all are damaged: to begin anew would overwrite the rows that they go with.
        """
        folders = sorted(self.folder.glob("step-*"), reverse=True)
        for folder in folders:
            damage = self.damage(folder)
            if damage is None:
                return folder
            say(f"passing over {folder}: {damage}")
        if folders:
            raise ConfigError(
                f"none of the {len(folders)} checkpoint(s) in {self.folder} is sound; give a new --run_dir, or remove "
                "that folder to train from the beginning"
            )
        return None

    @staticmethod
    def damage(folder: Path) -> str | None:
        """What is wrong with a checkpoint, None if it is sound."""
        try:
            sums = {name: (size, crc) for name, (size, crc) in read_json(folder / MANIFEST).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return f"its {MANIFEST} is missing or unreadable, so it was never finished"
        for name, (size, crc) in sums.items():
            file = folder / name
            try:
                if file.stat().st_size != size or crc32(file) != crc:
                    return f"{name} is damaged (size or checksum differ from the manifest)"
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return None


def find_checkpoint(path: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint that PATH means: itself, or the newest sound one of a run folder. Raises ConfigError."""
    if (path / MANIFEST).exists():
        if damage := Checkpoints.damage(path):
            raise ConfigError(f"{path} cannot be used: {damage}")
        return path.resolve()
    found = Checkpoints(path / "checkpoints").newest(say)
    if found is None:
        raise ConfigError(f"{path} holds no finished checkpoint; give a run folder or a folder in its checkpoints/")
    return found
