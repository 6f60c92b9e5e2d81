"""Every command in the README works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)]
TABLE = re.findall(r"\| `(accelerate launch [^`]+)` \|", README)


def test_the_first_two_commands_are_what_ci_and_a_newcomer_run():
    assert BLOCKS[0] == ["pip install -e . && accelerate launch train/nano.py --max_minutes 5"]
    assert BLOCKS[1] == ['pip install -e ".[test]" && pytest']


def test_the_examples_work_one_after_another(run_command):
    for command in BLOCKS[2]:
        status, output = run_command(command)
        assert status == 0, f"{command}\n{output}"


@pytest.mark.parametrize("command", TABLE)
def test_launch_commands_are_accepted(command):
    arguments = launch_command_parser().parse_args(shlex.split(command)[2:])
    assert (ROOT / arguments.training_script).exists()
    if arguments.config_file:
        load_config_from_file(str(ROOT / arguments.config_file))


def test_every_launch_config_is_in_the_table():
    assert {p.name for p in (ROOT / "accelerate_configs").iterdir()} == set(
        re.findall(r"accelerate_configs/(\w+\.yaml)", README)
    )


@pytest.mark.slow
def test_the_first_command_keeps_its_word(tmp_path):
    """Five minutes of nano on this machine: in time, and better than the tokenizer's unigram model."""
    import json
    import time

    started = time.monotonic()
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "nano.py")]
    subprocess.run([*command, "--max_minutes", "5", "--run_dir", str(tmp_path / "run"), "--wandb", "off"], check=True)
    assert time.monotonic() - started < 330
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final"]["bits_per_byte"] < results["report"]["baselines"]["token_unigram"]
