"""Bit-packed masks: one bit a weight, 1 = alive. Element i is bit i % 8 of byte i // 8."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secateur import _C
from secateur.ops._checks import (
    check_apart,
    check_bool,
    check_float,
    check_list,
    check_tensor,
    check_writable,
    is_ints,
)
from secateur.ops._spec import OpSpec, Sample


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into bits.

    Args:
        mask: bool, any shape and strides.

    Returns:
        uint8 of shape ``(ceil(mask.numel() / 8),)``, in logical (row-major) order; the unused bits
        of the last byte are 0.

    Raises:
        TypeError: ``mask`` is not bool.

    Equivalent to:
        ``numpy.packbits(mask.flatten(), bitorder="little")``
    """
    check_bool("mask", mask)
    bits: Tensor = torch.ops.secateur.pack_mask(mask)
    return bits


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack bits into a bool mask: the inverse of :func:`pack_mask`.

    Args:
        bits: uint8 of shape ``(ceil(n / 8),)`` where n is the product of ``shape``.
        shape: the mask's shape.

    Returns:
        bool of shape ``shape``.

    Raises:
        TypeError: ``bits`` is not a Tensor, or ``shape`` no ints.
        ValueError: ``bits`` is not what ``shape`` needs, or a size is negative.

    Equivalent to:
        ``numpy.unpackbits(bits, count=n, bitorder="little").reshape(shape)``
    """
    check_tensor("bits", bits)
    if not is_ints(shape):
        raise TypeError(f"expected shape to be several ints, got {shape!r}")
    if any(n < 0 for n in shape):
        raise ValueError(f"expected shape to have no negative size, got {tuple(shape)}")
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"expected {(numel + 7) // 8} bytes (uint8) for a mask of shape {tuple(shape)}, "
            f"got {bits.dtype} of shape {tuple(bits.shape)}"
        )
    mask: Tensor = torch.ops.secateur.unpack_mask(bits.contiguous(), list(shape))
    return mask


def mask_(tensors: Sequence[Tensor], bits: Sequence[Tensor]) -> Tensor:
    """Set the dead elements of each tensor to +0.0, in place; NaN and infinity included.

    Args:
        tensors: floating point, any shape and strides; weights, gradients or optimizer moments.
        bits: for each tensor its mask from :func:`pack_mask`.

    Returns:
        bool (number of tensors,): whether something dead was other than +0.0 before.

    Raises:
        TypeError: a tensor is not floating point, or no tensor. Nothing is changed then.
        ValueError: a mask does not fit its tensor, the counts differ, or elements of a tensor share
            memory (as after ``expand``), or two tensors do. Nothing is changed then.

    Equivalent to:
        ``for t, b in zip(tensors, bits): t.masked_fill_(~unpack_mask(b, t.shape), 0)``
    """
    check_list("tensors", tensors)
    check_list("bits", bits)
    if len(tensors) != len(bits):
        raise ValueError(
            f"expected one mask a tensor, got {len(tensors)} tensors and {len(bits)} masks"
        )
    for i, (t, b) in enumerate(zip(tensors, bits, strict=True)):
        check_float(f"tensors[{i}]", t)
        check_writable(f"tensors[{i}]", t)
        check_tensor(f"bits[{i}]", b)
        if b.dtype != torch.uint8 or b.shape != ((t.numel() + 7) // 8,) or b.device != t.device:
            raise ValueError(
                f"expected bits[{i}] to be {(t.numel() + 7) // 8} bytes (uint8) on {t.device} for "
                f"a tensor of shape {tuple(t.shape)}, got {b.dtype} of shape {tuple(b.shape)} on "
                f"{b.device}"
            )
    check_apart("tensors", tensors)
    return mask_unchecked_(list(tensors), [b.contiguous() for b in bits])


def mask_unchecked_(tensors: list[Tensor], bits: list[Tensor]) -> Tensor:
    """:func:`mask_` of tensors that are known to fit: the checks take as long as a small tensor."""
    if not tensors:  # the dispatcher finds a kernel by the tensors it is given
        return torch.zeros(0, dtype=torch.bool)
    with torch.no_grad():
        revived: Tensor = torch.ops.secateur.mask_(tensors, bits)
    # Ops of the stable ABI do not do this themselves.
    torch.autograd.graph.increment_version(tensors)
    return revived


def mask_fresh_(grad: Tensor, bits: Tensor) -> bool:
    """:func:`mask_` of a gradient that autograd has just written, by bits that fit it.

    Autograd calls this between matrix products, when no cache holds what it needs: the dispatcher
    alone would take 50 us there, more than masking most layers.

    Returns:
        False where it takes the dispatcher (another device or layout, a subclass, a graph that may
        have saved the gradient). Nothing is changed then.
    """
    if (
        type(grad) is not Tensor
        or not (grad.is_cpu and bits.is_cpu)
        or grad.layout is not torch.strided
        or not grad.is_contiguous()
        or grad.requires_grad
        or torch.compiler.is_compiling()
    ):
        return False
    _C.mask_memory_(grad.data_ptr(), grad.itemsize, grad.numel(), bits.data_ptr())
    return True


@torch.library.register_fake("secateur::pack_mask")
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake("secateur::unpack_mask")
def _(bits: Tensor, shape: list[int]) -> Tensor:
    return bits.new_empty(shape, dtype=torch.bool)


@torch.library.register_fake("secateur::mask_")
def _(tensors: list[Tensor], bits: list[Tensor]) -> Tensor:
    return bits[0].new_empty((len(tensors),), dtype=torch.bool)


def pack_mask_reference(mask: Tensor) -> Tensor:
    flat = mask.flatten()
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8).to(torch.uint8)
    return (padded << torch.arange(8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask_reference(bits: Tensor, shape: list[int]) -> Tensor:
    flat = (bits[:, None] >> torch.arange(8, device=bits.device) & 1).flatten().bool()
    return flat[: torch.Size(shape).numel()].view(shape)


def mask_reference_(tensors: list[Tensor], bits: list[Tensor]) -> Tensor:
    revived = []
    for t, b in zip(tensors, bits, strict=True):
        dead = ~unpack_mask_reference(b, list(t.shape))
        revived.append(bool(((t != 0) | t.signbit())[dead].any()))
        t.masked_fill_(dead, 0)
    return torch.tensor(revived, device=bits[0].device)


_SHAPES = ((), (0,), (1,), (7,), (8,), (5, 13), (64, 48), (3, 0, 4), (17, 3, 5), (70001,))


def _masks(device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    for shape in _SHAPES:
        yield torch.rand(shape, generator=generator, device=device) < 0.5
    yield (torch.rand(6, 10, generator=generator, device=device) < 0.5).t()
    yield (torch.rand(200, generator=generator, device=device) < 0.5)[1:]  # not aligned


def _pack_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for mask in _masks(device):
        yield Sample(f"{tuple(mask.shape)}", (mask,))


def _unpack_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for mask in _masks(device):
        yield Sample(f"{tuple(mask.shape)}", (pack_mask_reference(mask), list(mask.shape)))


def _mask_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(1)
    tensors, bits = [], []
    for mask in _masks(device):
        t = torch.randn(mask.shape, generator=generator, device=device).to(dtype)
        tensors.append(t)
        bits.append(pack_mask_reference(mask))
    yield Sample("list", (tensors, bits))
    bad = torch.tensor([float("nan"), float("inf"), -0.0, -1.0], device=device, dtype=dtype)
    yield Sample("nan", ([bad], [torch.tensor([0b0100], dtype=torch.uint8, device=device)]))
    wide = torch.randn(9, 40, generator=generator, device=device).to(dtype)
    keep = torch.rand(20, 9, generator=generator, device=device) < 0.3
    yield Sample("strided", ([wide[:, ::2].t()], [pack_mask_reference(keep)]))
    conv = torch.randn(4, 6, 3, 3, generator=generator, device=device).to(dtype)
    conv = conv.to(memory_format=torch.channels_last)
    keep = torch.rand(4, 6, 3, 3, generator=generator, device=device) < 0.3
    yield Sample("channels_last", ([conv], [pack_mask_reference(keep)]))
    # Most are masked already; one dead element of one of them is not zero.
    masked = [torch.zeros(300, dtype=dtype, device=device) for _ in range(3)]
    masked[1][290] = -0.0
    masked[2][7] = 1
    some = torch.ones(300, dtype=torch.bool, device=device)
    some[[7, 100, 290]] = False
    yield Sample("masked already", (masked, [pack_mask_reference(some)] * 3))
    # More than a CUDA kernel takes in one launch, of any layout.
    many = [torch.randn(2, 5, generator=generator, device=device).to(dtype) for _ in range(130)]
    many += [
        torch.randn(5, 4, generator=generator, device=device).to(dtype)[:, ::2].t()
        for _ in range(30)
    ]
    keep = torch.rand(len(many), 10, generator=generator, device=device) < 0.5
    yield Sample("many", (many, [pack_mask_reference(row) for row in keep]))


SPECS = (
    OpSpec("pack_mask", pack_mask_reference, _pack_samples, dtypes=(torch.bool,), exact=True),
    OpSpec("unpack_mask", unpack_mask_reference, _unpack_samples, dtypes=(torch.bool,), exact=True),
    OpSpec("mask_", mask_reference_, _mask_samples, exact=True),
)
