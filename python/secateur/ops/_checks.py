"""Checks that every op's wrapper makes alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from secateur.ops._spec import FLOATS

MAX_DIMS = 8  # kMaxDims in csrc/common/view.h


def check_tensor(name: str, t: object) -> None:
    """TypeError unless ``t``, called ``name``, is a Tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(t).__name__}")


def check_list(name: str, given: object, what: str = "a list of Tensors") -> None:
    """TypeError unless ``given``, called ``name``, is a list or tuple."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        got = "a Tensor" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"expected {name} to be {what}, got {got}")


def check_float(name: str, t: Tensor) -> None:
    """TypeError unless ``t``, called ``name``, is a strided Tensor of a dtype of the kernels."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(
            f"expected {name} to be float32, bfloat16, float16 or float64, got {t.dtype}"
        )
    check_strided(name, t)


def check_bool(name: str, t: Tensor) -> None:
    """TypeError unless ``t``, called ``name``, is a strided bool Tensor."""
    check_tensor(name, t)
    if t.dtype != torch.bool:
        raise TypeError(f"expected {name} to be torch.bool, got {t.dtype}")
    check_strided(name, t)


def check_strided(name: str, t: Tensor) -> None:
    """TypeError if ``t``, called ``name``, has a sparse layout."""
    if t.layout != torch.strided:
        raise TypeError(f"expected {name} to be strided, got {t.layout}")


def is_ints(value: object) -> TypeGuard[Sequence[int]]:
    """Whether ``value`` is a list or tuple of ints, which torch may know by symbols only."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in value
    )


def check_writable(name: str, t: Tensor) -> None:
    """ValueError unless a kernel can write every element of ``t``, called ``name``, in place."""
    if _overlaps(t):
        raise ValueError(
            f"expected {name} to be a tensor whose elements do not share memory, got strides "
            f"{t.stride()} for shape {tuple(t.shape)}"
        )
    if _merged_dims(t) > MAX_DIMS:
        raise ValueError(
            f"expected {name} to have at most {MAX_DIMS} dimensions that cannot be merged, "
            f"got {_merged_dims(t)}"
        )


def check_apart(name: str, tensors: Sequence[Tensor]) -> None:
    """ValueError if two of ``tensors``, called ``name``, share memory: threads would race for it.

    Of strided tensors it knows only those that begin at one address.
    """
    if torch.compiler.is_compiling() or any(t.is_meta for t in tensors):
        return
    begins: dict[int, int] = {}
    end, owner = 0, 0  # of the contiguous one before
    for address, i in sorted((t.data_ptr(), i) for i, t in enumerate(tensors) if t.numel() > 0):
        other = begins.setdefault(address, i)
        if tensors[i].is_contiguous():
            if address < end:
                other = owner
            end, owner = address + tensors[i].nbytes, i
        if other != i:
            raise ValueError(
                f"expected {name} to share no memory, got {name}[{min(other, i)}] and "
                f"{name}[{max(other, i)}], which do"
            )


def readable(t: Tensor) -> Tensor:
    """``t``, or a contiguous copy where it has more dimensions than kernels can walk."""
    return t if t.dim() <= MAX_DIMS or _merged_dims(t) <= MAX_DIMS else t.contiguous()


def _overlaps(t: Tensor) -> bool:
    """Whether a dimension steps into what those of smaller strides reach."""
    reach = 0  # elements beyond the first
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)) if t.numel() > 0 else ():
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _merged_dims(t: Tensor) -> int:
    """How many dimensions are left when neighbours that are contiguous are merged."""
    count, previous = 0, None
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size != 1:
            count += previous != size * stride
            previous = stride
    return count
