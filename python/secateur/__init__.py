"""Prune networks while they train, and train faster as they thin out."""

from secateur import nn as nn
from secateur import ops as ops
from secateur.checkpoint import load, save
from secateur.costs import Cost, CostTable, cost, cost_table
from secateur.criteria import (
    OBD,
    Criterion,
    Entropy,
    Gradient,
    HessianDiagonal,
    Magnitude,
    Movement,
    Random,
    Taylor,
)
from secateur.curvature import hutchinson_diagonal
from secateur.granularity import Block, Element, Granularity
from secateur.nn import BlockSparseLinear, densify, sparsify
from secateur.ops import build_info
from secateur.pruner import Pruner, prune_
from secateur.schedules import (
    Cubic,
    Exponential,
    Linear,
    OneShot,
    Ramp,
    Schedule,
    Target,
    Threshold,
)
from secateur.sparse import BlockSparse

__version__ = "0.1.0"
__all__ = [
    "OBD",
    "Block",
    "BlockSparse",
    "BlockSparseLinear",
    "Cost",
    "CostTable",
    "Criterion",
    "Cubic",
    "Element",
    "Entropy",
    "Exponential",
    "Gradient",
    "Granularity",
    "HessianDiagonal",
    "Linear",
    "Magnitude",
    "Movement",
    "OneShot",
    "Pruner",
    "Ramp",
    "Random",
    "Schedule",
    "Target",
    "Taylor",
    "Threshold",
    "__version__",
    "build_info",
    "cost",
    "cost_table",
    "densify",
    "hutchinson_diagonal",
    "load",
    "prune_",
    "save",
    "sparsify",
]
