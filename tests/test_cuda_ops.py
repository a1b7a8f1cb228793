"""Every op that has a CUDA kernel against its reference, the kernel run by the emulator."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import Flavour
from cuda_emulator.ops import KERNELS, SPECS, EmulatedOps
from test_ops import CPU, check_close

from secateur.ops._spec import OpSpec

CASES = [
    pytest.param(spec, dtype, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}")
    for spec in SPECS
    for dtype in spec.dtypes
]


@functools.cache
def check_samples(spec: OpSpec, dtype: torch.dtype, emulated: EmulatedOps) -> None:
    samples = list(spec.samples(dtype, CPU))
    assert samples
    for seed, sample in enumerate(samples):
        emulated.emulator.set_seed(seed % 3)
        ours, theirs = sample.args, copy.deepcopy(sample.args)
        got, want = emulated.call(spec.name, *ours), spec.reference(*theirs)
        check_close((got, ours), (want, theirs), spec.exact, sample.name)


@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_matches_reference(spec: OpSpec, dtype: torch.dtype, emulated: EmulatedOps) -> None:
    check_samples(spec, dtype, emulated)


@pytest.mark.slow_cuda
def test_samples_reach_every_line_of_the_kernels(checked: EmulatedOps) -> None:
    for spec in SPECS:
        for dtype in spec.dtypes:
            check_samples(spec, dtype, checked)
    for path in KERNELS:
        lines, reached = checked.emulator.lines(path)
        assert len(reached) >= 0.95 * len(lines) > 10, (path.parent.name, sorted(lines - reached))


def test_a_fault_in_a_kernel_is_an_error_that_names_it(tmp_path: Path) -> None:
    original = next(path for path in KERNELS if path.parent.name == "mask")
    text = original.read_text("utf-8")
    guarded = "if (i + 8 < numel) bits[i / 8 + 1]"
    assert guarded in text
    faulty = tmp_path / "faulty.cu"
    faulty.write_text(text.replace(guarded, "bits[i / 8 + 1]"))
    glue = original.with_name("op_cuda.cpp")
    ops = EmulatedOps("secateur_faulty", [faulty], [glue], flavour=Flavour.CHECKED)
    with pytest.raises(RuntimeError, match=r"out of bounds write .* at faulty.cu:\d+: byte 1 of"):
        ops.call("pack_mask", torch.ones(5, dtype=torch.bool))
    ops.call("pack_mask", torch.ones(9, dtype=torch.bool))
