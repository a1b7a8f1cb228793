"""Block-sparse linear against dense torch and every peer that runs.

All blocks and densities at 512 rows and 4096 x 1024, in float32 and bfloat16; other batches, shapes
and a skewed pattern at one density. On a GPU (``--device cuda``) it is 4096 rows and 4096 x 4096.
``--quick`` is one of those shapes and takes under a minute, the whole takes under half an hour;
other options leave out what they do not name. ``--alone`` calls ours and dense again and again,
each on its own, so that caches hold what the last call left there. Cases that lose stay in the
table. bench/README.md says what is measured, and how.
"""

from __future__ import annotations

import argparse
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

from bench import harness
from bench.harness import Call
from secateur import BlockSparse
from secateur.ops import block_sparse_linear

PASSES = ("fwd", "dX", "dW", "fwd+bwd")
BLOCKS = (1, 8, 16, 32, 64, 128)
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
ROWS = (512, 1, 8, 64, 2048)  # of each of these axes the first is where the others are varied
SHAPES = ((4096, 1024), (1024, 4096), (3072, 768), (4096, 4096))
PATTERNS = ("uniform", "zipf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPARSE = 0.1  # the density where a batch, a shape or a pattern is not the first
QUICK = (3072, 768)  # at ROWS[0]
GPU_ROWS = (4096, 1, 16, 128, 1024)
GPU_SHAPES = ((4096, 4096), (4096, 1024), (1024, 4096), (14336, 4096))

# Columns of the table; all but dense run where they can.
PEERS = ("dense", "masked", "bsr", "scipy", "sparselab")
GPU_PEERS = ("dense", "masked", "bsr", "2:4")


@dataclass(frozen=True)
class Problem:
    """One product to measure in all passes."""

    rows: int
    shape: tuple[int, int]
    block: int
    density: float
    pattern: str
    dtype: str


def grid() -> Iterator[Problem]:
    """The cases of the table: one axis is varied at a time."""
    gpu = harness.on_gpu()
    axes = GPU_ROWS if gpu else ROWS, GPU_SHAPES if gpu else SHAPES, PATTERNS
    everywhere = DTYPES if gpu else ("float32",)
    for *first, block, density, dtype in itertools.product(*axes, BLOCKS, DENSITIES, DTYPES):
        rows, shape, pattern = first
        moved = sum(x != axis[0] for x, axis in zip(first, axes, strict=True))
        if moved == 0 or (moved == 1 and density == SPARSE and dtype in everywhere):
            yield Problem(rows, shape, block, density, pattern, dtype)


def live_mask(problem: Problem) -> Tensor:
    """Which blocks live: exactly the density's share of them, at random.

    Rows of blocks hold as many as comes (``uniform``), or one over their rank in a random order,
    times what makes the same sum (``zipf``).
    """
    n, k = (size // problem.block for size in problem.shape)
    live = round(problem.density * n * k)
    if problem.pattern == "uniform":
        return (torch.randperm(n * k) < live).view(n, k)
    shares = 1 / (1 + torch.randperm(n).double())
    low, high = 0.0, float(n * k)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * shares).clamp(max=k).sum() < live else (low, middle)
    exact = (high * shares).clamp(max=k)
    counts = exact.floor()
    counts[(exact - counts).topk(live - int(counts.sum())).indices] += 1
    return torch.rand(n, k).argsort(1).argsort(1) < counts[:, None]


def passes(
    problem: Problem, modules: Mapping[str, ModuleType | None]
) -> Iterator[tuple[str, float, int, dict[str, Call]]]:
    """(pass, useful floating-point operations, bytes, calls by name) of a problem.

    Bytes are the least that a product moves: its operands and its result once, live values and
    their indices only.
    """
    torch.manual_seed(0)
    m, (n, k), dtype = problem.rows, problem.shape, DTYPES[problem.dtype]
    mask = live_mask(problem)
    weight = BlockSparse.from_dense((torch.randn(n, k) / k**0.5).to(dtype), problem.block, mask)
    values = weight.values.requires_grad_()
    pattern = weight.pattern.tensors()
    dense = weight.to_dense().detach().requires_grad_()
    ones = weight.with_values(torch.ones_like(values)).to_dense().detach()
    x = torch.randn(m, k).to(dtype).requires_grad_()
    dy = torch.randn(m, n).to(dtype)
    work = 2.0 * m * values.numel()
    traffic = (m * (n + k) + values.numel()) * x.itemsize + 4 * weight.pattern.col.numel()

    x64, w64, dy64 = x.detach().double(), dense.detach().double(), dy.double()
    want = {"y": x64 @ w64.t(), "dx": dy64 @ w64, "dw": dy64.t() @ x64}
    in_row, in_column = (int(ones.sum(dim, dtype=torch.long).max()) for dim in (1, 0))
    terms = {"y": in_row, "dx": in_column, "dw": m}
    limits = {name: limit(t, dtype) for name, t in terms.items()}

    def call(run: Callable[[], Any], **expected: Tensor) -> Call:
        return Call(run, lambda result: check(result, expected, limits))

    def step(forward: Callable[[], Tensor], parameter: Tensor, dw: Tensor) -> Call:
        def run() -> tuple[Tensor, ...]:
            y = forward()
            return (y, *torch.autograd.grad(y, (x, parameter), dy))

        return call(run, y=want["y"], dx=want["dx"], dw=dw)

    def no_grad(forward: Callable[[], Any], y: Tensor) -> Call:
        def run() -> Any:
            with torch.no_grad():
                return forward()

        return call(run, y=y)

    live_dw = weight.gather(want["dw"])
    forward = {
        "ours": no_grad(lambda: block_sparse_linear(x, weight), want["y"]),
        "dense": no_grad(lambda: linear(x, dense), want["y"]),
    }
    both = {
        "ours": step(lambda: block_sparse_linear(x, weight), values, live_dw),
        "dense": step(lambda: linear(x, dense), dense, want["dw"]),
        "masked": step(lambda: linear(x, dense * ones), dense, want["dw"] * ones),
    }
    if harness.on_gpu():
        forward |= {
            name: peer
            for name, peer in gpu_peers(problem, x.detach(), dense.detach(), no_grad, want["y"])
            if harness.runs(f"{name}, {problem.dtype}", peer)
        }
    elif dtype == torch.float32:  # the others have no bfloat16
        x_t = x.detach().t().contiguous()  # the layout that they want, and not timed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse BSR tensor support is in beta")
            bsr = dense.detach().to_sparse_bsr((problem.block, problem.block))
        forward["bsr"] = no_grad(lambda: bsr @ x_t, want["y"].t())
        if modules["scipy"]:
            blocks = values.detach().numpy(), pattern[1].numpy(), pattern[0].numpy()
            matrix = modules["scipy"].sparse.bsr_matrix(blocks, shape=(n, k))
            batch = x_t.numpy()
            forward["scipy"] = no_grad(lambda: matrix @ batch, want["y"].t())
        if modules["sparselab"] and problem.block == 1:
            layer, live = sparselab_layer(modules["sparselab"], dense.detach())
            padded_dw = torch.zeros(live.shape, dtype=torch.float64)
            padded_dw[live] = live_dw.flatten()
            forward["sparselab"] = no_grad(lambda: layer(x), want["y"])
            both["sparselab"] = step(lambda: layer(x), layer._values, padded_dw)

    x0, dy0, dense0, values0 = x.detach(), dy, dense.detach(), values.detach()
    ops, block = torch.ops.secateur, weight.block
    yield "fwd", work, traffic, forward
    yield (
        "dX",
        work,
        traffic,
        {
            "ours": call(
                lambda: ops.block_sparse_linear_dx(dy0, values0, *pattern, k), dx=want["dx"]
            ),
            "dense": call(lambda: dy0 @ dense0, dx=want["dx"]),
        },
    )
    yield (
        "dW",
        work,
        traffic,
        {
            "ours": call(lambda: ops.block_sparse_linear_dw(dy0, x0, *pattern, *block), dw=live_dw),
            "dense": call(lambda: dy0.t() @ x0, dw=want["dw"]),
        },
    )
    yield "fwd+bwd", 3 * work, 3 * traffic, both


def gpu_peers(
    problem: Problem,
    x: Tensor,
    dense: Tensor,
    no_grad: Callable[[Callable[[], Any], Tensor], Call],
    y: Tensor,
) -> Iterator[tuple[str, Call]]:
    """torch's own sparse products on a GPU; they may raise when they run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse BSR tensor support is in beta")
        bsr = dense.to_sparse_bsr((problem.block, problem.block))
    if dense.dtype == torch.float32:
        x_t = x.t().contiguous()
        yield "bsr", no_grad(lambda: bsr @ x_t, y.t())
    else:
        yield "bsr", no_grad(lambda: linear(x, bsr), y)
    # Two of every four weights, of any values: as much work as half of the blocks.
    if problem.density == 0.5 and dense.dtype == torch.bfloat16:
        half = torch.randn_like(dense) * torch.tensor([1, 0, 1, 0]).repeat(dense.shape[1] // 4)
        half = half.to(dense.dtype)
        expected = x.double() @ half.double().t()
        made: list[Tensor] = []  # when it is first run, since to make it may raise as well

        def run() -> Tensor:
            if not made:
                made.append(torch.sparse.to_sparse_semi_structured(half))
            return linear(x, made[0])

        yield "2:4", no_grad(run, expected)


def sparselab_layer(sparselab: ModuleType, dense: Tensor) -> tuple[Any, Tensor]:
    """Its layer with our weights, and which of its padded slots hold one; block 1, row order."""
    # Transposes are cached by id(), which a new matrix may share with one that is gone.
    sparselab.ops._transpose_cache.clear()
    n, k = dense.shape
    layer = sparselab.SparseLinear(k, n, bias=False, sparsity=0.999)
    layer._csr = sparselab.PaddedCSR.from_dense(dense)
    layer._values = torch.nn.Parameter(torch.as_tensor(layer._csr.values))
    return layer, torch.tensor(layer._csr.col_indices) >= 0


def limit(terms: int, dtype: torch.dtype) -> float:
    """How far from float64 a result may be, in units of its largest element.

    Rounding once to ``dtype``, and a random walk: a sum of ``terms`` in a row rounds to float32 as
    often, each time by up to one unit of a partial sum, and such errors add up like their root.
    That is two to five times what is seen; in float32 a forgotten term is a hundred times more.
    """
    return torch.finfo(dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps


def check(result: Any, expected: Mapping[str, Tensor], limits: Mapping[str, float]) -> float:
    """The largest error, in units of the largest element."""
    results = result if isinstance(result, tuple) else (result,)
    errors = []
    for (name, want), got in zip(expected.items(), results, strict=True):
        error = (torch.as_tensor(got).detach().double() - want).abs().max() / want.abs().max()
        if not error <= limits[name]:
            raise RuntimeError(f"expected {name} within {limits[name]:.3g}, got {error:.3g}")
        errors.append(error.item())
    return max(errors)


def measured(
    problem: Problem,
    modules: Mapping[str, ModuleType | None],
    peaks: Mapping[str, float],
    bandwidth: float,
    seconds: float,
    alone: bool = False,
) -> Iterator[dict[str, Any]]:
    """The rows of a problem, one a pass; cells of peers that do not run it are None."""
    timer, clock_name = harness.timer()
    peak = peaks[problem.dtype]
    for name, work, traffic, calls in passes(problem, modules):
        if alone:
            times = {
                who: harness.measure({who: calls[who]}, seconds, timer)[who]
                for who in ("ours", "dense")
            }
        else:
            times = harness.measure(calls, seconds, timer)
        ours = times["ours"].seconds
        row: dict[str, Any] = {
            "pass": name,
            "dtype": problem.dtype,
            "rows": problem.rows,
            "shape": f"{problem.shape[0]}x{problem.shape[1]}",
            "block": problem.block,
            "density": problem.density,
            "pattern": problem.pattern,
            "clock": clock_name,
            "ours ms": ours * 1e3,
            "GFLOP/s": work / ours / 1e9,
            "of peak": work / ours / peak,
            "GB/s": traffic / ours / 1e9,
            "of read": traffic / ours / bandwidth,
            "best x dense": times["dense"].best / times["ours"].best,
            "calls": times["ours"].calls,
            "error": times["ours"].error,
            "dense error": times["dense"].error,
        }
        for other in peers():
            timing = times.get(other)
            row[f"{other} ms"] = timing and timing.seconds * 1e3
            row[f"x {other}"] = timing and timing.seconds / ours
            row[f"{other} calls"] = timing and timing.calls
        yield row | {"peak GFLOP/s": peak / 1e9, "read GB/s": bandwidth / 1e9}


def peers() -> tuple[str, ...]:
    return GPU_PEERS if harness.on_gpu() else PEERS


def printed(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as it is printed: what loses is marked, calls are the fewest of all."""
    shown = {
        key: harness.text(row[key])
        for key in ("pass", "dtype", "rows", "shape", "block", "density", "pattern")
    }
    measured = ("ours ms", "GFLOP/s", "of peak", "of read", "best x dense")
    shown |= {key: harness.text(row[key]) for key in measured}
    for other in peers():
        factor = row[f"x {other}"]
        shown[f"x {other}"] = harness.text(factor) + (" <" if factor and factor < 1 else "")
    counts = [row["calls"], *(row[f"{other} calls"] for other in peers())]
    return shown | {"calls": str(min(count for count in counts if count))}


def line(cells: Mapping[str, str]) -> str:
    return " ".join(cell.rjust(max(9, len(column))) for column, cell in cells.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one batch, shape and density, float32"
    )
    parser.add_argument(
        "--alone", action="store_true", help="no peers but dense, no turns: warm caches"
    )
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("N", "K"), action="append")
    parser.add_argument("--blocks", type=int, nargs="+", choices=BLOCKS, default=BLOCKS)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--threads", type=harness.positive, default=torch.get_num_threads())
    harness.device_argument(parser)
    harness.output_arguments(parser)
    args = parser.parse_args()
    harness.set_device(parser, args.device)
    quick = (GPU_ROWS[0], GPU_SHAPES[1]) if harness.on_gpu() else (ROWS[0], QUICK)
    every = list(grid())
    problems = [
        p
        for p in every
        if p.rows in (args.rows or [p.rows])
        and p.shape in [tuple(shape) for shape in args.shape or [p.shape]]
        and p.block in args.blocks
        and p.dtype in (args.dtype or DTYPES)
        and (not args.quick or (p.rows, p.shape) == quick)
    ]
    if not problems:
        rows, shapes = ({getattr(p, axis) for p in every} for axis in ("rows", "shape"))
        parser.error(
            f"expected a part of the grid (rows {sorted(rows)}, shapes {sorted(shapes)}), "
            "got nothing of it"
        )
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # sparselab brings an OpenMP of its own

    print(", ".join(f"{name} {value}" for name, value in harness.environment().items()))
    others = () if harness.on_gpu() else ("scipy", "sparselab")
    modules = {name: harness.peer(name) for name in others}
    timer, clock_name = harness.timer()
    dtypes = sorted({problem.dtype for problem in problems})
    peaks = {dtype: harness.peak_flops(DTYPES[dtype], timer) for dtype in dtypes}
    bandwidth = harness.read_bandwidth(timer)
    for dtype, peak in peaks.items():
        print(f"peak, {dtype}: {peak / 1e9:.0f} GFLOP/s")
    print(f"read bandwidth: {bandwidth / 1e9:.0f} GB/s; {clock_name} time; < marks what loses")

    rows: list[dict[str, Any]] = []
    for problem in tqdm(problems, unit="problem", disable=None):
        for row in measured(problem, modules, peaks, bandwidth, 0.3, args.alone):
            shown = printed(row)
            if not rows:
                tqdm.write(line({column: column for column in shown}))
            tqdm.write(line(shown))
            rows.append(row)
    harness.save(rows, args)


if __name__ == "__main__":
    main()
