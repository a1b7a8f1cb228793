"""Compiles .cu files for the emulator, into a shared library that ctypes or torch can load.

Their host code is always compiled by the C++ compiler; their kernels too, or by nvcc.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from cuda_emulator import ptx

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_emulator"

RUNTIME = (
    "api.cpp",
    "checker.cpp",
    "collectives.cpp",
    "fiber.cpp",
    "launch.cpp",
    "tensor_cores.cpp",
)
# The other half of instrumented code, of translated code, and what tells the checker of torch's
# tensors.
CHECKER = "hooks.cpp"
PTX = "ptx.cpp"
BUFFERS = "torch_buffers.cpp"
# The functions of torch's stable ABI that torch_buffers.cpp stands in front of.
WRAPPED = (
    "torch_get_mutable_data_ptr",
    "torch_get_const_data_ptr",
    "aoti_torch_aten_new_empty",
    "aoti_torch_aten_new_zeros",
    "torch_call_dispatcher",
)

INCLUDES = (HERE, ROOT / "csrc")
FLAGS = (
    "-std=c++20",
    "-g1",  # lines for messages
    "-fPIC",
    "-fno-gnu-unique",  # two libraries in one process share nothing
    "-ffp-contract=off",
    "-DSECATEUR_CUDA_EMULATOR",
    "-DSECATEUR_MAX_BLOCKS=5",
    *(f"-I{path}" for path in INCLUDES),
)
PLAIN = "-O2"
# No optimisation: what a compiler merges, nobody can check, and lines that ran are told exactly.
INSTRUMENTED = (
    "-O0",
    "-fsanitize=thread,alignment,bounds,shift-exponent",
    "-fsanitize-coverage=trace-pc",
    "-fno-threadsafe-statics",  # their guards are atomics of the C++ memory model
    "-include",
    str(HERE / "instrumented.h"),
)
# Not optimised, as there is much of it. Integers wrap, and any type may lie anywhere in memory.
TRANSLATED = ("-O0", "-fwrapv", "-fno-strict-aliasing", "-w")
NVCC = (
    "-ptx",
    "-std=c++20",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "--disable-warnings",
    f"-I{ROOT / 'csrc'}",
)


class Flavour(Enum):
    """How kernels are compiled.

    Attributes:
        PLAIN: by the C++ compiler, without checks of accesses.
        CHECKED: by the C++ compiler, every access checked; three to seven times slower.
        PTX: by nvcc, to PTX that is translated to C++ (:mod:`ptx`); every access checked.
    """

    PLAIN = "plain"
    CHECKED = "checked"
    PTX = "ptx"


class Arrival(IntEnum):
    """When the bytes of an asynchronous copy are there: as late as waits allow, or at once."""

    LATE = 0
    EAGER = 1


class Accumulation(IntEnum):
    """How tensor cores add up: in double; by fused multiply-adds; as an A100 was seen doing."""

    EXACT = 0
    SEQUENTIAL = 1
    TRUNCATING = 2


class Counters(NamedTuple):
    """What kernels did; atomics both read and write.

    Attributes:
        read: bytes of global memory; the checked flavour counts them.
        written: the same.
        products: ``mma.sync.m16n8k16`` of a warp.
        launches: of any kernel.
    """

    read: int
    written: int
    products: int
    launches: int


@dataclass(frozen=True)
class Unit:
    """A source file, and how it is compiled."""

    source: Path
    flags: tuple[str, ...]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def everything_included(compiler: str, *folders: Path) -> str:
    """A digest of what an object depends on beside its own source: headers and compiler."""
    command = [*shlex.split(compiler), "--version"]
    digest = hashlib.sha256(subprocess.run(command, check=True, capture_output=True).stdout)
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix in (".h", ".cuh"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def torch_directory() -> Path:
    import torch  # only glue needs it

    return Path(torch.__file__).parent


def torch_compile_flags() -> tuple[str, ...]:
    include = torch_directory() / "include"
    version = hashlib.sha256((include / "torch" / "headeronly" / "version.h").read_bytes())
    return (
        f"-isystem{include}",
        "-DTORCH_STABLE_ONLY",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DCUDA_EMULATOR_TORCH={version.hexdigest()[:8]}",  # objects of another torch are others
    )


def run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed: {shlex.join(command)}\n{done.stderr}")


def made(key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes, from the cache if it was made before."""
    target = CACHE / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Under another name until it is complete: others may build the same.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            output = Path(scratch) / target.name
            make(output)
            os.replace(output, target)
    return target


def compiled(unit: Unit) -> Path:
    included = everything_included(shlex.join(compiler()), *INCLUDES)
    key = f"{included} {unit} {unit.source.read_text('utf-8')}"
    command = [*compiler(), *unit.flags, "-x", "c++", "-c", str(unit.source), "-o"]
    return made(key, ".o", lambda out: run([*command, str(out)], f"compiling {unit.source.name}"))


def nvcc() -> str | None:
    """The compiler that the PTX flavour needs, if it is there."""
    return shutil.which("nvcc")


def contraction(fused: bool) -> tuple[str, ...]:
    """What to tell nvcc of multiplications and additions; that it may fuse them is its default."""
    return () if fused else ("-fmad=false",)


def ptx_of(source: Path, arch: str, flags: Sequence[str]) -> Path:
    """What nvcc makes of a .cu file.

    Raises:
        RuntimeError: there is no nvcc, or it refuses; with its message.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(f"compiling {source.name} to PTX: expected nvcc, found none")
    command = [compiler, *NVCC, f"-arch={arch}", *flags, str(source), "-o"]
    included = everything_included(shlex.quote(compiler), ROOT / "csrc")
    key = f"{included} {command} {source.read_text('utf-8')}"
    return made(key, ".ptx", lambda out: run([*command, str(out)], f"nvcc -ptx {source.name}"))


def translated(source: Path, host: Unit, flags: Sequence[str]) -> list[Path]:
    """Objects of a .cu file whose kernels are those of its PTX."""
    text = ptx_of(source, "compute_80", flags).read_text("utf-8")
    parts = sorted(Path(ptx.__file__).parent.glob("*.py"))
    translator = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    prefix = "ptx_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    own = tuple(str(path) for path in (source, *INCLUDES))

    def translate(output: Path) -> None:
        code = ptx.translate(text, prefix, lambda file: file.startswith(own))
        output.write_text(code, "utf-8")

    code = made(f"{translator} {prefix} {own}", ".cpp", translate)
    # Translated code takes the place of a kernel that is local to the file: it is found by a name
    # that the linker sees.
    names = [
        f"--{what}={name}"
        for i, kernel in enumerate(ptx.kernels(text))
        for what, name in (
            ("redefine-sym", f"{kernel}={prefix}_{i}"),
            ("globalize-symbol", f"{prefix}_{i}"),
        )
    ]
    plain = compiled(host)
    command = ["objcopy", *names, str(plain)]
    named = made(shlex.join(command), ".o", lambda out: run([*command, str(out)], "naming kernels"))
    return [named, compiled(Unit(code, (*FLAGS, *TRANSLATED)))]


def library(
    kernels: Iterable[Path],
    glue: Iterable[Path] = (),
    *,
    flavour: Flavour,
    flags: Sequence[str] = (),
    fused: Collection[Path] = (),
) -> Path:
    """Build a library, or find it built already.

    Args:
        kernels: .cu files.
        glue: C++ files that launch them, written against torch's stable ABI.
        flavour: who compiles the kernels.
        flags: further flags of the C++ compiler, for the glue.
        fused: those of the .cu files in which nvcc may fuse a multiplication and an addition.

    Returns:
        The shared library; :func:`load` loads it, or ``torch.ops.load_library`` if it has glue.

    Raises:
        RuntimeError: something does not compile or link; with the compiler's message.
        ptx.PtxError: something in the PTX is not known.
    """
    glue = tuple(glue)
    # The linker keeps the first copy of an inline function: instrumented ones come last.
    units = [Unit(HERE / name, (*FLAGS, PLAIN)) for name in RUNTIME]
    link = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
    libraries = []
    if flavour is Flavour.CHECKED:
        units.append(Unit(HERE / CHECKER, (*FLAGS, PLAIN)))
    if flavour is Flavour.PTX:
        units.append(Unit(HERE / PTX, (*FLAGS, PLAIN)))
    if glue:
        torch, torch_flags = torch_directory(), torch_compile_flags()
        units += [Unit(path, (*FLAGS, PLAIN, *torch_flags, *flags)) for path in glue]
        libraries += [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch_cpu", "-lc10"]
    if glue and flavour is not Flavour.PLAIN:
        units.append(Unit(HERE / BUFFERS, (*FLAGS, PLAIN, *torch_flags)))
        link += [f"-Wl,--wrap={name}" for name in WRAPPED]
    kernel_flags = INSTRUMENTED if flavour is Flavour.CHECKED else (PLAIN,)

    def of_kernels(path: Path) -> list[Path]:
        unit = Unit(path, (*FLAGS, *kernel_flags))
        if flavour is not Flavour.PTX:
            return [compiled(unit)]
        return translated(path, unit, contraction(path in fused))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        later = pool.map(of_kernels, kernels)
        objects = [*pool.map(compiled, units), *(path for paths in later for path in paths)]
    command = [*compiler(), *link, *map(str, objects), *libraries, "-o"]
    return made(shlex.join(command), ".so", lambda out: run([*command, str(out)], "linking"))


@functools.cache
def block_starts(path: Path) -> dict[int, tuple[str, int]]:
    """File and line of every basic block, by the address the coverage hook returns to."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    calls = re.findall(r"<__sanitizer_cov_trace_pc(?:@plt)?>\n +([0-9a-f]+):", listing)
    found = subprocess.run(
        ["addr2line", "-e", path],
        input="\n".join(f"{int(at, 16) - 1:x}" for at in calls),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = re.findall(r"^(.+):(\d+|\?)", found, re.MULTILINE)
    return {
        int(at, 16): (name, int(line))
        for at, (name, line) in zip(calls, lines, strict=True)
        if line.isdigit()
    }


class Emulator:
    """A loaded library: its options, and its functions if they are called through ctypes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._library = ctypes.CDLL(str(path))

    def set_seed(self, seed: int) -> None:
        """Choose a schedule.

        0 runs threads and blocks in order. Odd seeds shuffle threads, even ones let some warps run
        far ahead of others; try both.
        """
        self._library.cuda_emulator_set_seed(ctypes.c_uint64(seed))

    def set_arrival(self, arrival: Arrival) -> None:
        """Choose when asynchronous copies arrive; a kernel must be right either way."""
        self._library.cuda_emulator_set_arrival(ctypes.c_int(arrival))

    def set_accumulation(self, accumulation: Accumulation) -> None:
        """Choose how tensor cores add up; a kernel's result must be good either way."""
        self._library.cuda_emulator_set_accumulation(ctypes.c_int(accumulation))

    def add_buffer(self, address: int, size: int, initialised: bool = True) -> None:
        """Let kernels access memory; what was known of it is forgotten.

        Ops with glue announce their tensors themselves.
        """
        self._library.cuda_emulator_add_buffer(
            ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_bool(initialised)
        )

    def forget_buffers(self) -> None:
        """Forget all memory that kernels may access."""
        self._library.cuda_emulator_forget_buffers()

    def counters(self) -> Counters:
        """What was counted since the library was loaded."""
        counters = (ctypes.c_uint64 * 4)()
        self._library.cuda_emulator_counters(counters)
        return Counters(*counters)

    def dynamic_shared(self) -> dict[str, int]:
        """The most bytes of dynamic shared memory that launches of each kernel asked for.

        By the linker's name of the kernel; under PTX it is called after its place in the PTX.
        """
        asked: dict[int, int] = {}
        each = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_size_t)(asked.__setitem__)
        self._library.cuda_emulator_each_dynamic_shared(each)
        listing = subprocess.run(["nm", self._path], check=True, capture_output=True, text=True)
        symbols = re.findall(r"^([0-9a-f]+) [tTwW] (.+)$", listing.stdout, re.MULTILINE)
        names = {int(at, 16): symbol for at, symbol in symbols}
        return {names[at]: size for at, size in asked.items()}

    def lines(self, source: Path) -> tuple[set[int], set[int]]:
        """Lines of a kernel file at which a basic block starts, and those of them that have run.

        Only the checked flavour knows. Lines that only close a brace are left out.
        """
        size = ctypes.c_size_t()
        self._library.cuda_emulator_reached.restype = ctypes.c_void_p
        address = self._library.cuda_emulator_reached(ctypes.byref(size))
        reached = ctypes.string_at(address, size.value)
        text = source.read_text("utf-8").splitlines()
        counted = {i for i, line in enumerate(text, 1) if not line.lstrip().startswith("}")}
        blocks = [
            (line, bool(reached[at]))
            for at, (name, line) in block_starts(self._path).items()
            if name == str(source) and line in counted
        ]
        return {line for line, _ in blocks}, {line for line, was in blocks if was}

    def call(self, name: str, *args: Any) -> None:
        """Call a function that returns ``cuda_emulator::message_of(...)``.

        Raises:
            RuntimeError: a launch went wrong.
        """
        function = self._library[name]
        function.restype = ctypes.c_char_p
        message = function(*args)
        if message is not None:
            raise RuntimeError(message.decode())


def load(path: Path) -> Emulator:
    return Emulator(path)
