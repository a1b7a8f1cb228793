"""BlockSparse: a weight matrix of which only the live blocks are stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secateur.ops._checks import check_bool, check_float, is_ints
from secateur.ops.block_sparse import Pattern

__all__ = ["BlockSparse", "Pattern", "block_size", "live_blocks"]


class BlockSparse:
    """A matrix ``(out_features, in_features)`` cut into equal blocks, only some of them stored.

    Blocks that stick out over the edge are stored whole. What lies outside of the matrix is zero
    when :meth:`from_dense` made it, and never used.

    Args:
        values: ``(n_blocks, rows, cols)``, the live blocks in row order; float32, bfloat16,
            float16 or float64.
        pattern: where the blocks lie.
        shape: ``(out_features, in_features)``.

    Raises:
        TypeError: ``values`` are not of a supported dtype, ``pattern`` is no Pattern, or ``shape``
            is no pair of ints.
        ValueError: ``values``, ``pattern`` and ``shape`` do not fit, or devices differ.
    """

    __slots__ = ("pattern", "shape", "values")

    values: Tensor
    pattern: Pattern
    shape: tuple[int, int]

    def __init__(self, values: Tensor, pattern: Pattern, shape: tuple[int, int]) -> None:
        check_float("values", values)
        if not isinstance(pattern, Pattern):
            raise TypeError(f"expected pattern to be a Pattern, got {type(pattern).__name__}")
        if not _is_pair(shape):
            raise TypeError(f"expected shape to be (out_features, in_features), got {shape!r}")
        n_blocks = pattern.col.shape[0]
        if values.dim() != 3 or values.shape[0] != n_blocks or 0 in values.shape[1:]:
            raise ValueError(
                f"expected values of shape ({n_blocks}, rows, cols), got {tuple(values.shape)}"
            )
        _, rows, cols = values.shape
        grid = (pattern.row_ptr.shape[0] - 1, pattern.col_ptr.shape[0] - 1)
        expected = _grid(shape, (rows, cols))
        if grid != expected:
            raise ValueError(
                f"expected a pattern of {expected[0]} x {expected[1]} blocks for shape {shape} in "
                f"blocks of {rows} x {cols}, got {grid[0]} x {grid[1]}"
            )
        if values.device != pattern.col.device:
            raise ValueError(
                f"expected values on {pattern.col.device}, as the pattern, got {values.device}"
            )
        self.values = values
        self.pattern = pattern
        self.shape = (shape[0], shape[1])

    @classmethod
    def from_dense(
        cls, weight: Tensor, block: int | tuple[int, int], mask: Tensor | None = None
    ) -> BlockSparse:
        """Gather the live blocks of a dense matrix; differentiable in ``weight``.

        Args:
            weight: ``(out_features, in_features)``; float32, bfloat16, float16 or float64; any
                strides.
            block: block size, an int or (rows, cols).
            mask: bool ``(ceil(out_features / rows), ceil(in_features / cols))``, True = live; None
                keeps every block that has a non-zero (NaN is one).

        Raises:
            TypeError: ``weight`` is not floating point, ``mask`` is not bool, or ``block`` is no
                int or pair of ints.
            ValueError: ``weight`` is not 2-D, a block size is below 1, ``mask`` has another shape,
                or devices differ.

        Equivalent to:
            ``blocks[mask]`` where blocks is the padded weight viewed as (block_rows, block_cols,
            rows, cols)
        """
        rows, cols = block_size(block)
        _check_matrix("weight", weight)
        shape = (weight.shape[0], weight.shape[1])
        grid = _grid(shape, (rows, cols))
        if mask is not None:
            check_bool("mask", mask)
            if mask.shape != grid:
                raise ValueError(
                    f"expected mask of shape {grid} for weight {shape} in blocks of {rows} x "
                    f"{cols}, got {tuple(mask.shape)}"
                )
            if mask.device != weight.device:
                raise ValueError(f"expected mask on {weight.device}, as weight, got {mask.device}")
        pattern = Pattern.from_mask(live_blocks(weight, block) if mask is None else mask)
        return cls(_blocks(weight, (rows, cols))[pattern.row_of, pattern.col], pattern, shape)

    def gather(self, dense: Tensor) -> Tensor:
        """What a dense matrix holds in the live blocks, as values; differentiable.

        Args:
            dense: of this matrix's shape; float32, bfloat16, float16 or float64; any strides.

        Returns:
            ``(n_blocks, rows, cols)``, zero where a block sticks out over the edge.

        Raises:
            TypeError: ``dense`` is no tensor of a supported dtype.
            ValueError: ``dense`` has another shape, or is on another device.

        Equivalent to:
            ``BlockSparse.from_dense(dense, self.block, mask).values`` with the mask of this pattern
        """
        check_float("dense", dense)
        if dense.shape != self.shape:
            raise ValueError(f"expected dense of shape {self.shape}, got {tuple(dense.shape)}")
        if dense.device != self.device:
            raise ValueError(f"expected dense on {self.device}, as values, got {dense.device}")
        return _blocks(dense, self.block)[self.pattern.row_of, self.pattern.col]

    def with_values(self, values: Tensor) -> BlockSparse:
        """The same pattern, which is shared, with other values.

        Raises:
            TypeError: ``values`` are not of a supported dtype.
            ValueError: ``values`` are not of the shape of ``self.values``, or on another device.
        """
        check_float("values", values)
        if values.shape != self.values.shape:
            raise ValueError(
                f"expected values of shape {tuple(self.values.shape)}, got {tuple(values.shape)}"
            )
        return BlockSparse(values, self.pattern, self.shape)

    def to_dense(self) -> Tensor:
        """The dense matrix, contiguous; differentiable in ``values``."""
        (n, k), (rows, cols) = self.shape, self.block
        block_rows, block_cols = _grid(self.shape, self.block)
        blocks = self.values.new_zeros((block_rows, block_cols, rows, cols))
        blocks = blocks.index_put((self.pattern.row_of, self.pattern.col), self.values)
        dense = blocks.transpose(1, 2).reshape(block_rows * rows, block_cols * cols)
        return dense[:n, :k].contiguous()

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockSparse:
        """The same matrix on another device or in another dtype; differentiable.

        As in torch, a dtype may come first.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return BlockSparse(
            self.values.to(device=device, dtype=dtype),
            self.pattern if device is None else self.pattern.to(device),
            self.shape,
        )

    @property
    def block(self) -> tuple[int, int]:
        """(rows, cols) of a block."""
        return (self.values.shape[1], self.values.shape[2])

    @property
    def row_index(self) -> Tensor:
        """int32 ``(n_blocks,)``: the block row of each block."""
        return self.pattern.row_of

    @property
    def col_index(self) -> Tensor:
        """int32 ``(n_blocks,)``: the block column of each block."""
        return self.pattern.col

    @property
    def density(self) -> float:
        """Stored entries that lie inside of the matrix, over all its entries; 0 if it has none.

        NaN on the meta device, where nobody knows the pattern.
        """
        (n, k), (rows, cols) = self.shape, self.block
        if n * k == 0:
            return 0.0
        if self.row_index.is_meta:
            return math.nan
        heights = (n - self.row_index.long() * rows).clamp(max=rows)
        widths = (k - self.col_index.long() * cols).clamp(max=cols)
        return int((heights * widths).sum()) / (n * k)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __repr__(self) -> str:
        rows, cols = self.block
        return (
            f"BlockSparse({self.shape[0]} x {self.shape[1]}, blocks of {rows} x {cols}, "
            f"{self.values.shape[0]} live, density {self.density:.3g}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )


def live_blocks(weight: Tensor, block: int | tuple[int, int]) -> Tensor:
    """bool ``(ceil(N / rows), ceil(K / cols))``: which blocks hold a non-zero (NaN is one).

    Raises:
        TypeError: ``weight`` is not floating point, or ``block`` is no int or pair of ints.
        ValueError: ``weight`` is not 2-D, or a block size is below 1.
    """
    _check_matrix("weight", weight)
    return _blocks(weight.detach() != 0, block_size(block)).flatten(2).any(2)


def block_size(block: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of a block size that is one number or two.

    Raises:
        TypeError: ``block`` is no int or pair of ints.
        ValueError: a size is below 1.
    """
    pair = (block, block) if isinstance(block, int) else block
    if not _is_pair(pair):
        raise TypeError(f"expected block to be an int or (rows, cols), got {block!r}")
    if min(pair) < 1:
        raise ValueError(f"expected block sizes of at least 1, got {block!r}")
    return (pair[0], pair[1])


def _is_pair(pair: Any) -> bool:
    return is_ints(pair) and len(pair) == 2


def _check_matrix(name: str, t: Tensor) -> None:
    check_float(name, t)
    if t.dim() != 2:
        raise ValueError(f"expected {name} to have 2 dimensions, got shape {tuple(t.shape)}")


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _blocks(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """View as (block_rows, block_cols, rows, cols), padded with zeros at the edges."""
    (n, k), (rows, cols) = dense.shape, block
    grid = _grid((n, k), block)
    if n % rows or k % cols:
        dense = torch.nn.functional.pad(dense, (0, -k % cols, 0, -n % rows))
    return dense.view(grid[0], rows, grid[1], cols).transpose(1, 2)
