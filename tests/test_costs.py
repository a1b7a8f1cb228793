"""The cost table: what it predicts from, keeps and refuses. Timings are made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur import BlockSparse, costs

LAYER = {"block": 32, "density": 0.1}
REFERENCE = "forward: 256 1024 1024 1.0"


def made_up(m: int, n: int, k: int, density: float, speed: float) -> float:
    """Seconds: a call, the multiply-adds, and what is read and written."""
    return 2e-6 + m * n * k * density / speed + m * (n + k) / 4e9


class Machine:
    """Its clock, and how many times as long as usual everything takes."""

    now, slowness = 0.0, 1.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(costs.time, "monotonic", lambda: found.now)
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Machine) -> list[str]:
    """What was measured, by name; dense products run at half the speed of sparse ones."""
    names: list[str] = []

    def by_turns(calls: list[str]) -> list[list[float]]:
        names.extend(name for name in calls if name != REFERENCE)
        # One round in three is a slow one.
        return [[seconds_of(name) * machine.slowness * s for s in (1, 3, 1)] for name in calls]

    def products(rows: int, weight: BlockSparse) -> dict[str, tuple[str, str]]:
        n, k = weight.shape
        what = f"{rows} {n} {k}"
        sparse = f"{what} {weight.density} {weight.block} {weight.values.dtype}"
        return {
            each: (f"{each}: {what} 1.0", f"{each}: {sparse}")
            for each in (*costs.DIRECTIONS, "dx+dw")
        }

    def seconds_of(name: str) -> float:
        direction, _, what = name.partition(": ")
        m, n, k, density, *sparse = what.split(maxsplit=4)
        seconds = made_up(int(m), int(n), int(k), float(density), 1e11 if sparse else 5e10)
        # Both gradients in three quarters of the time of one after the other.
        return 1.5 * seconds if direction == "dx+dw" else seconds

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "by_turns", by_turns)
    monkeypatch.setattr(costs, "reference", lambda: REFERENCE)
    monkeypatch.setattr(costs, "products", products)
    monkeypatch.setattr(costs, "_tables", {})
    return names


@pytest.mark.parametrize("rows", [1, 100, 2000])
@pytest.mark.parametrize("density", [0.03, 0.3, 1.0])
def test_densities_in_between_are_predicted(measured: list[str], rows: int, density: float) -> None:
    found = secateur.cost(1600, 640, rows, block=32, density=density, direction="forward")
    assert found.dense == pytest.approx(made_up(rows, 1600, 640, 1.0, 5e10), rel=1e-6)
    assert found.sparse == pytest.approx(made_up(rows, 1600, 640, density, 1e11), rel=1e-3)
    assert found.speedup == found.dense / found.sparse


def test_seconds_follow_the_pace_of_the_machine(measured: list[str], machine: Machine) -> None:
    def found() -> secateur.Cost:
        return secateur.cost(1600, 640, 64, block=32, density=0.1, direction="dx")

    usual = found()
    machine.slowness = 1.5
    assert found() == usual  # the pace is known, and was just timed
    machine.now += 6
    slow = found()
    assert slow.dense == pytest.approx(1.5 * usual.dense)
    assert slow.speedup == pytest.approx(usual.speedup)
    assert len(measured) == 2  # besides the pace, nothing anew

    # What is timed while the machine is slow is the same multiple of the pace.
    again = secateur.cost(1600, 640, 64, block=32, density=0.2, direction="dx")
    machine.slowness = 1.0
    machine.now += 6
    assert found() == pytest.approx(usual)
    fast = secateur.cost(1600, 640, 64, block=32, density=0.2, direction="dx")
    assert again.sparse == pytest.approx(1.5 * fast.sparse)
    assert fast.sparse == pytest.approx(made_up(64, 1600, 640, 0.2, 1e11), rel=1e-6)


def test_many_rows_cost_as_many_times_as_much(measured: list[str]) -> None:
    most, twice = (secateur.cost(320, 64, rows, **LAYER) for rows in (2048, 4096))
    assert twice.dense == 2 * most.dense
    assert twice.sparse == 2 * most.sparse
    assert all(": 2048 " in name for name in measured)


def test_directions_add_up_and_both_gradients_are_one_product(measured: list[str]) -> None:
    forward, dx, dw = (
        secateur.cost(512, 512, 64, **LAYER, direction=d).sparse for d in costs.DIRECTIONS
    )
    assert secateur.cost(512, 512, 64, **LAYER, direction=("forward", "dx")).sparse == (
        pytest.approx(forward + dx)
    )
    together = secateur.cost(512, 512, 64, **LAYER)
    assert together.sparse == pytest.approx(forward + 0.75 * (dx + dw))


def test_what_is_asked_for_is_measured_once(measured: list[str]) -> None:
    for _ in range(2):
        secateur.cost(512, 320, 64, block=32, density=0.05, direction="dx")
        costs._tables.clear()  # as in a new process
        secateur.cost(512, 320, 64, block=32, density=0.06, direction="dx")
    assert measured == [
        "dx: 64 512 320 1.0",
        "dx: 64 512 320 0.05 (32, 32) torch.float32",
        "dx: 64 512 320 0.1 (32, 32) torch.float32",
    ]
    for changed in ({"block": (8, 16)}, {"dtype": torch.bfloat16}, {"rows": 65}):
        layer = {"rows": 64, "block": 32, "density": 0.1, "direction": "dx"} | changed
        for _ in range(2):
            secateur.cost(512, 320, **layer)
    assert len(measured) == 3 + 1 + 2 + 2


def test_what_another_process_measured_meanwhile_is_kept(measured: list[str]) -> None:
    secateur.cost(64, 64, 8, **LAYER)
    table, path = secateur.cost_table(), secateur.cost_table().path
    kept = json.loads(path.read_text())
    kept["multiples"]["forward, of another process"] = 1.0
    path.write_text(json.dumps(kept))
    secateur.cost(64, 64, 9, **LAYER)
    assert table.multiples["forward, of another process"] == 1.0
    assert json.loads(path.read_text())["multiples"] == table.multiples


def test_another_number_of_threads_has_a_table_of_its_own(measured: list[str]) -> None:
    threads = torch.get_num_threads()
    secateur.cost(512, 512, 64, **LAYER)
    once = len(measured)
    try:
        torch.set_num_threads(threads + 1)
        secateur.cost(512, 512, 64, **LAYER)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2 * once


def test_a_table_is_rebuilt_and_inspected(measured: list[str]) -> None:
    secateur.cost(512, 512, 64, **LAYER, direction="dw")
    path = secateur.cost_table().path
    kept = json.loads(path.read_text())
    assert set(kept["multiples"]) == {
        "dw, 64 rows, 512x512, float32, dense",
        "dw, 64 rows, 512x512, float32, 32x32 at 0.1",
    }
    assert f"{torch.get_num_threads()} threads" in kept["machine"]
    shown = repr(secateur.cost_table())
    assert str(path) in shown
    assert re.search(r"\d ms  dw, 64 rows, 512x512, float32, 32x32 at 0.1", shown)
    assert set(secateur.cost_table().timings) == set(kept["multiples"])
    assert secateur.cost_table(rebuild=True).timings == {}
    assert not path.exists()
    secateur.cost(512, 512, 64, **LAYER, direction="dw")
    assert len(measured) == 4


def test_a_cache_that_cannot_be_written_is_refused_before_measuring(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"expected a directory that can be written .* got .*file"):
        secateur.cost(512, 512, 64, **LAYER)
    assert not measured


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"multiples": {"dense": "fast"}}', '{"multiples": {"dense": -1.0}}'],
)
def test_a_damaged_table_is_refused(measured: list[str], content: str) -> None:
    secateur.cost(512, 512, 64, **LAYER)
    secateur.cost_table().path.write_text(content)
    costs._tables.clear()
    with pytest.raises(ValueError, match=r"expected the timings .*cost_table\(rebuild=True\)"):
        secateur.cost(512, 512, 64, **LAYER)
    secateur.cost_table(rebuild=True)
    secateur.cost(512, 512, 64, **LAYER)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"out_features": 0}, ValueError, "expected out_features to be at least 1, got 0"),
        ({"rows": 2.5}, TypeError, "expected rows to be an int, got 2.5"),
        ({"density": 90}, ValueError, r"expected density to be in \[0, 1\], got 90"),
        ({"density": "0.1"}, TypeError, "expected density to be a number, got '0.1'"),
        ({"direction": "backward"}, ValueError, "expected direction to be among .* 'backward'"),
        ({"direction": ()}, ValueError, "expected direction to be among"),
        ({"direction": ("dx", "dx")}, ValueError, "each once, got .'dx', 'dx'"),
        ({"direction": [["dx"]]}, ValueError, "expected direction to be among"),
        ({"direction": None}, TypeError, "expected direction to be a str or several, got None"),
        ({"dtype": torch.int8}, TypeError, "expected dtype to be one of .*, got torch.int8"),
        ({"block": 0}, ValueError, "block"),
    ],
)
def test_bad_input_is_named(
    measured: list[str], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {"out_features": 64, "in_features": 64, "rows": 8, **LAYER}
    with pytest.raises(error, match=message):
        secateur.cost(**{**good, **changed})
    assert not measured


def test_real_products_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "_tables", {})
    monkeypatch.setattr(costs, "_SHORT", 0.0)
    for density in (0.0, 0.03, 0.5):
        found = secateur.cost(256, 200, 64, block=16, density=density)
        assert 1e-6 < found.sparse < 1
        assert 1e-6 < found.dense < 1


def test_calls_take_turns_and_slow_ones_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = 0.0

    def call(name: str, seconds: float) -> Any:
        def run() -> None:  # slower after another call, which took the caches
            nonlocal now
            now += seconds if order[-1:] == [name] else 3 * seconds
            order.append(name)

        return run

    monkeypatch.setattr(costs.time, "perf_counter", lambda: now)
    times = costs.by_turns([call("a", 0.01), call("b", 0.02)])
    assert times == [pytest.approx([s] * costs._ROUNDS) for s in (0.01, 0.02)]
    assert order == ["a", "a", "b", "b"] * costs._ROUNDS
    order.clear()
    (slow,) = costs.by_turns([call("slow", 2.0)])
    assert len(slow) == costs._FEWEST
    assert len(order) == 2 * costs._FEWEST
    order.clear()
    (fast,) = costs.by_turns([call("fast", 1e-4)])
    assert len(fast) == pytest.approx(costs._SHORT / 1e-4, abs=1)
    assert len(order) == pytest.approx(len(fast) * (costs._WARM / 1e-4 + 1), rel=0.1)  # caches
