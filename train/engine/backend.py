"""What differs between launches: one process and DDP; FSDP2 and DeepSpeed come in through the same few methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from train.engine.config import ConfigError, TrainingConfig
from train.engine.precision import choose_precision, use_all_cores

T = TypeVar("T")
DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# What `accelerate launch` sets for the launches that this version does not train under.
FOREIGN = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


def process_state(config: TrainingConfig) -> PartialState:
    """Who we are among the processes of this launch. Raises ConfigError where the launch is not what it seems."""
    for variable, name in FOREIGN.items():
        if parse_flag_from_env(variable):
            raise ConfigError(
                f"this version trains in one process or with DDP, not under {name}; "
                "launch with accelerate_configs/single_gpu.yaml or multi_gpu.yaml"
            )
    state = PartialState(cpu=config.cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ConfigError(
            f"the launcher started {launched} processes, but without GPUs they do not find each other; "
            "set ACCELERATE_USE_CPU=1 to train with them on the CPU"
        )
    return state


class Backend:
    """Process group, device, precision, and how a gradient is made and applied.

    A model returns loss / N with N the items of all processes, and DDP averages gradients over its R processes:
    `backward` therefore takes R times the loss, and any split of a batch gives the same gradient.
    """

    def __init__(self, config: TrainingConfig, begun_in: str | None = None) -> None:
        state = process_state(config)
        self.device: torch.device = state.device
        self.rank, self.world_size, self.is_main = state.process_index, state.num_processes, state.is_main_process
        if self.device.type == "cpu":
            use_all_cores()
        if begun_in is not None and config.mixed_precision == "auto":
            self.precision, self.precision_reason = begun_in, "as the run began"
        else:
            choice = self.on_main(lambda: choose_precision(config.mixed_precision, self.device))
            self.precision, self.precision_reason = choice
        AcceleratorState._reset_state()  # Scripts that train several models may do so in several precisions.
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=self.precision)
        self.is_ddp = self.accelerator.distributed_type in DDP

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model as the loop calls it: on its device, in its precision, with its hooks."""
        self.inner = model
        self.optimizer = optimizer
        self.model, self.prepared_optimizer = self.accelerator.prepare(model, optimizer)
        # accelerate patches `forward` to run in 16 bits; we enter autocast where we call it, so that sampling and
        # saving see the module as it was built.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return self.model

    @property
    def skips_on_device(self) -> bool:
        """Whether a verdict can reach the optimizer without being read.

        Fused Adam does it. Fused SGD does too, but a skipped first step leaves its momentum uninitialised (torch 2.13).
        """
        fused_adam = isinstance(self.optimizer, torch.optim.Adam) and self.optimizer.defaults["fused"]
        return fused_adam and self.accelerator.scaler is None

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last micro-batch of a step only."""
        with nullcontext() if last or not self.is_ddp else self.accelerator.no_sync(self.model):
            yield

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def autocast(self) -> AbstractContextManager[None]:
        """Around each forward: the run's precision."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss * self.world_size)

    def clip(self, max_norm: float) -> Tensor:
        """Norm of the whole gradient before clipping, 0-d; max_norm 0 only measures."""
        parameters = [p for p in self.inner.parameters() if p.requires_grad]
        return self.accelerator.clip_grad_norm_(parameters, max_norm or float("inf")).detach()

    def step(self, bad: Tensor) -> None:
        """One optimizer step, none where `bad` (0-d float) is 1, and gradients cleared either way."""
        if self.skips_on_device:
            self.optimizer.found_inf = bad
            self.prepared_optimizer.step()
        elif not bad.item():
            self.prepared_optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # an overflow is how the scaler learns its scale
        self.prepared_optimizer.zero_grad()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, the same tensor on all."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def broadcast(self, value: T) -> T:
        """Process 0's `value`, any picklable, on all."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def any(self, *flags: bool) -> list[bool]:
        """Each flag true if it is on any process: the one small read of a step, and none in a single process."""
        if self.world_size == 1:
            return list(flags)
        return [v > 0 for v in self.sum(torch.tensor(flags, dtype=torch.int32, device=self.device)).tolist()]

    def on_main(self, call: Callable[[], T]) -> T:
        """What `call` returns on process 0; a ConfigError raised there is raised on all."""
        outcome: tuple[T | None, str | None] = (None, None)
        if self.is_main:
            try:
                outcome = (call(), None)
            except ConfigError as error:
                outcome = (None, str(error))
        value, problem = self.broadcast(outcome)
        if problem is not None:
            raise ConfigError(problem)
        return value

    def wait(self) -> None:
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()

    def move(self, batch: dict) -> dict:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def close(self) -> None:
        """Let go of model and optimizer; the process group stays for the script's next run."""
        self.accelerator.free_memory()
