"""Held-out test of ``secateur.cost``: random layers, predicted and measured.

None of the shapes is one that the table was fitted to. Where a prediction is off by more than 15 %,
its line stays in the table. ``--quick`` takes about a minute once the table is there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch

import secateur
from bench import harness
from secateur import BlockSparse
from secateur.costs import products

LIMIT = 0.15


def random_sparse(n: int, k: int, block: int, density: float, dtype: torch.dtype) -> BlockSparse:
    mask = torch.rand(-(-n // block), -(-k // block)) < density
    mask[0, 0] = True
    return BlockSparse.from_dense(torch.randn(n, k).to(dtype), block, mask)


def log_uniform(low: float, high: float) -> float:
    return float(low * (high / low) ** random.random())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    harness.output_arguments(parser)
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
            for name, (dense, sparse) in products(m, weight).items():
                direction = name.split("+")
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
                            "direction": name,
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
    harness.save(rows, args)


if __name__ == "__main__":
    main()
