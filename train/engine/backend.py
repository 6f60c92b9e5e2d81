"""What differs between launches. Here: one process and DDP; sharded.py has FSDP2 and zero.py DeepSpeed.

All of them answer to the same methods, so that the loop reads the same under each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.engine.checkpoint import load_weights
from train.engine.config import ConfigError, TrainingConfig
from train.engine.precision import choose_precision, use_all_cores
from train.engine.processes import process_state

T = TypeVar("T")
PRECISIONS: dict[str | None, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def shard_of(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, but under FSDP2 and ZeRO-3."""
    parameter = getattr(parameter, "ds_tensor", parameter)
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Backend:
    """Process group, device, precision, and how a gradient is made and applied: in one process, or with DDP.

    A model returns loss / N with N the items of all processes, and DDP averages gradients over its R processes:
    `backward` therefore takes R times the loss, and any split of a batch gives the same gradient.
    """

    name = "one process or DDP"
    # Whether every process keeps optimizer state of its own, and whether a forward needs all of them to take part.
    sharded = collective = False
    scaler: torch.amp.GradScaler | None = None

    def __init__(self, config: TrainingConfig, begun_in: str | None = None) -> None:
        self.config, state = config, process_state(config)
        self.device: torch.device = state.device
        self.rank, self.world_size, self.is_main = state.process_index, state.num_processes, state.is_main_process
        if self.device.type == "cpu":
            use_all_cores()
        if begun_in is not None and begun_in in PRECISIONS and config.mixed_precision == "auto":
            self.precision, self.precision_reason = begun_in, "as the run began"
        else:
            choice = self.on_main(lambda: choose_precision(config.mixed_precision, self.device))
            self.precision, self.precision_reason = choice
        self._connect()

    def _connect(self) -> None:
        AcceleratorState._reset_state()  # Scripts that train several models may do so in several precisions.
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=self.precision)
        self.scaler = self.accelerator.scaler
        self.is_ddp = self.accelerator.distributed_type in DDP

    @property
    def memory_shares(self) -> dict[str, float]:
        """What part of the weights, gradients, optimizer, EMA a process's device holds; all where it isn't named."""
        return {}

    def place(self, model: nn.Module) -> None:
        """Put a model where it is trained or averaged, in place; before an optimizer sees its parameters."""
        model.to(self.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int) -> nn.Module:
        """The placed model as the loop calls it, `micro_batches` times a step: in its precision, with its hooks."""
        self.inner = model
        self.optimizer = optimizer
        # The optimizer is prepared so that `clip` knows what to unscale; its wrapper's own step reads the device.
        self.model, _ = self.accelerator.prepare(model, optimizer)
        # accelerate patches `forward` to run in 16 bits; we enter autocast where we call it, so that sampling and
        # saving see the module as it was built.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return self.model

    # ---- a step --------------------------------------------------------------------------------------------------

    @property
    def skips_on_device(self) -> bool:
        """Whether a verdict can reach the optimizer without being read.

        Fused Adam does it. Fused SGD does too, but a skipped first step leaves its momentum uninitialised (torch 2.13).
        """
        return isinstance(self.optimizer, torch.optim.Adam) and bool(self.optimizer.defaults["fused"])

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last micro-batch of a step only."""
        with nullcontext() if last or not self.is_ddp else self.accelerator.no_sync(self.model):
            yield

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.precision]

    def autocast(self) -> AbstractContextManager[None]:
        """Around each forward: the run's precision."""
        dtype = self.autocast_dtype
        # Weights are spread to save memory: what they became in 16 bits must not stay until the forward ends.
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=not self.collective)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss * self.world_size)

    def clip(self, max_norm: float) -> Tensor:
        """Norm of the whole gradient before clipping, 0-d; max_norm 0 only measures."""
        parameters = [p for p in self.inner.parameters() if p.requires_grad]
        return self.accelerator.clip_grad_norm_(parameters, max_norm or float("inf")).detach()

    def step(self, bad: Tensor, is_bad: bool) -> None:
        """One optimizer step, none where `bad` (0-d float) is 1, and gradients cleared either way.

        is_bad: the same as the host has read it, which it need not have where the optimizer `skips_on_device`.
        """
        if self.skips_on_device:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        if self.skips_on_device or not is_bad:
            self.optimizer.step()
        if self.scaler is not None:
            # `clip` has unscaled the gradients and noted what overflowed; the scaler's own step would read that again.
            self.scaler.update()
        self.optimizer.zero_grad()

    # ---- what is kept ------------------------------------------------------------------------------------------

    def are_finite(self, model: nn.Module) -> bool:
        """Whether all weights are, on every process, each of which looks at its own or its shard. Collective."""
        mine = torch.stack([shard_of(p.detach()).isfinite().all().to(self.device) for p in model.parameters()])
        return not self.any(not mine.all().item())[0]

    def whole(self, model: nn.Module, device: torch.device | None = None) -> nn.Module | None:
        """On process 0 a model with all its weights, None on the others. Collective.

        It is `model` itself where each process has all of it anyway, else a copy on `device`, default the CPU.
        """
        return model if self.is_main else None

    def load_weights(self, model: nn.Module, file: Path) -> None:
        """Fill a placed model from a file of all its weights. Collective. Raises ConfigError if it doesn't fit."""
        load_weights(model, file)

    def optimizer_state(self) -> dict[str, Any]:
        """For torch.save: this process's own where `sharded`, else the same on all."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """What `optimizer_state` returned, after the weights were loaded."""
        self.optimizer.load_state_dict(state)

    # ---- among the processes -------------------------------------------------------------------------------------

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
        """What `call` returns on process 0; a ConfigError or OSError raised there is raised on all."""
        value: Any = None
        problem: ConfigError | OSError | None = None
        if self.is_main:
            try:
                value = call()
            except (ConfigError, OSError) as error:
                problem = error
        value, problem = self.broadcast((value, problem))
        if problem is not None:
            raise problem
        return value

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def move(self, batch: dict) -> dict:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def close(self) -> None:
        """Let go of model and optimizer; the process group stays for the script's next run."""
        self.accelerator.free_memory()
