"""What CUDA kernels should take on an A100 and an H100, from what they load, store and multiply.

These are PREDICTIONS: nothing here was measured. Bytes and products are counted as kernels move
them (``tests/test_roofline.py`` holds the counts to those of the emulator), and divided by what the
machine can do at best. A kernel takes as long as the slowest of these bounds, an op the sum of its
kernels:

  memory        every operand and result once: L2 is to hold what is read again
  L2            all that thread blocks load and store; nothing is served by L1
  tensor cores  mma.sync m16n8k16, padded tiles included
  fp32          multiply-adds outside of tensor cores
  launch        no kernel is over sooner after the one before

On tensor cores the multiprocessor that ends last counts: tiles are dealt out as the kernel does it,
each as long as the bytes that it moves, and a multiprocessor has its share of L2 whatever others
do. What else makes kernels slower is left out: shared memory, which bounds single weights, the last
wave of other kernels, latency, integer work. ``x peak`` is how many times faster than a dense
product that reaches the peak of the data sheet, ``x dense`` than one at the share of it that is
usual. The least certain number is the bandwidth of L2; ``--l2`` asks what another one would make.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench import harness

PASSES = ("fwd", "dX", "dW")
BYTES = {"float32": 4, "bfloat16": 2}
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
BLOCKS = {"bfloat16": (128, 64, 32, 16, 8), "float32": (128, 64, 32, 16, 8, 4, 1)}
SPARSE = 0.1  # single weights and blocks of 4 are not shown at more than that
ROWS = 4096  # of the batch
SHAPE = (4096, 4096)
SIDE = 10240  # of the square tensor that is scored, selected from and masked
PRODUCT_FLOPS = 2 * 16 * 8 * 16  # of an mma.sync m16n8k16


@dataclass(frozen=True)
class Machine:
    """What a GPU can do at best, a second.

    Attributes:
        memory: bytes; data sheet.
        l2: bytes read by all multiprocessors at once; a published microbenchmark.
        tensor_cores: FLOP of dense products of 16 bits; data sheet.
        mma: the share of it that mma.sync reaches; a published microbenchmark.
        fp32: FLOP without tensor cores; data sheet.
        dense: the share of tensor_cores that large dense products reach; an assumption.
    """

    name: str
    multiprocessors: int
    memory: float
    l2: float
    tensor_cores: float
    mma: float
    fp32: float
    dense: float


# Data sheets: "NVIDIA A100 Tensor Core GPU" (80 GB SXM) and "NVIDIA H100 Tensor Core GPU" (SXM),
# without sparsity. L2: gpu-l2-cache of github.com/te42kyfo/gpu-benches, on an A100 80 GB and, for
# want of an SXM, on an H100 PCIe, which has 14 % fewer multiprocessors; an H200, which has as many,
# came to 9.7 TB/s. On the H100 PCIe Chips and Cheese saw 5.5, by other means, and the comments of
# tensor_cores.cuh go by that. mma.sync on Hopper: 62.9 % on average in Luo et al., "Benchmarking
# and Dissecting the Nvidia Hopper GPU Architecture" (arXiv:2402.13499). All but those of
# gpu-benches were written down from memory of these publications: look up what you rely on.
MACHINES = (
    Machine("A100", 108, 2.039e12, 5.4e12, 312e12, 1.0, 19.5e12, 0.85),
    Machine("H100", 132, 3.35e12, 6.9e12, 989.4e12, 0.629, 66.9e12, 0.70),
)
FP32_DENSE = 0.9  # the share of fp32 that large dense products reach; an assumption
LAUNCH = 2.5e-6  # seconds from the start of one kernel to that of the next; an assumption


class Kernel(NamedTuple):
    """What one launch does; bytes are those of global memory.

    Attributes:
        memory: bytes that come from memory or go there once.
        read: bytes of operands and of sums that its threads load.
        written: bytes that they store.
        repeated: of ``read``, what other lanes of the warp load in the same instruction.
        looked_up: bytes of the pattern that threads load, which L1 and broadcasts serve.
        products: mma.sync m16n8k16.
        flops: outside of tensor cores.
        imbalance: how many times as long it takes as with all multiprocessors busy to the end.
        counted: whether the emulator counts it: it does not see memset.
    """

    name: str
    memory: float = 0
    read: int = 0
    written: int = 0
    repeated: int = 0
    looked_up: int = 0
    products: int = 0
    flops: int = 0
    imbalance: float = 1
    counted: bool = True

    def bounds(self, machine: Machine) -> dict[str, float]:
        """Seconds by what bounds them."""
        products = self.products * PRODUCT_FLOPS / (machine.tensor_cores * machine.mma)
        return {
            "memory": self.memory / machine.memory,
            "L2": self.imbalance * (self.read - self.repeated + self.written) / machine.l2,
            "tensor cores": self.imbalance * products,
            "fp32": self.flops / machine.fp32,
            "launch": LAUNCH,
        }


def expected(kernels: Sequence[Kernel], machine: Machine) -> tuple[float, str]:
    """Seconds, and what bounds the kernel that takes most of them."""
    worst = []
    for kernel in kernels:
        bounds = kernel.bounds(machine)
        bound = max(bounds, key=lambda name: bounds[name])
        worst.append((bounds[bound], bound))
    return sum(seconds for seconds, _ in worst), max(worst)[1]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---------------------------------------------------------------- block-sparse products


@dataclass(frozen=True)
class Product:
    """Y = X W^T, dX = dY W or dW = dY^T X; blocks divide the matrix, and there is no bias.

    Attributes:
        name: one of ``PASSES``.
        shape: of W, (out_features, in_features).
        live: the live block columns of each block row, ascending.
        element: bytes; 2 are multiplied by tensor cores where blocks are 8 to 128 wide.
    """

    name: str
    batch: int
    shape: tuple[int, int]
    block: tuple[int, int]
    live: Sequence[Sequence[int]]
    element: int

    @property
    def by_columns(self) -> bool:
        return self.name == "dX"

    @property
    def lines(self) -> Sequence[Sequence[int]]:
        """Where the blocks of each line lie along it: of a block row, or for dX a block column."""
        if not self.by_columns:
            return self.live
        lines: list[list[int]] = [[] for _ in range(self.shape[1] // self.block[1])]
        for row, columns in enumerate(self.live):
            for column in columns:
                lines[column].append(row)
        return lines

    @property
    def n_blocks(self) -> int:
        return sum(map(len, self.live))

    @property
    def weights(self) -> int:
        return self.n_blocks * self.block[0] * self.block[1]

    @property
    def memory(self) -> int:
        """Bytes of operands and result, once, with the index of each block."""
        both = self.batch * sum(self.shape) * self.element
        return both + self.weights * self.element + 4 * self.n_blocks


def kernels_of(product: Product, multiprocessors: int) -> list[Kernel]:
    """What the op launches."""
    widths = {8, 16, 32, 64, 128}
    if product.element == 2 and widths.issuperset(product.block):
        kind = dw_on_tensor_cores if product.name == "dW" else dsd_on_tensor_cores
        return kind(product, multiprocessors)
    if product.name != "dW":
        return dsd_by_tiles(product)
    return dw_by_outer_products(product) if product.block[0] >= 8 else dw_by_samples(product)


# csrc/block_sparse/tensor_cores.cuh

TILE, DEPTH, THREADS, STAGES, GROUP, QUEUE_PASSES = 128, 32, 128, 4, 8, 32
PIECE = 24  # bytes
RINGS = 160 << 10  # bytes on a multiprocessor


def rings_at_once(width: int) -> int:
    """On a multiprocessor."""
    return RINGS // (STAGES * (TILE + width) * DEPTH * 2)


def products_of_stages(depth: int, width: int) -> int:
    return ceil_div(depth, DEPTH) * (TILE // 16) * (width // 8) * (DEPTH // 16)


def cut(length: int, longest: int) -> list[int]:
    """The lengths of the pieces of a line; one if it is empty."""
    count = max(1, ceil_div(length, longest))
    ends = [length * i // count for i in range(count + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def imbalance(tiles: Iterable[float], multiprocessors: int, at_once: int) -> float:
    """How many times as long as evenly spread work takes until all tiles are done.

    A multiprocessor does the same work a second whatever it holds, and its tiles share that.

    Args:
        tiles: how much work each is, in the order in which they are taken.
        at_once: tiles that a multiprocessor holds.
    """
    left = iter(tiles)
    work = 0.0
    # Of each: what every tile there has had since it is there, and at how much it will be done.
    had = [0.0] * multiprocessors
    done: list[list[float]] = [[] for _ in range(multiprocessors)]

    def take(i: int) -> None:
        nonlocal work
        tile = next(left, None)
        if tile is not None:
            work += tile
            heapq.heappush(done[i], had[i] + tile)

    for _, i in itertools.product(range(at_once), range(multiprocessors)):
        take(i)
    now = 0.0
    events = [(done[i][0] * len(done[i]), i) for i in range(multiprocessors) if done[i]]
    heapq.heapify(events)
    while events:
        now, i = heapq.heappop(events)
        had[i] = heapq.heappop(done[i])
        take(i)
        if done[i]:
            heapq.heappush(events, (now + (done[i][0] - had[i]) * len(done[i]), i))
    return now * multiprocessors / work if work else 1


def in_groups(pieces: Sequence[float], parts: int) -> Iterator[float]:
    """Tiles of pieces and parts of the batch: all pieces for some parts, then for the next."""
    for first in range(0, parts, GROUP):
        for piece in pieces:
            yield from itertools.repeat(piece, min(GROUP, parts - first))


def longest_first(lengths: Sequence[int]) -> list[list[int]]:
    """The passes of the queue: lengths of as many bits, the largest first."""
    passes: dict[int, list[int]] = {}
    for length in lengths:
        passes.setdefault(length.bit_length(), []).append(length)
    return [passes[bits] for bits in sorted(passes, reverse=True)]


def dsd_on_tensor_cores(p: Product, multiprocessors: int) -> list[Kernel]:
    width, inner = p.block[::-1] if p.by_columns else p.block
    parts = ceil_div(p.batch, TILE)
    most = max(1, p.shape[0 if p.by_columns else 1] // inner)
    share = rings_at_once(width) * multiprocessors
    even = max(ceil_div(p.n_blocks * parts, share), ceil_div(1024, inner))
    cuts = p.n_blocks // even if even < most else 0
    lines = [cut(len(line), min(even, most)) for line in p.lines]
    pieces = list(itertools.chain(*lines))
    word = 8 if p.by_columns else 4  # of the pattern, for a block: with its position
    # To find a piece takes two of ptr, and the line of all but the first ones.
    found = cuts * (8 + word) + len(lines) * 8
    products = walked = 0
    for length in pieces:
        products += products_of_stages(length * inner, width)
        walked += length * min(THREADS, 4 * inner)
        if p.by_columns:
            of_a_row = min(width // 8, 4)  # threads; some are too many for a stage
            idle = range(DEPTH, max(DEPTH, THREADS // of_a_row))
            walked += of_a_row * length * min(DEPTH, inner)
            walked += of_a_row * sum(depth // inner < length for depth in idle)
    whole = sum(len(line) == 1 for line in lines)
    cut_pieces = len(pieces) - whole
    sums, result = TILE * width * 4 * parts, p.batch * width * 2

    queued = (len(lines) + cuts) * parts > share
    passes = longest_first(pieces) if queued else [pieces]
    moved = {n: (TILE + width) * n * inner * 2 + TILE * width * 2 for n in set(pieces)}
    tiles = (in_groups([moved[length] for length in each], parts) for each in passes)
    counted = 0  # bytes, by atomics
    looked_up = parts * THREADS * found
    if queued:
        # In a turn one thread counts, and all read the ends of the passes and, if any is left, the
        # piece.
        turns = parts * len(pieces) + share
        counted = 4 * turns
        looked_up = counted + THREADS * (4 * turns + PIECE * parts * len(pieces))
    multiply = Kernel(
        "multiply",
        memory=p.memory,
        read=p.weights // width * p.batch * 2 + parts * p.weights * 2,
        written=whole * result + cut_pieces * sums + counted,
        looked_up=looked_up + parts * walked * word,
        products=parts * products,
        imbalance=imbalance(itertools.chain(*tiles), multiprocessors, rings_at_once(width)),
    )
    kernels = [multiply]
    if queued:
        filled = 4 * (1 + QUEUE_PASSES) + PIECE * len(pieces)
        kernels = [Kernel("schedule", written=filled, looked_up=2 * found), multiply]
    if cuts:
        add = Kernel(
            "add",
            read=cut_pieces * sums,
            written=(len(lines) - whole) * result,
            looked_up=cuts * parts * TILE * width // 8 * (8 + word),
        )
        kernels.append(add)
    return kernels


def dw_on_tensor_cores(p: Product, multiprocessors: int) -> list[Kernel]:
    width, inner = p.block
    longest = TILE // inner
    cuts = p.n_blocks // longest
    items = len(p.lines) + cuts
    most = max(1, p.batch // 512)
    parts = min(max(rings_at_once(width) * multiprocessors // items, 1), most)
    rows = ceil_div(ceil_div(p.batch, parts), DEPTH) * DEPTH
    parts = ceil_div(p.batch, rows)
    pieces = sum(len(cut(len(line), longest)) for line in p.lines if line)
    depths = [min(rows, p.batch - first) for first in range(0, p.batch, rows)]
    found = 12 * cuts + 8 * len(p.lines)
    edges = p.weights // 8 * 4  # the index of a block, for each chunk of its result
    sums, result = pieces * parts * TILE * width * 4, p.weights * 2
    multiply = Kernel(
        "multiply",
        memory=p.memory,
        read=p.batch * 2 * (p.n_blocks * inner + pieces * width),
        written=result if parts == 1 else sums,
        looked_up=parts * (THREADS * found + p.n_blocks * inner * 4) + edges * (parts == 1),
        products=pieces * sum(products_of_stages(depth, width) for depth in depths),
        imbalance=imbalance(
            itertools.chain(*([depth] * pieces for depth in depths)),
            multiprocessors,
            rings_at_once(width),
        ),
    )
    if parts == 1:
        return [multiply]
    add = Kernel("add", read=sums, written=result, looked_up=TILE * width // 8 * found + edges)
    return [multiply, add]


# csrc/block_sparse/lines.cuh, dsd.cuh, sdd.cuh; what they look up in the pattern is not counted,
# but for outer products

WARPS, WANTED_BLOCKS, FP32 = 8, 512, 4


@dataclass(frozen=True)
class Ranges:
    """How lines are dealt out to thread blocks.

    Attributes:
        staged: features of the inner side that are staged, by all ranges.
        passed: the first line of each pass of each range.
        pieces: of each line.
    """

    parts: int
    count: int
    staged: int
    passed: Sequence[int]
    pieces: Sequence[int]


def ranges_of(p: Product, group: int, groups_at_once: int, tiles: int, chunk: int) -> Ranges:
    lines = p.lines
    width, inner = p.block[::-1] if p.by_columns else p.block
    features = p.shape[0 if p.by_columns else 1]
    groups = ceil_div(width, group)
    parts = ceil_div(groups, groups_at_once)
    per_pass = groups_at_once // ceil_div(groups, parts)
    firsts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]  # items
    least = max(1, 4 * features // (p.block[0] * p.block[1]))
    most = max(1, WANTED_BLOCKS // (tiles * parts))
    size = max(ceil_div(firsts[-1], most), least)
    staged, line, passed, pieces = 0, 0, [], [0] * len(lines)
    for begin in range(0, firsts[-1], size):
        end = min(begin + size, firsts[-1])
        while firsts[line + 1] <= begin:
            line += 1
        for first in range(line, len(lines), per_pass):
            if firsts[first] >= end:
                break
            passed.append(first)
            chunks: set[int] = set()
            for i in range(first, min(first + per_pass, len(lines))):
                if firsts[i] >= end:
                    break
                pieces[i] += 1
                before = max(begin - firsts[i] - 1, 0)
                for at in lines[i][before : max(end - firsts[i] - 1, 0)]:
                    chunks.update(range(at * inner // chunk, ((at + 1) * inner - 1) // chunk + 1))
            staged += sum(min(chunk, features - c * chunk) for c in chunks)
    return Ranges(parts, ceil_div(firsts[-1], size), staged, passed, pieces)


def dsd_by_tiles(p: Product) -> list[Kernel]:
    width = p.block[1] if p.by_columns else p.block[0]
    group, rows = (1, 2) if width == 1 else (4, 2) if width <= 4 else (8, 4)
    tile = 32 * (1 if p.batch <= 32 else rows)
    tiles = ceil_div(p.batch, tile)
    ranges = ranges_of(p, group, 16 // group * WARPS, tiles, 64 if group == 8 else 128)
    whole = sum(n == 1 for n in ranges.pieces)
    cut_pieces = sum(n for n in ranges.pieces if n > 1)
    padded = ceil_div(width, group) * group
    multiply = Kernel(
        "multiply",
        memory=p.memory,
        read=(p.batch * ranges.staged * ranges.parts + tiles * p.weights) * p.element,
        written=whole * p.batch * width * p.element + cut_pieces * tiles * tile * width * FP32,
        flops=2 * tiles * tile * (p.weights // width * padded),
    )
    if ranges.count == 1:
        return [multiply]
    join = Kernel(
        "join",
        read=cut_pieces * p.batch * width * FP32,
        written=(len(ranges.pieces) - whole) * p.batch * width * p.element,
    )
    return [multiply, join]


def rounding(p: Product, splits: int) -> list[Kernel]:
    """The sums of all splits to dW, unless they are dW."""
    if splits == 1 and p.element == FP32:
        return []
    return [Kernel("round", read=splits * p.weights * FP32, written=p.weights * p.element)]


def dw_by_outer_products(p: Product) -> list[Kernel]:
    """Where rows of a block are a multiple of 8."""
    rows, cols = p.block
    of_lane = 16 if rows % 16 == 0 else 8
    row_parts = ceil_div(rows, of_lane)
    per_warp = max(1, 32 // cols)  # blocks
    warps = ceil_div(p.n_blocks, per_warp) * ceil_div(cols, 32) * row_parts
    splits = min(max(WANTED_BLOCKS * WARPS // warps, 1), ceil_div(p.batch, 64))
    splits = ceil_div(p.batch, ceil_div(ceil_div(p.batch, splits), 4) * 4)
    lanes = p.n_blocks * cols * row_parts
    dy = lanes * of_lane * p.batch * p.element
    outer = Kernel(
        "outer",
        memory=p.memory,
        read=lanes * p.batch * p.element + dy,
        written=splits * p.weights * FP32,
        repeated=dy - dy // min(cols, 32),
        looked_up=8 * lanes * splits,
        flops=2 * p.weights * p.batch,
    )
    return [outer, *rounding(p, splits)]


def dw_by_samples(p: Product) -> list[Kernel]:
    rows = p.block[0]
    group = 1 if rows == 1 else 4
    tile, held = 64, 64
    tiles = ceil_div(p.batch, tile)
    ranges = ranges_of(p, group, 8 // group * WARPS, 1, 192)
    splits = min(max(WANTED_BLOCKS // ranges.count, 1), tiles)
    of_dy = sum(min(held, p.shape[0] - line * rows) for line in ranges.passed)
    sums = tiles * p.weights * FP32  # added to in memory, by every tile of the batch
    sample = Kernel(
        "sample",
        memory=p.memory,
        read=p.batch * (ranges.staged + of_dy) * p.element + sums,
        written=sums,
        flops=tiles * p.weights * (2 * tile + 31),  # and a sum over lanes, of 32 at once
    )
    zero = Kernel("zero", written=splits * p.weights * FP32, counted=False)
    return [zero, sample, *rounding(p, splits)]


# ---------------------------------------------------------------- what streams its operands

ZERO = Kernel("zero", counted=False)


def streamed(name: str, read: int, written: int) -> Kernel:
    return Kernel(name, memory=read + written, read=read, written=written)


def pack(numel: int) -> list[Kernel]:
    return [streamed("pack", numel, ceil_div(numel, 8))]


def unpack(numel: int) -> list[Kernel]:
    return [streamed("unpack", ceil_div(numel, 8), numel)]


def apply(numel: int, element: int, dead: int) -> list[Kernel]:
    """One tensor in whole vectors of 16 bytes, ``dead`` of which hold something dead, not zero.

    A thread loads a byte of the mask for each vector. A block of 1024 vectors reports what it found
    in four bytes, up to 4096 blocks; here each finds something.
    """
    vectors = numel * element // 16
    reported = 4 * min(ceil_div(vectors, 1024), 4096)
    moved = 16 * dead
    kernel = Kernel(
        "apply",
        memory=2 * moved + numel / 8,
        read=moved + vectors + reported,
        written=moved + reported,
    )
    return [ZERO, kernel]


def nm(numel: int, element: int, inputs: int) -> list[Kernel]:
    """Groups of 1, 2, 4 or 8 that fill the rows."""
    return [ZERO, streamed("aligned", numel * inputs * element, numel // 8)]


def score(
    shape: tuple[int, int], block: tuple[int, int] | None, read: int, state: bool = False
) -> list[Kernel]:
    """Scores of elements or, each block reduced to one number, of blocks that divide the matrix.

    Args:
        read: bytes of weight and gradient, for an element.
        state: whether an averaged state is updated as well.
    """
    numel, updated = shape[0] * shape[1], 4 * state
    read, written = numel * (read + updated), numel * updated
    if block is None:
        return [streamed("elements", read, written + 4 * numel)]
    rows, cols = block
    scores = numel // (rows * cols)
    few = scores < 256 and rows * cols > 1 << 14
    if rows == 1 or cols <= (32 if few else 256):
        return [streamed("blocks", read, written + 4 * scores)]
    columns = 4 * numel // rows  # of a strip each, reduced first
    return [
        streamed("blocks", read, written + columns),
        Kernel("rows", read=columns, written=4 * scores),
    ]


def select(numel: int, element: int, inputs: int, tensors: int = 1) -> list[Kernel]:
    """Kernels of a selection whose interval holds the k-th, as it nearly always does.

    The sweep is exact but for the table of tensors, which L1 serves, and the pool, of which all
    others are about: of it these are the most that they move. What has no more to do starts and
    returns.
    """
    capacity = min(numel, 4096 + round((25 * numel**2) ** (1 / 3)))
    pool = 12 * capacity  # a key and an index each
    words = 19 + 14 * tensors  # of 8 bytes, of which the parameters of a kernel hold 510
    upload = [Kernel("upload")] * ceil_div(words, 510) + [ZERO]
    sweep = streamed("sweep", numel * inputs * element, ceil_div(numel, 8))
    if numel <= capacity:
        return [*upload, sweep, *[Kernel("narrow", read=2 * pool)] * 4, Kernel("fill", read=pool)]
    sampled = min(capacity, numel // 4)
    histograms, left = 3, numel
    while left > capacity:
        left, histograms = ceil_div(left, 1024), histograms + 1
    return [
        *upload,
        streamed("sample", sampled * inputs * element, pool),
        *[Kernel("narrow", read=2 * pool)] * 3,
        sweep._replace(written=sweep.written + pool),
        *[Kernel("histogram")] * histograms,
        Kernel("sweep again"),
        *[Kernel("narrow", read=2 * pool)] * 4,
        Kernel("fill", read=pool),
    ]


# ---------------------------------------------------------------- tables


def live_blocks(shape: tuple[int, int], block: int, density: float) -> list[list[int]]:
    """The live columns of each block row: the density's share of all blocks, at random."""
    n, k = (size // block for size in shape)
    live: list[list[int]] = [[] for _ in range(n)]
    for at in sorted(random.Random(0).sample(range(n * k), round(density * n * k))):
        live[at // k].append(at % k)
    return live


def dense_seconds(batch: int, shape: tuple[int, int], dtype: str, machine: Machine) -> list[float]:
    """Of one product, by the peak and by the share of it that is usual."""
    n, k = shape
    traffic = (batch * (n + k) + n * k) * BYTES[dtype]
    half = dtype == "bfloat16"
    peak, share = (machine.tensor_cores, machine.dense) if half else (machine.fp32, FP32_DENSE)
    return [
        max(2 * batch * n * k / (peak * reached), traffic / machine.memory, LAUNCH)
        for reached in (1.0, share)
    ]


def row(machine: Machine, op: str, dtype: str, kernels: Sequence[Kernel]) -> dict[str, Any]:
    seconds, bound = expected(kernels, machine)
    return {
        "GPU": machine.name,
        "op": op,
        "dtype": dtype,
        "rows": None,
        "shape": None,
        "block": None,
        "density": None,
        "bound": bound,
        "MB memory": sum(k.memory for k in kernels) / 1e6,
        "MB L2": sum(k.read - k.repeated + k.written for k in kernels) / 1e6,
        "predicted us": seconds * 1e6,
        "x peak": None,
        "x dense": None,
    }


def product_rows(
    machine: Machine, rows: int, shape: tuple[int, int], dtype: str, block: int, density: float
) -> Iterator[dict[str, Any]]:
    """All passes, and their sum."""
    live = live_blocks(shape, block, density)
    case = {"rows": rows, "shape": f"{shape[0]}x{shape[1]}", "block": block, "density": density}
    passes = {}
    for name in PASSES:
        product = Product(name, rows, shape, (block, block), live, BYTES[dtype])
        passes[name] = kernels_of(product, machine.multiprocessors)
    passes["fwd+bwd"] = list(itertools.chain(*passes.values()))
    for name, kernels in passes.items():
        line = row(machine, name, dtype, kernels) | case
        dense = dense_seconds(rows, shape, dtype, machine)
        products = 1 if name in PASSES else len(PASSES)
        for column, seconds in zip(("x peak", "x dense"), dense, strict=True):
            line[column] = products * seconds * 1e6 / line["predicted us"]
        yield line


def stream_rows(machine: Machine, side: int, dtype: str) -> Iterator[dict[str, Any]]:
    """What makes and applies masks of one square tensor."""
    shape, numel, element = (side, side), side * side, BYTES[dtype]
    cases = [
        ("score |g*w|", None, score(shape, None, 2 * element)),
        ("score |g*w| 32x32", None, score(shape, (32, 32), 2 * element)),
        ("score |g*w| by rows", None, score(shape, (1, side), 2 * element)),
        ("score |g*w| by columns", None, score(shape, (side, 1), 2 * element)),
        ("score_update_ obd", None, score(shape, None, 2 * element, state=True)),
        ("select |g*w|", None, select(numel, element, 2)),
        ("nm_mask |g*w|", None, nm(numel, element, 2)),
    ]
    vectors = numel * element // 16
    for density in (0.5, 0.1):
        dead = round(vectors * (1 - density ** (16 // element)))
        cases.append(("mask_", density, apply(numel, element, dead)))
    for op, share, kernels in cases:
        yield row(machine, op, dtype, kernels) | {"shape": f"{side}x{side}", "density": share}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [machine.name for machine in MACHINES]
    parser.add_argument("--gpu", choices=names, help="default: all")
    parser.add_argument("--rows", type=harness.positive, default=ROWS, help="of the batch")
    parser.add_argument(
        "--shape", type=harness.positive, nargs=2, default=SHAPE, metavar=("N", "K")
    )
    parser.add_argument("--dtype", choices=BYTES, help="default: both")
    parser.add_argument("--density", type=float, choices=DENSITIES, help="default: all")
    parser.add_argument("--products", action="store_true", help="block-sparse products only")
    parser.add_argument("--l2", type=float, metavar="TB/S", help="instead of what is published")
    harness.output_arguments(parser)
    args = parser.parse_args()
    machines = [machine for machine in MACHINES if args.gpu in (None, machine.name)]
    if args.l2 is not None:
        if not 0 < args.l2 < math.inf:
            parser.error(f"expected --l2 to be a positive number of TB/s, got {args.l2}")
        machines = [replace(machine, l2=args.l2 * 1e12) for machine in machines]
    shape = (args.shape[0], args.shape[1])
    if shape[0] % max(BLOCKS["bfloat16"]) or shape[1] % max(BLOCKS["bfloat16"]):
        parser.error(f"expected a shape that blocks of 128 divide, got {shape[0]} x {shape[1]}")
    sparsest = args.density or min(DENSITIES)
    largest = max(max(blocks) for blocks in BLOCKS.values())
    if not any(live_blocks(shape, largest, sparsest)):
        parser.error(
            f"expected a shape with a live block of {largest} at density {sparsest}, got "
            f"{shape[0]} x {shape[1]}"
        )

    print(
        "PREDICTED from counted bytes and products and from what a GPU does at best: NOT MEASURED"
    )
    for machine in machines:
        print(
            f"{machine.name}: memory {machine.memory / 1e12:.2f} TB/s, "
            f"L2 {machine.l2 / 1e12:.2f} TB/s, "
            f"mma.sync {machine.tensor_cores * machine.mma / 1e12:.0f} TFLOP/s, "
            f"fp32 {machine.fp32 / 1e12:.1f} TFLOP/s"
        )
    rows: list[dict[str, Any]] = []
    for machine, dtype in itertools.product(machines, [args.dtype] if args.dtype else BYTES):
        for block in BLOCKS[dtype]:
            for density in [args.density] if args.density else DENSITIES:
                if block >= 8 or density <= SPARSE:
                    rows += product_rows(machine, args.rows, shape, dtype, block, density)
        if not args.products:
            rows += stream_rows(machine, SIDE, dtype)
    if not args.products:
        for machine in machines:
            rows.append(row(machine, "pack_mask", "bool", pack(SIDE**2)))
            rows.append(row(machine, "unpack_mask", "bool", unpack(SIDE**2)))
    harness.print_table(rows)
    harness.save(rows, args)


if __name__ == "__main__":
    main()
