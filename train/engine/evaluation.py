"""What a task is given to score a model with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.backend import Backend
from train.engine.checkpoint import random_state, set_random_state


class Predictor:
    """`predict(batch)`: the forward without labels, in evaluation mode and the run's precision, without gradients.

    A task that scores n batches asks `share(n)` which of them are this process's, calls once for each, and adds up with
    `total`. What decodes takes `whole()`. `spare` is a batch that the model can be called with.
    """

    def __init__(self, model: nn.Module, backend: Backend, spare: dict[str, Any]) -> None:
        self.model, self._backend, self._spare = model, backend, spare

    def __call__(self, batch: dict[str, Any]) -> Any:
        with torch.no_grad(), self._backend.autocast():
            return self.model(**self._backend.move(batch))

    def share(self, n: int) -> list[int]:
        """Which of n batches this process scores. Every process calls it, with the same n."""
        mine = list(range(self._backend.rank, n, self._backend.world_size))
        if self._backend.collective and len(mine) * self._backend.world_size < n:
            self(self._spare)  # Where weights come together for each forward, all processes must make as many.
        return mine

    def whole(self) -> nn.Module | None:
        """The model with all its weights, in evaluation mode, on process 0; None on the others. Collective."""
        model = self._backend.whole(self.model, self._backend.device)
        return model.eval() if model is not None else None

    def total(self, sums: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Each sum over all processes. Collective; names are process 0's, for one that scored nothing may have none."""
        names = self._backend.broadcast(list(sums))
        dtype = torch.float32 if self._backend.device.type == "mps" else torch.float64
        values = [torch.as_tensor(sums.get(n, 0), dtype=dtype, device=self._backend.device) for n in names]
        return dict(zip(names, self._backend.sum(torch.stack(values)).tolist(), strict=True))


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and random numbers that training doesn't miss: when one evaluates changes no weight."""
    state, mode = random_state(), model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
        set_random_state(state)
