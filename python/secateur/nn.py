"""Block-sparse layers, and turning pruned layers into them and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur import ops, surgery
from secateur.sparse import BlockSparse, block_size, live_blocks

__all__ = ["BlockSparseLinear", "densify", "sparsify"]

# Time of a multiply-add on live blocks relative to one of dense torch: a layer of density d in
# blocks of size b takes about d * _COST[b] of the dense time. bench/results/block_sparse.csv has
# 1.0 for 16 to 128, 1.2 for 8 and 2.1 for 1, and in bfloat16 1.2 to 1.4, 1.6 and 4.8
# (forward and backward, density 0.25, an AMD Zen 4; less in float32 where torch is further from
# the peak); smaller layers gain less, so these are rounded up.
_COST = {128: 1.1, 64: 1.1, 32: 1.1, 16: 1.2, 8: 1.5, 1: 3.0}
_COST_OF_BFLOAT16 = {128: 1.5, 64: 1.5, 32: 1.5, 16: 1.5, 8: 2.2, 1: 6.0}
_WORTHWHILE = 0.8  # of the dense time; below it a layer is converted


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
    is_block_sparse = True  # its values are no matrix: pruners leave them alone

    def __init__(self, weight: BlockSparse, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, BlockSparse):
            raise TypeError(
                "expected weight to be a BlockSparse (BlockSparse.from_dense makes one), got "
                f"{type(weight).__name__}"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None:
            _check_bias(bias, weight)
        self.values = nn.Parameter(weight.values.detach())
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self._pattern = weight.pattern
        # In the state dict, so that values are never loaded into another pattern's places.
        self.register_buffer("row_index", weight.row_index)
        self.register_buffer("col_index", weight.col_index)

    @property
    def weight(self) -> BlockSparse:
        shape = (self.out_features, self.in_features)
        return BlockSparse(self.values, self._pattern, shape)

    @property
    def density(self) -> float:
        """Fraction of the dense weights that lie in live blocks."""
        return self.weight.density

    def forward(self, x: Tensor) -> Tensor:
        return ops.block_sparse_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        rows, cols = self.weight.block
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={rows}x{cols}, density={self.density:.4f}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self._pattern = self._pattern.to(self.values.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        errors = []
        for name in ("row_index", "col_index"):
            ours, theirs = getattr(self, name), state_dict.get(prefix + name)
            if theirs is None and prefix + "values" in state_dict:
                errors.append(f"expected {prefix}{name} beside {prefix}values, got none")
            elif theirs is not None and not (
                isinstance(theirs, Tensor)
                and theirs.is_meta == ours.is_meta is False
                and torch.equal(ours, theirs.to(ours.device))
            ):
                errors.append(
                    f"expected {prefix}{name} to be the pattern of this layer "
                    f"({ours.numel()} live blocks), got {_described_index(theirs)}"
                )
        if errors:
            args[-1].extend(errors)  # load_state_dict raises them, with those of other layers
        else:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    block: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Replace pruned ``nn.Linear`` layers by :class:`BlockSparseLinear`, in place.

    Weight, gradient and optimizer moments shrink to the live blocks; what was dead is gone. An
    optimizer that exists has to be given: otherwise it goes on holding the old weights.

    Args:
        model: a module whose Linear layers hold exact zeros. Left dense are layers whose weight is
            shared with another module or is no plain parameter (parametrizations), subclasses of
            Linear, and layers with hooks, which would be lost.
        optimizer: holds the weights to be replaced; their moments are carried over.
        block: size of the blocks, for every layer with a block of zeros. None: per layer the size
            (128, 64, 32, 16, 8 or 1) that costs least by what each cost in a large layer on one
            machine, and only layers that are to gain a fifth of their time or more by that;
            :func:`secateur.cost` measures on yours.

    Returns:
        ``model``, or its replacement where it is itself a Linear.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: no layer would change (with the reason of each), or the optimizer does not hold
            a weight or keeps state that cannot be carried over. Nothing is changed then.
    """
    _check_arguments(model, optimizer)
    chosen, stay_dense = _plan(model, None if block is None else block_size(block))
    if not chosen:
        raise ValueError(
            "expected Linear layers with enough zeros to gain from block-sparse execution, got "
            + (", ".join(stay_dense) or "no Linear layer")
        )
    if optimizer is not None:
        for names, module, _ in chosen:
            surgery.check_replaceable(optimizer, module.weight, f"{names[0]}.weight", ndim=3)
    for names, module, sparse in chosen:
        weight = module.weight
        layer = BlockSparseLinear(sparse, module.bias)
        layer.values.requires_grad_(weight.requires_grad)
        layer.train(module.training)
        if weight.grad is not None:
            layer.values.grad = sparse.gather(weight.grad)
        if optimizer is not None and surgery.group_of(optimizer, weight) is not None:
            surgery.replace_parameter(optimizer, weight, layer.values, sparse.gather)
        model = _replace(model, names, layer)
    return model


def densify(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace every :class:`BlockSparseLinear` by ``nn.Linear``, in place: undoes :func:`sparsify`.

    Dead weights are zero and free again: nothing but a new pruner keeps them dead.

    Args:
        model: a module with block-sparse layers.
        optimizer: holds their values; the moments are carried over, zero where dead.

    Returns:
        ``model``, or its replacement where it is itself a block-sparse layer.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: there is no block-sparse layer, one has hooks, which would be lost, or the
            optimizer does not hold one's values or keeps state that cannot be carried over. Nothing
            is changed then.
    """
    _check_arguments(model, optimizer)
    chosen = [(names, m) for names, m in _modules(model) if isinstance(m, BlockSparseLinear)]
    if not chosen:
        raise ValueError("expected a model with BlockSparseLinear layers, got none")
    for names, module in chosen:
        if _has_hooks(module):
            raise ValueError(
                f"expected block-sparse layers without hooks, which would be lost, got {names[0]!r}"
            )
        if optimizer is not None:
            surgery.check_replaceable(optimizer, module.values, f"{names[0]}.values", ndim=2)
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


def _described_index(index: Any) -> str:
    if not isinstance(index, Tensor):
        return f"a {type(index).__name__}"
    return f"another one of {index.numel()} blocks on {index.device}"


def _check_bias(bias: Tensor, weight: BlockSparse) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"expected bias to be a Tensor or None, got {type(bias).__name__}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"expected bias to be {weight.dtype}, as weight, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"expected bias on {weight.device}, as weight, got {bias.device}")


def _modules(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module with all the names it goes by; the root's is ""."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(names, module) for module, names in names.items()]


def _check_arguments(model: nn.Module, optimizer: Optimizer | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            "expected optimizer to be a torch.optim.Optimizer or None, got "
            f"{type(optimizer).__name__}"
        )


def _has_hooks(module: nn.Module) -> bool:
    """Whether the user has hung hooks on a module: forward, backward, state dict."""
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def _plan(
    model: nn.Module, block: tuple[int, int] | None
) -> tuple[list[tuple[list[str], nn.Linear, BlockSparse]], list[str]]:
    """The layers to convert (names, layer, what its weight becomes), and why others stay dense."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen: list[tuple[list[str], nn.Linear, BlockSparse]] = []
    stay_dense = []
    for names, module in _modules(model):
        # Subclasses are left alone: their forward may do more (nn.MultiheadAttention's out_proj).
        if type(module) is not nn.Linear or module.weight.numel() == 0:
            continue
        weight = module.weight.detach()
        size = _best_block(weight) if block is None else block
        if module._parameters.get("weight") is None:
            reason = "reparametrized: make the weight a plain parameter first"
        elif owners[id(module.weight)] > 1:
            reason = "its weight is shared"
        elif _has_hooks(module):
            reason = "hooks would be lost"
        elif size is None or live_blocks(weight, size).all():
            reason = f"density {weight.count_nonzero().item() / weight.numel():.3f}"
        else:
            chosen.append((names, module, BlockSparse.from_dense(weight, size)))
            continue
        stay_dense.append(f"{names[0] or 'the model'} ({reason})")
    return chosen, stay_dense


def _replace(model: nn.Module, names: list[str], layer: nn.Module) -> nn.Module:
    """Put ``layer`` in the place of the module of these names; returns the new root."""
    for name in names:
        if not name:
            return layer
        model.set_submodule(name, layer)
    return model


def _best_block(weight: Tensor) -> tuple[int, int] | None:
    """The block size that costs least, the larger of equals; None where no size is worth it."""
    table = _COST_OF_BFLOAT16 if weight.dtype == torch.bfloat16 else _COST
    costs = {b: live_blocks(weight, b).float().mean().item() * c for b, c in table.items()}
    size = min(costs, key=lambda b: costs[b])
    return (size, size) if costs[size] < _WORTHWHILE else None
