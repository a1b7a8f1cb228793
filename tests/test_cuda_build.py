"""The CUDA kernels as shipped: what nvcc made of them, read from the library, and how it loads.

``make cuda-resources`` rewrites the table that a change of registers or shared memory must update.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import Flavour
from cuda_emulator.ops import emulated_ops

from secateur.ops import _cuda
from secateur.ops._spec import FLOATS
from secateur.ops.block_sparse import Pattern

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "cuda-resources.md"
ARCHITECTURES = ("sm_80", "sm_90a")
# Registers are the compiler's choice: the table is compared where this release made the library.
NVCC = "13.0"
# Sides of the blocks that tensor cores take.
WIDTHS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared: int  # static
    local: int  # bytes of stack and local memory
    sass: str


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tool(name: str) -> str:
    """A program of the CUDA toolkit, which the wheel nvidia-cuda-<name> brings as well."""
    if found := shutil.which(name):
        return found
    files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    return str(next(f.locate() for f in files if f.name == name))


def readable(symbol: str) -> str:
    """``mask::apply_kernel<Flat>`` for what the linker calls it."""
    name = run("c++filt", symbol).strip()
    name = re.sub(r"\(anonymous namespace\)::|secateur::|CUDA::|^void ", "", name)
    name = re.sub(r"\((\w+)\)(\d+)", r"\1 \2", name).partition("(")[0]  # enumerators are casts
    return re.sub(r"(?<=[<\s])(?:\w+::)+", "", name)


def sections(text: str, heading: str) -> dict[str, dict[str, str]]:
    """Of cuobjdump's output: architecture -> function -> what follows its heading."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        arch = part.split("\n", 1)[0].strip()
        for function in re.split(heading, part)[1:]:
            symbol, rest = re.split(r"[:\s]", function.strip(), maxsplit=1)
            found.setdefault(arch, {})[readable(symbol)] = rest
    return found


def read_kernels() -> dict[str, dict[str, Kernel]]:
    usage = sections(run(tool("cuobjdump"), "-res-usage", _cuda.LIBRARY), r"\n Function ")
    sass = sections(run(tool("cuobjdump"), "-sass", _cuda.LIBRARY), r"\n\t\tFunction : ")
    kernels: dict[str, dict[str, Kernel]] = {}
    for arch, functions in usage.items():
        for name, text in functions.items():
            got = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
            kernels.setdefault(arch, {})[name] = Kernel(
                got["REG"], got["SHARED"], got["STACK"] + got["LOCAL"], sass[arch][name]
            )
    return kernels


def takers_of_dynamic_shared() -> set[str]:
    """Kernels that read or write dynamic shared memory, by the PTX: machine code does not tell."""
    found = set()
    for file in run(tool("cuobjdump"), "-ptx", _cuda.LIBRARY).split("Fatbin ptx code:"):
        for entry in file.split(".entry ")[1:]:
            if "secateur_dynamic_shared" in entry:
                found.add(readable(entry.partition("(")[0]))
    return found


def launched_dynamic_shared() -> dict[str, int]:
    """The most bytes that launches ask for, of each kernel that they give dynamic shared memory."""
    emulated = emulated_ops(Flavour.PLAIN)
    pattern = Pattern.from_mask(torch.ones(1, 1, dtype=torch.bool)).tensors()
    # What else the emulator has launched does not matter: a kernel asks for the same each time.
    # Block-sparse products alone do: of blocks that tensor cores take and of others, for as many
    # rows as a lane has one of and for more.
    for side, rows, dtype in itertools.product((1, 4, 24, *WIDTHS), (32, 33), FLOATS):
        x, values = torch.ones(rows, side, dtype=dtype), torch.ones(1, side, side, dtype=dtype)
        emulated.call("block_sparse_linear", x, values, None, *pattern, side, None)
        emulated.call("block_sparse_linear_dx", x, values, *pattern, side)
        emulated.call("block_sparse_linear_dw", x, x, *pattern, side, side)
    most = emulated.emulator.dynamic_shared()
    return {readable(symbol): size for symbol, size in most.items() if size > 0}


def table(kernels: dict[str, dict[str, Kernel]], dynamic: dict[str, int]) -> str:
    lines = [
        "# Registers and shared memory of the CUDA kernels",
        "",
        f"Registers a thread and bytes of static shared memory a block, as nvcc {NVCC} makes them;",
        "no kernel spills or uses local memory. Dynamic shared memory is what launches ask for, on",
        "every GPU alike: the most that they asked of the emulator. The system reserves 1024 bytes",
        "more of every block. The tools count them for sm_90a, in kernels that take shared memory",
        "and in all of a file where some take it dynamically, and never for sm_80.",
        "`make cuda-resources` writes this table and `tests/test_cuda_build.py` compares it.",
        "",
        "| kernel | "
        + " | ".join(f"{arch} registers | {arch} static shared" for arch in ARCHITECTURES)
        + " | dynamic shared |",
        "|---|" + "---:|---:|" * len(ARCHITECTURES) + "---:|",
    ]
    for name in sorted(kernels[ARCHITECTURES[0]]):
        cells = [f"`{name}`"]
        for kernel in (kernels[arch][name] for arch in ARCHITECTURES):
            cells += [str(kernel.registers), str(kernel.shared)]
        lines.append(f"| {' | '.join(cells)} | {dynamic.get(name, 0)} |")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, Kernel]]:
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc: the package is built without CUDA kernels where there is none")
    assert _cuda.LIBRARY.exists(), "nvcc is here, and the package was built without CUDA kernels"
    return read_kernels()


def test_every_kernel_is_there_for_every_architecture(
    kernels: dict[str, dict[str, Kernel]],
) -> None:
    assert set(kernels) == set(ARCHITECTURES)
    folders = {path.parent.name for path in ROOT.glob("csrc/*/cuda.cu")}
    for arch in ARCHITECTURES:
        assert kernels[arch].keys() == kernels[ARCHITECTURES[0]].keys()
        assert {name.split("::")[0] for name in kernels[arch]} == folders
    assert re.findall(r"sm_\d+\w*(?=\.ptx)", run(tool("cuobjdump"), "-lptx", _cuda.LIBRARY)) == [
        "sm_80"
    ] * len(folders)


def test_kernels_neither_spill_nor_use_local_memory(kernels: dict[str, dict[str, Kernel]]) -> None:
    for arch in ARCHITECTURES:
        for name, kernel in kernels[arch].items():
            assert kernel.local == 0, (arch, name)
            assert not re.search(r"\b(LDL|STL)\b", kernel.sass), (arch, name)


# What the names of kernels tell of them.
SIZES = {"BFloat16": 2, "Half": 2, "float": 4, "double": 8}
OBSERVE, STATE, UPDATE = range(3)  # secateur::Mode


def dtype_of(name: str) -> str:
    return re.findall("|".join(SIZES), name)[0]


def mode_of(name: str) -> int:
    return int(re.findall(r"Mode (\d)", name)[0])


def constant(path: str, name: str) -> int:
    """A number of the source."""
    text = (ROOT / "csrc" / path).read_text(encoding="utf-8")
    return int(re.findall(rf"^constexpr int {name} = (\d+);", text, re.MULTILINE)[0])


def vectors(elements: int, dtype: str) -> int:
    return elements * SIZES[dtype] // 16


def vectors_of_state(elements: int, dtype: str) -> int:
    """The same of states and scores, which are float where weights are smaller."""
    return vectors(elements, "double" if dtype == "double" else "float")


def operands(elements: int, dtype: str, mode: int) -> int:
    """Loads of weight, gradient and state, where the mode has a use for them."""
    weight = grad = vectors(elements, dtype)
    state = vectors_of_state(elements, dtype)
    return {OBSERVE: weight + grad, STATE: weight + state, UPDATE: weight + grad + state}[mode]


def of_mask(name: str) -> int:
    """Elements of 2, 4 and 8 bytes."""
    return 3 * constant("mask/cuda.cu", "kUnroll")


def loads_of_nm(name: str) -> int:
    """Groups of eight elements. The mode is no constant of the kernel: it has the loads of all."""
    return operands(8, dtype_of(name), UPDATE)


def loads_of_scores(name: str) -> int:
    """Some vectors of weights, and what goes with them."""
    dtype = dtype_of(name)
    return constant("score/cuda.cu", "kUnroll") * operands(16 // SIZES[dtype], dtype, mode_of(name))


def loads_of_tiles(name: str) -> int:
    """The first tile is asked for before the loop, the next one in it."""
    return 2 * loads_of_scores(name)


def loads_of_sample(name: str) -> int:
    """Groups of eight elements; where scores are float, of weights in any of three dtypes."""
    dtypes = ["double"] if dtype_of(name) == "double" else ["BFloat16", "Half", "float"]
    return sum(operands(8, dtype, mode_of(name)) for dtype in dtypes)


def loads_of_sweep(name: str) -> int:
    """The same; where scores are float, two groups are in flight."""
    return loads_of_sample(name) * (1 if dtype_of(name) == "double" else 2)


def loads_of_outer(name: str) -> int:
    """Rows of dY, some at a time, and then those that are left."""
    rows = int(re.findall(r", (\d+)>", name)[0])
    return (constant("block_sparse/sdd.cuh", "kOuterDepth") + 1) * vectors(rows, dtype_of(name))


def stores_of_scores(name: str) -> int:
    """The scores, and the new state."""
    dtype = dtype_of(name)
    outputs = 2 if mode_of(name) == UPDATE else 1
    unroll = constant("score/cuda.cu", "kUnroll")
    return unroll * outputs * vectors_of_state(16 // SIZES[dtype], dtype)


def stores_of_tiles(name: str) -> int:
    """The new state."""
    dtype = dtype_of(name)
    unroll = constant("score/cuda.cu", "kUnroll")
    return unroll * vectors_of_state(16 // SIZES[dtype], dtype) * (mode_of(name) == UPDATE)


# How many instructions of a kernel move 16 bytes, at least: as many as its source asks for. Each
# input, in each dtype that the kernel switches over, has one for every vector among the elements
# that a thread asks for at once. The compiler has more where it unrolled a loop further, or kept
# the load of an input that the mode has no use for; fewer where it tore one into elements.
LEAST: dict[str, dict[str, Callable[[str], int]]] = {
    "LDG": {
        "mask::apply_kernel<Flat>": of_mask,
        "mask::pack_kernel": lambda name: 1,
        "nm::aligned_kernel": loads_of_nm,
        "score::elements_kernel": loads_of_scores,
        "score::blocks_kernel<Vectors": loads_of_tiles,
        "score::rows_kernel<Vectors": loads_of_tiles,
        "topk::sample_kernel": loads_of_sample,
        "topk::sweep_kernel": loads_of_sweep,
        "topk::histogram_kernel": loads_of_sweep,
        "block_sparse::simt::dsd_kernel": lambda name: 1,  # of X or dY
        "block_sparse::simt::sample_kernel": lambda name: 2,  # of X and dY
        "block_sparse::simt::outer_kernel": loads_of_outer,
        "block_sparse::tensor_cores::add_kernel": lambda name: 2,  # eight sums
    },
    "STG": {
        "mask::apply_kernel<Flat>": of_mask,
        "mask::unpack_kernel": lambda name: 1,
        "score::elements_kernel": stores_of_scores,
        "score::blocks_kernel<Vectors": stores_of_tiles,
        "score::rows_kernel<Vectors": stores_of_tiles,
        "block_sparse::tensor_cores::add_kernel": lambda name: 1,  # eight results
        "block_sparse::tensor_cores::multiply_kernel": lambda name: 3,  # those, or eight sums
    },
}


@pytest.mark.parametrize(
    ("instruction", "prefix"), [(i, prefix) for i, least in LEAST.items() for prefix in least]
)
def test_contiguous_memory_moves_by_16_bytes(
    instruction: str, prefix: str, kernels: dict[str, dict[str, Kernel]]
) -> None:
    for arch in ARCHITECTURES:
        least = {n: LEAST[instruction][prefix](n) for n in kernels[arch] if n.startswith(prefix)}
        assert any(least.values()), arch
        for name, count in least.items():
            sass = kernels[arch][name].sass
            moves = re.findall(rf"\b{instruction}\.E\.(?:\w+\.)*128\b", sass)
            assert len(moves) >= count, (arch, name)


def test_tensor_cores_multiply_what_asynchronous_copies_bring(
    kernels: dict[str, dict[str, Kernel]],
) -> None:
    prefix = "block_sparse::tensor_cores::multiply_kernel"
    multiplies = {"BFloat16": r"HMMA\.16816\.F32\.BF16 ", "Half": r"HMMA\.16816\.F32 "}
    loads = {
        "Forward": (r"LDSM\.16\.M88",),
        "InputGradient": (r"LDSM\.16\.M88", r"LDSM\.16\.MT88"),
        "WeightGradient": (r"LDSM\.16\.MT88",),
    }
    for arch in ARCHITECTURES:
        for dtype, product, width in itertools.product(multiplies, loads, WIDTHS):
            kernel = kernels[arch][f"{prefix}<{dtype}, {product}, {width}>"]
            copies = (r"LDGSTS\.E\.BYPASS\.128", r"STG\.E\.128")
            for instruction in (multiplies[dtype], *loads[product], *copies):
                assert re.search(instruction, kernel.sass), (arch, dtype, product, width)
            # Registers and shared memory for as many thread blocks as an A100 is to hold: a thread
            # is given registers by eights, and the system takes 1 KB of every block's memory.
            ring = 4 * (128 + width) * 32 * 2
            rings = (160 << 10) // ring
            assert rings * 128 * -(-kernel.registers // 8) * 8 <= 1 << 16, (arch, product, width)
            if arch == "sm_80":
                assert rings * (ring + kernel.shared + 1024) <= 164 << 10, (product, width)


def test_the_table_of_resources_is_what_the_library_says(
    kernels: dict[str, dict[str, Kernel]],
) -> None:
    version = run("nvcc", "--version")
    if f"release {NVCC}," not in version:
        pytest.skip(f"needs nvcc {NVCC}, which made the table")
    dynamic = launched_dynamic_shared()
    assert dynamic.keys() == takers_of_dynamic_shared()
    assert TABLE.read_text(encoding="utf-8") == table(kernels, dynamic), "run: make cuda-resources"
    # What the table says of the memory that the system reserves.
    files = {name.split("::")[0] for name in dynamic}
    sm_80, sm_90a = (kernels[arch] for arch in ARCHITECTURES)
    for name, kernel in sm_80.items():
        counted = kernel.shared > 0 or name.split("::")[0] in files
        assert sm_90a[name].shared - kernel.shared == 1024 * counted, name


def in_new_process(code: str) -> str:
    """What `code` prints, where nothing of secateur is loaded yet."""
    return run(sys.executable, "-c", code).strip()


def test_a_torch_without_cuda_does_not_load_the_library() -> None:
    if torch.version.cuda is not None:
        pytest.skip("needs a torch without CUDA")
    code = "import secateur; print(open('/proc/self/maps').read().count('secateur_cuda'))"
    assert in_new_process(code) == "0"


def test_the_library_registers_its_kernels_under_any_torch(
    kernels: dict[str, dict[str, Kernel]],
) -> None:
    glue = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("csrc/*/op_cuda.cpp"))
    expected = re.findall(r'm\.impl\("(\w+)"', glue)
    assert expected
    code = """
import re, torch
from secateur import ops
torch.ops.load_library(ops._cuda.LIBRARY)
for spec in ops.SPECS:
    dump = torch._C._dispatch_dump(f"secateur::{spec.name}")
    if re.search("^CUDA: .*op_cuda.cpp", dump, re.MULTILINE):
        print(spec.name)
"""
    assert set(in_new_process(code).split()) == set(expected)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA: make cuda-load")
@pytest.mark.usefixtures("kernels")
def test_the_stream_is_asked_of_the_torch_that_is_loaded() -> None:
    """The symbol is weak, and would be null if libtorch_cuda.so were not found with it."""
    code = "import ctypes; from secateur.ops import _cuda; ctypes.CDLL(_cuda.LIBRARY)"
    environment = {**os.environ, "LD_DEBUG": "bindings", "LD_BIND_NOW": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    bound = re.findall(
        r"libsecateur_cuda\.so .* to .*/(\S+) .*`aoti_torch_get_current_cuda_stream'", done.stderr
    )
    assert bound == ["libtorch_cuda.so"]


def test_build_info_tells_of_the_kernels(kernels: dict[str, dict[str, Kernel]]) -> None:
    assert _cuda.build_info()["cuda"].endswith(f" for {', '.join(ARCHITECTURES)}, compute_80")


def test_build_info_tells_whether_the_kernels_are_loaded() -> None:
    show = "\nimport secateur\nprint(secateur.build_info()['cuda_kernels'])"
    natural = f"not loaded: torch {torch.__version__} has no CUDA"
    assert in_new_process(show) == (natural if torch.version.cuda is None else "loaded")
    there = "Path.exists = lambda path: True\ntorch.ops.load_library = id"
    assert in_new_process(WITH_CUDA + there + show) == "loaded"
    missing = "Path.exists = lambda path: False"
    assert in_new_process(WITH_CUDA + missing + show).startswith("not loaded: expected secateur")


WITH_CUDA = "import torch; torch.version.cuda = '13.0'\nfrom pathlib import Path\n"
# The dispatcher takes what it is given for CUDA tensors, so any torch can ask for the kernel.
CALL = """
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.secateur.pack_mask.default.redispatch(keys, torch.ones(3, dtype=torch.bool))
except NotImplementedError as error:
    print(error)
"""


@pytest.mark.usefixtures("kernels")
def test_a_torch_with_cuda_loads_the_library_at_import() -> None:
    code = "import secateur; print('libsecateur_cuda.so' in open('/proc/self/maps').read())"
    assert in_new_process(WITH_CUDA + code) == "True"


def test_a_build_without_kernels_says_so_at_first_use() -> None:
    hide = "Path.exists = lambda path: False\nimport secateur\n"
    assert in_new_process(WITH_CUDA + hide + CALL) == (
        "pack_mask: expected secateur built with CUDA kernels, got a build without them; install "
        "it from source where nvcc is: pip install . -C cmake.define.SECATEUR_CUDA=ON"
    )


def test_a_library_that_does_not_load_says_so_at_first_use() -> None:
    spoil = """
def load(path):
    raise OSError("no such symbol")
Path.exists = lambda path: True
torch.ops.load_library = load
import secateur
"""
    assert in_new_process(WITH_CUDA + spoil + CALL).startswith(
        "pack_mask: expected secateur's CUDA kernels to load, got: no such symbol; install it"
    )


def test_an_op_without_a_cuda_kernel_says_so_at_first_use() -> None:
    hide = "Path.exists = lambda path: True\ntorch.ops.load_library = id\nimport secateur\n"
    assert in_new_process(WITH_CUDA + hide + CALL) == (
        "pack_mask: expected CPU tensors, got CUDA ones, for which it has no kernel"
    )


if __name__ == "__main__":
    TABLE.write_text(table(read_kernels(), launched_dynamic_shared()), encoding="utf-8")
