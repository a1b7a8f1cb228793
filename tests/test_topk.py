"""Exact selection: its laws, against a stable sort, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur import _C, ops
from secateur.ops._spec import FLOATS
from secateur.ops.score import elements_reference
from secateur.ops.topk import NonFiniteScoreError, select_reference

MEDIUM = 300_000  # enough for a sample, an interval and candidates
LARGE = 2_000_000
INF = math.inf
NAN = math.nan


def by_sort(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    flat = torch.cat([s.flatten() for s in scores])
    chosen = torch.zeros(flat.shape, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[:keep]] = True
    parts = chosen.split([s.numel() for s in scores])
    return [m.view(s.shape) for m, s in zip(parts, scores, strict=True)]


def assert_same(masks: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(masks) == len(expected)
    for mask, want in zip(masks, expected, strict=True):
        assert mask.dtype == want.dtype
        assert torch.equal(mask, want)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keep", [0, 1, 77, 500, 999, 1000])
def test_keeps_exactly(keep: int, dtype: torch.dtype, isa: str) -> None:
    scores = [randn(100, dtype=dtype), randn(30, 30, seed=1, dtype=dtype)]
    masks = ops.topk_mask(scores, keep)
    assert [m.shape for m in masks] == [s.shape for s in scores]
    assert sum(int(m.sum()) for m in masks) == keep
    assert_same(masks, by_sort(scores, keep))


def test_ties_go_to_the_earlier_tensor_then_the_lower_index(isa: str) -> None:
    a, b, c = torch.tensor([1.0, 2, 1]), torch.tensor([[1.0, 3], [1, 1]]), torch.ones(3)
    for keep in range(11):
        masks = ops.topk_mask([a, b, c], keep)
        order = [(1, 1), (0, 1), (0, 0), (0, 2), (1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)]
        want = [torch.zeros(t.numel(), dtype=torch.bool) for t in (a, b, c)]
        for tensor, index in order[:keep]:
            want[tensor][index] = True
        assert_same([m.flatten() for m in masks], want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_equals_zero(dtype: torch.dtype, isa: str) -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, -1.0, 1.0], dtype=dtype)
    assert ops.topk_mask([scores], 3)[0].tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [True, False])
def test_no_interval_parts_the_zeros(largest: bool, dtype: torch.dtype, isa: str) -> None:
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([-1.0, -tiny, -0.0, 0.0, tiny, 1.0], dtype=dtype)
    scores = values[torch.randint(0, 6, (MEDIUM,), generator=torch.Generator().manual_seed(0))]
    ordered = scores if largest else -scores
    for keep in range(0, MEDIUM, MEDIUM // 30):
        masks = ops.select([scores], formula="given", keep=keep, largest=largest)
        assert_same(unpacked(masks, [scores]), by_sort([ordered], keep))
    for threshold in values.tolist():
        masks = ops.select([scores], formula="given", threshold=threshold, largest=largest)
        want = scores >= threshold if largest else scores <= threshold
        assert_same(unpacked(masks, [scores]), [want])


def test_denormals_count_where_they_are_flushed(isa: str) -> None:
    """By torch.set_flush_denormal, which reaches the threads that are made after it only."""
    w = [(randn(LARGE, seed=1).abs() * 1e-19), randn(MEDIUM, seed=2) * 1e-19]
    g = [torch.full_like(t, 1e-20) for t in w]
    given = [(randn(MEDIUM).abs() * 1e5).int().view(torch.float32)]  # denormals

    def results() -> list[Tensor]:
        masks = [
            *ops.select(w, g, formula="taylor", keep=LARGE // 3),
            *ops.select(given, formula="given", threshold=5e-40),
            ops.nm_mask(given[0], n=2, m=4, formula="given"),
            ops.nm_mask(w[0], g[0], n=2, m=4, formula="taylor"),
        ]
        scores = (ops.score(a, b, formula="taylor") for a, b in zip(w, g, strict=True))
        return [*masks, *ops.topk_mask(given, 1000), *scores]

    torch.set_num_threads(2)
    want = results()
    assert torch.set_flush_denormal(True)  # x86-64 and aarch64 can
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(results(), want)
        assert torch.tensor([1e-40]).mul(1.0).item() == 0.0  # still flushed
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_are_ordered(dtype: torch.dtype, isa: str) -> None:
    scores = torch.tensor([-INF, 1.0, INF, -3.0, INF, -INF], dtype=dtype)
    assert ops.topk_mask([scores], 2)[0].tolist() == [False, False, True, False, True, False]
    assert ops.topk_mask([scores], 5)[0].tolist() == [True, True, True, True, True, False]


@pytest.mark.parametrize("value", [NAN, -NAN])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keep", [0, 5, 100])
def test_nan_is_named(keep: int, dtype: torch.dtype, value: float, isa: str) -> None:
    scores = [randn(40, seed=i, dtype=dtype) for i in range(5)]
    scores[3][17] = math.copysign(value, value)
    scores[4][1] = value
    with pytest.raises(NonFiniteScoreError, match=r"scores\[3\]") as error:
        ops.topk_mask(scores, keep)
    assert error.value.index == 3


@pytest.mark.parametrize("size", [1000, MEDIUM])
def test_masks_are_nested(size: int) -> None:
    scores = [(randn(size) * 100).round()]  # many ties
    before = torch.zeros(size, dtype=torch.bool)
    for keep in (0, 1, size // 100, size // 3, size // 2, size - 1, size):
        (mask,) = ops.topk_mask(scores, keep)
        assert int(mask.sum()) == keep
        assert not (before & ~mask).any()
        before = mask


def test_permutation_equivariance_without_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randperm(70_000, generator=generator).float()
    order = torch.randperm(70_000, generator=generator)
    (mask,) = ops.topk_mask([scores], 12_345)
    (permuted,) = ops.topk_mask([scores[order]], 12_345)
    assert torch.equal(mask[order], permuted)


def adversarial(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    x = randn(n, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    steps = torch.randint(0, 252, (n,), generator=torch.Generator().manual_seed(1))
    rows = torch.logspace(-4, 4, n // 1000, dtype=torch.float64)[:, None]
    cases = {
        "random": x,
        "equal": torch.ones(n),
        "two values": (x > 0.3).double(),
        "narrow": 1 + steps * step,
        "sorted": x.sort().values,
        "sorted down": x.sort(descending=True).values,
        "denormal": steps * torch.finfo(dtype).smallest_normal * step,
        "rows of different scale": (x.view(-1, 1000).abs() * rows).flatten(),
        "neighbours alike": x[: -(-n // 64)].repeat_interleave(64)[:n],  # misleads a sample
        "a spike": torch.where(torch.arange(n) // 5000 == 7, x.abs() + 10, x.abs().clamp(max=9)),
        "mostly infinite": torch.where(x > -1, torch.tensor(INF), x),
    }
    return {name: t.to(dtype) for name, t in cases.items()}


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        *((name, torch.float32, MEDIUM) for name in adversarial(1000, torch.float32)),
        *((name, torch.float64, MEDIUM) for name in adversarial(1000, torch.float64)),
        ("random", torch.float32, LARGE),
        ("random", torch.bfloat16, MEDIUM),
    ],
)
def test_large_on_any_isa_and_threads(name: str, dtype: torch.dtype, size: int) -> None:
    scores = adversarial(size, dtype)[name].split([1, 100_000, size - 100_001])
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    for keep in (1, size // 10, size // 2, size - 1):
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[order[:keep]] = True
        want = chosen.split([s.numel() for s in scores])
        for isa in _C.supported_isas():
            _C.set_isa(isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert_same(ops.topk_mask(scores, keep), want)


def test_closer_than_float32_resolves() -> None:
    scores = 1 + torch.arange(1000, dtype=torch.float64).flip(0) * 2.0**-52
    assert ops.topk_mask([scores], 10)[0].nonzero().flatten().tolist() == list(range(10))


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, 5e-324, 1e-45, -1e-40, 65504.0]),
    st.floats(allow_nan=False),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(values, max_size=70), max_size=4), st.sampled_from(FLOATS), st.data())
def test_equals_a_stable_sort(
    lists: list[list[float]], dtype: torch.dtype, data: st.DataObject
) -> None:
    scores = [torch.tensor(x, dtype=torch.float64).to(dtype) for x in lists]
    keep = data.draw(st.integers(0, sum(s.numel() for s in scores)))
    masks = ops.topk_mask(scores, keep)
    assert_same(masks, by_sort(scores, keep) if scores else [])


def test_strided_by_logical_index() -> None:
    conv = randn(8, 6, 3, 3).round().to(memory_format=torch.channels_last)
    matrix = randn(40, 50, seed=1).round()[:, ::2].t()
    number = torch.tensor(0.0)
    scores = [conv, matrix, number, torch.zeros(7).expand(3, 7)]
    for keep in (1, 100, 700, 1440):
        assert_same(ops.topk_mask(scores, keep), by_sort(scores, keep))


def test_empty() -> None:
    assert ops.topk_mask([], 0) == []
    assert_same(ops.topk_mask([torch.empty(0, 3)], 0), [torch.empty(0, 3, dtype=torch.bool)])
    masks = ops.topk_mask([torch.empty(0), torch.tensor([1.0, 2]), torch.empty(2, 0)], 1)
    assert [m.tolist() for m in masks] == [[], [False, True], [[], []]]


ONE = torch.ones(4)


@pytest.mark.parametrize(
    ("scores", "keep", "error", "match"),
    [
        ([ONE], 5, ValueError, "between 0 and 4.*got 5"),
        ([ONE], -1, ValueError, "between 0 and 4.*got -1"),
        ([], 1, ValueError, "between 0 and 0.*got 1"),
        ([ONE], True, TypeError, "int, got True"),
        ([ONE], 2.0, TypeError, "int, got 2.0"),
        ([ONE], None, TypeError, "int, got None"),
        ([ONE, ONE.double()], 1, TypeError, r"one dtype.*float32.*scores\[1\].*float64"),
        (ONE, 1, TypeError, "list of Tensors, got a Tensor"),
        ([1.0], 1, TypeError, r"scores\[0\] to be a Tensor, got float"),
        ([None], 1, TypeError, r"scores\[0\] to be a Tensor, got NoneType"),
        (None, 1, TypeError, "list of Tensors, got NoneType"),
        ([ONE.int()], 1, TypeError, r"scores\[0\] to be float32.*got torch.int32"),
        ([ONE, ONE.to("meta")], 1, ValueError, r"one device.*cpu.*scores\[1\].*meta"),
    ],
)
def test_bad_topk_mask(scores: list[Tensor], keep: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.topk_mask(scores, keep)


# select


def lists(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    shapes = ((1000,), (60, 50), (4, 6, 3, 3), (0,))
    w = [randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    g = [randn(*s, seed=i + 10, dtype=dtype) for i, s in enumerate(shapes)]
    w[2] = w[2].to(memory_format=torch.channels_last)
    return w, g


def unpacked(masks: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [ops.unpack_mask(m, w.shape) for m, w in zip(masks, weights, strict=True)]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formula", ops.FORMULAS)
def test_select_agrees_with_score(
    formula: str, dtype: torch.dtype, largest: bool, isa: str
) -> None:
    w, g = lists(dtype)
    call = {"normalizers": [50.0] * 4, "seeds": [3, 1, 4, 1]}
    alive = [randn(*t.shape, seed=5) < 0.8 for t in w]
    bits = [ops.pack_mask(a) for a in alive]
    scores = [
        ops.score(a, b, formula=formula, normalizer=50.0, seed=seed).view(a.shape)
        for a, b, seed in zip(w, g, call["seeds"], strict=True)
    ]
    ordered = scores if largest else [-s for s in scores]
    for keep in (0, 10, 1500):
        dead_last = [s.masked_fill(~a, -INF) for s, a in zip(ordered, alive, strict=True)]
        masks = ops.select(w, g, formula=formula, alive=bits, keep=keep, largest=largest, **call)
        assert_same(unpacked(masks, w), by_sort(dead_last, keep))
    threshold = scores[0].median().item()
    masks = ops.select(w, g, formula=formula, threshold=threshold, largest=largest, **call)
    assert_same(unpacked(masks, w), [s >= threshold if largest else s <= threshold for s in scores])


def test_select_from_states() -> None:
    w, _ = lists()
    states = [randn(*t.shape, seed=20).abs() for t in w]
    masks = ops.select(w, None, states, formula="obd", keep=700, normalizers=[0.7] * 4)
    scores = [elements_reference(a, None, s, "obd", 0.7, 0) for a, s in zip(w, states, strict=True)]
    assert_same(unpacked(masks, w), by_sort(scores, 700))


def test_select_mixes_16_and_32_bit_weights() -> None:
    w = [randn(100), randn(100, seed=1, dtype=torch.bfloat16), randn(9, seed=2).half()]
    masks = ops.select(w, formula="magnitude", keep=50)
    assert_same(unpacked(masks, w), by_sort([t.float().abs() for t in w], 50))


def test_threshold_is_rounded_to_the_compute_dtype() -> None:
    for dtype, exact in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        weight = torch.tensor([0.1], dtype=torch.float64).to(dtype)
        for largest in (True, False):
            (mask,) = ops.select([weight], formula="given", threshold=0.1, largest=largest)
            bfloat16_is_larger = weight.double().item() > 0.1
            assert bool(mask.item()) is (exact or bfloat16_is_larger == largest)


def test_select_large_by_reference(isa: str) -> None:
    w, g = [randn(MEDIUM), randn(99_999, seed=1)], [randn(MEDIUM, seed=2), randn(99_999, seed=3)]
    alive = [ops.pack_mask(randn(t.numel(), seed=4) < 0) for t in w]
    n = 2
    for keep in (5, 20_000, 100_000):
        masks = ops.select(w, g, formula="taylor", alive=alive, keep=keep)
        want, _ = select_reference(
            w, g, [], "taylor", alive, keep, None, True, True, [1.0] * n, [0] * n
        )
        assert_same(masks, want)


def test_scores_of_the_dead_do_not_matter() -> None:
    w, g = torch.tensor([1.0, NAN, 3.0, 4.0]), torch.tensor([1.0, 1.0, INF, 1.0])
    alive = ops.pack_mask(torch.tensor([True, False, False, True]))
    (mask,) = ops.select([w], [g], formula="taylor", alive=[alive], keep=1)
    assert mask.item() == 0b1000
    (mask,) = ops.select([w], [g], formula="taylor", alive=[alive], threshold=0.0)
    assert mask.item() == 0b1001


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("call", [{"keep": 2}, {"keep": 0}, {"threshold": 0.5}])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_scores_are_named(
    dtype: torch.dtype, call: dict[str, Any], value: float, isa: str
) -> None:
    w, g = lists(dtype)
    g[1][30, 7] = value
    w[2][1, 1, 1, 1] = value
    with pytest.raises(NonFiniteScoreError, match=r"finite taylor.*weights\[1\]") as error:
        ops.select(w, g, formula="taylor", **call)
    assert error.value.index == 1


def test_overflowing_scores_are_named() -> None:
    with pytest.raises(NonFiniteScoreError):
        ops.select([torch.tensor([1e30])], [torch.tensor([1e30])], formula="taylor", keep=1)


def test_more_dimensions_than_kernels_walk() -> None:
    nine = randn(*[2] * 9).permute(*range(8, -1, -1))
    assert_same(ops.topk_mask([nine], 100), by_sort([nine], 100))
    (mask,) = ops.select([nine], [nine], [nine], formula="given", keep=100)
    assert_same(unpacked([mask], [nine]), by_sort([nine], 100))


def test_select_nothing() -> None:
    assert ops.select([], formula="magnitude", keep=0) == []


def bad(**change: Any) -> Callable[[], list[Tensor]]:
    call: dict[str, Any] = {"weights": [ONE, ONE], "formula": "magnitude", "keep": 1}
    call |= change
    return lambda: ops.select(call.pop("weights"), **call)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (bad(formula="worth"), ValueError, "magnitude, .*got 'worth'"),
        (bad(keep=None), ValueError, "one of keep and threshold, got keep=None"),
        (bad(threshold=1.0), ValueError, "one of keep and threshold, got keep=1"),
        (bad(keep=None, threshold=NAN), ValueError, "threshold to be a number, got nan"),
        (bad(keep=None, threshold=10**400), ValueError, "threshold to fit a float64"),
        (bad(keep=9), ValueError, "between 0 and 8.*got 9"),
        (bad(keep=False), TypeError, "int, got False"),
        (bad(formula="taylor"), ValueError, "grads for formula 'taylor', got None"),
        (bad(grads=[ONE]), ValueError, "2 grads, one a weight, got 1"),
        (bad(grads=[ONE, ONE[1:]]), ValueError, r"grads\[1\] to have the shape.*\(4,\).*\(3,\)"),
        (bad(grads=[ONE, ONE.double()]), TypeError, r"grads\[1\] to be torch.float32.*float64"),
        (bad(states=[ONE, ONE.half()]), TypeError, r"states\[1\] to be torch.float32.*float16"),
        (bad(weights=[ONE, ONE.double()]), TypeError, r"all float64 or none.*weights\[1\]"),
        (bad(weights=[ONE.int()]), TypeError, r"weights\[0\] to be float32.*int32"),
        (bad(alive=[ONE, ONE]), ValueError, r"alive\[0\] to be 1 bytes \(uint8\).*float32"),
        (bad(alive=[torch.zeros(1, dtype=torch.uint8)] * 2), ValueError, "0, the number of alive"),
        (bad(normalizers=[1.0, 0.0]), ValueError, r"normalizers\[1\] to be a positive.*got 0.0"),
        (bad(keep=None, threshold=True), TypeError, "threshold to be a number, got True"),
        (bad(keep=None, threshold="1"), TypeError, "threshold to be a number, got '1'"),
        (bad(weights=ONE), TypeError, "weights to be a list of Tensors, got a Tensor"),
        (bad(weights=[ONE, None]), TypeError, r"weights\[1\] to be a Tensor, got NoneType"),
        (bad(grads=[ONE, None]), TypeError, r"grads\[1\] to be a Tensor, got NoneType"),
        (bad(alive=[None, None]), TypeError, r"alive\[0\] to be a Tensor, got NoneType"),
        (bad(grads=ONE), TypeError, "grads to be a list of Tensors, got a Tensor"),
        (bad(seeds=[1, 2.0]), TypeError, r"seeds\[1\] to be an int, got 2.0"),
        (bad(seeds=[1, 2**63]), ValueError, r"seeds\[1\] to fit in 64 bits"),
    ],
)
def test_bad_select(call: Callable[[], list[Tensor]], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("keep", [-1, -5])
def test_the_op_itself_refuses_a_negative_keep(keep: int) -> None:
    one = torch.ones(100)
    with pytest.raises(RuntimeError, match=f"keep to be at least 0, got {keep}"):
        torch.ops.secateur.select([one], [], [], "given", [], keep, None, True, False, [1.0], [0])


# histogram


def key_of(score: float, dtype: torch.dtype) -> int:
    """By the definition: the bits, those of negative numbers in reverse order."""
    bits = int(
        torch.tensor(score + 0.0, dtype=dtype).view(getattr(torch, f"int{dtype.itemsize * 8}"))
    )
    return bits if bits >= 0 else bits ^ ops.key_range(dtype)[1]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrowing_ends_at_the_kth_key(dtype: torch.dtype, largest: bool, isa: str) -> None:
    scores = [randn(3000, dtype=dtype), (randn(50, 40, seed=1, dtype=dtype) * 2).round()]
    call: dict[str, Any] = {"formula": "given", "largest": largest}
    ordered = torch.cat([s.flatten() for s in scores]).sort(descending=largest).values
    for rank in (1, 2, 777, 2500, 4999, 5000):
        low, high = ops.key_range(dtype)
        left, inside, passes = rank, len(ordered), 0
        while low < high:
            bins, counts, info = ops.histogram(scores, **call, low=low, high=high)
            assert bins.sum() == counts[:, 1].sum() == inside
            assert counts[:, 0].sum() == rank - left
            assert info.tolist() == [-1, len(ordered)]
            low, high, left, inside = ops.narrow(bins, low, high, left)
            passes += 1
        assert passes == (3 if dtype == torch.float32 else 6)
        kth = ordered[rank - 1].item()
        key = key_of(kth, dtype)
        assert low == (key if largest else ~key)
        better = sum(int((s > kth if largest else s < kth).sum()) for s in scores)
        assert (left, inside) == (rank - better, int((ordered == kth).sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_finds_the_keys_that_the_kernel_counted(dtype: torch.dtype, isa: str) -> None:
    one = key_of(1.0, dtype)
    eps = torch.finfo(dtype).eps
    scores = [torch.cat([1 + randn(4000, dtype=dtype) * eps * 2.0**e for e in range(6, 24, 3)])]
    for width in (2047, 2048, 2049, 4095, 4096, 4097, 999_983, one):
        low, high = one - width // 3, one - width // 3 + width
        bins, before, _ = ops.histogram(scores, formula="given", low=low, high=high)
        total = int(bins.sum())
        assert total > 0
        for rank in (1, total // 3 + 1, total):
            first, last, left, inside = ops.narrow(bins, low, high, rank)
            assert low <= first <= last <= high
            _, counts, _ = ops.histogram(scores, formula="given", low=first, high=last)
            assert (counts - before)[0, 0] == rank - left
            assert counts[0, 1] == inside


def test_histograms_of_parts_add_up(isa: str) -> None:
    w, g = lists()
    alive = [ops.pack_mask(randn(*t.shape, seed=5) < 0.5) for t in w]
    call: dict[str, Any] = {"formula": "taylor", "low": 5, "high": key_of(0.1, torch.float32)}
    whole = ops.histogram(w, g, **call, alive=alive)
    parts = [
        ops.histogram([a], [b], **call, alive=[c]) for a, b, c in zip(w, g, alive, strict=True)
    ]
    assert torch.equal(whole[0], sum(p[0] for p in parts))
    assert torch.equal(whole[1], torch.cat([p[1] for p in parts]))
    assert whole[2][1] == sum(int(p[2][1]) for p in parts)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", FLOATS)
def test_histogram_tells_the_first_weight_that_is_not_finite(
    dtype: torch.dtype, value: float, isa: str
) -> None:
    w, _ = lists(dtype)
    w[1][30, 7] = value
    w[2][1, 1, 1, 1] = value
    _, _, info = ops.histogram(w, formula="given")
    assert info.tolist() == [1, sum(t.numel() for t in w)]
    living = [ops.pack_mask(t.isfinite()) for t in w]
    _, _, info = ops.histogram(w, formula="given", alive=living)
    assert info.tolist() == [-1, sum(t.numel() for t in w) - 2]


def test_histogram_of_nothing() -> None:
    bins, counts, info = ops.histogram([], formula="given")
    assert bins.tolist() == [0] * 2048
    assert counts.shape == (0, 2)
    assert info.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("weight", "low", "high"),
    [(ONE, 6, 5), (ONE, -(2**31) - 1, 0), (ONE, 0, 2**31), (ONE.double(), 0, 2**63)],
)
def test_bad_interval(weight: Tensor, low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"interval of keys within.*got {low} to {high}"):
        ops.histogram([weight], formula="given", low=low, high=high)


def test_histogram_checks_what_select_checks() -> None:
    with pytest.raises(ValueError, match="grads for formula 'taylor', got None"):
        ops.histogram([ONE], formula="taylor")
    with pytest.raises(TypeError, match=r"all float64 or none.*weights\[1\]"):
        ops.histogram([ONE, ONE.double()], formula="given")


def test_the_op_keeps_nothing_where_more_are_asked_for_than_there_are() -> None:
    dirty = [torch.full((64,), 255, dtype=torch.uint8) for _ in range(64)]
    del dirty  # memory that a mask may be given
    args = [torch.ones(300)], [], [], "given", [], 301, None, True, True, [1.0], [0]
    (mask,), info = torch.ops.secateur.select(*args)
    assert info.tolist() == [-1, 300]
    assert not mask.any()


def test_sparse_layouts_are_refused() -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(
        TypeError, match=r"expected scores\[0\] to be strided, got torch.sparse_coo"
    ):
        ops.topk_mask([sparse], 1)
