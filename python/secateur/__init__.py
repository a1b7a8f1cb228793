"""Prune networks while they train, and train faster as they thin out."""

from secateur import ops
from secateur._C import build_info

__version__ = "0.1.0"
__all__ = ["__version__", "build_info", "ops"]
