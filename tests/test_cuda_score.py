"""The CUDA score kernels have the bits of the CPU's, on every path through tiles and passes."""

from __future__ import annotations

import itertools
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
        args = (w, g, s if mode == "state" else None, formula, *block, reduce, 50.0, 7)
        expected = torch.ops.secateur.score(*args)
        actual = emulated.call("score", *args)
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
            args = (w, None, None, "given", *block, "max", 1.0, 0)
            expected = ops.score(w, formula="given", block=block, reduce="max")
            actual = emulated.call("score", *args)
            assert expected.isnan().sum() == 1
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
