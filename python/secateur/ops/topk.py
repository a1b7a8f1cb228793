"""Exact selection of the best elements over a list of tensors, without concatenation or sorting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from secateur.ops._checks import check_float, check_list, check_tensor, readable
from secateur.ops._spec import OpSpec, Sample
from secateur.ops.mask import pack_mask_reference, unpack_mask_reference
from secateur.ops.score import (
    check_lists,
    compute_dtype,
    elements_reference,
)

_BINS = 2048  # kBins in csrc/topk/topk.h


class NonFiniteScoreError(ValueError):
    """A score is NaN, or infinite where that is an error.

    Attributes:
        index: position in its list of the first tensor with such a score.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


def topk_mask(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Mark the ``keep`` largest elements of a list of tensors.

    Exact: of equal scores the earlier tensor, then the lower logical index wins; -0.0 equals 0.0.
    The result is the same for every device, instruction set and thread count.

    Args:
        scores: floating point, one dtype and device, any shapes and strides; infinities allowed.
        keep: how many elements to mark, over the whole list.

    Returns:
        For each tensor a bool mask of its shape; exactly ``keep`` elements are True.

    Raises:
        TypeError: ``keep`` is not an int, or ``scores`` are not floating point of one dtype.
        ValueError: ``keep`` is out of range, or the devices differ.
        NonFiniteScoreError: a score is NaN.

    Equivalent to (without ties):
        ``best = torch.cat([s.flatten() for s in scores]).topk(keep).values.min()`` and
        ``[s >= best for s in scores]``
    """
    check_list("scores", scores)
    for i, s in enumerate(scores):
        check_float(f"scores[{i}]", s)
        if s.dtype != scores[0].dtype:
            raise TypeError(
                f"expected scores of one dtype, got {scores[0].dtype} and, scores[{i}], {s.dtype}"
            )
        if s.device != scores[0].device:
            raise ValueError(
                f"expected scores on one device, got {scores[0].device} and, scores[{i}], "
                f"{s.device}"
            )
    _check_keep(keep, sum(s.numel() for s in scores), "elements")
    if not scores:  # the dispatcher finds a kernel by the tensors it is given
        return []
    n = len(scores)
    with torch.no_grad():
        masks, info = torch.ops.secateur.select(
            [readable(s) for s in scores],
            [],
            [],
            "given",
            [],
            keep,
            None,
            True,
            False,
            [1.0] * n,
            [0] * n,
        )
    bad = int(info[0])
    if bad >= 0:
        raise NonFiniteScoreError(f"expected scores to order, got NaN in scores[{bad}]", bad)
    unpack = torch.ops.secateur.unpack_mask  # with nothing left to check
    return [unpack(m, s.shape) for m, s in zip(masks, scores, strict=True)]


def select(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    states: Sequence[Tensor] | None = None,
    *,
    formula: str,
    alive: Sequence[Tensor] | None = None,
    keep: int | None = None,
    threshold: float | None = None,
    largest: bool = True,
    normalizers: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """Score a list of weights and mark the best elements; the scores are never stored.

    The order is that of :func:`topk_mask`: exact, ties by tensor, then by logical index.

    Args:
        weights: floating point, any shapes and strides, all float64 or none, on one device.
        grads: as in :func:`secateur.ops.score`, one a weight.
        states: as in :func:`secateur.ops.score`, one a weight.
        formula: one of :data:`secateur.ops.FORMULAS`.
        alive: bit-packed masks (:func:`secateur.ops.pack_mask`), one a weight, of the elements to
            choose from; None for all. The scores of the others do not matter.
        keep: how many elements to mark, over the whole list; or
        threshold: mark the elements with score >= threshold (<= if not ``largest``), threshold
            being rounded to the compute dtype. Exactly one of the two is given.
        largest: whether larger scores are better.
        normalizers: as in :func:`secateur.ops.score`, one a weight; default 1.
        seeds: as in :func:`secateur.ops.score`, one a weight; default 0, 1, 2, ...

    Returns:
        For each weight a bit-packed mask, uint8 of shape ``(ceil(numel / 8),)``; unused bits are 0.

    Raises:
        TypeError: a dtype does not fit, ``keep`` is not an int, or ``threshold`` no number.
        ValueError: anything else that does not fit; ``keep`` exceeds the number of alive elements.
        NonFiniteScoreError: the score of an alive element is NaN or infinite.

    Equivalent to (one weight, taylor, without ties):
        ``s = (weight * grad).abs()`` and
        ``pack_mask(s >= s[unpack_mask(alive, s.shape)].topk(keep).values.min())``
    """
    arguments = _arguments(weights, grads, states, formula, alive, normalizers, seeds)
    if (keep is None) == (threshold is None):
        raise ValueError(f"expected one of keep and threshold, got {keep=} and {threshold=}")
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, Real):
            raise TypeError(f"expected threshold to be a number, got {threshold!r}")
        try:
            threshold = float(threshold)
        except OverflowError as error:
            raise ValueError("expected threshold to fit a float64, got a larger number") from error
        if math.isnan(threshold):
            raise ValueError(f"expected threshold to be a number, got {threshold}")
    if keep is not None:
        _check_keep(keep, sum(w.numel() for w in weights), "elements")
    if not weights:  # the dispatcher finds a kernel by the tensors it is given
        return []
    with torch.no_grad():
        masks, info = torch.ops.secateur.select(
            **arguments,
            keep=keep,
            threshold=threshold,
            largest=largest,
            finite=True,
        )
    bad, n_alive = info.tolist()
    check_selection(formula, keep, bad, n_alive)
    return list(masks)


def histogram(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    states: Sequence[Tensor] | None = None,
    *,
    formula: str,
    alive: Sequence[Tensor] | None = None,
    low: int | None = None,
    high: int | None = None,
    largest: bool = True,
    normalizers: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score a list of weights and count the scores in 2048 bins of an interval of keys.

    A key is an integer of the score's width that orders the scores as :func:`select` does: larger
    is better, equal scores have equal keys. A bin holds ``2 ** shift`` neighbouring keys, the
    least power that fits; :func:`narrow` looks into one of them.

    Args:
        weights, grads, states, formula, alive, largest, normalizers, seeds: as in :func:`select`.
        low, high: ends of the interval, both included; default those of :func:`key_range`.

    Returns:
        ``bins``, int64 (2048,): how many alive elements have their key in each bin; ``counts``,
        int64 (weights, 2): for each weight, how many have it above ``high`` and how many in the
        interval; ``info``, int64 (2,): the first weight of which an alive element has a score that
        is NaN or infinite, or -1, and the number of alive elements.

    Raises:
        TypeError, ValueError: as :func:`select`; an interval that is empty or outside the range.

    Equivalent to (float32, largest):
        ``key = scores.view(torch.int32)`` with the lower 31 bits of the negative ones flipped, and
        ``torch.bincount(key[alive & (low <= key) & (key <= high)] - low >> shift, minlength=2048)``
    """
    arguments = _arguments(weights, grads, states, formula, alive, normalizers, seeds)
    if not weights:  # the dispatcher finds a kernel by the tensors it is given
        bins = torch.zeros(_BINS, dtype=torch.int64)
        return bins, bins.new_zeros(0, 2), torch.tensor([-1, 0])
    lowest, highest = key_range(weights[0].dtype)
    low, high = lowest if low is None else low, highest if high is None else high
    if not lowest <= low <= high <= highest:
        raise ValueError(
            f"expected an interval of keys within {lowest} to {highest}, got {low} to {high}"
        )
    with torch.no_grad():
        bins, counts, info = torch.ops.secateur.histogram(
            **arguments, low=low, high=high, largest=largest
        )
    return bins, counts, info


def key_range(dtype: torch.dtype) -> tuple[int, int]:
    """The lowest and the highest key that scores of weights of a dtype can have."""
    keys = torch.iinfo(_key_dtype(dtype))
    return keys.min, keys.max


def narrow(bins: Tensor, low: int, high: int, rank: int) -> tuple[int, int, int, int]:
    """Look for the ``rank``-th best key, counted from 1, in the bins of :func:`histogram`.

    Args:
        bins: int64 (2048,), of the interval ``low`` to ``high``; sums of such bins will do.
        rank: 1 to the number of keys in the bins.

    Returns:
        The ends of the bin that holds it, its rank in there, and how many keys are in there.
    """
    counts = bins.tolist()
    bin = len(counts) - 1
    while rank > counts[bin]:
        rank -= counts[bin]
        bin -= 1
    shift = _shift(low, high)
    first = low + (bin << shift)
    return first, min(first + (1 << shift) - 1, high), rank, counts[bin]


def _shift(low: int, high: int) -> int:
    """shift_for() in csrc/topk/cpu.cpp."""
    return max(0, (high - low).bit_length() - 11)


def _key_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if compute_dtype(dtype) == torch.float64 else torch.int32


def _arguments(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    states: Sequence[Tensor] | None,
    formula: str,
    alive: Sequence[Tensor] | None,
    normalizers: Sequence[float] | None,
    seeds: Sequence[int] | None,
) -> dict[str, Any]:
    """What select and histogram are told alike, checked and as the kernels take it."""
    check_lists(weights, grads, states, formula, normalizers, seeds, alive=alive)
    for i, w in enumerate(weights):
        if compute_dtype(w.dtype) != compute_dtype(weights[0].dtype):
            raise TypeError(
                f"expected weights that are all float64 or none, got {weights[0].dtype} and, "
                f"weights[{i}], {w.dtype}"
            )
        if alive is not None:
            _check_alive(f"alive[{i}]", alive[i], w)
    n = len(weights)
    return {
        "weights": [readable(w) for w in weights],
        "grads": [readable(g) for g in grads or ()],
        "states": [readable(s) for s in states or ()],
        "formula": formula,
        "alive": [a.contiguous() for a in alive or ()],
        "normalizers": [1.0] * n if normalizers is None else [float(x) for x in normalizers],
        "seeds": list(range(n)) if seeds is None else list(seeds),
    }


def check_selection(formula: str, keep: int | None, bad: int, n_alive: int) -> None:
    """Raise what a selection raises that found ``n_alive`` elements and the first bad weight."""
    if keep is not None:
        _check_keep(keep, n_alive, "alive elements")
    if bad >= 0:
        raise NonFiniteScoreError(
            f"expected finite {formula} scores, got NaN or infinity in weights[{bad}]", bad
        )


def _check_keep(keep: int, n: int, what: str) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"expected keep to be an int, got {keep!r}")
    if not 0 <= keep <= n:
        raise ValueError(f"expected keep between 0 and {n}, the number of {what}, got {keep}")


def _check_alive(name: str, bits: Tensor, weight: Tensor) -> None:
    check_tensor(name, bits)
    size = (weight.numel() + 7) // 8
    if bits.dtype != torch.uint8 or bits.shape != (size,) or bits.device != weight.device:
        raise ValueError(
            f"expected {name} to be {size} bytes (uint8) on {weight.device} for a weight of shape "
            f"{tuple(weight.shape)}, got {bits.dtype} of shape {tuple(bits.shape)} on {bits.device}"
        )


@torch.library.register_fake("secateur::select")
def _(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    alive: list[Tensor],
    keep: int | None,
    threshold: float | None,
    largest: bool,
    finite: bool,
    normalizers: list[float],
    seeds: list[int],
) -> tuple[list[Tensor], Tensor]:
    masks = [w.new_empty(((w.numel() + 7) // 8,), dtype=torch.uint8) for w in weights]
    return masks, weights[0].new_empty((2,), dtype=torch.int64)


def _scores_reference(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    normalizers: list[float],
    seeds: list[int],
) -> list[Tensor]:
    return [
        elements_reference(
            w,
            grads[i] if grads else None,
            states[i] if states else None,
            formula,
            normalizers[i],
            seeds[i],
        ).flatten()
        for i, w in enumerate(weights)
    ]


def _living_reference(weights: list[Tensor], alive: list[Tensor]) -> list[Tensor]:
    if not alive:
        return [torch.ones(w.numel(), dtype=torch.bool, device=w.device) for w in weights]
    return [
        unpack_mask_reference(a, list(w.shape)).flatten()
        for a, w in zip(alive, weights, strict=True)
    ]


def select_reference(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    alive: list[Tensor],
    keep: int | None,
    threshold: float | None,
    largest: bool,
    finite: bool,
    normalizers: list[float],
    seeds: list[int],
) -> tuple[list[Tensor], Tensor]:
    """By a stable sort. Defined where no score is an error and enough elements are alive."""
    scores = torch.cat(_scores_reference(weights, grads, states, formula, normalizers, seeds))
    living = torch.cat(_living_reference(weights, alive))
    if threshold is not None:
        chosen = living & (scores >= threshold if largest else scores <= threshold)
    else:
        index = living.nonzero().flatten()
        order = scores[index].sort(descending=largest, stable=True).indices
        chosen = torch.zeros_like(living)
        chosen[index[order[:keep]]] = True
    masks = [pack_mask_reference(m) for m in torch.split(chosen, [w.numel() for w in weights])]
    return masks, torch.tensor([-1, int(living.sum())], device=scores.device)


@torch.library.register_fake("secateur::histogram")
def _(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    alive: list[Tensor],
    low: int | None,
    high: int | None,
    largest: bool,
    normalizers: list[float],
    seeds: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    bins, counts, info = (
        weights[0].new_empty(shape, dtype=torch.int64)
        for shape in ((_BINS,), (len(weights), 2), (2,))
    )
    return bins, counts, info


def histogram_reference(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    alive: list[Tensor],
    low: int | None,
    high: int | None,
    largest: bool,
    normalizers: list[float],
    seeds: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """By bincount. Defined where no score is an error."""
    lowest, highest = key_range(weights[0].dtype)
    low, high = lowest if low is None else low, highest if high is None else high
    bins = torch.zeros(_BINS, dtype=torch.int64, device=weights[0].device)
    counts, n_alive = [], 0
    scores = _scores_reference(weights, grads, states, formula, normalizers, seeds)
    for x, living in zip(scores, _living_reference(weights, alive), strict=True):
        bits = (x + 0.0).view(_key_dtype(x.dtype)).long()
        keys = torch.where(bits < 0, bits ^ highest, bits)
        keys = (keys if largest else ~keys)[living]
        inside = keys[(keys >= low) & (keys <= high)]
        # The difference may wrap around: its upper bits are wrong, those of the bin are not.
        bins += torch.bincount((inside - low >> _shift(low, high)) & (_BINS - 1), minlength=_BINS)
        counts.append([int((keys > high).sum()), inside.numel()])
        n_alive += keys.numel()
    info = torch.tensor([-1, n_alive], device=bins.device)
    return bins, torch.tensor(counts, device=bins.device), info


_SHAPES = (
    (),
    (0,),
    (1,),
    (7,),
    (5, 13),
    (3, 0, 4),
    (64, 48),
    (70001,),
)  # the last is more than one thread's grain


def _select_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def lists(shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        w, g = [draw(s) for s in shapes], [draw(s) for s in shapes]
        return w, g, [draw(s).abs().to(compute_dtype(dtype)) for s in shapes]

    def call(
        w: list[Tensor],
        g: list[Tensor],
        s: list[Tensor],
        formula: str,
        *,
        alive: Sequence[Tensor] = (),
        keep: int | None = None,
        threshold: float | None = None,
        largest: bool = True,
    ) -> tuple[object, ...]:
        n = len(w)
        normalizers, seeds = [0.5] * n, list(range(n))
        return w, g, s, formula, list(alive), keep, threshold, largest, True, normalizers, seeds

    w, g, s = lists(_SHAPES)
    total = sum(t.numel() for t in w)
    alive = [
        pack_mask_reference(torch.rand(x, generator=generator, device=device) < 0.7)
        for x in _SHAPES
    ]
    for keep in (0, 1, total // 10, total // 2, total):
        yield Sample(f"keep {keep}", call(w, g, [], "taylor", keep=keep))
    for formula in ("obd", "random"):
        yield Sample(formula, call(w, g, [], formula, keep=total // 3))
    yield Sample("by state", call(w, [], s, "obd", keep=total // 3))
    for largest in (True, False):
        name = "largest" if largest else "smallest"
        few = call(w, g, [], "movement", alive=alive, keep=total // 2, largest=largest)
        yield Sample(f"{name}, alive", few)
        few = call(w, g, [], "given", alive=alive, threshold=0.3, largest=largest)
        yield Sample(f"{name}, threshold", few)
    yield Sample("ties", call([(t * 2).round() for t in w], [], [], "given", keep=total // 2))
    a, b = draw((9, 40))[:, ::2].t(), draw((4, 6, 3, 3)).to(memory_format=torch.channels_last)
    yield Sample("strided", call([a, b], [], [], "magnitude", keep=100))


def _histogram_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    lowest, highest = key_range(dtype)
    one = int(torch.ones((), dtype=compute_dtype(dtype)).view(_key_dtype(dtype)))
    width = highest // 1000  # no power of two
    intervals: list[tuple[int | None, int | None]] = [
        (None, None),
        (lowest, 5),
        (3, highest),
        (0, 0),
        (one - width, one + width),
        (~one - width, ~one),
    ]
    for sample in _select_samples(dtype, device):
        w, g, s, formula, alive, _, _, largest, _, normalizers, seeds = sample.args
        for low, high in intervals if alive else intervals[:1]:
            args = w, g, s, formula, alive, low, high, largest, normalizers, seeds
            yield Sample(f"{sample.name}, keys {low} to {high}", args)


SPECS = (
    OpSpec("select", select_reference, _select_samples, exact=True),
    OpSpec("histogram", histogram_reference, _histogram_samples, exact=True),
)
