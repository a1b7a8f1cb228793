"""N:M masks of |g * w| against torch: score, reshape, topk, scatter.

Ours scores and marks in one go (``ops.nm_mask``); ``topk`` makes the same mask as bools. ``ranks``
is a faster way in torch for small groups: count by comparisons how many of its group are better
than an element. ``dot`` is ``torch.dot`` over the same weights and gradients: the time it takes to
read them once. One thread is measured in CPU time, which neighbours disturb less. ``--quick`` takes
under a minute.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Call
from secateur import ops

PATTERNS = ((1, 2), (1, 4), (2, 4), (4, 8), (8, 16), (16, 32), (2, 3), (4, 7))


def by_topk(scores: Tensor, n: int, m: int) -> Tensor:
    best = scores.reshape(-1, m).topk(n, sorted=False).indices
    mask = torch.zeros(len(best), m, dtype=torch.bool)
    return mask.scatter_(1, best, True).view(scores.shape)


def by_ranks(scores: Tensor, n: int, m: int) -> Tensor:
    """Right where no scores of a group are equal."""
    groups = scores.reshape(-1, m)
    better = torch.zeros(groups.shape, dtype=torch.int8)
    for other in groups.unbind(1):
        better += other[:, None] > groups
    return (better < n).view(scores.shape)


def check(mask: Tensor, scores: Tensor, n: int, m: int) -> None:
    """In every group the ``n`` best by a stable sort are marked."""
    order = scores.reshape(-1, m).sort(descending=True, stable=True).indices
    expected = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)
    if not torch.equal(mask, expected.view(scores.shape)):
        raise RuntimeError(f"expected the {n} best of every {m} by a stable sort, got another mask")


def check_peer(mask: Tensor, scores: Tensor, n: int, m: int) -> None:
    """The same where no scores of a group are equal: none left out is better than one marked."""
    marked, scored = mask.reshape(-1, m), scores.reshape(-1, m)
    worst = scored.where(marked, torch.inf).amin(1)
    best = scored.where(~marked, -torch.inf).amax(1)
    if (marked.sum(1) < n).any() or (worst < best).any():
        raise RuntimeError(f"expected the {n} best of every {m}, got another mask")


def row(w: Tensor, g: Tensor, n: int, m: int, seconds: float) -> dict[str, Any]:
    def scores() -> Tensor:
        return (w.float() * g.float()).abs()

    def ours() -> Tensor:
        return ops.nm_mask(w, g, formula="taylor", n=n, m=m)

    timer, clock_name = harness.timer()
    expected = scores()
    timings = harness.measure(
        {
            "ours": Call(ours, lambda bits: check(ops.unpack_mask(bits, w.shape), expected, n, m)),
            "topk": Call(
                lambda: by_topk(scores(), n, m), lambda mask: check_peer(mask, expected, n, m)
            ),
            "ranks": Call(
                lambda: by_ranks(scores(), n, m), lambda mask: check_peer(mask, expected, n, m)
            ),
            "dot": Call(lambda: torch.dot(w.flatten(), g.flatten())),
        },
        seconds,
        timer,
    )
    times = {name: timing.seconds for name, timing in timings.items()}
    return {
        "clock": clock_name,
        "n:m": f"{n}:{m}",
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": f"{w.shape[0]}x{w.shape[1]}",
        **{f"{call} ms": time * 1e3 for call, time in times.items()},
        "GB/s": 2 * w.nbytes / times["ours"] / 1e9,
        "x topk": times["topk"] / times["ours"],
        "x ranks": times["ranks"] / times["ours"],
        "of dot": times["ours"] / times["dot"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 M elements, short timings")
    parser.add_argument("--size", type=int, default=4096, help="rows and, about, columns")
    parser.add_argument("--threads", type=harness.positive, help="default: torch's")
    harness.device_argument(parser)
    harness.output_arguments(parser)
    args = parser.parse_args()
    harness.set_device(parser, args.device)
    size, seconds = (1448, 1.0) if args.quick else (args.size, 8.0)
    if args.threads:
        torch.set_num_threads(args.threads)

    rows: list[dict[str, Any]] = []
    generator = harness.generator(0)
    for dtype in (torch.float32, torch.bfloat16):
        for n, m in PATTERNS if dtype == torch.float32 else ((2, 4), (4, 8)):
            # The peers want groups that fill the rows.
            shape = size, size // m * m
            w, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            rows.append(row(w, g, n, m, seconds))
    harness.print_table(rows)
    harness.save(rows, args)


if __name__ == "__main__":
    main()
