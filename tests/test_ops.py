"""Every op of SPECS against its reference: by every instruction set, on a GPU, and emulated."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_emulator.ops import EmulatedOps
from torch.utils._pytree import tree_flatten, tree_map_only

from secateur import _C, ops
from secateur.ops._spec import OpSpec

CPU = torch.device("cpu")
DEVICES = [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]

# One table for all ops: (relative to each element, relative to the largest element). Kernel and
# reference both round to the dtype at the end, so 16-bit results are neighbours at most: one eps. A
# sum taken in another order, or in the compute type where the reference takes float64, differs by
# some eps of the terms it adds up, which cancellation can make large against the result but not
# against the largest one.
TOLERANCE = {
    torch.float64: (1e-13, 1e-14),
    torch.float32: (1e-6, 1e-6),
    torch.float16: (torch.finfo(torch.float16).eps, 1e-6),
    torch.bfloat16: (torch.finfo(torch.bfloat16).eps, 1e-6),
}

CASES = [
    pytest.param(spec, dtype, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}")
    for spec in ops.SPECS
    for dtype in spec.dtypes
]


def check_close(actual: Any, expected: Any, exact: bool, case: str) -> None:
    actual, expected = tree_flatten(actual)[0], tree_flatten(expected)[0]
    assert len(actual) == len(expected), case
    for a, e in zip(actual, expected, strict=True):
        if not isinstance(e, torch.Tensor):
            assert a == e, case
            continue
        assert a.shape == e.shape, case
        assert a.dtype == e.dtype, case
        if exact or not e.is_floating_point():
            assert torch.equal(a, e), case
        elif e.numel():
            scale = e.abs().amax().double().clamp(min=1e-30).item()
            relative, absolute = TOLERANCE[e.dtype]
            torch.testing.assert_close(
                a, e, rtol=relative, atol=absolute * scale, msg=lambda m: f"{case}: {m}"
            )


def to_cpu(values: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, values)


@dataclass(frozen=True)
class Place:
    """Where kernels run.

    Attributes:
        name: of an instruction set of this machine, or that begins with CUDA.
        device: of the tensors.
        emulated: who takes the place of a GPU.
    """

    name: str
    device: torch.device
    emulated: EmulatedOps | None = None

    def call(self, spec: OpSpec, *args: Any) -> Any:
        return spec.op(*args) if self.emulated is None else self.emulated.call(spec.name, *args)


# Emulated kernels: the source, the source with every access checked, and nvcc's PTX likewise.
EMULATED = {
    "CUDA-EMULATED": "plain",
    "CUDA-EMULATED-CHECKED": "checked",
    "CUDA-EMULATED-PTX": "ptx",
}
PLACES = [*_C.supported_isas(), *(["CUDA"] if torch.cuda.is_available() else []), *EMULATED]


def place_of(name: str, request: pytest.FixtureRequest) -> Place:
    """One of PLACES, on behalf of a test or fixture; an instruction set is chosen."""
    if name in EMULATED:
        return Place(name, CPU, request.getfixturevalue(EMULATED[name]))
    if name == "CUDA":
        return Place(name, torch.device("cuda"))
    _C.set_isa(name)
    return Place(name, CPU)


@pytest.fixture
def place(request: pytest.FixtureRequest, restore: None) -> Place:
    return place_of(request.param, request)


def is_slow(name: str, dtype: torch.dtype) -> bool:
    """Whether `make test` does without: checks take long, PTX is checked as well."""
    if name == "CUDA-EMULATED-PTX":
        return dtype in (torch.float16, torch.float64)
    return name == "CUDA-EMULATED-CHECKED"


MATRIX = [
    pytest.param(
        *case.values,
        name,
        id=f"{case.id}-{name}",
        marks=pytest.mark.slow_cuda if is_slow(name, case.values[1]) else (),
    )
    for case in CASES
    for name in PLACES
]


@functools.cache
def check_samples(spec: OpSpec, dtype: torch.dtype, place: Place) -> None:
    samples = list(spec.samples(dtype, place.device))
    assert samples
    for seed, sample in enumerate(samples):
        if place.emulated is not None:
            place.emulated.emulator.set_seed(seed % 3)
        ours, theirs = sample.args, to_cpu(copy.deepcopy(sample.args))
        got, want = place.call(spec, *ours), spec.reference(*theirs)
        check_close(to_cpu((got, ours)), (want, theirs), spec.exact, sample.name)


@pytest.mark.parametrize(("spec", "dtype", "place"), MATRIX, indirect=["place"])
def test_matches_reference(spec: OpSpec, dtype: torch.dtype, place: Place) -> None:
    check_samples(spec, dtype, place)


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_thread_count_does_not_matter(spec: OpSpec, dtype: torch.dtype) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        args = [copy.deepcopy(s.args) for s in spec.samples(dtype, CPU)]
        results.append(([spec.op(*a) for a in args], args))
    check_close(results[1], results[0], exact=True, case="1 and 2 threads")


ON_DEVICES = [
    pytest.param(spec, device, id=f"{spec.name}-{device}")
    for spec in ops.SPECS
    for device in DEVICES
]


@pytest.mark.parametrize(("spec", "device"), ON_DEVICES)
def test_opcheck(spec: OpSpec, device: torch.device) -> None:
    dtype = spec.dtypes[0]
    for sample in spec.samples(dtype, device):
        args = sample.args
        if spec.differentiable:
            args = tree_map_only(
                torch.Tensor,
                lambda t: t.detach().requires_grad_(t.is_floating_point()),
                args,
            )
        with warnings.catch_warnings():
            # opcheck looks at .grad of the outputs it has just made, which are not leaves.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
            torch.library.opcheck(spec.op, args)


@pytest.mark.parametrize(
    ("spec", "device"), [case for case in ON_DEVICES if case.values[0].differentiable]
)
@pytest.mark.parametrize("second", [False, True], ids=["gradcheck", "gradgradcheck"])
def test_gradients(spec: OpSpec, device: torch.device, second: bool) -> None:
    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    for sample in spec.samples(torch.float64, device):
        args = tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), sample.args
        )
        size = sum(t.numel() for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor))
        if size <= 600:  # finite differences: quadratic in the size
            assert check(spec.op, args), sample.name
