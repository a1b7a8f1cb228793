"""The ops of secateur. Each has a hand-written kernel, a fake and a plain-PyTorch reference."""

import os

import torch

from secateur import _C
from secateur.ops import _cuda
from secateur.ops import block_sparse as _block_sparse
from secateur.ops import mask as _mask
from secateur.ops import nm as _nm
from secateur.ops import score as _score
from secateur.ops import topk as _topk
from secateur.ops._cuda import build_info
from secateur.ops._spec import OpSpec
from secateur.ops.block_sparse import block_sparse_linear
from secateur.ops.mask import mask_, pack_mask, unpack_mask
from secateur.ops.nm import nm_mask
from secateur.ops.score import (
    FORMULAS,
    REDUCTIONS,
    compute_dtype,
    observe_,
    score,
    score_each,
    score_update_,
)
from secateur.ops.topk import (
    NonFiniteScoreError,
    histogram,
    key_range,
    narrow,
    select,
    topk_mask,
)

SPECS: tuple[OpSpec, ...] = (
    *_mask.SPECS,
    *_score.SPECS,
    *_topk.SPECS,
    *_nm.SPECS,
    *_block_sparse.SPECS,
)

__all__ = [
    "FORMULAS",
    "REDUCTIONS",
    "SPECS",
    "NonFiniteScoreError",
    "block_sparse_linear",
    "build_info",
    "compute_dtype",
    "histogram",
    "key_range",
    "mask_",
    "narrow",
    "nm_mask",
    "observe_",
    "pack_mask",
    "score",
    "score_each",
    "score_update_",
    "select",
    "topk_mask",
    "unpack_mask",
]

# Kernels follow torch's own choice (ATEN_CPU_CAPABILITY steers both) unless SECATEUR_ISA says more.
_BEST = {"AVX2": "AVX2", "AVX512": _C.supported_isas()[-1]}
_C.set_isa(
    os.environ.get("SECATEUR_ISA") or _BEST.get(torch.backends.cpu.get_cpu_capability(), "BASE")
)

if torch.version.cuda is not None:
    _cuda.register([spec.name for spec in SPECS])
