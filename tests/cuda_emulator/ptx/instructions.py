"""Instructions of PTX that are one expression of C++, made of what ``ptx.h`` defines."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cuda_emulator.ptx.reader import BITS


def cpp(kind: str) -> str:
    """The C++ type of a value of a type of PTX; of 16 bits floating point is but bits."""
    if kind == "pred":
        return "bool"
    return kind if kind[0] == "s" or kind in ("f32", "f64") else f"u{BITS[kind]}"


# Types that an opcode may end in.
GROUPS = {
    "I": "[us](?:16|32|64)",
    "S": "s(?:16|32|64)",
    "B": "b(?:16|32|64)",
    "A": "[bus](?:16|32|64)",
    "J": "[us](?:8|16|32|64)",
    "F": "f(?:32|64)",
    "X": "[busf](?:16|32|64)",
}

# Opcode, expression of its operands a, b, c, d; types of result ("-": it has none) and operands.
# {I} in an opcode is any type of GROUPS["I"], which is then T; {D:I} calls it D. W is T, twice as
# wide. Types that are not given are all T. OP is the operator of OPERATORS.
EXPRESSIONS = (
    # Integers.
    ("(add|sub).{I}", "a OP b"),
    ("mul.lo.{I}", "a * b"),
    ("mul.hi.{I}", "mul_hi(a, b)"),
    ("mul.wide.{I}", "W(a) * W(b)", "W T T"),
    ("mad.lo.{I}", "a * b + c"),
    ("mad.hi.{I}", "mul_hi(a, b) + c"),
    ("mad.wide.{I}", "W(a) * W(b) + c", "W T T W"),
    ("div.{I}", "divide(a, b)"),
    ("rem.{I}", "remainder(a, b)"),
    ("neg.{S}", "-a"),
    ("abs.{S}", "a < 0 ? -a : a"),
    ("min.{I}", "std::min(a, b)"),
    ("max.{I}", "std::max(a, b)"),
    ("(and|or|xor).{B}", "a OP b"),
    ("(and|or|xor).pred", "a OP b", "pred pred pred"),
    ("not.{B}", "~a"),
    ("not.pred", "!a", "pred pred"),
    ("shl.{B}", "shl(a, b)", "T T u32"),
    ("shr.{A}", "shr(a, b)", "T T u32"),
    ("shf.l.wrap.b32", "funnel_left(a, b, c & 31)", "b32 b32 b32 u32"),
    ("shf.r.wrap.b32", "funnel_right(a, b, c & 31)", "b32 b32 b32 u32"),
    ("shf.l.clamp.b32", "funnel_left(a, b, std::min(c, 32u))", "b32 b32 b32 u32"),
    ("shf.r.clamp.b32", "funnel_right(a, b, std::min(c, 32u))", "b32 b32 b32 u32"),
    ("popc.{B}", "std::popcount(a)", "u32 T"),
    ("clz.{B}", "std::countl_zero(a)", "u32 T"),
    ("brev.{B}", "reverse_bits(a)"),
    ("bfind.{I}", "bfind(a)", "u32 T"),
    ("bfind.shiftamt.{I}", "bfind_shift(a)", "u32 T"),
    ("bfe.{I}", "bfe(a, b, c)", "T T u32 u32"),
    ("bfi.{B}", "bfi(a, b, c, d)", "T T T u32 u32"),
    ("bmsk.clamp.b32", "bmsk_clamp(a, b)", "b32 u32 u32"),
    ("prmt.b32", "prmt(a, b, c)", "b32 b32 b32 b32"),
    ("lop3.b32", "lop3(a, b, c, d)", "b32 b32 b32 b32 u32"),
    # Floating point; nothing flushes denormals but where it says so.
    ("(add|sub|mul)(.rn)?.{F}", "a OP b"),
    ("fma.rn.{F}", "std::fma(a, b, c)"),
    ("fma.rm.f32", "fma_down(a, b, c)", "f32 f32 f32 f32"),
    ("fma.rz.f32", "fma_to_zero(a, b, c)", "f32 f32 f32 f32"),
    ("add.rz.f32", "fma_to_zero(a, 1, b)", "f32 f32 f32"),
    ("div.rn.{F}", "a / b"),
    ("div.(full|approx).f32", "a / b", "f32 f32 f32"),
    ("rcp.rn.{F}", "1 / a"),
    ("sqrt.rn.{F}", "std::sqrt(a)"),
    ("rsqrt.approx.f32", "1 / std::sqrt(a)", "f32 f32"),
    ("rsqrt.approx.ftz.f32", "1 / std::sqrt(flush(a))", "f32 f32"),
    ("rcp.approx.f32", "1 / a", "f32 f32"),
    ("rcp.approx.ftz.f64", "gross_reciprocal(a)", "f64 f64"),
    ("rcp.approx.ftz.f32", "flush(1 / flush(a))", "f32 f32"),
    ("ex2.approx.f32", "std::exp2(a)", "f32 f32"),
    ("ex2.approx.ftz.f32", "flush(std::exp2(flush(a)))", "f32 f32"),
    ("lg2.approx.f32", "std::log2(a)", "f32 f32"),
    ("lg2.approx.ftz.f32", "std::log2(flush(a))", "f32 f32"),
    ("neg.{F}", "-a"),
    ("abs.{F}", "std::fabs(a)"),
    ("min.{F}", "minimum(a, b)"),
    ("max.{F}", "maximum(a, b)"),
    ("copysign.{F}", "std::copysign(b, a)"),
    # Moves and conversions.
    ("mov.(pred)", "a", "pred pred"),
    ("selp.{X}", "c ? a : b", "T T T pred"),
    ("cvta(.to)?.(global|local|const|param).u64", "a", "u64 u64"),
    ("cvta.shared.u64", "from_shared(window, u32(a))", "u64 u64"),
    ("cvta.to.shared.u64", "a - window", "u64 u64"),
    ("cvt.{D:J}.{J}", "a", "D T"),
    ("cvt.rn.{D:F}.{J}", "D(a)", "D T"),
    ("cvt.rni.{D:J}.{F}", "to_integer<D>(std::nearbyint(a))", "D T"),
    ("cvt.rzi.{D:J}.{F}", "to_integer<D>(std::trunc(a))", "D T"),
    ("cvt.rmi.{D:J}.{F}", "to_integer<D>(std::floor(a))", "D T"),
    ("cvt.rpi.{D:J}.{F}", "to_integer<D>(std::ceil(a))", "D T"),
    ("cvt.rni.{D:F}.{F}", "std::nearbyint(a)", "D T"),
    ("cvt.rzi.{D:F}.{F}", "std::trunc(a)", "D T"),
    ("cvt.rmi.{D:F}.{F}", "std::floor(a)", "D T"),
    ("cvt.rpi.{D:F}.{F}", "std::ceil(a)", "D T"),
    ("cvt.sat.f32.f32", "saturate(a)", "f32 f32"),
    ("cvt.f64.f32", "f64(a)", "f64 f32"),
    ("cvt.rn.f32.f64", "f32(a)", "f32 f64"),
    ("cvt.f32.f16", "widen_f16(a)", "f32 f16"),
    ("cvt.f32.bf16", "widen_bf16(a)", "f32 bf16"),
    ("cvt.rn.f16.{F}", "narrow_f16(a)", "f16 T"),
    ("cvt.rn.bf16.f32", "narrow_bf16(a)", "bf16 f32"),
    ("cvt.rn.f16x2.f32", "u32{narrow_f16(a)} << 16 | narrow_f16(b)", "b32 f32 f32"),
    ("cvt.rn.bf16x2.f32", "u32{narrow_bf16(a)} << 16 | narrow_bf16(b)", "b32 f32 f32"),
    # Warps, order, time.
    ("vote.sync.ballot.b32", "__ballot_sync(b, a)", "b32 pred b32"),
    ("vote.sync.any.pred", "__any_sync(b, a)", "pred pred b32"),
    ("vote.sync.all.pred", "__all_sync(b, a)", "pred pred b32"),
    ("match.any.sync.b32", "__match_any_sync(b, a)", "b32 b32 b32"),
    (
        "match.any.sync.b64",
        "__match_any_sync(b, (unsigned long long)a)",
        "b32 b64 b32",
    ),
    ("redux.sync.add.[us]32", "__reduce_add_sync(b, a)", "u32 u32 b32"),
    ("redux.sync.min.u32", "__reduce_min_sync(b, a)", "u32 u32 b32"),
    ("redux.sync.max.u32", "__reduce_max_sync(b, a)", "u32 u32 b32"),
    ("redux.sync.and.b32", "__reduce_and_sync(b, a)", "u32 u32 b32"),
    ("redux.sync.or.b32", "__reduce_or_sync(b, a)", "u32 u32 b32"),
    ("redux.sync.xor.b32", "__reduce_xor_sync(b, a)", "u32 u32 b32"),
    ("activemask.b32", "__activemask()", "b32"),
    ("bar.warp.sync", "__syncwarp(a)", "- b32"),
    ("membar.(gl|sys)", "fence()", "-"),
    ("fence(.sc|.acq_rel)?.(gpu|sys)", "fence()", "-"),
    ("membar.cta", "reschedule()", "-"),
    ("fence(.sc|.acq_rel)?.cta", "reschedule()", "-"),
    ("nanosleep.u32", "reschedule()", "- u32"),
    ("cp.async.commit_group", "commit_copies()", "-"),
    ("cp.async.wait_group", "wait_for_copies(int(a))", "- u32"),
    ("cp.async.wait_all", "commit_copies(), wait_for_copies(0)", "-"),
    ("trap", 'fail("trap")', "-"),
)
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


@dataclass(frozen=True)
class Form:
    """What an opcode computes: an expression of operands of these types."""

    expression: str
    result: str | None
    operands: Sequence[str]


def replace_words(expression: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\b\w+\b", lambda m: words.get(m[0], m[0]), expression)


@functools.cache
def patterns() -> list[tuple[re.Pattern[str], str, str]]:
    def group(m: re.Match[str]) -> str:
        return f"(?P<{m[1] or 'T'}>{GROUPS[m[2]]})"

    return [
        (
            re.compile(re.sub(r"\{(?:(\w):)?(\w)\}", group, opcode.replace(".", r"\."))),
            expression,
            types[0] if types else "",
        )
        for opcode, expression, *types in EXPRESSIONS
    ]


@functools.cache
def form_of(opcode: str) -> Form | None:
    for pattern, expression, types in patterns():
        m = pattern.fullmatch(opcode)
        if not m:
            continue
        kinds = m.groupdict()
        words = {letter: cpp(kind) for letter, kind in kinds.items()}
        words["OP"] = OPERATORS.get(opcode.partition(".")[0], "")
        if "W" in types:
            kinds["W"] = f"{kinds['T'][0]}{2 * BITS[kinds['T']]}"
            words["W"] = cpp(kinds["W"])
        count = len(set(re.findall(r"\b[abcd]\b", expression)))
        result, *operands = (
            kinds.get(kind, kind) for kind in (types or "T " * (count + 1)).split()
        )
        return Form(replace_words(expression, words), None if result == "-" else result, operands)
    return None
