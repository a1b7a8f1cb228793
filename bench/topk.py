"""Exact selection against torch: multiply, abs, cat and kthvalue or topk.

Ours scores and selects in one go (``ops.select``), or selects among given scores
(``ops.topk_mask``); torch's line makes the same bool masks. ``dot`` is ``torch.dot`` over the same
weights and gradients: the time it takes to read them once. ``--quick`` takes under a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import harness
from secateur import ops

Call = Callable[[], Any]


def tensors(numel: int, count: int, seed: int) -> list[Tensor]:
    """``count`` tensors of mixed sizes, ``numel`` elements in all."""
    generator = torch.Generator().manual_seed(seed)
    shares = [1 + i % 7 for i in range(count)]
    sizes = [numel * share // sum(shares) for share in shares]
    sizes[-1] += numel - sum(sizes)
    return [torch.randn(size, generator=generator) for size in sizes]


def by_kthvalue(scores: list[Tensor], keep: int) -> list[Tensor]:
    flat = torch.cat(scores)
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    return [s >= threshold for s in scores]


def by_topk(scores: list[Tensor], keep: int) -> list[Tensor]:
    threshold = torch.cat(scores).topk(keep, sorted=False).values.min()
    return [s >= threshold for s in scores]


def check(masks: list[Tensor], scores: list[Tensor], keep: int) -> None:
    """Exactly ``keep`` are marked, and none of them is worse than one that is not."""
    marked, scored = torch.cat(masks), torch.cat(scores)
    best = scored.sort(descending=True, stable=True).indices[:keep]
    expected = torch.zeros_like(marked)
    expected[best] = True
    if not torch.equal(marked, expected):
        raise RuntimeError(f"expected the {keep} best by a stable sort, got another mask")


def fused(weights: list[Tensor], grads: list[Tensor], keep: int, seconds: float) -> dict[str, Any]:
    """|g * w|: score and select."""

    def scores() -> list[Tensor]:
        return [(w * g).abs() for w, g in zip(weights, grads, strict=True)]

    def ours() -> list[Tensor]:
        return ops.select(weights, grads, formula="taylor", keep=keep)

    shapes = [w.shape for w in weights]
    masks = [ops.unpack_mask(m, s) for m, s in zip(ours(), shapes, strict=True)]
    check(masks, scores(), keep)
    calls: dict[str, Call] = {
        "ours": ours,
        "kthvalue": lambda: by_kthvalue(scores(), keep),
        "topk": lambda: by_topk(scores(), keep),
        "dot": lambda: [torch.dot(w, g) for w, g in zip(weights, grads, strict=True)],
    }
    return timed("|g*w|", keep, calls, 8 * sum(w.numel() for w in weights), seconds)


def given(name: str, scores: list[Tensor], keep: int, seconds: float) -> dict[str, Any]:
    """Selection among scores that are there already."""
    check(ops.topk_mask(scores, keep), scores, keep)
    calls: dict[str, Call] = {
        "ours": lambda: ops.topk_mask(scores, keep),
        "kthvalue": lambda: by_kthvalue(scores, keep),
        "topk": lambda: by_topk(scores, keep),
        "dot": lambda: [torch.dot(s, s) for s in scores],
    }
    return timed(name, keep, calls, 4 * sum(s.numel() for s in scores), seconds)


def timed(
    name: str, keep: int, calls: dict[str, Call], read: int, seconds: float
) -> dict[str, Any]:
    times = dict(zip(calls, harness.measure(list(calls.values()), seconds), strict=True))
    return {
        "scores": name,
        "keep": keep,
        **{f"{call} ms": time * 1e3 for call, time in times.items()},
        "GB/s": read / times["ours"] / 1e9,
        "x kthvalue": times["kthvalue"] / times["ours"],
        "x topk": times["topk"] / times["ours"],
        "of dot": times["ours"] / times["dot"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 M scores, short timings")
    parser.add_argument("--numel", type=int, default=16_000_000, help="scores in all")
    parser.add_argument("--tensors", type=int, default=50, help="in how many tensors")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--csv", type=Path, default=Path("bench/results/topk.csv"))
    args = parser.parse_args()
    numel, seconds = (2_000_000, 1.0) if args.quick else (args.numel, 8.0)
    if args.threads:
        torch.set_num_threads(args.threads)

    weights, grads = tensors(numel, args.tensors, 0), tensors(numel, args.tensors, 1)
    steps = [torch.randint(0, 252, w.shape) for w in weights]
    rows = [fused(weights, grads, numel * percent // 100, seconds) for percent in (1, 10, 50)]
    keep = numel // 10
    for name, scores in {
        "random": weights,
        "all equal": [torch.ones_like(w) for w in weights],
        "1 to 1.00003": [1 + s * 2**-23 for s in steps],
        "sorted": list(torch.cat(weights).sort().values.split([w.numel() for w in weights])),
        "denormal": [s * 2**-149 for s in steps],
    }.items():
        rows.append(given(name, scores, keep, seconds))
    harness.print_table(rows)
    harness.save_csv(rows, args.csv)


if __name__ == "__main__":
    main()
