"""What test_ops.py leaves open of emulated ops: schedules, coverage, faults, bad arguments."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulator.build import ROOT, Flavour, library, nvcc
from cuda_emulator.ops import KERNELS, EmulatedOps
from test_ops import CASES, CPU, check_close, check_samples, place_of
from torch import Tensor
from torch.utils._pytree import tree_flatten

from secateur import ops
from secateur.ops._spec import OpSpec

CSRC = ROOT / "csrc"

each_spec = pytest.mark.parametrize("spec", ops.SPECS, ids=lambda spec: spec.name)


@each_spec
def test_schedules_do_not_matter(spec: OpSpec, plain: EmulatedOps) -> None:
    results = []
    for seed in range(3):
        plain.emulator.set_seed(seed)
        args = [sample.args for sample in spec.samples(spec.dtypes[0], CPU)]
        results.append(([plain.call(spec.name, *a) for a in args], args))
    for seed in (1, 2):
        check_close(results[seed], results[0], exact=True, case=f"seeds 0 and {seed}")


@pytest.mark.slow_cuda
def test_samples_reach_every_line_of_the_kernels(
    checked: EmulatedOps, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    place = place_of("CUDA-EMULATED-CHECKED", request)
    for case in CASES:  # which may have run there before
        check_samples(*case.values, place)
    folders = {kernels.parent: [kernels] for kernels in KERNELS} | {CSRC / "common": []}
    for folder, sources in folders.items():
        count, missed = 0, []
        for path in [*sources, *sorted(folder.glob("*.cuh"))]:
            lines, reached = checked.emulator.lines(path)
            count += len(lines)
            missed += [f"{path.name}:{line}" for line in sorted(lines - reached)]
        with capsys.disabled():
            print(f"\n{folder.name}: {count - len(missed)} of {count} lines", end=" ")
            print(f"reached, not {', '.join(missed)}" if missed else "reached")
        assert count > 10, folder
        assert len(missed) <= 0.05 * count, (folder.name, missed)


@pytest.mark.parametrize("flavour", [Flavour.CHECKED, Flavour.PTX])
def test_a_fault_in_a_kernel_is_an_error_that_names_it(flavour: Flavour, tmp_path: Path) -> None:
    if flavour is Flavour.PTX and nvcc() is None:
        pytest.skip("needs nvcc, which makes the PTX")
    original = next(path for path in KERNELS if path.parent.name == "mask")
    text = original.read_text("utf-8")
    guarded = "if (i + 8 < numel) bits[i / 8 + 1]"
    assert guarded in text
    faulty = tmp_path / "faulty.cu"
    faulty.write_text(text.replace(guarded, "bits[i / 8 + 1]"))
    glue = original.with_name("op_cuda.cpp")
    ops = EmulatedOps(f"secateur_faulty_{flavour.value}", [faulty], [glue], flavour=flavour)
    with pytest.raises(RuntimeError, match=r"out of bounds write .* at faulty.cu:\d+: byte 1 of"):
        ops.call("pack_mask", torch.ones(5, dtype=torch.bool))
    ops.call("pack_mask", torch.ones(9, dtype=torch.bool))


def refusal(run: Callable[[], Any]) -> str | None:
    """What an op says of its arguments, if it does not take them."""
    try:
        run()
    except RuntimeError as error:  # torch puts function, file and line before it
        return re.sub(r"^.*\.\w+:\d+, ", "", str(error).splitlines()[0])
    return None


def spoilt(args: tuple[Any, ...], spoil: Callable[[Any], Any]) -> Iterator[tuple[Any, ...]]:
    """The arguments, each in turn spoilt that can be."""
    leaves, structure = tree_flatten(args)
    for i, leaf in enumerate(leaves):
        if (bad := spoil(leaf)) is not None:
            yield structure.unflatten([*leaves[:i], bad, *leaves[i + 1 :]])
    for i, argument in enumerate(args):
        if isinstance(argument, list) and (bad := spoil(argument)) is not None:
            yield (*args[:i], bad, *args[i + 1 :])


def other_dtype(a: Any) -> Any:
    return a.to(torch.complex64) if isinstance(a, Tensor) else None


def twice_as_long(a: Any) -> Any:
    return torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() else None


def empty(a: Any) -> Any:
    return a.new_empty(0) if isinstance(a, Tensor) else None


def one_dimension_more(a: Any) -> Any:
    return a.unsqueeze(0) if isinstance(a, Tensor) else None


def one_more(a: Any) -> Any:
    return [*a, a[-1]] if isinstance(a, list) and a else None


def other_word(a: Any) -> Any:
    return "nonsense" if isinstance(a, str) else None


def some_args(spec: OpSpec) -> list[tuple[Any, ...]]:
    samples = [
        s.args for s in spec.samples(spec.dtypes[0], CPU) if len(tree_flatten(s.args)[0]) < 50
    ]
    return samples[4 % len(samples) :: max(1, len(samples) // 4)]


SPOILS = (other_dtype, twice_as_long, empty, one_dimension_more, one_more, other_word)
# What an op takes all the same: it asks nothing of a shape.
TAKEN = {
    ("pack_mask", twice_as_long),
    ("pack_mask", empty),
    ("pack_mask", one_dimension_more),
    ("unpack_mask", one_dimension_more),
    ("mask_", one_dimension_more),
}


@each_spec
def test_arguments_are_refused_in_the_words_of_the_cpu(spec: OpSpec, plain: EmulatedOps) -> None:
    for spoil in SPOILS:
        spoilt_args = [bad for args in some_args(spec) for bad in spoilt(args, spoil)]
        refused = 0
        for bad in spoilt_args:
            words = refusal(lambda bad=bad: spec.op(*copy.deepcopy(bad)))
            assert refusal(lambda bad=bad: plain.call(spec.name, *bad)) == words
            if words is not None:
                assert words.startswith(f"{spec.name}: expected "), words
                refused += 1
        # Not each: a formula has no use for some of them.
        least, most = len(spoilt_args) / 2, len(spoilt_args)
        if (spec.name, spoil) in TAKEN:
            least = most = 0
        assert least <= refused <= most, spoil.__name__


def launches(emulated: EmulatedOps, name: str, *args: Any) -> int:
    before = emulated.emulator.counters().launches
    emulated.call(name, *args)
    return emulated.emulator.counters().launches - before


def test_a_launch_takes_as_many_tensors_as_its_parameters_hold(plain: EmulatedOps) -> None:
    for tensors, expected in ((1, 1), (101, 1), (102, 2), (300, 3)):
        many = [torch.randn(64) for _ in range(tensors)]
        bits = [ops.pack_mask(t > 0) for t in many]
        assert launches(plain, "mask_", many, bits) == expected
        assert all(bool((t >= 0).all()) for t in many)


def test_block_sparse_products_count_features_in_32_bits(plain: EmulatedOps) -> None:
    n, cols = 2**31, 2**20
    none = torch.empty(0, dtype=torch.int32)
    offsets = torch.zeros(n // cols + 1, dtype=torch.int32)
    pattern = (offsets[:2], none, none, offsets, none, none)
    x, values = torch.empty(0, n), torch.empty(0, 1, cols)
    with pytest.raises(RuntimeError, match=rf"than 2\*\*31 features in blocks, got .* 1 x {n} in"):
        plain.call("block_sparse_linear", x, values, None, *pattern, 1)


@each_spec
def test_tensors_on_two_devices_are_refused_or_not_read(spec: OpSpec, plain: EmulatedOps) -> None:
    def elsewhere(a: Any) -> Any:
        return a.to("meta") if isinstance(a, Tensor) else None

    for args in some_args(spec):
        several = list(spoilt(args, elsewhere))
        for bad in several if len(several) > 1 else []:
            results: list[Any] = []
            words = refusal(
                lambda b=bad, r=results: r.append(plain.call(spec.name, *b, mixed=True))
            )
            if words is None:  # a gradient that the formula has no use for
                check_close(results[0], plain.call(spec.name, *args), exact=True, case=str(bad))
            else:
                assert re.match(rf"{spec.name}: expected .*\bdevice\b", words)


def test_launch_errors_name_the_op_and_what_it_needs(tmp_path: Path) -> None:
    glue = tmp_path / "launch.cpp"
    glue.write_text(
        """
#include "common/torch_cuda.h"
void launch(const torch::stable::Tensor& t, int64_t error) {
  secateur::check_launch("op", static_cast<int>(error));
}
STABLE_TORCH_LIBRARY(secateur_launch, m) {
  m.def("launch(Tensor t, int error) -> ()");
  m.impl("launch", TORCH_BOX(&launch));
}
"""
    )
    torch.ops.load_library(library([], [glue], flavour=Flavour.PLAIN))

    def words(error: int) -> str | None:
        return refusal(lambda: torch.ops.secateur_launch.launch(torch.ones(1), error))

    assert words(0) is None
    assert words(1) == "op: expected its CUDA kernel to start, got invalid argument"
    for error in (98, 209):  # cudaErrorInvalidDeviceFunction, cudaErrorNoKernelImageForDevice
        assert words(error) == (
            "op: expected a GPU of compute capability 8.0 or higher, got one that is not"
        )
