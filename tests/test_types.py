"""Every function of the kernels, the models and the engine says what it takes and returns, and mypy believes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = {
    "no-untyped-def": "def untyped(x): return x",
    "assignment": "def implicit(x: int = None) -> None: ...",
    "operator": "def unchecked(x: float | None) -> float: return 2 * x",
    "comparison-overlap": "def never(x: int) -> bool: return x == 'one'",
    "unused-ignore": "def needless() -> int: return 1  # type: ignore[return-value]",
}


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Its cache stays in the checkout, where mypy puts it: most of a first run goes to reading torch.
    command = [sys.executable, "-m", "mypy", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_types_hold():
    found = mypy()
    assert found.returncode == 0, found.stdout + found.stderr


def test_faults_are_found(tmp_path):
    file = tmp_path / "faults.py"
    file.write_text("\n".join(FAULTS.values()))
    found = [line for line in mypy(str(file)).stdout.splitlines() if ": error: " in line]
    for line, (code, error) in enumerate(zip(FAULTS, found, strict=True), 1):
        assert f"faults.py:{line}: " in error and error.endswith(f"[{code}]"), found
