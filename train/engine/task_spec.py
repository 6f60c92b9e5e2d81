"""A task in a few words, for data that are lists of tensors: what the engine needs of it is made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from train.engine.config import ConfigError
from train.engine.evaluation import Predictor

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Items are tuples in the order of `input_fields` and `target_field`, or dicts with at least these names.

    loss: "model", one that itself returns {"loss": …} over num_items; or of a plain module, which takes the inputs by
    position: "cross_entropy" of logits [..., C] to integers [...], "mse" of outputs to a target of their shape. Integer
    targets of -100 don't count. metrics: of a plain module, each a sum over (output, target), divided by what counts.
    Raises ConfigError for metrics of a model that has its own loss, whose parts are its scores.
    """

    name: str
    input_fields: tuple[str, ...] = ("x",)
    target_field: str = "labels"
    loss: Literal["model", "cross_entropy", "mse"] = "model"
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    item_name: str = "targets"

    def __post_init__(self) -> None:
        if self.metrics and self.loss == "model":
            raise ConfigError(f"metrics of {self.name} need loss cross_entropy or mse, or a task with its own evaluate")

    def with_loss(self, model: nn.Module) -> nn.Module:
        return model if self.loss == "model" else WithLoss(model, self)

    def summed_loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return F.cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="sum")
        if output.shape != target.shape:  # torch would broadcast [B, 1] against [B] to [B, B], and train
            raise ConfigError(f"mse needs an output of the target's shape {[*target.shape]}, not {[*output.shape]}")
        return F.mse_loss(output, target, reduction="sum")


class WithLoss(nn.Module):
    """A plain module as the engine calls it: with a loss over `num_items`; where it is evaluated, its metrics too."""

    def __init__(self, model: nn.Module, spec: TaskSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, num_items: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        output = self.model(*(batch[name] for name in self.spec.input_fields))
        target = batch.get(self.spec.target_field)
        if target is None:
            return {"logits": output}
        scores = {"loss": self.spec.summed_loss(output, target)}
        if not self.training:
            scores |= {name: metric(output, target) for name, metric in self.spec.metrics.items()}
        items = _count(target).clamp(min=1) if num_items is None else num_items
        return {name: score / items for name, score in scores.items()}


def _count(target: Tensor) -> Tensor:
    """Targets that count, 0-d int64."""
    counted = torch.ones_like(target) if target.is_floating_point() else target != IGNORED
    return counted.sum(dtype=torch.int64)


class UniversalDataModule:
    """A `TaskSpec` with its data, as the engine's Task. Its scores are every part of the loss, and the metrics."""

    def __init__(
        self, spec: TaskSpec, train_data: Sequence[Any] | None, val_data: Sequence[Any] | None, batch_size: int = 32
    ) -> None:
        for name, data in (("train_data", train_data), ("val_data", val_data)):
            if data is None or len(data) == 0:
                raise ConfigError(f"{name} has no items; train and validate on lists of {spec.name} that share none")
        self.train, self.val = cast(Sequence[Any], train_data), cast(Sequence[Any], val_data)
        self.spec, self.batch_size = spec, batch_size
        self.monitor, self.mode, self.item_name = spec.monitor, str(spec.mode), spec.item_name

    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """Sequences of different lengths are padded: inputs with 0, targets with what doesn't count."""
        names = (*self.spec.input_fields, self.spec.target_field)
        rows = [[item[n] for n in names] if isinstance(item, Mapping) else item for item in items]
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        return {name: _stack(column, IGNORED * (name == self.spec.target_field)) for name, column in columns.items()}

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        return _count(batch[self.spec.target_field])

    def evaluate(self, predict: Predictor) -> dict[str, float]:
        """Means over what counts, so that a short batch weighs as little as it holds."""
        batches = [range(len(self.val))[i : i + self.batch_size] for i in range(0, len(self.val), self.batch_size)]
        sums: dict[str, Any] = {"items": 0}
        for number in predict.share(len(batches)):
            batch = self.collate([self.val[i] for i in batches[number]])
            items = self.num_items(batch)
            for name, mean in {**predict(batch), "items": 1}.items():
                sums[name] = sums.get(name, 0) + mean * items
        total = predict.total(sums)
        return {name: value / total["items"] for name, value in total.items() if name != "items"}


def _stack(values: Sequence[Any], padding: int) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    if padding and tensors[0].is_floating_point():
        raise ConfigError("targets that are no classes must have one length; cut or pad them to it")
    return pad_sequence(tensors, batch_first=True, padding_value=padding)
