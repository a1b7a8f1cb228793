"""The counts of bench/roofline.py against what the emulator counts, on small shapes."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bench import roofline
from bench.roofline import Kernel, Machine, Product
from cuda_emulator.build import Counters
from cuda_emulator.ops import EmulatedOps

from secateur import ops
from secateur.ops.block_sparse import Pattern

MULTIPROCESSORS = 3  # of the emulator's device
NAMES = {"fwd": "block_sparse_linear", "dX": "block_sparse_linear_dx"}
NAMES["dW"] = "block_sparse_linear_dw"
SLOW = pytest.mark.slow_cuda


def counted(emulated: EmulatedOps, name: str, *args: Any) -> Counters:
    before = emulated.emulator.counters()
    emulated.call(name, *args)
    after = emulated.emulator.counters()
    return Counters(*(b - a for a, b in zip(before, after, strict=True)))


def total(kernels: Sequence[Kernel], field: str) -> int:
    return sum(getattr(kernel, field) for kernel in kernels if kernel.counted)


class Case:
    """A product with a share of the blocks live, and one block row and column without any."""

    def __init__(
        self, batch: int, shape: tuple[int, int], block: tuple[int, int], density: float
    ) -> None:
        self.batch, self.shape, self.block = batch, shape, block
        rows, cols = (size // width for size, width in zip(shape, block, strict=True))
        generator = torch.Generator().manual_seed(rows * cols)
        mask = torch.rand(rows, cols, generator=generator) < density
        mask[-1] = mask[:, cols // 2] = cols == 1 and rows == 1
        self.live = [row.nonzero().flatten().tolist() for row in mask]
        self.pattern = Pattern.from_mask(mask)

    def kernels(self, which: str, dtype: torch.dtype) -> list[Kernel]:
        product = Product(which, self.batch, self.shape, self.block, self.live, dtype.itemsize)
        return roofline.kernels_of(product, MULTIPROCESSORS)

    def run(self, emulated: EmulatedOps, which: str, dtype: torch.dtype) -> Counters:
        n, k = self.shape
        x, dy = torch.ones(self.batch, k, dtype=dtype), torch.ones(self.batch, n, dtype=dtype)
        values = torch.ones(self.pattern.col.numel(), *self.block, dtype=dtype)
        pattern = self.pattern.tensors()
        if which == "fwd":
            return counted(emulated, NAMES[which], x, values, None, *pattern, n, None)
        if which == "dX":
            return counted(emulated, NAMES[which], dy, values, *pattern, k)
        return counted(emulated, NAMES[which], dy, x, *pattern, *self.block)


# Blocks of any two widths; long lines, which are cut for fwd and dX; a batch that dW splits; more
# tiles than run at once, in two groups, without and with lines that are cut.
TENSOR_CORES = [
    Case(130, (96, 160), (32, 32), 0.6),
    Case(40, (64, 128), (16, 8), 0.5),
    Case(33, (256, 384), (128, 64), 0.5),
    Case(9, (48, 2560), (8, 16), 0.5),
    Case(9, (2560, 48), (16, 8), 0.5),
    Case(1100, (32, 24), (8, 8), 0.7),
    Case(1100, (96, 160), (32, 32), 0.6),
    Case(300, (48, 2560), (8, 16), 0.5),
    Case(300, (2560, 48), (16, 8), 0.5),
]
IDS = [f"{c.batch}-{c.shape[0]}x{c.shape[1]}-{c.block[0]}x{c.block[1]}" for c in TENSOR_CORES]


@pytest.mark.parametrize("which", roofline.PASSES)
@pytest.mark.parametrize("case", TENSOR_CORES, ids=IDS)
def test_products_of_tensor_cores_are_counted(case: Case, which: str, plain: EmulatedOps) -> None:
    kernels = case.kernels(which, torch.bfloat16)
    assert total(kernels, "products") == case.run(plain, which, torch.bfloat16).products > 0


def test_the_cases_cut_lines_split_the_batch_and_queue() -> None:
    launched = {
        (i, which): [kernel.name for kernel in case.kernels(which, torch.bfloat16)]
        for i, case in enumerate(TENSOR_CORES)
        for which in roofline.PASSES
    }
    for which in roofline.PASSES:
        assert launched[0, which] == ["multiply"]
    assert launched[3, "fwd"] == launched[4, "dX"] == launched[5, "dW"] == ["multiply", "add"]
    assert launched[6, "fwd"] == launched[6, "dX"] == ["schedule", "multiply"]
    assert launched[7, "fwd"] == launched[8, "dX"] == ["schedule", "multiply", "add"]


@SLOW
@pytest.mark.parametrize("which", roofline.PASSES)
@pytest.mark.parametrize("case", TENSOR_CORES, ids=IDS)
def test_bytes_of_tensor_cores_are_counted(case: Case, which: str, checked: EmulatedOps) -> None:
    kernels = case.kernels(which, torch.bfloat16)
    got = case.run(checked, which, torch.bfloat16)
    assert total(kernels, "read") + total(kernels, "looked_up") == got.read
    assert total(kernels, "written") == got.written


# Blocks that tensor cores do not take in bfloat16 either: both dtypes go the same way, and what
# they look up in the pattern is alike. Sums are float32 in both.
TILES = [
    Case(136, (96, 144), (24, 24), 0.6),
    Case(20, (48, 1440), (24, 16), 0.4),
    Case(70, (40, 60), (4, 4), 0.3),
    Case(40, (48, 300), (1, 1), 0.3),
]


@SLOW
@pytest.mark.parametrize("which", roofline.PASSES)
@pytest.mark.parametrize("case", TILES, ids=lambda c: f"{c.batch}-{c.block[0]}x{c.block[1]}")
def test_bytes_of_exact_products_are_counted(case: Case, which: str, checked: EmulatedOps) -> None:
    rest = []  # what is looked up
    for dtype in (torch.float32, torch.bfloat16):
        kernels, got = case.kernels(which, dtype), case.run(checked, which, dtype)
        assert total(kernels, "written") == got.written
        assert got.products == 0
        rest.append(got.read - total(kernels, "read"))
    if which != "dW":
        # An element that goes from memory to a function's argument is a struct in bfloat16, and
        # instrumented code does not tell of those: here weights, read by every tile of the batch.
        tile = 32 * (1 if case.batch <= 32 else 2 if case.block[0] <= 4 else 4)
        rest[1] += -(-case.batch // tile) * case.pattern.col.numel() * 2 * math.prod(case.block)
    assert rest[0] == rest[1] > 0
    if which == "dW" and case.block[0] >= 8:
        assert rest[0] == total(kernels, "looked_up")


@SLOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_masks_are_counted(dtype: torch.dtype, checked: EmulatedOps) -> None:
    w = torch.arange(1, 20481).to(dtype).view(8, 2560)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(w.shape, generator=generator) < 0.7
    bits = ops.pack_mask(mask)
    dead = int((~mask).view(-1, 16 // w.itemsize).any(1).sum())
    for kernels, name, *args in (
        (roofline.pack(w.numel()), "pack_mask", mask),
        (roofline.unpack(w.numel()), "unpack_mask", bits, list(w.shape)),
        (roofline.apply(w.numel(), w.itemsize, dead), "mask_", [w.clone()], [bits]),
        (roofline.nm(w.numel(), w.itemsize, 2), *nm_arguments(w)),
    ):
        got = counted(checked, str(name), *args)
        assert (total(kernels, "read"), total(kernels, "written")) == (got.read, got.written), name


def nm_arguments(w: torch.Tensor) -> tuple[Any, ...]:
    return "nm_mask", w, w, None, "taylor", 2, 4, True, 1.0, 0


@SLOW
def test_bytes_of_a_selection_are_counted(checked: EmulatedOps) -> None:
    """Those of its sweep: the rest is the table of tensors, which every thread looks up."""
    w = torch.arange(1.0, 4097.0).view(64, 64)
    got, sweep = {}, {}
    for rows, (inputs, formula) in itertools.product((32, 64), ((1, "magnitude"), (2, "taylor"))):
        grads = [torch.ones(rows, 64)] if inputs == 2 else []
        args = [w[:rows]], grads, [], formula, [], None, 0.5, True, True, [1.0], [0]
        got[rows, inputs] = counted(checked, "select", *args)
        kernels = roofline.select(rows * 64, 4, inputs)
        sweep[rows, inputs] = next(kernel for kernel in kernels if kernel.name == "sweep")
    for rows in (32, 64):
        more = sweep[rows, 2].read - sweep[rows, 1].read
        assert got[rows, 2].read - got[rows, 1].read == more == 4 * rows * 64
    more = sweep[64, 1].written - sweep[32, 1].written
    assert got[64, 1].written - got[32, 1].written == more == 32 * 64 / 8


@SLOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 96), None), ((64, 96), (32, 32)), ((16, 640), (1, 640)), ((64, 96), (64, 1)),
     ((64, 640), (32, 320))],
)  # fmt: skip
def test_bytes_of_scores_are_counted(
    shape: tuple[int, int],
    block: tuple[int, int] | None,
    dtype: torch.dtype,
    checked: EmulatedOps,
) -> None:
    w = torch.ones(shape, dtype=dtype)
    kernels = roofline.score(shape, block, 2 * w.itemsize)
    rows, cols = block or (1, 1)
    got = counted(checked, "score", [w], [w], [], "taylor", [rows], [cols], "sum", [1.0], [0])
    assert (total(kernels, "read"), total(kernels, "written")) == (got.read, got.written)
    assert got.launches == len(kernels)
    if block is None:
        kernels = roofline.score(shape, block, 2 * w.itemsize, state=True)
        state = torch.ones(shape)
        args = state, w, w, "obd", 0.9, 0.1, 1, 1, "sum", 1.0
        got = counted(checked, "score_update_", *args)
        assert (total(kernels, "read"), total(kernels, "written")) == (got.read, got.written)


def test_the_slowest_bound_of_each_kernel_counts() -> None:
    machine = Machine("A", 1, 1e12, 4e12, 100e12, 0.5, 10e12, 0.8)
    for kernel, bound, seconds in (
        (Kernel("a", memory=1e9, read=2e9), "memory", 1e-3),
        (Kernel("b", memory=1e9, read=7e9, written=2e9, repeated=1e9), "L2", 2e-3),
        (Kernel("c", products=10**9), "tensor cores", 10**9 * 4096 / 50e12),
        (Kernel("d", flops=10**12), "fp32", 0.1),
        (Kernel("e"), "launch", roofline.LAUNCH),
    ):
        assert roofline.expected([kernel], machine) == (pytest.approx(seconds), bound)
    both = [Kernel("c", products=10**9), Kernel("d", flops=10**12)]
    assert roofline.expected(both, machine) == (pytest.approx(0.1 + 4096 / 50e3), "fp32")


def test_the_last_multiprocessor_counts() -> None:
    for at_once in (1, 2):
        assert roofline.imbalance([1, 1, 1, 1], 2, at_once) == 1
        assert roofline.imbalance([1, 1, 1], 2, at_once) == pytest.approx(4 / 3)
        assert roofline.imbalance([1], 2, at_once) == 2
    assert roofline.imbalance([1, 1, 2], 2, 1) == pytest.approx(3 / 2)
    assert roofline.imbalance([2, 1, 1], 2, 1) == 1
    # The first has 4 and 1; at 2 the 1 is done and the last one comes; all is done at 6, of 11 / 2.
    assert roofline.imbalance([4, 3, 1, 2, 1], 2, 2) == pytest.approx(12 / 11)


# Of 4096 x 4096 weights and rows at 10 %, as even as chance makes them and by Zipf's law.
@pytest.mark.parametrize("block", [128, 64, 32])
@pytest.mark.parametrize("skewed", [False, True])
def test_a_queue_of_the_longest_first_ends_evenly(block: int, skewed: bool) -> None:
    n = 4096 // block
    if skewed:
        share = 0.1 * n / sum(1 / i for i in range(1, n + 1))
        generator = random.Random(0)
        lengths = [min(n, round(n * share / i)) for i in range(1, n + 1)]
        generator.shuffle(lengths)
    else:
        lengths = list(map(len, roofline.live_blocks((4096, 4096), block, 0.1)))
    at_once = roofline.rings_at_once(block)
    most = max(-(-sum(lengths) * 32 // (132 * at_once)), 1024 // block)
    pieces = [piece for length in lengths for piece in roofline.cut(length, most)]
    passes = roofline.longest_first(pieces)
    assert sorted(itertools.chain(*passes)) == sorted(pieces)
    as_stored = roofline.imbalance(roofline.in_groups(pieces, 32), 132, at_once)
    tiles = itertools.chain(*(roofline.in_groups(each, 32) for each in passes))
    queued = roofline.imbalance(tiles, 132, at_once)
    assert queued < 1.15
    assert as_stored > (1.4 if skewed else queued)


@pytest.mark.parametrize(
    ("block", "intensity"), [(128, 64), (64, 43), (32, 26), (16, 14), (8, 7.5)]
)
def test_intensity_is_that_of_the_design(block: int, intensity: float) -> None:
    """FLOP for each byte that a tile of 128 x b loads: csrc/block_sparse/tensor_cores.cuh."""
    live = roofline.live_blocks((2048, 2048), block, 0.5)
    product = Product("fwd", 4096, (2048, 2048), (block, block), live, 2)
    (read,) = (k.read for k in roofline.kernels_of(product, 132) if k.name == "multiply")
    assert 2 * 4096 * product.weights / read == pytest.approx(intensity, rel=0.02)


def test_a_table_says_that_it_predicts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--gpu H100 --density 0.1 --rows 256 --shape 512 512"
    monkeypatch.setattr(sys, "argv", ["roofline", *options.split()])
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    assert "NOT MEASURED" in lines[0]
    assert "predicted us" in lines[2]
    assert {line.split()[0] for line in lines[3:]} == {"H100"}
