"""Reads PTX: its functions, and what they consist of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


class PtxError(ValueError):
    """PTX that is not understood."""


# Bits of a value of each type.
BITS = {
    "pred": 1,
    **{f"{letter}{bits}": bits for letter in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "b128": 128},
}

COMMENT = re.compile(r'("[^"]*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
STATEMENT = re.compile(
    r"""
      (?P<ignored> \s+ | \.(?:version|target|address_size)\b [^\n]* | \.section\s[^{]* \{[^}]*\})
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
    \s* (?:\.(?:visible|weak|extern)\s+)* \.(?P<space> shared|local|param|global|const)
    (?:\s+ \.align \s+ (?P<alignment> \d+))? \s+ \.(?P<type> \w+)
    (?:\s+ \.ptr (?:\s+\.\w+)*? (?:\s+\.align\s+\d+)?)?
    \s+ (?P<name> [$%\w]+) \s* (?P<counts> (?:\[\d*\])*) \s* (?:=\s* (?P<values> .*?))? \s*
    """,
    re.VERBOSE | re.DOTALL,
)
FUNCTION = re.compile(
    r"""
    (?:\.\w+\s+)*? \.(?P<kind> entry|func) \s* (?:\( (?P<results> [^)]*) \))?
    \s* (?P<name> [$\w]+) \s* (?:\( (?P<parameters> [^)]*) \))? (?P<directives> .*)
    """,
    re.VERBOSE | re.DOTALL,
)
MAX_THREADS = re.compile(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?")


@dataclass(frozen=True)
class Statement:
    """What ends in a semicolon; or a label, a brace, a directive that has a line of its own."""

    kind: str  # the name of a group of STATEMENT
    text: str
    line: int


@dataclass(frozen=True)
class Variable:
    """An array in some space of memory, or a parameter; in shared memory of 0 bytes: dynamic."""

    space: str
    name: str
    type: str
    count: int
    alignment: int
    values: str | None  # its initialiser

    @property
    def bytes(self) -> int:
        return self.count * BITS[self.type] // 8


@dataclass(frozen=True)
class Function:
    name: str
    is_kernel: bool
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
            raise PtxError(f"line {line}: expected a statement, got '{text[at : at + 60]}'")
        kind = str(m.lastgroup)
        if kind != "ignored":
            yield Statement(kind, m[kind], line)
        line += m[0].count("\n")
        at = m.end()


def parse_variable(text: str) -> Variable:
    m = VARIABLE.fullmatch(text)
    if not m or m["type"] not in BITS:
        raise PtxError(f"expected the declaration of a variable, got '{text}'")
    counts = [int(n or 0) for n in re.findall(r"\[(\d*)\]", m["counts"])]
    alignment = int(m["alignment"] or BITS[m["type"]] // 8)
    return Variable(m["space"], m["name"], m["type"], math.prod(counts), alignment, m["values"])


def parse_parameters(text: str | None) -> list[Variable]:
    return [parse_variable(one) for one in (text or "").split(",") if one.strip()]


def parse_function(head: str, body: Sequence[Statement]) -> Function:
    m = FUNCTION.fullmatch(head)
    if not m:
        raise PtxError(f"expected the head of a function, got '{head}'")
    limit = MAX_THREADS.search(m["directives"])
    return Function(
        name=m["name"],
        is_kernel=m["kind"] == "entry",
        results=parse_parameters(m["results"]),
        parameters=parse_parameters(m["parameters"]),
        max_threads=math.prod(int(n or 1) for n in limit.groups()) if limit else 1024,
        body=body,
    )


def body_of(rest: Iterator[Statement]) -> list[Statement]:
    """The statements up to the brace that closes the first one; none if that is a semicolon."""
    body: list[Statement] = []
    depth = 0
    for statement in rest:
        body.append(statement)
        if statement.kind == "brace":
            depth += {"{": 1, "}": -1, ";": 0}[statement.text]
            if depth == 0:
                break
    return body[1:-1]


def parse(ptx: str) -> Module:
    files: dict[int, str] = {}
    variables: list[Variable] = []
    functions: list[Function] = []
    rest = statements(ptx)
    for statement in rest:
        try:
            if statement.kind == "file" and (m := re.match(r'(\d+)\s+"([^"]*)"', statement.text)):
                files[int(m[1])] = m[2]
            elif statement.kind == "function":
                if body := body_of(rest):
                    functions.append(parse_function(statement.text, body))
            elif statement.kind == "statement":
                variables.append(parse_variable(statement.text))
            elif statement.text != ";":
                raise PtxError(f"expected a function or a variable, got '{statement.text}'")
        except PtxError as error:
            raise PtxError(f"line {statement.line}: {error}") from None
    return Module(files, variables, functions)
