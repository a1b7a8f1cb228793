"""The ops of secateur. Each has a hand-written kernel, a fake and a plain-PyTorch reference."""

import os

import torch

from secateur import _C

# Kernels follow torch's own choice (ATEN_CPU_CAPABILITY steers both) unless SECATEUR_ISA says more.
_BEST = {"AVX2": "AVX2", "AVX512": _C.supported_isas()[-1]}
_C.set_isa(
    os.environ.get("SECATEUR_ISA") or _BEST.get(torch.backends.cpu.get_cpu_capability(), "BASE")
)

from secateur.ops import block_sparse as _block_sparse  # noqa: E402
from secateur.ops import mask as _mask  # noqa: E402
from secateur.ops._spec import OpSpec  # noqa: E402
from secateur.ops.block_sparse import block_sparse_linear  # noqa: E402
from secateur.ops.mask import mask_, pack_mask, unpack_mask  # noqa: E402

SPECS: tuple[OpSpec, ...] = (*_block_sparse.SPECS, *_mask.SPECS)

__all__ = ["SPECS", "block_sparse_linear", "mask_", "pack_mask", "unpack_mask"]
