"""The CUDA kernels: a library of their own, which only a torch with CUDA loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from secateur import _C

LIBRARY = Path(__file__).parent.parent / "libsecateur_cuda.so"

_HOW = "install it from source where nvcc is: pip install . -C cmake.define.SECATEUR_CUDA=ON"

# What it registers holds for as long as it lives.
_refusals = torch.library.Library("secateur", "IMPL")
_state = f"not loaded: torch {torch.__version__} has no CUDA"


def build_info() -> dict[str, str]:
    """What this secateur was built with, and whether its CUDA kernels are loaded.

    Returns:
        ``version``; ``torch`` and ``compiler`` of the build; ``cuda``, the nvcc of the CUDA kernels
        and the architectures they are for, or "none"; ``cuda_kernels``, "loaded" or why they are
        not.
    """
    return {**_C.build_info(), "cuda_kernels": _state}


def register(names: Sequence[str]) -> None:
    """Load the CUDA kernels; ops that have none say so when a CUDA tensor comes, not now.

    Args:
        names: all ops of ``torch.ops.secateur``.
    """
    global _state
    reason = _load()
    _state = "loaded" if reason is None else f"not loaded: {reason}"
    for name in names:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"secateur::{name}", "CUDA"):
            _refuse(
                name, reason or "expected CPU tensors, got CUDA ones, for which it has no kernel"
            )


def _load() -> str | None:
    """Why the kernels cannot be had, if they cannot."""
    if not LIBRARY.exists():
        return f"expected secateur built with CUDA kernels, got a build without them; {_HOW}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"expected secateur's CUDA kernels to load, got: {error}; {_HOW}"
    return None


def _refuse(name: str, reason: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: {reason}")

    _refusals.impl(name, refuse, "CUDA")
