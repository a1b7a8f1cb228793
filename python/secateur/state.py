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


def save_layer(layer: Layer) -> dict[str, Any]:
    """The state of a layer; the mask is of the whole, the running score sharded as the layer is."""
    bits, running = layer.bits.clone(), layer.state
    if layer.split.shards.size > 1:
        bits = ops.pack_mask(layer.split.shards.join(ops.unpack_mask(layer.bits, layer.own.shape)))
    return {
        "bits": bits,
        "state": None if running is None else layer.split.wrap(running.clone(), layer.parameter),
        "target": layer.target,
        "floor_held": layer.floor_held,
    }


def check_layer(layer: Layer, saved: object) -> Tensor:
    """The packed mask of the units that lie here; ValueError where the state does not fit."""
    name = layer.name
    keys = ("bits", "state", "target", "floor_held")
    parts = expect_keys(f"the state of {name!r}", saved, keys)
    bits, running, target, floor_held = (parts[key] for key in keys)
    if not isinstance(bits, Tensor):
        raise ValueError(f"expected the bits of {name!r} to be a Tensor, got {bits!r}")
    mask = layer.split.cut(ops.unpack_mask(bits.to(layer.own.device), layer.shape), layer.parameter)
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
    if not isinstance(target, float) or not 0 <= target < 1:
        raise ValueError(f"expected the target of {name!r} to be in [0, 1), got {target!r}")
    if not isinstance(floor_held, bool):
        raise ValueError(f"expected floor_held of {name!r} to be a bool, got {floor_held!r}")
    return units


def load_layer(layer: Layer, saved: Mapping[str, Any], units: Tensor) -> None:
    """Take a state that was checked; the counts are left to ``layers.count``."""
    running = saved["state"]
    layer.take_units(units)
    if running is not None:
        running = layer.split.cut(running, layer.parameter).to(layer.own.device, copy=True)
    layer.state = running
    layer.target, layer.floor_held = float(saved["target"]), saved["floor_held"]


def fingerprint(bits: Tensor) -> Tensor:
    """int64 (): a hash of a packed mask. Two that differ in eight bytes never have the same one."""
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    words = padded.view(torch.int64)
    odd = torch.arange(words.numel(), device=bits.device) * 2 + 1
    return (words * odd * 0x2545F4914F6CDD1D).sum()


def save_rng(split: Split, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The states of torch's generators by rank and kind of device: of this process and its shards.

    Args:
        device: what the model is trained on; its generator is saved beside the CPU's.
    """
    kinds = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        kinds[device.type] = torch.get_device_module(device).get_rng_state()
    ranks = split.shards.gather(torch.tensor(_rank(), device=device))
    saved: dict[str, dict[str, Tensor]] = {str(int(rank)): {} for rank in ranks}
    for kind, own in kinds.items():
        states = split.shards.gather(own.to(device))
        for rank, state in zip(saved, states, strict=True):
            saved[rank][kind] = state.cpu()
    return saved


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
    torch.set_rng_state(own["cpu"].cpu())
    if device.type in own and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(own[device.type].cpu())


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
