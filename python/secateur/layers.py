"""The parameters of a model that are pruned, and the masks they carry."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur import ops
from secateur.granularity import Granularity

__all__ = ["Layer", "find_layers"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_EMBEDDING_NAMES = ("embed", "embedding", "embeddings", "token")  # of bare parameters


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
        target: the sparsity last asked for, as a fraction of the units of its scope.
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
        return torch.float64 if self.parameter.dtype == torch.float64 else torch.float32

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


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel and torch.compile."""
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return model


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(name, parameter, kind) of each parameter of the user's own module; a tied one comes once."""
    model = _unwrap(model)
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, _EMBEDDINGS) for p in m.parameters(False)
    }
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in embeddings or leaf.endswith(_EMBEDDING_NAMES):
                kind = "embedding"
            elif isinstance(module, _NORMS):
                kind = "norm"
            elif parameter.ndim < 2:
                kind = "bias" if "bias" in leaf else "vector"
            else:
                kind = "weight"
            parts = [*module_name.split("."), leaf]
            yield ".".join(p for p in parts if p not in ("", "_orig_mod")), parameter, kind


def _patterns(name: str, patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"expected {name} to be name globs such as 'blocks.*', got {patterns!r}")
    return patterns


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
        raise TypeError(f"expected a granularity such as Element() or Block(32), got {granularity}")
    includes, excludes = _patterns("include", include), _patterns("exclude", exclude)
    unmatched = set((includes or ()) + (excludes or ()))
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    names = []

    def matches(patterns: tuple[str, ...] | None, targets: list[str]) -> bool:
        hits = {p for p in patterns or () if any(fnmatch.fnmatchcase(t, p) for t in targets)}
        unmatched.difference_update(hits)
        return bool(hits)

    for name, parameter, kind in _parameters(model):
        names.append(name)
        parts = name.split(".")
        modules = [".".join(parts[:i]) for i in range(1, len(parts))]

        # A glob names parameters; one that names a module stands for all weights inside.
        named = matches(includes, [name])
        of_module = kind == "weight" and matches(includes, modules)
        if matches(excludes, [name, *modules]):
            skipped[name] = "excluded"
        elif includes is not None and not (named or of_module):
            skipped[name] = "not included"
        elif includes is None and kind != "weight":
            skipped[name] = kind
        elif not parameter.is_floating_point():
            skipped[name] = f"dtype {parameter.dtype}"
        elif parameter.numel() == 0:
            skipped[name] = "empty"
        elif not (parameter.requires_grad or frozen) and includes is not None:
            raise ValueError(
                f"expected the included parameters to be trainable, got {name!r} with "
                "requires_grad=False"
            )
        elif not (parameter.requires_grad or frozen):
            skipped[name] = "frozen"
        else:
            rows = parameter.shape[0] if parameter.ndim >= 2 else parameter.numel()
            matrix = (rows, parameter.numel() // rows)
            layers.append(Layer(name, parameter, matrix, granularity.block(*matrix)))

    if unmatched:
        raise ValueError(
            f"expected every glob of include and exclude to match a parameter, got no match for "
            f"{sorted(unmatched)} among {names}"
        )
    if not layers:
        raise ValueError(
            "expected a model with weights to prune, got none"
            + (": " + ", ".join(f"{n} ({why})" for n, why in skipped.items()) if skipped else "")
        )
    return layers, skipped
