"""Masking in place against torch: weights, gradients and two moments of a model in one call.

Ours takes bit-packed masks (``ops.mask_``). ``multiply`` is ``torch._foreach_mul_`` by masks of the
tensors' dtype, the fastest that torch offers, with NaN and infinity left as NaN; ``fill`` is
``masked_fill_`` by bool masks, tensor by tensor. GB/s counts every tensor read and written once,
and our masks. What a call masks is whole again before the next one. ``--quick`` takes under a
minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import harness, topk
from bench.harness import Call
from secateur import ops

ROLES = 4  # weight, gradient, two moments
PEERS = ("multiply", "fill")


def row(numel: int, count: int, density: float, dtype: torch.dtype, seconds: float) -> Any:
    whole = [t.to(dtype) for seed in range(ROLES) for t in topk.tensors(numel, count, seed)]
    masks = [torch.rand(t.shape) < density for t in whole[:count]]
    bits = [ops.pack_mask(mask) for mask in masks] * ROLES
    dead = [~mask for mask in masks] * ROLES
    factors = [mask.to(dtype) for mask in masks] * ROLES
    expected = [t.masked_fill(d, 0) for t, d in zip(whole, dead, strict=True)]
    masked = [t.clone() for t in whole]

    def check(result: Any) -> None:
        if not all(torch.equal(a, b) for a, b in zip(masked, expected, strict=True)):
            raise RuntimeError("expected the dead to be zero and the others as they were")

    def call(run: Callable[[], Any]) -> Call:
        return Call(run, check, lambda: torch._foreach_copy_(masked, whole))

    def fill() -> list[Tensor]:
        return [t.masked_fill_(d, 0) for t, d in zip(masked, dead, strict=True)]

    timer, clock_name = harness.timer()
    calls = {
        "ours": call(lambda: ops.mask_(masked, bits)),
        "multiply": call(lambda: torch._foreach_mul_(masked, factors)),
        "fill": call(fill),
    }
    times = {name: t.seconds for name, t in harness.measure(calls, seconds, timer).items()}
    traffic = ROLES * sum(2 * t.nbytes for t in whole[:count]) + sum(b.nbytes for b in bits)
    return {
        "clock": clock_name,
        "dtype": str(dtype).removeprefix("torch."),
        "elements": ROLES * numel,
        "tensors": ROLES * count,
        "density": density,
        **{f"{name} ms": seconds * 1e3 for name, seconds in times.items()},
        "GB/s": traffic / times["ours"] / 1e9,
        **{f"x {name}": times[name] / times["ours"] for name in PEERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 M weights, short timings")
    parser.add_argument("--numel", type=int, default=16_000_000, help="weights in all")
    parser.add_argument("--tensors", type=int, default=50, help="in how many tensors")
    parser.add_argument("--threads", type=harness.positive, help="default: torch's")
    harness.device_argument(parser)
    harness.output_arguments(parser)
    args = parser.parse_args()
    harness.set_device(parser, args.device)
    numel, seconds = (2_000_000, 1.0) if args.quick else (args.numel, 4.0)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [
        row(numel, args.tensors, density, dtype, seconds)
        for dtype in (torch.float32, torch.bfloat16)
        for density in (0.5, 0.1)
    ]
    harness.print_table(rows)
    harness.save(rows, args)


if __name__ == "__main__":
    main()
