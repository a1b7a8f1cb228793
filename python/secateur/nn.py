"""Block-sparse layers, and turning pruned layers into them and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur import ops, surgery
from secateur.sparse import BlockSparse

__all__ = ["BlockSparseLinear", "densify", "sparsify"]

# Time of a multiplication-add on live blocks, relative to one of dense torch, measured by
# `python -m bench.block_sparse`: a layer of density d in blocks b runs in about d * COST[b] of the
# dense time, forward and backward.
_COST = {64: 0.9, 32: 0.95, 16: 1.2, 8: 1.8, 1: 2.5}


class BlockSparseLinear(nn.Module):
    """``y = x @ W.T + bias`` with W stored and multiplied as its live blocks only.

    Args:
        weight: W, (out_features, in_features).
        bias: (out_features,) or None; a Parameter is taken over as it is.

    Attributes:
        values: Parameter (n_blocks, rows, cols); what the optimizer trains.
        weight: the :class:`secateur.BlockSparse` of ``values``.

    Equivalent to:
        ``F.linear(x, module.weight.to_dense(), module.bias)``
    """

    row_index: Tensor
    col_index: Tensor

    def __init__(self, weight: BlockSparse, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.values = nn.Parameter(weight.values.detach())
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self._pattern = weight.with_values(self.values.detach())
        # In the state dict, so that values are never loaded into another pattern's places.
        self.register_buffer("row_index", weight.row_index)
        self.register_buffer("col_index", weight.col_index)

    @property
    def weight(self) -> BlockSparse:
        return self._pattern.with_values(self.values)

    @property
    def density(self) -> float:
        """Fraction of the dense weights that lie in live blocks."""
        return self._pattern.density

    def forward(self, x: Tensor) -> Tensor:
        return ops.block_sparse_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        rows, cols = self._pattern.block
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={rows}x{cols}, density={self.density:.4f}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self._pattern = self._pattern.to(self.values.device).with_values(self.values.detach())
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("row_index", "col_index"):
            ours, theirs = getattr(self, name), state_dict.get(prefix + name)
            if theirs is not None and not torch.equal(ours, theirs.to(ours.device)):
                raise ValueError(
                    f"expected {prefix}{name} to be the pattern of this layer "
                    f"({ours.numel()} live blocks), got another one of {theirs.numel()} blocks"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    block: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Replace pruned ``nn.Linear`` layers by :class:`BlockSparseLinear`, in place.

    Weight, gradient and optimizer moments shrink to the live blocks; what was dead is gone.

    Args:
        model: a module whose Linear layers hold exact zeros; layers whose weight is shared with
            another module stay dense.
        optimizer: holds the weights to be replaced; their moments are carried over.
        block: size of the blocks, for every layer with a block of zeros. None: per layer the size
            (64, 32, 16, 8 or 1) that costs least by the measured cost of each, and only layers
            that gain.

    Returns:
        ``model``, or its replacement where it is itself a Linear.

    Raises:
        ValueError: no layer would change (with the density of each), or the optimizer does not hold
            a weight. Nothing is changed then.
    """
    chosen, stay_dense = _plan(model, block)
    if not chosen:
        raise ValueError(
            "expected Linear layers with enough zeros to gain from block-sparse execution, got "
            + (", ".join(stay_dense) or "no Linear layer")
        )
    if optimizer is not None:
        _check_held(optimizer, [(names[0], "weight", m.weight) for names, m, _, _ in chosen])
    for names, module, size, mask in chosen:
        weight = module.weight
        sparse = BlockSparse.from_dense(weight.detach(), size, mask)

        def gather(t: Tensor, sparse: BlockSparse = sparse, mask: Tensor = mask) -> Tensor:
            return BlockSparse.from_dense(t.detach(), sparse.block, mask).values

        layer = BlockSparseLinear(sparse, module.bias)
        layer.values.requires_grad_(weight.requires_grad)
        layer.train(module.training)
        if weight.grad is not None:
            layer.values.grad = gather(weight.grad)
        if optimizer is not None and surgery.group_of(optimizer, weight) is not None:
            surgery.replace_parameter(optimizer, weight, layer.values, gather)
        model = _replace(model, names, layer)
    return model


def densify(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace every :class:`BlockSparseLinear` by ``nn.Linear``, in place: undoes :func:`sparsify`.

    Args:
        model: a module with block-sparse layers.
        optimizer: holds their values; the moments are carried over, zero where dead.

    Returns:
        ``model``, or its replacement where it is itself a block-sparse layer.

    Raises:
        ValueError: there is no block-sparse layer, or the optimizer does not hold one's values.
            Nothing is changed then.
    """
    chosen = [(names, m) for names, m in _modules(model) if isinstance(m, BlockSparseLinear)]
    if not chosen:
        raise ValueError("expected a model with BlockSparseLinear layers, got none")
    if optimizer is not None:
        _check_held(optimizer, [(names[0], "values", m.values) for names, m in chosen])
    for names, module in chosen:
        values, sparse = module.values, module.weight

        def scatter(t: Tensor, sparse: BlockSparse = sparse) -> Tensor:
            return sparse.with_values(t.detach()).to_dense()

        layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(scatter(values), requires_grad=values.requires_grad)
        layer.bias = module.bias
        layer.train(module.training)
        if values.grad is not None:
            layer.weight.grad = scatter(values.grad)
        if optimizer is not None and surgery.group_of(optimizer, values) is not None:
            surgery.replace_parameter(optimizer, values, layer.weight, scatter)
        model = _replace(model, names, layer)
    return model


def _modules(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module with all the names it goes by; the root's is ""."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(names, module) for module, names in names.items()]


_Conversion = tuple[list[str], nn.Linear, "int | tuple[int, int]", Tensor]
"""Names of a layer, the layer, its block size and the mask of its live blocks."""


def _plan(
    model: nn.Module, block: int | tuple[int, int] | None
) -> tuple[list[_Conversion], list[str]]:
    """The layers to convert, and a description of each that stays dense."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen: list[_Conversion] = []
    stay_dense = []
    for names, module in _modules(model):
        # Subclasses are left alone: their forward may do more (nn.MultiheadAttention's out_proj).
        if type(module) is not nn.Linear or module.weight.numel() == 0:
            continue
        weight = module.weight.detach()
        size = _best_block(weight) if block is None else block
        if size is not None and owners[id(module.weight)] == 1:
            mask = _live_blocks(weight, size)
            if not mask.all():
                chosen.append((names, module, size, mask))
                continue
        density = weight.count_nonzero().item() / weight.numel()
        stay_dense.append(f"{names[0] or 'the model'} (density {density:.3f})")
    return chosen, stay_dense


def _check_held(optimizer: Optimizer, parameters: list[tuple[str, str, Tensor]]) -> None:
    for module, leaf, parameter in parameters:
        if parameter.requires_grad and surgery.group_of(optimizer, parameter) is None:
            raise ValueError(
                "expected the optimizer to hold every parameter that is replaced, got one without "
                f"{module}.{leaf}"
            )


def _replace(model: nn.Module, names: list[str], layer: nn.Module) -> nn.Module:
    """Put ``layer`` in the place of the module of these names; returns the new root."""
    for name in names:
        if not name:
            return layer
        model.set_submodule(name, layer)
    return model


def _live_blocks(weight: Tensor, block: int | tuple[int, int]) -> Tensor:
    """bool (ceil(N / rows), ceil(K / cols)): which blocks hold a non-zero."""
    rows, cols = (block, block) if isinstance(block, int) else block
    edge = (0, -weight.shape[1] % cols, 0, -weight.shape[0] % rows)
    live: Tensor = nn.functional.pad(weight != 0, edge, value=False)
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
    return live.view(grid[0], rows, grid[1], cols).any(3).any(1)


def _costs(weight: Tensor) -> Iterator[tuple[float, int]]:
    for size, cost in _COST.items():
        yield _live_blocks(weight, size).float().mean().item() * cost, size


def _best_block(weight: Tensor) -> int | None:
    """The block size that costs least, None where dense costs less than any."""
    cost, size = min(_costs(weight))
    return size if cost < 1 else None
