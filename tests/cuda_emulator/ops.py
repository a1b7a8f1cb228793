"""The project's CUDA ops, emulated: kernels and glue of csrc/, registered for CPU tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cuda_emulator.build import ROOT, Emulator, Flavour, library, load
from secateur import ops

KERNELS = sorted((ROOT / "csrc").glob("*/cuda.cu"))
GLUE = sorted((ROOT / "csrc").glob("*/op_cuda.cpp"))

# Whose kernels nvcc may contract, as the build has it (cmake/op.cmake).
CMAKE = (ROOT / "CMakeLists.txt").read_text("utf-8")
FUSED = [path for path in KERNELS if f"secateur_add_op({path.parent.name} fast)" in CMAKE]


class EmulatedOps:
    """The ops of ``secateur.ops.SPECS`` on the emulator, which takes the place of a GPU.

    Args:
        namespace: where they are registered, ``torch.ops.<namespace>``.
        kernels: the .cu files.
        glue: the C++ files that register their ops; others cannot be called.
        flavour: who compiles the kernels.
    """

    def __init__(
        self,
        namespace: str,
        kernels: Sequence[Path] = KERNELS,
        glue: Sequence[Path] = GLUE,
        *,
        flavour: Flavour,
    ) -> None:
        # The glue registers for secateur_emulated; several libraries may live in one process.
        renamed = f"-Dsecateur_emulated={namespace}"
        path = library(kernels, glue, flavour=flavour, flags=[renamed], fused=FUSED)
        self._library = torch.library.Library(namespace, "DEF")
        for spec in ops.SPECS:
            self._library.define(str(spec.op._schema).removeprefix("secateur::"))
        self.emulator: Emulator = load(path)
        self._ops = getattr(torch.ops, namespace)

    def call(self, name: str, *args: Any, mixed: bool = False) -> Any:
        """Call an op by its name in ``torch.ops.secateur``.

        Args:
            name, args: of the op.
            mixed: whether some of the tensors are on another device, which would choose the kernel.

        Raises:
            RuntimeError: the arguments are wrong, or the kernel is.
        """
        self.emulator.forget_buffers()
        op = getattr(self._ops, name).default
        if mixed:
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        return op(*args)


@functools.cache
def emulated_ops(flavour: Flavour) -> EmulatedOps:
    """All of them, compiled and registered once for all tests of a process."""
    return EmulatedOps(f"secateur_{flavour.name.lower()}", flavour=flavour)
