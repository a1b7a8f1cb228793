"""N:M masks: their laws, against a plain loop, on every instruction set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur import _C, ops
from secateur.ops._spec import FLOATS
from secateur.ops.nm import nm_mask_reference

INF = math.inf
NAN = math.nan
PATTERNS = [(1, 1), (1, 2), (2, 4), (1, 4), (4, 8), (8, 16), (3, 5), (10, 33), (32, 64)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(scores: Tensor, n: int, m: int, **more: Any) -> Tensor:
    return ops.unpack_mask(ops.nm_mask(scores, formula="given", n=n, m=m, **more), scores.shape)


def by_loop(scores: Tensor, n: int, m: int, largest: bool = True) -> Tensor:
    """Group by group; Python's sort is stable."""
    kept = []
    for row in scores.reshape(len(scores), -1).tolist():
        for start in range(0, len(row), m):
            group = row[start : start + m]
            order = sorted(range(len(group)), key=group.__getitem__, reverse=largest)
            kept += [i in order[:n] for i in range(len(group))]
    return torch.tensor(kept, dtype=torch.bool).view(scores.shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_keeps_n_of_every_m(n: int, m: int, dtype: torch.dtype, isa: str) -> None:
    mask = mask_of(randn(48, 10 * m, dtype=dtype), n, m)
    assert (mask.view(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_equals_a_loop_over_groups(
    n: int, m: int, dtype: torch.dtype, largest: bool, isa: str
) -> None:
    for shape in ((7, 150), (130, 64), (3, 1000)):
        for scores in (randn(*shape, dtype=dtype), (2 * randn(*shape, dtype=dtype)).round()):
            assert torch.equal(
                mask_of(scores, n, m, largest=largest), by_loop(scores, n, m, largest)
            )


def test_ties_go_to_the_lower_index(isa: str) -> None:
    for m in range(1, 65):
        for n in (1, (m + 1) // 2, m):
            for value in (1.0, -1.0, 0.0):
                mask = mask_of(torch.full((3, 2 * m), value), n, m)
                assert torch.equal(mask.view(-1, m), (torch.arange(m) < n).expand(6, m))


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_equals_zero(dtype: torch.dtype, isa: str) -> None:
    scores = torch.tensor([[-0.0, 0.0, 0.0, -0.0, -1.0, -0.0, 0.0, 1.0]], dtype=dtype)
    assert mask_of(scores, 2, 4).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1]]
    assert mask_of(scores, 2, 4, largest=False).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_a_short_group_at_the_end_of_a_row_keeps_as_many_as_it_has_up_to_n(isa: str) -> None:
    scores = torch.tensor([[4.0, 3, 2, 1, 5, 6, 7], [1, 2, 3, 4, 6, 5, 4]])
    assert mask_of(scores, 2, 4).int().tolist() == [[1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0]]
    assert mask_of(scores[:, :5], 2, 4)[:, 4].all()
    assert mask_of(scores[:, :2], 3, 4).all()


def test_a_vector_is_a_column_and_a_number_a_group_of_one() -> None:
    assert mask_of(randn(70), 1, 4).all()
    assert mask_of(torch.tensor(-1.0), 2, 4).item() is True


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (3, 0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert ops.nm_mask(torch.empty(shape), formula="given", n=2, m=4).shape == (0,)


def test_rows_of_a_convolution_run_over_channels_and_kernel() -> None:
    conv = randn(5, 6, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(mask_of(conv, 2, 4), by_loop(conv.contiguous(), 2, 4))
    along_channels = conv.permute(0, 2, 3, 1)
    mask = mask_of(along_channels, 1, 3)
    assert (mask.unflatten(3, (2, 3)).sum(4) == 1).all()


@pytest.mark.parametrize("formula", ops.FORMULAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_agrees_with_score(formula: str, dtype: torch.dtype, isa: str) -> None:
    w, g = randn(33, 50, dtype=dtype), randn(33, 50, seed=1, dtype=dtype)
    more: dict[str, Any] = {"formula": formula, "normalizer": 50.0, "seed": 3}
    scores = ops.score(w, g, **more).view(w.shape)
    for n, m in ((2, 4), (3, 7)):
        mask = ops.unpack_mask(ops.nm_mask(w, g, n=n, m=m, **more), w.shape)
        assert torch.equal(mask, by_loop(scores, n, m))


def test_scores_by_state() -> None:
    w, state = randn(20, 24), randn(20, 24, seed=1).abs()
    bits = ops.nm_mask(w, state=state, formula="obd", n=2, m=4, normalizer=0.5)
    assert torch.equal(ops.unpack_mask(bits, w.shape), by_loop(state * w.square(), 2, 4))


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (3, 7), (20, 48)])
def test_large_on_any_isa_and_threads(n: int, m: int) -> None:
    w, g = (randn(301, 1008, seed=i, dtype=torch.bfloat16) for i in range(2))  # ties
    want, _ = nm_mask_reference(w, g, None, "taylor", n, m, True, 1.0, 0)
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.nm_mask(w, g, formula="taylor", n=n, m=m), want)


def test_more_of_the_same_group_contains_less() -> None:
    scores = (4 * randn(40, 60)).round()  # many ties
    before = torch.zeros(40, 60, dtype=torch.bool)
    for n in range(1, 13):
        mask = mask_of(scores, n, 12)
        assert not (before & ~mask).any()
        before = mask
    assert before.all()


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, 1e-45, -1e-40, 65504.0, -65504.0]),
    st.floats(-60000, 60000),
)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(FLOATS), st.booleans())
def test_any_values_groups_and_rows(data: st.DataObject, dtype: torch.dtype, largest: bool) -> None:
    m = data.draw(st.integers(1, 64))
    n = data.draw(st.integers(1, m))
    rows, cols = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 140))
    few = data.draw(st.lists(values, min_size=1, max_size=20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    pick = torch.randint(len(few), (rows, cols), generator=generator)
    scores = torch.tensor(few, dtype=torch.float64)[pick].to(dtype)
    assert torch.equal(mask_of(scores, n, m, largest=largest), by_loop(scores, n, m, largest))


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 4), (4, 4), (3, 7)])
def test_scores_that_are_not_finite_are_an_error(
    n: int, m: int, dtype: torch.dtype, value: float, isa: str
) -> None:
    for index in (0, 4095, 4096, 8999):
        scores = randn(90, 100, dtype=dtype)
        scores.view(-1)[index] = value
        with pytest.raises(ops.NonFiniteScoreError, match="finite given scores, got NaN") as error:
            mask_of(scores, n, m)
        assert error.value.index == 0


def test_gradients_are_not_tracked() -> None:
    w = randn(4, 8).requires_grad_()
    assert not ops.nm_mask(w, w, formula="taylor", n=2, m=4).requires_grad


ONE = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"n": 5}, ValueError, "1 <= n <= m <= 64, got n=5 and m=4"),
        ({"n": 0}, ValueError, "1 <= n <= m <= 64, got n=0 and m=4"),
        ({"m": 65}, ValueError, "1 <= n <= m <= 64, got n=2 and m=65"),
        ({"n": True}, TypeError, "n to be an int, got True"),
        ({"m": 4.0}, TypeError, "m to be an int, got 4.0"),
        ({"formula": "best"}, ValueError, "formula to be one of.*got 'best'"),
        ({"grad": None}, ValueError, "grad for formula 'taylor', got None"),
        ({"grad": ONE.double()}, TypeError, "grad to be torch.float32.*got torch.float64"),
        ({"grad": ONE[:3]}, ValueError, r"shape of weight, \(4, 4\), got \(3, 4\)"),
        ({"state": ONE.half()}, TypeError, "state to be torch.float32.*got torch.float16"),
        ({"weight": ONE.int()}, TypeError, "weight to be float32.*got torch.int32"),
        ({"weight": None}, TypeError, "weight to be a Tensor, got NoneType"),
        ({"normalizer": 0.0}, ValueError, "normalizer to be a positive finite number, got 0.0"),
        ({"seed": 1.5}, TypeError, "seed to be an int, got 1.5"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"weight": ONE, "grad": ONE, "formula": "taylor", "n": 2, "m": 4}
    with pytest.raises(error, match=match):
        ops.nm_mask(**{**arguments, **change})


def test_the_op_itself_checks_the_pattern() -> None:
    with pytest.raises(RuntimeError, match="expected 1 <= n <= m <= 64, got n = 3 and m = 2"):
        torch.ops.secateur.nm_mask(ONE, None, None, "given", 3, 2, True, 1.0, 0)
