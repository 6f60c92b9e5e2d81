"""Fused ops, each with a fast PyTorch fallback and a plain reference for float64. Imports nothing of ours.

Defines no `__version__`: transformers takes a package called `kernels` that has one for the Hub's.
"""

from kernels.eigen_scan import ScanOutput, eigen_scan, eigen_scan_reference
from kernels.linear_cross_entropy import LossParts, linear_cross_entropy, linear_cross_entropy_reference
from kernels.masked_cross_entropy import (
    masked_cross_entropy,
    masked_cross_entropy_reference,
    masked_log_softmax,
    masked_log_softmax_reference,
)
from kernels.multiscale_pool import multiscale_pool, multiscale_pool_reference
from kernels.neighbor_cross_entropy import NeighborCE, neighbor_cross_entropy, neighbor_cross_entropy_reference

__all__ = [
    "LossParts",
    "NeighborCE",
    "ScanOutput",
    "eigen_scan",
    "eigen_scan_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "masked_cross_entropy",
    "masked_cross_entropy_reference",
    "masked_log_softmax",
    "masked_log_softmax_reference",
    "multiscale_pool",
    "multiscale_pool_reference",
    "neighbor_cross_entropy",
    "neighbor_cross_entropy_reference",
]
