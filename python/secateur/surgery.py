"""Optimizer-state surgery: find, mask and reshape the moments of a parameter, for any optimizer.

A moment is any tensor that the optimizer keeps for a parameter in the parameter's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

__all__ = [
    "check_replaceable",
    "group_of",
    "keeps_zeros",
    "moments",
    "replace_parameter",
    "versions",
]

# bench/optimizers.py shows what each optimizer does to zeros. Not here: Rprop and Adamax, which
# move moments, and Muon, which moves weights.
_KEEPS_ZEROS = frozenset({SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta, ASGD})


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group that holds ``parameter``; None where the optimizer does not hold it."""
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None


def moments(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The moments of ``parameter`` and the keys they are kept under; none before a step.

    A moment is floating-point state of the parameter's shape, also where an optimizer keeps several
    of them in a list or a dict, or leaves them to the optimizer that it wraps.
    """
    # ZeroRedundancyOptimizer has .optim, accelerate's wrapper .optimizer.
    wrapped = (getattr(optimizer, name, None) for name in ("optim", "optimizer"))
    for each in (optimizer, *(inner for inner in wrapped if isinstance(inner, Optimizer))):
        for key, value in each.state.get(parameter, {}).items():
            for t in (value,) if isinstance(value, Tensor) else _tensors(value):
                if _is_moment(t, parameter):
                    yield key, t


def versions(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Which tensors are kept for ``parameters``, and how often each was written to."""
    state = optimizer.state
    return [
        (id(t), t._version)
        for parameter in parameters
        if parameter in state
        for t in state[parameter].values()
        if isinstance(t, Tensor)
    ]


def keeps_zeros(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether weights and moments stay zero where they and the gradient are, and only there.

    So that weights which are zero after an update tell that moments are. A subclass, like any
    optimizer that is not torch's own, may do anything; in half precision, and where the learning
    rate is 0, a moment may not move its weight. Always False on a GPU, which would have to be
    waited for to look at the weights.
    """
    return (
        type(optimizer) in _KEEPS_ZEROS
        and all(group["lr"] != 0 for group in optimizer.param_groups)
        and all(p.is_cpu and p.dtype in (torch.float32, torch.float64) for p in parameters)
    )


def check_replaceable(optimizer: Optimizer, parameter: Tensor, name: str, ndim: int) -> None:
    """Raise unless :func:`replace_parameter` can carry over what is kept for ``parameter``.

    Args:
        optimizer: about to lose ``parameter``.
        name: what errors call the parameter.
        ndim: dimensions of what takes its place.

    Raises:
        ValueError: the optimizer does not hold a parameter that is trained, cannot train what takes
            its place, or keeps a tensor for it that is neither a moment nor a single number.
    """
    kind = type(optimizer).__name__
    if group_of(optimizer, parameter) is None:
        if parameter.requires_grad:
            raise ValueError(
                "expected the optimizer to hold every parameter that is replaced, got one without "
                f"{name}"
            )
        return
    if isinstance(optimizer, LBFGS) or (isinstance(optimizer, Muon) and ndim != 2):
        limit = (
            "2-D parameters only" if isinstance(optimizer, Muon) else "a fixed set of parameters"
        )
        raise ValueError(
            f"expected an optimizer that can train a replaced {name}, got {kind}, which takes "
            f"{limit}"
        )
    for key, value in optimizer.state.get(parameter, {}).items():
        if _is_moment(value, parameter):
            continue
        for t in _tensors(value):
            if t.numel() != 1:
                raise ValueError(
                    f"expected {kind} to keep for {name} only single numbers and floating-point "
                    f"tensors of its shape {tuple(parameter.shape)}, got {key!r} with {t.dtype} of "
                    f"shape {tuple(t.shape)}"
                )


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


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value of an optimizer's state, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _is_moment(value: object, parameter: Tensor) -> bool:
    # A scalar parameter's step count has its shape too; no scalar is ever pruned or replaced.
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.is_floating_point()
        and value.ndim > 0
    )
