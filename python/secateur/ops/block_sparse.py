"""Products with a block-sparse weight: forward, gradient of the input, gradient of the weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secateur.ops._checks import check_bool, check_float, check_strided, check_tensor
from secateur.ops._spec import OpSpec, Sample

if TYPE_CHECKING:
    from secateur.sparse import BlockSparse


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which blocks of a grid are live, in row order and in column order; all int32.

    Attributes:
        row_ptr: ``(block_rows + 1,)``; block row r owns ``[row_ptr[r], row_ptr[r + 1])``.
        col: ``(n_blocks,)`` block column of each block, ascending within a block row.
        row_of: ``(n_blocks,)`` block row of each block.
        col_ptr: ``(block_cols + 1,)``; the same for block columns, over the next two.
        row_t: ``(n_blocks,)`` block row of each block in column order.
        position_t: ``(n_blocks,)`` where each block of the column order is in the row order.

    Raises:
        TypeError: an attribute is no int32 Tensor.
        ValueError: they are not contiguous vectors on one device that describe one set of blocks.
    """

    row_ptr: Tensor
    col: Tensor
    row_of: Tensor
    col_ptr: Tensor
    row_t: Tensor
    position_t: Tensor

    def __post_init__(self) -> None:
        # The kernels follow these indices unchecked: this is where a bad one is caught.
        for field, t in zip(fields(self), self.tensors(), strict=True):
            if not isinstance(t, Tensor):
                raise TypeError(f"expected {field.name} to be a Tensor, got {type(t).__name__}")
            if t.dtype != torch.int32:
                raise TypeError(f"expected {field.name} to be torch.int32, got {t.dtype}")
            if t.dim() != 1 or not t.is_contiguous() or t.device != self.row_ptr.device:
                raise ValueError(
                    f"expected {field.name} to be a contiguous vector on {self.row_ptr.device}, "
                    f"got shape {tuple(t.shape)}, strides {t.stride()}, on {t.device}"
                )
        grid = (self.row_ptr.shape[0] - 1, self.col_ptr.shape[0] - 1)
        for name, t, n in (("row_of", self.row_of, grid[0]), ("col", self.col, grid[1])):
            if n < 0 or t.shape != self.col.shape or bool(((t < 0) | (t >= n)).any()):
                raise ValueError(
                    f"expected {name} to be {self.col.numel()} numbers of 0 to {n - 1}, got "
                    f"{t.tolist() if t.numel() < 9 else f'{t.numel()} of other numbers'}"
                )
        mask = torch.zeros(grid, dtype=torch.bool, device=self.col.device)
        mask[self.row_of, self.col] = True
        right = Pattern.from_mask(mask).tensors()
        for field, got, want in zip(fields(self), self.tensors(), right, strict=True):
            if not torch.equal(got, want):
                raise ValueError(
                    f"expected {field.name} to be what Pattern.from_mask makes of the blocks at "
                    "(row_of, col), got other numbers"
                )

    @classmethod
    def _trusted(cls, *tensors: Tensor) -> Pattern:
        """The pattern of tensors that are known to belong together."""
        pattern = object.__new__(cls)
        for field, t in zip(fields(cls), tensors, strict=True):
            object.__setattr__(pattern, field.name, t)
        return pattern

    @classmethod
    def from_mask(cls, mask: Tensor) -> Pattern:
        """The pattern of a bool mask of blocks ``(block_rows, block_cols)``, True = live.

        Raises:
            TypeError: ``mask`` is no bool Tensor.
            ValueError: ``mask`` is not 2-D, is on the meta device, or has 2**31 live blocks, rows
                or columns, or more.
        """
        check_bool("mask", mask)
        if mask.dim() != 2:
            raise ValueError(f"expected mask to have 2 dimensions, got {mask.dim()}")
        if mask.is_meta:
            raise ValueError("expected a mask with values, got one on the meta device")
        if max(mask.shape) >= 2**31:
            raise ValueError(
                f"expected fewer than 2**31 rows and columns of blocks, got {tuple(mask.shape)}"
            )
        row_of, col = mask.nonzero(as_tuple=True)
        if col.numel() >= 2**31:
            raise ValueError(f"expected fewer than 2**31 live blocks, got {col.numel()}")
        # A stable sort by column keeps rows ascending within a column.
        position_t = col.sort(stable=True).indices
        return cls._trusted(
            _offsets(mask.sum(1)),
            col.int(),
            row_of.int(),
            _offsets(mask.sum(0)),
            row_of[position_t].int(),
            position_t.int(),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six index tensors in the order in which the ops take them."""
        return self.row_ptr, self.col, self.row_of, self.col_ptr, self.row_t, self.position_t

    def to(self, device: torch.device | str | None) -> Pattern:
        """The same pattern on another device."""
        return self._trusted(*(t.to(device) for t in self.tensors()))


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def block_sparse_linear(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: Literal["relu", "gelu"] | None = None,
) -> Tensor:
    """Multiply by the transpose of a block-sparse weight: y = activation(x Wᵀ + bias).

    Only live blocks are touched, here and in both backward products. Gradients reach ``x``,
    ``weight.values`` and ``bias``, to any order. Accumulates in float32 (float64 in double). Under
    autocast, inputs are cast to its dtype, as in ``torch.nn.functional.linear``.

    Memory beside the result, in the compute dtype, which the thread keeps for its next call: at
    most 600 rows of ``x`` and the live values twice; in the backward pass at most 800 rows of ``x``
    and of y's gradient and the live values four times.

    Args:
        x: ``(..., in_features)``; float32, bfloat16, float16 or float64; any strides.
        weight: a :class:`secateur.BlockSparse` of shape ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        activation: applied while y is in a cache: ``"relu"``, ``"gelu"`` (the exact one, with erf)
            or None. ``"gelu"`` needs what it was applied to for its gradient: where one is wanted
            it runs as a separate op.

    Returns:
        ``(..., out_features)``, contiguous, of x's dtype. With ``"gelu"`` and a gradient wanted, it
        is rounded to that dtype before gelu, too.

    Raises:
        TypeError: ``weight`` is no BlockSparse, ``x`` or ``bias`` is no Tensor, dtypes differ or
            are not supported, or a Tensor is not strided (a sparse layout).
        ValueError: shapes do not fit, devices differ, or ``activation`` is another word.
        NotImplementedError: an input has a forward-mode derivative. (torch.func.grad is refused by
            torch, with a RuntimeError.)

    Source:
        The products are dsd and sdd of Gale et al., "MegaBlocks" (2022).

    Equivalent to:
        ``activation(torch.nn.functional.linear(x, weight.to_dense(), bias))``
    """
    if activation not in (None, "relu", "gelu"):
        raise ValueError(f"expected activation to be 'relu', 'gelu' or None, got {activation!r}")
    # BlockSparse itself lies above ops; what the kernels rely on is that a Pattern was checked.
    if not (
        isinstance(getattr(weight, "pattern", None), Pattern)
        and isinstance(getattr(weight, "values", None), Tensor)
    ):
        raise TypeError(
            "expected weight to be a BlockSparse (BlockSparse.from_dense makes one), got "
            f"{type(weight).__name__}"
        )
    check_tensor("x", x)
    if bias is not None:
        check_tensor("bias", bias)
    values, (out_features, in_features) = weight.values, weight.shape
    if torch._C._is_any_autocast_enabled():  # cheaper than to ask for the device's
        x, values, bias = _autocast(x, values, bias)
    _check_operands(x, values, bias, out_features, in_features)
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in (x, values, bias) if t is not None
    ):
        raise NotImplementedError(
            "expected no forward-mode derivatives (jvp, jacfwd, dual numbers) of block-sparse "
            "products, got a tangent: torch.autograd.functional.jvp takes them backward twice"
        )
    wanted = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, values, bias) if t is not None
    )
    apart = activation == "gelu" and wanted
    # What looks on sees the op itself, registered gradient and all.
    direct = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.overrides.has_torch_function((x, values, bias))
    )
    flat = x.dim() == 2  # a view would be one more step of the backward pass
    inputs = x if flat else x.reshape(x.shape[:-1].numel(), in_features), values, bias
    pattern, last = weight.pattern.tensors(), None if apart else activation
    if wanted and not direct:
        apply: Any = _Linear.apply
        y: Tensor = apply(*inputs, pattern, out_features, last)
    else:
        with contextlib.nullcontext() if direct else torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.secateur.block_sparse_linear(*inputs, *pattern, out_features, last)
    y = y if flat else y.reshape(*x.shape[:-1], out_features)
    return torch.nn.functional.gelu(y) if apart else y


def _autocast(
    x: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to the arguments of a matrix product: float64 stays as it is."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return x, values, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(values), None if bias is None else cast(bias)


def _check_operands(
    x: Tensor, values: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> None:
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"expected x of shape (..., {in_features}) for a weight of shape "
            f"({out_features}, {in_features}), got {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"expected bias of shape ({out_features},), got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight.values", values), ("bias", bias)):
        if t is None:
            continue
        check_strided(name, t)
        if t.device != x.device:
            raise ValueError(f"expected {name} on {x.device}, as x, got {t.device}")
        if t.dtype != x.dtype:
            raise TypeError(f"expected {name} to be {x.dtype}, as x, got {t.dtype}")


# The ops take the pattern as six int32 tensors, in the order of Pattern.tensors(). They check
# dtypes and sizes but not the indices: called with any others than a Pattern's, they read and write
# out of bounds.


@torch.library.register_fake("secateur::block_sparse_linear")
def _(x: Tensor, values: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    return x.new_empty((x.shape[0], others[6]))  # after the pattern


@torch.library.register_fake("secateur::block_sparse_linear_dx")
def _(dy: Tensor, values: Tensor, *pattern_and_size: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], pattern_and_size[-1]))


@torch.library.register_fake("secateur::block_sparse_linear_dw")
def _(dy: Tensor, x: Tensor, row_ptr: Tensor, col: Tensor, *pattern_and_block: Any) -> Tensor:
    return dy.new_empty((col.shape[0], *pattern_and_block[-2:]))


@torch.library.register_fake("secateur::block_sparse_linear_backward")
def _(dy: Tensor, x: Tensor, values: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, *pattern, _, ctx.activation = inputs
    ctx.save_for_backward(x, values, bias, output if ctx.activation == "relu" else None, *pattern)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return (*_linear_gradients(ctx, dy, ctx.saved_tensors[4:]), *[None] * 8)


def _linear_gradients(
    ctx: Any, dy: Tensor, pattern: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, values, bias, y = ctx.saved_tensors[:4]
    if ctx.activation == "relu":
        dy = torch.where(y <= 0, 0, dy)
    elif ctx.activation == "gelu":  # of what was not kept: block_sparse_linear() avoids this
        z = torch.ops.secateur.block_sparse_linear(x, values, bias, *pattern, dy.shape[1])
        dy = torch.ops.aten.gelu_backward(dy, z)
    ops = torch.ops.secateur
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dw = None
    if needs_x and needs_values:
        dx, dw = ops.block_sparse_linear_backward(dy, x, values, *pattern)
    elif needs_x:
        dx = ops.block_sparse_linear_dx(dy, values, *pattern, x.shape[1])
    elif needs_values:
        dw = ops.block_sparse_linear_dw(dy, x, *pattern, *values.shape[1:])
    return dx, dw, dy.sum(0) if needs_bias and bias is not None else None


class _Linear(torch.autograd.Function):
    """The op with its gradient as registered below, in less time beside the kernels.

    torch.compile and torch.func see the op itself, which torch.func.vmap takes and torch.func.grad
    does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: tuple[Tensor, ...],  # one argument: autograd takes its time over each
        out_features: int,
        activation: str | None,
    ) -> Tensor:
        # Past the registered gradient, which takes time and would not be recorded here.
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.secateur.block_sparse_linear(
                x, values, bias, *pattern, out_features, activation
            )
        ctx.save_for_backward(x, values, bias, y if activation == "relu" else None)
        ctx.pattern, ctx.activation = pattern, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        # Gradients of gradients are wanted, or a compiler looks on.
        again = torch.is_grad_enabled() or torch.compiler.is_compiling()
        with contextlib.nullcontext() if again else torch._C._AutoDispatchBelowAutograd():
            gradients = _linear_gradients(ctx, dy, ctx.pattern)
        return (*gradients, None, None, None)


def _dx_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, *pattern, _ = inputs
    ctx.save_for_backward(dy, values, *pattern)


def _dx_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    dy, values, *pattern = ctx.saved_tensors
    ops = torch.ops.secateur
    needs_dy, needs_values = ctx.needs_input_grad[:2]
    return (
        ops.block_sparse_linear(g, values, None, *pattern, dy.shape[1]) if needs_dy else None,
        ops.block_sparse_linear_dw(dy, g, *pattern, *values.shape[1:]) if needs_values else None,
        *[None] * 7,
    )


def _dw_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, *pattern, _, _ = inputs
    ctx.save_for_backward(dy, x, *pattern)


def _dw_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    dy, x, *pattern = ctx.saved_tensors
    ops = torch.ops.secateur
    needs_dy, needs_x = ctx.needs_input_grad[:2]
    return (
        ops.block_sparse_linear(x, g, None, *pattern, dy.shape[1]) if needs_dy else None,
        ops.block_sparse_linear_dx(dy, g, *pattern, x.shape[1]) if needs_x else None,
        *[None] * 8,
    )


def _both_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _both_backward(ctx: Any, g_dx: Tensor, g_dw: Tensor) -> tuple[Any, ...]:
    dy, x, values, *pattern = ctx.saved_tensors
    ops = torch.ops.secateur
    needs_dy, needs_x, needs_values = ctx.needs_input_grad[:3]
    block = values.shape[1:]
    return (
        ops.block_sparse_linear(g_dx, values, None, *pattern, dy.shape[1])
        + ops.block_sparse_linear(x, g_dw, None, *pattern, dy.shape[1])
        if needs_dy
        else None,
        ops.block_sparse_linear_dx(dy, g_dw, *pattern, x.shape[1]) if needs_x else None,
        ops.block_sparse_linear_dw(dy, g_dx, *pattern, *block) if needs_values else None,
        *[None] * 6,
    )


torch.library.register_autograd(
    "secateur::block_sparse_linear", _linear_backward, setup_context=_linear_setup
)
torch.library.register_autograd(
    "secateur::block_sparse_linear_dx", _dx_backward, setup_context=_dx_setup
)
torch.library.register_autograd(
    "secateur::block_sparse_linear_dw", _dw_backward, setup_context=_dw_setup
)
torch.library.register_autograd(
    "secateur::block_sparse_linear_backward", _both_backward, setup_context=_both_setup
)


def _compute(t: Tensor) -> Tensor:
    """What references add up in: float32 would err in the order of each machine's BLAS."""
    return t.double()


def _blocks_to_dense(values: Tensor, row_of: Tensor, col: Tensor, n: int, k: int) -> Tensor:
    _, rows, cols = values.shape
    grid = values.new_zeros((-(-n // rows), -(-k // cols), rows, cols))
    grid = grid.index_put((row_of.long(), col.long()), values)
    return grid.permute(0, 2, 1, 3).reshape(grid.shape[0] * rows, grid.shape[1] * cols)[:n, :k]


def block_sparse_linear_reference(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col: Tensor,
    row_of: Tensor,
    col_ptr: Tensor,
    row_t: Tensor,
    position_t: Tensor,
    out_features: int,
    activation: str | None = None,
) -> Tensor:
    w = _blocks_to_dense(_compute(values), row_of, col, out_features, x.shape[1])
    y = _compute(x) @ w.t()
    y = y if bias is None else y + _compute(bias)
    return (y if activation is None else getattr(torch.nn.functional, activation)(y)).to(x.dtype)


def block_sparse_linear_dx_reference(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    row_of: Tensor,
    col_ptr: Tensor,
    row_t: Tensor,
    position_t: Tensor,
    in_features: int,
) -> Tensor:
    w = _blocks_to_dense(_compute(values), row_of, col, dy.shape[1], in_features)
    return (_compute(dy) @ w).to(dy.dtype)


def block_sparse_linear_dw_reference(
    dy: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    row_of: Tensor,
    col_ptr: Tensor,
    row_t: Tensor,
    position_t: Tensor,
    rows: int,
    cols: int,
) -> Tensor:
    dense = _compute(dy).t() @ _compute(x)
    n, k = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -k % cols, 0, -n % rows))
    grid = padded.view(-(-n // rows), rows, -(-k // cols), cols).permute(0, 2, 1, 3)
    return grid[row_of.long(), col.long()].to(dy.dtype)


def block_sparse_linear_backward_reference(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    row_of: Tensor,
    col_ptr: Tensor,
    row_t: Tensor,
    position_t: Tensor,
) -> tuple[Tensor, Tensor]:
    pattern = row_ptr, col, row_of, col_ptr, row_t, position_t
    return (
        block_sparse_linear_dx_reference(dy, values, *pattern, x.shape[1]),
        block_sparse_linear_dw_reference(dy, x, *pattern, *values.shape[1:]),
    )


# (batch, out_features, in_features, rows, cols, density); None: of the i-th row of blocks 2 / i
_CASES = (
    (3, 4, 5, 1, 1, 0.5),
    (2, 7, 5, 3, 5, 0.7),
    (5, 8, 8, 4, 1, 0.5),
    (3, 6, 9, 1, 4, 0.6),
    (1, 16, 17, 8, 8, 0.5),
    (4, 0, 6, 2, 2, 0.5),
    (4, 6, 0, 2, 2, 0.5),
    (0, 6, 4, 2, 2, 0.5),
    (3, 6, 4, 2, 2, 0.0),
    (65, 33, 70, 1, 1, 0.2),
    (70, 40, 24, 8, 8, 0.4),
    (33, 50, 47, 16, 1, 0.4),
    (19, 64, 64, 16, 16, 0.5),
    (7, 100, 90, 16, 16, 0.5),
    (150, 100, 90, 32, 32, 0.4),
    (21, 70, 50, 32, 16, 0.5),
    (40, 130, 200, 64, 64, 0.5),
    (17, 256, 192, 128, 64, 0.5),
    (9, 150, 260, 128, 128, 1.0),
    (130, 37, 41, 3, 5, 0.3),
    (64, 24, 56, 24, 24, 0.5),
    (66, 48, 96, 48, 48, 0.5),
    (514, 80, 90, 48, 40, 0.4),
    (1090, 33, 20, 16, 16, 0.5),
    (1025, 9, 33, 8, 8, 0.7),
    (1024, 20, 9, 1, 1, 0.4),
    (5, 300, 40, 160, 8, 0.7),
    (37, 40, 25, 6, 3, 0.5),
    (2, 100, 90, 32, 32, 0.5),
    (8, 200, 150, 64, 64, 0.5),
    (12, 50, 46, 8, 8, 0.5),
    (70, 50, 46, 8, 8, 0.5),
    (70, 50, 46, 6, 4, 0.5),
    (34, 22, 18, 2, 2, 0.5),
    (18, 24, 1065, 8, 8, 0.1),
    (18, 1100, 48, 16, 16, 0.1),
    (18, 1065, 24, 1, 1, 0.1),
    (70, 300, 90, 1, 1, None),
    (40, 200, 150, 8, 8, None),
)


def _problems(
    dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[int, ...]]]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for m, n, k, rows, cols, density in _CASES:
        grid = (-(-n // rows), -(-k // cols))
        likely = 2 / torch.arange(1, grid[0] + 1, device=device) if density is None else density
        chance = torch.rand(grid, generator=generator, device=device)
        pattern = Pattern.from_mask((chance.t() < likely).t())
        values = randn(pattern.col.numel(), rows, cols)
        name = f"{m}x{n}x{k} in {rows}x{cols}" + (", skewed" if density is None else "")
        yield name, randn(m, k), values, randn(m, n), pattern.tensors(), (n, k, rows, cols)
        if (m, rows) in ((19, 16), (65, 1)):  # strided
            yield (
                f"{name}, strided",
                randn(k, m).t(),
                randn(cols, rows, pattern.col.numel()).permute(2, 1, 0),
                randn(m, 2 * n)[:, ::2],
                pattern.tensors(),
                (n, k, rows, cols),
            )
        if (m, rows) in ((70, 8), (150, 32), (70, 1)):  # rows that no vector load could take
            yield (
                f"{name}, offset",
                randn(m, k + 3)[:, 3:],
                randn(values.numel() + 1)[1:].view_as(values),
                randn(m, n + 3)[:, 1 : n + 1],
                pattern.tensors(),
                (n, k, rows, cols),
            )
        # What is stored beyond the edge must not matter.
        if (m, rows) in ((7, 16), (130, 3), (150, 32)):
            bad = values.clone()
            bad[pattern.row_of == grid[0] - 1, n - (grid[0] - 1) * rows :] = torch.inf
            bad[pattern.col == grid[1] - 1, :, k - (grid[1] - 1) * cols :] = torch.inf
            yield (
                f"{name}, garbage",
                randn(m, k),
                bad,
                randn(m, n),
                pattern.tensors(),
                (n, k, rows, cols),
            )


def _linear_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for i, (name, x, values, _, pattern, (n, *_)) in enumerate(_problems(dtype, device)):
        bias = None if i % 3 == 2 else torch.linspace(-1, 1, n, device=device).to(dtype)
        yield Sample(name, (x, values, bias, *pattern, n))
        if i % 3 < 2:
            activation = ("relu", "gelu")[i % 3]
            yield Sample(f"{name}, {activation}", (x, values, bias, *pattern, n, activation))


def _dx_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, _, values, dy, pattern, (_, k, *_) in _problems(dtype, device):
        yield Sample(name, (dy, values, *pattern, k))


def _dw_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, x, _, dy, pattern, (_, _, rows, cols) in _problems(dtype, device):
        yield Sample(name, (dy, x, *pattern, rows, cols))


def _backward_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, x, values, dy, pattern, _ in _problems(dtype, device):
        yield Sample(name, (dy, x, values, *pattern))


SPECS = (
    OpSpec(
        "block_sparse_linear", block_sparse_linear_reference, _linear_samples, differentiable=True
    ),
    OpSpec(
        "block_sparse_linear_dx",
        block_sparse_linear_dx_reference,
        _dx_samples,
        differentiable=True,
    ),
    OpSpec(
        "block_sparse_linear_dw",
        block_sparse_linear_dw_reference,
        _dw_samples,
        differentiable=True,
    ),
    OpSpec(
        "block_sparse_linear_backward",
        block_sparse_linear_backward_reference,
        _backward_samples,
        differentiable=True,
    ),
)
