"""Particles on springs, of which everything is known: the variance of a coordinate is k T / stiffness."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.molecule.system import KB

MASSES = np.array([1.0, 16.0])  # amu


class Wells:
    """U = sum over N particles of stiffness x^2 / 2, in kJ/mol; stiffness [N] in kJ/mol/nm^2."""

    def __init__(self, *stiffness: float) -> None:
        self.stiffness = torch.tensor(stiffness, dtype=torch.float64)[:, None]
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        return (self.stiffness.to(x.dtype) * x.square()).sum((-2, -1)) / 2

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += x.shape[:-2].numel()
        return self(x), -self.stiffness.to(x.dtype) * x

    def sample(self, temperature: float | Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Exact positions [*shape, N, 3]; temperature in K, broadcastable to `shape`."""
        kelvin = torch.as_tensor(temperature, dtype=torch.float64)[..., None, None]
        noise = torch.randn(*shape, len(self.stiffness), 3, dtype=torch.float64, generator=generator)
        return noise * (KB * kelvin / self.stiffness).sqrt()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def not_normal(sample: Tensor, std: float) -> float:
    """Kolmogorov's distance times sqrt(n) of a sample from a normal distribution about 0: 1.63 is passed by chance once
    in a hundred times, 1.95 once in a thousand."""
    x = sample.flatten().double().sort().values
    places = torch.arange(1, len(x) + 1) / len(x)
    cdf = torch.special.ndtr(x / std)
    return float(torch.maximum(places - cdf, cdf - places + 1 / len(x)).max() * len(x) ** 0.5)
