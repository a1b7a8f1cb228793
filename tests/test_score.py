"""Score formulas against double precision, and the laws of their reductions and averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur import _C, ops
from secateur.ops._spec import FLOATS
from secateur.ops.score import REDUCTIONS, compute_dtype, elements_reference, random_reference

# What one element may differ from the formula in double precision, relative to itself: half an ulp
# for each rounding the formula makes. Entropy rounds p, its logarithm and the product; log(p) is
# steep where p is near 1, so it is held to twice that.
ROUNDINGS = {
    "given": 0,
    "magnitude": 0,
    "gradient": 0,
    "taylor": 1,
    "taylor_squared": 3,
    "hessian_diagonal": 1,
    "obd": 3,
    "entropy": 8,
    "movement": 1,
    "random": 0,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(formula: str, w: Tensor, g: Tensor | None = None, **more: Any) -> Tensor:
    return ops.score(w, g, formula=formula, **more).view(w.shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", ops.FORMULAS)
def test_formula_in_double_precision(formula: str, dtype: torch.dtype, isa: str) -> None:
    w, g = randn(57, 93, dtype=dtype), randn(57, 93, seed=1, dtype=dtype)
    normalizer = w.double().abs().sum().item()
    got = flat(formula, w, g, normalizer=normalizer, seed=9)
    assert got.dtype == compute_dtype(dtype)
    want = elements_reference(w.double(), g.double(), None, formula, normalizer, 9)
    eps = torch.finfo(got.dtype).eps
    assert ((got.double() - want).abs() <= ROUNDINGS[formula] * eps / 2 * want.abs()).all()


@pytest.mark.parametrize("formula", [f for f in ops.FORMULAS if f != "entropy"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_formula_rounds_as_pytorch(formula: str, dtype: torch.dtype, isa: str) -> None:
    w, g = randn(41, 67, dtype=dtype), randn(41, 67, seed=1, dtype=dtype)
    state = randn(41, 67, seed=2).abs().to(compute_dtype(dtype))
    want = elements_reference(w, g, None, formula, 1.0, 5)
    assert torch.equal(flat(formula, w, g, seed=5), want)
    want = elements_reference(w, None, state, formula, 0.7, 0)
    assert torch.equal(ops.score(w, None, state, formula=formula, normalizer=0.7), want)


def mantissa_grid(dtype: torch.dtype) -> Tensor:
    """Arguments of the logarithm: every octave down to the subnormals, and close to 1."""
    info = torch.finfo(dtype)
    octaves = torch.arange(0, math.log2(info.smallest_normal * info.eps), -1, dtype=torch.float64)
    fractions = torch.linspace(0.5, 1, 400, dtype=torch.float64)
    grid = (fractions[:, None] * torch.exp2(octaves)).flatten().to(dtype)
    near_one = 1 - torch.arange(4000, dtype=torch.float64).to(dtype) * info.eps
    return torch.cat([grid, near_one])


def test_logarithm_within_two_ulp(isa: str) -> None:
    p = mantissa_grid(torch.float32)
    p = p[p > 0]
    # -p log(p) through the kernel; the product's rounding is half an ulp of its own, and where the
    # product is subnormal its rounding says nothing of the logarithm.
    got = flat("entropy", p).double()
    want = -p.double() * p.double().log()
    normal = want > torch.finfo(torch.float32).smallest_normal
    ulp = torch.exp2(want.clamp(min=2.0**-126).log2().floor() - 23)
    error = (got - want).abs() / ulp
    assert error[normal].max() < 2.0
    assert error[~normal].max() <= 1.0


def test_logarithm_in_double(isa: str) -> None:
    p = mantissa_grid(torch.float64)
    p = p[p > 0]
    torch.testing.assert_close(flat("entropy", p), torch.special.entr(p), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_entropy_at_its_ends(dtype: torch.dtype, isa: str) -> None:
    w = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype)
    assert flat("entropy", w).tolist() == [0, 0, 0, 0]
    bad = torch.tensor([math.nan, math.inf], dtype=dtype)
    assert not flat("entropy", bad).isfinite().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("formula", [f for f in ops.FORMULAS if f != "random"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_non_finite_inputs_are_not_hidden(value: float, formula: str, reduce: str) -> None:
    w, g = randn(20, 40), randn(20, 40, seed=1)
    w[3, 30] = g[3, 30] = value
    scores = ops.score(w, g, formula=formula, block=(8, 16), reduce=reduce)
    hidden = reduce == "max" and formula in ("movement", "entropy") and value == math.inf
    assert bool(scores[0, 1].isfinite()) is hidden  # -inf is not the maximum of a block
    assert scores.isfinite().sum() == scores.numel() - (not hidden)


# Reductions


def block_by_block(x: Tensor, rows: int, cols: int, reduce: str) -> Tensor:
    """In double precision, one block at a time."""
    reduced: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum,
        "mean": torch.mean,
        "max": torch.max,
        "l2": lambda t: t.square().sum().sqrt(),
    }
    return torch.stack(
        [
            torch.stack([reduced[reduce](b) for b in strip.split(cols, 1)])
            for strip in x.double().split(rows, 0)
        ]
    )


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 64), (32, 32)),
        ((50, 70), (16, 16)),  # edges on both sides
        ((50, 70), (7, 3)),
        ((50, 70), (1, 70)),  # rows
        ((50, 70), (50, 1)),  # columns
        ((50, 70), (50, 70)),
        ((50, 70), (1000, 1000)),  # one block, larger than the matrix
        ((3, 5000), (2, 3000)),
        ((3, 9001), (2, 4500)),  # wider than what is reduced at a time
        ((3, 9001), (2, 32)),  # several tasks a strip
        ((600, 1100), (600, 8)),  # high blocks: fewer columns a task
        ((5000, 3), (100, 2)),
        ((3, 2500), (3, 1)),
        ((5, 7), (1, 1)),
    ],
)
def test_blocks(shape: tuple[int, int], block: tuple[int, int], reduce: str, isa: str) -> None:
    w, g = randn(*shape), randn(*shape, seed=1)
    got = ops.score(w, g, formula="movement", block=block, reduce=reduce)
    want = block_by_block(-w.double() * g.double(), *block, reduce)
    assert got.shape == want.shape
    # Sums of mixed sign: the error is relative to the sum of magnitudes.
    size = block_by_block((w * g).abs(), *block, "mean" if reduce == "mean" else "sum")
    assert ((got - want).abs() <= 2e-6 * size).all()


def test_shapes_are_seen_as_matrices() -> None:
    for shape, matrix in (((), (1, 1)), ((6,), (6, 1)), ((4, 3, 2, 2), (4, 12))):
        w = randn(*shape)
        assert torch.equal(ops.score(w, formula="given"), w.reshape(matrix))
        got = ops.score(w, formula="magnitude", block=(2, 5), reduce="max")
        assert torch.equal(got.double(), block_by_block(w.abs().reshape(matrix), 2, 5, "max"))
    assert ops.score(torch.empty(0, 7), formula="given", block=(2, 2)).shape == (0, 4)
    assert ops.score(torch.empty(7, 0), formula="given", block=(2, 2)).shape == (4, 0)


def test_strided_is_by_logical_index() -> None:
    for w in (randn(40, 60)[:, ::2].t(), randn(8, 6, 3, 3).to(memory_format=torch.channels_last)):
        g = randn(*w.shape, seed=1)
        for block in ((1, 1), (4, 4)):
            for formula in ("taylor", "random"):
                got = ops.score(w, g, formula=formula, block=block)
                assert torch.equal(got, ops.score(w.contiguous(), g, formula=formula, block=block))


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", ops.FORMULAS)
def test_same_bits_on_any_isa_and_threads(formula: str, dtype: torch.dtype) -> None:
    w, g = randn(301, 1103, dtype=dtype), randn(301, 1103, seed=1, dtype=dtype)
    results = []
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            calls = [((1, 1), "mean"), ((32, 32), "sum"), ((1, 1103), "l2"), ((301, 1), "mean")]
            results.append(
                [
                    ops.score(w, g, formula=formula, block=b, reduce=r, normalizer=9.0, seed=-7)
                    for b, r in calls
                ]
            )
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


# Averages


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", [f for f in ops.FORMULAS if f != "random"])
def test_average_in_the_same_pass(formula: str, dtype: torch.dtype, isa: str) -> None:
    w, g = randn(33, 70, dtype=dtype), randn(33, 70, seed=1, dtype=dtype)
    state = randn(33, 70, seed=2).to(compute_dtype(dtype))
    observed = flat("gradient" if formula == "obd" else formula, w, g, normalizer=99.0)
    if formula == "obd":
        observed = observed.square()
    want = state * 0.9 + observed * 0.1
    scored, only = state.clone(), state.clone()
    call = {"formula": formula, "decay": 0.9, "gain": 0.1, "normalizer": 99.0}
    version = scored._version
    scores = ops.score_update_(scored, w, g, block=(8, 8), reduce="sum", **call)
    ops.observe_(only, w, g, **call)
    assert scored._version == only._version == version + 1
    assert torch.equal(scored, want)
    assert torch.equal(only, want)
    again = ops.score(w, None, scored, formula=formula, block=(8, 8), reduce="sum")
    assert torch.equal(scores, again)


def test_average_of_a_strided_state() -> None:
    w = randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    g = randn(8, 6, 3, 3, seed=1)
    state = torch.zeros_like(w)
    ops.observe_(state, w, g, formula="taylor", decay=0.0, gain=1.0)
    assert torch.equal(state, (w * g).abs())
    ops.score_update_(state, w, g, formula="taylor", decay=1.0, gain=1.0, block=(4, 9))
    assert torch.equal(state, (w * g).abs() * 2)


def test_needs_no_gradient_given_a_state() -> None:
    w, state = randn(5, 5), randn(5, 5, seed=1)
    assert torch.equal(ops.score(w, None, state, formula="taylor", normalizer=2.0), state / 2)


def test_weights_that_require_grad() -> None:
    w, g = randn(5, 5).requires_grad_(), randn(5, 5)
    assert not ops.score(w, g, formula="taylor").requires_grad


# Random


def test_random_is_a_function_of_seed_and_index(isa: str) -> None:
    x = ops.score(torch.empty(1000), formula="random", seed=5).flatten()
    assert torch.equal(x, random_reference(torch.arange(1000), 5).float())
    assert torch.equal(x.double(), ops.score(x.double(), formula="random", seed=5).flatten())
    assert torch.equal(x[:10], ops.score(torch.empty(2, 5), formula="random", seed=5).flatten())
    for seed in (0, 6, -5, 5 + 2**32, 2**63 - 1, -(2**63)):
        other = ops.score(x, formula="random", seed=seed).flatten()
        assert (other == x).sum() <= 1
        assert other.unique().numel() > 990


def test_random_is_uniform() -> None:
    n = 1_000_000
    for seed in (0, 1, 12345):
        x = ops.score(torch.empty(n), formula="random", seed=seed).flatten().double()
        assert x.min() >= 0
        assert x.max() < 1
        counts = torch.histc(x, 100, 0, 1)
        chi_square = ((counts - n / 100).square() / (n / 100)).sum()
        assert 50 < chi_square < 160  # 99 degrees of freedom: 99 +- 14
        for lag in (1, 2, 16, 1000):
            assert abs(torch.corrcoef(torch.stack([x[lag:], x[:-lag]]))[0, 1]) < 0.005
    a, b = (ops.score(torch.empty(n), formula="random", seed=s).flatten() for s in (0, 1))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.005


# Many weights


def many() -> list[tuple[Tensor, tuple[int, int]]]:
    """(weight, block): small and large ones, of all dtypes, empty and strided."""
    shapes = ((), (0,), (7,), (3, 0, 4), (5, 13), (33, 40), (6, 5, 3, 3), (2, 2100), (300, 500))
    blocks = ((1, 1), (2, 3), (1, 1 << 12), (1 << 12, 1), (32, 32))
    found = [
        (randn(*shape, seed=i, dtype=FLOATS[i % len(FLOATS)]), blocks[i % len(blocks)])
        for i, shape in enumerate(shapes * 5)
    ]
    found.append((randn(9, 40)[:, ::2].t(), (4, 4)))
    found.append((randn(*[2] * 9).permute(*range(8, -1, -1)), (2, 3)))
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_each_as_if_alone(reduce: str, count: int, isa: str) -> None:
    torch.set_num_threads(count)
    weights, blocks = (list(column) for column in zip(*many(), strict=True))
    n = len(weights)
    grads = [randn(*w.shape, seed=50 + i, dtype=w.dtype) for i, w in enumerate(weights)]
    states = [g.abs().to(compute_dtype(g.dtype)) for g in grads]
    by = {"normalizers": [1.0 + i for i in range(n)], "seeds": list(range(n))}
    lists = {
        "taylor": (grads, None),
        "entropy": (None, None),
        "random": (grads, None),
        "obd": (None, states),
    }
    for formula, (gs, ss) in lists.items():
        got = ops.score_each(weights, gs, ss, formula=formula, blocks=blocks, reduce=reduce, **by)
        assert len(got) == n
        for i, w in enumerate(weights):
            want = ops.score(
                w,
                gs[i] if gs else None,
                ss[i] if ss else None,
                formula=formula,
                block=blocks[i],
                reduce=reduce,
                normalizer=by["normalizers"][i],
                seed=by["seeds"][i],
            )
            assert got[i].dtype == want.dtype
            assert torch.equal(got[i], want), (formula, i)


def test_each_by_default() -> None:
    weights = [randn(3, 4), randn(5, dtype=torch.float64).requires_grad_()]
    for formula in ("magnitude", "entropy", "random"):
        got = ops.score_each(weights, formula=formula)
        for i, (x, w) in enumerate(zip(got, weights, strict=True)):
            assert torch.equal(x, ops.score(w, formula=formula, seed=i))
            assert not x.requires_grad


def test_each_of_none() -> None:
    assert ops.score_each([], formula="magnitude") == []
    assert ops.score_each([], [], [], formula="taylor", blocks=[], normalizers=[], seeds=[]) == []


@pytest.mark.parametrize("block", [(2**63 - 1, 1), (1, 2**63 - 1), (2**63 - 1, 2**63 - 1)])
def test_blocks_of_any_size(block: tuple[int, int]) -> None:
    w, state = randn(4, 6), torch.zeros(4, 6)
    fits = min(block[0], 4), min(block[1], 6)
    want = ops.score(w, formula="magnitude", block=fits)
    assert torch.equal(ops.score(w, formula="magnitude", block=block), want)
    assert torch.equal(ops.score_each([w], formula="magnitude", blocks=[block])[0], want)
    got = ops.score_update_(state, w, formula="magnitude", decay=0.0, gain=1.0, block=block)
    assert torch.equal(got, want)


# Bad input

W = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"formula": "worth"}, ValueError, "given, magnitude, .*got 'worth'"),
        ({"weight": W.int()}, TypeError, "weight to be float32.*int32"),
        ({"formula": "taylor"}, ValueError, "grad for formula 'taylor', got None"),
        ({"grad": W[:, 1:]}, ValueError, r"grad to have the shape.*\(4, 6\).*\(4, 5\)"),
        ({"grad": W.double()}, TypeError, "grad to be torch.float32.*float64"),
        ({"grad": W.to("meta")}, ValueError, "grad on the device.*cpu.*meta"),
        ({"weight": [1.0]}, TypeError, "weight to be a Tensor, got list"),
        ({"grad": [1.0]}, TypeError, "grad to be a Tensor, got list"),
        ({"state": 1.0}, TypeError, "state to be a Tensor, got float"),
        ({"state": W.half()}, TypeError, "state to be torch.float32.*float16"),
        ({"state": W.t()}, ValueError, r"state to have the shape"),
        ({"block": (0, 1)}, ValueError, r"at least 1, got \(0, 1\)"),
        ({"block": (2,)}, ValueError, r"\(rows, columns\).*got \(2,\)"),
        ({"reduce": "median"}, ValueError, "sum, mean, max, l2, got 'median'"),
        ({"normalizer": 0.0}, ValueError, "normalizer to be a positive finite number, got 0.0"),
        ({"normalizer": math.inf}, ValueError, "normalizer.*got inf"),
        ({"normalizer": "1"}, TypeError, "normalizer to be a number, got '1'"),
        ({"block": 2}, TypeError, r"block to be \(rows, columns\), got 2"),
        ({"block": (True, 1)}, TypeError, r"block to be \(rows, columns\)"),
        ({"block": (2**63, 1)}, ValueError, "each at least 1, got"),
        ({"seed": 2**63}, ValueError, "seed to fit in 64 bits"),
        ({"seed": 1.0}, TypeError, "seed to be an int, got 1.0"),
    ],
)
def test_bad_score(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call: dict[str, Any] = {"weight": W, "formula": "magnitude"} | change
    with pytest.raises(error, match=match):
        ops.score(call.pop("weight"), **call)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"formula": "worth"}, ValueError, "given, magnitude, .*got 'worth'"),
        ({"formula": "taylor"}, ValueError, "grads for formula 'taylor', got None"),
        ({"reduce": "median"}, ValueError, "sum, mean, max, l2, got 'median'"),
        ({"weights": W}, TypeError, "weights to be a list of Tensors, got a Tensor"),
        ({"weights": [W, W.int()]}, TypeError, r"weights\[1\] to be float32.*int32"),
        ({"weights": [W, 1.0]}, TypeError, r"weights\[1\] to be a Tensor, got float"),
        ({"weights": [W, W.to("meta")]}, ValueError, r"one device, got cpu and, weights\[1\], m"),
        ({"grads": W}, TypeError, "grads to be a list"),
        ({"grads": [W]}, ValueError, "2 grads, one a weight, got 1"),
        ({"grads": [W, None]}, TypeError, r"grads\[1\] to be a Tensor, got NoneType"),
        ({"grads": [W, W.half()]}, TypeError, r"grads\[1\] to be .*float32 \(weights\[1\] is"),
        ({"grads": [W, W.t()]}, ValueError, r"grads\[1\] to have the shape of weights\[1\]"),
        ({"states": [W]}, ValueError, "2 states, one a weight, got 1"),
        ({"states": [W, W.half()]}, TypeError, r"states\[1\] to be torch.float32.*float16"),
        ({"blocks": [(1, 1)]}, ValueError, "2 blocks, one a weight, got 1"),
        ({"blocks": (1, 1)}, TypeError, r"blocks\[0\] to be \(rows, columns\), got 1"),
        ({"blocks": [(1, 1), (0, 1)]}, ValueError, r"blocks\[1\] .* at least 1, got \(0, 1\)"),
        ({"normalizers": [1.0]}, ValueError, "2 normalizers, one a weight, got 1"),
        ({"normalizers": 1.0}, TypeError, "normalizers to be a list, one a weight, got float"),
        ({"blocks": 3}, TypeError, "blocks to be a list, one a weight, got int"),
        ({"normalizers": [1.0, 0.0]}, ValueError, r"normalizers\[1\] to be a positive.*got 0.0"),
        ({"seeds": [1]}, ValueError, "2 seeds, one a weight, got 1"),
        ({"seeds": [1, 0.5]}, TypeError, r"seeds\[1\] to be an int, got 0.5"),
    ],
)
def test_bad_lists(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call: dict[str, Any] = {"weights": [W, W], "formula": "magnitude"} | change
    with pytest.raises(error, match=match):
        ops.score_each(call.pop("weights"), **call)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"formula": "random"}, "measures weights or gradients, got 'random'"),
        ({"formula": "obd"}, "grad for formula 'obd', got None"),
        ({"state": torch.zeros(3)}, "state to have the shape"),
        ({"state": torch.zeros(6).expand(4, 6)}, r"do not share memory, got strides \(0, 1\)"),
        ({"decay": math.nan}, "finite decay and gain, got nan and 0.1"),
        ({"gain": math.inf}, "finite decay and gain, got 0.9 and inf"),
        ({"normalizer": -1.0}, "normalizer to be a positive"),
    ],
)
def test_bad_average(change: dict[str, Any], match: str) -> None:
    state = torch.ones(4, 6)
    call = {"state": state, "weight": W, "formula": "magnitude", "decay": 0.9, "gain": 0.1}
    for op in (ops.score_update_, ops.observe_):
        with pytest.raises(ValueError, match=match):
            op(**(call | change))
    assert (state == 1).all()


def test_more_dimensions_than_kernels_walk() -> None:
    w = randn(*[2] * 9).permute(*range(8, -1, -1))
    assert torch.equal(
        ops.score(w, w, w, formula="obd"), ops.score(w.contiguous(), w, w, formula="obd")
    )
    state = torch.zeros_like(w.contiguous())
    ops.observe_(state, w, formula="given", decay=0.0, gain=1.0)
    assert torch.equal(state, w)
    scattered = torch.zeros([2] * 9).permute(*range(8, -1, -1))
    for op in (ops.score_update_, ops.observe_):
        with pytest.raises(ValueError, match=r"at most 8 dimensions.*got 9"):
            op(scattered, w, formula="given", decay=0.0, gain=1.0)
