"""The parameters of a model that are pruned, and the masks they carry."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

from secateur import ops
from secateur.granularity import Granularity
from secateur.ops._checks import check_writable
from secateur.ops._spec import FLOATS
from secateur.ranks import Ranks
from secateur.shards import ALONE, Split, part, split_of

__all__ = [
    "WRAPPERS",
    "Layer",
    "count",
    "find_layers",
    "named_tensors",
    "refuse_flattened",
    "walk",
    "wrappers",
]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""What holds the user's own module as ``.module``."""

# Bare parameters that are embeddings: pos_embed, position_embedding, cls_token; and biases.
_EMBEDDING = re.compile(r"(^|_)(embed|embeddings?|emb|token)$")
_BIAS = re.compile(r"(^|_)bias(_|$)")


@dataclass(eq=False)
class Layer:
    """One pruned parameter: what is alive in it, and how it got there.

    Masks and scores are of the part of the parameter that lies on this process: all of it, or its
    rows where it is sharded. Counts are of the whole.

    Attributes:
        name: the parameter's name, without the prefixes of wrappers.
        parameter: the dense parameter, zero where dead.
        matrix: (rows, cols) it is seen as: (shape[0], the rest), (n, 1) for one dimension.
        block: (rows, cols) of a unit.
        split: how it is spread over processes.
        master: what the optimizer trains in the parameter's place, of higher precision; None: the
            parameter itself.
        bits: uint8, the packed mask of its weights (see ``ops.pack_mask``).
        unit_bits: uint8, the packed mask of its units, row-major.
        alive, alive_units: how many weights and units live.
        state: running score, in the compute dtype; None before the first.
        target: the sparsity last asked for, as a fraction of the units that compete with its own.
        floor_held: whether its best unit lives only because a layer keeps at least one.
        numel: how many weights it has; known here, as a DTensor takes its time to tell.
    """

    name: str
    parameter: nn.Parameter
    matrix: tuple[int, int]
    block: tuple[int, int]
    split: Split = ALONE
    master: Tensor | None = None
    bits: Tensor = field(init=False)
    unit_bits: Tensor = field(init=False)
    alive: int = field(init=False)
    alive_units: int = field(init=False)
    numel: int = field(init=False)
    state: Tensor | None = None
    target: float = 0.0
    floor_held: bool = False

    def __post_init__(self) -> None:
        check_writable(repr(self.name), part(self.parameter))
        self.numel = self.parameter.numel()
        units = torch.ones(self.own_grid, dtype=torch.bool, device=self.own.device)
        self.take_units(ops.pack_mask(units))
        self.alive, self.alive_units = self.numel, self.units

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def trained(self) -> Tensor:
        """What the optimizer trains: the master, or the parameter."""
        return self.parameter if self.master is None else self.master

    @property
    def own(self) -> Tensor:
        """The part of what is trained that lies here, without autograd."""
        return part(self.trained)

    @property
    def own_matrix(self) -> tuple[int, int]:
        """(rows, cols) of the part that lies here."""
        return self.own.shape[0], self.matrix[1]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of units."""
        return _grid(self.matrix, self.block)

    @property
    def own_grid(self) -> tuple[int, int]:
        """(rows, cols) of the units that lie here."""
        return _grid(self.own_matrix, self.block)

    @property
    def units(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sparsity(self) -> float:
        """Fraction of its weights that are dead."""
        return 1 - self.alive / self.numel

    @property
    def score_dtype(self) -> torch.dtype:
        """What its scores are computed in."""
        return ops.compute_dtype(self.trained.dtype)

    @property
    def mask(self) -> Tensor:
        """bool of the parameter's shape, True = alive; sharded as the parameter is."""
        return self.split.wrap(ops.unpack_mask(self.bits, self.own.shape), self.parameter)

    def units_of(self, mask: Tensor) -> Tensor:
        """The packed mask of the units that lie here, from the bool mask of their weights.

        Looks at the first weight of each unit: they live and die together.
        """
        matrix = mask.reshape(self.own_matrix)
        return ops.pack_mask(matrix[:: self.block[0], :: self.block[1]])

    def take_units(self, unit_bits: Tensor) -> None:
        """Take a packed mask of the units that lie here; the counts are left to :func:`count`."""
        elementwise = self.block == (1, 1)
        self.bits = unit_bits if elementwise else ops.pack_mask(self.expanded(unit_bits))
        self.unit_bits = unit_bits

    def expand(self, units: Tensor) -> Tensor:
        """The bool mask of the weights that lie here, from that of their units, (rows, cols)."""
        rows, cols = self.own_matrix
        mask = units.repeat_interleave(self.block[0], 0)[:rows]
        return mask.repeat_interleave(self.block[1], 1)[:, :cols].reshape(self.own.shape)

    def expanded(self, unit_bits: Tensor) -> Tensor:
        """:meth:`expand` of a packed mask."""
        return self.expand(ops.unpack_mask(unit_bits, self.own_grid))

    def follow(self) -> None:
        """Move masks and scores to where the parameter has been moved."""
        device = self.parameter.device
        if self.bits.device != device:
            self.bits, self.unit_bits = self.bits.to(device), self.unit_bits.to(device)
            self.state = None if self.state is None else self.state.to(device)


def count(layers: Sequence[Layer]) -> None:
    """Bring the counts of what lives up to date, over all processes."""
    bits = [bits for layer in layers for bits in (layer.bits, layer.unit_bits)]
    own = torch.stack([_count_bits(b) for b in bits]).tolist()
    totals = layers[0].split.total(own, layers[0].own.device)
    for layer, alive, units in zip(layers, totals[::2], totals[1::2], strict=True):
        layer.alive, layer.alive_units = alive, units


def _count_bits(bits: Tensor) -> Tensor:
    """int64 (): how many bits of the uint8 ``bits`` are set; eight bytes at a time."""
    words = nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    # As in Warren, Hacker's Delight, 5-1. >> keeps the sign of int64: & clears what it brings in.
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101 >> 56).sum()


def refuse_flattened(model: nn.Module) -> None:
    """TypeError where a module is wrapped in FSDP1."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise TypeError(
            "expected a model sharded by torch.distributed.fsdp.fully_shard (FSDP2), got "
            "FullyShardedDataParallel (FSDP1), which flattens parameters: no weight has rows"
        )


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` and what it wraps, from the outside in; the last is the user's own module."""
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        yield model
        wrapped = isinstance(model, WRAPPERS)
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) as the user named them: DataParallel, DistributedDataParallel, AveragedModel
    and torch.compile are seen through. A module with several names comes once for each."""
    *_, model = wrappers(model)
    yield "", model
    for child, module in model._modules.items():
        for name, descendant in walk(module) if module is not None else ():
            yield f"{child}.{name}" if name else child, descendant


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, without the prefixes of wrappers."""
    return {
        f"{module_name}.{leaf}" if module_name else leaf: tensor
        for module_name, module in walk(model)
        for tensors in (module._parameters, module._buffers)
        for leaf, tensor in tensors.items()
        if tensor is not None
    }


def _grid(matrix: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-matrix[0] // block[0]), -(-matrix[1] // block[1])


@dataclass
class _Found:
    """A parameter of the model: all its names, the first of which counts, and what it is."""

    parameter: nn.Parameter
    names: list[str]
    kind: str


def _parameters(model: nn.Module) -> list[_Found]:
    found: dict[int, _Found] = {}
    for module_name, module in walk(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            kind = _kind(module, leaf, parameter)
            known = found.setdefault(id(parameter), _Found(parameter, [], kind))
            known.names.append(name)
            if kind == "embedding":  # a head that is tied to an embedding is one
                known.kind = kind
    return list(found.values())


def _kind(module: nn.Module, leaf: str, parameter: nn.Parameter) -> str:
    if getattr(module, "is_block_sparse", False) and leaf == "values":
        return "block-sparse"
    if isinstance(module, ParametrizationList):
        return "parametrized"
    if isinstance(module, _EMBEDDINGS) or _EMBEDDING.search(leaf):
        return "embedding"
    if isinstance(module, _NORMS):
        return "norm"
    if _BIAS.search(leaf):
        return "bias"
    # A vector may be stored with more dimensions, to be broadcast: (C, 1, 1).
    if parameter.ndim < 2 or (leaf != "weight" and sum(n > 1 for n in parameter.shape) < 2):
        return "vector"
    return "weight"


def _globs(argument: str, globs: str | Sequence[str] | None) -> list[str] | None:
    if globs is None:
        return None
    listed = [globs] if isinstance(globs, str) else globs
    if not isinstance(listed, Iterable) or not all(isinstance(g, str) for g in listed):
        raise TypeError(f"expected {argument} to be name globs such as 'blocks.*', got {globs!r}")
    if not listed:
        raise ValueError(f"expected {argument} to hold at least one name glob, got {globs!r}")
    return list(listed)


def _modules_of(name: str) -> list[str]:
    """The modules that a parameter lies in: a, a.b of a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _block_of(granularity: Granularity, matrix: tuple[int, int]) -> tuple[int, int]:
    block = granularity.block(*matrix)
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ValueError(
            f"expected {granularity!r} to cut a matrix of {matrix[0]} x {matrix[1]} into blocks of "
            f"(rows, cols), both at least 1, got {block!r}"
        )
    return block


def find_layers(
    model: nn.Module,
    granularity: Granularity,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    *,
    copies: Ranks | None = None,
    frozen: bool = False,
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to prune, and why each other parameter is left out.

    Args:
        model, granularity, include, exclude: as for ``Pruner``.
        copies: the processes that train copies of the model, see ``split_of``.
        frozen: whether parameters that do not require a gradient are pruned too.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    refuse_flattened(model)
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"expected a granularity such as Element() or Block(32), got {granularity!r}"
        )
    includes, excludes = _globs("include", include), _globs("exclude", exclude)
    unmatched = {*(includes or ()), *(excludes or ())}
    chosen: dict[str, tuple[nn.Parameter, tuple[int, int], tuple[int, int]]] = {}
    skipped: dict[str, str] = {}

    def matches(globs: list[str] | None, targets: Iterable[str]) -> bool:
        hits = {g for g in globs or () if any(fnmatch.fnmatchcase(t, g) for t in targets)}
        unmatched.difference_update(hits)
        return bool(hits)

    parameters = _parameters(model)
    lazy = [f.names[0] for f in parameters if isinstance(f.parameter, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"expected a model that has its shapes, got {lazy} of lazy modules: run it once first"
        )
    for found in parameters:
        name, parameter, kind = found.names[0], found.parameter, found.kind
        modules = [module for alias in found.names for module in _modules_of(alias)]
        # A glob names parameters; one that names a module stands for all weights inside.
        named = matches(includes, found.names)
        of_module = kind == "weight" and matches(includes, modules)
        if matches(excludes, [*found.names, *modules]):
            skipped[name] = "excluded"
        elif includes is not None and not (named or of_module):
            skipped[name] = "not included"
        elif includes is None and kind != "weight":
            skipped[name] = kind
        elif parameter.numel() == 0:
            skipped[name] = "empty"
        elif reason := _unprunable(found, frozen):
            if includes is not None:
                raise ValueError(
                    f"expected include to name what can be pruned, got {name!r}, {reason}"
                )
            skipped[name] = reason
        else:
            rows = parameter.shape[0] if parameter.ndim >= 2 else parameter.numel()
            matrix = (rows, parameter.numel() // rows)
            chosen[name] = (parameter, matrix, _block_of(granularity, matrix))

    if unmatched:
        names = [name for found in parameters for name in found.names]
        raise ValueError(
            "expected every glob of include and exclude to match a parameter, or a module with "
            f"weights to prune, got no match for {sorted(unmatched)} among {names}"
        )
    if not chosen:
        raise ValueError(
            "expected a model with weights to prune, got none"
            + (": " + ", ".join(f"{n} ({why})" for n, why in skipped.items()) if skipped else "")
        )
    split = split_of({name: found[0] for name, found in chosen.items()}, copies)
    for name, (_, (rows, _), (unit_rows, _)) in chosen.items():
        each = split.rows_each(rows)
        if each < rows and each % unit_rows:
            raise ValueError(
                f"expected shards of whole units of {unit_rows} rows, got {name!r} of {rows} rows "
                f"in shards of {each} over {split.shards.size} processes: a number of rows that "
                f"is a multiple of {unit_rows * split.shards.size} works"
            )
    layers = [Layer(name, *found, split) for name, found in chosen.items()]
    places: dict[tuple[torch.device, int], str] = {}
    for layer in layers:
        place = (layer.own.device, layer.own.data_ptr())
        if layer.own.numel() and places.setdefault(place, layer.name) != layer.name:
            raise ValueError(
                f"expected parameters of their own memory, got {places[place]!r} and "
                f"{layer.name!r} sharing it: tie them by assigning the same Parameter"
            )
    wide = {layer.name for layer in layers if layer.score_dtype == torch.float64}
    if 0 < len(wide) < len(layers):
        raise ValueError(
            f"expected weights that are all float64 or none, got float64 only for {sorted(wide)}"
        )
    return layers, skipped


def _unprunable(found: _Found, frozen: bool) -> str:
    """Why a parameter cannot be pruned; empty where it can."""
    parameter = found.parameter
    if found.kind == "block-sparse":
        return "block-sparse: densify first"
    if parameter.dtype not in FLOATS:
        return f"of dtype {parameter.dtype}"
    if not (parameter.requires_grad or frozen):
        return "frozen"
    return ""
