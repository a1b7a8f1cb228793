"""Block-sparse products on tensor cores, run by the emulator: what op samples leave out.

Operands are small whole numbers, of which every sum is exact: all ways in which tensor cores may
add up, all schedules and the reference give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cuda_emulator.build import Accumulation, Arrival
from cuda_emulator.ops import EmulatedOps
from test_ops import CPU, check_close
from torch import Tensor

from secateur.ops import block_sparse
from secateur.ops._spec import OpSpec, Sample
from secateur.ops.block_sparse import Pattern

FORWARD = "block_sparse_linear"
DX = "block_sparse_linear_dx"
DW = "block_sparse_linear_dw"
PRODUCTS = (FORWARD, DX, DW)
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Case:
    """Operands of all products; blocks hold NaN beyond the edges of the matrix."""

    x: Tensor
    values: Tensor
    bias: Tensor
    dy: Tensor
    pattern: Pattern

    @classmethod
    def of(
        cls,
        batch: int,
        shape: tuple[int, int],
        block: tuple[int, int],
        mask: Tensor,
        seed: int = 0,
    ) -> Case:
        """Of a weight of ``shape`` with the blocks of a mask live."""
        generator = torch.Generator().manual_seed(seed)

        def whole(*size: int) -> Tensor:
            return torch.randint(-2, 3, size, generator=generator).to(DTYPES[seed % 2])

        (n, k), (rows, cols), pattern = shape, block, Pattern.from_mask(mask)
        values = whole(pattern.col.numel(), rows, cols)
        values[pattern.row_of == n // rows, n % rows :] = torch.nan
        values[pattern.col == k // cols, :, k % cols :] = torch.nan
        return cls(whole(batch, k), values, whole(n), whole(batch, n), pattern)

    def run(self, ops: EmulatedOps, product: str) -> Tensor:
        result: Tensor = ops.call(product, *self.arguments(product))
        return result

    def arguments(self, product: str) -> tuple[Any, ...]:
        pattern = self.pattern.tensors()
        if product == FORWARD:
            return self.x, self.values, self.bias, *pattern, self.dy.shape[1], "relu"
        if product == DX:
            return self.dy, self.values, *pattern, self.x.shape[1]
        return self.dy, self.x, *pattern, *self.values.shape[1:]

    def check(self, ops: EmulatedOps, *products: str) -> None:
        for product in products or PRODUCTS:
            before = ops.emulator.counters().products
            got = self.run(ops, product)
            assert ops.emulator.counters().products > before, product
            want = getattr(block_sparse, f"{product}_reference")(*self.arguments(product))
            assert torch.equal(got, want), product


def some(rows: int, cols: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density


MODES = list(itertools.product(Accumulation, Arrival))


# Blocks of any two widths; the last ones stick out, and one line of either kind is empty.
@pytest.mark.parametrize(("rows", "cols"), list(itertools.product(WIDTHS, WIDTHS)))
def test_blocks_of_any_two_widths(emulated: EmulatedOps, rows: int, cols: int) -> None:
    seed = WIDTHS.index(rows) * len(WIDTHS) + WIDTHS.index(cols)
    accumulation, arrival = MODES[seed % len(MODES)]
    emulated.emulator.set_seed(seed)
    emulated.emulator.set_accumulation(accumulation)
    emulated.emulator.set_arrival(arrival)
    mask = some(3, 4, 0.6, seed)
    mask[1] = mask[:, 2] = False
    mask[2, 3] = True
    shape = 3 * rows - 5, 4 * cols - 3
    Case.of(37, shape, (rows, cols), mask, seed).check(emulated)


# Products whose lines are rows, and columns.
@pytest.mark.parametrize("product", [FORWARD, DX])
@pytest.mark.parametrize(("width", "inner"), [(8, 16), (16, 8), (64, 32)])
@pytest.mark.parametrize("seed", [0, 1])  # bfloat16 and float16
def test_long_lines_are_cut(
    emulated: EmulatedOps, product: str, width: int, inner: int, seed: int
) -> None:
    strip, densities = 3000, (0.02, 1.0, 0.0, 0.4, 0.1)
    mask = torch.cat([some(1, -(-strip // inner), density) for density in densities])
    shape, block = (len(densities) * width - 3, strip), (width, inner)
    if product == DX:
        mask, shape, block = mask.t(), shape[::-1], block[::-1]
    emulated.emulator.set_seed(width)
    Case.of(9, shape, block, mask, seed).check(emulated, product)


# Few blocks and a large batch, whose parts are added up.
@pytest.mark.parametrize("width", WIDTHS)
def test_the_batch_is_split_for_few_blocks(emulated: EmulatedOps, width: int) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    emulated.emulator.set_seed(width)
    shape = 2 * width - 1, 2 * width
    Case.of(1030, shape, (width, width), mask, WIDTHS.index(width)).check(emulated, DW)


@pytest.mark.parametrize("batch", [1, 16, 127, 128, 129, 1200])
def test_batches_of_any_size(emulated: EmulatedOps, batch: int) -> None:
    Case.of(batch, (30, 40), (16, 16), some(2, 3, 0.7)).check(emulated)


# Rows that begin anywhere: views of a larger matrix, of odd width or not; blocks as well.
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("shape", [(33, 47), (32, 48)])
def test_operands_that_are_not_aligned(
    emulated: EmulatedOps, offset: int, shape: tuple[int, int]
) -> None:
    case = Case.of(20, shape, (16, 16), some(-(-shape[0] // 16), 3, 0.6))

    def moved(t: Tensor) -> Tensor:
        wide = torch.full((len(t), t.shape[1] + 11), torch.nan, dtype=t.dtype)
        wide[:, offset : offset + t.shape[1]] = t
        return wide[:, offset : offset + t.shape[1]]

    flat = torch.cat([case.values.new_zeros(offset), case.values.flatten()])
    values = flat[offset:].view_as(case.values)
    replace(case, x=moved(case.x), dy=moved(case.dy), values=values).check(emulated)


# More tiles than run at once, in two groups of the batch; lines from empty to full, and cut.
@pytest.mark.parametrize("product", [FORWARD, DX])
@pytest.mark.parametrize("seed", [0, 1, 2])  # of schedules; bfloat16 and float16
def test_thread_blocks_take_tiles_from_a_queue(
    emulated: EmulatedOps, product: str, seed: int
) -> None:
    mask = torch.cat([some(1, 200, density, seed) for density in (0.0, 0.01, 1.0, 0.1, 0.03)])
    shape, block = (40, 1600), (8, 8)
    if product == DX:
        mask, shape = mask.t(), shape[::-1]
    emulated.emulator.set_seed(seed)
    before = emulated.emulator.counters().launches
    Case.of(1100, shape, block, mask, seed).check(emulated, product)
    assert emulated.emulator.counters().launches == before + 3  # schedule, multiply, add


def test_infinite_gradients_do_not_leak_beyond_the_edge(emulated: EmulatedOps) -> None:
    case = Case.of(8, (20, 27), (16, 32), torch.tensor([[True], [True]]))
    dy = torch.full_like(case.dy, torch.inf)
    dw = replace(case, dy=dy, x=torch.ones_like(case.x)).run(emulated, DW)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:20, :27] = True
    assert torch.equal(dw.isinf(), inside.view(2, 16, 32))
    assert torch.equal(dw == 0, ~inside.view(2, 16, 32))


# In numbers that round: results must not depend on which thread block or copy comes first.
@pytest.mark.parametrize("product", PRODUCTS)
def test_schedules_do_not_change_a_bit(emulated: EmulatedOps, product: str) -> None:
    mask = torch.cat([some(1, 200, density) for density in (1.0, 0.1, 0.7)])
    case = Case.of(520 if product == DW else 9, (24, 1600), (8, 8), mask)
    if product == DX:
        case = Case.of(9, (1600, 24), (8, 8), mask.t())
    if product == DW:
        case = Case.of(1100, (24, 40), (8, 8), mask[:, :5])
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in (case.x, case.dy))
    case = replace(case, x=x, dy=dy)
    results = []
    for seed, arrival in ((0, Arrival.LATE), (1, Arrival.EAGER), (2, Arrival.LATE)):
        emulated.emulator.set_seed(seed)
        emulated.emulator.set_arrival(arrival)
        results.append(case.run(emulated, product))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_products_are_as_many_as_the_tiles_need(emulated: EmulatedOps) -> None:
    # 2 tiles of the batch; block rows with 2, 1, 0 and 3 blocks of 32 x 16.
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    case = Case.of(150, (128, 48), (32, 16), mask)
    for product, expected in (
        # Steps of 32 along 32, 16, 0 and 48 features; a step of a tile is 8 x 4 x 2 products.
        (FORWARD, 2 * (1 + 1 + 0 + 2) * 8 * 4 * 2),
        # Along 64, 64 and 64 features, for lines of 16.
        (DX, 2 * (2 + 2 + 2) * 8 * 2 * 2),
        # Up to 8 blocks of a row at once, along 5 steps of 32 rows.
        (DW, 3 * 5 * 8 * 4 * 2),
    ):
        before = emulated.emulator.counters().products
        case.run(emulated, product)
        assert emulated.emulator.counters().products - before == expected, product


def has_tiles(sample: Sample) -> bool:
    blocks = (a.shape[1:] for a in sample.args if isinstance(a, Tensor) and a.dim() == 3)
    return set(next(blocks, sample.args[-2:])) <= set(WIDTHS)


# In numbers that round: what tensor cores may make of them is as close as the table of tests says.
@pytest.mark.slow_cuda
@pytest.mark.parametrize("accumulation", [Accumulation.SEQUENTIAL, Accumulation.TRUNCATING])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", block_sparse.SPECS, ids=lambda spec: spec.name)
def test_samples_in_other_ways_to_add_up(
    plain: EmulatedOps, spec: OpSpec, dtype: torch.dtype, accumulation: Accumulation
) -> None:
    plain.emulator.set_accumulation(accumulation)
    plain.emulator.set_arrival(Arrival.EAGER)
    samples = list(filter(has_tiles, spec.samples(dtype, CPU)))
    assert len(samples) > 10
    for seed, sample in enumerate(samples):
        plain.emulator.set_seed(seed % 4)
        got, want = plain.call(spec.name, *sample.args), spec.reference(*sample.args)
        check_close(got, want, spec.exact, sample.name)
