"""N:M masks: the n best of every m consecutive elements along the inputs, such as 2:4."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.ops._checks import check_float, readable
from secateur.ops._spec import OpSpec, Sample
from secateur.ops.mask import pack_mask_reference
from secateur.ops.score import (
    FORMULAS,
    check_formula,
    check_like,
    check_normalizer,
    check_observed,
    check_seed,
    compute_dtype,
    elements_reference,
)
from secateur.ops.topk import NonFiniteScoreError

_MAX_GROUP = 64  # kMaxGroup in csrc/nm/nm.h


def nm_mask(
    weight: Tensor,
    grad: Tensor | None = None,
    state: Tensor | None = None,
    *,
    formula: str,
    n: int,
    m: int,
    largest: bool = True,
    normalizer: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Score a weight and mark the n best of every m consecutive elements of a row.

    The scores are never stored. Exact: of equal scores the lower index wins; -0.0 equals 0.0. The
    result is the same for every instruction set and thread count.

    Args:
        weight: floating point, any shape and strides; seen as a matrix (N, K) with N =
            ``shape[0]`` and K the product of the rest, a vector (n,) as (n, 1). Groups lie within
            a row. For groups along the input channels of a convolution, as sparse tensor cores
            want them, pass ``weight.permute(0, 2, 3, 1)``; the mask is in that order.
        grad: as in :func:`secateur.ops.score`.
        state: as in :func:`secateur.ops.score`.
        formula: one of :data:`secateur.ops.FORMULAS`.
        n: how many to mark in a group.
        m: how many elements make a group, 1 <= n <= m <= 64. If m does not divide K, the last group
            of a row is shorter and min(n, its size) are marked: as if the row were padded with
            elements that lose.
        largest: whether larger scores are better.
        normalizer: as in :func:`secateur.ops.score`.
        seed: as in :func:`secateur.ops.score`.

    Returns:
        A bit-packed mask, uint8 of shape ``(ceil(numel / 8),)``; unused bits are 0.

    Raises:
        TypeError: a dtype does not fit, or ``n`` or ``m`` is not an int.
        ValueError: anything else that does not fit.
        NonFiniteScoreError: a score is NaN or infinite.

    Equivalent to (taylor, K divisible by m, without ties):
        ``best = (weight * grad).abs().view(-1, m).topk(n).indices`` and
        ``pack_mask(torch.zeros(len(best), m, dtype=torch.bool).scatter_(1, best, True))``
    """
    check_formula(formula)
    check_float("weight", weight)
    if state is None:
        check_observed(formula, "grad", grad is not None)
    if grad is not None:
        check_like("grad", grad, "weight", weight, weight.dtype)
    if state is not None:
        check_like("state", state, "weight", weight, compute_dtype(weight.dtype))
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected {name} to be an int, got {value!r}")
    if not 1 <= n <= m <= _MAX_GROUP:
        raise ValueError(f"expected 1 <= n <= m <= {_MAX_GROUP}, got {n=} and {m=}")
    check_normalizer("normalizer", normalizer)
    check_seed("seed", seed)
    with torch.no_grad():
        mask: Tensor
        mask, bad = torch.ops.secateur.nm_mask(
            readable(weight),
            None if grad is None else readable(grad),
            None if state is None else readable(state),
            formula,
            n,
            m,
            largest,
            float(normalizer),
            seed,
        )
    if bad:
        raise NonFiniteScoreError(
            f"expected finite {formula} scores, got NaN or infinity in weight", 0
        )
    return mask


@torch.library.register_fake("secateur::nm_mask")
def _(
    weight: Tensor,
    grad: Tensor | None,
    state: Tensor | None,
    formula: str,
    n: int,
    m: int,
    largest: bool,
    normalizer: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    mask = weight.new_empty(((weight.numel() + 7) // 8,), dtype=torch.uint8)
    return mask, weight.new_empty((), dtype=torch.bool)


def nm_mask_reference(
    weight: Tensor,
    grad: Tensor | None,
    state: Tensor | None,
    formula: str,
    n: int,
    m: int,
    largest: bool,
    normalizer: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """By a stable sort of every group."""
    scores = elements_reference(weight, grad, state, formula, normalizer, seed)
    rows, cols = weight.shape[:1].numel(), weight.shape[1:].numel()
    groups = -(-cols // m)
    worst = -torch.inf if largest else torch.inf
    padded = torch.full((rows, groups * m), worst, dtype=scores.dtype, device=scores.device)
    padded[:, :cols] = scores.reshape(rows, cols)
    order = padded.view(rows, groups, m).sort(descending=largest, stable=True).indices
    chosen = torch.zeros(rows, groups, m, dtype=torch.bool, device=scores.device)
    chosen.scatter_(2, order[..., :n], True)
    mask = pack_mask_reference(chosen.view(rows, groups * m)[:, :cols].contiguous())
    return mask, ~scores.isfinite().all()


_SHAPES = (
    (),
    (0,),
    (1,),
    (70,),
    (3, 0, 4),
    (5, 13),
    (6, 5, 3, 3),
    (33, 64),
    (2, 5003),
    (1500, 6),
    (70, 1024),  # more than one thread's grain
)
_PATTERNS = ((1, 1), (1, 2), (2, 3), (2, 4), (1, 4), (4, 4), (4, 7), (4, 8), (8, 16), (5, 32))
_LARGE_PATTERNS = ((3, 33), (32, 64), (1, 64))


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> list[Tensor]:
        w, g, s = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
        return [w.to(dtype), g.to(dtype), s.abs().to(compute_dtype(dtype))]

    for i, shape in enumerate(_SHAPES):
        w, g, _ = draw(*shape)
        for j, (n, m) in enumerate(_PATTERNS + _LARGE_PATTERNS):
            args = (w, g, None, "taylor", n, m, (i + j) % 2 == 0, 1.0, 0)
            yield Sample(f"{shape} {n}:{m}", args)
    w, g, s = draw(33, 40)
    for formula in FORMULAS:
        yield Sample(formula, (w, g, None, formula, 2, 4, True, 50.0, 7))
        yield Sample(f"{formula} by state", (w, None, s, formula, 3, 5, False, 0.9, 0))
    strided = [t[:, ::2].t() for t in draw(9, 80)]
    conv = [t.permute(0, 2, 3, 1) for t in draw(4, 6, 3, 3)]
    few = [(4 * t).round() for t in draw(20, 96)]
    for n, m in _PATTERNS + _LARGE_PATTERNS:
        yield Sample(f"strided {n}:{m}", (*strided[:2], None, "movement", n, m, True, 1.0, 0))
        yield Sample(f"permuted {n}:{m}", (conv[0], None, None, "given", n, m, False, 1.0, 0))
        for largest in (True, False):
            name = f"ties {n}:{m} {largest=}"
            yield Sample(name, (few[0], None, None, "given", n, m, largest, 1.0, 0))


SPECS = (OpSpec("nm_mask", nm_mask_reference, _samples, exact=True),)
