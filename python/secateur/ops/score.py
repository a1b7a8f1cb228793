"""Fused scores: what each weight, or block of weights, is worth, in one pass over the inputs.

A formula is two functions: ``observe(w, g)``, what is measured now, and ``finish(x, w)``, the score
made of a measured or averaged x:

================  =======================================  ==============
formula           observe(w, g)                            finish(x, w)
================  =======================================  ==============
given             w (the tensor is the score)              x
magnitude         |w|                                      x
gradient          |g|                                      x
taylor            |g * w|                                  x
taylor_squared    (g * w)^2                                x
hessian_diagonal  g^2 (empirical Fisher)                   x
obd               g^2                                      x * w^2 / 2
entropy           -p * log(p), p = |w| / normalizer        x
movement          -(g * w)                                 x
random            24 bits hashed from (seed, index), /2^24  x
================  =======================================  ==============

Scores are computed in float32 (float64 for float64 weights) and have the same bits for every
instruction set and thread count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.ops._checks import (
    check_float,
    check_list,
    check_tensor,
    check_writable,
    is_ints,
    readable,
)
from secateur.ops._spec import OpSpec, Sample

FORMULAS: tuple[str, ...] = (
    "given",
    "magnitude",
    "gradient",
    "taylor",
    "taylor_squared",
    "hessian_diagonal",
    "obd",
    "entropy",
    "movement",
    "random",
)
REDUCTIONS: tuple[str, ...] = ("sum", "mean", "max", "l2")

_OBSERVE_GRAD = frozenset(
    {"gradient", "taylor", "taylor_squared", "hessian_diagonal", "obd", "movement"}
)


def score(
    weight: Tensor,
    grad: Tensor | None = None,
    state: Tensor | None = None,
    *,
    formula: str,
    block: tuple[int, int] = (1, 1),
    reduce: str = "mean",
    normalizer: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Score a weight, per element or reduced to blocks, in one pass.

    Args:
        weight: floating point, any shape and strides; seen as a matrix (N, K) with N =
            ``shape[0]`` and K the product of the rest, a vector (n,) as (n, 1), a number as (1, 1).
        grad: its gradient, same shape and dtype; needed by a formula that observes it, unless
            ``state`` is given; not read otherwise.
        state: an average of what the formula observes, same shape, in the compute dtype; then the
            score is ``finish(state / normalizer, weight)`` and nothing is observed.
        formula: one of :data:`FORMULAS`.
        block: (rows, columns) of a block; (1, K) scores whole rows, (N, 1) whole columns. Blocks
            that stick out over the edge hold what is there.
        reduce: ``"sum"``, ``"mean"``, ``"max"`` or ``"l2"`` over the elements of a block.
        normalizer: what ``state`` is divided by, or, without state, what makes |w| a probability
            for ``"entropy"`` (the sum of |w| over the layer).
        seed: of ``"random"``: the score is a function of (seed, logical index) only.

    Returns:
        ``(ceil(N / rows), ceil(K / columns))`` in the compute dtype: float32, or float64 for
        float64 weights.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: anything else that does not fit.

    Equivalent to (taylor, reduce="sum", N and K divisible):
        ``(weight * grad).abs().view(N // rows, rows, K // columns, columns).sum((1, 3))``
    """
    check_formula(formula)
    check_float("weight", weight)
    if state is None:
        check_observed(formula, "grad", grad is not None)
    if grad is not None:
        check_like("grad", grad, "weight", weight, weight.dtype)
    if state is not None:
        check_like("state", state, "weight", weight, compute_dtype(weight.dtype))
    _check_block("block", block)
    _check_reduce(reduce)
    check_normalizer("normalizer", normalizer)
    check_seed("seed", seed)
    grads = [] if grad is None else [grad]
    states = [] if state is None else [state]
    (scores,) = _score([weight], grads, states, formula, [block], reduce, [normalizer], [seed])
    return scores


def score_each(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    states: Sequence[Tensor] | None = None,
    *,
    formula: str,
    blocks: Sequence[tuple[int, int]] | None = None,
    reduce: str = "mean",
    normalizers: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """Score a list of weights, each as :func:`score` does and to the same bits.

    All of them are one loop of the threads, or a few launches: much less than a call each where
    many are small.

    Args:
        weights: as in :func:`score`, of any shapes, strides and dtypes, on one device.
        grads: as in :func:`score`, one a weight.
        states: as in :func:`score`, one a weight.
        formula: one of :data:`FORMULAS`.
        blocks: (rows, columns) of a block, one a weight; default (1, 1).
        reduce: ``"sum"``, ``"mean"``, ``"max"`` or ``"l2"`` over the elements of a block.
        normalizers: as in :func:`score`, one a weight; default 1.
        seeds: as in :func:`score`, one a weight; default 0, 1, 2, ...

    Returns:
        For each weight its scores, as :func:`score` returns them.

    Raises:
        TypeError: a dtype does not fit, or an argument is not a list.
        ValueError: anything else that does not fit.

    Equivalent to:
        ``[score(w, g, s, formula=formula, ...) for w, g, s, ... in zip(weights, grads, ...)]``
    """
    check_lists(weights, grads, states, formula, normalizers, seeds, blocks=blocks)
    _check_reduce(reduce)
    for i, block in enumerate(blocks or ()):
        _check_block(f"blocks[{i}]", block)
    n = len(weights)
    if not weights:  # the dispatcher finds a kernel by the tensors it is given
        return []
    return _score(
        weights,
        grads or (),
        states or (),
        formula,
        [(1, 1)] * n if blocks is None else blocks,
        reduce,
        [1.0] * n if normalizers is None else normalizers,
        range(n) if seeds is None else seeds,
    )


def _score(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    formula: str,
    blocks: Sequence[tuple[int, int]],
    reduce: str,
    normalizers: Sequence[float],
    seeds: Sequence[int],
) -> list[Tensor]:
    """The op, on what was checked."""
    with torch.no_grad():
        scores: list[Tensor] = torch.ops.secateur.score(
            [readable(w) for w in weights],
            [readable(g) for g in grads],
            [readable(s) for s in states],
            formula,
            [rows for rows, _ in blocks],
            [cols for _, cols in blocks],
            reduce,
            [float(x) for x in normalizers],
            list(seeds),
        )
    return scores


def score_update_(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None = None,
    *,
    formula: str,
    decay: float,
    gain: float,
    block: tuple[int, int] = (1, 1),
    reduce: str = "mean",
    normalizer: float = 1.0,
) -> Tensor:
    """Average what a formula observes into ``state``, and score by the average, in one pass.

    ``state <- decay * state + gain * observe(weight, grad)``, then ``finish(state, weight)``
    reduced to blocks. The other arguments, the result and the errors are those of :func:`score`;
    ``normalizer`` serves ``"entropy"`` only; ``"random"`` is not a measurement and is refused, and
    so is a ``state`` whose elements share memory.

    Equivalent to:
        ``state.mul_(decay).add_(observed, alpha=gain)`` followed by :func:`score` with ``state``
    """
    _check_update(state, weight, grad, formula, decay, gain, normalizer)
    _check_block("block", block)
    _check_reduce(reduce)
    with torch.no_grad():
        scores: Tensor = torch.ops.secateur.score_update_(
            state,
            readable(weight),
            None if grad is None else readable(grad),
            formula,
            float(decay),
            float(gain),
            *block,
            reduce,
            float(normalizer),
        )
    torch.autograd.graph.increment_version(state)
    return scores


def observe_(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None = None,
    *,
    formula: str,
    decay: float,
    gain: float,
    normalizer: float = 1.0,
) -> None:
    """Average what a formula observes into ``state``; :func:`score_update_` without the scores.

    Equivalent to:
        ``state.mul_(decay).add_(observed, alpha=gain)``
    """
    _check_update(state, weight, grad, formula, decay, gain, normalizer)
    with torch.no_grad():
        torch.ops.secateur.observe_(
            state,
            readable(weight),
            None if grad is None else readable(grad),
            formula,
            float(decay),
            float(gain),
            float(normalizer),
        )
    torch.autograd.graph.increment_version(state)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores of weights of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_formula(formula: str) -> None:
    if formula not in FORMULAS:
        raise ValueError(f"expected formula to be one of {', '.join(FORMULAS)}, got {formula!r}")


def check_normalizer(name: str, normalizer: float) -> None:
    if isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {normalizer!r}")
    if not (math.isfinite(normalizer) and normalizer > 0):
        raise ValueError(f"expected {name} to be a positive finite number, got {normalizer}")


def check_seed(name: str, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"expected {name} to be an int, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"expected {name} to fit in 64 bits, got {seed}")


def check_like(name: str, t: Tensor, of: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Check that ``t`` is of ``dtype`` and otherwise matches ``weight``, called ``of``."""
    check_tensor(name, t)
    if t.dtype != dtype:
        raise TypeError(f"expected {name} to be {dtype} ({of} is {weight.dtype}), got {t.dtype}")
    if t.shape != weight.shape:
        raise ValueError(
            f"expected {name} to have the shape of {of}, {tuple(weight.shape)}, "
            f"got {tuple(t.shape)}"
        )
    if t.device != weight.device:
        raise ValueError(f"expected {name} on the device of {of}, {weight.device}, got {t.device}")


def check_observed(formula: str, name: str, given: bool) -> None:
    if formula in _OBSERVE_GRAD and not given:
        raise ValueError(f"expected {name} for formula {formula!r}, got None")


def check_lists(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    states: Sequence[Tensor] | None,
    formula: str,
    normalizers: Sequence[float] | None,
    seeds: Sequence[int] | None,
    **others: Sequence[object] | None,
) -> None:
    """Check what a list of weights is scored by; of ``others``, only how many they are."""
    check_list("weights", weights)
    n = len(weights)
    check_formula(formula)
    for i, w in enumerate(weights):
        check_float(f"weights[{i}]", w)
        if w.device != weights[0].device:
            raise ValueError(
                f"expected weights on one device, got {weights[0].device} and, weights[{i}], "
                f"{w.device}"
            )
    if states is None:
        check_observed(formula, "grads", grads is not None)
    tensors = {"grads": grads, "states": states}
    for name, given in (tensors | others | {"normalizers": normalizers, "seeds": seeds}).items():
        if given is not None:
            kind = "a list of Tensors" if name in tensors else "a list, one a weight"
            check_list(name, given, kind)
            if len(given) != n:
                raise ValueError(f"expected {n} {name}, one a weight, got {len(given)}")
    for i, w in enumerate(weights):
        of = f"weights[{i}]"
        if grads is not None:
            check_like(f"grads[{i}]", grads[i], of, w, w.dtype)
        if states is not None:
            check_like(f"states[{i}]", states[i], of, w, compute_dtype(w.dtype))
        if normalizers is not None:
            check_normalizer(f"normalizers[{i}]", normalizers[i])
        if seeds is not None:
            check_seed(f"seeds[{i}]", seeds[i])


def _check_block(name: str, block: tuple[int, int]) -> None:
    if not is_ints(block):
        raise TypeError(f"expected {name} to be (rows, columns), got {block!r}")
    if len(block) != 2 or not all(1 <= n < 2**63 for n in block):
        raise ValueError(f"expected {name} to be (rows, columns), each at least 1, got {block}")


def _check_reduce(reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"expected reduce to be one of {', '.join(REDUCTIONS)}, got {reduce!r}")


def _check_update(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    formula: str,
    decay: float,
    gain: float,
    normalizer: float,
) -> None:
    check_formula(formula)
    if formula == "random":
        raise ValueError("expected a formula that measures weights or gradients, got 'random'")
    check_float("weight", weight)
    check_observed(formula, "grad", grad is not None)
    if grad is not None:
        check_like("grad", grad, "weight", weight, weight.dtype)
    check_like("state", state, "weight", weight, compute_dtype(weight.dtype))
    check_writable("state", state)
    if not (math.isfinite(decay) and math.isfinite(gain)):
        raise ValueError(f"expected finite decay and gain, got {decay} and {gain}")
    check_normalizer("normalizer", normalizer)


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1:].numel()) if shape else (1, 1)


def _empty_scores(weight: Tensor, rows: int, cols: int) -> Tensor:
    n, k = _matrix_shape(weight.shape)
    return weight.new_empty(
        ((n + rows - 1) // rows, (k + cols - 1) // cols), dtype=compute_dtype(weight.dtype)
    )


@torch.library.register_fake("secateur::score")
def _(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    rows: list[int],
    cols: list[int],
    reduce: str,
    normalizers: list[float],
    seeds: list[int],
) -> list[Tensor]:
    return [_empty_scores(w, r, c) for w, r, c in zip(weights, rows, cols, strict=True)]


@torch.library.register_fake("secateur::score_update_")
def _(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    formula: str,
    decay: float,
    gain: float,
    rows: int,
    cols: int,
    reduce: str,
    normalizer: float,
) -> Tensor:
    return _empty_scores(weight, rows, cols)


@torch.library.register_fake("secateur::observe_")
def _(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    formula: str,
    decay: float,
    gain: float,
    normalizer: float,
) -> None:
    return None


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0xD35A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def random_reference(index: Tensor, seed: int) -> Tensor:
    """The ``"random"`` scores of logical indices (int64), in float64."""
    low, high = (torch.tensor(seed >> s & 0xFFFFFFFF, device=index.device) for s in (0, 32))
    word = 0xFFFFFFFF
    key = _mix(low + _mix(high + 0x9E3779B9 & word) & word)
    second_key = _mix(high + _mix(low + 0x85EBCA6B & word) & word)
    first = _mix(index & word ^ key)
    second = _mix(first + _mix(index >> 32 & word ^ second_key) & word)
    return (second >> 8).double() / 2**24


def observe_reference(
    weight: Tensor, grad: Tensor | None, formula: str, normalizer: float, seed: int
) -> Tensor:
    """``observe(w, g)`` in the dtype of ``weight``."""
    if formula == "given":
        return weight
    if formula == "magnitude":
        return weight.abs()
    if formula == "entropy":
        entropy: Tensor = torch.special.entr(weight.abs() / normalizer)
        return entropy
    if formula == "random":
        index = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
        return random_reference(index, seed).to(weight.dtype)
    if grad is None:
        raise ValueError(f"expected grad for formula {formula!r}, got None")
    if formula == "gradient":
        return grad.abs()
    if formula == "taylor":
        return (grad * weight).abs()
    if formula == "taylor_squared":
        return (grad * weight).square()
    if formula == "movement":
        return -(grad * weight)
    return grad.square()


def elements_reference(
    weight: Tensor,
    grad: Tensor | None,
    state: Tensor | None,
    formula: str,
    normalizer: float,
    seed: int,
) -> Tensor:
    """Scores per element, in the shape of ``weight`` and the compute dtype."""
    dtype = compute_dtype(weight.dtype)
    w, g = weight.to(dtype), None if grad is None else grad.to(dtype)
    x = observe_reference(w, g, formula, normalizer, seed) if state is None else state / normalizer
    return x * (w * w) * 0.5 if formula == "obd" else x


def _reduce_reference(x: Tensor, rows: int, cols: int, reduce: str) -> Tensor:
    n, k = _matrix_shape(x.shape)
    if x.numel() == 0:
        return _empty_scores(x, rows, cols)
    rows, cols = min(rows, n), min(cols, k)

    def blocks(t: Tensor, fill: float) -> Tensor:
        padded = torch.nn.functional.pad(t.view(n, k), (0, -k % cols, 0, -n % rows), value=fill)
        return padded.view(-(-n // rows), rows, -(-k // cols), cols)

    flat = x.double().reshape(n, k)
    if reduce == "max":
        out = blocks(flat, -math.inf).amax((1, 3))
    elif reduce == "l2":
        out = blocks(flat.square(), 0).sum((1, 3)).sqrt()
    else:
        out = blocks(flat, 0).sum((1, 3))
    if reduce == "mean":
        out = out / blocks(torch.ones_like(flat), 0).sum((1, 3))
    return out.to(x.dtype)


def score_reference(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    formula: str,
    rows: list[int],
    cols: list[int],
    reduce: str,
    normalizers: list[float],
    seeds: list[int],
) -> list[Tensor]:
    scores = []
    for i, w in enumerate(weights):
        grad, state = grads[i] if grads else None, states[i] if states else None
        x = elements_reference(w, grad, state, formula, normalizers[i], seeds[i])
        scores.append(_reduce_reference(x, rows[i], cols[i], reduce))
    return scores


def score_update_reference_(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    formula: str,
    decay: float,
    gain: float,
    rows: int,
    cols: int,
    reduce: str,
    normalizer: float,
) -> Tensor:
    observe_reference_(state, weight, grad, formula, decay, gain, normalizer)
    x = elements_reference(weight, None, state, formula, 1.0, 0)
    return _reduce_reference(x, rows, cols, reduce)


def observe_reference_(
    state: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    formula: str,
    decay: float,
    gain: float,
    normalizer: float,
) -> None:
    dtype = compute_dtype(weight.dtype)
    g = None if grad is None else grad.to(dtype)
    x = observe_reference(weight.to(dtype), g, formula, normalizer, 0)
    state.copy_(decay * state + gain * x)


_SHAPES = ((), (0,), (1,), (7,), (5, 13), (33, 40), (3, 0, 4), (6, 5, 3, 3), (2, 2100), (1500, 2))
_LARGE = (70001,)  # more than one thread's grain
_BLOCKS = ((1, 1), (1, 3), (4, 4), (32, 32), (1, 1 << 12), (1 << 12, 1), (2, 300))


def _inputs(
    dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, weight, gradient, state) of every awkward shape and layout."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> list[Tensor]:
        w, g, s = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
        return [w.to(dtype), g.to(dtype), s.abs().to(compute_dtype(dtype))]

    for shape in (*_SHAPES, _LARGE):
        w, g, s = draw(*shape)
        yield f"{shape}", w, g, s
    w, g, s = (t[:, ::2].t() for t in draw(9, 40))
    yield "strided", w, g, s
    w, g, s = (t.to(memory_format=torch.channels_last) for t in draw(4, 6, 3, 3))
    yield "channels_last", w, g, s


def _score_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    cases = list(_inputs(dtype, device))

    def one(name: str, inputs: Sequence[Tensor | None], *rest: Any) -> Sample:
        formula, block, reduce, normalizer, seed = rest
        tensors = [[] if t is None else [t] for t in inputs]
        blocks = [block[0]], [block[1]]
        return Sample(name, (*tensors, formula, *blocks, reduce, [normalizer], [seed]))

    for i, (name, w, g, _) in enumerate(cases):
        for j in range(i % 2, len(_BLOCKS), 2):  # half of the pairs: every block, every shape
            block, reduce = _BLOCKS[j], REDUCTIONS[(i + j) % 4]
            case = f"{name} {block} {reduce}"
            yield one(case, (w, g, None), "taylor", block, reduce, 1.0, 0)
    _, w, g, s = cases[5]
    for formula in FORMULAS:
        yield one(formula, (w, g, None), formula, (1, 1), "mean", 50.0, 7)
        yield one(f"{formula} of blocks", (w, g, None), formula, (8, 6), "sum", 50.0, 7)
        yield one(f"{formula} by state", (w, None, s), formula, (1, 1), "mean", 0.9, 0)
    for reduce in REDUCTIONS:
        yield one(f"state {reduce}", (w, None, s), "obd", (8, 6), reduce, 0.9, 0)
    # Every shape, layout and block in one list, and more small ones than a CUDA launch takes.
    cases += list(_inputs(torch.float64, device)) + list(_inputs(torch.float32, device))
    cases += cases[3:5] * 16
    n = len(cases)
    _, weights, grads, states = (list(column) for column in zip(*cases, strict=True))
    blocks = [list(sizes) for sizes in zip(*(_BLOCKS * n)[:n], strict=True)]
    divisors = [1.0 + i for i in range(n)], list(range(n))
    yield Sample("many", (weights, grads, [], "taylor", *blocks, "sum", *divisors))
    yield Sample("many entropies", (weights, [], [], "entropy", *blocks, "mean", *divisors))
    yield Sample("many by state", (weights, [], states, "obd", *blocks, "l2", *divisors))


def _update_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    cases = list(_inputs(dtype, device))
    for name, w, g, s in cases:
        yield Sample(name, (s, w, g, "obd", 0.9, 0.1, 2, 3, "sum", 1.0))
    for formula in FORMULAS[:-1]:
        _, w, g, s = cases[5]
        yield Sample(formula, (s, w, g, formula, 0.9, 0.1, 1, 1, "mean", 50.0))


def _observe_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _update_samples(dtype, device):
        yield Sample(sample.name, (*sample.args[:6], sample.args[-1]))


SPECS = (
    OpSpec("score", score_reference, _score_samples),
    OpSpec("score_update_", score_update_reference_, _update_samples),
    OpSpec("observe_", observe_reference_, _observe_samples),
)
