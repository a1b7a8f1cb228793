"""What a linear layer costs on this machine, dense and block-sparse, from a table measured once.

A product's time is close to a sum of terms with non-negative factors: one for every multiply-add,
for every element that is read or written, for every weight that a cache cannot hold, and one for
the call. The factors are fitted to a few dozen timings of each block size, dtype and direction.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from secateur import _C
from secateur.ops._spec import FLOATS
from secateur.sparse import BlockSparse, block_size

__all__ = ["Cost", "CostTable", "cost", "cost_table"]

_Call = Callable[[], object]

DIRECTIONS = ("forward", "dx", "dw")
_BOTH = "dx+dw"  # of a block-sparse layer are one product
_TIMED = (*DIRECTIONS, _BOTH)

# What is timed: (rows, out_features, in_features, density). Sizes differ by odd factors, so that
# no term of the sum goes along with another one.
_POINTS = (
    *((m, n, k, d) for m in (1, 2, 4, 8, 15) for n, k, d in (
        (320, 320, 0.5), (1024, 768, 0.1), (1536, 512, 0.2), (640, 2560, 0.1), (2048, 2048, 0.3),
        (4096, 3072, 0.1),
    )),
    (16, 768, 768, 0.3), (16, 2048, 1024, 0.1), (20, 3072, 1536, 0.05), (24, 2048, 512, 0.1),
    (32, 512, 2048, 0.5), (32, 1024, 256, 0.3), (40, 1600, 4032, 0.2), (48, 1024, 1024, 0.05),
    (48, 384, 2048, 0.1), (64, 3072, 768, 0.1), (64, 768, 3072, 0.3), (64, 256, 512, 0.3),
    (80, 640, 640, 0.5), (96, 320, 1280, 0.2), (96, 2048, 3072, 0.05), (112, 1536, 384, 0.3),
    (128, 2048, 2048, 0.1), (128, 512, 512, 0.6), (128, 768, 1536, 0.2), (160, 2432, 576, 0.4),
    (192, 1280, 320, 0.05), (192, 512, 4096, 0.1), (256, 4096, 1024, 0.1), (256, 2880, 3328, 0.05),
    (256, 2048, 2048, 0.05), (320, 1344, 3584, 0.2), (384, 640, 640, 0.2), (384, 3072, 384, 0.2),
    (512, 2048, 768, 0.05), (512, 768, 2048, 0.3), (512, 1024, 1024, 0.1), (640, 3648, 704, 0.3),
    (768, 256, 1536, 0.1), (1024, 1024, 1024, 0.1), (1024, 3328, 1152, 0.1),
    (1024, 384, 3072, 0.05), (1536, 512, 512, 0.5), (1536, 2240, 960, 0.05),
    (2048, 1024, 512, 0.05), (2048, 384, 1536, 0.1), (2048, 256, 256, 0.3),
    (2048, 1600, 1600, 0.03),
)  # fmt: skip
# Dense products of few rows take other paths in each of these ranges; sparse ones only below 16.
_DENSE_RANGES, _SPARSE_RANGES = (1, 2, 4, 8, 16), (1, 16)
_VISITS = 6  # to each timing, as far apart as can be: what disturbs a machine comes and goes
_SECONDS = 0.006  # for each visit
_CACHES = (1 << 20, 16 << 20)  # bytes that a core can hope for of the second and the third one
_PAGE = 4096  # bytes; rows that are pages apart fall on the same lines of a cache


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

    On CPUs, with as many threads as torch uses now. What has not been measured on this machine yet
    is measured first (a minute for each block size and dtype, with a progress bar) and kept in
    the user's cache directory. A prediction is rough, and of a machine that nothing else disturbs:
    ``bench/costs.py`` shows how far off on layers that were not measured.

    Args:
        out_features, in_features: the weight's shape.
        rows: rows of the input: batch times positions.
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
    sides, shape = block_size(block), (rows, out_features, in_features)
    table = cost_table()
    return Cost(
        sum(table.predict(None, dtype, each, shape, 1.0) for each in directions),
        sum(table.predict(sides, dtype, each, shape, density) for each in directions),
    )


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


class CostTable:
    """Timings of this machine and the factors fitted to them; ``print`` it to inspect them.

    Attributes:
        path: the JSON file that keeps the timings.
        timings: seconds by ``"block/dtype"`` ("dense", "32x32", ...), then direction, in the order
            of the points that are timed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.timings: dict[str, dict[str, list[float]]] = {}
        self._factors: dict[tuple[str, str, int], Tensor] = {}
        if path.exists():
            self.timings = _read(path)

    def predict(
        self,
        block: tuple[int, int] | None,
        dtype: torch.dtype,
        direction: str,
        shape: tuple[int, int, int],
        density: float,
    ) -> float:
        """Seconds of one product.

        Args:
            block: None for the dense product.
            dtype: of all operands.
            direction: one of ``DIRECTIONS``, or ``"dx+dw"``.
            shape: (rows, out_features, in_features).
            density: fraction of live blocks.
        """
        name = _name(block, dtype)
        if name not in self.timings:
            _check_writable(self.path)  # before a minute of measuring is lost
            dense, sparse = _measure(block or (32, 32), dtype)
            self.timings.setdefault(_name(None, dtype), dense)
            self.timings[_name(block or (32, 32), dtype)] = sparse
            _write(self.path, self.timings)
        first = max(m for m in _ranges(block) if m <= shape[0])
        key = (name, direction, first)
        if key not in self._factors:
            chosen = _points_of(block, first)
            seconds = torch.tensor([self.timings[name][direction][i] for i in chosen]).double()
            densities = _densities(block)
            terms = torch.stack(
                [_terms(block, direction, _POINTS[i][:3], densities[i]) for i in chosen]
            )
            self._factors[key] = _fit(terms, seconds)
        return float(_terms(block, direction, shape, density) @ self._factors[key])

    def __repr__(self) -> str:
        """Where it is kept, and how far its own timings are from what it predicts for them."""
        lines = [f"CostTable of {_machine()}", f"  kept in {self.path}"]
        for name, by_direction in self.timings.items():
            block, dtype = _parsed(name)
            for direction, measured in by_direction.items():
                errors = [
                    abs(self.predict(block, dtype, direction, point[:3], density) / seconds - 1)
                    for point, density, seconds in zip(
                        _POINTS, _densities(block), measured, strict=True
                    )
                ]
                lines.append(
                    f"  {name:<18} {direction:<8} {len(errors)} timings, off by "
                    f"{statistics.median(errors):.1%} in the median, {max(errors):.1%} at most"
                )
        return "\n".join(lines)


def _name(block: tuple[int, int] | None, dtype: torch.dtype) -> str:
    size = "dense" if block is None else f"{block[0]}x{block[1]}"
    return f"{size}/{str(dtype).removeprefix('torch.')}"


def _parsed(name: str) -> tuple[tuple[int, int] | None, torch.dtype]:
    """The inverse of :func:`_name`."""
    size, _, dtype = name.partition("/")
    if size == "dense":
        return None, getattr(torch, dtype)
    rows, cols = map(int, size.split("x"))
    return (rows, cols), getattr(torch, dtype)


def _ranges(block: tuple[int, int] | None) -> tuple[int, ...]:
    return _DENSE_RANGES if block is None else _SPARSE_RANGES


def _points_of(block: tuple[int, int] | None, first: int) -> list[int]:
    """The points in the range of rows that begins with ``first``."""
    ranges = _ranges(block)
    return [i for i, (m, *_) in enumerate(_POINTS) if max(r for r in ranges if r <= m) == first]


def _densities(block: tuple[int, int] | None) -> list[float]:
    return [1.0 if block is None else density for *_, density in _POINTS]


def _terms(
    block: tuple[int, int] | None, direction: str, shape: tuple[int, int, int], density: float
) -> Tensor:
    """What the time of a product is a sum of."""
    m, n, k = shape
    weights = density * n * k
    if block is not None and any(side % 16 for side in block):
        lanes = 64 if m > 32 else 16  # such blocks take the batch in whole panels
        m = -(-m // lanes) * lanes
    panel = (n if direction in ("dx", _BOTH) else k) * 64 * 4.0
    second, third = _CACHES
    # Between two calls of a product a dense one of this size passes through the caches.
    weights_lost = _missed(n * k * 4, third)
    lost = _missed((n * k + m * (n + k)) * 4, third)
    n_pages, k_pages = (float(features * 4 % _PAGE == 0) for features in (n, k))
    return torch.tensor(
        [
            1.0,
            n + k,
            weights,
            weights * _missed(weights * 4, second),
            weights * weights_lost,
            weights * k_pages if block is None else 0.0,  # blocks lie in a row
            m * k,
            m * k * lost,
            m * k * k_pages,
            m * n,
            m * n * lost,
            m * n * n_pages,
            m * weights,
            m * weights * _missed(panel, second / 2),
        ],
        dtype=torch.float64,
    )


def _missed(size: float, cache: float) -> float:
    """The part of ``size`` bytes, read again and again, that a cache does not hold."""
    return max(0.0, 1 - cache / size) if size else 0.0


def _fit(terms: Tensor, seconds: Tensor) -> Tensor:
    """Factors that are not negative and bring the relative errors to a minimum, outliers less."""
    relative = terms / seconds[:, None]
    scale = relative.norm(dim=0).clamp_min(1e-300)
    weights = torch.ones_like(seconds)
    factors = torch.zeros_like(scale)
    for _ in range(4):
        a = (relative / scale) * weights[:, None]
        gram, target = (a.T @ a).tolist(), (a.T @ weights).tolist()
        x = factors.tolist()
        for _ in range(500):  # coordinate descent
            for j, row in enumerate(gram):
                if row[j] > 0:
                    rest = sum(g * v for g, v in zip(row, x, strict=True)) - row[j] * x[j]
                    x[j] = max(0.0, (target[j] - rest) / row[j])
        factors = torch.tensor(x, dtype=torch.float64)
        errors = ((relative / scale) @ factors - 1).abs()
        weights = (0.05 / errors.clamp_min(0.05)).sqrt()
    fitted: Tensor = factors / scale
    return fitted


def _measure(
    block: tuple[int, int], dtype: torch.dtype
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time every direction at every point, dense and sparse.

    They take turns, since one that is repeated finds its operands in a cache, as no layer of a
    network does.
    """
    times: dict[str, list[tuple[list[float], list[float]]]] = {
        direction: [([], []) for _ in _POINTS] for direction in _TIMED
    }
    order = [*range(len(_POINTS))] * _VISITS
    # disable=None: no bar where nobody sees it.
    for i in tqdm(order, f"secateur measures {_name(block, dtype)}", disable=None):
        for direction, calls in products(_POINTS[i][0], _weight(block, dtype, i)).items():
            for seconds, record in zip(visit(calls), times[direction][i], strict=True):
                record.append(seconds)
    dense, sparse = (
        {direction: [min(pair[kind]) for pair in pairs] for direction, pairs in times.items()}
        for kind in (0, 1)
    )
    return dense, sparse


def _weight(block: tuple[int, int], dtype: torch.dtype, point: int) -> BlockSparse:
    _, n, k, density = _POINTS[point]
    generator = torch.Generator().manual_seed(point)
    grid = (-(-n // block[0]), -(-k // block[1]))
    order = torch.randperm(grid[0] * grid[1], generator=generator)
    mask = (order < max(1, round(density * len(order)))).view(grid)
    return BlockSparse.from_dense(torch.randn(n, k, generator=generator).to(dtype), block, mask)


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


def visit(calls: Sequence[_Call]) -> list[float]:
    """Median seconds of each call, by turns. The least of several visits is an undisturbed one."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while len(times[0]) < 2 or time.perf_counter() - begin < _SECONDS:
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


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
    what = f"{_TIMED} {_binary()} {_machine()} {_POINTS} {_VISITS}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's model, with its numbers on Linux, where a cloud may hide the name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = dict(
        reversed([[s.strip() for s in line.split(":", 1)] for line in lines if ":" in line])
    )
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']} model {facts['model']})"


def _cache_directory() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "secateur"
    if sys.platform == "win32":
        return Path(os.environ["LOCALAPPDATA"]) / "secateur"
    mac = sys.platform == "darwin"
    return Path.home() / ("Library/Caches" if mac else ".cache") / "secateur"


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        timings: dict[str, dict[str, list[float]]] = json.loads(path.read_bytes())["timings"]
        for name, by_direction in timings.items():
            _parsed(name)
            if set(by_direction) != set(_TIMED) or any(
                len(seconds) != len(_POINTS) or not all(s > 0 for s in seconds)
                for seconds in by_direction.values()
            ):
                raise ValueError("timings that are not complete")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the timings of secateur.cost in {path}, got {error}: "
            "secateur.cost_table(rebuild=True) measures again"
        ) from error
    return timings


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


def _write(path: Path, timings: Any) -> None:
    temporary = _temporary(path)
    temporary.write_text(
        json.dumps({"machine": _machine(), "points": _POINTS, "timings": timings}, indent=1),
        encoding="utf-8",
    )
    os.replace(temporary, path)
