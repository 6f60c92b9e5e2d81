"""Models whose weights are spread over the processes: what FSDP2 and ZeRO-3 have in common, and FSDP2."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from train.engine.backend import Backend
from train.engine.checkpoint import load_weights
from train.engine.config import ConfigError

# What these make of a shard doesn't depend on where the shards were cut.
ELEMENTWISE = (torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)


def tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, then buffers, a shared one once; the same order for a model and its copies."""
    return [*model.parameters(), *model.buffers()]


def copied_with(model: nn.Module, values: list[Tensor]) -> nn.Module:
    """A copy of `model` that has `values` for its `tensors` and shares none of the old ones' memory."""
    memo: dict[int, Any] = {}
    for old, new in zip(tensors(model), values, strict=True):
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(model, memo)


class ShardedBackend(Backend):
    """Every process keeps a part of the optimizer's state; `skeleton` is the model as it was built, without weights."""

    sharded = True

    def _connect(self) -> None:
        if self.precision == "fp16":
            raise ConfigError(f"{self.name} trains in bf16 or fp32; take --mixed_precision bf16 or no")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int) -> nn.Module:
        if not isinstance(optimizer, ELEMENTWISE):
            raise ConfigError(
                f"{type(optimizer).__name__} looks at whole matrices or blocks, which {self.name} cuts up; "
                f"take --optimizer adamw, or another of {', '.join(c.__name__.lower() for c in ELEMENTWISE)}"
            )
        self.inner = model
        self.optimizer = optimizer
        return model

    def place(self, model: nn.Module) -> None:
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
            raise ConfigError(f"{self.name} keeps weights in fp32, and this model's are not: leave out --weights")
        if not hasattr(self, "skeleton"):
            self.skeleton = copied_with(model, self._without_data(model, "meta"))
        self._place(model)

    @staticmethod
    def _without_data(model: nn.Module, device: str) -> list[Tensor]:
        """New `tensors`: parameters not filled in, and buffers as they are, for a checkpoint may not hold them."""
        parameters = [torch.empty_like(p, device=device) for p in model.parameters()]
        return parameters + [buffer.detach().clone() for buffer in model.buffers()]

    def _place(self, model: nn.Module) -> None:
        raise NotImplementedError

    def _gathered(self, tensor: Tensor) -> Tensor:
        """All of a parameter or buffer, on every process, sharing no memory with it."""
        raise NotImplementedError

    def whole(self, model: nn.Module, device: torch.device | None = None) -> nn.Module | None:
        values = []
        for tensor in tensors(model):  # one at a time: only process 0 ever holds more than one of them
            value = self._gathered(tensor)
            if self.is_main:
                values.append(value.to(device or "cpu"))
        return copied_with(self.skeleton, values) if self.is_main else None

    def load_weights(self, model: nn.Module, file: Path) -> None:
        plain = copied_with(self.skeleton, self._without_data(self.skeleton, "cpu"))
        load_weights(plain, file)
        with torch.no_grad():
            for mine, value in zip(tensors(model), tensors(plain), strict=True):
                self._fill(mine, value)

    def _fill(self, tensor: Tensor, value: Tensor) -> None:
        """Bring `value`, all of a parameter or buffer, into its place or shard."""
        raise NotImplementedError

    def close(self) -> None:
        """The process group stays for the script's next run."""


class FSDP2Backend(ShardedBackend):
    """torch's `fully_shard`: a unit's weights come together for its forward and backward, and stay in fp32.

    There is no MixedPrecisionPolicy: it would cast decay and phase, so the run's precision is autocast's, as under DDP.
    """

    name = "FSDP2"
    collective = True

    def _connect(self) -> None:
        super()._connect()
        refused = {
            "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"),
            "FSDP_IGNORED_MODULES": "FSDP_IGNORED_MODULES" in os.environ,
            "FSDP_AUTO_WRAP_POLICY": os.environ.get("FSDP_AUTO_WRAP_POLICY", "") == "SIZE_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT") != "FULL_STATE_DICT",
        }
        if found := [name.lower() for name, on in refused.items() if on]:
            raise ConfigError(
                f"the launch config's {', '.join(found)} cannot be honoured here; "
                "leave it out, or launch with accelerate_configs/fsdp2.yaml"
            )
        self._offload = parse_flag_from_env("FSDP_OFFLOAD_PARAMS") and self.device.type != "cpu"
        self._settings = {
            "mesh": init_device_mesh(self.device.type, (self.world_size,)),
            "reshard_after_forward": parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True),
            "offload_policy": CPUOffloadPolicy() if self._offload else OffloadPolicy(),
        }

    @property
    def memory_shares(self) -> dict[str, float]:
        # Not the gradients: between the micro-batches of a step each process keeps all of its own.
        return dict.fromkeys(("weights", "optimizer", "EMA"), 0.0 if self._offload else 1 / self.world_size)

    def _units(self, model: nn.Module) -> list[nn.Module]:
        """What is gathered at once, innermost first: the classes the launch config names, or the items of lists."""
        policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        names = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name]
        if policy == "NO_WRAP":
            found = []
        elif names:
            found = [module for module in model.modules() if type(module).__name__ in names]
            if not found:
                raise ConfigError(
                    f"fsdp_transformer_layer_cls_to_wrap names {', '.join(names)}, and {type(model).__name__} has no "
                    "such module; leave it out to shard each item of its module lists"
                )
        else:
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            found = [item for items in lists for item in items if type(item).forward is not nn.Module.forward]
        return [*dict.fromkeys(reversed(found)), model]

    def _place(self, model: nn.Module) -> None:
        self._check_alike(model)
        if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
            if not hasattr(model, "gradient_checkpointing"):
                raise ConfigError(
                    f"{type(model).__name__} cannot recompute activations; set fsdp_activation_checkpointing to false"
                )
            model.gradient_checkpointing = True  # type: ignore[assignment]
        for unit in self._units(model):
            fully_shard(unit, **self._settings)
        for buffer in model.buffers():
            buffer.data = buffer.to(self.device)

    def _check_alike(self, model: nn.Module) -> None:
        """Nothing is broadcast when shards are cut: processes that built different weights would train a mixture."""
        mine = [p.detach().double().sum().item() for p in model.parameters()]
        if self.any(mine != self.broadcast(mine))[0]:
            raise ConfigError("the processes built models with different weights; seed torch before the model is built")

    @property
    def skips_on_device(self) -> bool:
        # Offloaded, the optimizer runs on the CPU and must wait for the verdict in any case.
        return super().skips_on_device and not self._offload

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        cast(FSDPModule, self.inner).set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # fully_shard averages over the processes, as DDP does

    def clip(self, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.inner.parameters(), max_norm or float("inf")).detach()
        return cast(DTensor, norm).full_tensor().to(self.device)

    def _gathered(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = cast(DTensor, tensor.to(self.device)).full_tensor()
        # Cloned, for what was gathered may be the beginning of a longer, padded tensor.
        return tensor.clone()

    def _fill(self, tensor: Tensor, value: Tensor) -> None:
        if isinstance(tensor, DTensor):
            # src_data_rank None: each process cuts its shard from its own copy, and nothing is sent.
            shard = distribute_tensor(value.to(self.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(shard.to_local())
        else:
            tensor.copy_(value)

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        local = {
            i: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in values.items()}
            for i, values in state["state"].items()
        }
        return {**state, "state": local}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def rebuilt(value: Any, like: DTensor) -> Any:
            if not isinstance(value, Tensor) or value.shape != like.to_local().shape:
                return value  # Adam's count of steps
            shape, mesh, placements = like.shape, like.device_mesh, like.placements
            return DTensor.from_local(value.to(like.device), mesh, placements, shape=shape, stride=like.stride())

        shards = {
            i: {name: rebuilt(value, parameters[i]) for name, value in values.items()}
            for i, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": shards})
