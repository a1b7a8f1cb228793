"""Held-out test of ``secateur.cost``: random layers, predicted and measured.

None of the shapes is one that the table was fitted to. Times are, as those of the table, the median
of the calmest of several visits, and how far the median of all visits is off stands beside it: what
neighbours on the machine add to any prediction. Where a prediction is off by more than 15 %, its
line stays in the table. ``--quick`` takes about a minute once the table is there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from typing import Any

import torch
from tqdm import tqdm

import secateur
from bench import harness
from secateur import BlockSparse
from secateur.costs import products, visit

LIMIT = 0.15
VISITS = 6  # to each layer, as far apart as can be


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
    parser.add_argument("--threads", type=harness.positive, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    harness.output_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)

    layers = []
    for block in args.blocks:
        for _ in range(6 if args.quick else 30):
            m = round(log_uniform(1, 2048))
            n, k = (64 * round(log_uniform(4, 64)) for _ in "nk")
            layers.append((m, random_sparse(n, k, block, log_uniform(0.03, 0.6), dtype)))
            secateur.cost(n, k, m, block=block, density=0.1, dtype=dtype)  # measures the table
    visits: dict[tuple[int, str], list[list[float]]] = {}
    for i, (m, weight) in enumerate(tqdm(layers * VISITS, file=sys.stderr, unit="layer")):
        for name, calls in products(m, weight).items():
            visits.setdefault((i % len(layers), name), []).append(visit(calls))

    rows: list[dict[str, Any]] = []
    for (i, name), times in visits.items():
        m, weight = layers[i]
        n, k = weight.shape
        block, _ = weight.block
        predicted = secateur.cost(
            n,
            k,
            m,
            block=block,
            density=weight.density,
            dtype=dtype,
            direction=name.split("+"),
        )
        for kind, seconds, guess in zip(
            ("dense", f"{block}x{block}"),
            zip(*times, strict=True),
            (predicted.dense, predicted.sparse),
            strict=True,
        ):
            rows.append(
                {
                    "kind": kind,
                    "direction": name,
                    "rows": m,
                    "shape": f"{n}x{k}",
                    "density": weight.density,
                    "measured ms": min(seconds) * 1e3,
                    "predicted ms": guess * 1e3,
                    "error": guess / min(seconds) - 1,
                    "of all visits": guess / statistics.median(seconds) - 1,
                }
            )
    harness.print_table([row for row in rows if abs(row["error"]) > LIMIT] or rows[:1])
    for few in (True, False):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            chosen = [r for r in rows if r["kind"] == kind and (r["rows"] < 16) == few]
            if not chosen:
                continue
            calm, all_visits = (
                sum(abs(row[key]) <= LIMIT for row in chosen) / len(chosen)
                for key in ("error", "of all visits")
            )
            middle = statistics.median(abs(row["error"]) for row in chosen)
            print(
                f"{kind:>8}, {'fewer than 16' if few else '16 rows and more':>16}: "
                f"{len(chosen)} predictions, {calm:.0%} within {LIMIT:.0%} ({all_visits:.0%} of "
                f"the median of all visits), off by {middle:.1%} in the median"
            )
    harness.save(rows, args)


if __name__ == "__main__":
    main()
