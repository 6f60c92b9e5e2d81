"""A model and a task that train in milliseconds: ragged sequences, dropout, a part that counts positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, LENGTH = 5, 6


class ToyModel(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(CLASSES, 16), nn.Linear(16, 16), nn.Dropout(dropout), nn.Tanh())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, num_items: Tensor | None = None):
        hidden = self.net(tokens)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        counted = labels != -100
        num_items = counted.sum() if num_items is None else num_items
        ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / num_items
        energy = (hidden.square().mean(-1) * counted).sum() / num_items
        return {"loss": ce + 0.1 * energy, "ce_loss": ce.detach(), "energy_loss": energy.detach()}


class ToyData:
    """Label t is token t plus one; lengths differ, the rest is padding."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(CLASSES, (size, LENGTH), generator=generator)
        self.lengths = torch.randint(1, LENGTH + 1, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = (self.tokens[i] + 1) % CLASSES
        return {"tokens": self.tokens[i], "labels": labels.masked_fill(torch.arange(LENGTH) >= self.lengths[i], -100)}


class ToyTask:
    monitor, mode, item_name = "accuracy", "max", "tokens"

    def __init__(self) -> None:
        self.train, self.val = ToyData(40, seed=0), ToyData(16, seed=1)

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != -100).sum()

    def evaluate(self, predict) -> dict[str, float]:
        right = 0
        torch.rand(3)  # An evaluation may draw random numbers; training must not notice.
        for i in predict.share(len(self.val)):
            batch = self.collate([self.val[i]])
            guess = predict({"tokens": batch["tokens"]})["logits"].argmax(-1).cpu()
            right += (guess == batch["labels"]).sum().item()
        total = predict.total({"right": right})
        return {"accuracy": total["right"] / sum(self.val.lengths.tolist())}
