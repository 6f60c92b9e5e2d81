from __future__ import annotations

import torch

from train.engine import guard as guard_module
from train.engine.guard import ENOUGH, WINDOW, Guard


def judge(guard: Guard, losses: list[float], norm: float = 1.0) -> list[float]:
    return [guard.verdict(i, torch.tensor(x), torch.tensor(norm)).item() for i, x in enumerate(losses)]


def noisy(length: int, level: float = 2.0) -> list[float]:
    return (level + 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(0))).tolist()


def test_ordinary_noise_and_descent_are_no_spikes():
    assert sum(judge(Guard(torch.device("cpu")), noisy(500))) == 0
    assert sum(judge(Guard(torch.device("cpu")), [10 * 0.99**i for i in range(500)])) == 0


def test_a_spike_is_judged_only_with_a_history():
    losses = noisy(200)
    losses[ENOUGH - 2] = losses[150] = 50.0
    verdicts = judge(Guard(torch.device("cpu")), losses)
    assert [i for i, bad in enumerate(verdicts) if bad] == [150]


def test_what_is_not_finite_is_bad_from_the_start():
    guard = Guard(torch.device("cpu"))
    assert judge(guard, [float("nan"), float("inf"), 1.0]) == [1.0, 1.0, 0.0]
    assert judge(guard, [1.0], norm=float("inf")) == [1.0]
    assert guard.streak.item() == 1


def test_a_level_that_stays_high_is_news_once():
    verdicts = judge(Guard(torch.device("cpu")), noisy(WINDOW) + noisy(2 * WINDOW, level=20.0))
    assert verdicts[WINDOW] == 1.0 and sum(verdicts[2 * WINDOW :]) == 0


def test_what_is_left_to_learn_of_a_nearly_solved_task_is_learned(monkeypatch):
    losses = noisy(100) + [1e-4] * 300
    losses[250::20] = [0.05] * len(losses[250::20])  # a hard batch now and then
    losses[-1] = 1.5
    bad = [i for i, verdict in enumerate(judge(Guard(torch.device("cpu")), losses)) if verdict]
    assert bad == [len(losses) - 1]
    monkeypatch.setattr(guard_module, "LEAST_OF_HIGHEST", 0.0)
    assert sum(judge(Guard(torch.device("cpu")), losses)) > 5


def test_its_state_goes_on_where_it_was():
    losses, first, second = noisy(60), Guard(torch.device("cpu")), Guard(torch.device("cpu"))
    judge(first, losses)
    second.load_state_dict(first.state_dict())
    rest = [g.verdict(60, torch.tensor(50.0), torch.tensor(1.0)).item() for g in (first, second)]
    assert (
        rest == [1.0, 1.0]
        and first.highest.equal(second.highest)
        and first.losses.nan_to_num().equal(second.losses.nan_to_num())
    )
