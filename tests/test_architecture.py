"""The tree is what DESIGN draws: arrows between floors only go down, no circles, no file or function too long."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "tasks": {"tasks"},
    "train/engine": {"train.engine", "train.nearest"},
    "train": {"train", "models", "tasks", "kernels"},
    "benchmarks": {"models", "tasks", "kernels", "benchmarks"},
}
OURS = ("kernels", "models", "tasks", "train", "benchmarks", "tests")
# Other people's packages that a floor must do without, so that it serves projects that don't have them.
FOREIGN = {
    "kernels": {"accelerate", "wandb", "tyro", "transformers"},
    "models": {"accelerate", "wandb", "tyro", "transformers"},
    "tasks": {"accelerate", "wandb", "tyro"},
    "benchmarks": {"tyro", "wandb", "deepspeed"},
}


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def floor_of(path: str) -> str:
    return max((floor for floor in MAY_IMPORT if path.startswith(floor + "/")), key=len)


def wrong_arrows(path: str, source: str) -> list[str]:
    floor = floor_of(path)
    wrong = []
    for name in imports(source):
        top = name.split(".")[0]
        allowed = any(name == a or name.startswith(a + ".") for a in MAY_IMPORT[floor])
        if (top in OURS and not allowed) or top in FOREIGN.get(floor, ()):
            wrong.append(f"{path} imports {name}")
    return wrong


def sources() -> list[Path]:
    return [p for floor in ("kernels", "models", "tasks", "train", "benchmarks") for p in (ROOT / floor).rglob("*.py")]


def test_arrows_only_go_down():
    assert [w for p in sources() for w in wrong_arrows(p.relative_to(ROOT).as_posix(), p.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/x.py", "from models.ten import TEN"),
        ("tasks/text/x.py", "import models"),
        ("models/x.py", "from tasks.text import TextTask"),
        ("train/engine/x.py", "from tasks import text"),
        ("train/engine/x.py", "import train.language"),
        ("models/x.py", "import wandb"),
    ],
)
def test_an_arrow_that_goes_up_is_seen(path, source):
    assert wrong_arrows(path, source)


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for path in sources():
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        graph[name] = {i for i in _at_run_time(path.read_text()) if i.split(".")[0] in OURS}

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        for other in graph.get(name, ()):
            # A package's __init__ gathers its own modules; that is no circle.
            if not name.startswith(other + "."):
                walk(other, (*trail, name))

    for name in graph:
        walk(name, ())


def _at_run_time(source: str) -> Iterator[str]:
    """Imports outside `if TYPE_CHECKING:`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    yield from imports(ast.unparse(tree))


def test_files_and_functions_stay_short():
    too_long = []
    for path in [*sources(), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text()
        if text.count("\n") > 400:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 65:
                too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert too_long == []


def test_our_kernels_are_not_taken_for_the_hubs():
    import kernels

    assert not hasattr(kernels, "__version__")


def test_every_setting_is_read_by_some_code():
    import dataclasses

    from models.ten import TENConfig
    from train.engine import TrainingConfig
    from train.language import LanguageConfig

    code = "\n".join(p.read_text() for p in sources())
    fields = {f.name for config in (TENConfig, TrainingConfig, LanguageConfig) for f in dataclasses.fields(config)}
    unread = {name for name in fields if not any(f"{owner}.{name}" in code for owner in ("config", "self", "settings"))}
    assert unread == set()


def test_another_package_called_kernels_is_named(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.1'\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", "import models"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert "another project's package of the same name" in done.stderr.splitlines()[-1]
