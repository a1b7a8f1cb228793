"""Checks that every op's wrapper makes alike."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.ops._spec import FLOATS


def check_float(name: str, t: Tensor) -> None:
    """TypeError unless ``t``, called ``name``, is a Tensor of a dtype that the kernels have."""
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"expected {name} to be float32, bfloat16, float16 or float64, got {t.dtype}"
        )


def check_bool(name: str, t: Tensor) -> None:
    """TypeError unless ``t``, called ``name``, is a bool Tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(t).__name__}")
    if t.dtype != torch.bool:
        raise TypeError(f"expected {name} to be torch.bool, got {t.dtype}")
