"""What a linear layer costs on this machine, dense and block-sparse: timed once, then looked up.

The time of a block-sparse product is close to a straight line over the density, and hardly depends
on which blocks live. Over the batch and the sides of the weight it is no simple function: libraries
switch algorithms, caches overflow, strides collide. So a layer is timed as it is, with random
blocks at the densities next to the one asked for, and what lies between is interpolated.

A machine changes its pace, at times by half within seconds where neighbours come and go. So a dense
product of a fixed size takes its turn in every timing, and the table keeps multiples of what that
took meanwhile; seconds are those multiples of what it takes when they are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from secateur import _C
from secateur.ops._spec import FLOATS
from secateur.sparse import BlockSparse, block_size

__all__ = ["Cost", "CostTable", "cost", "cost_table"]

_Call = Callable[[], object]

DIRECTIONS = ("forward", "dx", "dw")
_BOTH = "dx+dw"  # of a block-sparse layer are one product

_REFERENCE = (256, 1024, 1024)  # rows, out_features, in_features; float32
_PACE_HOLDS = 5.0  # seconds
# Densities that are timed; between two of them, a straight line.
_DENSITIES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
_MOST_ROWS = 2048  # of which each costs as much as any further one
# Every call has a turn in each of _ROUNDS rounds, and in more until all have _SHORT seconds each;
# in _FEWEST where all would have more than _LONG.
_ROUNDS, _FEWEST, _SHORT, _LONG = 15, 5, 0.05, 1.0
_WARM = 1e-3  # seconds


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted times of a layer.

    Attributes:
        dense: seconds with dense weights.
        sparse: seconds with the live blocks only.
    """

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """How many times as fast as dense the sparse layer is."""
        return self.dense / self.sparse


def cost(
    out_features: int,
    in_features: int,
    rows: int,
    *,
    block: int | tuple[int, int],
    density: float,
    dtype: torch.dtype = torch.float32,
    direction: str | Sequence[str] = DIRECTIONS,
) -> Cost:
    """Predict what a linear layer costs with dense weights, and with live blocks only.

    On CPUs, with as many threads as torch uses now. A layer that is asked for the first time on
    this machine is timed, for as long as some tens of its calls take, and the times are kept in the
    user's cache directory, as multiples of one dense product. That one is timed again, for a tenth
    of a second, where the machine's pace is not known from the last five: seconds are those of now,
    while the speed-up of a layer that is known stays. ``bench/costs.py`` shows how far off
    predictions are.

    Args:
        out_features, in_features: the weight's shape.
        rows: rows of the input: batch times positions. More than 2048 are not timed: they cost as
            many times as much as 2048.
        block: block size, an int or (rows, cols).
        density: fraction of the blocks that are live, in [0, 1].
        dtype: of weights and inputs.
        direction: ``"forward"``, ``"dx"`` (gradient of the input), ``"dw"`` (gradient of the
            weight), or several of them: their sum, where both gradients are computed together, as
            layers do.

    Returns:
        Seconds, dense and sparse, each without bias.

    Raises:
        TypeError: a number is no number, ``dtype`` none that the kernels have, or ``direction`` no
            str nor several.
        ValueError: a size below 1, a density outside [0, 1], another direction, or a damaged table.
        OSError: the cache directory cannot be written.

    Example:
        >>> secateur.cost(4096, 1024, 2048, block=32, density=0.1).speedup
    """
    sizes = {"out_features": out_features, "in_features": in_features, "rows": rows}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"expected {name} to be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"expected {name} to be at least 1, got {size}")
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(f"expected density to be a number, got {density!r}")
    if not 0 <= density <= 1:
        raise ValueError(f"expected density to be in [0, 1], got {density}")
    directions = (direction,) if isinstance(direction, str) else direction
    if not isinstance(directions, Sequence):
        raise TypeError(f"expected direction to be a str or several, got {direction!r}")
    if not directions or any(
        each not in DIRECTIONS or each in directions[:i] for i, each in enumerate(directions)
    ):
        raise ValueError(
            f"expected direction to be among {DIRECTIONS}, each once, got {direction!r}"
        )
    if dtype not in FLOATS:
        raise TypeError(f"expected dtype to be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    if {"dx", "dw"} <= set(directions):
        directions = (*(each for each in directions if each == "forward"), _BOTH)
    layer = _Layer(rows, out_features, in_features, dtype)
    return cost_table().predict(layer, block_size(block), density, directions)


_tables: dict[Path, CostTable] = {}


def cost_table(*, rebuild: bool = False) -> CostTable:
    """The table behind :func:`cost` for this machine and torch's current number of threads.

    Args:
        rebuild: forget what was measured, here and on disk.

    Raises:
        ValueError: the file that keeps it is damaged.
    """
    path = _cache_directory() / f"cost-{_key()}.json"
    if rebuild:
        path.unlink(missing_ok=True)
        _tables.pop(path, None)
    if path not in _tables:
        _tables[path] = CostTable(path)
    return _tables[path]


@dataclasses.dataclass(frozen=True)
class _Layer:
    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype


class CostTable:
    """Timings of this machine; ``print`` it to inspect them.

    Attributes:
        path: the JSON file that keeps the timings.
        multiples: how many times as long as a dense product of 256 rows and a float32 weight of
            1024x1024 it took, by what was timed, such as
            ``"forward, 512 rows, 4096x1024, float32, 32x32 at 0.1"`` or ``"..., dense"``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.multiples = _read(path) if path.exists() else {}
        self._pace = 0.0
        self._paced = -math.inf  # when that was

    @property
    def pace(self) -> float:
        """Seconds of that dense product, timed again where that is more than five seconds ago."""
        if time.monotonic() - self._paced > _PACE_HOLDS:
            self._set_pace(by_turns([reference()])[0])
        return self._pace

    def _set_pace(self, times: Sequence[float]) -> None:
        self._pace, self._paced = statistics.median(times), time.monotonic()

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by what was timed, at the present pace."""
        pace = self.pace
        return {name: multiple * pace for name, multiple in self.multiples.items()}

    def predict(
        self, layer: _Layer, block: tuple[int, int], density: float, directions: Sequence[str]
    ) -> Cost:
        """The sum over ``directions``, among ``DIRECTIONS`` and ``"dx+dw"``."""
        timed = dataclasses.replace(layer, rows=min(layer.rows, _MOST_ROWS))
        low = max(d for d in _DENSITIES if d <= density)
        high = min(d for d in _DENSITIES if d >= density)
        weights = {low: 1.0} if low == high else {
            low: (high - density) / (high - low),
            high: (density - low) / (high - low),
        }  # fmt: skip
        self._time(timed, block, weights, directions)
        dense = sum(self.multiples[_name(timed, each)] for each in directions)
        sparse = sum(
            share * self.multiples[_name(timed, each, block, d)]
            for each in directions
            for d, share in weights.items()
        )
        scale = layer.rows / timed.rows * self.pace
        return Cost(dense * scale, sparse * scale)

    def _time(
        self,
        layer: _Layer,
        block: tuple[int, int],
        densities: Iterable[float],
        directions: Sequence[str],
    ) -> None:
        """Time what is missing, all of it by turns, and keep it."""
        names = [_name(layer, each) for each in directions]
        missing: dict[str, _Call] = {}
        for density in densities:
            sparse = [_name(layer, each, block, density) for each in directions]
            if all(name in self.multiples for name in (*names, *sparse)):
                continue
            calls = products(layer.rows, _weight(layer, block, density))
            for each, dense_name, sparse_name in zip(directions, names, sparse, strict=True):
                missing.setdefault(dense_name, calls[each][0])
                missing[sparse_name] = calls[each][1]
        missing = {name: call for name, call in missing.items() if name not in self.multiples}
        if missing:
            _check_writable(self.path)  # before what was measured is lost
            pace, *times = by_turns([reference(), *missing.values()])
            found = {
                name: statistics.median(t / p for t, p in zip(each, pace, strict=True))
                for name, each in zip(missing, times, strict=True)
            }
            # Another process may have added to it meanwhile.
            kept = _read(self.path) if self.path.exists() else {}
            self.multiples = kept | self.multiples | found
            _write(self.path, self.multiples)
            self._set_pace(pace)

    def __repr__(self) -> str:
        """Where it is kept, and all timings."""
        lines = [f"CostTable of {_machine()}", f"  kept in {self.path}"]
        lines.extend(f"  {s * 1e3:10.4f} ms  {name}" for name, s in sorted(self.timings.items()))
        return "\n".join(lines)


def _name(
    layer: _Layer, direction: str, block: tuple[int, int] | None = None, density: float = 1.0
) -> str:
    weight = "dense" if block is None else f"{block[0]}x{block[1]} at {density}"
    dtype = str(layer.dtype).removeprefix("torch.")
    shape = f"{layer.out_features}x{layer.in_features}"
    return f"{direction}, {layer.rows} rows, {shape}, {dtype}, {weight}"


def _weight(layer: _Layer, block: tuple[int, int], density: float) -> BlockSparse:
    generator = torch.Generator().manual_seed(0)
    n, k = layer.out_features, layer.in_features
    grid = (-(-n // block[0]), -(-k // block[1]))
    order = torch.randperm(grid[0] * grid[1], generator=generator)
    mask = (order < round(density * len(order))).view(grid)
    return BlockSparse.from_dense(
        torch.randn(n, k, generator=generator).to(layer.dtype), block, mask
    )


def products(rows: int, weight: BlockSparse) -> dict[str, tuple[_Call, _Call]]:
    """The dense and the sparse product of each direction that is timed, on random operands."""
    n, k = weight.shape
    generator = torch.Generator().manual_seed(rows)
    x, dy, dense = (
        torch.randn(shape, generator=generator).to(weight.values.dtype)
        for shape in ((rows, k), (rows, n), (n, k))
    )
    values, pattern = weight.values, weight.pattern.tensors()
    ops = torch.ops.secateur
    return {
        "forward": (
            lambda: x @ dense.t(),
            lambda: ops.block_sparse_linear(x, values, None, *pattern, n),
        ),
        "dx": (lambda: dy @ dense, lambda: ops.block_sparse_linear_dx(dy, values, *pattern, k)),
        "dw": (
            lambda: dy.t() @ x,
            lambda: ops.block_sparse_linear_dw(dy, x, *pattern, *weight.block),
        ),
        _BOTH: (
            lambda: (dy @ dense, dy.t() @ x),
            lambda: ops.block_sparse_linear_backward(dy, x, values, *pattern),
        ),
    }


def reference() -> _Call:
    """The dense product whose multiples are kept."""
    rows, n, k = _REFERENCE
    x, weight = (torch.ones(size, k, dtype=torch.float32) for size in (rows, n))
    return lambda: x @ weight.t()


def by_turns(calls: Sequence[_Call]) -> list[list[float]]:
    """Seconds of each call, round by round.

    The calls take turns, so that a slow second of the machine is no single call's. In its turn a
    call is made for a millisecond, at least once, and then timed: at first it finds in the caches
    what the other calls left there, and which those are differs from one timing of it to the next.
    """
    times: list[list[float]] = [[] for _ in calls]
    rounds, spent = 0, 0.0
    # disable=None: no bar where nobody sees it; delay: nor for what is soon over.
    with tqdm(desc="secateur times a layer", unit="round", delay=1, disable=None) as bar:
        while rounds < _FEWEST or (
            spent < _LONG * len(calls) and (rounds < _ROUNDS or spent < _SHORT * len(calls))
        ):
            for call, record in zip(calls, times, strict=True):
                begin = time.perf_counter()
                call()
                while time.perf_counter() - begin < _WARM:
                    call()
                start = time.perf_counter()
                call()
                record.append(time.perf_counter() - start)
                spent += record[-1]
            rounds += 1
            bar.update()
    return times


def _machine() -> str:
    return (
        f"{processor()}, {_C.isa()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, secateur {_C.build_info()['version']}"
    )


@functools.cache
def _binary() -> str:
    """What the kernels were when they were timed: a version number outlives many builds."""
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()


def _key() -> str:
    what = f"{_binary()} {_machine()} {_REFERENCE} {_ROUNDS} {_SHORT} {_WARM}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's model, with its numbers on Linux, where a cloud may hide the name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = dict(
        reversed([[s.strip() for s in line.split(":", 1)] for line in lines if ":" in line])
    )
    if not {"model name", "cpu family", "model"} <= facts.keys():
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']} model {facts['model']})"


def _cache_directory() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "secateur"
    if sys.platform == "win32":
        return Path(os.environ["LOCALAPPDATA"]) / "secateur"
    mac = sys.platform == "darwin"
    return Path.home() / ("Library/Caches" if mac else ".cache") / "secateur"


def _read(path: Path) -> dict[str, float]:
    try:
        multiples: dict[str, float] = json.loads(path.read_bytes())["multiples"]
        if not all(isinstance(m, float) and m > 0 for m in multiples.values()):
            raise ValueError("timings that are no positive numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the timings of secateur.cost in {path}, got {error}: "
            "secateur.cost_table(rebuild=True) measures again"
        ) from error
    return multiples


def _check_writable(path: Path) -> None:
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(
            "expected a directory that can be written for the timings of secateur.cost, got "
            f"{path.parent}: {error}; XDG_CACHE_HOME names another one"
        ) from error


def _temporary(path: Path) -> Path:
    return path.with_suffix(f".{os.getpid()}.tmp")


def _write(path: Path, multiples: dict[str, float]) -> None:
    temporary = _temporary(path)
    content = {"machine": _machine(), "multiples": multiples}
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)
