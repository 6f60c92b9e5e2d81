"""Fused ops: a fast PyTorch fallback and a float64-ready reference each, Triton where there is a GPU. Imports nothing of ours."""
