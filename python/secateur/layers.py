"""The parameters of a model that are pruned, and the masks they carry."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur import ops
from secateur.granularity import Granularity
from secateur.ops._spec import FLOATS

__all__ = ["Layer", "find_layers", "walk"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# How bare parameters that are embeddings end: pos_embed, position_embedding, cls_token.
_EMBEDDING_ENDINGS = ("embed", "embedding", "embeddings", "emb", "_token")


@dataclass(eq=False)
class Layer:
    """One pruned parameter: what is alive in it, and how it got there.

    Attributes:
        name: the parameter's name, without the prefixes of wrappers.
        parameter: the dense parameter, zero where dead.
        matrix: (rows, cols) it is seen as: (shape[0], the rest), (n, 1) for one dimension.
        block: (rows, cols) of a unit.
        bits: uint8, the packed mask of its weights (see ``ops.pack_mask``).
        unit_bits: uint8, the packed mask of its units, row-major.
        alive, alive_units: how many weights and units live.
        state: running score, ``parameter.shape`` in the compute dtype; None before the first.
        target: the sparsity last asked for, as a fraction of the units that compete with its own.
        floor_held: whether its best unit lives only because a layer keeps at least one.
    """

    name: str
    parameter: nn.Parameter
    matrix: tuple[int, int]
    block: tuple[int, int]
    bits: Tensor = field(init=False)
    unit_bits: Tensor = field(init=False)
    alive: int = field(init=False)
    alive_units: int = field(init=False)
    state: Tensor | None = None
    target: float = 0.0
    floor_held: bool = False

    def __post_init__(self) -> None:
        self.set_mask(torch.ones(self.shape, dtype=torch.bool, device=self.parameter.device))

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of units."""
        return (-(-self.matrix[0] // self.block[0]), -(-self.matrix[1] // self.block[1]))

    @property
    def units(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sparsity(self) -> float:
        """Fraction of its weights that are dead."""
        return 1 - self.alive / self.parameter.numel()

    @property
    def score_dtype(self) -> torch.dtype:
        """What its scores are computed in."""
        return ops.compute_dtype(self.parameter.dtype)

    @property
    def mask(self) -> Tensor:
        """bool of the parameter's shape, True = alive."""
        return ops.unpack_mask(self.bits, self.shape)

    def set_mask(self, mask: Tensor) -> None:
        """Take a mask of weights; its units must be alive or dead as a whole."""
        units = mask.reshape(self.matrix)[:: self.block[0], :: self.block[1]]
        self._set(ops.pack_mask(mask), ops.pack_mask(units), mask, units)

    def set_units(self, unit_bits: Tensor) -> None:
        """Take a packed mask of units."""
        units = ops.unpack_mask(unit_bits, self.grid)
        mask = self.expand(units)
        bits = unit_bits if self.block == (1, 1) else ops.pack_mask(mask)
        self._set(bits, unit_bits, mask, units)

    def expand(self, units: Tensor) -> Tensor:
        """bool (grid) -> bool (parameter.shape)."""
        rows, cols = self.matrix
        mask = units.repeat_interleave(self.block[0], 0)[:rows]
        return mask.repeat_interleave(self.block[1], 1)[:, :cols].reshape(self.shape)

    def _set(self, bits: Tensor, unit_bits: Tensor, mask: Tensor, units: Tensor) -> None:
        self.bits, self.unit_bits = bits, unit_bits
        self.alive, self.alive_units = int(mask.sum()), int(units.sum())


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) as the user named them: DataParallel, DistributedDataParallel and
    torch.compile are seen through. A module with several names comes once for each."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        wrapped = isinstance(model, wrappers)
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    yield "", model
    for child, module in model._modules.items():
        for name, descendant in walk(module) if module is not None else ():
            yield f"{child}.{name}" if name else child, descendant


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
    if isinstance(module, _EMBEDDINGS) or leaf.endswith(_EMBEDDING_ENDINGS):
        return "embedding"
    if isinstance(module, _NORMS):
        return "norm"
    if "bias" in leaf:
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
    frozen: bool = False,
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to prune, and why each other parameter is left out.

    Args:
        model, granularity, include, exclude: as for ``Pruner``.
        frozen: whether parameters that do not require a gradient are pruned too.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"expected a granularity such as Element() or Block(32), got {granularity!r}"
        )
    includes, excludes = _globs("include", include), _globs("exclude", exclude)
    unmatched = {*(includes or ()), *(excludes or ())}
    layers: list[Layer] = []
    skipped: dict[str, str] = {}

    def matches(globs: list[str] | None, targets: Iterable[str]) -> bool:
        hits = {g for g in globs or () if any(fnmatch.fnmatchcase(t, g) for t in targets)}
        unmatched.difference_update(hits)
        return bool(hits)

    parameters = _parameters(model)
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
            layers.append(Layer(name, parameter, matrix, _block_of(granularity, matrix)))

    if unmatched:
        names = [name for found in parameters for name in found.names]
        raise ValueError(
            "expected every glob of include and exclude to match a parameter, or a module with "
            f"weights to prune, got no match for {sorted(unmatched)} among {names}"
        )
    if not layers:
        raise ValueError(
            "expected a model with weights to prune, got none"
            + (": " + ", ".join(f"{n} ({why})" for n, why in skipped.items()) if skipped else "")
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
