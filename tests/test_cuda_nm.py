"""The CUDA N:M kernel finds scores that are not finite, wherever they lie."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator.ops import EmulatedOps

from secateur.ops._spec import FLOATS


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7)])
def test_scores_that_are_not_finite_are_found(
    n: int, m: int, dtype: torch.dtype, value: float, plain: EmulatedOps
) -> None:
    def bad(scores: torch.Tensor) -> bool:
        found = plain.call("nm_mask", scores, None, None, "given", n, m, True, 1.0, 0)[1]
        return bool(found)

    scores = torch.randn(90, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not bad(scores)
    for index in (0, 4095, 4096, 8999):
        spoilt = scores.clone()
        spoilt.view(-1)[index] = value
        assert bad(spoilt), index
