"""Writes C++ for what was read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cuda_emulator.ptx.instructions import OPERATORS, cpp, form_of, replace_words
from cuda_emulator.ptx.reader import (
    BITS,
    Function,
    Module,
    PtxError,
    Statement,
    Variable,
    parse,
    parse_variable,
)

INSTRUCTION = re.compile(r"(?:@(!?)\s*([$%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
SPACES = ("global", "shared", "local", "param", "const")
# Which cache, and for how long: no value depends on it. Here all threads see accesses in one order
# anyway, whatever a volatile one asks for.
HINT = re.compile(r"weak|volatile|nc|ca|cg|cs|lu|cv|wb|wt|L[12]::\w+")

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
# What an atomic leaves, of what was there before and its operands a and b.
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


@dataclass(frozen=True)
class Symbol:
    """What a name stands for: a register of some bits, or memory in a space."""

    cpp: str
    space: str = "register"
    bits: int = 0

    @property
    def address(self) -> str:
        """Of shared memory 32 bits that count from dynamic shared memory, else generic."""
        if self.space == "shared":
            return f"{self.cpp}.address()" if self.cpp else "0"
        return f"address_of({self.cpp})"


def identifier(name: str) -> str:
    """A name for C++ that is none of C++ or ``ptx.h``."""
    return ("" if name[0] in "%$_" else "n_") + re.sub(r"\W", "_", name)


def split(operands: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+", operands)


def elements(operand: str) -> list[str]:
    """Those of a vector in braces, or of a list in parentheses; others are one themselves."""
    return split(operand[1:-1]) if operand[0] in "{(" else [operand]


def source_name(name: str) -> str:
    """What a shared array is called in the source, from a mangled name such as _ZZ1fvE3abc."""
    m = re.fullmatch(r".*E(\d+)([A-Za-z_][\w$]*)", name)
    return m[2][: int(m[1])] if m else name


def offsets(parameters: Sequence[Variable]) -> list[int]:
    """Where each parameter of a kernel begins, and where the last one ends."""
    found, end = [], 0
    for parameter in parameters:
        found.append(-(-end // parameter.alignment) * parameter.alignment)
        end = found[-1] + parameter.bytes
    return [*found, end]


def head_of(function: Function) -> str:
    name = identifier(function.name)
    if function.is_kernel:
        return f"void {name}(const void*, const void* parameters)"
    variables = (*function.results, *function.parameters)
    return f"void {name}({', '.join(f'char* {identifier(v.name)}' for v in variables)})"


def shared_array(variable: Variable) -> str:
    name = identifier(variable.name)
    return f"static SharedArray<{variable.bytes}, {variable.alignment}> {name};"


def constant_array(variable: Variable) -> str:
    """Of a .const or .global variable; the checker tells kernels that write to one."""
    values = (variable.values or "").strip("{} ")
    if not re.fullmatch(r"[\s,\d-]*", values) or variable.type[0] == "f":
        raise PtxError(f"expected '{variable.name}' to consist of integers, got '{values}'")
    return (
        f"alignas({variable.alignment}) const {cpp(variable.type)} "
        f"{identifier(variable.name)}[{variable.count}] = {{{values}}};"
    )


class Translator:
    """Translates one function."""

    def __init__(
        self, module: Module, symbols: Mapping[str, Symbol], own: Callable[[str], bool]
    ) -> None:
        self._module = module
        self._own = own
        self._scopes = [symbols]  # of the module, of the function, of braces within
        self._label = ""  # the last one
        self._targets: dict[str, list[str]] = {}  # of brx.idx, by label
        self._local = ""  # the function's .local array
        self._place = ("?", 0)
        self._code: list[tuple[tuple[str, int], list[str]]] = []  # by place

    def translate(self, function: Function) -> str:
        names: dict[str, Symbol] = {}
        self._scopes.append(names)
        self._emit("const u64 window = shared_window();")
        if function.is_kernel:
            self._emit("char* const arguments = (char*)parameters;")
            starts = offsets(function.parameters)[:-1]
            for start, variable in zip(starts, function.parameters, strict=True):
                names[variable.name] = Symbol(f"(arguments + {start})", "param")
        else:
            for variable in (*function.results, *function.parameters):
                names[variable.name] = Symbol(identifier(variable.name), "param")
        words = {word for s in function.body for word in re.findall(r"[$%\w]+", s.text)}
        for name, symbol in self._scopes[0].items():
            if symbol.space == "shared" and symbol.cpp and name in words:
                self._emit(f'{symbol.cpp}.open("{source_name(name)}");')
        for statement in function.body:
            try:
                self._translate(statement)
            except PtxError as error:
                file, line = self._place
                raise PtxError(f"line {statement.line} ({file}:{line}): {error}") from None
        lines = [
            f'#line {line} "{file}"\n{" ".join(statements)}'
            for (file, line), statements in self._code
        ]
        return "\n".join([head_of(function) + " {", *lines, "}"])

    # Statements.

    def _emit(self, code: str) -> None:
        if not self._code or self._code[-1][0] != self._place:
            self._code.append((self._place, []))
        self._code[-1][1].append(code)

    def _translate(self, statement: Statement) -> None:
        text = statement.text.strip()
        if statement.kind == "loc":
            self._move_to(text)
        elif statement.kind == "brace":
            if text == "{":
                self._scopes.append({})
            elif text == "}":
                self._scopes.pop()
            self._emit(text)
        elif statement.kind == "label":
            if len(self._scopes) > 2:
                raise PtxError(f"expected no label within braces, got '{text}'")
            self._label = text
            self._emit(f"{identifier(text)}:;")
        elif text.startswith("."):
            self._declare(text)
        else:
            self._emit(self._instruction(text))

    def _move_to(self, text: str) -> None:
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
        elif m := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            self._declare_registers(m[1], m[2])
        else:
            self._declare_variable(parse_variable(text))

    def _declare_registers(self, kind: str, names: str) -> None:
        if kind not in BITS:
            raise PtxError(f"expected registers of a type that is known, got '.{kind}'")
        register = "bool" if kind == "pred" else f"u{BITS[kind]}"
        declared = []
        for name in split(names):
            m = re.fullmatch(r"([$%\w]+)(?:<(\d+)>)?", name)
            if not m:
                raise PtxError(f"expected the name of a register, got '{name}'")
            for one in [f"{m[1]}{i}" for i in range(int(m[2]))] if m[2] else [name]:
                self._add(one, Symbol(identifier(one), bits=BITS[kind]))
                declared.append(f"{identifier(one)} = {register}(kGarbage)")
        self._emit(f"{register} {', '.join(declared)};")

    def _declare_variable(self, variable: Variable) -> None:
        name = identifier(variable.name)
        self._add(variable.name, Symbol(name, variable.space))
        if variable.space == "shared":
            self._emit(f'{shared_array(variable)} {name}.open("{source_name(variable.name)}");')
        elif variable.space in ("local", "param"):
            self._emit(f"alignas({variable.alignment}) char {name}[{variable.bytes}];")
        else:
            raise PtxError(f"expected no variable of the module here, got '{variable.name}'")
        if variable.space == "local":
            if self._local:
                raise PtxError("expected one local array in a function")
            self._local = name
            self._emit(f"std::memset({name}, -1, sizeof({name}));")

    def _add(self, name: str, symbol: Symbol) -> None:
        scope = self._scopes[-1]
        assert isinstance(scope, dict)
        scope[name] = symbol

    def _instruction(self, text: str) -> str:
        m = INSTRUCTION.fullmatch(text)
        if not m:
            raise PtxError(f"expected an instruction, got '{text}'")
        negated, guard, opcode, operands = m.groups()
        code = self._instruction_of(opcode, split(operands))
        if code is None:
            raise PtxError(f"expected an instruction that is known, got '{text}'")
        return f"if ({negated}{self._value(guard, 'pred')}) {{ {code} }}" if guard else code

    def _instruction_of(self, opcode: str, operands: list[str]) -> str | None:
        form = form_of(opcode)
        if form is None:
            method = self.METHODS.get(opcode.partition(".")[0])
            return method(self, opcode, operands) if method else None
        values = operands[1:] if form.result else operands
        if len(values) != len(form.operands):
            return None
        words = dict(zip("abcd", map(self._value, values, form.operands), strict=False))
        code = replace_words(form.expression, words)
        return self._assign(operands[0], form.result, code) if form.result else f"{code};"

    # Operands.

    def _find(self, name: str) -> Symbol | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _assign(self, target: str, kind: str, code: str) -> str:
        if target == "_":
            return f"(void)({code});"
        symbol, bits = self._find(target), BITS[kind]
        exact = kind in ("f32", "f64", "pred")
        if (
            symbol is None
            or symbol.space != "register"
            or not (symbol.bits == bits or (symbol.bits > bits and not exact))
        ):
            raise PtxError(f"expected a register that takes a '{kind}', got '{target}'")
        if kind in ("f32", "f64"):
            return f"{symbol.cpp} = __builtin_bit_cast(u{bits}, {code});"
        return f"{symbol.cpp} = {code if bits == symbol.bits else f'({cpp(kind)})({code})'};"

    def _value(self, operand: str, kind: str) -> str:
        """An operand as a C++ value of a type of PTX."""
        target, bits = cpp(kind), BITS[kind]
        if kind == "pred" and operand[0] == "!":
            return f"!{self._value(operand[1:], kind)}"
        symbol = self._find(operand)
        if symbol and symbol.space == "register":
            exact = kind in ("f32", "f64", "pred") or symbol.bits == 1
            if bits > symbol.bits or (exact and bits != symbol.bits):
                raise PtxError(f"expected '{operand}' to be a '{kind}'")
            if kind in ("f32", "f64"):
                return f"__builtin_bit_cast({kind}, {symbol.cpp})"
            same = target in (f"u{symbol.bits}", "bool")
            return symbol.cpp if same else f"{target}({symbol.cpp})"
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            literal, width = f"0x{m[1] or m[2]}u", 32 if m[1] else 64
            if bits != width:
                raise PtxError(f"expected '{operand}' to be a '{kind}'")
            literal = f"u{width}({literal})"
            return f"__builtin_bit_cast({kind}, {literal})" if kind[0] == "f" else literal
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
        """A generic address of 64 bits."""
        symbol, offset = self._base(operand)
        in_register = symbol.space == "register"
        if (
            (symbol.bits not in ((32, 64) if space == "shared" else (64,)))
            if in_register
            else ((symbol.space == "shared") != (space == "shared"))
        ):
            raise PtxError(f"expected an address of {space or 'any'} memory, got '{operand}'")
        base = symbol.cpp if in_register else symbol.address
        if space == "shared":
            return f"from_shared(window, u32({base}) + {offset})"
        return f"{base} + {offset}"

    def _memory(self, how: str, operand: str, space: str, size: int) -> str:
        """A pointer to memory that is to be read or written (``load``, ``store``)."""
        symbol, offset = self._base(operand)
        if space == "param" and symbol.space == "param":  # nothing that could go wrong
            return f"({symbol.cpp} + {offset})"
        address = self._address(operand, space)
        if space == "local" and self._local:
            return f"local({address}, {size}, {self._local})"
        return f"{how}({address}, {size})"

    # Instructions that are more than an expression; None if they are not known.

    def _move(self, opcode: str, operands: list[str]) -> str | None:
        kind = opcode.removeprefix("mov.")
        if kind not in BITS:
            return None
        targets, values = elements(operands[0]), elements(operands[1])
        part = BITS[kind] // max(len(targets), len(values))
        if len(values) > 1:
            parts = (
                f"{cpp(kind)}({self._value(value, f'b{part}')}) << {i * part}"
                for i, value in enumerate(values)
            )
            return self._assign(targets[0], kind, " | ".join(parts))
        value = self._value(values[0], kind)
        if len(targets) == 1:
            return self._assign(targets[0], kind, value)
        return " ".join(
            self._assign(target, f"b{part}", f"{value} >> {i * part}")
            for i, target in enumerate(targets)
        )

    def _access(self, opcode: str) -> tuple[str, int, str] | None:
        """Space, number of elements and their type of a load or a store."""
        _, *modifiers, kind = re.sub("::(cta|func|entry)", "", opcode).split(".")
        space, count = "", 1
        for modifier in modifiers:
            if modifier in SPACES:
                space = modifier
            elif modifier in ("v2", "v4", "v8"):
                count = int(modifier[1])
            elif not HINT.fullmatch(modifier):
                return None
        return (space, count, kind) if kind in BITS else None

    def _load(self, opcode: str, operands: list[str]) -> str | None:
        access = self._access(opcode)
        targets = elements(operands[0])
        if access is None or access[1] != len(targets):
            return None
        space, count, kind = access
        how = "load_read_only" if ".nc." in opcode else "load"
        memory = self._memory(how, operands[1], space, count * BITS[kind] // 8)
        integer = kind if kind[0] == "s" else f"u{BITS[kind]}"
        if count == 1:
            return self._assign(targets[0], integer, f"*({integer}*){memory}")
        loads = (
            self._assign(target, integer, f"(({integer}*)from)[{i}]")
            for i, target in enumerate(targets)
        )
        return f"{{ char* const from = {memory}; {' '.join(loads)} }}"

    def _store(self, opcode: str, operands: list[str]) -> str | None:
        access = self._access(opcode)
        values = elements(operands[1])
        if access is None or access[1] != len(values):
            return None
        space, count, kind = access
        memory = self._memory("store", operands[0], space, count * BITS[kind] // 8)
        integer = f"u{BITS[kind]}"
        if count == 1:
            return f"*({integer}*){memory} = {self._value(values[0], integer)};"
        stores = (
            f"(({integer}*)to)[{i}] = {self._value(value, integer)};"
            for i, value in enumerate(values)
        )
        return f"{{ char* const to = {memory}; {' '.join(stores)} }}"

    def _atomic(self, opcode: str, operands: list[str]) -> str | None:
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
                return None
        target, address, *values = operands if name == "atom" else ["_", *operands]
        if not change or kind not in BITS:
            return None
        words = {
            letter: self._value(value, kind) for letter, value in zip("ab", values, strict=False)
        }
        value = cpp(kind)
        update = f"[&]({value} before) {{ return {value}({replace_words(change, words)}); }}"
        call = f"atomic<{value}>({self._address(address, space)}, {update})"
        return order + self._assign(target, kind, call)

    def _compare(self, opcode: str, operands: list[str]) -> str | None:
        _, comparison, *combine, kind = opcode.split(".")
        if kind not in BITS or len(combine) != len(operands) - 3:
            return None
        floats = kind[0] == "f"
        if comparison in COMPARISONS:
            test = COMPARISONS[comparison]
            if comparison == "ne" and floats:  # unlike in C++, not of NaN
                test = "!unordered(a, b) && a != b"
        elif floats and comparison in ("num", "nan"):
            test = f"{'!' if comparison == 'num' else ''}unordered(a, b)"
        elif floats and comparison[:2] in COMPARISONS and comparison[2:] == "u":
            test = f"unordered(a, b) || {COMPARISONS[comparison[:2]]}"
        else:
            return None
        words = dict(zip("ab", (self._value(o, kind) for o in operands[1:3]), strict=True))
        combined = ""
        if combine:
            if combine[0] not in ("and", "or", "xor"):
                return None
            combined = f" {OPERATORS[combine[0]]} {self._value(operands[3], 'pred')}"
        target, *negated = operands[0].split("|")
        code = self._assign(target, "pred", f"({replace_words(test, words)}){combined}")
        if not negated:
            return code
        test = f"const bool is = {replace_words(test, words)};"
        code = self._assign(target, "pred", f"is{combined}")
        return f"{{ {test} {code} {self._assign(negated[0], 'pred', f'!is{combined}')} }}"

    def _shuffle(self, opcode: str, operands: list[str]) -> str | None:
        m = re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", opcode)
        if not m or len(operands) != 5:
            return None
        target, *inside = operands[0].split("|")
        arguments = ", ".join(self._value(operand, "u32") for operand in operands[1:])
        code = f"const Shuffled got = shfl<Shuffle::{m[1].capitalize()}>({arguments}); "
        code += self._assign(target, "b32", "got.value")
        if inside:
            code += self._assign(inside[0], "pred", "got.inside")
        return f"{{ {code} }}"

    def _barrier(self, opcode: str, operands: list[str]) -> str | None:
        if re.fullmatch(r"(bar|barrier)\.sync(\.aligned)?", opcode) and operands == ["0"]:
            return "__syncthreads();"
        m = re.fullmatch(r"(?:bar|barrier)\.red(?:\.aligned)?\.(popc|and|or)\.(u32|pred)", opcode)
        if not m or len(operands) != 3 or operands[1] != "0":
            return None
        function = f"__syncthreads_{m[1].replace('popc', 'count')}"
        return self._assign(operands[0], m[2], f"{function}({self._value(operands[2], 'pred')})")

    def _copy(self, opcode: str, operands: list[str]) -> str | None:
        m = re.fullmatch(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::\w+)*", opcode)
        if not m or len(operands) not in (3, 4) or (m[1] == "cg" and operands[2] != "16"):
            return None
        to, source = self._address(operands[0], "shared"), self._address(operands[1], "global")
        size, source_size = (self._value(operands[i], "s32") for i in (2, -1))
        return f"copy_async(pointer_to({to}), pointer_to({source}), {size}, {source_size});"

    def _load_matrices(self, opcode: str, operands: list[str]) -> str | None:
        m = re.fullmatch(
            r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", opcode
        )
        targets = elements(operands[0])
        if not m or len(targets) != int(m[1]):
            return None
        row = self._address(operands[1], "shared")
        transposed = "true" if m[2] else "false"
        code = f"u32 rows[4]; load_matrices(rows, {m[1]}, pointer_to({row}), {transposed}); "
        code += " ".join(self._assign(t, "b32", f"rows[{i}]") for i, t in enumerate(targets))
        return f"{{ {code} }}"

    def _multiply(self, opcode: str, operands: list[str]) -> str | None:
        m = re.fullmatch(
            r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<type>bf16|f16)\.(?P=type)\.f32",
            opcode,
        )
        if not m:
            return None
        targets, *inputs = map(elements, operands)
        if [len(targets), *map(len, inputs)] != [4, 4, 2, 4]:
            return None
        fragments = ", ".join(
            "{" + ", ".join(self._value(operand, kind) for operand in fragment) + "}"
            for fragment, kind in zip(inputs, ("b32", "b32", "f32"), strict=True)
        )
        form = {"bf16": "BFloat16", "f16": "Half"}[m["type"]]
        code = f"f32 sums[4]; multiply_accumulate(Format::{form}, sums, {fragments}); "
        code += " ".join(self._assign(t, "f32", f"sums[{i}]") for i, t in enumerate(targets))
        return f"{{ {code} }}"

    def _branch(self, opcode: str, operands: list[str]) -> str | None:
        return f"goto {identifier(operands[0])};" if opcode in ("bra", "bra.uni") else None

    def _branch_by_index(self, opcode: str, operands: list[str]) -> str | None:
        if opcode not in ("brx.idx", "brx.idx.uni"):
            return None
        cases = " ".join(
            f"case {i}: goto {identifier(label)};"
            for i, label in enumerate(self._targets[operands[1]])
        )
        return f'switch ({self._value(operands[0], "u32")}) {{ {cases} }} fail("brx.idx");'

    def _call(self, opcode: str, operands: list[str]) -> str | None:
        results = elements(operands.pop(0)) if operands[0][0] == "(" else []
        name, *rest = operands
        if all(function.name != name for function in self._module.functions) or len(rest) > 1:
            return None
        arguments = [self._find(one) for one in [*results, *(elements(rest[0]) if rest else [])]]
        if any(symbol is None or symbol.space != "param" for symbol in arguments):
            return None
        return f"{identifier(name)}({', '.join(symbol.cpp for symbol in arguments if symbol)});"

    def _return(self, opcode: str, operands: list[str]) -> str | None:
        return "return;" if opcode in ("ret", "ret.uni") else None

    METHODS: Mapping[str, Callable[[Translator, str, list[str]], str | None]] = {
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


def host_name(kernel: str) -> str:
    """What g++ calls a kernel: to nvcc anonymous namespaces have a name, with its length before."""
    while m := re.search(r"(\d+)(?=_GLOBAL__N__)", kernel):
        for i in range(len(m[1])):  # the first digits may belong to what stands before
            end = m.end() + int(m[1][i:])
            if kernel[end : end + 1].isdigit():
                kernel = f"{kernel[: m.start() + i]}12_GLOBAL__N_1{kernel[end:]}"
                break
        else:
            raise PtxError(f"expected a mangled name, got '{kernel}'")
    return kernel


def kernels(ptx: str) -> list[str]:
    """What g++ calls the kernels of a file of PTX, in order."""
    return [host_name(name) for name in re.findall(r"\.entry\s+([$\w]+)", ptx)]


def translate(ptx: str, prefix: str, own: Callable[[str], bool]) -> str:
    """Translate a file of PTX.

    Args:
        ptx: what nvcc made.
        prefix: ``prefix_i`` is the symbol of the i-th kernel in the host's code.
        own: whether a source file's lines are to be named, rather than where they were inlined.

    Returns:
        C++ code, which takes the place of the kernels when it is loaded.

    Raises:
        PtxError: something is not understood; with the line.
    """
    module = parse(ptx)
    symbols: dict[str, Symbol] = {}
    code = [
        '#include "ptx.h"',
        "namespace {",
        "using namespace cuda_emulator;",
        "using namespace cuda_emulator::ptx;",
    ]
    for variable in module.variables:
        name = identifier(variable.name)
        if variable.space != "shared":
            code.append(constant_array(variable))
        elif variable.bytes:
            code.append(shared_array(variable))
        else:
            name = ""  # dynamic
        symbols[variable.name] = Symbol(name, variable.space)
    code += [f"{head_of(function)};" for function in module.functions]
    code += [Translator(module, symbols, own).translate(f) for f in module.functions]
    code.append("}  // namespace")
    for i, kernel in enumerate(f for f in module.functions if f.is_kernel):
        size = offsets(kernel.parameters)[-1]
        replacement = f"{{{identifier(kernel.name)}, {size}, {kernel.max_threads}}}"
        code += [
            f'extern "C" const char {prefix}_{i};',
            f"static const bool replaced_{i} = (replace(&{prefix}_{i}, {replacement}), true);",
        ]
    return "\n".join(code) + "\n"
