"""Schedules: when to prune, and how far. Steps are optimizer steps; 0 is the pruner's first.

To add a schedule, subclass :class:`Schedule` (or :class:`Ramp`, for a sparsity that grows from 0)
and say what each due step asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "Cubic",
    "Exponential",
    "Linear",
    "OneShot",
    "Ramp",
    "Schedule",
    "Target",
    "Threshold",
]


@dataclass(frozen=True)
class Target:
    """What a due step asks for: a sparsity, or a threshold on the scores.

    Args:
        sparsity: fraction of the units to be dead, in [0, 1); or
        threshold: units with a score below it die (above it, where the smallest are kept). Exactly
            one of the two is given.
        permanent: whether the dead stay dead, or are zeroed once and left free.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    sparsity: float | None = None
    threshold: float | None = None
    permanent: bool = True

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError(
                f"expected one of sparsity and threshold, got sparsity={self.sparsity!r} and "
                f"threshold={self.threshold!r}"
            )
        if self.sparsity is not None:
            _check_sparsity(self.sparsity)
        if self.threshold is not None:
            _check_threshold("threshold", self.threshold)
        if not isinstance(self.permanent, bool):
            raise TypeError(f"expected permanent to be a bool, got {self.permanent!r}")


def _check_sparsity(sparsity: float) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"expected sparsity to be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        hint = f"; for {sparsity} % write {sparsity / 100}" if 1 < sparsity < 100 else ""
        raise ValueError(f"expected sparsity to be a fraction in [0, 1), got {sparsity!r}{hint}")


def _check_threshold(name: str, threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {threshold!r}")
    if not math.isfinite(threshold):
        raise ValueError(f"expected {name} to be finite, got {threshold!r}")


def _check_step(name: str, step: int, least: int = 0) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"expected {name} to be a whole number of optimizer steps, got {step!r}")
    if step < least:
        raise ValueError(f"expected {name} to be at least {least}, got {step}")


@dataclass(frozen=True)
class Schedule:
    """When to prune, and how far."""

    def target(self, step: int) -> Target | None:
        """What optimizer step ``step`` asks for; None where no pruning is due."""
        raise NotImplementedError(f"{type(self).__name__} has no target()")

    @property
    def last(self) -> int | None:
        """The last due step; None: there is no last one."""
        raise NotImplementedError(f"{type(self).__name__} has no last")


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once.

    Args:
        sparsity: fraction of the units to prune, in [0, 1).
        at: the optimizer step before whose update it happens.

    Raises:
        TypeError, ValueError: ``sparsity`` or ``at`` is not what it should be.
    """

    sparsity: float
    at: int = 0

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_step("at", self.at)

    def target(self, step: int) -> Target | None:
        return Target(self.sparsity) if step == self.at else None

    @property
    def last(self) -> int:
        return self.at


@dataclass(frozen=True)
class Ramp(Schedule):
    """A sparsity that grows from 0 at ``begin`` to ``sparsity`` at ``end``.

    Args:
        sparsity: the final fraction of dead units, in [0, 1).
        begin, end: first and last optimizer step of the ramp; ``end`` is always due.
        every: steps between two prunings.

    Raises:
        TypeError, ValueError: an argument is not what it should be; ``end`` lies before ``begin``.
    """

    sparsity: float
    begin: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_step("begin", self.begin)
        _check_step("end", self.end)
        _check_step("every", self.every, least=1)
        if self.end < self.begin:
            raise ValueError(
                f"expected end to be at or after begin, got begin={self.begin}, end={self.end}"
            )

    def target(self, step: int) -> Target | None:
        if not self.begin <= step <= self.end:
            return None
        if step == self.end:
            return Target(self.sparsity)
        if (step - self.begin) % self.every:
            return None
        return Target(self.at_progress((step - self.begin) / (self.end - self.begin)))

    def at_progress(self, progress: float) -> float:
        """The sparsity at ``progress`` in [0, 1] of the ramp."""
        raise NotImplementedError(f"{type(self).__name__} has no at_progress()")

    @property
    def last(self) -> int:
        return self.end


@dataclass(frozen=True)
class Linear(Ramp):
    """s t: the same number of units each time. Arguments as :class:`Ramp`."""

    def at_progress(self, progress: float) -> float:
        return self.sparsity * progress


@dataclass(frozen=True)
class Cubic(Ramp):
    """s (1 - (1 - t)^3): fast while much is redundant, slow near the end.

    Arguments as :class:`Ramp`.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", eq. 1 with initial sparsity 0.
    """

    def at_progress(self, progress: float) -> float:
        return self.sparsity * (1 - (1 - progress) ** 3)


@dataclass(frozen=True)
class Exponential(Ramp):
    """1 - (1 - s)^t: the same fraction of what is alive each time. Arguments as :class:`Ramp`."""

    def at_progress(self, progress: float) -> float:
        return 1 - math.pow(1 - self.sparsity, progress)


@dataclass(frozen=True)
class Threshold(Schedule):
    """Gradient pruning: at each due step, every unit with a score below ``epsilon`` becomes zero.

    Args:
        epsilon: in units of the criterion's score; |g w| for ``Taylor``.
        begin, end: first and last optimizer step at which it may happen; ``end=None``: no last.
        every: steps between two prunings.
        permanent: True: the dead stay dead. False: a weight is zeroed just before the update and
            left free, so that the optimizer may move it again.

    Raises:
        TypeError, ValueError: an argument is not what it should be; ``end`` lies before ``begin``.
    """

    epsilon: float
    begin: int = 0
    end: int | None = None
    every: int = 1
    permanent: bool = True

    def __post_init__(self) -> None:
        _check_threshold("epsilon", self.epsilon)
        _check_step("begin", self.begin)
        _check_step("every", self.every, least=1)
        if self.end is not None:
            _check_step("end", self.end)
            if self.end < self.begin:
                raise ValueError(
                    f"expected end to be at or after begin, got begin={self.begin}, end={self.end}"
                )
        if not isinstance(self.permanent, bool):
            raise TypeError(f"expected permanent to be a bool, got {self.permanent!r}")

    def target(self, step: int) -> Target | None:
        if step < self.begin or (self.end is not None and step > self.end):
            return None
        if (step - self.begin) % self.every:
            return None
        return Target(threshold=self.epsilon, permanent=self.permanent)

    @property
    def last(self) -> int | None:
        return self.end
