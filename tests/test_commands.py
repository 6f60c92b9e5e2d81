"""The commands that scripts and sweep files show are ones that work."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from train.arc import ArcRun, preset_of
from train.arc_ladder import LadderRun
from train.champion import ChampionRun
from train.decoder_only import DecoderOnlyRun
from train.encoder_decoder import EncoderDecoderRun
from train.engine import parse
from train.language import LanguageConfig
from train.maze import MazeRun
from train.maze_scaling import ScalingRun
from train.molecular import MoleculeRun
from train.molecular import preset_of as molecules_preset

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("nano", "micro", "small", "medium", "large", "xlarge")


def docstring(script: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "train" / f"{script}.py").read_text(encoding="utf-8")))


def commands(script: str) -> list[list[str]]:
    lines = [line.split("  #")[0].strip() for line in docstring(script).replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("accelerate launch ")]


@pytest.mark.parametrize("script", [*SIZES, "language"])
def test_every_command_of_a_docstring_is_accepted(script):
    for words in commands(script):
        arguments = launch_command_parser().parse_args(words[2:])
        assert (ROOT / arguments.training_script).is_file()
        if arguments.config_file:
            load_config_from_file(str(ROOT / arguments.config_file))
        size = script if script in SIZES else "nano"
        settings = parse(
            LanguageConfig, arguments.training_script_args, LanguageConfig(config=size), fill=LanguageConfig.filled_in
        )
        assert settings.config in SIZES


@pytest.mark.parametrize(
    "config_class", [MazeRun, ScalingRun, DecoderOnlyRun, EncoderDecoderRun, ChampionRun, LadderRun]
)
def test_every_command_of_a_maze_or_arc_script_is_accepted(config_class):
    script = config_class.__module__.rpartition(".")[2]
    for words in commands(script) + (commands("maze_12x12") if config_class is MazeRun else []):
        arguments = launch_command_parser().parse_args(words[2:])
        assert (ROOT / arguments.training_script).is_file()
        flags = arguments.training_script_args
        default = preset_of(config_class, flags) if issubclass(config_class, ArcRun) else None
        parse(config_class, flags, default, fill=config_class.filled_in)


def test_every_command_of_the_molecular_script_is_accepted():
    for words in commands("molecular"):
        flags = launch_command_parser().parse_args(words[2:]).training_script_args
        parse(MoleculeRun, flags, molecules_preset(flags), fill=MoleculeRun.filled_in)


@pytest.mark.parametrize("script", SIZES)
def test_every_size_says_how_it_is_launched_everywhere(script):
    text = docstring(script)
    for word in ("cpu.yaml", "single_gpu.yaml", "multi_gpu.yaml", "deepspeed_zero", "fsdp2.yaml", "mps.yaml", "sweep"):
        assert word in text, word
