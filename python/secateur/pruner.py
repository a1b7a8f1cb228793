"""Pruning inside a training loop: the only file that knows model and optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur import ops, surgery
from secateur.criteria import Criterion
from secateur.granularity import Granularity
from secateur.layers import Layer, find_layers
from secateur.schedules import Schedule, Target
from secateur.scope import share_out
from secateur.selection import Inputs, choose, measured, non_finite, normalizer

__all__ = ["Pruner", "prune_"]

_VERSION = 1  # of state_dict()
_LISTED = 4  # names of one kind that the plan shows; Pruner.skipped has them all


class Pruner:
    """Prunes a model while it trains: masks are chosen just before an optimizer step.

    The model's parameters stay the dense parameters they were, zero where dead: no
    parametrization, no renamed keys. Gradients of dead weights are zeroed as they arrive, so
    clipping sees the pruned network; weights and optimizer moments are zeroed after every update,
    so that a dead weight stays exactly zero under any optimizer.

    Args:
        model: the module; wrappers (DataParallel, DistributedDataParallel, torch.compile) are seen
            through.
        optimizer: holds the model's parameters; its ``step`` drives the schedule. None with
            :meth:`update`, for hand-rolled updates.
        criterion: what a weight is worth (``secateur.criteria``).
        granularity: what lives or dies together (``secateur.granularity``).
        schedule: when, and how far (``secateur.schedules``).
        scope: ``"global"``: all layers compete for the target; ``"layer"``: each layer meets it.
        include: name globs of the parameters to prune, whatever they are, or of modules, which
            stand for all weights inside. None: every weight of the model. A weight is a parameter
            of two dimensions or more that belongs to no norm and no embedding.
        exclude: name globs of the parameters or modules to leave out.

    Attributes:
        layers: what is pruned, one :class:`Layer` a parameter.
        skipped: names of the parameters that are left out, and why.
        steps: optimizer steps taken since the pruner was made: the schedule's clock.
        idle_steps: due steps that had nothing to prune.

    Raises:
        TypeError, ValueError: an argument is not what it should be, a glob matches nothing, the
            model has nothing to prune, an included parameter is frozen, or the optimizer does not
            hold a parameter to prune.

    Example:
        >>> pruner = secateur.Pruner(
        ...     model, optimizer,
        ...     criterion=secateur.Taylor(),
        ...     granularity=secateur.Block(32),
        ...     schedule=secateur.Cubic(0.9, begin=500, end=5000, every=50),
        ... )
        >>> for batch in batches:  # the loop stays as it was
        ...     loss(model, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        criterion: Criterion,
        granularity: Granularity,
        schedule: Schedule,
        scope: str = "global",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        _check_policy(criterion, scope)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"expected a schedule such as Cubic(0.9, ...), got {schedule!r}")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"expected optimizer to be a torch.optim.Optimizer or None, got {optimizer!r}"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "expected an optimizer that evaluates the gradient once a step, got LBFGS, whose "
                "curvature history spans every weight: its steps would move the dead ones"
            )
        self.layers, self.skipped = find_layers(model, granularity, include, exclude)
        self.optimizer = optimizer
        self._check_parameters()
        for layer in self.layers:
            if _GradientMask.holds(layer.parameter):
                raise ValueError(
                    f"expected parameters that no other pruner prunes, got {layer.name!r}: "
                    "remove() the other one first"
                )
        self.criterion = criterion
        self.granularity = granularity
        self.schedule = schedule
        self.scope = scope
        self.steps = 0
        self.idle_steps = 0
        self._in_update = False
        self._handles: list[RemovableHandle] = []
        self._attach()

    def _attach(self) -> None:
        self._handles = [
            layer.parameter.register_post_accumulate_grad_hook(_GradientMask(layer))
            for layer in self.layers
        ]
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(self.optimizer.register_step_post_hook(self._after_step))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy drives the copies of model and optimizer that it was copied with."""
        attached = state.pop("_handles")
        self.__dict__.update(state, _handles=[])
        if attached:
            self._attach()

    @property
    def masks(self) -> dict[str, Tensor]:
        """bool masks by parameter name, True = alive; copies."""
        return {layer.name: layer.mask for layer in self.layers}

    def sparsity(self) -> float:
        """Fraction of the weights of the pruned parameters that are dead."""
        return 1 - sum(layer.alive for layer in self.layers) / self._numel()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around a hand-rolled update of the weights, with the gradients in ``.grad``.

        Stands for one optimizer step: masks are chosen on entry, and what the update moved back to
        life is zeroed on exit. A step of the optimizer inside is part of it; an update that raises
        does not count.
        """
        self._before_update()
        self._in_update = True
        try:
            yield
        finally:
            self._in_update = False
            self._mask_weights()
        self._count_step()

    def remove(self) -> None:
        """Detach from model and optimizer. The weights stay as they are; dead ones can move again.

        Calling it twice is allowed.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Masks, running scores and position in the schedule; tensors and plain values only."""
        return {
            "version": _VERSION,
            "settings": self._settings(),
            "steps": self.steps,
            "idle_steps": self.idle_steps,
            "layers": {
                layer.name: {
                    "bits": layer.bits.clone(),
                    "state": None if layer.state is None else layer.state.clone(),
                    "target": layer.target,
                    "floor_held": layer.floor_held,
                }
                for layer in self.layers
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; weights and moments of the dead become zero.

        Args:
            state: of a pruner of the same criterion, granularity, schedule and scope.

        Raises:
            ValueError: the state is of other settings, names or shapes, or is no state. Nothing is
                changed then.
        """
        masks = self._check_state(state)
        for layer, mask in zip(self.layers, masks, strict=True):
            saved = state["layers"][layer.name]
            running = saved["state"]
            layer.set_mask(mask)
            layer.state = None if running is None else running.to(mask.device, copy=True)
            layer.target, layer.floor_held = float(saved["target"]), saved["floor_held"]
        self.steps, self.idle_steps = state["steps"], state["idle_steps"]
        self._mask_weights()
        self._mask_gradients()

    def _check_state(self, state: Mapping[str, Any]) -> list[Tensor]:
        """The masks in a state, layer by layer; ValueError where it does not fit this pruner."""
        _expect_keys("the state of a Pruner", state, self.state_dict())
        if state["version"] != _VERSION:
            raise ValueError(f"expected a state of version {_VERSION}, got {state['version']!r}")
        _expect_keys("settings", state["settings"], self._settings())
        for key, ours in self._settings().items():
            if state["settings"][key] != ours:
                raise ValueError(
                    f"expected a state saved with {key}={ours}, got {state['settings'][key]}"
                )
        for key in ("steps", "idle_steps"):
            if type(state[key]) is not int or state[key] < 0:
                raise ValueError(f"expected {key} to be a whole number, got {state[key]!r}")
        _expect_keys("layers", state["layers"], {layer.name for layer in self.layers})
        return [_check_layer(layer, state["layers"][layer.name]) for layer in self.layers]

    def __repr__(self) -> str:
        """The plan, and how far it has got."""
        lines = [
            f"Pruner after {self.steps} steps: {self.sparsity():.4f} of {self._numel():,} weights "
            "are dead"
            + (f"; {self.idle_steps} due steps had nothing to do" if self.idle_steps else "")
        ]
        lines += [f"  {key:<12} {value}" for key, value in self._settings().items()]
        last = self.schedule.last
        final = None if last is None else self.schedule.target(last)
        to_prune = ["by score"] * len(self.layers)
        if final is not None and final.sparsity is not None:
            units = [layer.units for layer in self.layers]
            for members, dead in share_out(self.scope, final.sparsity, units):
                shared = f"{dead:,}"
                if len(members) > 1:
                    total = sum(units[i] for i in members)
                    lines.append(f"  to prune     {dead:,} of {total:,} units, whichever they are")
                    shared = "shared"
                for i in members:
                    to_prune[i] = shared
        rows = [("parameter", "shape", "units", "to prune", "sparsity", "")]
        for layer, share in zip(self.layers, to_prune, strict=True):
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.units:,} of {layer.block[0]}x{layer.block[1]}",
                    share,
                    f"{layer.sparsity:.4f}",
                    "kept its best unit" if layer.floor_held else "",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            listed = ", ".join(names[:_LISTED])
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            lines.append(f"  left out ({why}): {listed}{more}")
        return "\n".join(lines)

    def _settings(self) -> dict[str, str]:
        return {
            "criterion": repr(self.criterion),
            "granularity": repr(self.granularity),
            "schedule": repr(self.schedule),
            "scope": repr(self.scope),
        }

    def _numel(self) -> int:
        return sum(layer.parameter.numel() for layer in self.layers)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._in_update or _is_skipped(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update()
            return None

        # The closure makes the gradients, so the masks are chosen right after it has run.
        def scored_closure() -> Any:
            loss = closure()
            self._before_update()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": scored_closure}
        return (args[0], scored_closure, *args[2:]), kwargs

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not (self._in_update or _is_skipped(optimizer)):
            self._mask_weights()
            self._count_step()

    @torch.no_grad()
    def _before_update(self) -> None:
        inputs = Inputs(self.steps, self._gradient, self._given_state)
        last = self.schedule.last
        if self.criterion.accumulation and (last is None or self.steps <= last):
            self._observe(inputs, *self.criterion.accumulation)
        target = self.schedule.target(self.steps)
        if target is not None:
            if not isinstance(target, Target):
                raise TypeError(
                    f"expected {self.schedule!r} to ask for a Target or None, got {target!r}"
                )
            self._prune(target, inputs)

    def _gradient(self, layer: Layer) -> Tensor | None:
        grad = layer.parameter.grad
        # A fused optimizer unscales inside its step: here the gradient still carries GradScaler's
        # scale, and half precision may hold neither the scale nor the quotient.
        scale: Tensor | None = getattr(self.optimizer, "grad_scale", None)
        if grad is None or scale is None:
            return grad
        return grad.to(layer.score_dtype) / scale.to(grad.device)

    def _given_state(self, layer: Layer) -> tuple[Tensor, float] | None:
        if self.optimizer is None:
            return self.criterion.given_state(layer.name, {}, {})
        group = surgery.group_of(self.optimizer, layer.parameter)
        state = self.optimizer.state.get(layer.parameter, {})
        return self.criterion.given_state(layer.name, state, group or {})

    def _check_parameters(self) -> None:
        lost = [
            layer.name
            for layer in self.layers
            if self.optimizer and surgery.group_of(self.optimizer, layer.parameter) is None
        ]
        if lost:
            raise ValueError(
                "expected the optimizer to hold every parameter that is pruned, got one without "
                f"{lost}: it was given other parameters, or they were replaced (sparsify); make "
                "the pruner after that, or remove() it before"
            )

    def _observe(self, inputs: Inputs, decay: float, gain: float) -> None:
        """Write this step's scores into the running ones; nothing where one is not finite."""
        measurements = [measured(self.criterion, layer, inputs) for layer in self.layers]
        # One NaN would stay in the running score for ever; it reaches every gradient it touches.
        for layer, (weight, grad) in zip(self.layers, measurements, strict=True):
            extremes = (weight if grad is None else grad).aminmax()  # NaN is both
            if not all(extreme.isfinite() for extreme in extremes):
                raise non_finite(layer, self.steps)
        for layer, (weight, grad) in zip(self.layers, measurements, strict=True):
            fresh = layer.state is None
            if layer.state is None:
                layer.state = torch.zeros_like(weight, dtype=layer.score_dtype)
            elif layer.state.dtype != layer.score_dtype:  # the model was cast since
                layer.state = layer.state.to(layer.score_dtype)
            ops.observe_(
                layer.state,
                weight,
                grad,
                formula=self.criterion.formula,
                # The average starts at the first observation.
                decay=0.0 if fresh else decay,
                gain=1.0 if fresh else gain,
                normalizer=normalizer(self.criterion, layer),
            )

    def _prune(self, target: Target, inputs: Inputs) -> None:
        self._check_parameters()
        choice = choose(self.layers, self.criterion, self.granularity, target, self.scope, inputs)
        changed = False
        for layer, units, floor in zip(
            self.layers, choice.unit_bits, choice.floor_held, strict=True
        ):
            same = torch.equal(units, layer.unit_bits)
            changed |= not same
            layer.floor_held = floor or (layer.floor_held and same)
            if target.sparsity is not None:
                layer.target = target.sparsity
            if target.permanent and not same:
                layer.set_units(units)
            elif not target.permanent:
                mask = layer.expand(ops.unpack_mask(units, layer.grid))
                ops.mask_([layer.parameter], [ops.pack_mask(mask)])
        if changed:
            self._mask_weights()
            self._mask_gradients()
        elif target.sparsity != 0:  # a ramp begins at 0, where there is nothing to do
            self.idle_steps += 1

    @torch.no_grad()
    def _mask_weights(self) -> None:
        """Zero the dead in weights and moments.

        After every update, not only where an optimizer is known to move a weight whose gradient is
        zero: it costs a fraction of a percent of a step, and holds for any optimizer, any learning
        rate, and any state that is loaded into model or optimizer meanwhile.
        """
        self._mask(
            (tensor, layer)
            for layer in self.layers
            for tensor in (layer.parameter, *self._moments(layer))
        )

    def _moments(self, layer: Layer) -> list[Tensor]:
        if self.optimizer is None:
            return []
        return surgery.moments(self.optimizer, layer.parameter)

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        self._mask(
            (layer.parameter.grad, layer)
            for layer in self.layers
            if layer.parameter.grad is not None
        )

    def _mask(self, pairs: Iterable[tuple[Tensor, Layer]]) -> None:
        dead = [(t, layer.bits) for t, layer in pairs if layer.alive < t.numel()]
        ops.mask_([t for t, _ in dead], [bits for _, bits in dead])

    def _count_step(self) -> None:
        self.steps += 1
        last = self.schedule.last
        if last is not None and self.steps > last:
            for layer in self.layers:
                layer.state = None  # nothing will ask for it again


class _GradientMask:
    """Zeroes the gradient of dead weights as it arrives; a hook that can be copied and pickled."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @classmethod
    def holds(cls, parameter: Tensor) -> bool:
        """Whether a pruner's hook hangs on the parameter."""
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        return any(isinstance(hook, cls) for hook in hooks.values())

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None and self.layer.alive < parameter.numel():
            ops.mask_([parameter.grad], [self.layer.bits])


def _expect_keys(what: str, got: object, expected: Iterable[str]) -> None:
    keys = set(expected)
    if not isinstance(got, Mapping) or set(got) != keys:
        found = sorted(map(str, got)) if isinstance(got, Mapping) else repr(got)
        raise ValueError(f"expected {what} to hold exactly {sorted(keys)}, got {found}")


def _check_layer(layer: Layer, saved: Mapping[str, Any]) -> Tensor:
    """The mask in a layer's saved state; ValueError where the state does not fit the layer."""
    name = layer.name
    _expect_keys(f"the state of {name!r}", saved, ("bits", "state", "target", "floor_held"))
    bits, running, target = saved["bits"], saved["state"], saved["target"]
    if not isinstance(bits, Tensor):
        raise ValueError(f"expected the bits of {name!r} to be a Tensor, got {bits!r}")
    mask = ops.unpack_mask(bits.to(layer.parameter.device), layer.shape)
    if running is not None and (
        not isinstance(running, Tensor)
        or running.shape != layer.shape
        or running.dtype != layer.score_dtype
    ):
        got = (running.dtype, tuple(running.shape)) if isinstance(running, Tensor) else running
        raise ValueError(
            f"expected a running score of {layer.score_dtype} {tuple(layer.shape)} for {name!r}, "
            f"got {got}"
        )
    if not isinstance(target, float) or not 0 <= target < 1:
        raise ValueError(f"expected the target of {name!r} to be in [0, 1), got {target!r}")
    if not isinstance(saved["floor_held"], bool):
        raise ValueError(
            f"expected floor_held of {name!r} to be a bool, got {saved['floor_held']!r}"
        )
    return mask


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused step under GradScaler, which runs the hooks either way, does nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _check_policy(criterion: Criterion, scope: str) -> None:
    if not isinstance(criterion, Criterion):
        raise TypeError(f"expected a criterion such as Taylor(), got {criterion!r}")
    share_out(scope, 0.0, [])


@torch.no_grad()
def prune_(
    model: nn.Module,
    criterion: Criterion,
    granularity: Granularity,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: str = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Prune a model in place, once, with no optimizer.

    Args:
        model, criterion, granularity, scope, include, exclude: as for :class:`Pruner`; frozen
            parameters are pruned too. Criteria that need gradients take them from ``.grad``;
            one that averages over steps has this one observation. Weights that are zero already
            are scored like any other.
        sparsity: fraction of the units to prune, in [0, 1).
        threshold: prune every unit with a score below it. Exactly one of the two is given.

    Returns:
        bool masks by parameter name, True = alive. Each layer keeps its best unit, whatever the
        target.

    Raises:
        TypeError, ValueError: as for :class:`Pruner`; a missing gradient; NaN or Inf scores.
            Nothing is changed then.

    Equivalent to (Magnitude, Element, scope "layer"):
        ``w.view(-1)[w.abs().view(-1).argsort(stable=True)[:round(sparsity * w.numel())]] = 0``
    """
    target = Target(sparsity=sparsity, threshold=threshold)
    _check_policy(criterion, scope)
    layers, _ = find_layers(model, granularity, include, exclude, frozen=True)
    inputs = Inputs(
        0,
        lambda layer: layer.parameter.grad,
        lambda layer: criterion.given_state(layer.name, {}, {}),
    )
    choice = choose(layers, criterion, granularity, target, scope, inputs)
    for layer, units in zip(layers, choice.unit_bits, strict=True):
        layer.set_units(units)
    ops.mask_([layer.parameter for layer in layers], [layer.bits for layer in layers])
    return {layer.name: layer.mask for layer in layers}
