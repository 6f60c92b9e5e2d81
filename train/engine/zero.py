"""DeepSpeed's ZeRO: optimizer state (1), gradients too (2), or weights too (3) on shards, or in the CPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn

from train.engine.config import ConfigError
from train.engine.sharded import ShardedBackend

INVALID_NORM = -1.0  # DeepSpeed's word for a norm that is not finite; it then drops the step's gradients


def without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own default wherever accelerate or a file says "auto"."""
    kept = {name: value for name, value in settings.items() if value != "auto"}
    return {name: without_auto(value) if isinstance(value, dict) else value for name, value in kept.items()}


class ZeroBackend(ShardedBackend):
    """The engine's forward and backward, its step driven by our verdict.

    Weights stay in fp32 and autocast is the engine's `torch_autocast`: its bf16 mode would cast decay and phase.
    """

    engine: Any = None  # a DeepSpeedEngine from `prepare` on

    def _connect(self) -> None:
        self.settings = without_auto(DeepSpeedPlugin().deepspeed_config)
        self.stage = self.settings["zero_optimization"]["stage"]
        self.name, self.collective = f"ZeRO-{self.stage}", self.stage == 3
        super()._connect()
        if problems := list(self._problems()):
            raise ConfigError("the launch config " + "; it ".join(problems))
        if self.device.type == "cpu":
            # Collectives for inference only, that DeepSpeed would spend a minute on compiling.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def _problems(self) -> Iterator[str]:
        zero, clip = self.settings["zero_optimization"], self.settings.get("gradient_clipping", self.config.grad_clip)
        if self.stage == 0:
            yield "asks for ZeRO stage 0, which shards nothing; launch with accelerate_configs/multi_gpu.yaml"
        if zero.get("offload_optimizer", {}).get("device") == "nvme":
            yield "keeps optimizer state on NVMe, where no checkpoint of ours finds it; offload to the CPU"
        for size in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            if self.settings.get(size, 1) != 1:  # 1 is what accelerate says where nothing is said
                yield f"sets {size}; leave it out, --batch_size and --micro_batch_size decide it"
        for section in ("optimizer", "scheduler"):
            if section in self.settings:
                yield f"has a DeepSpeed {section}; leave it out, --optimizer, --lr and --schedule say what to use"
        for section in ("bf16", "fp16"):
            if self.settings.get(section, {}).get("enabled"):
                yield f"enables DeepSpeed's {section}, which would round decay and phase; use --mixed_precision bf16"
        if clip != self.config.grad_clip:
            yield f"clips gradients at {clip} and --grad_clip at {self.config.grad_clip}; leave gradient_clipping out"
        if self.collective and self.config.ema_decay:
            yield "asks for ZeRO-3, which has no averaged weights; drop --ema_decay, or take ZeRO-2 or FSDP2"

    @property
    def memory_shares(self) -> dict[str, float]:
        sections = {"optimizer": "offload_optimizer", "gradients": "offload_optimizer", "weights": "offload_param"}
        spread = list(sections)[: self.stage]
        settings = self.settings["zero_optimization"]
        offloaded = {name for name in spread if settings.get(sections[name], {}).get("device", "none") != "none"}
        away = offloaded if self.device.type != "cpu" else set()
        return {name: 0.0 if name in away else 1 / self.world_size for name in spread}

    def _place(self, model: nn.Module) -> None:
        """The engine moves the model that it trains; an average is a model of its own."""
        model.to(self.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int) -> nn.Module:
        super().prepare(model, optimizer, micro_batches)
        self.micro_batches = micro_batches
        settings = {
            **self.settings,
            "train_micro_batch_size_per_gpu": max(1, self.config.batch_size // self.world_size // micro_batches),
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": self.config.grad_clip,
            # DeepSpeed's own linear layer for stage 3 rounds more often in bf16, and stays in torch for good.
            "zero_optimization": {"memory_efficient_linear": False, **self.settings["zero_optimization"]},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused Adam is as fast there, and needs no compiler
        }
        if self.autocast_dtype is not None:
            dtype = str(self.autocast_dtype).removeprefix("torch.")
            # No module's weights travel in 16 bits: gradients are then summed in fp32, as under DDP.
            settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
        self.engine, self.zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._let_us_judge()
        return self.engine

    def _let_us_judge(self) -> None:
        """Have the engine's step take the norm that `clip` measured: then it is known before, and measured once."""
        if self.stage == 3:
            measure = self.zero._get_norm_groups
            self.measure_norm = lambda: combine_grad_norm_groups(measure())
            self.zero._get_norm_groups = lambda: [self.norm]
        else:
            self.measure_norm = self.zero.scaled_global_norm
            self.zero.scaled_global_norm = lambda: self.norm

    @property
    def skips_on_device(self) -> bool:
        return True  # by the norm, see `step`; what the engine itself reads is its own

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # The engine averages over the processes and divides by its count of micro-batches.
        self.engine.backward(loss * (self.world_size * self.micro_batches))

    def clip(self, max_norm: float) -> Tensor:
        """The norm; the engine clips, at the same --grad_clip, when it steps."""
        self.norm = self.measure_norm().detach().to(self.device, torch.float32)
        return torch.where(self.norm < 0, torch.inf, self.norm)

    def step(self, bad: Tensor, is_bad: bool) -> None:
        self.norm = torch.where(bad.bool(), INVALID_NORM, self.norm)
        self.engine.step()

    # ---- what is kept ------------------------------------------------------------------------------------------

    def load_weights(self, model: nn.Module, file: Path) -> None:
        super().load_weights(model, file)
        if model is self.inner:
            self.zero.refresh_fp32_params()

    def _gathered(self, tensor: Tensor) -> Tensor:
        with self._together(tensor):
            return tensor.detach().clone()

    def _fill(self, tensor: Tensor, value: Tensor) -> None:
        with self._together(tensor):
            tensor.copy_(value)

    def _together(self, tensor: Tensor) -> deepspeed.zero.GatheredParameters:
        """Around a use of all of a parameter; what process 0 writes to it is kept."""
        sharded = hasattr(tensor, "ds_id")
        return deepspeed.zero.GatheredParameters([tensor] if sharded else [], modifier_rank=0, enabled=sharded)

    def optimizer_state(self) -> dict[str, Any]:
        with self._flat_parameters():
            return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        with self._flat_parameters():
            self.optimizer.load_state_dict(state)

    @contextmanager
    def _flat_parameters(self) -> Iterator[None]:
        """ZeRO-3 lends the optimizer its flat fp32 shards only while it steps."""
        if self.stage == 3:
            self.zero._set_fp32_optimizer_param_groups()
        yield
        if self.stage == 3:
            self.zero._clear_fp32_optimizer_param_groups()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
