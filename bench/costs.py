"""Held-out test of ``secateur.cost``: random layers, predicted and measured.

First the table is made, which times each at the densities next to its own; then each is predicted,
and measured at its own density, with other blocks alive, which the table has never seen. Times are
medians of calls by turns. Where a prediction is off by more than 15 %, its line stays in the table.
``at its pace`` is the error that is left where prediction and measurement are each divided by the
time, then, of the dense product that ``cost`` takes for the machine's pace. ``speed-up error`` is
that of dense over sparse, which layers are chosen by. ``--quick`` takes about five minutes.
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
from secateur.costs import DIRECTIONS, by_turns, products, reference

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


def measurement(m: int, weight: BlockSparse) -> tuple[float, dict[str, tuple[float, float]]]:
    """The machine's pace, and seconds, dense and sparse, by direction."""
    calls = products(m, weight)
    times = by_turns([reference(), *(call for pair in calls.values() for call in pair)])
    pace, *seconds = map(statistics.median, times)
    return pace, dict(zip(calls, zip(seconds[::2], seconds[1::2], strict=True), strict=True))


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
    for m, weight in tqdm(layers, "makes the table", unit="layer", disable=None):
        predictions(m, weight)
    rows: list[dict[str, Any]] = []
    for m, weight in tqdm(layers, "predicts and measures", unit="layer", disable=None):
        predicted, expected_pace = predictions(m, weight), secateur.cost_table().pace
        pace, measured = measurement(m, weight)
        for name, guess in predicted.items():
            dense, sparse = measured[name]
            for kind, found, seconds in (
                ("dense", dense, guess.dense),
                ("{}x{}".format(*weight.block), sparse, guess.sparse),
            ):
                rows.append(
                    {
                        "kind": kind,
                        "direction": name,
                        "rows": m,
                        "shape": "{}x{}".format(*weight.shape),
                        "density": weight.density,
                        "measured ms": found * 1e3,
                        "predicted ms": seconds * 1e3,
                        "error": seconds / found - 1,
                        "at its pace": seconds / expected_pace / (found / pace) - 1,
                        "speed-up error": guess.speedup / (dense / sparse) - 1,
                    }
                )
    harness.print_table([row for row in rows if abs(row["error"]) > LIMIT] or rows[:1])
    for few in (True, False):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            chosen = [r for r in rows if r["kind"] == kind and (r["rows"] < 16) == few]
            if not chosen:
                continue
            within, at_pace, faster = (
                sum(abs(row[key]) <= LIMIT for row in chosen) / len(chosen)
                for key in ("error", "at its pace", "speed-up error")
            )
            middle = statistics.median(abs(row["error"]) for row in chosen)
            print(
                f"{kind:>8}, {'fewer than 16' if few else '16 rows and more':>16}: "
                f"{len(chosen)} predictions, off by {middle:.1%} in the median, "
                f"within {LIMIT:.0%}: {within:.0%} (at its pace {at_pace:.0%}, "
                f"speed-ups {faster:.0%})"
            )
    harness.save(rows, args)


if __name__ == "__main__":
    main()
