"""Models that are spread over processes, seen from one of them.

``fully_shard`` gives each process some rows of every parameter (a DTensor); data-parallel training
gives each a copy. Nothing here imports torch.distributed.tensor, which takes half a second: who has
a DTensor has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.ranks import Ranks

__all__ = ["ALONE", "Split", "is_sharded", "part", "split_of"]


def is_sharded(t: object) -> bool:
    """Whether ``t`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def part(t: Tensor) -> Tensor:
    """What of a tensor lies on this process, without autograd; it shares memory with ``t``."""
    if not is_sharded(t):
        return t.detach()
    with torch.no_grad():  # with autograd on, to_local() is an operation of the graph
        local: Tensor = t.to_local()  # type: ignore[attr-defined]
    return local.detach()


@dataclass(frozen=True)
class Split:
    """How a model is spread over processes.

    Attributes:
        shards: the processes that hold one copy together, each some rows of every parameter.
        copies: the processes that hold the same rows.
    """

    shards: Ranks
    copies: Ranks

    def total(
        self, numbers: Sequence[int], device: torch.device, *, copies: bool = False
    ) -> list[int]:
        """Sums over the shards, and over the copies too if wanted."""
        values = torch.tensor(numbers, device=device)
        for ranks in (self.shards, self.copies) if copies else (self.shards,):
            if ranks.size > 1:
                values = ranks.sum(values)
        summed: list[int] = values.tolist()
        return summed

    def first_row(self, rows: int) -> int:
        """The first of ``rows`` rows that lies here; each rank but the last ones has as many."""
        return min(rows, self.shards.rank * self.rows_each(rows))

    def rows_each(self, rows: int) -> int:
        """How many of ``rows`` rows each process holds, as long as there are any left."""
        return -(-rows // self.shards.size)

    def cut(self, t: Tensor, like: Tensor) -> Tensor:
        """This process's part of ``t``, of the shape of ``like``: a DTensor, or the whole."""
        source: Any = t
        layout: Any = like
        if is_sharded(t) and is_sharded(like):
            return part(source.redistribute(layout.device_mesh, layout.placements))
        if is_sharded(t):
            return part(source.full_tensor())
        if self.shards.size == 1:
            return part(t)
        first = self.first_row(like.shape[0])
        return t[first : first + part(like).shape[0]]

    def wrap(self, local: Tensor, like: Tensor) -> Tensor:
        """A DTensor of the layout of ``like`` from this process's part; itself if not sharded."""
        if not is_sharded(like):
            return local
        from torch.distributed.tensor import DTensor

        layout: Any = like
        wrapped: Tensor = DTensor.from_local(
            local,
            layout.device_mesh,
            layout.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return wrapped


ALONE = Split(Ranks(None), Ranks(None))


def split_of(parameters: dict[str, Tensor], copies: Ranks | None) -> Split:
    """How ``parameters`` are spread, which has to be the same for all of them.

    Args:
        parameters: by name.
        copies: the processes that hold the same. None: those that the mesh replicates over, or,
            where nothing is sharded, the default group if there is one.

    Raises:
        ValueError: parameters that are spread in different ways, or not by whole rows.
    """
    layouts: dict[str, tuple[Any, ...] | None] = {}
    for name, parameter in parameters.items():
        layout: Any = parameter
        layouts[name] = (layout.device_mesh, layout.placements) if is_sharded(parameter) else None
    first = next(iter(layouts))
    for name, found in layouts.items():
        if found != layouts[first]:
            raise ValueError(
                "expected parameters that are all sharded alike or not at all, got "
                f"{first!r} {_words(layouts[first])} and {name!r} {_words(found)}: call "
                "fully_shard on the whole model too, or exclude the others"
            )
    if layouts[first] is None:
        distributed = dist.is_available() and dist.is_initialized()
        return Split(Ranks(None), copies or Ranks(dist.group.WORLD if distributed else None))
    mesh, placements = layouts[first]  # type: ignore[misc]
    kinds = [type(p).__name__ for p in placements]
    shape = [(kind, getattr(p, "dim", None)) for kind, p in zip(kinds, placements, strict=True)]
    if shape not in ([("Shard", 0)], [("Replicate", None), ("Shard", 0)]):
        raise ValueError(
            f"expected parameters sharded over their rows, as fully_shard does, got {first!r} "
            f"{_words(layouts[first])}"
        )
    replicas = Ranks(mesh.get_group(0) if len(shape) == 2 else None)
    return Split(Ranks(mesh.get_group(mesh.ndim - 1)), copies or replicas)


def _words(layout: tuple[Any, ...] | None) -> str:
    return "not sharded" if layout is None else f"placed as {layout[1]} on {layout[0]}"
