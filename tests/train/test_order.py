from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tests.toy import ToyTask
from train.engine import ConfigError, TrainingConfig
from train.engine.order import DataOrder, MicroBatches, micro_batches_per_step, windows


def test_an_epoch_names_every_item_once_whatever_the_batch_size():
    for batch_size in (1, 3, 7, 40):
        order = DataOrder(40, batch_size, seed=5)
        stream = np.concatenate([order.items(step) for step in range(-(-120 // batch_size))])[:120]
        for epoch in stream.reshape(3, 40):
            assert sorted(epoch) == list(range(40))
        assert (stream == np.concatenate([DataOrder(40, 40, seed=5).items(e) for e in range(3)])).all()
    assert (stream[:40] != stream[40:80]).any()
    assert (DataOrder(40, 40, seed=6).items(0) != stream[:40]).any()


def test_items_that_are_drawn_anew_are_counted_on():
    anew, again = DataOrder(40, 7, seed=5, counted_on=True), DataOrder(40, 7, seed=5)
    stream, known = (np.concatenate([order.items(step) for step in range(12)]) for order in (anew, again))
    assert (stream == known + 40 * (np.arange(84) // 40)).all()


def test_the_order_of_a_step_needs_no_history():
    walked, jumped = DataOrder(40, 7, seed=0), DataOrder(40, 7, seed=0)
    for step in range(30):
        last = walked.items(step)
    assert (jumped.items(29) == last).all()


def test_blocks_keep_items_near_their_place():
    order = DataOrder(40, 7, seed=0, block=8)
    stream = np.concatenate([order.items(step) for step in range(12)])[:80].reshape(10, 8)
    for number, items in enumerate(stream):
        assert sorted(items) == list(range(number % 5 * 8, number % 5 * 8 + 8))
    assert (stream[0] != stream[1] - 8).any() and (stream[0] != stream[5]).any()
    assert (DataOrder(40, 7, seed=0, block=8).items(11) == order.items(11)).all()
    assert (DataOrder(40, 7, seed=0, block=40).items(3) == DataOrder(40, 7, seed=0).items(3)).all()
    assert max(DataOrder(2**33, 4, seed=0, block=2**13).items(10**6)) < 2**23  # only one block is ever permuted
    for block in (0, 7):
        with pytest.raises(ValueError, match="must divide the 40 items"):
            DataOrder(40, 7, seed=0, block=block)


def test_processes_and_micro_batches_share_a_step_out():
    order = DataOrder(40, 12, seed=0)
    parts = [list(islice(MicroBatches(order, 4, rank, 3, per_step=2), 2)) for rank in range(3)]
    assert all(len(p) == 2 for p in parts)
    assert [i for rank in parts for micro in rank for i in micro] == order.items(4).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_are_the_steps_in_order(workers):
    task, order = ToyTask(), DataOrder(40, 8, seed=0)
    got = list(islice(windows(task, MicroBatches(order, 3, 0, 1, per_step=3), workers, pin_memory=False), 4))
    for step, window in enumerate(got, start=3):
        tokens = [row.tolist() for batch in window for row in batch["tokens"]]
        assert len(window) == 3
        assert tokens == [task.train[int(i)]["tokens"].tolist() for i in order.items(step)]


def test_batches_that_do_not_split_are_sentences():
    with pytest.raises(ConfigError, match="take 12 or 8"):
        micro_batches_per_step(TrainingConfig(batch_size=10), world_size=4)
    with pytest.raises(ConfigError, match="take 4"):
        micro_batches_per_step(TrainingConfig(batch_size=3), world_size=4)
    with pytest.raises(ConfigError, match="more than the 5 items"):
        micro_batches_per_step(TrainingConfig(batch_size=10, gradient_accumulation=6), world_size=2)
    assert micro_batches_per_step(TrainingConfig(batch_size=10, micro_batch_size=2), world_size=2) == 3
