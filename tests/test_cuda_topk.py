"""Exact selection on CUDA, emulated: inputs that lead it by every way there is, against the CPU."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulator.build import ROOT, Flavour, library
from cuda_emulator.ops import KERNELS, EmulatedOps
from test_topk import adversarial, randn
from torch import Tensor

from secateur import ops
from secateur.ops._spec import FLOATS
from secateur.ops.mask import pack_mask_reference

SIZE = 40_000  # more than there is room for
INF = math.inf
NAN = math.nan

(KERNEL,) = (path for path in KERNELS if path.parent.name == "topk")


def arguments(
    weights: Sequence[Tensor],
    *,
    formula: str = "given",
    grads: Sequence[Tensor] = (),
    states: Sequence[Tensor] = (),
    alive: Sequence[Tensor] = (),
    keep: int | None = None,
    threshold: float | None = None,
    largest: bool = True,
    finite: bool = True,
) -> tuple[Any, ...]:
    n = len(weights)
    scoring = list(weights), list(grads), list(states), formula, list(alive)
    return *scoring, keep, threshold, largest, finite, [0.5] * n, list(range(n))


def sampled(numel: int) -> Tensor:
    """Which elements of one contiguous tensor sample_kernel looks at."""
    capacity = 4096 + int((25 * numel**2) ** (1 / 3))
    parts = capacity // 8
    part = torch.arange(parts)
    begin, end = part * numel // parts, (part + 1) * numel // parts
    mixed = part  # as mix() in common/score.h does
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        mixed = (mixed ^ mixed >> shift) * factor & 0xFFFFFFFF
    first = (begin + (mixed ^ mixed >> 15) % (end - begin)) // 8 * 8
    looked_at = torch.zeros(numel, dtype=torch.bool)
    looked_at[(first[:, None] + torch.arange(8)).flatten()] = True
    return looked_at


def misleading(unseen: float) -> tuple[Any, ...]:
    """The sample sees scores in 0 to 1, and nothing of those that are ``unseen``."""
    seen = torch.rand(SIZE, generator=torch.Generator().manual_seed(2))
    return arguments([torch.where(sampled(SIZE), seen, unseen)], keep=SIZE // 2)


def many() -> list[Tensor]:
    """More tensors than one launch can tell of, of all layouts."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    weights = [randn(i % 13 * 7, seed=i, dtype=dtypes[i % 3]) for i in range(100)]
    for i in range(0, 100, 10):
        weights[i] = weights[i + 1][1:]  # not aligned
        weights[i + 5] = randn(9, 6, seed=i).t()
    return weights


def cases() -> dict[str, tuple[Any, ...]]:
    found = {
        f"{name}, {keep}": arguments([scores.view(-1, 1000)], keep=keep, finite=False)
        for name, scores in adversarial(SIZE, torch.float32).items()
        for keep in (77, SIZE // 3)
    }
    for dtype in FLOATS:
        scores = adversarial(SIZE, dtype)
        found |= {
            f"{name}, {dtype}": arguments([scores[name]], keep=SIZE // 10)
            for name in ("random", "narrow", "denormal")
        }
    w = [randn(70, 100), randn(30_001, seed=1)]
    g, states = [randn(*t.shape, seed=3) for t in w], [randn(*t.shape, seed=4).abs() for t in w]
    n = sum(t.numel() for t in w)
    living = [randn(*t.shape, seed=5) < 0.5 for t in w]
    few = [randn(*t.shape, seed=6) > 3 for t in w]
    alive, rare = ([pack_mask_reference(m) for m in ms] for ms in (living, few))
    n_living, n_few = (sum(int(m.sum()) for m in ms) for ms in (living, few))
    for formula in ops.FORMULAS:
        found[formula] = arguments(w, grads=g, formula=formula, keep=n // 3, largest=False)
    bad = [w[0].clone(), w[1].clone()]
    bad[0][3, 7], bad[1][-1] = NAN, -INF
    late = [w[0], bad[1]]
    return found | {
        "from states": arguments(w, states=states, formula="obd", keep=n // 5),
        "half alive": arguments(w, grads=g, formula="taylor", alive=alive, keep=n // 5),
        "all that live": arguments(w, alive=alive, keep=n_living),
        "few alive": arguments(w, alive=rare, keep=n_few // 2),
        "too few alive": arguments(w, alive=alive, keep=n_living + 1),
        "all": arguments(w, keep=n),
        "all but one": arguments(w, keep=n - 1),
        "none": arguments(w, keep=0),
        "threshold": arguments(w, threshold=0.5, alive=alive),
        "threshold, smallest": arguments(w, threshold=-0.5, largest=False),
        "infinite threshold": arguments(w, threshold=-INF),
        "NaN": arguments(bad, keep=n // 2),
        "infinite": arguments(late, keep=n // 2),
        "infinite is no error": arguments(late, keep=n // 2, finite=False),
        "NaN, threshold": arguments(bad, threshold=0.0),
        "NaN among the dead": arguments(
            bad, alive=[pack_mask_reference(t.isfinite()) for t in bad], keep=n // 2
        ),
        "many tensors": arguments(many(), formula="magnitude", keep=1000),
        "nothing": arguments([torch.empty(0), torch.empty(3, 0)], keep=0),
        "the interval is too low": misleading(2.0),
        "the interval is too high": misleading(-1.0),
        "the interval is too full": misleading(0.5),
    }


CASES = cases()


@functools.cache
def check(name: str, emulated: EmulatedOps, seed: int) -> None:
    emulated.emulator.set_seed(seed)
    masks, info = emulated.call("select", *CASES[name])
    want, want_info = torch.ops.secateur.select(*CASES[name])
    assert torch.equal(info, want_info)
    alive = int(info[1])
    keep = CASES[name][5]
    if info[0] >= 0 or (keep is not None and keep > alive):
        return  # masks of no use, on any device
    for mask, expected in zip(masks, want, strict=True):
        assert torch.equal(mask, expected)
    if keep is not None:
        sizes = [w.numel() for w in CASES[name][0]]
        kept = [ops.unpack_mask(m, (n,)) for m, n in zip(masks, sizes, strict=True)]
        assert sum(int(k.sum()) for k in kept) == keep


@pytest.mark.parametrize("name", CASES)
def test_selects_as_the_cpu_does(name: str, plain: EmulatedOps) -> None:
    check(name, plain, seed=len(name) % 3)


@pytest.mark.parametrize("name", ["two values, 77", "random, 77", "the interval is too full"])
def test_the_order_of_blocks_does_not_matter(name: str, plain: EmulatedOps) -> None:
    for seed in range(6):
        check(name, plain, seed)


# Ways that samples of the op tests do not take.
@pytest.mark.parametrize(
    "name",
    [
        "the interval is too low",
        "the interval is too high",
        "the interval is too full",
        "equal, 77",
    ],
)
def test_what_nvcc_makes_of_the_ways_back_selects_so_too(name: str, ptx: EmulatedOps) -> None:
    check(name, ptx, seed=1)


# The memory that a selection asks torch for, beside the masks.
WORKSPACE = """
#include <vector>
#include "topk/topk.h"
using namespace secateur::topk;
extern "C" int64_t workspace_bytes(int64_t numel, int64_t tensors, bool wide, bool strided) {
  std::vector<Item> items(tensors);
  for (Item& item : items) {
    secateur::View& weight = item.inputs.weight;
    weight.data = reinterpret_cast<void*>(4096);  // aligned; nobody reads it
    weight.ndim = 1;
    weight.stride[0] = strided ? 2 : 1;
  }
  Problem problem{};
  problem.items = items.data();
  problem.n_items = tensors;
  problem.numel = numel;
  problem.wide = wide;
  return CUDA::workspace_bytes(problem, CUDA::capacity(numel));
}
"""


def test_a_selection_among_a_billion_takes_less_than_64_mb(tmp_path: Path) -> None:
    probe = tmp_path / "workspace.cu"
    probe.write_text(WORKSPACE)
    built = ctypes.CDLL(str(library([KERNEL, probe], flavour=Flavour.PLAIN)))
    built.workspace_bytes.argtypes = ctypes.c_int64, ctypes.c_int64, ctypes.c_bool, ctypes.c_bool
    built.workspace_bytes.restype = ctypes.c_int64
    taken = {}
    for dtype in FLOATS:
        wide = dtype == torch.float64  # scores are as wide as that, or float
        taken[dtype] = built.workspace_bytes(10**9, 1, wide, False)
        # Many tensors, which no vectors can be loaded from: most to tell the kernels of.
        assert taken[dtype] < built.workspace_bytes(10**9, 10_000, wide, True) < 64e6, dtype
    single, double = (round(taken[dtype] / 1e6) for dtype in (torch.float32, torch.float64))
    documented = " ".join((ROOT / "docs" / "cuda.md").read_text("utf-8").split())
    assert f"{single} MB ({double} MB) at n = 1e9" in documented


@pytest.mark.slow_cuda
def test_the_cases_reach_every_line(checked: EmulatedOps) -> None:
    for seed, name in enumerate(CASES):
        check(name, checked, seed % 3)
    w = [randn(60, 50), torch.empty(0), randn(5000, seed=1)]
    for low, high, value in ((None, None, 0.0), (5, 5, NAN), (-(2**30), 2**30, INF)):
        w[2][7] = value
        args = w, [], [], "given", [], low, high, True, [1.0] * 3, [0] * 3
        got, want = checked.call("histogram", *args), torch.ops.secateur.histogram(*args)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)
    lines, reached = checked.emulator.lines(KERNEL)
    assert len(reached) >= 0.99 * len(lines), sorted(lines - reached)
