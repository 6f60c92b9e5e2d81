from __future__ import annotations

import pytest
import torch

from kernels.dispatch import backend


@pytest.mark.parametrize("choice", [None, "auto", "torch"])
def test_every_op_falls_back_to_torch(monkeypatch, choice):
    monkeypatch.delenv("TENFOLD_KERNELS", raising=False)
    if choice is not None:
        monkeypatch.setenv("TENFOLD_KERNELS", choice)
    assert backend("eigen_scan") == "torch"


def test_triton_without_a_kernel_is_an_error_and_not_a_fallback(monkeypatch):
    monkeypatch.setenv("TENFOLD_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="no Triton kernel for eigen_scan"):
        backend("eigen_scan")


def test_the_choice_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv("TENFOLD_KERNELS", "torch")
    assert backend("eigen_scan") == "torch"
    monkeypatch.setenv("TENFOLD_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda' names no backend: use auto, triton or torch"):
        backend("eigen_scan")


def test_fresh_memory_is_poisoned_in_kernel_tests():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    assert torch.empty(3, dtype=torch.int64).shape == (3,)
