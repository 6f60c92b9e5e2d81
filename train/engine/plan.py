"""What a run will take, worked out before step 1: parameters, FLOPs and memory against what the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from train.engine.backend import Backend
from train.engine.config import TrainingConfig
from train.engine.optim import parameter_groups

# Bytes of state that an optimizer keeps per parameter; adafactor's rows and columns round to none.
STATE_BYTES = {"adamw": 8, "adam": 8, "nadam": 8, "radam": 8, "rmsprop": 4, "sgd": 4, "adafactor": 0}
# Dense peak of 16-bit matmuls in TFLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One micro-batch, forward and backward."""

    flops: int
    activation_bytes: int


class _OneStep(nn.Module):
    """Forward and backward as one call, so that activation checkpointing finds swapped parameters in backward too."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.dtype, self.keep = model, dtype, keep

    def forward(self, batch: dict[str, Any]) -> None:
        autocast = torch.autocast("cpu", self.dtype, enabled=self.dtype is not None)
        with autocast, torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t):
            loss = self.model(**batch)["loss"]
        loss.backward()


def measure(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype | None) -> Cost:
    """Run forward and backward on tensors without data, counting matmul FLOPs and what is kept for backward.

    dtype: of autocast, None for none.
    """
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    step = _OneStep(model, dtype, keep)
    fake = FakeTensorMode()
    state = {n: fake.from_tensor(t) for n, t in [*step.named_parameters(), *step.named_buffers()]}
    inputs = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    ours = {t.untyped_storage()._cdata for t in [*state.values(), *inputs.values()] if isinstance(t, Tensor)}
    with fake, FlopCounterMode(display=False) as counter:
        functional_call(step, state, (inputs,))
    activations = sum(storage.nbytes() for key, storage in kept.items() if key not in ours)
    return Cost(counter.get_total_flops(), activations)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's data-sheet FLOP/s in this precision, None where it isn't known."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@dataclass(frozen=True)
class Plan:
    """`memory` in bytes by what holds it; `items` are dataset elements."""

    parameters: dict[str, int]
    micro_batches: int
    items_per_step: int
    flops_per_step: int | None  # None where what the model computes depends on what it is given
    memory: dict[str, int]
    available: int

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.available

    def lines(self) -> list[str]:
        groups = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.memory.items())
        needed = sum(self.memory.values()) / 2**30
        flops = "n/a, and activations not counted: what this model computes depends on its data"
        if self.flops_per_step is not None:
            flops = f"{self.flops_per_step / 1e12:.3f} TFLOP per step over all processes"
        return [
            f"parameters  {self.num_parameters:,} ({groups})",
            f"step        {self.items_per_step} items in {self.micro_batches} micro-batch(es) per process",
            f"FLOPs       {flops}",
            f"memory      {needed:.2f} GiB per process ({memory}); {self.available / 2**30:.2f} GiB free here"
            + ("" if self.fits else " — does not fit: lower --micro_batch_size, or take a smaller model"),
        ]


def make_plan(
    model: nn.Module, config: TrainingConfig, batch: dict[str, Any], micro_batches: int, backend: Backend
) -> Plan:
    """batch: one micro-batch. FLOPs leave recomputation out, as MFU does; activations are what autograd keeps."""
    try:
        cost = measure(model, batch, backend.autocast_dtype)
        flops = cost.flops
        if config.gradient_checkpointing:
            model.gradient_checkpointing = False
            flops = measure(model, batch, backend.autocast_dtype).flops
            model.gradient_checkpointing = True
    except (DataDependentOutputException, DynamicOutputShapeException):
        cost, flops = None, None
    groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in parameter_groups(model, config.weight_decay)}
    trained = sum(groups.values())
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    memory = {
        "weights": weights,
        "gradients": 4 * trained,
        "optimizer": STATE_BYTES[config.optimizer] * trained,
    }
    if cost is not None:
        memory["activations"] = cost.activation_bytes
    if config.ema_decay:
        memory["EMA"] = weights
    return Plan(
        parameters=groups,
        micro_batches=micro_batches,
        items_per_step=config.batch_size,
        flops_per_step=None if flops is None else flops * micro_batches * backend.world_size,
        memory=memory,
        available=free_memory(backend.device),
    )
