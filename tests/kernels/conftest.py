"""Poisons fresh memory, so that an output element no kernel wrote shows up as NaN instead of a lucky zero."""

from __future__ import annotations

import pytest
import torch


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() or out.is_complex() else out

    return wrapper


@pytest.fixture(autouse=True)
def nan_poisoned_empty(monkeypatch):
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
