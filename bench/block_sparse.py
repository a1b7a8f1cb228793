"""Block-sparse linear against torch's dense one, forward and forward with both gradients.

Cases where dense wins stay in the table. ``--quick`` takes under a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import harness
from secateur import BlockSparse
from secateur.ops import block_sparse_linear

DENSITIES = (0.5, 0.25, 0.1, 0.05)
BLOCKS = (1, 8, 16, 32, 64, 128)
# Relative to the largest magnitude, against float64.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def cases(
    m: int, n: int, k: int, block: int, density: float, dtype: torch.dtype
) -> Iterator[harness.Case]:
    """Forward, and forward with both gradients, of one shape."""
    torch.manual_seed(0)
    mask = torch.rand(-(-n // block), -(-k // block)) < density
    weight = BlockSparse.from_dense((torch.randn(n, k) / k**0.5).to(dtype), block, mask)
    values = weight.values.requires_grad_()
    dense = weight.to_dense().detach().requires_grad_()
    x = torch.randn(m, k).to(dtype).requires_grad_()
    dy = torch.randn(m, n).to(dtype)

    def ours() -> Tensor:
        return block_sparse_linear(x, weight)

    def theirs() -> Tensor:
        return linear(x, dense)

    def no_grad(forward: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return forward()

    def gradients(forward: Callable[[], Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, (x, weight), dy))

    def check() -> None:
        x64, w64, dy64 = x.detach().double(), dense.detach().double(), dy.double()
        dw64 = BlockSparse.from_dense(dy64.t() @ x64, block, mask).values
        wanted = {"y": x64 @ w64.t(), "dx": dy64 @ w64, "dw": dw64}
        for (name, want), got in zip(wanted.items(), gradients(ours, values), strict=True):
            error = (got.detach().double() - want).abs().max().item()
            limit = TOLERANCE[dtype] * want.abs().max().item()
            if not error <= limit:
                raise RuntimeError(f"{name}: expected an error of at most {limit}, got {error}")

    work = 2.0 * m * n * k * weight.density
    shape = {"rows": m, "shape": f"{n}x{k}", "block": block, "density": weight.density}
    yield harness.Case(
        {"pass": "fwd", **shape}, lambda: no_grad(ours), lambda: no_grad(theirs), work, check
    )
    yield harness.Case(
        {"pass": "fwd+bwd", **shape},
        lambda: gradients(ours, values),
        lambda: gradients(theirs, dense),
        3 * work,
        check,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one batch size, short timings")
    parser.add_argument("--rows", type=int, default=512, help="rows of the batch")
    parser.add_argument(
        "--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="may be repeated"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="write the rows here, e.g. under bench/results")
    parser.add_argument("--json", type=Path, help="write environment and rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)

    print(", ".join(f"{name} {value}" for name, value in harness.environment().items()))
    rows = harness.run(
        (
            case
            for n, k in args.shape or ((1024, 1024),)
            for m in ((args.rows,) if args.quick else (8, args.rows, 4 * args.rows))
            for block in BLOCKS
            for density in DENSITIES
            for case in cases(m, n, k, block, density, dtype)
        ),
        seconds=0.4 if args.quick else 1.5,
    )
    if args.csv:
        harness.save_csv(rows, args.csv)
    if args.json:
        harness.save_json(rows, args.json)


if __name__ == "__main__":
    main()
