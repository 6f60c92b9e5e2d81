"""Random numbers that are a function of a key and a counter: the same for any batch size, worker or device.

The mixer is splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) in wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, 2^64 / golden ratio, as a signed number
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right, with zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 under which neighbouring numbers have nothing in common."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def keys(*parts: Tensor | int) -> Tensor:
    """One int64 key for each element of the parts, which broadcast."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        part = torch.as_tensor(part, dtype=torch.int64)
        key = mix((key.to(part.device) + GAMMA) ^ mix(part + GAMMA))
    return key


def integers(key: Tensor, count: int, high: int, stream: int = 0) -> Tensor:
    """Uniform in 0..high - 1, to within high / 2^31: int64 [B, count] of keys [B]; each stream has its own."""
    counter = torch.arange(1, count + 1, device=key.device) + (stream << 32)
    return _shift(mix(key.unsqueeze(-1) + counter * GAMMA), 33) % high


def order(key: Tensor, count: int, stream: int = 0) -> Tensor:
    """A uniformly random order of 0..count - 1 for each key: int64 [B, count]."""
    return integers(key, count, 1 << 31, stream).argsort(dim=1, stable=True)
