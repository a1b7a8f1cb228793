"""Granularities: what lives or dies together.

A granularity sees a parameter as a matrix: (out, in * kernel) for two dimensions or more, (n, 1)
for one. To add one, subclass :class:`Granularity` and say how large its blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur import ops

__all__ = ["Block", "Element", "Granularity"]


@dataclass(frozen=True)
class Granularity:
    """A tiling of a weight matrix into units of pruning."""

    @property
    def reduction(self) -> str:
        """How the scores of a unit's weights become the unit's score."""
        return "mean"

    def block(self, rows: int, cols: int) -> tuple[int, int]:
        """(rows, cols) of one unit in a matrix of ``rows`` x ``cols``; edge units are cut off."""
        raise NotImplementedError(f"{type(self).__name__} has no block()")


@dataclass(frozen=True)
class Element(Granularity):
    """Every weight on its own: unstructured pruning."""

    def block(self, rows: int, cols: int) -> tuple[int, int]:
        return 1, 1


@dataclass(frozen=True)
class Block(Granularity):
    """Blocks of ``rows`` x ``cols`` weights of the matrix; for Linear and Conv outputs x inputs.

    Args:
        rows, cols: size in weights, at least 1; ``cols`` defaults to ``rows``.
        reduce: how a block's scores become one: ``"mean"`` (default), ``"sum"``, ``"max"`` or
            ``"l2"`` (root of the sum of squares). Edge blocks count the weights that exist.

    Raises:
        TypeError: a size is not a whole number.
        ValueError: a size below 1, or an unknown reduction.
    """

    rows: int
    cols: int = None  # type: ignore[assignment]  # rows, once made
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.cols is None:
            object.__setattr__(self, "cols", self.rows)
        for name in ("rows", "cols"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"expected {name} of a block to be an int, got {size!r}")
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"expected a block of at least 1 x 1, got {self.rows} x {self.cols}")
        if self.reduce not in ops.REDUCTIONS:
            raise ValueError(
                f"expected reduce to be one of {', '.join(ops.REDUCTIONS)}, got {self.reduce!r}"
            )

    @property
    def reduction(self) -> str:
        return self.reduce

    def block(self, rows: int, cols: int) -> tuple[int, int]:
        return self.rows, self.cols
