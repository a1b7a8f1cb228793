"""Prune networks while they train, and train faster as they thin out."""

from secateur import ops
from secateur._C import build_info
from secateur.sparse import BlockSparse

__version__ = "0.1.0"
__all__ = ["BlockSparse", "__version__", "build_info", "ops"]
