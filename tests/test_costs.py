"""The cost table: what it predicts from, keeps and refuses. Timings are made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur import costs

LAYER = {"block": 32, "density": 0.1}


def made_up(m: int, n: int, k: int, density: float, speed: float) -> float:
    """Seconds: a call, the multiply-adds, and what is read and written."""
    return 2e-6 + m * n * k * density / speed + m * (n + k) / 4e9


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was measured, by name; dense products run at half the speed of sparse ones."""
    names: list[str] = []

    def measure(block: tuple[int, int], dtype: torch.dtype) -> Any:
        names.append(costs._name(block, dtype))
        dense = [made_up(*point[:3], 1.0, 5e10) for point in costs._POINTS]
        sparse = [made_up(*point, 1e11) for point in costs._POINTS]
        both = "dx+dw"  # in three quarters of the time of one after the other
        return tuple(
            {**dict.fromkeys(costs.DIRECTIONS, times), both: [1.5 * seconds for seconds in times]}
            for times in (dense, sparse)
        )

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "_measure", measure)
    monkeypatch.setattr(costs, "_tables", {})
    return names


@pytest.mark.parametrize("rows", [16, 100, 1000, 4000])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_held_out_layers_are_predicted(measured: list[str], rows: int, density: float) -> None:
    found = secateur.cost(1500, 700, rows, block=32, density=density, direction="forward")
    assert found.dense == pytest.approx(made_up(rows, 1500, 700, 1.0, 5e10), rel=0.05)
    assert found.sparse == pytest.approx(made_up(rows, 1500, 700, density, 1e11), rel=0.05)
    assert found.speedup == found.dense / found.sparse


def test_directions_add_up_and_both_gradients_are_one_product(measured: list[str]) -> None:
    forward, dx, dw = (
        secateur.cost(512, 512, 64, **LAYER, direction=d).sparse for d in costs.DIRECTIONS
    )
    assert secateur.cost(512, 512, 64, **LAYER, direction=("forward", "dx")).sparse == (
        pytest.approx(forward + dx)
    )
    together = secateur.cost(512, 512, 64, **LAYER)
    assert together.sparse == pytest.approx(forward + 0.75 * (dx + dw), rel=0.01)


def test_each_block_and_dtype_is_measured_once(measured: list[str]) -> None:
    for _ in range(2):
        secateur.cost(512, 512, 64, **LAYER)
        secateur.cost(640, 512, 64, block=(8, 16), density=0.5)
        secateur.cost(512, 512, 64, **LAYER, dtype=torch.bfloat16)
        costs._tables.clear()  # as in a new process
    assert measured == ["32x32/float32", "8x16/float32", "32x32/bfloat16"]


def test_another_number_of_threads_has_a_table_of_its_own(measured: list[str]) -> None:
    threads = torch.get_num_threads()
    secateur.cost(512, 512, 64, **LAYER)
    try:
        torch.set_num_threads(threads + 1)
        secateur.cost(512, 512, 64, **LAYER)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2


def test_a_table_is_rebuilt_and_inspected(measured: list[str]) -> None:
    secateur.cost(512, 512, 64, **LAYER)
    path = secateur.cost_table().path
    kept = json.loads(path.read_text())
    assert set(kept["timings"]) == {"dense/float32", "32x32/float32"}
    assert f"{torch.get_num_threads()} threads" in kept["machine"]
    shown = repr(secateur.cost_table())
    assert str(path) in shown
    assert re.search(r"32x32/float32 +dx +\d+ timings, off by \d", shown)
    assert secateur.cost_table(rebuild=True).timings == {}
    assert not path.exists()
    secateur.cost(512, 512, 64, **LAYER)
    assert measured == ["32x32/float32"] * 2


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
    ["", "{}", '{"timings": {"dense/float32": {"forward": [1]}}}', '{"timings": {"other": {}}}'],
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
    monkeypatch.setattr(costs, "_SECONDS", 0.0)
    points = ((1, 64, 96, 0.5), (2, 64, 96, 0.5), (4, 96, 64, 0.5), (8, 64, 64, 1.0))
    monkeypatch.setattr(costs, "_POINTS", (*points, (256, 256, 256, 0.5), (64, 96, 96, 0.1)))
    found = secateur.cost(256, 256, 256, block=16, density=0.5)
    assert 1e-6 < found.sparse < 1
    assert 1e-6 < found.dense < 1
