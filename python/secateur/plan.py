"""The plan of a pruner in words: what is pruned, how far, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.layers import Layer
from secateur.schedules import Schedule
from secateur.scope import share_out

__all__ = ["plan"]

_LISTED = 4  # names of one kind that the plan shows; Pruner.skipped has them all


def plan(
    layers: Sequence[Layer], skipped: Mapping[str, str], schedule: Schedule, scope: str
) -> list[str]:
    """Lines: a table of the layers, and the parameters that are left out, by reason."""
    lines: list[str] = []
    last = schedule.last
    final = None if last is None else schedule.target(last)
    to_prune = ["by score"] * len(layers)
    if final is not None and final.sparsity is not None:
        units = [layer.units for layer in layers]
        for members, dead in share_out(scope, final.sparsity, units):
            shared = f"{dead:,}"
            if len(members) > 1:
                total = sum(units[i] for i in members)
                lines.append(f"to prune     {dead:,} of {total:,} units, whichever they are")
                shared = "shared"
            for i in members:
                to_prune[i] = shared
    rows = [("parameter", "shape", "units", "to prune", "sparsity", "")]
    for layer, share in zip(layers, to_prune, strict=True):
        rows.append(
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.units:,} of {layer.block[0]}x{layer.block[1]}",
                share,
                f"{layer.sparsity:.4f}",
                "kept its best unit" if layer.floor_held else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        listed = ", ".join(names[:_LISTED])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        lines.append(f"left out ({why}): {listed}{more}")
    return lines
