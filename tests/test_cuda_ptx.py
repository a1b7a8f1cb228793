"""The translator of PTX: what instructions give, as the PTX ISA has it, and what it refuses."""

from __future__ import annotations

import ctypes
import math
import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import Emulator, Flavour, contraction, library, load, nvcc, ptx_of
from cuda_emulator.ops import FUSED, KERNELS
from cuda_emulator.ptx import PtxError, kernels, translate
from cuda_emulator.ptx.reader import statements
from test_cuda_build import tool

from secateur.ops import _cuda

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc, which makes the PTX")


def bits(letter: str, value: float) -> int:
    """Of a number as a half (e), float (f) or double (d)."""
    return int.from_bytes(struct.pack(f"<{letter}", value), "little")


def h(value: float) -> int:
    return bits("e", value)


def f(value: float) -> int:
    return bits("f", value)


def d(value: float) -> int:
    return bits("d", value)


NAN, INFINITY, TINY = math.nan, math.inf, 2.0**-140
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
# A predicate is made of a number, and the other way round.
IF = "{{ .reg .pred p; {} selp.u32 %0, 1, 0, p; }}".format
WITH = "{{ .reg .pred q; setp.ne.u32 q, {}, 0; {} }}".format

# Instruction; widths of result and operands (h, r, l for 16, 32, 64 bits); operands and result.
INSTRUCTIONS: list[tuple[str, str, list[tuple[int, ...]]]] = [
    ("add.s32 %0, %1, %2;", "rrr", [(M32, 1, 0), (1 << 31, 1 << 31, 0)]),
    ("sub.u16 %0, %1, %2;", "hhh", [(0, 1, 0xFFFF)]),
    ("add.s64 %0, %1, -1;", "ll", [(0, M64)]),
    ("mul.lo.s32 %0, %1, %2;", "rrr", [(M32, 3, M32 - 2), (1 << 16, 1 << 16, 0)]),
    ("mul.hi.u32 %0, %1, %2;", "rrr", [(M32, M32, M32 - 1)]),
    ("mul.hi.s32 %0, %1, %2;", "rrr", [(M32, M32, 0), (1 << 31, 2, M32)]),
    ("mul.hi.u64 %0, %1, %2;", "lll", [(M64, M64, M64 - 1)]),
    ("mul.wide.u32 %0, %1, %2;", "lrr", [(M32, M32, (M32 * M32))]),
    ("mul.wide.s32 %0, %1, %2;", "lrr", [(M32, 5, M64 - 4)]),
    ("mul.wide.u16 %0, %1, %2;", "rhh", [(0xFFFF, 0xFFFF, 0xFFFF * 0xFFFF)]),
    ("mad.lo.u32 %0, %1, %2, %3;", "rrrr", [(1 << 31, 2, 7, 7)]),
    ("mad.hi.u32 %0, %1, %2, %3;", "rrrr", [(1 << 31, 4, 7, 9)]),
    ("mad.wide.u32 %0, %1, %2, %3;", "lrrl", [(M32, 2, 3, 2 * M32 + 3)]),
    ("div.s32 %0, %1, %2;", "rrr", [(M32 - 6, 2, M32 - 2), (1 << 31, M32, 1 << 31)]),
    ("rem.s32 %0, %1, %2;", "rrr", [(M32 - 6, 2, M32), (1 << 31, M32, 0)]),
    ("div.u64 %0, %1, %2;", "lll", [(M64, 10, M64 // 10)]),
    ("neg.s32 %0, %1;", "rr", [(1 << 31, 1 << 31), (1, M32)]),
    ("abs.s64 %0, %1;", "ll", [(M64, 1), (5, 5)]),
    ("min.s32 %0, %1, %2;", "rrr", [(M32, 0, M32)]),
    ("max.u32 %0, %1, %2;", "rrr", [(M32, 0, M32)]),
    ("not.b16 %0, %1;", "hh", [(0xF0F0, 0x0F0F)]),
    ("xor.b64 %0, %1, %2;", "lll", [(M64, 1, M64 - 1)]),
    ("shl.b32 %0, %1, %2;", "rrr", [(3, 31, 1 << 31), (3, 32, 0), (3, M32, 0)]),
    ("shr.u32 %0, %1, %2;", "rrr", [(1 << 31, 31, 1), (1 << 31, 32, 0)]),
    ("shr.s32 %0, %1, %2;", "rrr", [(1 << 31, 31, M32), (1 << 31, 40, M32), (7, 40, 0)]),
    ("shr.s16 %0, %1, %2;", "hhr", [(0x8000, 3, 0xF000), (0x8000, 16, 0xFFFF)]),
    ("shr.b64 %0, %1, %2;", "llr", [(1 << 63, 63, 1), (1 << 63, 64, 0)]),
    ("shf.l.wrap.b32 %0, %1, %2, %3;", "rrrr", [(0x80000000, 1, 1, 3), (5, 6, 32, 6)]),
    ("shf.r.wrap.b32 %0, %1, %2, %3;", "rrrr", [(2, 1, 1, 0x80000001), (5, 6, 33, 2)]),
    ("shf.l.clamp.b32 %0, %1, %2, %3;", "rrrr", [(5, 6, 33, 5)]),
    ("shf.r.clamp.b32 %0, %1, %2, %3;", "rrrr", [(5, 6, 40, 6)]),
    ("popc.b64 %0, %1;", "rl", [(M64, 64), (0, 0)]),
    ("clz.b32 %0, %1;", "rr", [(0, 32), (1, 31)]),
    ("clz.b64 %0, %1;", "rl", [(0, 64), (1 << 62, 1)]),
    ("brev.b32 %0, %1;", "rr", [(1, 1 << 31), (0x0000000A, 0x50000000)]),
    ("bfind.u32 %0, %1;", "rr", [(0, M32), (1, 0), (M32, 31)]),
    ("bfind.s32 %0, %1;", "rr", [(M32, M32), (M32 - 1, 0), (4, 2)]),
    ("bfind.shiftamt.u32 %0, %1;", "rr", [(0, M32), (1, 31), (M32, 0)]),
    (
        "bfe.u32 %0, %1, %2, %3;",
        "rrrr",
        [(0xABCD1234, 8, 8, 0x12), (0xF0000000, 28, 8, 0xF), (M32, 32, 4, 0), (M32, 3, 0, 0)],
    ),
    (
        "bfe.s32 %0, %1, %2, %3;",
        "rrrr",
        [(0x00000080, 4, 4, M32 - 7), (0x80000000, 30, 8, M32 - 1), (0x80000000, 40, 4, M32)],
    ),
    ("bfe.u64 %0, %1, %2, %3;", "llrr", [(1 << 40, 40, 64, 1)]),
    (
        "bfi.b32 %0, %1, %2, %3, %4;",
        "rrrrr",
        [(0xF, 0, 8, 4, 0xF00), (M32, 5, 28, 8, 0xF0000005), (1, 7, 0, 0, 7), (1, 7, 32, 4, 7)],
    ),
    ("bfi.b64 %0, %1, %2, %3, %4;", "lllrr", [(3, 1, 62, 2, 3 << 62 | 1)]),
    (
        "prmt.b32 %0, %1, %2, %3;",
        "rrrr",
        [(0x33221100, 0x77665544, 0x7520, 0x77552200), (0x00008000, 0, 0x9999, M32)],
    ),
    ("lop3.b32 %0, %1, %2, %3, 0xCA;", "rrrr", [(0xF0, 0xAA, 0x55, 0xA5)]),
    ("lop3.b32 %0, %1, %2, %3, 0x80;", "rrrr", [(0x0F, 0x3C, 0xFF, 0x0C)]),
    # Floating point: nothing is contracted, nothing flushed, NaN loses against numbers.
    ("add.rn.f32 %0, %1, %2;", "rrr", [(f(1), f(2**-25), f(1)), (f(TINY), f(TINY), f(2 * TINY))]),
    ("sub.f64 %0, %1, %2;", "lll", [(d(1), d(3), d(-2))]),
    ("mul.rn.f32 %0, %1, %2;", "rrr", [(f(1 + 2**-23), f(1 + 2**-23), f(1 + 2**-22))]),
    (
        "fma.rn.f32 %0, %1, %2, %3;",
        "rrrr",
        [(f(1 + 2**-23), f(1 + 2**-23), f(-1 - 2**-22), f(2**-46))],
    ),
    (
        "fma.rm.f32 %0, %1, %2, %3;",
        "rrrr",
        [
            (f(1), f(1), f(2**-30), f(1)),
            (f(1), f(1), f(-(2**-30)), f(1 - 2**-24)),
            (f(1), f(-1), f(-(2**-60)), f(-1 - 2**-23)),
            (f(1), f(1), f(-1), f(-0.0)),
        ],
    ),
    (
        "fma.rz.f32 %0, %1, %2, %3;",
        "rrrr",
        [(f(1), f(1), f(-(2**-30)), f(1 - 2**-24)), (f(-1), f(1), f(2**-30), f(2**-24 - 1))],
    ),
    (
        "add.rz.f32 %0, %1, %2;",
        "rrr",
        [(f(-1), f(-(2**-30)), f(-1)), (f(-1), f(1), f(0)), (f(1), f(2**-24), f(1))],
    ),
    ("div.rn.f32 %0, %1, %2;", "rrr", [(f(1), f(3), f(1 / 3)), (f(1), f(0), f(INFINITY))]),
    ("div.rn.f64 %0, %1, %2;", "lll", [(d(1), d(3), d(1 / 3))]),
    ("rcp.rn.f32 %0, %1;", "rr", [(f(3), f(1 / 3))]),
    ("sqrt.rn.f32 %0, %1;", "rr", [(f(2), f(math.sqrt(2)))]),
    ("sqrt.rn.f64 %0, %1;", "ll", [(d(2), d(math.sqrt(2)))]),
    ("rcp.approx.ftz.f32 %0, %1;", "rr", [(f(4), f(0.25)), (f(-TINY), f(-INFINITY))]),
    ("rcp.approx.ftz.f64 %0, %1;", "ll", [(d(4) + 99, d(0.25))]),
    ("ex2.approx.ftz.f32 %0, %1;", "rr", [(f(-3), f(0.125)), (f(-130), f(0))]),
    ("rsqrt.approx.f32 %0, %1;", "rr", [(f(4), f(0.5))]),
    ("lg2.approx.f32 %0, %1;", "rr", [(f(8), f(3))]),
    ("neg.f32 %0, %1;", "rr", [(f(0), f(-0.0))]),
    ("abs.f64 %0, %1;", "ll", [(d(-2), d(2))]),
    (
        "min.f32 %0, %1, %2;",
        "rrr",
        [(f(NAN), f(1), f(1)), (f(1), f(NAN), f(1)), (f(0), f(-0.0), f(-0.0))],
    ),
    ("max.f32 %0, %1, %2;", "rrr", [(f(NAN), f(1), f(1)), (f(-0.0), f(0), f(0))]),
    ("copysign.f32 %0, %1, %2;", "rrr", [(f(-1), f(2), f(-2))]),
    # Comparisons.
    (IF("setp.lt.s32 p, %1, %2;"), "rrr", [(M32, 0, 1), (0, M32, 0)]),
    (IF("setp.lo.u32 p, %1, %2;"), "rrr", [(M32, 0, 0), (0, M32, 1)]),
    (IF("setp.hs.u64 p, %1, %2;"), "rll", [(M64, 0, 1), (5, 5, 1)]),
    (IF("setp.eq.f32 p, %1, %2;"), "rrr", [(f(0), f(-0.0), 1), (f(NAN), f(NAN), 0)]),
    (IF("setp.ne.f32 p, %1, %2;"), "rrr", [(f(1), f(2), 1), (f(NAN), f(1), 0)]),
    (IF("setp.neu.f32 p, %1, %2;"), "rrr", [(f(1), f(1), 0), (f(NAN), f(1), 1)]),
    (IF("setp.ltu.f64 p, %1, %2;"), "rll", [(d(1), d(2), 1), (d(NAN), d(2), 1), (d(2), d(1), 0)]),
    (IF("setp.num.f32 p, %1, %2;"), "rrr", [(f(1), f(1), 1), (f(NAN), f(1), 0)]),
    (IF("setp.nan.f32 p, %1, %2;"), "rrr", [(f(1), f(1), 0), (f(1), f(NAN), 1)]),
    (
        WITH("%3", IF("setp.eq.and.u32 p, %1, %2, !q;")),
        "rrrr",
        [(1, 1, 0, 1), (1, 1, 1, 0), (1, 2, 0, 0)],
    ),
    (
        WITH("%3", IF(".reg .pred t; setp.eq.or.u32 t|p, %1, %2, q;")),
        "rrrr",
        [(1, 1, 0, 0), (1, 1, 1, 1), (1, 2, 0, 1)],
    ),
    (WITH("%1", "@q mov.u32 %0, 1; @!q mov.u32 %0, 2;"), "rr", [(1, 1), (0, 2)]),
    (WITH("%1", IF("not.pred p, q;")), "rr", [(1, 0), (0, 1)]),
    (WITH("%3", "selp.f32 %0, %1, %2, q;"), "rrrr", [(5, 6, 1, 5), (5, 6, 0, 6)]),
    # Conversions.
    ("cvt.u32.u64 %0, %1;", "rl", [(1 << 40 | 7, 7)]),
    ("cvt.s64.s32 %0, %1;", "lr", [(M32, M64)]),
    ("cvt.u64.u32 %0, %1;", "lr", [(M32, M32)]),
    ("cvt.s32.s8 %0, %1;", "rr", [(0x180, M32 - 127), (0x17F, 127)]),
    ("cvt.u32.u8 %0, %1;", "rr", [(0x180, 0x80)]),
    ("cvt.s16.s32 %0, %1;", "rr", [(0x18000, 0xFFFF8000)]),
    ("cvt.rn.f32.s32 %0, %1;", "rr", [(M32, f(-1)), (0x7FFFFFFF, f(2**31))]),
    ("cvt.rn.f32.u64 %0, %1;", "rl", [(M64, f(2**64))]),
    ("cvt.rn.f64.u32 %0, %1;", "lr", [(M32, d(M32))]),
    ("cvt.rn.f32.u16 %0, %1;", "rh", [(0xFFFF, f(65535))]),
    (
        "cvt.rni.s32.f32 %0, %1;",
        "rr",
        [(f(2.5), 2), (f(3.5), 4), (f(-2.5), M32 - 1), (f(NAN), 0), (f(1e20), 0x7FFFFFFF)],
    ),
    ("cvt.rzi.u32.f32 %0, %1;", "rr", [(f(-5), 0), (f(2.9), 2), (f(1e20), M32)]),
    ("cvt.rmi.s32.f32 %0, %1;", "rr", [(f(-2.5), M32 - 2)]),
    ("cvt.rpi.s32.f64 %0, %1;", "rl", [(d(2.1), 3)]),
    ("cvt.rzi.s64.f32 %0, %1;", "lr", [(f(NAN), 1 << 63), (f(-1e30), 1 << 63)]),
    ("cvt.rni.f32.f32 %0, %1;", "rr", [(f(2.5), f(2)), (f(-0.4), f(-0.0))]),
    ("cvt.rmi.f64.f64 %0, %1;", "ll", [(d(-2.5), d(-3))]),
    ("cvt.sat.f32.f32 %0, %1;", "rr", [(f(-1), 0), (f(0.5), f(0.5)), (f(7), f(1)), (f(NAN), 0)]),
    ("cvt.f64.f32 %0, %1;", "lr", [(f(1.5), d(1.5))]),
    ("cvt.rn.f32.f64 %0, %1;", "rl", [(d(1 + 2**-24 + 2**-40), f(1 + 2**-23))]),
    ("cvt.f32.f16 %0, %1;", "rh", [(h(1.5), f(1.5)), (1, f(2**-24)), (h(-INFINITY), f(-INFINITY))]),
    (
        "cvt.rn.f16.f32 %0, %1;",
        "hr",
        [(f(1 + 2**-11), h(1)), (f(65520), h(INFINITY)), (f(2**-25), 0), (f(NAN), 0x7FFF)],
    ),
    (
        "cvt.rn.bf16x2.f32 %0, %1, %2;",
        "rrr",
        [(f(1), f(2), 0x3F804000), (f(1 + 2**-8), f(1 + 3 * 2**-8), 0x3F803F82)],
    ),
    ("cvt.rn.f16x2.f32 %0, %1, %2;", "rrr", [(f(1), f(2), h(1) << 16 | h(2))]),
    # Moves.
    ("mov.b64 %0, {%1, %2};", "lrr", [(1, 2, 2 << 32 | 1)]),
    ("{ .reg .b32 t; mov.b64 {t, %0}, %1; }", "rl", [(2 << 32 | 1, 2)]),
    ("mov.b32 %0, {%1, %2};", "rhh", [(1, 2, 2 << 16 | 1)]),
    ("mov.u32 %0, %%laneid;", "r", [(0,)]),
    ("mov.u32 %0, %%lanemask_gt;", "r", [(M32 - 1,)]),
    ("mov.u32 %0, %%ntid.x;", "r", [(1,)]),
    ("redux.sync.min.u32 %0, %1, 1;", "rr", [(7, 7)]),
    ("activemask.b32 %0;", "r", [(1,)]),
]


def kernel_of_instructions() -> str:
    types = {"h": "uint16_t", "r": "uint32_t", "l": "uint64_t"}
    lines = []
    i = 0
    for text, widths, examples in INSTRUCTIONS:
        for _ in examples:
            operands = ", ".join(
                f'"{width}"(static_cast<{types[width]}>(in[{8 * i + j}]))'
                for j, width in enumerate(widths[1:])
            )
            # Every instruction writes all its result, but to a compiler it may not look like it.
            result = (
                f'{types[widths[0]]} out_{i} = 0; asm volatile("{text}" : "+{widths[0]}"(out_{i})'
            )
            lines.append(f"{result} : {operands}); out[{i}] = out_{i};")
            i += 1
    return "\n".join(lines)


SOURCE = """#include <cstdint>
#include "common/cuda.cuh"
namespace {
__global__ void instructions(const uint64_t* in, uint64_t* out) {
#if !defined(SECATEUR_CUDA_EMULATOR)
BODY
#endif
}
}
#if defined(SECATEUR_CUDA_EMULATOR)
extern "C" const char* run(const uint64_t* in, uint64_t* out) {
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(instructions, 1, 1, 0, nullptr, in, out); });
}
#endif
"""


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


@needs_nvcc
def test_instructions_give_what_the_isa_says(tmp_path: Path) -> None:
    source = tmp_path / "instructions.cu"
    source.write_text(SOURCE.replace("BODY", kernel_of_instructions()))
    # ptxas knows whether these are instructions at all.
    include = Path(__file__).parent.parent / "csrc"
    command = [str(nvcc()), "-cubin", "-arch=sm_80", "-std=c++20", f"-I{include}", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "cubin")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    emulator = load(library([source], flavour=Flavour.PTX))
    examples = [(text, *example) for text, _, found in INSTRUCTIONS for example in found]
    inputs = torch.tensor([[signed(v) for v in [*e[1:-1], *[0] * 8][:8]] for e in examples])
    out = torch.full((len(examples),), -1)
    emulator.add_buffer(inputs.data_ptr(), inputs.nbytes)
    emulator.add_buffer(out.data_ptr(), out.nbytes, initialised=False)
    emulator.call("run", ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    for (text, *values), got in zip(examples, out.tolist(), strict=True):
        shown = f"{text} of {[hex(v) for v in values[:-1]]}: expected {values[-1]:#x}"
        assert got & M64 == values[-1], f"{shown}, got {got & M64:#x}"


# What the project's kernels hardly need, but nvcc makes of plain CUDA: calls of functions that it
# does not inline, tables, jumps by index, arrays in local memory, its mathematical functions.
PLAIN_CUDA = """#include <cmath>
#include <cstdint>
#include "common/cuda.cuh"
#if defined(SECATEUR_CUDA_EMULATOR)
#define SECATEUR_NOINLINE
#else
#define SECATEUR_NOINLINE __noinline__
#endif
namespace {
struct Pair { int64_t a; char b; };
SECATEUR_NOINLINE __device__ Pair shifted(Pair p, int by) {
  p.a += by;
  p.b -= 1;
  return p;
}
SECATEUR_NOINLINE __device__ int64_t fibonacci(int n) {
  return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}
__constant__ int32_t kTable[4] = {3, 1, 4, 1};
__global__ void integers(int n, const __grid_constant__ Pair pair, int index, int64_t* out) {
  const Pair p = shifted(pair, n);
  out[0] = p.a * 100 + p.b;
  out[1] = fibonacci(n);
  out[2] = kTable[index];
  int local[8];
  for (int i = 0; i < 8; ++i) local[i] = n + i;
  out[3] = local[index] + local[(index + n) % 8];
  switch (index) {
    case 0: out[4] = out[0] + 5; break;
    case 1: out[4] = out[1] * 7; break;
    case 2: out[4] = n - 9; break;
    case 3: out[4] = out[3] / 3; break;
    case 4: out[4] = 1 << n; break;
    case 5: out[4] = n ^ 77; break;
    default: out[4] = -1;
  }
}
__global__ void functions(const double* x, double* out) {
  const float single = static_cast<float>(x[threadIdx.x]);
  const double results[] = {
      expf(single), log1pf(single), tanhf(single), erff(single), sinf(single), log2f(single),
      exp(x[threadIdx.x]), log(x[threadIdx.x]), erfc(x[threadIdx.x]), tanh(x[threadIdx.x]),
  };
  for (int i = 0; i < 10; ++i) out[threadIdx.x * 10 + i] = results[i];
}
}
#if defined(SECATEUR_CUDA_EMULATOR)
extern "C" {
const char* integers_of(int n, int64_t a, int b, int index, int64_t* out) {
  const Pair pair{a, static_cast<char>(b)};
  return cuda_emulator::message_of(
      [&] { SECATEUR_LAUNCH(integers, 1, 1, 0, nullptr, n, pair, index, out); });
}
const char* functions_of(const double* x, int n, double* out) {
  return cuda_emulator::message_of([&] { SECATEUR_LAUNCH(functions, 1, n, 0, nullptr, x, out); });
}
}
#endif
"""


@pytest.fixture(scope="module")
def plain_cuda(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    source = tmp_path_factory.mktemp("ptx") / "plain.cu"
    source.write_text(PLAIN_CUDA)
    return load(library([source], flavour=Flavour.PTX))


def integers_of(emulator: Emulator, n: int, a: int, b: int, index: int) -> list[int]:
    out = torch.zeros(5, dtype=torch.int64)
    emulator.add_buffer(out.data_ptr(), out.nbytes)
    pointer = ctypes.c_void_p(out.data_ptr())
    emulator.call("integers_of", n, ctypes.c_int64(a), b, index, pointer)
    return out.tolist()


@needs_nvcc
def test_calls_tables_jumps_and_local_arrays(plain_cuda: Emulator) -> None:
    fourth = {0: 1405, 1: 56, 2: -3, 3: 5}
    for index, last in fourth.items():
        table, local = [3, 1, 4, 1][index], 6 + index + 6 + (index + 6) % 8
        assert integers_of(plain_cuda, 6, 8, 1, index) == [1400, 8, table, local, last]


@needs_nvcc
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (9, r"out of bounds of the kernel's local arrays at plain.cu:27"),
        (1 << 20, r"out of bounds read of 4 bytes at plain.cu:24"),
    ],
)
def test_bounds_of_tables_and_local_arrays(index: int, message: str, plain_cuda: Emulator) -> None:
    with pytest.raises(RuntimeError, match=message):
        integers_of(plain_cuda, 6, 8, 1, index)


@needs_nvcc
def test_mathematical_functions_of_cuda(plain_cuda: Emulator) -> None:
    x = torch.tensor([0.1, 0.7, 1.5, 4.0, 20.0], dtype=torch.float64)
    out = torch.full((len(x), 10), torch.nan, dtype=torch.float64)
    for t in (x, out):
        plain_cuda.add_buffer(t.data_ptr(), t.nbytes)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
    plain_cuda.call("functions_of", pointers[0], len(x), pointers[1])
    y = x.float().double()
    singles = [y.exp(), y.log1p(), y.tanh(), y.erf(), y.sin(), y.log2()]
    doubles = [x.exp(), x.log(), x.erfc(), x.tanh()]
    torch.testing.assert_close(out[:, :6], torch.stack(singles, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(out[:, 6:], torch.stack(doubles, 1), rtol=1e-15, atol=0)


def instructions_of(ptx: str) -> list[str]:
    """What it consists of, but for places in the source and what nvcc calls that."""
    text = re.sub(r"[0-9a-f]{8}_\d+_cuda_cu_[0-9a-f]{8}", "", ptx)
    return [" ".join(s.text.split()) for s in statements(text) if s.kind not in ("file", "loc")]


def run_by_the_emulator(kernel: Path, arch: str = "compute_80") -> list[str]:
    return instructions_of(ptx_of(kernel, arch, contraction(kernel in FUSED)).read_text("utf-8"))


@needs_nvcc
@pytest.mark.slow_cuda
def test_the_library_carries_the_ptx_that_is_run(tmp_path: Path) -> None:
    subprocess.run([tool("cuobjdump"), "-xptx", "all", _cuda.LIBRARY], check=True, cwd=tmp_path)
    carried = [instructions_of(path.read_text("utf-8")) for path in tmp_path.glob("*.ptx")]
    assert len(carried) == len(KERNELS)
    for kernel in KERNELS:
        assert run_by_the_emulator(kernel) in carried, kernel


# So it is what both kinds of machine code are made of.
@needs_nvcc
@pytest.mark.slow_cuda
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.parent.name)
def test_ptx_for_hopper_is_the_same(kernel: Path) -> None:
    assert run_by_the_emulator(kernel, "compute_90a") == run_by_the_emulator(kernel)


ENTRY = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{{
  .reg .pred %p<3>;
  .reg .b32 %r<4>;
  .reg .f32 %f<4>;
  .reg .b64 %rd<4>;
  .loc 1 17 3
  {}
  ret;
}}
  .file 1 "k.cu"
"""


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("dp4a.s32.s32 %r0, %r1, %r2, %r3;", "an instruction that is known"),
        ("add.sat.s32 %r0, %r1, %r2;", "an instruction that is known"),
        ("add.ftz.f32 %f0, %f1, %f2;", "an instruction that is known"),
        ("setp.lt.ftz.f32 %p0, %f1, %f2;", "an instruction that is known"),
        ("ld.acquire.gpu.global.u32 %r0, [%rd1];", "an instruction that is known"),
        ("ld.global.v4.u32 {%r0, %r1}, [%rd1];", "an instruction that is known"),
        ("cp.async.cg.shared.global [%r0], [%rd1], 8;", "an instruction that is known"),
        ("bar.sync 1;", "an instruction that is known"),
        ("bar.sync 0, 64;", "an instruction that is known"),
        ("call.uni vprintf, (%r0);", "an instruction that is known"),
        ("add.s32 %r0, %r1;", "an instruction that is known"),
        ("add.s64 %rd0, %rd1, %r2;", "'%r2' to be a 's64'"),
        ("mov.f32 %f0, %rd1;", "'%rd1' to be a 'f32'"),
        ("mov.u32 %r0, %clock;", "an operand of type 'u32'"),
        ("mov.u64 %r0, %rd1;", "a register that takes a 'u64'"),
        ("mov.f32 %f0, 1;", "an operand of type 'f32'"),
        ("ld.global.u32 %r0, [%r1];", "an address of global memory"),
        ("ld.global.u32 %r0, [nothing];", "an address"),
        ("{ LOOP: bra LOOP; }", "no label within braces"),
        (".reg .b256 %q;", "registers of a type that is known"),
    ],
)
def test_what_is_not_known_is_refused_by_line(statement: str, expected: str) -> None:
    with pytest.raises(PtxError) as error:
        translate(ENTRY.format(statement), "k", lambda file: True)
    assert str(error.value).startswith(f"line 11 (k.cu:17): expected {expected}")


def test_what_is_no_ptx_is_refused_by_line() -> None:
    with pytest.raises(PtxError, match="line 2: expected the declaration of a variable"):
        translate(".version 9.0\n.tex .u32 t;\n", "k", lambda file: True)


def test_kernels_in_anonymous_namespaces_are_found_by_the_name_that_the_host_knows() -> None:
    text = ".entry _ZN2v239_GLOBAL__N__9a66b6a3_7_cuda_cu_80f42f5e4packINS0_1TEEEvPT_("
    assert kernels(text) == ["_ZN2v212_GLOBAL__N_14packINS0_1TEEEvPT_"]
