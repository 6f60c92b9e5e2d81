from __future__ import annotations

import pytest
import torch

from tasks.compare import holm, mcnemar, over_seeds, paired_difference, wilson


def test_intervals_and_p_values_are_the_textbooks():
    assert wilson(33, 57) == (pytest.approx(0.450, abs=1e-3), pytest.approx(0.698, abs=1e-3))
    first, second = torch.tensor([True] * 8 + [False] * 2), torch.tensor([True] * 2 + [False] * 8)
    assert mcnemar(first, second) == pytest.approx(2 / 2**6)
    assert mcnemar(first, first) == 1.0
    mean, half = over_seeds([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert over_seeds([0.5]) == (0.5, None)
    assert holm({"a": 0.04, "b": 0.01, "c": 0.5}) == {"a": 0.08, "b": 0.03, "c": 0.5}


@pytest.mark.parametrize(("better_by", "found"), [(0.0, False), (0.1, True)])
def test_a_difference_is_found_where_there_is_one(better_by, found):
    g = torch.Generator().manual_seed(1)
    hard = torch.rand(1, 1000, generator=g)  # what is hard is so for both
    first = (torch.rand(3, 1000, generator=g) * 0.2 + hard < 0.6 + better_by).float()
    second = (torch.rand(3, 1000, generator=g) * 0.2 + hard < 0.6).float()
    difference, low, high = paired_difference(first, second)
    assert low <= difference <= high and (low > 0) == found
    unpaired = paired_difference(first, second[:, torch.randperm(1000, generator=g)])
    assert unpaired[2] - unpaired[1] > high - low  # the same mazes make it sharper
