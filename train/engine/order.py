"""Which items make up which step: a pure function of (seed, step), so that there is no loader state to save."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from train.engine.config import ConfigError, TrainingConfig

MOST_SHUFFLED = 2**28  # 2 GiB of indices


class DataOrder:
    """Epoch after epoch, each in an order of its own; a step that crosses an epoch's end takes from both.

    With a `block`, a divisor of `num_items`, only the items of a block change places: what streams comes by in order.
    `counted_on`: item i is called i + e * num_items in epoch e, for items that are another each time they are drawn.
    """

    def __init__(
        self, num_items: int, batch_size: int, seed: int, block: int | None = None, counted_on: bool = False
    ) -> None:
        self.num_items, self.batch_size, self.seed, self.counted_on = num_items, batch_size, seed, counted_on
        self.block = num_items if block is None else block
        if self.block < 1 or num_items % self.block:
            raise ValueError(f"block must divide the {num_items} items, got {self.block}.")
        if self.block > MOST_SHUFFLED:
            raise ConfigError(f"an epoch of {num_items:,} items cannot be shuffled: take {MOST_SHUFFLED:,} or fewer")
        self._number, self._permutation = -1, np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> float:
        return self.num_items / self.batch_size

    def describe(self) -> str:
        if self.block < self.num_items:
            return f"a stream, shuffled within every {self.block:,} items"
        return f"{self.num_items:,} items, {self.steps_per_epoch:,.1f} steps per epoch"

    def items(self, step: int) -> np.ndarray:
        """Indices of optimizer step `step`, int64 [batch_size]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        numbers, within = np.divmod(positions, self.block)
        return np.concatenate([self._of_block(n)[within[numbers == n]] for n in np.unique(numbers)])

    def _of_block(self, number: int) -> np.ndarray:
        """Items of the block with this number, counted on through the epochs; without blocks an epoch is one."""
        if number != self._number:
            self._number = number
            self._permutation = np.random.default_rng([self.seed, int(number)]).permutation(self.block)
            first = int(number) * self.block
            self._permutation += first if self.counted_on else first % self.num_items
        return self._permutation


def order_of(task: Any, config: TrainingConfig) -> DataOrder:
    """The order of the task's training items. A stream says as `shuffle_block` how far they may change places; items
    that depend on the epoch say `counted_on`."""
    block, counted_on = getattr(task.train, "shuffle_block", None), getattr(task.train, "counted_on", False)
    return DataOrder(len(task.train), config.batch_size, config.seed, block, counted_on)


class MicroBatches:
    """Batch sampler: from step `start` on, for ever, the micro-batches of one process, `per_step` to a step."""

    def __init__(self, order: DataOrder, start: int, rank: int, world_size: int, per_step: int) -> None:
        self.order, self.start, self.rank, self.world_size, self.per_step = order, start, rank, world_size, per_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            mine = np.array_split(self.order.items(step), self.world_size)[self.rank]
            for part in np.array_split(mine, self.per_step):
                yield part.tolist()
            step += 1


def micro_batches_per_step(config: TrainingConfig, world_size: int) -> int:
    """Forward passes that a process makes per optimizer step, the same on all. Raises ConfigError."""
    mine, rest = divmod(config.batch_size, world_size)
    if rest:
        raise ConfigError(
            f"--batch_size {config.batch_size} does not split over {world_size} processes; "
            f"take {(mine + 1) * world_size}" + (f" or {mine * world_size}" if mine else "")
        )
    per_step = config.gradient_accumulation or -(-mine // (config.micro_batch_size or mine))
    if per_step > mine:
        raise ConfigError(f"--gradient_accumulation {per_step} is more than the {mine} items of a process's step")
    return per_step


def _shield_worker(worker: int) -> None:
    """Loader workers get the group's signals too; were they to die of them, the last save could not be reached."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def windows(task: Any, sampler: MicroBatches, num_workers: int, pin_memory: bool) -> Generator[list[dict]]:
    """The micro-batches of one optimizer step after another, collated, on the CPU."""
    loader = DataLoader(
        task.train,
        batch_sampler=sampler,
        collate_fn=task.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_shield_worker,
        # Of its own: a loader draws a seed when it starts, and a resumed run starts one more often.
        generator=torch.Generator(),
    )
    window: list[dict] = []
    for batch in loader:
        window.append(batch)
        if len(window) == sampler.per_step:
            yield window
            window = []
