"""The emulator itself: right kernels are clean, and whoever claims a planted bug notices it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulator.build import Accumulation, Arrival, Emulator, Flavour, library, load, nvcc
from torch import Tensor

KERNELS = Path(__file__).parent / "cuda_emulator" / "planted.cu"
SEEDS = range(4)


class Bug(IntEnum):
    """In the order of planted.cu."""

    NONE = 0
    MISSING_BARRIER = auto()
    READ_BEYOND = auto()
    SHARED_BEYOND = auto()
    SHARED_POINTER_BEYOND = auto()
    DIVERGENT_SHUFFLE = auto()
    CROSS_BLOCK_ADD = auto()
    PLAIN_HISTOGRAM = auto()
    WRITE_AFTER_READ = auto()
    UNINITIALISED = auto()
    SKIPPED_BARRIER = auto()
    OWN_LANE_NOT_NAMED = auto()
    SOURCE_NOT_NAMED = auto()
    DIFFERENT_COLLECTIVES = auto()
    SHIFT = auto()
    MISSING_FENCE = auto()
    FENCE_TOO_EARLY = auto()
    MISSING_SYNCWARP = auto()
    MISALIGNED = auto()
    OTHER_THREADS_STACK = auto()
    MISSING_WAIT = auto()
    NO_BARRIER_AFTER_WAIT = auto()
    EARLY_OVERWRITE = auto()
    FRAGMENT_ORDER = auto()
    ASM_OPERANDS = auto()
    STALE_READ = auto()


class Wrong(Exception):
    """A kernel went through and its result is wrong."""


@pytest.fixture(scope="module")
def plain() -> Emulator:
    return load(library([KERNELS], flavour=Flavour.PLAIN))


@pytest.fixture(scope="module")
def checked() -> Emulator:
    return load(library([KERNELS], flavour=Flavour.CHECKED))


@pytest.fixture(scope="module")
def ptx() -> Emulator:
    if nvcc() is None:
        pytest.skip("needs nvcc, which makes the PTX")
    return load(library([KERNELS], flavour=Flavour.PTX))


@pytest.fixture(params=["plain", "checked", "ptx"])
def emulator(request: pytest.FixtureRequest) -> Emulator:
    """Each flavour in turn, set as it is when it is loaded."""
    emulator: Emulator = request.getfixturevalue(request.param)
    emulator.set_seed(0)
    emulator.set_arrival(Arrival.LATE)
    emulator.set_accumulation(Accumulation.EXACT)
    return emulator


def call(emulator: Emulator, name: str, *args: Any) -> None:
    """Call a launcher on tensors and ints; a tensor of NaNs or -1 holds nothing yet."""
    emulator.forget_buffers()
    pointers = []
    for a in args:
        if isinstance(a, Tensor):
            empty = a.dtype != torch.uint8 and bool(((a == -1) | a.isnan()).all())
            emulator.add_buffer(a.data_ptr(), a.nbytes, initialised=not empty)
        pointers.append(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a)
    emulator.call(name, *pointers)


def expect(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual, expected):
        raise Wrong(f"expected {expected}, got {actual}")


def whole_numbers(n: int) -> Tensor:
    """Floats of which every sum is exact."""
    return torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(n)).float()


def run_sum(emulator: Emulator, bug: Bug) -> None:
    x, result = whole_numbers(3000), torch.zeros(1)
    call(emulator, "sum", bug, x, len(x), result, 5)
    expect(result, x.sum()[None])


def run_ordered_sum(emulator: Emulator, bug: Bug) -> None:
    x, parts, result = whole_numbers(3000), torch.full((7,), torch.nan), torch.full((1,), torch.nan)
    ticket = torch.zeros(1, dtype=torch.int32)
    expected = x.sum()[None]
    call(emulator, "ordered_sum", bug, x, len(x), parts, ticket, result, 7)
    expect(result, expected)
    expect(x, torch.zeros_like(x))
    expect(ticket, torch.zeros_like(ticket))


def run_histogram(emulator: Emulator, bug: Bug) -> None:
    x = (whole_numbers(5000) + 8).to(torch.uint8)
    counts = torch.zeros(256, dtype=torch.int32)
    call(emulator, "histogram", bug, x, len(x), counts, 2)
    expect(counts, torch.bincount(x, minlength=256).int())


def run_compact(emulator: Emulator, bug: Bug) -> None:
    x = whole_numbers(700)
    expected = (x > 0).nonzero()[:, 0].int()
    indices, count = torch.full_like(expected, -1), torch.zeros(1, dtype=torch.int32)
    call(emulator, "compact", bug, x, len(x), indices, count)
    expect(indices.sort().values, expected)
    expect(count, torch.tensor([len(expected)], dtype=torch.int32))


def run_reverse(emulator: Emulator, bug: Bug) -> None:
    x = torch.arange(512.0)
    y = torch.full_like(x, torch.nan)
    call(emulator, "reverse", bug, x, y, 2)
    expect(y, x.view(-1, 32).flip(1).flatten())


def run_share(emulator: Emulator, bug: Bug) -> None:
    out = torch.full((256,), -1, dtype=torch.int32)
    call(emulator, "share", bug, out)
    expect(out, torch.full_like(out, 42))


def run_matmul(emulator: Emulator, bug: Bug) -> None:
    a, b = whole_numbers(50 * 104).view(50, 104), whole_numbers(40 * 104).view(40, 104)
    c = torch.full((50, 40), torch.nan)
    call(emulator, "matmul", bug, a.bfloat16(), b.bfloat16(), c, 50, 40, 104)
    expect(c, a @ b.t())


Run = Callable[[Emulator, Bug], None]
RUNS: tuple[Run, ...] = (
    run_sum,
    run_ordered_sum,
    run_histogram,
    run_compact,
    run_reverse,
    run_share,
    run_matmul,
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.removeprefix("run_"))
def test_right_kernels_are_right_and_clean(run: Run, seed: int, emulator: Emulator) -> None:
    emulator.set_seed(seed)
    run(emulator, Bug.NONE)


# What the checked flavour says of each bug, whatever the schedule.
CHECKED: dict[Bug, tuple[Run, str]] = {
    Bug.MISSING_BARRIER: (run_sum, r"(race|uninitialised).* of shared parts"),
    Bug.READ_BEYOND: (run_sum, r"out of bounds read of 4 bytes at .*: byte 12000 of global memory"),
    Bug.SHARED_BEYOND: (run_sum, r"out of bounds index 8 of 'float \[8\]'"),
    Bug.SHARED_POINTER_BEYOND: (run_sum, r"out of bounds write .*: byte 32 of shared parts"),
    Bug.DIVERGENT_SHUFFLE: (
        run_sum,
        r"deadlock: threads 0-15,.* waiting in __shfl_xor_sync \(mask ffffffff\) at planted",
    ),
    Bug.CROSS_BLOCK_ADD: (run_sum, r"race: .* which thread 0 of another block wrote"),
    Bug.PLAIN_HISTOGRAM: (run_histogram, r"race: .* of shared local .* (wrote|read)"),
    Bug.WRITE_AFTER_READ: (run_histogram, r"race: (read|write) .* of shared local .* (wrote|read)"),
    Bug.UNINITIALISED: (run_histogram, r"uninitialised atomic access .* of shared local"),
    Bug.SKIPPED_BARRIER: (run_compact, r"deadlock: .*threads 192-255 exited"),
    Bug.OWN_LANE_NOT_NAMED: (run_compact, r"__ballot_sync .* does not name its own lane 31"),
    Bug.SOURCE_NOT_NAMED: (run_compact, r"__shfl_sync .* lane 0, which the mask does not name"),
    Bug.DIFFERENT_COLLECTIVES: (run_compact, r"divergent warp: .*(__any_sync|__ballot_sync)"),
    Bug.SHIFT: (run_compact, r"shift of 'unsigned int' by 32 at planted.cu"),
    Bug.MISSING_FENCE: (run_ordered_sum, r"race: read .* of another block wrote"),
    Bug.FENCE_TOO_EARLY: (run_ordered_sum, r"race: read .* of another block wrote"),
    Bug.STALE_READ: (run_ordered_sum, r"through the read-only cache .* wrote at planted.cu"),
    Bug.MISSING_SYNCWARP: (run_reverse, r"(race|uninitialised)"),
    Bug.MISALIGNED: (run_reverse, r"misaligned access at planted.cu:.*multiple of 16"),
    Bug.OTHER_THREADS_STACK: (run_share, r"read of another thread's local memory"),
    Bug.MISSING_WAIT: (run_matmul, r"read of 16 bytes at mma.cuh:\d+, where a cp.async is on"),
    Bug.NO_BARRIER_AFTER_WAIT: (run_matmul, r"(race|uninitialised|where a cp.async)"),
    Bug.EARLY_OVERWRITE: (run_matmul, r"(race: write .* read at|where a cp.async)"),
}
# What the PTX flavour says: the same, but that nvcc has left no bounds of an array in its code, and
# that PTX defines what a shift by 32 gives.
PTX = {
    **{bug: claim for bug, claim in CHECKED.items() if bug is not Bug.SHIFT},
    Bug.SHARED_BEYOND: (run_sum, r"out of bounds write .*: byte 32 of shared parts"),
}
# Bugs that do not depend on accesses being seen are found by the plain flavour as well.
PLAIN = {
    bug: CHECKED[bug]
    for bug in (
        Bug.DIVERGENT_SHUFFLE,
        Bug.SKIPPED_BARRIER,
        Bug.OWN_LANE_NOT_NAMED,
        Bug.SOURCE_NOT_NAMED,
        Bug.DIFFERENT_COLLECTIVES,
    )
}
CLAIMS = {"plain": PLAIN, "checked": CHECKED, "ptx": PTX}
# Bugs that show in the result under some schedule: without the checker luck decides.
# A copy that nobody waits for is missed where it arrives late, one that comes too soon where it
# arrives at once.
WRONG: dict[Bug, tuple[Run, Arrival]] = {
    Bug.MISSING_BARRIER: (run_sum, Arrival.LATE),
    Bug.WRITE_AFTER_READ: (run_histogram, Arrival.LATE),
    Bug.UNINITIALISED: (run_histogram, Arrival.LATE),
    Bug.MISSING_SYNCWARP: (run_reverse, Arrival.LATE),
    Bug.MISSING_WAIT: (run_matmul, Arrival.LATE),
    Bug.NO_BARRIER_AFTER_WAIT: (run_matmul, Arrival.LATE),
    Bug.EARLY_OVERWRITE: (run_matmul, Arrival.EAGER),
}
# Bugs that are no access and no meeting gone wrong: all that shows is the result, always.
WRONG_IN_PTX = {Bug.FRAGMENT_ORDER: run_matmul, Bug.ASM_OPERANDS: run_matmul}
WRONG_IN_SOURCE = {Bug.FRAGMENT_ORDER: run_matmul}
# What a flavour cannot see: it does not compile the text of inline PTX; or nothing is wrong there.
BLIND = {
    "plain": {Bug.ASM_OPERANDS: run_matmul},
    "checked": {Bug.ASM_OPERANDS: run_matmul},
    "ptx": {Bug.SHIFT: run_compact},
}


def test_every_bug_is_claimed() -> None:
    everything = set(Bug) - {Bug.NONE}
    assert set(CHECKED) | set(WRONG_IN_SOURCE) | set(BLIND["checked"]) == everything
    assert set(PTX) | set(WRONG_IN_PTX) | set(BLIND["ptx"]) == everything


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("flavour", "bug"),
    [
        pytest.param(flavour, bug, id=f"{flavour}-{bug.name.lower()}")
        for flavour, claims in CLAIMS.items()
        for bug in claims
    ],
)
def test_who_claims_a_bug_names_it(
    flavour: str, bug: Bug, seed: int, request: pytest.FixtureRequest
) -> None:
    emulator: Emulator = request.getfixturevalue(flavour)
    emulator.set_seed(seed)
    run, message = CLAIMS[flavour][bug]
    with pytest.raises(RuntimeError, match=message) as error:
        run(emulator, bug)
    assert re.match(r"CUDA emulator: \w+_kernel, block \(\d+, \d+, 0\)", str(error.value))


def wrong_results(emulator: Emulator, bug: Bug, arrival: Arrival) -> int:
    wrong = 0
    emulator.set_arrival(arrival)
    for seed in SEEDS:
        emulator.set_seed(seed)
        try:
            WRONG[bug][0](emulator, bug)
        except Wrong:
            wrong += 1
    emulator.set_arrival(Arrival.LATE)
    return wrong


@pytest.mark.parametrize("bug", WRONG, ids=lambda bug: bug.name.lower())
def test_poison_and_schedules_make_results_wrong(bug: Bug, plain: Emulator) -> None:
    assert wrong_results(plain, bug, WRONG[bug][1])


def test_each_arrival_shows_what_the_other_hides(plain: Emulator) -> None:
    assert not wrong_results(plain, Bug.MISSING_WAIT, Arrival.EAGER)
    assert not wrong_results(plain, Bug.EARLY_OVERWRITE, Arrival.LATE)


@pytest.mark.parametrize(
    ("flavour", "wrong"),
    [("plain", WRONG_IN_SOURCE), ("checked", WRONG_IN_SOURCE), ("ptx", WRONG_IN_PTX)],
)
def test_some_bugs_show_in_the_result_alone(
    flavour: str, wrong: dict[Bug, Run], request: pytest.FixtureRequest
) -> None:
    for bug, run in wrong.items():
        with pytest.raises(Wrong):
            run(request.getfixturevalue(flavour), bug)


@pytest.mark.parametrize("flavour", BLIND)
def test_what_a_flavour_cannot_see(flavour: str, request: pytest.FixtureRequest) -> None:
    for bug, run in BLIND[flavour].items():
        run(request.getfixturevalue(flavour), bug)


@pytest.mark.parametrize("arrival", Arrival)
def test_copies_that_arrive_late_or_early_change_no_right_kernel(
    arrival: Arrival, emulator: Emulator
) -> None:
    for seed in SEEDS:
        emulator.set_seed(seed)
        emulator.set_arrival(arrival)
        run_matmul(emulator, Bug.NONE)


@pytest.mark.parametrize(
    ("accumulation", "last_places"),
    [(Accumulation.EXACT, 8), (Accumulation.SEQUENTIAL, 0), (Accumulation.TRUNCATING, 7)],
)
def test_three_ways_in_which_tensor_cores_add_up(
    accumulation: Accumulation, last_places: int, emulator: Emulator
) -> None:
    # 1 and 15 halves of its last place.
    a, c = torch.full((1, 16), 2.0**-12), torch.zeros(1, 1)
    a[0, 0] = 1
    emulator.set_accumulation(accumulation)
    call(emulator, "matmul", Bug.NONE, a.bfloat16(), a.bfloat16(), c, 1, 1, 16)
    assert c.item() == 1 + last_places * 2.0**-23


def bits(predicate: Callable[[int], bool]) -> int:
    return sum(1 << lane for lane in range(32) if predicate(lane))


def test_builtins_do_what_the_programming_guide_says(emulator: Emulator) -> None:
    expected: list[Callable[[int], int]] = [
        lambda lane: lane - 3 if lane >= 3 else lane,
        lambda lane: lane + 3 if lane < 29 else lane,
        lambda lane: lane ^ 5,
        lambda lane: lane // 8 * 8 + 1,
        lambda lane: (lane if lane % 4 == 3 else lane + 1) << 40,
        lambda lane: bits(lambda other: other % 3 == 0),
        lambda lane: 1,
        lambda lane: 0,
        lambda lane: bits(lambda other: other % 8 == lane % 8),
        lambda lane: sum(range(32)),
        lambda lane: 5,
        lambda lane: 31,
        lambda lane: 64,
        lambda lane: 0xFFFFFFFF,
        lambda lane: 7,
        lambda lane: 5,
        lambda lane: 0,
        lambda lane: 1,
        lambda lane: 31 - lane,
        lambda lane: lane + 1,
        lambda lane: 1 << (31 - lane),
        lambda lane: lane,
        lambda lane: 3,
        lambda lane: 0x3F800000,
        lambda lane: 32 * 1000 + 1,
    ]
    out = torch.full((32, len(expected)), -1)
    call(emulator, "builtins", out)
    assert out.tolist() == [[f(lane) for f in expected] for lane in range(32)]


def test_atomics_return_and_leave_what_they_should(emulator: Emulator) -> None:
    values = torch.tensor([40, 7, 7, 0xFF, 0, 0xF, 5, 5, 0, 99], dtype=torch.int32)
    call(emulator, "atomics", values)
    # Of 32 increments from 5 modulo 10, and as many decrements.
    assert values.tolist() == [8, 0, 31, 0, -1, ~0xF, (5 + 32) % 10, (5 - 32) % 10, 32, 31]


@pytest.mark.parametrize(
    ("grid_y", "threads", "shared", "allowed", "message"),
    [
        (1, 1025, 0, 0, r"expected 1 to 1024 threads a block.*\(1025, 1, 1\)"),
        (1, 0, 0, 0, r"expected 1 to 1024 threads a block.*\(0, 1, 1\)"),
        (0, 32, 0, 0, r"expected a grid of at least 1.*\(1, 0, 1\)"),
        (65536, 32, 0, 0, r"expected a grid of .* 65535"),
        (1, 32, 48 * 1024 + 1, 48 * 1024, r"at most 49152 bytes of dynamic shared memory"),
        (1, 32, 0, 99 * 1024 + 1, r"at most 101376 bytes of dynamic shared memory, got 101377"),
    ],
)
def test_limits_of_a_launch(
    grid_y: int, threads: int, shared: int, allowed: int, message: str, emulator: Emulator
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(emulator, "empty", grid_y, threads, ctypes.c_size_t(shared), allowed)


def test_more_dynamic_shared_memory_is_there_on_request(emulator: Emulator) -> None:
    call(emulator, "empty", 1, 1024, ctypes.c_size_t(99 * 1024), 99 * 1024)


def test_static_shared_memory_is_limited(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="at most 49152 bytes of static shared memory"):
        call(emulator, "large", torch.zeros(1, dtype=torch.float64))


def test_shared_memory_of_both_kinds_is_limited_together(emulator: Emulator) -> None:
    kib, out = 1024, torch.full((2,), -1, dtype=torch.int32)

    def launch(dynamic: int, allow: bool) -> None:
        call(emulator, "shared_of_both_kinds", ctypes.c_size_t(dynamic), allow, out)

    launch(48 * kib - 8, False)
    with pytest.raises(RuntimeError, match=r"at most 49152 bytes .* 8 static and 49152 dynamic"):
        launch(48 * kib, False)
    launch(48 * kib, True)  # what is allowed once stays so
    assert out.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match=r"at most 101376 bytes .* 8 static and 101376 dynamic"):
        launch(99 * kib, True)


def test_launch_bounds_are_what_nvcc_was_told(plain: Emulator, ptx: Emulator) -> None:
    call(ptx, "bounded", 32)
    call(plain, "bounded", 33)
    with pytest.raises(
        RuntimeError, match=r"at most 32 threads .* __launch_bounds__ .*\(33, 1, 1\)"
    ):
        call(ptx, "bounded", 33)


def test_a_source_that_does_not_compile_shows_what_the_compiler_says(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text("int x = no_such_name;\n")
    with pytest.raises(RuntimeError, match=r"(?s)compiling bad.cu failed: .*no_such_name"):
        library([source], flavour=Flavour.PLAIN)


def test_lines_that_ran_are_known(tmp_path: Path) -> None:
    source = tmp_path / "branch.cu"
    source.write_text(
        """#include "cuda_emulator.h"
__global__ void branch(int n, int* out) {
  if (n > 5)
    out[n] = n / 7;
  else
    for (int i = n; i > 0; --i) out[i] += i;
}
extern "C" const char* run(int n, int* out) {
  return cuda_emulator::message_of([&] { SECATEUR_LAUNCH(branch, 1, 1, 0, nullptr, n, out); });
}
"""
    )
    emulator = load(library([source], flavour=Flavour.CHECKED))
    out = torch.zeros(10, dtype=torch.int32)
    assert {4, 6} <= emulator.lines(source)[0]
    for n, ran in ((0, {6}), (9, {4, 6})):
        call(emulator, "run", n, out)
        assert emulator.lines(source)[1] & {4, 6} == ran


def counted(emulator: Emulator, run: Run) -> list[int]:
    before = emulator.counters()
    run(emulator, Bug.NONE)
    return [b - a for a, b in zip(before, emulator.counters(), strict=True)]


@pytest.mark.parametrize("flavour", ["checked", "ptx"])
def test_bytes_matrix_products_and_launches_are_counted(
    flavour: str, request: pytest.FixtureRequest
) -> None:
    emulator: Emulator = request.getfixturevalue(flavour)
    # Each of 5 blocks adds its part to the sum by an atomic.
    assert counted(emulator, run_sum) == [3000 * 4 + 5 * 4, 5 * 4, 0, 1]
    # Every tile of 32 x 32 fetches what lies within the matrices, and takes 16 products a
    # stage of 32.
    rows, cols, depth = 50, 40, 104
    read = (rows * 2 + cols * 2) * depth * 2
    assert counted(emulator, run_matmul) == [read, rows * cols * 4, 2 * 2 * 4 * 16, 1]
