"""How this process was launched, and who it is among the others."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from train.engine.config import ConfigError, TrainingConfig


def launched_with() -> str:
    """DeepSpeed, FSDP2, or DDP, for a process alone too. Raises ConfigError for FSDP1 and device meshes."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "DDP"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "the launch config asks for FSDP version 1, which keeps no fp32 parameter beside 16-bit ones; "
            "launch with accelerate_configs/fsdp2.yaml, which says fsdp_version: 2"
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError("the launch config has a parallelism_config, and FSDP2 here shards over all processes alike")
    return "FSDP2"


def process_state(config: TrainingConfig) -> PartialState:
    """Who we are among the processes of this launch. Raises ConfigError where the machine lacks what it is made for."""
    launch, launched = launched_with(), int(os.environ.get("WORLD_SIZE", "1"))
    if launch == "DeepSpeed" and find_spec("deepspeed") is None:
        raise ConfigError("the launch config asks for DeepSpeed, which is not here: pip install deepspeed transformers")
    # -1 is CUDA's word for no GPU at all; accelerate_configs/cpu_two_processes.yaml says it.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    on_cpu = config.cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or hidden
    if not on_cpu and (not torch.accelerator.is_available() or torch.backends.mps.is_available()):
        if launched > 1 or launch == "FSDP2":
            raise ConfigError(
                f"the launcher started {launched} process(es) for {launch}, and torch sees no GPU here that they could "
                "use together; set ACCELERATE_USE_CPU=1 to train with them on the CPU"
            )
        on_cpu = launch == "DeepSpeed"  # or its process group would be looked for on GPUs
    state = PartialState(cpu=on_cpu)
    if launched != state.num_processes:
        raise ConfigError(
            f"the launcher started {launched} processes, but they do not find each other on {state.device}; "
            "set ACCELERATE_USE_CPU=1 to train with them on the CPU"
        )
    return state
