"""The notebooks run from their first cell to their last, offline, and are kept without outputs."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

TransformerManager = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path, monkeypatch) -> list:
    """Run every cell in `folder`, without GPUs or a network; the cells, with what they showed."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for proxy in ("http_proxy", "https_proxy"):  # whatever would be fetched is refused at once
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells


def shown(cells: list) -> tuple[str, int]:
    """All text that the cells printed or returned, and how many pictures."""
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]
    return "\n".join(texts), sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_valid_installs_itself_and_holds_no_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0].source
    assert not any(cell.outputs or cell.execution_count for cell in code)


def installed(path: Path, folder: Path, monkeypatch, address: str = "") -> str:
    """What the first cell hands to pip where no package of ours is to be had."""
    [source, *_] = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TENFOLD_REPOSITORY", address)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scope, calls = {}, []
    magic = lambda name, line: calls.append(f"{name} {line.replace('$source', scope['source'])}")
    scope["get_ipython"] = lambda: SimpleNamespace(run_line_magic=magic)
    exec(TransformerManager().transform_cell(source), scope)
    [call] = calls
    return call


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_installs_itself_from_an_address_or_from_where_it_lies_or_says_what_it_lacks(path, tmp_path, monkeypatch):
    within = tmp_path / "clone" / "notebooks"
    for folder in (within, within.parent / "train" / "engine"):
        folder.mkdir(parents=True)
    assert installed(path, within, monkeypatch) == f'pip install -q -e "{within.parent}[notebook]"'
    assert sys.path[-1] == str(within.parent)
    from_address = installed(path, tmp_path, monkeypatch, "https://host/tenfold")
    assert from_address == 'pip install -q "tenfold[notebook] @ git+https://host/tenfold"'
    with pytest.raises(SystemExit, match="set REPOSITORY to the address"):
        installed(path, tmp_path, monkeypatch)


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["mazes", "training"]


def test_the_cells_of_mazes_one_after_another(tmp_path, monkeypatch):
    """In this process, for most of what a kernel of their own costs is to import what is here: 4 s rather than 13."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.engine.summary.matmul_rate", lambda *args, **kwargs: 1e12)
    monkeypatch.setattr("train.engine.summary.plot_curves", lambda *args: None)
    scope = {}
    for cell in nbformat.read(ROOT / "notebooks" / "mazes.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(TransformerManager().transform_cell(cell.source), scope)
    assert 0 < scope["results"]["final"]["fork_accuracy"] <= 1 and scope["right"].lines
    assert (tmp_path / "maze.png").exists() and (tmp_path / "runs" / "experiments.db").exists()


@pytest.mark.slow
def test_mazes_in_a_kernel(tmp_path, monkeypatch):
    text, pictures = shown(execute(ROOT / "notebooks" / "mazes.ipynb", tmp_path, monkeypatch))
    assert pictures == 2 and "fork_accuracy" in text


@pytest.mark.slow
def test_training_in_three_minutes(tmp_path, monkeypatch):
    started = time.monotonic()
    cells = execute(ROOT / "notebooks" / "training.ipynb", tmp_path, monkeypatch)
    text, pictures = shown(cells)
    assert time.monotonic() - started < 180
    assert pictures == 2 and "best: TextTask/" in text and "resumed     after step 21 of 40" in text
    [resumed] = [cell for cell in cells if "resumed =" in cell.source]
    assert resumed.outputs[-1].data["text/plain"] == "True"  # stopped and resumed, it is the run that never stopped
