"""A new family is three new files: model, task, script. This writes the README's trio into a folder and trains it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def trio() -> dict[str, str]:
    """The three files as the README shows them, by their first line's name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(# (\S+\.py)\n.*?)```", readme, flags=re.DOTALL)
    return {name: code for code, name in blocks}


def test_the_readmes_sixth_model_trains_in_40_lines(tmp_path):
    files = trio()
    assert list(files) == ["my_model.py", "my_task.py", "my_script.py"]
    assert sum(code.strip().count("\n") + 1 for code in files.values()) <= 45
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "my_script.py", "--max_steps", "150", "--run_dir", "run", "--wandb", "off", "--cpu"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 150 and results["final"]["error"] < 0.05
