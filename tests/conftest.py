from __future__ import annotations

import gc
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _cache_of_our_own(tmp_path_factory):
    """Corpora are cached in a folder that lives as long as the tests."""
    os.environ["TENFOLD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors of tests are tiny. Threads that wait for each other on a busy machine make them fifty times as slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.engine.backend.use_all_cores", lambda: torch.set_num_threads(1))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_old_is_collected():
    """A run ends with a collection, which would look at all of torch's modules again: a third of a short run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run_command(tmp_path: Path, monkeypatch, capsys) -> Callable[[str], tuple[int, str]]:
    """Run `accelerate launch script flags`, `python script flags` or `python -m module flags` in this process, from a
    folder that looks like the checkout; returns (exit status, what it printed)."""
    for name in ("train", "benchmarks", "accelerate_configs", "README.md"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for user in ("precision", "summary"):  # a second of every run, that no test of commands looks at
        monkeypatch.setattr(f"train.engine.{user}.matmul_rate", lambda *args, **kwargs: 1e12)

    def run(command: str) -> tuple[int, str]:
        words = shlex.split(command)
        as_module = words[:2] == ["python", "-m"]
        script = 2 if as_module else next(i for i, word in enumerate(words) if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", words[script:])
        if as_module:
            sys.modules.pop(f"{words[2]}.__main__", None)  # another test's import, of which runpy would warn
        status = 0
        try:
            (runpy.run_module if as_module else runpy.run_path)(words[script], run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        out, err = capsys.readouterr()
        return status, out + err

    return run
