"""What a pruner saves of its layers and of the random numbers, and how it is checked and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur import ops
from secateur.layers import Layer
from secateur.shards import Split

__all__ = [
    "check_layer",
    "check_rng",
    "expect_keys",
    "fingerprint",
    "load_layer",
    "load_rng",
    "save_layer",
    "save_rng",
]


def expect_keys(what: str, got: object, expected: Iterable[str]) -> Mapping[str, Any]:
    """``got``, called ``what``; ValueError unless it is a mapping with exactly these keys."""
    keys = set(expected)
    if not isinstance(got, Mapping) or set(got) != keys:
        found = sorted(map(str, got)) if isinstance(got, Mapping) else repr(got)
        raise ValueError(f"expected {what} to hold exactly {sorted(keys)}, got {found}")
    return got


def save_layer(layer: Layer, scored: Tensor | None) -> dict[str, Any]:
    """The state of a layer; masks are of the whole, the running score sharded as the layer is.

    Args:
        layer: what is saved.
        scored: the scores of its units, if they have been taken in a round that is not over.
    """
    bits, running, shards = layer.bits.clone(), layer.state, layer.split.shards
    if shards.size > 1:
        bits = ops.pack_mask(shards.join(ops.unpack_mask(layer.bits, layer.own.shape)))
        scored = None if scored is None else shards.join(scored)
    return {
        "bits": bits,
        "state": None if running is None else layer.split.wrap(running.clone(), layer.parameter),
        "scored": scored,
        "target": layer.target,
        "floor_held": layer.floor_held,
    }


def check_layer(layer: Layer, saved: object) -> Tensor:
    """The packed mask of the units that lie here; ValueError where the state does not fit."""
    name = layer.name
    keys = ("bits", "state", "scored", "target", "floor_held")
    parts = expect_keys(f"the state of {name!r}", saved, keys)
    bits, running, scored, target, floor_held = (parts[key] for key in keys)
    if not isinstance(bits, Tensor):
        raise ValueError(f"expected the bits of {name!r} to be a Tensor, got {bits!r}")
    whole = ops.unpack_mask(bits.to(layer.own.device), layer.shape)
    if not whole.any():
        raise ValueError(f"expected a living weight in {name!r}, got a mask of none")
    mask = layer.split.cut(whole, layer.parameter)
    units = layer.units_of(mask)
    if not torch.equal(layer.expanded(units), mask):
        raise ValueError(f"expected the mask of {name!r} to be one of whole units, got a torn one")
    if running is not None and (
        not isinstance(running, Tensor)
        or running.shape != layer.shape
        or running.dtype != layer.score_dtype
    ):
        got = (running.dtype, tuple(running.shape)) if isinstance(running, Tensor) else running
        raise ValueError(
            f"expected a running score of {layer.score_dtype} {tuple(layer.shape)} for {name!r}, "
            f"got {got}"
        )
    if scored is not None and (not isinstance(scored, Tensor) or scored.shape != layer.grid):
        raise ValueError(f"expected the scores of the units of {name!r}, {layer.grid}, or None")
    if not isinstance(target, float) or not 0 <= target < 1:
        raise ValueError(f"expected the target of {name!r} to be in [0, 1), got {target!r}")
    if not isinstance(floor_held, bool):
        raise ValueError(f"expected floor_held of {name!r} to be a bool, got {floor_held!r}")
    return units


def load_layer(layer: Layer, saved: Mapping[str, Any], units: Tensor) -> Tensor | None:
    """Take a state that was checked; the counts are left to ``layers.count``.

    Returns:
        The scores of its units, of those that lie here, if they had been taken.
    """
    running, scored = saved["state"], saved["scored"]
    layer.take_units(units)
    if running is not None:
        running = layer.split.cut(running, layer.parameter).to(layer.own.device, copy=True)
    layer.state = running
    layer.target, layer.floor_held = float(saved["target"]), saved["floor_held"]
    if scored is None:
        return None
    first = layer.split.first_row(layer.shape[0]) // layer.block[0]
    own: Tensor = scored[first : first + layer.own_grid[0]]
    return own.to(layer.own.device, copy=True)


def fingerprint(bits: Tensor) -> Tensor:
    """int64 (): a hash of a packed mask."""
    words = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    # Each word is mixed with its place before they are added up, or swaps would cancel.
    mixed = words + torch.arange(words.numel(), device=bits.device) * 0x2545F4914F6CDD1D
    for shift, factor in ((32, 0x369DEA0F31A53F85), (29, 0x27D4EB2F165667C5)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 32)).sum()


def save_rng(split: Split, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The states of torch's generators by rank and kind of device: of this process and its shards.

    Args:
        device: what the model is trained on; its generator is saved beside the CPU's.
    """
    kinds = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        kinds[device.type] = torch.get_device_module(device).get_rng_state()
    ranks = _together(split, torch.tensor([_rank()], device=device))
    saved: dict[str, dict[str, Tensor]] = {str(int(rank)): {} for rank in ranks}
    for kind, own in kinds.items():
        states = _together(split, own.to(device))
        for rank, state in zip(saved, states, strict=True):
            saved[rank][kind] = state.cpu().clone()  # of its own, not a view of all of them
    return saved


def _together(split: Split, values: Tensor) -> list[Tensor]:
    """Of every process that takes part: copies of a whole model save for themselves."""
    if split.shards.size == 1:
        return [values]
    every = torch.stack(split.shards.gather(values))
    return [values for copy in split.copies.gather(every) for values in copy]


def check_rng(saved: object) -> None:
    """ValueError unless ``saved`` is what :func:`save_rng` gives."""
    states = list(saved.values()) if isinstance(saved, Mapping) else []
    size = torch.get_rng_state().shape
    for state in states or [None]:
        cpu = state.get("cpu") if isinstance(state, Mapping) else None
        if not isinstance(cpu, Tensor) or cpu.dtype != torch.uint8 or cpu.shape != size:
            raise ValueError(
                f"expected the states of generators by rank, {size[0]} bytes for the CPU, got "
                f"{saved!r}"
            )


def load_rng(saved: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
    """Set torch's generators to what this rank saved.

    A rank of which nothing was saved gets a stream of its own, which follows from the first one's:
    ranks that drew the same numbers would drop out the same activations.
    """
    own = saved.get(str(_rank()))
    if own is None:
        first = next(iter(saved.values()))["cpu"]
        torch.manual_seed(int(fingerprint(first.cpu())) + _rank())
        return
    # Clones: torch crashes on a view into something larger.
    torch.set_rng_state(own["cpu"].cpu().clone())
    if device.type in own and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(own[device.type].cpu().clone())


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
