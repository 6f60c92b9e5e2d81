"""What a run will take, worked out before step 1: parameters, FLOPs and memory against what the machine has."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from train.engine.backend import Backend
from train.engine.config import TrainingConfig
from train.engine.optim import parameter_groups

# Bytes of state that an optimizer keeps per parameter; adafactor's rows and columns round to none.
STATE_BYTES = {"adamw": 8, "adam": 8, "nadam": 8, "radam": 8, "adamw8bit": 2, "rmsprop": 4, "sgd": 4, "adafactor": 0}
# Of the free memory, what a plan may fill: an estimate may be off by this much.
TRUSTED = 0.85
# What a process on the CPU comes to use besides tensors after its plan: libraries loaded late, threads, matmul buffers.
LATER_BYTES = 150 << 20
# Dense peak of 16-bit matmuls in TFLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165,
}  # fmt: skip


class _Ledger(TorchDispatchMode):
    """Adds up FLOPs, and the bytes in storages that ops have made and nobody has let go of.

    FlopCounterMode cannot stand beside it: its module hooks hold on to what activation checkpointing recomputes.
    """

    def __init__(self, ours: list[Tensor]) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in ours}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        if workspace := getattr(func, "workspace_bytes", None):  # what an op takes inside, where it says so
            self.peak = max(self.peak, self.live + workspace(*args, **kwargs))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _OneStep(nn.Module):
    """Forward and backward as one call, so that activation checkpointing finds swapped parameters in backward too."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, batch: dict[str, Any]) -> None:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self.model(**batch)["loss"]
        loss.backward()


@dataclass(frozen=True)
class Cost:
    """One micro-batch, forward and backward. peak_bytes: most that was held at once besides weights and batch."""

    flops: int
    peak_bytes: int


def measure(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype | None, micro_batches: int = 1) -> Cost:
    """Run forward and backward on tensors without data, counting matmul FLOPs and the bytes held.

    dtype: of autocast, None for none. micro_batches: of a step; from the second on, gradients are there already. The
    model may be made of such tensors itself, so that a model too large for this machine can be measured.
    """
    step = _OneStep(model, dtype)
    own = next(model.parameters())
    fake = own.fake_mode if isinstance(own, FakeTensor) else FakeTensorMode()
    state = dict([*step.named_parameters(), *step.named_buffers()])
    if not isinstance(own, FakeTensor):
        state = {name: fake.from_tensor(tensor) for name, tensor in state.items()}
    inputs = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    ours = [t for t in [*state.values(), *inputs.values()] if isinstance(t, Tensor)]
    passes = min(2, micro_batches)
    with fake, _Ledger(ours) as ledger:
        for _ in range(passes):
            functional_call(step, state, (inputs,))
    for tensor in state.values():
        tensor.grad = None
    return Cost(ledger.flops // passes, ledger.peak)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's data-sheet FLOP/s in this precision, None where it isn't known."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def process_bytes(device: torch.device) -> int:
    """What this process holds on the CPU now; a GPU's free memory has it taken off already."""
    return psutil.Process().memory_info().rss if device.type == "cpu" else 0


@dataclass(frozen=True)
class Plan:
    """`memory` in bytes by what holds it, at the step's peak; `items` are dataset elements."""

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
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= TRUSTED * self.available

    def lines(self) -> list[str]:
        groups = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        flops = "n/a, and activations not counted: what this model computes depends on its data"
        if self.flops_per_step is not None:
            flops = f"{self.flops_per_step / 1e12:.3f} TFLOP per step over all processes"
        return [
            f"parameters  {self.num_parameters:,} ({groups})",
            f"step        {self.items_per_step} items in {self.micro_batches} micro-batch(es) per process",
            f"FLOPs       {flops}",
            f"memory      {self.memory_line()}"
            + ("" if self.fits else " — does not fit: lower --micro_batch_size, or take a smaller model"),
        ]

    def memory_line(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.memory.items())
        return (
            f"{self.needed / 2**30:.2f} GiB per process ({parts}); {self.available / 2**30:.2f} GiB there for it, "
            f"of which a plan may fill {TRUSTED:.0%}"
        )


def make_plan(
    model: nn.Module,
    config: TrainingConfig,
    batch: dict[str, Any],
    micro_batches: int,
    backend: Backend,
    known: dict[tuple, Cost] | None = None,
) -> Plan:
    """batch: one micro-batch. FLOPs leave recomputation out, as MFU does. known: costs that earlier plans measured."""
    known = {} if known is None else known
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    def cost_of(recompute: bool) -> Cost:
        shapes = tuple(tuple(value.shape) for value in batch.values() if isinstance(value, Tensor))
        key = (recompute, micro_batches > 1, weights, shapes)
        if key not in known:
            if config.gradient_checkpointing:
                model.gradient_checkpointing = recompute  # type: ignore[assignment]
            known[key] = measure(model, batch, backend.autocast_dtype, micro_batches)
        return known[key]

    try:
        flops = cost_of(recompute=False).flops
        cost = cost_of(recompute=config.gradient_checkpointing)
    except (DataDependentOutputException, DynamicOutputShapeException):
        cost, flops = None, None
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing = True  # type: ignore[assignment]
    groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in parameter_groups(model, config.weight_decay)}
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": STATE_BYTES[config.optimizer] * sum(groups.values()),
    }
    if cost is not None:
        memory["activations"] = max(0, cost.peak_bytes - gradients)
    if config.ema_decay:
        memory["EMA"] = weights
    memory = {name: round(size * backend.memory_shares.get(name, 1.0)) for name, size in memory.items()}
    allocated = 0 if isinstance(next(model.parameters()), FakeTensor) else weights
    process = process_bytes(backend.device)
    if backend.device.type == "cpu":
        memory["process"] = max(0, process - allocated) + LATER_BYTES
    return Plan(
        parameters=groups,
        micro_batches=micro_batches,
        items_per_step=config.batch_size,
        flops_per_step=None if flops is None else flops * micro_batches * backend.world_size,
        memory=memory,
        available=free_memory(backend.device) + process,
    )
