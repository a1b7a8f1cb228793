"""Fused scores against the same in torch's own operations. ``--quick`` takes under a minute.

GB/s counts the inputs read once and the outputs written once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness
from secateur import ops

Run = Callable[[], Tensor | list[Tensor]]


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Sums of size x size blocks."""
    n, k = x.shape
    return x.view(n // size, size, k // size, size).permute(0, 2, 1, 3).sum((2, 3))


def cases(n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, Run, Run, int]]:
    """(name, ours, torch's, bytes)."""
    generator = harness.generator(0)
    w, g = (torch.randn(n, k, generator=generator).to(dtype) for _ in range(2))
    state = torch.rand(n, k, generator=generator)
    total = w.float().abs().sum().item()
    read, out = w.nbytes, 4 * n * k

    def wide(t: Tensor) -> Tensor:
        return t.to(torch.float32)

    def score(formula: str, **more: Any) -> Run:
        return lambda: ops.score(w, g, formula=formula, **more)

    def average() -> Tensor:
        ours.mul_(0.9).addcmul_(wide(g), wide(g), value=0.1)
        return ours * wide(w).square() * 0.5

    ours = state.clone()
    yield "|g*w|", score("taylor"), lambda: (wide(g) * wide(w)).abs(), 2 * read + out
    yield (
        "|g*w| 32x32 sums",
        score("taylor", block=(32, 32), reduce="sum"),
        lambda: in_blocks((wide(g) * wide(w)).abs(), 32),
        2 * read,
    )
    yield (
        "|g*w| row sums",
        score("taylor", block=(1, k), reduce="sum"),
        lambda: (wide(g) * wide(w)).abs().sum(1, keepdim=True),
        2 * read,
    )
    yield (
        "|g*w| column sums",
        score("taylor", block=(n, 1), reduce="sum"),
        lambda: (wide(g) * wide(w)).abs().sum(0, keepdim=True),
        2 * read,
    )
    small_w, small_g = (
        list(torch.randn(128, 128, 128, generator=generator).to(dtype)) for _ in range(2)
    )
    yield (
        "|g*w| of 128 small weights",
        lambda: ops.score_each(small_w, small_g, formula="taylor"),
        lambda: [(wide(a) * wide(b)).abs() for a, b in zip(small_g, small_w, strict=True)],
        sum(2 * t.nbytes + 4 * t.numel() for t in small_w),
    )
    yield (
        "entropy",
        score("entropy", normalizer=total),
        lambda: torch.special.entr(wide(w).abs() / total),
        read + out,
    )
    yield (
        "obd, g^2 averaged",
        lambda: ops.score_update_(state, w, g, formula="obd", decay=0.9, gain=0.1),
        average,
        2 * read + 3 * out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1024 x 2048, short timings")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--threads", type=harness.positive, help="default: torch's")
    harness.device_argument(parser)
    harness.output_arguments(parser)
    args = parser.parse_args()
    harness.set_device(parser, args.device)
    shape, seconds = ((1024, 2048), 1.0) if args.quick else (tuple(args.shape), 4.0)
    if args.threads:
        torch.set_num_threads(args.threads)

    timer, clock_name = harness.timer()

    def check(result: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> None:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-12)

    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, ours, theirs, traffic in cases(*shape, dtype):
            calls = {
                "ours": harness.Call(ours, lambda result, theirs=theirs: check(result, theirs())),
                "torch": harness.Call(theirs),  # the reference itself
            }
            times = harness.measure(calls, seconds, timer)
            our_time, their_time = times["ours"].seconds, times["torch"].seconds
            rows.append(
                {
                    "clock": clock_name,
                    "score": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ours ms": our_time * 1e3,
                    "torch ms": their_time * 1e3,
                    "GB/s": traffic / our_time / 1e9,
                    "x torch": their_time / our_time,
                }
            )
    harness.print_table(rows)
    harness.save(rows, args)


if __name__ == "__main__":
    main()
