"""Optimizer-state surgery: find, mask and reshape the moments of a parameter, for any optimizer.

A moment is any tensor that the optimizer keeps for a parameter in the parameter's own shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["group_of", "moments", "replace_parameter"]


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group that holds ``parameter``; None where the optimizer does not hold it."""
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None


def moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """The moments of ``parameter``: floating-point state of its shape; empty before a step."""
    return [t for t in optimizer.state.get(parameter, {}).values() if _is_moment(t, parameter)]


def replace_parameter(
    optimizer: Optimizer,
    old: Tensor,
    new: Tensor,
    convert: Callable[[Tensor], Tensor],
) -> None:
    """Let ``new`` take the place of ``old``: same group, same position, its state carried over.

    Args:
        optimizer: holds ``old``.
        new: takes over.
        convert: from the shape of ``old`` to the shape of ``new``; applied to every moment. Other
            state (step counts) is kept as it is.

    Raises:
        ValueError: the optimizer does not hold ``old``. Nothing is changed then.
    """
    group = group_of(optimizer, old)
    if group is None:
        raise ValueError(
            "expected the optimizer to hold every parameter that is replaced, got a parameter of "
            f"shape {tuple(old.shape)} that is in none of its groups"
        )
    group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: convert(value) if _is_moment(value, old) else value for key, value in state.items()
        }


def _is_moment(value: object, parameter: Tensor) -> bool:
    # A scalar parameter's step count has its shape too; no scalar is ever pruned or replaced.
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.is_floating_point()
        and value.ndim > 0
    )
