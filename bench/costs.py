"""Held-out test of ``secateur.cost``: random layers, predicted and measured.

None of the shapes is one that the table was fitted to. Where a prediction is off by more than 15 %,
its line stays in the table. ``--quick`` takes about a minute once the table is there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from bench import harness
from secateur import BlockSparse

LIMIT = 0.15


def random_sparse(n: int, k: int, block: int, density: float, dtype: torch.dtype) -> BlockSparse:
    mask = torch.rand(-(-n // block), -(-k // block)) < density
    mask[0, 0] = True
    return BlockSparse.from_dense(torch.randn(n, k).to(dtype), block, mask)


def products(
    m: int, sparse: BlockSparse
) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Direction, dense and sparse."""
    n, k = sparse.shape
    x, dy, weight = (
        torch.randn(shape).to(sparse.values.dtype) for shape in ((m, k), (m, n), (n, k))
    )
    values, pattern = sparse.values, sparse.pattern.tensors()
    ops = torch.ops.secateur
    yield (
        "forward",
        lambda: x @ weight.t(),
        lambda: ops.block_sparse_linear(x, values, None, *pattern, n),
    )
    yield "dx", lambda: dy @ weight, lambda: ops.block_sparse_linear_dx(dy, values, *pattern, k)
    yield (
        "dw",
        lambda: dy.t() @ x,
        lambda: ops.block_sparse_linear_dw(dy, x, *pattern, *sparse.block),
    )


def log_uniform(low: float, high: float) -> float:
    return float(low * (high / low) ** random.random())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write the rows here, e.g. under bench/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)

    rows: list[dict[str, Any]] = []
    for block in args.blocks:
        for _ in range(6 if args.quick else 30):
            m = round(log_uniform(1, 2048))
            n, k = (64 * round(log_uniform(4, 64)) for _ in "nk")
            weight = random_sparse(n, k, block, log_uniform(0.03, 0.6), dtype)
            density = weight.density
            for direction, dense, sparse in products(m, weight):
                calls = {"dense": harness.Call(dense), "sparse": harness.Call(sparse)}
                real = [t.seconds for t in harness.measure(calls, 0.2, time.perf_counter).values()]
                predicted = secateur.cost(
                    n, k, m, block=block, density=density, dtype=dtype, direction=direction
                )
                for kind, seconds, guess in zip(
                    ("dense", f"{block}x{block}"),
                    real,
                    (predicted.dense, predicted.sparse),
                    strict=True,
                ):
                    rows.append(
                        {
                            "kind": kind,
                            "direction": direction,
                            "rows": m,
                            "shape": f"{n}x{k}",
                            "density": density,
                            "measured ms": seconds * 1e3,
                            "predicted ms": guess * 1e3,
                            "error": guess / seconds - 1,
                        }
                    )
    harness.print_table([row for row in rows if abs(row["error"]) > LIMIT] or rows[:1])
    for few in (True, False):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            chosen = [r for r in rows if r["kind"] == kind and (r["rows"] < 16) == few]
            errors = [abs(row["error"]) for row in chosen]
            if errors:
                within = sum(error <= LIMIT for error in errors) / len(errors)
                print(
                    f"{kind:>8}, {'fewer than 16' if few else '16 rows and more':>16}: "
                    f"{len(errors)} predictions, {within:.0%} within {LIMIT:.0%}, off by "
                    f"{statistics.median(errors):.1%} in the median"
                )
    if args.csv:
        harness.save_csv(rows, args.csv)


if __name__ == "__main__":
    main()
