"""Scopes: over which layers a target sparsity is shared out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["SCOPES", "Share", "share_out"]

Share = tuple[list[int], int]
"""Layers (by index) that compete with one another, and how many of their units are to be dead."""


def _global(sparsity: float, units: Sequence[int]) -> list[Share]:
    return [(list(range(len(units))), round(sparsity * sum(units)))]


def _layer(sparsity: float, units: Sequence[int]) -> list[Share]:
    return [([i], round(sparsity * n)) for i, n in enumerate(units)]


SCOPES: dict[str, Callable[[float, Sequence[int]], list[Share]]] = {
    "global": _global,
    "layer": _layer,
}


def share_out(scope: str, sparsity: float, units: Sequence[int]) -> list[Share]:
    """Split a target over layers.

    Args:
        scope: ``"global"``: all layers compete; ``"layer"``: each reaches the target on its own.
        sparsity: fraction of the units to be dead, in [0, 1).
        units: number of units of each layer, dead ones included.

    Returns:
        Shares that cover every layer once; the counts are ``round(sparsity * n)``.

    Raises:
        ValueError: an unknown scope.
    """
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"expected scope to be one of {sorted(SCOPES)}, got {scope!r}")
    return SCOPES[scope](sparsity, units)
