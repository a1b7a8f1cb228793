"""Times ours against dense torch: checked first, calls interleaved, medians reported."""

from __future__ import annotations

import csv
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import _C


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        columns: what the case is, by column name.
        ours: the call that is timed.
        dense: the baseline.
        work: useful floating-point operations of ours.
        check: raises where ours is wrong.
    """

    columns: Mapping[str, Any]
    ours: Callable[[], Any]
    dense: Callable[[], Any]
    work: float
    check: Callable[[], None]


def measure(functions: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median time in seconds of each function; calls take turns, so that noise hits all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[0]) < 3:
        for function, record in zip(functions, times, strict=True):
            before = time.perf_counter()
            function()
            record.append(time.perf_counter() - before)
    return [statistics.median(record) for record in times]


def run(cases: Iterable[Case], seconds: float) -> list[dict[str, Any]]:
    """Check and time every case, and print its line as it comes."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        case.check()
        dense, ours = measure((case.dense, case.ours), seconds)
        rows.append(
            {
                **case.columns,
                "dense ms": dense * 1e3,
                "ours ms": ours * 1e3,
                "GFLOP/s": case.work / ours / 1e9,
                "x dense": dense / ours,
            }
        )
        if len(rows) == 1:
            print(_line(list(rows[0])))
        print(_line(list(rows[-1].values())) + (" slower" if dense < ours else ""), flush=True)
    return rows


def _line(cells: Sequence[Any]) -> str:
    return " ".join(f"{c:>9.3f}" if isinstance(c, float) else f"{c!s:>9}" for c in cells)


def environment() -> dict[str, Any]:
    """What a measurement cannot be read without."""
    return {
        "machine": platform.machine(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "secateur": _C.build_info()["version"],
    }


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows, with the environment in every line."""
    lines = [{**row, **environment()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def save_json(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """``{"environment": ..., "rows": [...]}``."""
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
