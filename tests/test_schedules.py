"""Schedules, granularities, criteria and scopes as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

import secateur
from secateur.criteria import Criterion
from secateur.schedules import Ramp
from secateur.scope import share_out

RAMPS = [secateur.Linear, secateur.Cubic, secateur.Exponential]


def sparsities(schedule: secateur.Schedule, steps: int) -> dict[int, float | None]:
    targets = {step: schedule.target(step) for step in range(steps)}
    return {step: t.sparsity for step, t in targets.items() if t is not None}


@pytest.mark.parametrize("kind", RAMPS)
def test_ramp_grows_from_zero_to_its_end(kind: type[Ramp]) -> None:
    got = sparsities(kind(0.8, begin=10, end=45, every=10), 100)
    assert list(got) == [10, 20, 30, 40, 45]  # the end is due even where `every` misses it
    values = list(got.values())
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == 0.8


def test_ramp_formulas() -> None:
    at = 5  # halfway
    assert sparsities(secateur.Linear(0.8, begin=0, end=10), 11)[at] == pytest.approx(0.4)
    assert sparsities(secateur.Cubic(0.8, begin=0, end=10), 11)[at] == pytest.approx(0.8 * 7 / 8)
    exponential = sparsities(secateur.Exponential(0.96, begin=0, end=10), 11)[at]
    assert exponential == pytest.approx(1 - 0.04**0.5)


@pytest.mark.parametrize("kind", RAMPS)
def test_ramp_of_one_step(kind: type[Ramp]) -> None:
    assert sparsities(kind(0.5, begin=3, end=3), 10) == {3: 0.5}


def test_one_shot_is_due_once() -> None:
    assert sparsities(secateur.OneShot(0.5), 10) == {0: 0.5}
    assert sparsities(secateur.OneShot(0.5, at=7), 10) == {7: 0.5}


def test_threshold_is_due_from_begin_to_end() -> None:
    schedule = secateur.Threshold(1e-3, begin=2, end=9, every=3, permanent=False)
    due = {step: schedule.target(step) for step in range(20)}
    assert [step for step, target in due.items() if target] == [2, 5, 8]
    assert due[2] == secateur.schedules.Target(threshold=1e-3, permanent=False)
    assert secateur.Threshold(1e-3).target(10**9) is not None


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: secateur.OneShot(90), ValueError, r"fraction in \[0, 1\), got 90; for 90 % write"),
        (lambda: secateur.OneShot(1.0), ValueError, r"fraction in \[0, 1\), got 1.0"),
        (lambda: secateur.OneShot(-0.1), ValueError, "got -0.1"),
        (lambda: secateur.OneShot(float("nan")), ValueError, "got nan"),
        (lambda: secateur.OneShot("half"), TypeError, "got 'half'"),
        (lambda: secateur.OneShot(True), TypeError, "got True"),
        (lambda: secateur.OneShot(0.5, at=-1), ValueError, "at least 0, got -1"),
        (lambda: secateur.Cubic(0.5, begin=10, end=5), ValueError, "begin=10, end=5"),
        (lambda: secateur.Cubic(0.5, begin=0, end=5, every=0), ValueError, "at least 1, got 0"),
        (lambda: secateur.Linear(0.5, begin=0.5, end=5), TypeError, "got 0.5"),
        (lambda: secateur.Threshold("x"), TypeError, "got 'x'"),
        (lambda: secateur.Threshold(float("inf")), ValueError, "got inf"),
        (lambda: secateur.Threshold(1e-3, begin=5, end=1), ValueError, "begin=5, end=1"),
        (lambda: secateur.Block(0), ValueError, "at least 1 x 1, got 0 x 0"),
        (lambda: secateur.Block(8, -8), ValueError, "got 8 x -8"),
        (lambda: secateur.Block(8.0), TypeError, "got 8.0"),
        (lambda: secateur.Block(8, reduce="median"), ValueError, "got 'median'"),
        (lambda: secateur.Taylor(keep="best"), ValueError, "got 'best'"),
        (lambda: secateur.Taylor(ema=1.0), ValueError, "got 1.0"),
        (lambda: secateur.Taylor(ema="0.9"), TypeError, "got '0.9'"),
        (lambda: secateur.Random(ema=0.9), ValueError, "no ema of random scores, got 0.9"),
        (lambda: secateur.Target(), ValueError, "got sparsity=None and threshold=None"),
        (lambda: secateur.Target(1.5), ValueError, "got 1.5"),
        (lambda: secateur.Target(threshold="x"), TypeError, "got 'x'"),
        (lambda: secateur.OBD(hessian="exact"), ValueError, "got 'exact'"),
        (lambda: secateur.Random(seed=0.5), TypeError, "got 0.5"),
        (lambda: share_out("layerwise", 0.5, [1]), ValueError, "got 'layerwise'"),
    ],
)
def test_bad_values_are_refused(
    make: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    "policy",
    [
        secateur.Taylor(),
        secateur.OBD(hessian="adam"),
        secateur.Block(32),
        secateur.Cubic(0.5, begin=0, end=1),
    ],
)
def test_policies_are_frozen_values(policy: object) -> None:
    field = dataclasses.fields(policy)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, field, 1)


def test_block_defaults_to_a_square() -> None:
    assert secateur.Block(32) == secateur.Block(32, 32)
    assert secateur.Block(32, 16).block(100, 100) == (32, 16)
    assert secateur.Element().block(100, 100) == (1, 1)


def test_shares_are_rounded_per_scope() -> None:
    assert share_out("global", 0.5, [3, 4, 4]) == [([0, 1, 2], round(5.5))]
    assert share_out("layer", 0.5, [3, 4, 5]) == [([0], 2), ([1], 2), ([2], 2)]


def test_movement_sums_and_others_average() -> None:
    assert secateur.Movement().accumulation == (1.0, 1.0)
    assert secateur.Movement(ema=0.9).accumulation == (0.9, pytest.approx(0.1))
    assert secateur.Taylor().accumulation is None
    assert secateur.OBD().accumulation is not None
    assert secateur.OBD(hessian={"w": torch.ones(1)}).accumulation is None


def test_a_criterion_needs_a_formula_or_a_measure() -> None:
    with pytest.raises(TypeError, match=r"measure\(\) of its own, got Criterion"):
        Criterion()
