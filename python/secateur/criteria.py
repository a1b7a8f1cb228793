"""Criteria: what a weight is worth. The units worth least are pruned first.

Notation: w a weight, g = dL/dw its gradient as the optimizer is about to see it, h the diagonal of
the Hessian of the loss. To add a criterion, subclass :class:`Criterion` here (or in your own code):
name a fused formula of ``csrc/common/score.h``, or leave ``formula`` as it is and write
:meth:`Criterion.measure` in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

__all__ = [
    "OBD",
    "Criterion",
    "Entropy",
    "Gradient",
    "HessianDiagonal",
    "Magnitude",
    "Movement",
    "Random",
    "Taylor",
]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What a weight is worth: a score per weight, computed just before an optimizer step.

    Args:
        keep: which scores survive, ``"largest"`` or ``"smallest"``.
        ema: decay in (0, 1) of an exponential moving average of the score over optimizer steps
            (with gradient accumulation a step's gradient is the sum over its micro-batches); it
            starts at the first step's score and runs until the schedule ends. None: this step's
            score alone.

    Raises:
        TypeError: ``ema`` is not a float, or the class has neither formula nor :meth:`measure`.
        ValueError: ``keep`` is neither, or ``ema`` lies outside (0, 1).
    """

    keep: Literal["largest", "smallest"] = "largest"
    ema: float | None = None

    formula: ClassVar[str] = "given"
    """Row of ``secateur.ops.FORMULAS``; "given" scores with :meth:`measure`."""
    normalized: ClassVar[bool] = False
    """Whether the formula divides |w| by its sum over the layer."""

    def __post_init__(self) -> None:
        if self.keep not in ("largest", "smallest"):
            raise ValueError(f'expected keep to be "largest" or "smallest", got {self.keep!r}')
        if self.ema is not None and not isinstance(self.ema, float):
            raise TypeError(f"expected ema to be None or a float in (0, 1), got {self.ema!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"expected ema to be None or a decay in (0, 1), got {self.ema!r}")
        if self.formula == "given" and type(self).measure is Criterion.measure:
            raise TypeError(
                "expected a criterion with a formula or a measure() of its own, got "
                f"{type(self).__name__}"
            )

    @property
    def needs_gradient(self) -> bool:
        """Whether the score needs the gradient of the weight."""
        return False

    @property
    def accumulation(self) -> tuple[float, float] | None:
        """(decay, gain) of ``state = decay * state + gain * observation``; None: no state."""
        return None if self.ema is None else (self.ema, 1 - self.ema)

    def measure(self, weight: Tensor, grad: Tensor | None) -> Tensor:
        """The score of every element in plain PyTorch, for criteria without a fused formula.

        Args:
            weight: a parameter, without autograd.
            grad: its gradient, None where ``needs_gradient`` is False.

        Returns:
            Floating point, ``weight.shape``.
        """
        raise NotImplementedError(f"{type(self).__name__} scores by its formula")

    def given_state(
        self, name: str, moments: Mapping[str, Any], group: Mapping[str, Any]
    ) -> tuple[Tensor, float] | None:
        """A state that comes from elsewhere, with the number to divide it by; None: no such state.

        Args:
            name: the parameter's name.
            moments: the optimizer's state of the parameter; empty before its first step.
            group: the optimizer's parameter group.
        """
        return None

    def seed_of(self, step: int, layer: int) -> int:
        """Seed of the "random" formula for the ``layer``-th layer at ``step``."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """|w|.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".

    Equivalent to:
        ``w.abs()``
    """

    formula: ClassVar[str] = "magnitude"


@dataclass(frozen=True, kw_only=True)
class Gradient(Criterion):
    """|g|: how fast the loss moves with the weight.

    Equivalent to:
        ``w.grad.abs()``
    """

    formula: ClassVar[str] = "gradient"

    @property
    def needs_gradient(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """|g w|, the first-order estimate of what the loss changes by when w becomes zero.

    Args:
        squared: score (g w)^2 instead: the same order of weights, but squared before an average
            over a block or over time.

    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", eq. 7 (absolute); Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", eq. 8 (squared).

    Equivalent to:
        ``(w.grad * w).abs()``
    """

    squared: bool = False

    @property
    def formula(self) -> str:  # type: ignore[override]
        return "taylor_squared" if self.squared else "taylor"

    @property
    def needs_gradient(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class HessianDiagonal(Criterion):
    """h, the curvature of the loss along the weight.

    Args:
        hessian: where h comes from. ``"fisher"``: an average of g^2 over steps (the empirical
            Fisher), with decay ``ema``. ``"adam"``: the second moment that the optimizer keeps
            (``exp_avg_sq``), bias-corrected. A mapping of parameter names to tensors of the
            parameters' shapes: h itself, for instance of ``secateur.hutchinson_diagonal``.
        ema: decay of the Fisher average; None: g^2 of this step alone. Not used by the others. With
            gradient accumulation g is the sum over the step's micro-batches.

    Raises:
        ValueError: ``hessian`` is none of these.

    Source: LeCun et al. 1990, "Optimal Brain Damage", eq. 4-6 for the diagonal; Kunstner et al.
    2019, "Limitations of the Empirical Fisher Approximation", eq. 3 for g^2.

    Equivalent to:
        ``w.grad ** 2`` averaged
    """

    ema: float | None = 0.9
    hessian: Literal["fisher", "adam"] | Mapping[str, Tensor] = field(
        default="fisher", compare=False
    )

    formula: ClassVar[str] = "hessian_diagonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hessian not in ("fisher", "adam") and not isinstance(self.hessian, Mapping):
            raise ValueError(
                'expected hessian to be "fisher", "adam" or a mapping of parameter names to '
                f"tensors, got {self.hessian!r}"
            )

    def __repr__(self) -> str:
        source = repr(self.hessian) if isinstance(self.hessian, str) else "given"
        return f"{type(self).__name__}(keep={self.keep!r}, ema={self.ema!r}, hessian={source})"

    @property
    def needs_gradient(self) -> bool:
        return self.hessian == "fisher"

    @property
    def accumulation(self) -> tuple[float, float] | None:
        return super().accumulation if self.hessian == "fisher" else None

    def given_state(
        self, name: str, moments: Mapping[str, Any], group: Mapping[str, Any]
    ) -> tuple[Tensor, float] | None:
        if isinstance(self.hessian, Mapping):
            if name not in self.hessian:
                raise ValueError(
                    f"expected the given hessian to hold {name!r}, got {sorted(self.hessian)}"
                )
            given = self.hessian[name]
            if not isinstance(given, Tensor) or not given.is_floating_point():
                kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(
                    f"expected the hessian of {name!r} to be a floating-point Tensor, got {kind}"
                )
            return given, 1.0
        if self.hessian == "fisher":
            return None
        if "exp_avg_sq" not in moments or "betas" not in group:
            raise ValueError(
                f"expected an Adam-like optimizer that holds exp_avg_sq of {name!r} after a first "
                f"step, got {sorted(moments) or 'no state'}"
            )
        beta2 = float(group["betas"][1])
        return moments["exp_avg_sq"], 1 - beta2 ** float(moments["step"])


@dataclass(frozen=True, kw_only=True, repr=False)
class OBD(HessianDiagonal):
    """h w^2 / 2, the second-order estimate of what the loss changes by when w becomes zero.

    Args:
        hessian, ema: as in :class:`HessianDiagonal`.

    Source: LeCun et al. 1990, "Optimal Brain Damage", eq. 5.

    Equivalent to:
        ``h * w ** 2 / 2``
    """

    formula: ClassVar[str] = "obd"


@dataclass(frozen=True, kw_only=True)
class Entropy(Criterion):
    """-p log p with p = |w| / sum |w| over the layer: the weight's share of the layer's entropy.

    It grows with |w| up to p = 1/e, so within a layer of many weights it ranks as magnitude does;
    across layers it favours small layers. The log is natural; the score is 0 where w = 0.

    Source: Shannon 1948, "A Mathematical Theory of Communication", section 6.

    Equivalent to:
        ``torch.special.entr(w.abs() / w.abs().sum())``
    """

    formula: ClassVar[str] = "entropy"
    normalized: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Movement(Criterion):
    """-sum over steps of g w: positive where training moves the weight away from zero.

    Args:
        ema: None sums over all steps, as the source does; a decay averages instead.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", eq. 3 (up to the
    learning rate, which does not change the order).

    Equivalent to:
        ``score -= w.grad * w`` at every step
    """

    formula: ClassVar[str] = "movement"

    @property
    def needs_gradient(self) -> bool:
        return True

    @property
    def accumulation(self) -> tuple[float, float]:
        return super().accumulation or (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """A uniform number in [0, 1) per weight, new at every step: the baseline of any comparison.

    A pure function of (seed, step, layer, index), so the same on every device and rank.

    Args:
        seed: a whole number.

    Raises:
        TypeError: ``seed`` is not a whole number.
        ValueError: ``ema`` is given: there is nothing to average.

    Equivalent to:
        ``torch.rand_like(w)``
    """

    seed: int = 0

    formula: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"expected seed to be an int, got {self.seed!r}")
        if self.ema is not None:
            raise ValueError(f"expected no ema of random scores, got {self.ema!r}")

    def seed_of(self, step: int, layer: int) -> int:
        # Odd multipliers keep (seed, step, layer) apart; the kernel's hash does the mixing.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + step) * 0xBF58476D1CE4E5B9 + layer
        return mixed % 2**63
