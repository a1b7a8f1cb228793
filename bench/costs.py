"""Held-out test of ``secateur.cost``: random layers, predicted, and later measured.

First the table is made, which times each at the densities next to its own; then each is predicted,
and measured at its own density, with other blocks alive, which the table has never seen. Times are
medians of calls by turns. Where a prediction is off by more than 15 %, its line stays in the table: ``again``
is how far a second measurement of the same is off the first, so what no prediction can know;
``speed-up error`` is of dense over sparse, which layers are chosen by. ``--quick`` takes about six
minutes.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import torch
from tqdm import tqdm

import secateur
from bench import harness
from secateur import BlockSparse
from secateur.costs import DIRECTIONS, by_turns, products

LIMIT = 0.15


def random_sparse(n: int, k: int, block: int, density: float, dtype: torch.dtype) -> BlockSparse:
    mask = torch.rand(-(-n // block), -(-k // block)) < density
    mask[0, 0] = True
    return BlockSparse.from_dense(torch.randn(n, k).to(dtype), block, mask)


def log_uniform(low: float, high: float) -> float:
    return float(low * (high / low) ** random.random())


def predictions(m: int, weight: BlockSparse) -> dict[str, secateur.Cost]:
    """By direction."""
    return {
        direction: secateur.cost(
            *weight.shape,
            m,
            block=weight.block,
            density=weight.density,
            dtype=weight.values.dtype,
            direction=direction.split("+"),
        )
        for direction in (*DIRECTIONS, "dx+dw")
    }


def measurement(m: int, weight: BlockSparse) -> dict[str, tuple[float, float]]:
    """Seconds, dense and sparse, by direction."""
    calls = products(m, weight)
    times = by_turns([call for pair in calls.values() for call in pair])
    seconds = map(statistics.median, times)
    return {name: (next(seconds), next(seconds)) for name in calls}


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
    predicted, measured = [], []
    for m, weight in tqdm(layers, "makes the table", unit="layer", disable=None):
        predictions(m, weight)
    for m, weight in tqdm(layers, "predicts and measures", unit="layer", disable=None):
        predicted.append(predictions(m, weight))
        measured.append(measurement(m, weight))
    repeated = [
        measurement(m, weight)
        for m, weight in tqdm(layers, "measures again", unit="layer", disable=None)
    ]

    rows: list[dict[str, Any]] = []
    for (m, weight), guesses, once, again in zip(
        layers, predicted, measured, repeated, strict=True
    ):
        for name, guess in guesses.items():
            for i, kind in enumerate(("dense", "{}x{}".format(*weight.block))):
                seconds = (guess.dense, guess.sparse)[i]
                rows.append(
                    {
                        "kind": kind,
                        "direction": name,
                        "rows": m,
                        "shape": "{}x{}".format(*weight.shape),
                        "density": weight.density,
                        "measured ms": once[name][i] * 1e3,
                        "predicted ms": seconds * 1e3,
                        "error": seconds / once[name][i] - 1,
                        "again": again[name][i] / once[name][i] - 1,
                        "speed-up error": guess.speedup / (once[name][0] / once[name][1]) - 1,
                    }
                )
    harness.print_table([row for row in rows if abs(row["error"]) > LIMIT] or rows[:1])
    for few in (True, False):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            chosen = [r for r in rows if r["kind"] == kind and (r["rows"] < 16) == few]
            if not chosen:
                continue
            within, stayed, faster = (
                sum(abs(row[key]) <= LIMIT for row in chosen) / len(chosen)
                for key in ("error", "again", "speed-up error")
            )
            middle = statistics.median(abs(row["error"]) for row in chosen)
            print(
                f"{kind:>8}, {'fewer than 16' if few else '16 rows and more':>16}: "
                f"{len(chosen)} predictions, {within:.0%} within {LIMIT:.0%} (measured again: "
                f"{stayed:.0%}), off by {middle:.1%} in the median; speed-ups {faster:.0%}"
            )
    harness.save(rows, args)


if __name__ == "__main__":
    main()
