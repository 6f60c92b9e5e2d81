"""Checkpoints that are whole or absent: written aside, flushed, sealed with a manifest, renamed, and only then pruned.

checkpoints/step-00000200/     model.safetensors (raw), ema.safetensors, config.json: the model, whole under any launch
                               optimizer.pt, trainer.json, rank-0.pt: everything else, to go on exactly; where each
                               process keeps a shard of the optimizer's state, it is in that process's rank-N.pt
                               manifest.json: sizes and checksums, written last
checkpoints/{last,best-1..3}   links to such folders
"""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from train.engine.config import ConfigError
from train.engine.run_folder import read_json, write_json

KEEP_BEST = 3
MANIFEST = "manifest.json"


def save_weights(model: nn.Module, folder: Path) -> None:
    """model.safetensors, and config.json where the model is one of the Hub's kind."""
    save = getattr(model, "save_pretrained", None)
    if save is not None:
        save(folder)
        (folder / "README.md").unlink()  # a model card that says the model was pushed to the Hub
    else:
        save_model(model, str(folder / "model.safetensors"))


def load_weights(model: nn.Module, file: Path) -> None:
    """Raises ConfigError with the first differences when the file is of another shape."""
    try:
        load_model(model, str(file), device="cpu")
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{file} does not fit this model: {' '.join(lines[1:3]) or lines[0]}; "
            "train with the settings in the config.json beside its run, or start a new --run_dir"
        ) from error


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


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


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
        aside.mkdir(parents=True)
        return aside

    def seal(self, aside: Path, best: list[dict]) -> Path:
        """Make a written folder the newest checkpoint, move the links, then drop what no link names."""
        files = sorted(f for f in aside.iterdir() if f.is_file())
        for file in files:
            _flush(file)
        write_json(aside / MANIFEST, {f.name: [f.stat().st_size, _crc(f)] for f in files})
        _flush(aside)
        sealed = aside.with_name(aside.name[1:])
        outdated = aside.with_name(f".outdated{aside.name}")
        if sealed.exists():  # a step is saved again after a rewind; its old folder goes when the new one is there
            sealed.rename(outdated)
        aside.rename(sealed)
        shutil.rmtree(outdated, ignore_errors=True)
        self._link("last", sealed.name)
        # After a fall back to an older checkpoint its table may name folders that are gone.
        names = [name for e in best if (self.folder / (name := f"step-{e['step']:08d}")).exists()][:KEEP_BEST]
        for place in range(KEEP_BEST):
            self._link(f"best-{place + 1}", names[place] if place < len(names) else None)
        keep = {sealed.name, *names}
        _flush(self.folder)
        for old in self.folder.glob("step-*"):
            if old.name not in keep:
                shutil.rmtree(old)
        return sealed

    def _link(self, name: str, target: str | None) -> None:
        if target is None:
            (self.folder / name).unlink(missing_ok=True)
            return
        temporary = self.folder / f".{name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(self.folder / name)

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest sound checkpoint, or None; what is damaged is named through `say` and passed over."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            damage = self.damage(folder)
            if damage is None:
                return folder
            say(f"passing over {folder}: {damage}")
        return None

    @staticmethod
    def damage(folder: Path) -> str | None:
        """What is wrong with a checkpoint, None if it is sound."""
        try:
            manifest = read_json(folder / MANIFEST)
        except (OSError, ValueError):
            return f"its {MANIFEST} is missing or unreadable, so it was never finished"
        for name, (size, crc) in manifest.items():
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size or _crc(file) != crc:
                return f"{name} is damaged (size or checksum differ from the manifest)"
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
