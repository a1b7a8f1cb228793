"""Fixtures of every test: global settings of the kernels, put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_emulator.build import Flavour, nvcc
from cuda_emulator.ops import EmulatedOps

from secateur import _C


@pytest.fixture
def restore() -> Iterator[None]:
    """For a test that sets the instruction set or the number of threads itself."""
    before, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.set_isa(before)
    torch.set_num_threads(threads)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest, restore: None) -> str:
    """Every instruction set of this machine in turn."""
    name: str = request.param
    _C.set_isa(name)
    return name


# Where kernels run: the instruction sets of this machine, and its GPU.
PLACES = [*_C.supported_isas(), *(["CUDA"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, restore: None) -> torch.device:
    """The device of every place in turn, its instruction set chosen."""
    if request.param == "CUDA":
        return torch.device("cuda")
    _C.set_isa(request.param)
    return torch.device("cpu")


@pytest.fixture(scope="session")
def plain() -> EmulatedOps:
    return EmulatedOps("secateur_emulated", flavour=Flavour.PLAIN)


@pytest.fixture(scope="session")
def checked() -> EmulatedOps:
    return EmulatedOps("secateur_checked", flavour=Flavour.CHECKED)


@pytest.fixture(scope="session")
def ptx() -> EmulatedOps:
    if nvcc() is None:
        pytest.skip("needs nvcc, which makes the PTX")
    return EmulatedOps("secateur_ptx", flavour=Flavour.PTX)


SLOW = pytest.mark.slow_cuda


@pytest.fixture(
    params=["plain", pytest.param("checked", marks=SLOW), pytest.param("ptx", marks=SLOW)]
)
def emulated(request: pytest.FixtureRequest) -> EmulatedOps:
    ops: EmulatedOps = request.getfixturevalue(request.param)
    return ops
