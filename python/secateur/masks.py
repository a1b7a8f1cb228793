"""Masks as other libraries leave them in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.layers import Layer, named_tensors

__all__ = ["read_masks"]


def read_masks(source: nn.Module | Mapping[str, Tensor], layers: Sequence[Layer]) -> list[Tensor]:
    """The packed masks of the units of ``layers`` that lie on this process (``ops.pack_mask``).

    Args:
        source: as for ``Pruner.load_masks_from``.
        layers: what the masks are for.

    Raises:
        TypeError, ValueError: as for ``Pruner.load_masks_from``.
    """
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(
            "expected a torch.nn.Module or a mapping of names to tensors, got "
            f"{type(source).__name__}"
        )
    tensors = named_tensors(source) if isinstance(source, nn.Module) else source
    masks = [
        layer.split.cut(_mask_of(layer, tensors), layer.parameter).to(layer.own.device)
        for layer in layers
    ]
    units = [layer.units_of(mask) for layer, mask in zip(layers, masks, strict=True)]
    own: list[int] = []
    for layer, mask, bits in zip(layers, masks, units, strict=True):
        own += [int(mask.sum()), int(not torch.equal(layer.expanded(bits), mask))]
    totals = layers[0].split.total(own, masks[0].device)
    if all(n == layer.numel for n, layer in zip(totals[::2], layers, strict=True)):
        raise ValueError(
            "expected masks that prune something, got only living weights for "
            f"{[layer.name for layer in layers]}"
        )
    for layer, alive, torn in zip(layers, totals[::2], totals[1::2], strict=True):
        if alive == 0:
            raise ValueError(f"expected a living weight in every layer, got none in {layer.name!r}")
        if torn:
            raise ValueError(
                f"expected a mask of whole units of {layer.block[0]} x {layer.block[1]} weights "
                f"for {layer.name!r}, got one that cuts through them: a pruner of Element() takes "
                "any mask"
            )
    return units


def _mask_of(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """The mask of a whole layer, whoever made it."""
    module, _, leaf = layer.name.rpartition(".")
    chain = f"{module}.parametrizations.{leaf}.".removeprefix(".")
    candidates = [
        [f"{layer.name}_mask"],  # torch.nn.utils.prune: a buffer beside weight_orig
        # torch.ao.pruning: a chain of parametrizations, each with a mask
        [name for name in tensors if name.startswith(chain) and name.endswith(".mask")],
        [layer.name],
    ]
    for names in candidates:
        found = [_whole_mask(layer, name, tensors[name]) for name in names if name in tensors]
        if found:
            return torch.stack(found).all(0) if len(found) > 1 else found[0]
    wanted = [name for names in candidates for name in names]
    raise ValueError(f"expected the source to hold one of {wanted}, got {sorted(tensors)}")


def _whole_mask(layer: Layer, name: str, found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != layer.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"expected {name!r} to be a tensor of shape {tuple(layer.shape)}, got {got}"
        )
    return found.detach() != 0
