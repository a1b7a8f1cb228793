"""Checks, then times: what every benchmark here measures with.

Every result is compared with the reference before anything is timed. Calls then take turns, in an
order that is drawn anew for every round, so that noise, clock speed and what the call before left
in the caches hit all alike. What is reported is the median.

On a GPU (``--device cuda``) everything is made there, since :func:`set_device` makes it torch's
default device, and calls are timed by :class:`CudaTimer`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import importlib.metadata
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from secateur import _C, build_info
from secateur.costs import processor

CALLS = 15  # of every function at least, but
FEWEST = 5  # where one call takes longer than
SLOW = 0.5  # seconds
PEERS = ("numpy", "scipy", "sparselab")

FLUSH = 2**28  # bytes: twice the L2 of any GPU so far

Clock = Callable[[], float]
Timer = Callable[[Callable[[], Any]], float]  # seconds that a call takes


@dataclass(frozen=True)
class Call:
    """What is timed.

    Attributes:
        run: the call.
        check: raises where the result is wrong, and may return how far it is off; None for the
            reference itself, and for a yardstick of which only the time matters.
        prepare: runs before every call and is not timed.
    """

    run: Callable[[], Any]
    check: Callable[[Any], float | None] | None = None
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, the least, of how many, and what its check returned."""

    seconds: float
    best: float
    calls: int
    error: float | None


def measure(calls: Mapping[str, Call], seconds: float, timer: Timer) -> dict[str, Timing]:
    """Check all results, then time the calls by turns.

    Args:
        calls: by name.
        seconds: how long to go on in all, once each was called ``CALLS`` times.
        timer: see :func:`timer`.

    Returns:
        The timings by name. A call that takes more than ``SLOW`` seconds leaves after ``FEWEST``
        rounds.

    Raises:
        RuntimeError: a check raised.
    """
    errors: dict[str, float | None] = {}
    for name, call in calls.items():
        if call.prepare:
            call.prepare()
        result = call.run()
        try:
            errors[name] = call.check(result) if call.check else None
        except (AssertionError, RuntimeError) as error:
            raise RuntimeError(f"{name} is wrong: {error}") from error
    times: dict[str, list[float]] = {name: [] for name in calls}
    active, shuffle = list(calls), random.Random(0).shuffle
    rounds, spent = 0, 0.0
    while active and (rounds < CALLS or spent < seconds):
        shuffle(active)
        for name in active:
            if prepare := calls[name].prepare:
                prepare()
            times[name].append(timer(calls[name].run))
            spent += times[name][-1]
        rounds += 1
        if rounds == FEWEST:
            active = [name for name in active if statistics.median(times[name]) <= SLOW]
    return {
        name: Timing(statistics.median(t), min(t), len(t), errors[name])
        for name, t in times.items()
    }


def clock() -> tuple[Clock, str]:
    """CPU time on one thread, which neighbours disturb less, and wall time otherwise."""
    if torch.get_num_threads() == 1:
        return time.process_time, "cpu"
    return time.perf_counter, "wall"


def timer() -> tuple[Timer, str]:
    """How calls are timed on torch's default device, and what that is called in tables."""
    if on_gpu():
        return CudaTimer(), "cuda"
    read, name = clock()

    def timed(run: Callable[[], Any]) -> float:
        before = read()
        run()
        return read() - before

    return timed, name


class CudaTimer:
    """Times a call by events on its stream, with nothing of its operands in L2.

    What empties L2 is queued first and is still running when the call is launched: short kernels
    are not timed by how fast Python launches them, unless a call waits for the GPU itself.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH, dtype=torch.uint8)

    def __call__(self, run: Callable[[], Any]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def on_gpu() -> bool:
    """Whether torch's default device is a GPU."""
    return torch.get_default_device().type == "cuda"


def generator(seed: int) -> torch.Generator:
    """Of random numbers on torch's default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def peak_flops(dtype: torch.dtype, timer: Timer) -> float:
    """The highest rate of multiply-adds, in FLOP/s.

    On a GPU it is that of a matrix product of 8192 x 8192 x 8192. On a CPU it is that of a loop of
    nothing but multiply-adds in registers, by the best instructions there are, on as many threads
    as torch has. The shortest call counts, because this is a ceiling.
    """
    if on_gpu():
        a, b = (torch.randn(8192, 8192).to(dtype) for _ in range(2))
        return 2 * 8192**3 / _shortest(lambda: a @ b, timer)
    threads, isa = torch.get_num_threads(), _C.isa()
    rounds, bfloat16 = 1 << 20, dtype == torch.bfloat16
    _C.set_isa(_C.supported_isas()[-1])
    try:
        with ThreadPoolExecutor(threads) as pool:

            def run() -> int:
                loops = [
                    pool.submit(_C.multiply_registers, bfloat16, rounds) for _ in range(threads)
                ]
                return sum(loop.result() for loop in loops)

            return run() / _shortest(run, timer)
    finally:
        _C.set_isa(isa)


def read_bandwidth(timer: Timer) -> float:
    """Bytes a second of torch's sum over 1 GiB, which no cache holds."""
    x = torch.ones(2**28)  # not zeros: those may be one page, mapped many times
    return x.nbytes / _shortest(x.sum, timer)


def _shortest(call: Callable[[], Any], timer: Timer) -> float:
    return min([timer(call) for _ in range(1 + CALLS)][1:])


def runs(name: str, call: Call) -> bool:
    """Whether a peer can do this, and right; where not, a line says why, once for each reason."""
    try:
        result = call.run()
        if call.check:
            call.check(result)
    except (RuntimeError, ImportError) as error:  # no kernel, a wrong result, no Triton
        _say_once(f"{name} is left out where it does not run: {str(error).splitlines()[0]}")
        return False
    return True


@functools.cache
def _say_once(line: str) -> None:
    print(line)


def peer(name: str) -> ModuleType | None:
    """A package to compare with; None, and a line that says so, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        print(f"{name} is not installed: its cells stay empty (pip install '.[bench]')")
        return None


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns, each as wide as it needs."""
    lines = [list(rows[0])]
    lines.extend([text(cell) for cell in row.values()] for row in rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def text(cell: Any) -> str:
    """A cell as it is printed."""
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return "" if cell is None else str(cell)


def environment() -> dict[str, Any]:
    """What a measurement cannot be read without."""
    return {
        "cpu": processor(),
        "machine": platform.machine(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "secateur": _C.build_info()["version"],
        **{name: _version(name) for name in PEERS},
        **(_gpu() if on_gpu() else {}),
    }


def _gpu() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "kernels": build_info()["cuda"],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def device_argument(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`set_device` takes."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def set_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Make it torch's default device, or leave with a message where there is none."""
    if device == "cpu":
        return  # the default; to set it puts a mode around every method of a tensor
    if not torch.cuda.is_available():
        parser.error(
            f"expected a GPU for --device cuda, got none that torch {torch.__version__} has"
        )
    torch.set_default_device(device)


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`save` reads."""
    parser.add_argument(
        "--csv", type=writable, help="write the rows here, e.g. under bench/results"
    )
    parser.add_argument("--json", type=writable, help="write environment and rows here")


def writable(text: str) -> Path:
    """A path for results, refused before anything is measured where it cannot be written."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected a file to write, got {error}") from error
    return path


def positive(text: str) -> int:
    """A number of threads."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def save(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """What ``--csv`` and ``--json`` ask for."""
    if args.csv:
        save_csv(rows, args.csv)
    if args.json:
        save_json(rows, args.json)


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows, with the environment in every line."""
    lines = [{**row, **environment()} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def save_json(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """``{"environment": ..., "rows": [...]}``."""
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
