"""Which units live on: criterion, granularity, scope and target brought together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from secateur import ops
from secateur.criteria import Criterion
from secateur.granularity import Granularity
from secateur.layers import Layer
from secateur.schedules import Target
from secateur.scope import share_out
from secateur.shards import part

__all__ = ["Choice", "Inputs", "choose", "measured", "non_finite", "normalizer", "unit_scores"]

_TOGETHER = 1 << 26  # bytes of weights whose units are scored at a time


@dataclass(frozen=True)
class Inputs:
    """Where a score comes from, besides the weight.

    Attributes:
        step: the optimizer step that is about to be taken.
        gradient: the gradient of a layer, unscaled; None where it has none.
        given_state: a score that comes from elsewhere, with the number to divide it by
            (``Criterion.given_state``); None where there is none.
        scored: scores of units that were taken earlier, by layer name.
    """

    step: int
    gradient: Callable[[Layer], Tensor | None]
    given_state: Callable[[Layer], tuple[Tensor, float] | None]
    scored: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What a target selects, layer by layer.

    Attributes:
        unit_bits: packed masks of the units that live on, of those that lie on this process.
        floor_held: whether a layer would have lost every unit, and so keeps its best one.
    """

    unit_bits: list[Tensor]
    floor_held: list[bool]


def measured(criterion: Criterion, layer: Layer, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The weight and gradient that the criterion's formula works on, as far as they lie here."""
    weight, grad = layer.trained.detach(), None
    if criterion.needs_gradient:
        grad = inputs.gradient(layer)
        if grad is None:
            raise ValueError(
                f"expected {layer.name!r} to have a gradient when it is scored, got None: step "
                "after backward() and before zero_grad(), and exclude parameters that the loss "
                "does not reach"
            )
        if grad.dtype != weight.dtype:  # unscaled beyond the weight's range
            weight = weight.to(grad.dtype)
    if criterion.formula != "given":
        return part(weight), None if grad is None else part(grad)
    scores = criterion.measure(weight, grad)
    if not (
        isinstance(scores, Tensor) and scores.shape == weight.shape and scores.is_floating_point()
    ):
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else scores
        raise ValueError(
            f"expected {type(criterion).__name__}.measure to return floating-point scores of shape "
            f"{tuple(weight.shape)} for {layer.name!r}, got {got}"
        )
    return layer.split.cut(scores, layer.parameter).to(layer.score_dtype), None


def normalizer(criterion: Criterion, layer: Layer) -> float:
    """Sum of |w|, in the fixed order of the score kernel, so that every machine gets the same."""
    if not criterion.normalized:
        return 1.0
    rows, cols = layer.matrix
    sums = ops.score(layer.own, formula="magnitude", block=(1, cols), reduce="sum")
    sums = layer.split.shards.join(sums)
    total = ops.score(sums, formula="magnitude", block=(rows, 1), reduce="sum").item()
    return total if total > 0 else 1.0  # an all-zero layer: p = 0 whatever the sum


def unit_scores(
    layers: Mapping[int, Layer], criterion: Criterion, granularity: Granularity, inputs: Inputs
) -> dict[int, Tensor]:
    """One score a unit of each layer, of those that lie here: (rows, cols) of units.

    Args:
        layers: by their index among all layers.
    """
    scores: dict[int, Tensor] = {}
    for batch in _batches(layers):
        # Those that are scored by one formula from the same kinds of inputs are scored together.
        alike: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for i in batch:
            given = _arguments(i, layers[i], criterion, inputs)
            kinds = (name for name in ("grad", "state") if given.get(name) is not None)
            key = (_formula(criterion, layers[i]), given["weight"].device, *kinds)
            alike.setdefault(key, {})[i] = given
        for (formula, *_), members in alike.items():
            scored = ops.score_each(
                **_lists(list(members.values())),
                formula=formula,
                blocks=[layers[i].block for i in members],
                reduce=granularity.reduction,
            )
            scores.update(zip(members, scored, strict=True))
    return scores


def _batches(layers: Mapping[int, Layer]) -> Iterator[list[int]]:
    """Their indices, a few at a time: what is scored may have been computed for it."""
    batch: list[int] = []
    size = 0
    for i, layer in layers.items():
        batch.append(i)
        size += layer.own.nbytes
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _lists(arguments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``ops.score_each`` and ``ops.select`` take, of what each layer is scored by."""

    def column(name: str) -> list[Any] | None:
        values = [given.get(name) for given in arguments]
        return None if values[0] is None else values

    names = ("weight", "grad", "state", "normalizer", "seed")
    return {f"{name}s": column(name) for name in names}


def _formula(criterion: Criterion, layer: Layer) -> str:
    """The formula of the kernel: that of "given" scores where it cannot know the whole index."""
    sharded = layer.split.shards.size > 1
    return "given" if criterion.formula == "random" and sharded else criterion.formula


def _arguments(index: int, layer: Layer, criterion: Criterion, inputs: Inputs) -> dict[str, Any]:
    """What the ``index``-th layer is scored by, as ``ops.score`` takes it."""
    seed = criterion.seed_of(inputs.step, index)
    if _formula(criterion, layer) != criterion.formula:
        # A random score is a function of the index in the whole parameter.
        whole = layer.own.new_empty(()).expand(layer.shape)
        scores = ops.score(whole, formula=criterion.formula, seed=seed)
        return {"weight": layer.split.cut(scores.reshape(layer.shape), layer.parameter)}
    state, divisor = inputs.given_state(layer) or (layer.state, 1.0)
    if state is None:
        weight, grad = measured(criterion, layer, inputs)
        divisor = normalizer(criterion, layer)
    else:
        weight, grad = layer.own, None
        if state is not layer.state:
            if state.shape != layer.shape:
                raise ValueError(
                    f"expected a given score of shape {tuple(layer.shape)} for {layer.name!r}, "
                    f"got {tuple(state.shape)}"
                )
            state = layer.split.cut(state, layer.parameter)
            state = state.to(weight.device, layer.score_dtype)
    return {"weight": weight, "grad": grad, "state": state, "normalizer": divisor, "seed": seed}


def non_finite(layer: Layer, step: int) -> ValueError:
    """The error for a layer whose scores are not finite at ``step``."""
    return ValueError(
        f"expected finite scores, got NaN or Inf in {layer.name!r} at step {step}: the run has "
        "diverged, nothing was pruned"
    )


class _Candidates:
    """The units that live, with all that is needed to score them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        criterion: Criterion,
        granularity: Granularity,
        inputs: Inputs,
    ) -> None:
        self.layers = layers
        self.step = inputs.step
        self.largest = criterion.keep == "largest"
        self.split = layers[0].split
        self.arguments: list[dict[str, Any]]
        # Elements are scored while they are compared. Units that were scored earlier, and larger
        # ones, are small enough to be written out.
        if not inputs.scored and all(layer.block == (1, 1) for layer in layers):
            self.formula = _formula(criterion, layers[0])
            self.arguments = [
                _arguments(i, layer, criterion, inputs) for i, layer in enumerate(layers)
            ]
        else:
            self.formula = "given"
            new = {i: layer for i, layer in enumerate(layers) if layer.name not in inputs.scored}
            scores = unit_scores(new, criterion, granularity, inputs)
            self.arguments = [
                {"weight": scores[i] if i in scores else inputs.scored[layer.name]}
                for i, layer in enumerate(layers)
            ]

    def select(self, members: Sequence[int], **limit: Any) -> list[Tensor]:
        """Packed masks of the units of ``members`` that live on (``ops.select``)."""
        try:
            return self.split.shards.select(
                **_lists([self.arguments[i] for i in members]),
                formula=self.formula,
                alive=[self.layers[i].unit_bits for i in members],
                largest=self.largest,
                **limit,
            )
        except ops.NonFiniteScoreError as error:
            raise non_finite(self.layers[members[error.index]], self.step) from error

    def emptied(self, chosen: Mapping[int, Tensor], members: Sequence[int]) -> list[int]:
        """Those of ``members`` of which nothing is chosen, on any process."""
        own = [int(chosen[i].any()) for i in members]
        totals = self.split.total(own, chosen[members[0]].device)
        return [i for i, total in zip(members, totals, strict=True) if total == 0]

    def keep_best(self, members: Sequence[int], keep: int) -> tuple[dict[int, Tensor], set[int]]:
        """The ``keep`` best units over ``members``, but at least the best one of each.

        Returns:
            Packed masks by layer index, and the layers that live by that floor alone.
        """
        chosen: dict[int, Tensor] = {}
        floored: set[int] = set()
        free = list(members)
        while free:
            # A layer that would lose everything keeps its best unit at the cost of the others.
            room = max(keep - len(floored), 0)
            chosen.update(zip(free, self.select(free, keep=room), strict=True))
            emptied = self.emptied(chosen, free)
            for i in emptied:
                (chosen[i],) = self.select([i], keep=1)
            floored.update(emptied)
            free = [i for i in free if i not in floored] if emptied else []
        return chosen, floored


def choose(
    layers: Sequence[Layer],
    criterion: Criterion,
    granularity: Granularity,
    target: Target,
    scope: str,
    inputs: Inputs,
) -> Choice:
    """Score the units that live and select those that live on. Changes nothing.

    A sparsity s leaves ``n - round(s * n)`` of the n units of each share of the scope, dead ones
    counted; where fewer live already, all of them live on. Every layer keeps its best unit.

    Raises:
        ValueError: a missing gradient, or a score of a living unit that is NaN or Inf.
    """
    candidates = layers[0].split.shards.attempt(
        "score its rows", lambda: _Candidates(layers, criterion, granularity, inputs)
    )
    bits = {i: layer.unit_bits for i, layer in enumerate(layers)}
    floored: set[int] = set()
    if target.threshold is not None:
        for i in bits:
            (bits[i],) = candidates.select([i], threshold=target.threshold)
            if candidates.emptied(bits, [i]):
                (bits[i],) = candidates.select([i], keep=1)
                floored.add(i)
    else:
        units = [layer.units for layer in layers]
        for members, dead in share_out(scope, target.sparsity or 0.0, units):
            keep = sum(units[i] for i in members) - dead
            if keep < sum(layers[i].alive_units for i in members):
                chosen, emptied = candidates.keep_best(members, keep)
                bits.update(chosen)
                floored |= emptied
    return Choice([bits[i] for i in range(len(layers))], [i in floored for i in range(len(layers))])
