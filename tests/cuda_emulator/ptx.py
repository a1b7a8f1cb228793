"""Translates PTX, which nvcc makes of .cu files, to C++ that the emulator runs.

A function of PTX becomes a function of C++, with a variable for every register, a label for every
label, and for every instruction a statement made of what ``ptx.h`` defines; ``#line`` says which
line of the .cu file it comes from. Whatever is not understood is an error, never a guess.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


class PtxError(ValueError):
    """PTX that this translator does not know."""


# Reading.


@dataclass(frozen=True)
class Statement:
    """What ends in a semicolon; or a label, a brace or a directive of a line of its own."""

    kind: str  # the name of a group of STATEMENT
    text: str
    line: int


COMMENT = re.compile(r'("[^"]*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
STATEMENT = re.compile(
    r"""
      (?P<space> \s+)
    | (?P<ignored> \.(?:version|target|address_size)\b [^\n]* | \.section\s [^{]* \{ [^}]* \})
    | \.file\s+ (?P<file> [^\n]*)
    | \.loc\s+ (?P<loc> [^\n]*)
    | (?P<function> (?:\.(?:visible|weak|extern)\s+)* \.(?:entry|func)\b [^;{]*)
    | (?P<label> [$\w]+) \s* :
    | (?P<brace> [{};])
    | (?P<statement> (?: [^;{}] | \{[^{};]*\} )+) ;
    """,
    re.VERBOSE,
)
VARIABLE = re.compile(
    r"""
    (?:\.(?:visible|weak|extern)\s+)* \.(?P<space>shared|local|param|global|const)
    (?:\s+\.align\s+(?P<alignment>\d+))? \s+\.(?P<type>\w+)
    (?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?
    \s+(?P<name>[$%\w]+) \s*(?P<count>(?:\[\d*\])*) \s*(?:=\s*(?P<values>.*))?
    """,
    re.VERBOSE | re.DOTALL,
)
INSTRUCTION = re.compile(r"(?:@(!?)\s*([$%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Variable:
    space: str
    name: str
    type: str
    count: int
    alignment: int
    values: str | None  # its initialiser

    @property
    def bytes(self) -> int:
        return self.count * bits_of(self.type) // 8

    @staticmethod
    def parse(text: str) -> Variable:
        m = VARIABLE.fullmatch(text.strip())
        if not m or m["type"] not in TYPES:
            raise PtxError(f"expected a declaration, got '{text}'")
        counts = [int(n or 0) for n in re.findall(r"\[(\d*)\]", m["count"])]
        size = bits_of(m["type"]) // 8
        alignment = int(m["alignment"] or size)
        return Variable(m["space"], m["name"], m["type"], math.prod(counts), alignment, m["values"])


@dataclass(frozen=True)
class Function:
    name: str
    is_entry: bool
    results: Sequence[Variable]
    parameters: Sequence[Variable]
    max_threads: int
    body: Sequence[Statement]


@dataclass(frozen=True)
class Module:
    files: Mapping[int, str]
    variables: Sequence[Variable]
    functions: Sequence[Function]


def statements(ptx: str) -> Iterator[Statement]:
    text = COMMENT.sub(lambda m: m[1] or "\n" * m[0].count("\n"), ptx)
    at, line = 0, 1
    while at < len(text):
        m = STATEMENT.match(text, at)
        if not m:
            raise PtxError(f"line {line}: expected PTX, got '{text[at : at + 60]}'")
        kind = m.lastgroup
        assert kind is not None
        if kind not in ("space", "ignored"):
            yield Statement(kind, m[kind], line)
        line += m[0].count("\n")
        at = m.end()


def variables_of(declarations: str) -> list[Variable]:
    return [Variable.parse(text) for text in declarations.split(",") if text.strip()]


def parse_function(header: str, body: Sequence[Statement]) -> Function:
    m = re.fullmatch(
        r"(?:\.\w+\s+)*?\.(entry|func)\s*(?:\(([^)]*)\))?\s*([$\w]+)\s*(?:\(([^)]*)\))?(.*)",
        header,
        re.DOTALL,
    )
    if not m:
        raise PtxError(f"expected a function, got '{header}'")
    kind, results, name, parameters, directives = m.groups()
    limit = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", directives)
    max_threads = math.prod(int(n or 1) for n in limit.groups()) if limit else 1024
    return Function(
        name,
        kind == "entry",
        variables_of(results or ""),
        variables_of(parameters or ""),
        max_threads,
        body,
    )


def parse(ptx: str) -> Module:
    files: dict[int, str] = {}
    variables: list[Variable] = []
    functions: list[Function] = []
    rest = statements(ptx)
    for s in rest:
        if s.kind == "file":
            m = re.match(r'(\d+)\s+"([^"]*)"', s.text)
            assert m
            files[int(m[1])] = m[2]
        elif s.kind == "function":
            body, depth = [], 0
            for inner in rest:
                body.append(inner)
                if inner.kind == "brace":
                    depth += {"{": 1, "}": -1, ";": 0}[inner.text]
                    if depth == 0:
                        break
            if body[0].text == "{":  # else it is declared here and defined elsewhere
                functions.append(parse_function(s.text, body[1:-1]))
        elif s.kind == "statement":
            variables.append(Variable.parse(s.text))
        elif s.kind != "brace" or s.text != ";":
            raise PtxError(f"line {s.line}: expected a function or a variable, got '{s.text}'")
    return Module(files, variables, functions)


# Types. Registers are unsigned integers; an instruction says what it takes their bits for.

TYPES = {
    f"{letter}{bits}": bits
    for letter, widths in {
        "b": (8, 16, 32, 64, 128),
        "u": (8, 16, 32, 64),
        "s": (8, 16, 32, 64),
        "f": (16, 32, 64),
        "bf": (16,),
    }.items()
    for bits in widths
} | {"pred": 1, "f16x2": 32, "bf16x2": 32}


def bits_of(kind: str) -> int:
    return TYPES[kind]


def cpp(kind: str) -> str:
    """The C++ type of a value of a PTX type; halves of a float are bits."""
    if kind == "pred":
        return "bool"
    if kind in ("f32", "f64") or kind[0] == "s":
        return kind
    return f"u{bits_of(kind)}"


def stored(kind: str) -> str:
    """The C++ type that memory holds it as."""
    return kind if kind[0] == "s" else f"u{bits_of(kind)}"


def wide(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


# Instructions that are one expression of their operands a, b, c, d. In an opcode, {I} stands for
# any of the types of GROUPS["I"], which is then T; {D:I} calls it D. The third field gives the types
# of result and operands where they are not all T; "-" where there is no result; W is T twice as
# wide.

GROUPS = {
    "I": "[us](?:16|32|64)",
    "U": "u(?:16|32|64)",
    "S": "s(?:16|32|64)",
    "B": "b(?:16|32|64)",
    "F": "f(?:32|64)",
    "A": "[bus](?:16|32|64)",  # integers, however they are called
    "J": "[us](?:8|16|32|64)",
    "X": "[busf](?:16|32|64)",
}

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
    ("bfe.{I}", "bfe(a, b, c)", "T T u32 u32"),
    ("bfi.{B}", "bfi(a, b, c, d)", "T T T u32 u32"),
    ("bmsk.clamp.b32", "bmsk_clamp(a, b)", "b32 u32 u32"),
    ("prmt.b32", "prmt(a, b, c)", "b32 b32 b32 b32"),
    ("lop3.b32", "lop3(a, b, c, d)", "b32 b32 b32 b32 u32"),
    # Floating point; nothing flushes denormals but where it says so.
    ("(add|sub|mul)(.rn)?.{F}", "a OP b"),
    ("fma.rn.{F}", "std::fma(a, b, c)"),
    ("fma.rm.f32", "fma_down(a, b, c)", "f32 f32 f32 f32"),
    ("div.rn.{F}", "a / b"),
    ("div.(full|approx).f32", "a / b", "f32 f32 f32"),
    ("rcp.rn.{F}", "1 / a"),
    ("sqrt.rn.{F}", "std::sqrt(a)"),
    ("rcp.approx.f32", "1 / a", "f32 f32"),
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
    ("cvta.shared.u64", "from_shared(static_cast<u32>(a))", "u64 u64"),
    ("cvta.to.shared.u64", "to_shared(a)", "u64 u64"),
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
    ("cvt.f64.f32", "a", "f64 f32"),
    ("cvt.rn.f32.f64", "static_cast<f32>(a)", "f32 f64"),
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
        "__match_any_sync(b, static_cast<unsigned long long>(a))",
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
    ("cp.async.wait_group", "wait_for_copies(static_cast<int>(a))", "- u32"),
    ("cp.async.wait_all", "commit_copies(), wait_for_copies(0)", "-"),
    ("trap", 'fail("trap")', "-"),
)
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


def replace_words(expression: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\b\w+\b", lambda m: words.get(m[0], m[0]), expression)


@dataclass(frozen=True)
class Form:
    """What an opcode computes: an expression of operands of these types."""

    expression: str
    result: str | None
    operands: Sequence[str]


@functools.cache
def forms() -> list[tuple[re.Pattern[str], str, str]]:
    def group(m: re.Match[str]) -> str:
        return f"(?P<{m[1] or 'T'}>{GROUPS[m[2]]})"

    return [
        (re.compile(re.sub(r"\{(?:(\w):)?(\w)\}", group, row[0].replace(".", r"\."))), *row[1:])
        for row in ((*row, "") for row in EXPRESSIONS)
        for row in [row[:3]]
    ]


@functools.cache
def form_of(opcode: str) -> Form | None:
    for pattern, expression, types in forms():
        m = pattern.fullmatch(opcode)
        if not m:
            continue
        named = m.groupdict()
        if "T" in named:
            named["W"] = wide(named["T"])
        names = set(re.findall(r"\b[abcd]\b", expression))
        result, *operands = (types or "T " * (len(names) + 1)).split()
        kinds = [named.get(kind, kind) for kind in operands]
        words = {letter: cpp(kind) for letter, kind in named.items() if kind in TYPES}
        words["OP"] = OPERATORS.get(opcode.partition(".")[0], "")
        expression = replace_words(expression, words)
        return Form(expression, None if result == "-" else named.get(result, result), kinds)
    return None


# Translating.

INDICES = {
    "%tid": "thread_index()",
    "%ctaid": "block_index()",
    "%ntid": "block_size()",
    "%nctaid": "grid_size()",
}
LANES = {
    "%laneid": "lane()",
    "%lanemask_eq": "1u << lane()",
    "%lanemask_lt": "(1u << lane()) - 1",
    "%lanemask_le": "(2u << lane()) - 1",
    "%lanemask_ge": "~0u << lane()",
    "%lanemask_gt": "~1u << lane()",
}
COMPARISONS = {
    "eq": "a == b",
    "ne": "a != b",
    "lt": "a < b",
    "le": "a <= b",
    "gt": "a > b",
    "ge": "a >= b",
    "lo": "a < b",
    "ls": "a <= b",
    "hi": "a > b",
    "hs": "a >= b",
}
# What an atomic leaves, of what was there (before) and its operands.
ATOMICS = {
    "add": "before + a",
    "min": "std::min(before, a)",
    "max": "std::max(before, a)",
    "and": "before & a",
    "or": "before | a",
    "xor": "before ^ a",
    "exch": "a",
    "cas": "before == a ? b : before",
    "inc": "before >= a ? 0 : before + 1",
    "dec": "before == 0 || before > a ? a : before - 1",
}
SPACES = ("global", "shared", "local", "param", "const")
# Which cache, and for how long: no value depends on it. Loads and stores are as strong as they are
# strict in order here.
HINT = re.compile(r"weak|volatile|nc|ca|cg|cs|lu|cv|wb|wt|L[12]::\w+")


@dataclass(frozen=True)
class Symbol:
    """What a name of PTX stands for: a register of some bits, or memory in a space."""

    cpp: str
    space: str = "register"
    bits: int = 0

    @property
    def address(self) -> str:
        """In shared memory an address of 32 bits, else a generic one."""
        if self.space == "shared":
            return f"{self.cpp}.address()" if self.cpp else "0"
        return f"address_of({self.cpp})"


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def split(operands: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+", operands)


def elements(operand: str) -> list[str]:
    """Of a vector in braces, or of a list in parentheses; another operand is one itself."""
    return split(operand[1:-1]) if operand[0] in "{(" else [operand]


def source_name(name: str) -> str:
    """What a shared array is called in the source, from a mangled name such as _ZZ1fvE3abc."""
    m = re.fullmatch(r".*E(\d+)([A-Za-z_]\w*)", name)
    return m[2][: int(m[1])] if m else name


class Translator:
    """Translates one function."""

    def __init__(
        self, module: Module, symbols: Mapping[str, Symbol], own: Callable[[str], bool]
    ) -> None:
        self._module = module
        self._own = own
        self._scopes = [dict(symbols)]
        self._label = ""
        self._targets: dict[str, list[str]] = {}  # of brx.idx, by label
        self._local = ""  # the function's .local array
        self._place = ("?", 0)
        self._chunks: list[tuple[tuple[str, int], list[str]]] = []

    def translate(self, function: Function) -> str:
        self._scopes.append({})
        if function.is_entry:
            signature = f"void {identifier(function.name)}(const void*, const void* parameters)"
            self._emit("const char* const arguments = static_cast<const char*>(parameters);")
            for offset, parameter in zip(offsets(function.parameters), function.parameters):
                symbol = Symbol(f"(arguments + {offset})", "param")
                self._scopes[-1][parameter.name] = symbol
        else:
            signature = head_of(function)
            for variable in (*function.results, *function.parameters):
                self._scopes[-1][variable.name] = Symbol(identifier(variable.name), "param")
        for name, symbol in self._scopes[0].items():
            if symbol.space == "shared" and symbol.cpp and mentions(function, name):
                self._emit(f'{symbol.cpp}.open("{source_name(name)}");')
        for statement in function.body:
            try:
                self._statement(statement)
            except PtxError as error:
                file, line = self._place
                raise PtxError(f"line {statement.line}, of {file}:{line}: {error}") from None
        lines = []
        for (file, line), code in self._chunks:
            lines += [f'#line {line} "{file}"', " ".join(code)]
        return "\n".join([signature + " {", *lines, "}"])

    # Statements.

    def _emit(self, code: str) -> None:
        if not self._chunks or self._chunks[-1][0] != self._place:
            self._chunks.append((self._place, []))
        self._chunks[-1][1].append(code)

    def _statement(self, statement: Statement) -> None:
        text = statement.text
        match statement.kind:
            case "loc":
                self._set_place(text)
            case "brace":
                if text == "{":
                    self._scopes.append({})
                elif text == "}":
                    self._scopes.pop()
                self._emit(text)
            case "label":
                if len(self._scopes) > 2:
                    raise PtxError(f"expected no label within braces, got '{text}'")
                self._label = text
                self._emit(f"{identifier(text)}:;")
            case "statement":
                text = text.strip()
                if text.startswith("."):
                    self._declare(text)
                else:
                    self._emit(self._instruction(text))

    def _set_place(self, text: str) -> None:
        # A line of a header that is not ours says less than the line that it was inlined at.
        m = re.match(r"(\d+)\s+(\d+)\s+\d+(?:.*\binlined_at\s+(\d+)\s+(\d+))?", text)
        if not m:
            raise PtxError(f"expected a place, got '.loc {text}'")
        file, line = self._module.files[int(m[1])], int(m[2])
        if m[3] and not self._own(file):
            file, line = self._module.files[int(m[3])], int(m[4])
        if line:
            self._place = (file, line)

    def _declare(self, text: str) -> None:
        if text.startswith(".pragma"):
            return
        if text.startswith(".branchtargets"):
            self._targets[self._label] = split(text.removeprefix(".branchtargets"))
            return
        if m := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            self._declare_registers(m[1], m[2])
            return
        variable = Variable.parse(text)
        name = identifier(variable.name)
        self._scopes[-1][variable.name] = Symbol(name, variable.space)
        if variable.space == "shared":
            self._emit(shared_array(variable))
            self._emit(f'{name}.open("{source_name(variable.name)}");')
        elif variable.space in ("local", "param"):
            self._emit(f"alignas({variable.alignment}) char {name}[{variable.bytes}];")
        else:
            raise PtxError(f"expected no such variable in a function, got '{text}'")
        if variable.space == "local":
            if self._local:
                raise PtxError("expected one local array in a function")
            self._local = name
            self._emit(f"std::memset({name}, -1, sizeof({name}));")

    def _declare_registers(self, kind: str, names: str) -> None:
        if kind not in TYPES:
            raise PtxError(f"expected registers of a type that is known, got '.{kind}'")
        register = "bool" if kind == "pred" else f"u{bits_of(kind)}"
        declared = []
        for name in split(names):
            m = re.fullmatch(r"([$%\w]+?)(?:<(\d+)>)?", name)
            if not m:
                raise PtxError(f"expected the name of a register, got '{name}'")
            for one in [m[1] + str(i) for i in range(int(m[2]))] if m[2] else [name]:
                self._scopes[-1][one] = Symbol(identifier(one), bits=bits_of(kind))
                declared.append(f"{identifier(one)} = {register}(kGarbage)")
        self._emit(f"{register} {', '.join(declared)};")

    def _instruction(self, text: str) -> str:
        m = INSTRUCTION.fullmatch(text)
        if not m:
            raise PtxError(f"expected an instruction, got '{text}'")
        negated, guard, opcode, operands = m.groups()
        code = self._code(opcode, split(operands), text)
        return f"if ({negated}{self._value(guard, 'pred')}) {{ {code} }}" if guard else code

    def _code(self, opcode: str, operands: list[str], text: str) -> str:
        if form := form_of(opcode):
            targets = operands[:1] if form.result else []
            values = operands[len(targets) :]
            if len(values) == len(form.operands):
                words = dict(zip("abcd", map(self._value, values, form.operands), strict=False))
                code = replace_words(form.expression, words)
                return self._assign(targets[0], form.result, code) if form.result else f"{code};"
        elif method := self.METHODS.get(opcode.partition(".")[0]):
            if code := method(self, opcode, operands):
                return code
        raise PtxError(f"expected an instruction that is known, got '{text}'")

    # Operands.

    def _find(self, name: str) -> Symbol | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _assign(self, target: str, kind: str, code: str) -> str:
        if target == "_":
            return f"(void)({code});"
        symbol = self._find(target)
        if symbol is None or symbol.space != "register":
            raise PtxError(f"expected a register to write to, got '{target}'")
        bits = bits_of(kind)
        if bits > symbol.bits or (1 in (bits, symbol.bits) and bits != symbol.bits):
            raise PtxError(f"expected a register for '{kind}', got '{target}'")
        value = f"static_cast<{cpp(kind)}>({code})"
        if kind in ("f32", "f64"):
            value = f"std::bit_cast<u{bits}>({value})"
        return f"{symbol.cpp} = {value};"

    def _value(self, operand: str, kind: str) -> str:
        """An operand as a C++ value of a type of PTX."""
        target, bits = cpp(kind), bits_of(kind)
        if kind == "pred" and operand[0] == "!":
            return f"!{self._value(operand[1:], kind)}"
        symbol = self._find(operand)
        if symbol and symbol.space == "register":
            exact = kind in ("f32", "f64", "pred") or symbol.bits == 1
            if bits > symbol.bits or (exact and bits != symbol.bits):
                raise PtxError(f"expected '{operand}' to be a '{kind}'")
            if kind in ("f32", "f64"):
                return f"std::bit_cast<{kind}>({symbol.cpp})"
            return (
                symbol.cpp if target in (f"u{symbol.bits}", "bool") else f"{target}({symbol.cpp})"
            )
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            width = 32 if m[1] else 64
            literal = f"u{width}(0x{m[1] or m[2]}u)"
            if bits != width:
                raise PtxError(f"expected '{operand}' to be a '{kind}'")
            return f"std::bit_cast<{kind}>({literal})" if kind[0] == "f" else literal
        if re.fullmatch(r"-?(0|[1-9]\d*|0[xX][0-9a-fA-F]+)U?", operand) and kind[0] != "f":
            value = int(operand.rstrip("U"), 0)
            return f"{target}({value if abs(value) < 1 << 31 else f'{value & (1 << 64) - 1:#x}u'})"
        index, _, axis = operand.partition(".")
        if index in INDICES and axis in ("x", "y", "z"):
            return f"{target}({INDICES[index]}.{axis})"
        if operand in LANES:
            return f"{target}({LANES[operand]})"
        name, _, offset = operand.partition("+")
        symbol = self._find(name)
        if symbol and symbol.space != "register" and target in ("u32", "u64"):
            return f"{target}({symbol.address} + {int(offset or '0', 0)})"
        raise PtxError(f"expected an operand of type '{kind}', got '{operand}'")

    def _base(self, operand: str) -> tuple[Symbol, int]:
        m = re.fullmatch(r"\[\s*([$%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        symbol = self._find(m[1]) if m else None
        if m is None or symbol is None:
            raise PtxError(f"expected an address, got '{operand}'")
        return symbol, int(m[2] or "0", 0)

    def _address(self, operand: str, space: str) -> str:
        """A generic address of 64 bits, in C++."""
        symbol, offset = self._base(operand)
        if (symbol.space == "shared") > (space == "shared") or symbol.bits not in (0, 32, 64):
            raise PtxError(f"expected an address of {space or 'any'} memory, got '{operand}'")
        base = symbol.cpp if symbol.space == "register" else symbol.address
        if space == "shared":
            return f"from_shared(u32({base}) + {offset})"
        return f"{base} + {offset}"

    def _memory(self, how: str, operand: str, space: str, size: int) -> str:
        """A pointer to memory that is to be read or written (``load`` or ``store``)."""
        symbol, offset = self._base(operand)
        if space == "param" and symbol.space == "param":  # nothing that could go wrong
            return f"({symbol.cpp} + {offset})"
        address = self._address(operand, space)
        if space == "local" and self._local:
            return f"local({address}, {size}, {self._local})"
        return f"{how}({address}, {size})"

    # Instructions that are more than an expression.

    def _move(self, opcode: str, operands: list[str]) -> str:
        kind = opcode.removeprefix("mov.")
        if kind not in TYPES:
            return ""
        targets, values = elements(operands[0]), elements(operands[1])
        part = bits_of(kind) // max(len(targets), len(values))
        if len(values) > 1:
            parts = (
                f"{cpp(kind)}({self._value(v, f'b{part}')}) << {i * part}"
                for i, v in enumerate(values)
            )
            return self._assign(targets[0], kind, " | ".join(parts))
        value = self._value(values[0], kind)
        if len(targets) == 1:
            return self._assign(targets[0], kind, value)
        return " ".join(
            self._assign(target, f"b{part}", f"{value} >> {i * part}")
            for i, target in enumerate(targets)
        )

    def _access(self, opcode: str) -> tuple[str, int, str]:
        """Space, number of elements and their type of a load or a store."""
        _, *modifiers, kind = opcode.replace("::cta", "").replace("::func", "").split(".")
        space, count = "", 1
        for modifier in modifiers:
            if modifier in SPACES:
                space = modifier
            elif modifier in ("v2", "v4", "v8"):
                count = int(modifier[1])
            elif not HINT.fullmatch(modifier):
                raise PtxError(f"expected a load or store that is known, got '{opcode}'")
        if kind not in TYPES:
            raise PtxError(f"expected a type that is known, got '{opcode}'")
        return space, count, kind

    def _load(self, opcode: str, operands: list[str]) -> str:
        space, count, kind = self._access(opcode)
        targets, size = elements(operands[0]), bits_of(kind) // 8
        if len(targets) != count:
            return ""
        memory = self._memory("load", operands[1], space, count * size)
        integer = kind if kind[0] == "s" else f"u{bits_of(kind)}"
        return (
            f"{{ const char* const from = {memory}; "
            + " ".join(
                self._assign(target, integer, f"get<{integer}>(from + {i * size})")
                for i, target in enumerate(targets)
            )
            + " }"
        )

    def _store(self, opcode: str, operands: list[str]) -> str:
        space, count, kind = self._access(opcode)
        values, size = elements(operands[1]), bits_of(kind) // 8
        if len(values) != count:
            return ""
        memory = self._memory("store", operands[0], space, count * size)
        integer = f"u{bits_of(kind)}"
        return (
            f"{{ char* const to = {memory}; "
            + " ".join(
                f"put<{integer}>(to + {i * size}, {self._value(value, integer)});"
                for i, value in enumerate(values)
            )
            + " }"
        )

    def _atomic(self, opcode: str, operands: list[str]) -> str:
        name, *modifiers, kind = opcode.replace("::cta", "").split(".")
        space, change, order = "", "", ""
        for modifier in modifiers:
            if modifier in SPACES:
                space = modifier
            elif modifier in ATOMICS:
                change = ATOMICS[modifier]
            elif modifier in ("release", "acq_rel"):
                order = "fence(); "
            elif modifier not in ("relaxed", "acquire", "cta", "gpu", "sys"):
                return ""
        target = operands.pop(0) if name == "atom" else "_"
        if not change or kind not in TYPES:
            return ""
        values = {
            letter: self._value(operand, kind)
            for letter, operand in zip("ab", operands[1:], strict=False)
        }
        after = f"static_cast<{cpp(kind)}>({replace_words(change, values)})"
        address = self._address(operands[0], space)
        call = f"atomic<{cpp(kind)}>({address}, [&]({cpp(kind)} before) {{ return {after}; }})"
        return order + self._assign(target, kind, call)

    def _compare(self, opcode: str, operands: list[str]) -> str:
        _, comparison, *combine, kind = opcode.split(".")
        targets = operands[0].split("|")
        a, b = (self._value(operand, kind) for operand in operands[1:3])
        ordered = "!unordered(a, b)" if kind[0] == "f" else "true"
        if comparison in COMPARISONS:
            test = f"({ordered} && {COMPARISONS[comparison]})"
        elif comparison[:2] in COMPARISONS and comparison[2:] == "u" and kind[0] == "f":
            test = f"(unordered(a, b) || {COMPARISONS[comparison[:2]]})"
        elif comparison in ("num", "nan") and kind[0] == "f":
            test = f"(unordered(a, b) == {'true' if comparison == 'nan' else 'false'})"
        else:
            return ""
        test = replace_words(test, {"a": a, "b": b})
        if len(combine) != len(operands) - 3 or any(word not in OPERATORS for word in combine):
            return ""
        rest = f" {OPERATORS[combine[0]]} {self._value(operands[3], 'pred')}" if combine else ""
        return (
            f"{{ const bool is = {test}; "
            + " ".join(
                self._assign(target, "pred", f"{sign}is{rest}")
                for sign, target in zip(("", "!"), targets, strict=False)
            )
            + " }"
        )

    def _shuffle(self, opcode: str, operands: list[str]) -> str:
        m = re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", opcode)
        if not m or len(operands) != 5:
            return ""
        targets = operands[0].split("|")
        arguments = ", ".join(self._value(operand, "u32") for operand in operands[1:])
        code = f"const Shuffled got = shfl<Shuffle::{m[1].capitalize()}>({arguments}); "
        code += self._assign(targets[0], "b32", "got.value")
        if len(targets) > 1:
            code += self._assign(targets[1], "pred", "got.inside")
        return f"{{ {code} }}"

    def _barrier(self, opcode: str, operands: list[str]) -> str:
        if re.fullmatch(r"(bar|barrier)\.sync(\.aligned)?", opcode) and operands == ["0"]:
            return "__syncthreads();"
        m = re.fullmatch(r"(?:bar|barrier)\.red(?:\.aligned)?\.(popc|and|or)\.(u32|pred)", opcode)
        if not m or len(operands) != 3 or operands[1] != "0":
            return ""
        function = f"__syncthreads_{m[1].replace('popc', 'count')}"
        return self._assign(operands[0], m[2], f"{function}({self._value(operands[2], 'pred')})")

    def _copy(self, opcode: str, operands: list[str]) -> str:
        m = re.fullmatch(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::\w+)*", opcode)
        if not m or len(operands) not in (3, 4) or (m[1] == "cg" and operands[2] != "16"):
            return ""
        to = self._address(operands[0], "shared")
        source = self._address(operands[1], "global")
        sizes = ", ".join(self._value(operand, "s32") for operand in operands[2:])
        if len(operands) == 3:
            sizes = f"{sizes}, {sizes}"
        return f"copy_async(pointer_to({to}), pointer_to({source}), {sizes});"

    def _load_matrices(self, opcode: str, operands: list[str]) -> str:
        m = re.fullmatch(
            r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", opcode
        )
        targets = elements(operands[0])
        if not m or len(targets) != int(m[1]):
            return ""
        row = self._address(operands[1], "shared")
        transposed = "true" if m[2] else "false"
        code = f"load_matrices(rows, {m[1]}, pointer_to({row}), {transposed}); "
        code += " ".join(self._assign(t, "b32", f"rows[{i}]") for i, t in enumerate(targets))
        return f"{{ u32 rows[4]; {code} }}"

    def _multiply(self, opcode: str, operands: list[str]) -> str:
        m = re.fullmatch(
            r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<type>bf16|f16)\.(?P=type)\.f32",
            opcode,
        )
        if not m:
            return ""
        d, a, b, c = map(elements, operands)
        fragments = ", ".join(
            "{" + ", ".join(self._value(operand, kind) for operand in operands) + "}"
            for operands, kind in ((a, "b32"), (b, "b32"), (c, "f32"))
        )
        form = {"bf16": "BFloat16", "f16": "Half"}[m["type"]]
        code = f"multiply_accumulate(Format::{form}, sums, {fragments}); "
        code += " ".join(self._assign(t, "f32", f"sums[{i}]") for i, t in enumerate(d))
        return f"{{ f32 sums[4]; {code} }}"

    def _branch(self, opcode: str, operands: list[str]) -> str:
        return f"goto {identifier(operands[0])};" if opcode in ("bra", "bra.uni") else ""

    def _branch_by_index(self, opcode: str, operands: list[str]) -> str:
        if opcode not in ("brx.idx", "brx.idx.uni"):
            return ""
        cases = " ".join(
            f"case {i}: goto {identifier(label)};"
            for i, label in enumerate(self._targets[operands[1]])
        )
        return f'switch ({self._value(operands[0], "u32")}) {{ {cases} }} fail("brx.idx");'

    def _call(self, opcode: str, operands: list[str]) -> str:
        results = elements(operands.pop(0)) if operands[0][0] == "(" else []
        name, *rest = operands
        if all(f.name != name for f in self._module.functions) or len(rest) > 1:
            return ""
        arguments = [self._find(text) for text in results + (elements(rest[0]) if rest else [])]
        if any(symbol is None or symbol.space != "param" for symbol in arguments):
            return ""
        return f"{identifier(name)}({', '.join(symbol.cpp for symbol in arguments if symbol)});"

    def _return(self, opcode: str, operands: list[str]) -> str:
        return "return;"

    METHODS: Mapping[str, Callable[[Translator, str, list[str]], str]] = {
        "mov": _move,
        "ld": _load,
        "st": _store,
        "atom": _atomic,
        "red": _atomic,
        "setp": _compare,
        "shfl": _shuffle,
        "bar": _barrier,
        "barrier": _barrier,
        "cp": _copy,
        "ldmatrix": _load_matrices,
        "mma": _multiply,
        "bra": _branch,
        "brx": _branch_by_index,
        "call": _call,
        "ret": _return,
    }


def offsets(parameters: Sequence[Variable]) -> list[int]:
    """Where each parameter of a kernel begins, and where the last one ends."""
    found, end = [], 0
    for p in parameters:
        found.append(-(-end // p.alignment) * p.alignment)
        end = found[-1] + p.bytes
    return [*found, end]


def head_of(function: Function) -> str:
    parameters = [f"char* {identifier(v.name)}" for v in (*function.results, *function.parameters)]
    return f"void {identifier(function.name)}({', '.join(parameters)})"


def mentions(function: Function, name: str) -> bool:
    return any(re.search(rf"(?<![$%\w]){re.escape(name)}\b", s.text) for s in function.body)


def shared_array(variable: Variable) -> str:
    sizes = f"{variable.bytes}, {variable.alignment}"
    return f"static SharedArray<{sizes}> {identifier(variable.name)};"


def constant_array(variable: Variable) -> str:
    """Of a .const or .global variable; kernels that write to one are told so by the checker."""
    values = variable.values or ""
    if not re.fullmatch(r"[{}\s,\d-]*", values) or variable.type[0] == "f":
        raise PtxError(f"expected '{variable.name}' to consist of integers, got '{values}'")
    return (
        f"alignas({variable.alignment}) const {cpp(variable.type)} "
        f"{identifier(variable.name)}[{variable.count}] = {{{values.strip('{} ')}}};"
    )


def host_symbol(entry: str) -> str:
    """What g++ calls a kernel: nvcc gives anonymous namespaces a name, and its length before it."""

    def anonymous(m: re.Match[str]) -> str:
        digits = m[1]
        for i in range(len(digits)):  # the first may belong to what stands before
            end = m.end() + int(digits[i:])
            if entry[end : end + 1].isdigit():
                return f"{digits[:i]}12_GLOBAL__N_1{entry[end:]}"
        raise PtxError(f"expected a mangled name, got '{entry}'")

    while m := re.search(r"(\d+)(?=_GLOBAL__N__)", entry):
        entry = entry[: m.start()] + anonymous(m)
    return entry


def kernels(ptx: str) -> list[str]:
    """What g++ calls the kernels of a file of PTX, in order."""
    return [host_symbol(name) for name in re.findall(r"\.entry\s+([$\w]+)", ptx)]


def translate(ptx: str, prefix: str, own: Callable[[str], bool]) -> str:
    """Translate a file of PTX.

    Args:
        ptx: what nvcc made.
        prefix: ``prefix_i`` is to be the symbol of the i-th kernel in the host's code.
        own: whether a source file's lines are to be named, rather than where they were inlined.

    Returns:
        C++ code.

    Raises:
        PtxError: something is not understood; with the line.
    """
    module = parse(ptx)
    symbols: dict[str, Symbol] = {}
    code = ['#include "ptx.h"', "namespace {", "using namespace cuda_emulator;"]
    code.append("using namespace cuda_emulator::ptx;")
    for variable in module.variables:
        name = identifier(variable.name)
        if variable.space == "shared":
            symbols[variable.name] = Symbol(name if variable.bytes else "", "shared")
            if variable.bytes:
                code.append(shared_array(variable))
        else:
            symbols[variable.name] = Symbol(name, variable.space)
            code.append(constant_array(variable))
    code += [f"{head_of(f)};" for f in module.functions if not f.is_entry]
    for function in module.functions:
        code.append(Translator(module, symbols, own).translate(function))
    code.append("}  // namespace")
    for i, kernel in enumerate(f for f in module.functions if f.is_entry):
        size = offsets(kernel.parameters)[-1]
        code += [
            f'extern "C" const char {prefix}_{i}[];',
            f"static const bool replaced_{i} = (",
            f"    replace({prefix}_{i}, {{{identifier(kernel.name)}, {size}, {kernel.max_threads}}}),",
            "    true);",
        ]
    return "\n".join(code) + "\n"
