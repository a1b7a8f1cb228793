"""The ops of secateur. Each has a hand-written kernel, a fake and a plain-PyTorch reference."""

import os

import torch

from secateur import _C

# Kernels follow torch's own choice (ATEN_CPU_CAPABILITY steers both) unless SECATEUR_ISA says more.
_BEST = {"AVX2": "AVX2", "AVX512": _C.supported_isas()[-1]}
_C.set_isa(
    os.environ.get("SECATEUR_ISA") or _BEST.get(torch.backends.cpu.get_cpu_capability(), "BASE")
)

from secateur.ops import mask as _mask  # noqa: E402
from secateur.ops import score as _score  # noqa: E402
from secateur.ops import topk as _topk  # noqa: E402
from secateur.ops._spec import OpSpec  # noqa: E402
from secateur.ops.mask import mask_, pack_mask, unpack_mask  # noqa: E402
from secateur.ops.score import FORMULAS, observe_, score, score_update_  # noqa: E402
from secateur.ops.topk import NonFiniteScoreError, select, topk_mask  # noqa: E402

SPECS: tuple[OpSpec, ...] = (*_mask.SPECS, *_score.SPECS, *_topk.SPECS)

__all__ = [
    "FORMULAS",
    "SPECS",
    "NonFiniteScoreError",
    "mask_",
    "observe_",
    "pack_mask",
    "score",
    "score_update_",
    "select",
    "topk_mask",
    "unpack_mask",
]
