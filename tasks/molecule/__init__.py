"""Molecules at temperatures: potential energy, dynamics, tempering, data and what is observed of them."""

from tasks.molecule.potential import Potential
from tasks.molecule.system import KB, System, beta, is_l, load_system

__all__ = ["KB", "Potential", "System", "beta", "is_l", "load_system"]
