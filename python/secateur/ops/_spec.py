"""What an op tells the tests and benchmarks about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sample:
    """One call of an op: its positional arguments, and what makes the case worth having."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class OpSpec:
    """An op of ``torch.ops.secateur`` with all that is needed to check it.

    Attributes:
        name: the op's name in ``torch.ops.secateur``.
        reference: the same signature in plain PyTorch, same results (up to the tolerance of the
            dtype), same in-place effects.
        samples: ``(dtype, device) -> calls``, deterministic; covers the awkward sizes.
        dtypes: dtypes the samples can be asked for.
        exact: whether results must equal the reference bit for bit.
        differentiable: whether ``torch.autograd.gradcheck`` applies (in float64).
    """

    name: str
    reference: Callable[..., Any]
    samples: Callable[[torch.dtype, torch.device], Iterator[Sample]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    exact: bool = False
    differentiable: bool = False

    @property
    def op(self) -> Any:
        """The registered overload, as ``opcheck`` wants it."""
        return getattr(torch.ops.secateur, self.name).default
