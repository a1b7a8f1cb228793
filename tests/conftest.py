"""Fixtures of every test: global settings of the kernels, put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_emulator.build import Accumulation, Arrival, Flavour, nvcc
from cuda_emulator.ops import EmulatedOps, emulated_ops

from secateur import _C

SLOW = pytest.mark.slow_cuda


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


def _settled(ops: EmulatedOps) -> Iterator[EmulatedOps]:
    """``ops``, whose settings are those of the start again when a test is over."""
    yield ops
    ops.emulator.set_seed(0)
    ops.emulator.set_arrival(Arrival.LATE)
    ops.emulator.set_accumulation(Accumulation.EXACT)


@pytest.fixture
def plain() -> Iterator[EmulatedOps]:
    """The ops that have a CUDA kernel, emulated."""
    yield from _settled(emulated_ops(Flavour.PLAIN))


@pytest.fixture
def checked() -> Iterator[EmulatedOps]:
    """The same, every access checked."""
    yield from _settled(emulated_ops(Flavour.CHECKED))


@pytest.fixture
def ptx() -> Iterator[EmulatedOps]:
    """The same of nvcc's PTX, every access checked."""
    if nvcc() is None:
        pytest.skip("needs nvcc, which makes the PTX")
    yield from _settled(emulated_ops(Flavour.PTX))


@pytest.fixture(
    params=["plain", pytest.param("checked", marks=SLOW), pytest.param("ptx", marks=SLOW)]
)
def emulated(request: pytest.FixtureRequest) -> EmulatedOps:
    """The ops that have a CUDA kernel, run by every flavour of the emulator in turn."""
    ops: EmulatedOps = request.getfixturevalue(request.param)
    return ops
