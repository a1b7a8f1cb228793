"""The CUDA score kernels have the bits of the CPU's, on every path through tiles and passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuda_emulator.ops import EmulatedOps
from torch import Tensor

from secateur import ops
from secateur.ops._spec import FLOATS
from secateur.ops.score import FORMULAS, REDUCTIONS, compute_dtype

MODES = ("observe", "state", "update")

# (shape, block); a tile has 4096 elements of 16 bits, 2048 of 32, 1024 of 64.
BLOCKS = {
    "blocks side by side in strips, cut off": ((70, 40), (8, 8)),
    "blocks of a row": ((19, 24), (1, 8)),
    "three quarters of a wider tile": ((9, 200), (4, 100)),
    "not by vectors": ((33, 37), (5, 9)),
    "tile under tile": ((200, 40), (200, 8)),
    "columns": ((130, 33), (130, 1)),
    "tall columns": ((600, 16), (600, 1)),
    "a column": ((300,), (300, 1)),
    "rows": ((9, 1304), (1, 1304)),
    "rows not by vectors": ((3, 1301), (1, 1301)),
    "several blocks of a row": ((10, 608), (1, 304)),
    "two passes: wide": ((7, 616), (4, 308)),
    "two passes: large": ((140, 128), (140, 128)),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, gradient and state."""
    generator = torch.Generator().manual_seed(0)
    w, g, s = (torch.randn(shape, generator=generator) for _ in range(3))
    return w.to(dtype), g.to(dtype), s.abs().to(compute_dtype(dtype))


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    bits = torch.int64 if expected.dtype == torch.float64 else torch.int32
    return actual.dtype == expected.dtype and torch.equal(actual.view(bits), expected.view(bits))


def check(
    emulated: EmulatedOps,
    mode: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    formula: str,
    block: tuple[int, int],
    reduce: str,
) -> None:
    w, g, s = inputs
    case = f"{mode} {formula} {tuple(w.shape)} {w.dtype} {block} {reduce}"
    if mode == "update":
        theirs = s.clone()
        args: tuple[Any, ...] = (w, g, formula, 0.9, 0.1, *block, reduce, 50.0)
        expected = torch.ops.secateur.score_update_(theirs, *args)
        actual = emulated.call("score_update_", s, *args)
        assert same_bits(s.contiguous(), theirs.contiguous()), case
    else:
        states, blocks = [s] if mode == "state" else [], ([block[0]], [block[1]])
        args = ([w], [g], states, formula, *blocks, reduce, [50.0], [7])
        (expected,) = torch.ops.secateur.score(*args)
        (actual,) = emulated.call("score", *args)
    assert same_bits(actual, expected), case


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
def test_every_formula_and_reduction(mode: str, dtype: torch.dtype, emulated: EmulatedOps) -> None:
    layouts = (((20, 16), (8, 8)), ((9, 11), (4, 3)), ((2, 264), (1, 264)))
    for formula, reduce, (shape, block) in itertools.product(FORMULAS, REDUCTIONS, layouts):
        if (mode, formula) != ("update", "random"):
            check(emulated, mode, draw(shape, dtype), formula, block, reduce)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_way_through_tiles(name: str, emulated: EmulatedOps) -> None:
    shape, block = BLOCKS[name]
    for seed, (dtype, mode) in enumerate(itertools.product(FLOATS, MODES)):
        emulated.emulator.set_seed(seed % 3)
        check(emulated, mode, draw(shape, dtype), "obd", block, REDUCTIONS[seed % 4])


@pytest.mark.parametrize("block", [(1, 1), (4, 8), (1, 304), (20, 304)])
def test_every_layout(block: tuple[int, int], emulated: EmulatedOps) -> None:
    shape = (20, 304)

    def moved(t: Tensor) -> Tensor:  # begins off the boundary of a vector
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(shape)

    def turned(t: Tensor) -> Tensor:
        return t.t().contiguous().t()

    for changes in itertools.product((moved, turned, None), repeat=2):
        for dtype in (torch.float32, torch.bfloat16):
            w, g, s = draw(shape, dtype)
            other, of_state = changes
            inputs = (w, other(g) if other else g, of_state(s) if of_state else s)
            check(emulated, "update", inputs, "taylor", block, "sum")


def test_a_nan_wins_on_the_way_down_and_across(emulated: EmulatedOps) -> None:
    for row, col in ((0, 0), (7, 3), (19, 30)):
        w = torch.randn(20, 31)
        w[row, col] = float("nan")
        for block in ((20, 31), (1, 31), (20, 1)):
            blocks = [block[0]], [block[1]]
            expected = ops.score(w, formula="given", block=block, reduce="max")
            (actual,) = emulated.call("score", [w], [], [], "given", *blocks, "max", [1.0], [0])
            assert expected.isnan().sum() == 1
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Many tensors

MANY = [
    *((shape, block) for shape, block in BLOCKS.values()),
    ((0,), (1, 1)),
    ((3, 0), (2, 2)),
    ((), (1, 1)),
    ((17, 5), (1, 1)),
    ((64, 72), (1, 1)),
]


def scored(
    emulated: EmulatedOps,
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    blocks: Sequence[tuple[int, int]],
    mode: str = "observe",
    reduce: str = "sum",
) -> int:
    """How many launches they took, the bits being those that the CPU has for each alone."""
    weights, grads, states = (list(column) for column in zip(*inputs, strict=True))
    rows, cols = (list(sizes) for sizes in zip(*blocks, strict=True))
    normalizers, seeds = [1.0 + i for i in range(len(rows))], list(range(len(rows)))
    if mode == "observe":
        formula, states = "taylor", []
    else:
        formula, grads = "obd", []
    before = emulated.emulator.counters().launches
    actual = emulated.call(
        "score", weights, grads, states, formula, rows, cols, reduce, normalizers, seeds
    )
    assert len(actual) == len(weights)
    for i, (w, block) in enumerate(zip(weights, blocks, strict=True)):
        expected = ops.score(
            w,
            grads[i] if grads else None,
            states[i] if states else None,
            formula=formula,
            block=block,
            reduce=reduce,
            normalizer=normalizers[i],
            seed=seeds[i],
        )
        assert same_bits(actual[i], expected), f"{i} {mode} {tuple(w.shape)} {w.dtype} {block}"
    return emulated.emulator.counters().launches - before


@pytest.mark.parametrize("mode", ["observe", "state"])
def test_many_tensors_of_any_shape_dtype_and_layout(mode: str, emulated: EmulatedOps) -> None:
    blocks = [block for _, block in MANY] * len(FLOATS)
    shapes = [shape for shape, _ in MANY] * len(FLOATS)
    for seed, reduce in enumerate(REDUCTIONS):
        emulated.emulator.set_seed(seed % 3)
        inputs = [draw(shape, FLOATS[i // len(MANY)]) for i, shape in enumerate(shapes)]
        for i in range(seed, len(inputs), 4):
            w, g, s = inputs[i]
            if w.dim() == 2:
                inputs[i] = (w.t().contiguous().t(), g, s)
        # By kernel, dtype and pass, and at most seven strided ones together.
        assert scored(emulated, inputs, blocks, mode, reduce) < len(inputs) * 3 // 4


def test_tensors_of_one_kernel_share_launches(emulated: EmulatedOps) -> None:
    for block, passes in (((1, 1), 1), ((4, 8), 1), ((1, 304), 1), ((2, 304), 2)):
        inputs = [draw((4 + i % 3, 304), torch.bfloat16) for i in range(28)]
        assert scored(emulated, inputs, [block] * 28) == passes
        assert scored(emulated, inputs * 2, [block] * 56) == 2 * passes
        inputs = [(w[:, 1:], g[:, 1:], s) for w, g, s in inputs[:7]]
        assert scored(emulated, inputs, [block] * 7) == passes


def test_of_nothing_nothing_is_launched(emulated: EmulatedOps) -> None:
    assert (
        scored(emulated, [draw((0,), torch.float32), draw((2, 0), torch.half)], [(2, 2)] * 2) == 0
    )
