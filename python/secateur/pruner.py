"""Pruning inside a training loop: the only file that knows model and optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur import ops, surgery
from secateur.criteria import Criterion
from secateur.granularity import Granularity
from secateur.layers import Layer, find_layers
from secateur.schedules import OneShot, Schedule, Target, Threshold
from secateur.scope import share_out
from secateur.selection import Inputs, choose, measured, normalizer

__all__ = ["Pruner", "prune_"]

_LISTED = 4  # names of one kind that the plan shows; Pruner.skipped has them all


class Pruner:
    """Prunes a model while it trains: masks are chosen just before an optimizer step.

    The model's parameters stay the dense parameters they were, zero where dead: no
    parametrization, no renamed keys. Gradients of dead weights are zeroed as they arrive, so
    clipping sees the pruned network; weights and optimizer moments are zeroed when the masks
    change, so that a dead weight stays exactly zero under any optimizer.

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
        step: the optimizer step that comes next; 0 is the first after the pruner was made.
        idle_steps: due steps that had nothing left to prune.

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
        self.criterion = criterion
        self.granularity = granularity
        self.schedule = schedule
        self.scope = scope
        self.step = 0
        self.idle_steps = 0
        self._masks_changed = False
        self._moves_dead = False  # whether the optimizer moves a weight whose gradient is zero
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
        life is zeroed on exit. A step of the optimizer inside is part of it.
        """
        self._before_update()
        self._in_update = True
        try:
            yield
        finally:
            self._in_update = False
        self._after_update()
        self._mask_everything(self.layers)

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
            "version": 1,
            "settings": self._settings(),
            "step": self.step,
            "idle_steps": self.idle_steps,
            "masks": {layer.name: layer.bits.clone() for layer in self.layers},
            "states": {
                layer.name: layer.state.clone() for layer in self.layers if layer.state is not None
            },
            "targets": {layer.name: layer.target for layer in self.layers},
            "floors": [layer.name for layer in self.layers if layer.floor_held],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; weights and moments of the dead become zero.

        Raises:
            ValueError: the state is of other settings, names or shapes. Nothing is changed then.
        """
        missing = {"version", "settings", "step", "masks", "states"} - set(state)
        if missing:
            raise ValueError(f"expected the state of a Pruner, got one without {sorted(missing)}")
        if state["version"] != 1:
            raise ValueError(f"expected a state of version 1, got {state['version']!r}")
        for key, ours in self._settings().items():
            if state["settings"].get(key) != ours:
                raise ValueError(
                    f"expected a state saved with {key}={ours}, got {state['settings'].get(key)}"
                )
        names = {layer.name for layer in self.layers}
        if set(state["masks"]) != names:
            raise ValueError(
                f"expected masks of exactly {sorted(names)}, got {sorted(state['masks'])}"
            )
        masks = {}
        for layer in self.layers:
            device = layer.parameter.device
            masks[layer.name] = ops.unpack_mask(state["masks"][layer.name].to(device), layer.shape)
            running = state["states"].get(layer.name)
            if running is not None and running.shape != layer.shape:
                raise ValueError(
                    f"expected a running score of shape {tuple(layer.shape)} for {layer.name!r}, "
                    f"got {tuple(running.shape)}"
                )
        for layer in self.layers:
            layer.set_mask(masks[layer.name])
            running = state["states"].get(layer.name)
            layer.state = None if running is None else running.to(layer.parameter.device).clone()
            layer.target = state["targets"][layer.name]
            layer.floor_held = layer.name in state["floors"]
        self.step = state["step"]
        self.idle_steps = state["idle_steps"]
        self._mask_everything(self.layers)

    def __repr__(self) -> str:
        """The plan, and how far it has got."""
        rows = [("parameter", "shape", "units", "target", "sparsity", "")]
        final = getattr(self.schedule, "sparsity", None)
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.units:,} of {layer.block[0]}x{layer.block[1]}",
                    "-" if final is None else f"{final:.4f}",
                    f"{layer.sparsity:.4f}",
                    "kept its best unit" if layer.floor_held else "",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        settings = ", ".join(self._settings().values())
        head = (
            f"Pruner({settings}): step {self.step}, {self._numel():,} weights in "
            f"{sum(layer.units for layer in self.layers):,} units, sparsity {self.sparsity():.4f}"
        )
        if self.idle_steps:
            head += f", {self.idle_steps} due steps had nothing to do"
        lines = [head, *table]
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
            self._after_update()

    @torch.no_grad()
    def _before_update(self) -> None:
        self._mask_gradients(self.layers)
        inputs = Inputs(self.step, self._gradient, self._given_state)
        last = self.schedule.last
        if self.criterion.accumulation and (last is None or self.step <= last):
            for layer in self.layers:
                self._observe(layer, inputs, *self.criterion.accumulation)
        target = self.schedule.target(self.step)
        if target is not None:
            self._prune(target, inputs)

    def _gradient(self, layer: Layer) -> Tensor | None:
        grad = layer.parameter.grad
        # A fused optimizer unscales inside its step: here the gradient still carries GradScaler's.
        scale = getattr(self.optimizer, "grad_scale", None)
        return grad if grad is None or scale is None else grad / scale.to(grad.device, grad.dtype)

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

    def _observe(self, layer: Layer, inputs: Inputs, decay: float, gain: float) -> None:
        """Write this step's score into the running one."""
        weight, grad = measured(self.criterion, layer, inputs)
        if layer.state is None:
            layer.state = torch.zeros_like(weight, dtype=layer.score_dtype)
            decay, gain = 0.0, 1.0  # the average starts at the first observation
        ops.observe_(
            layer.state,
            weight,
            grad,
            formula=self.criterion.formula,
            decay=decay,
            gain=gain,
            normalizer=normalizer(self.criterion, layer),
        )

    def _prune(self, target: Target, inputs: Inputs) -> None:
        self._check_parameters()
        choice = choose(self.layers, self.criterion, self.granularity, target, self.scope, inputs)
        if not target.permanent:
            for layer, units in zip(self.layers, choice.unit_bits, strict=True):
                mask = layer.expand(ops.unpack_mask(units, layer.grid))
                ops.mask_([layer.parameter], [ops.pack_mask(mask)])
            return
        changed = []
        for layer, units, floor in zip(
            self.layers, choice.unit_bits, choice.floor_held, strict=True
        ):
            layer.floor_held = floor or (layer.floor_held and torch.equal(units, layer.unit_bits))
            if target.sparsity is not None:
                layer.target = target.sparsity
            if not torch.equal(units, layer.unit_bits):
                layer.set_units(units)
                changed.append(layer)
        if changed:
            self._mask_everything(changed)
            self._masks_changed = True
        else:
            self.idle_steps += 1

    @torch.no_grad()
    def _after_update(self) -> None:
        # With zero weight, gradient and moments most optimizers leave a weight at zero. Which do
        # not shows in the first update after the masks change; those are masked after each update.
        if self._masks_changed and not self._moves_dead:
            self._moves_dead = any(self._revived(layer) for layer in self.layers)
        self._masks_changed = False
        if self._moves_dead:
            self._mask_everything(self.layers)
        self.step += 1

    def _revived(self, layer: Layer) -> bool:
        dead = ~layer.mask
        return any(bool((t.ne(0) & dead).any()) for t in self._weight_and_moments(layer))

    def _weight_and_moments(self, layer: Layer) -> list[Tensor]:
        weight = layer.parameter
        kept = [] if self.optimizer is None else surgery.moments(self.optimizer, weight)
        return [weight, *kept]

    def _mask_everything(self, layers: list[Layer]) -> None:
        self._mask((t, layer) for layer in layers for t in self._weight_and_moments(layer))
        self._mask_gradients(layers)

    def _mask_gradients(self, layers: list[Layer]) -> None:
        self._mask(
            (layer.parameter.grad, layer) for layer in layers if layer.parameter.grad is not None
        )

    def _mask(self, pairs: Iterator[tuple[Tensor, Layer]]) -> None:
        dead = [(t, layer.bits) for t, layer in pairs if layer.alive < t.numel()]
        ops.mask_([t for t, _ in dead], [bits for _, bits in dead])


class _GradientMask:
    """Zeroes the gradient of dead weights as it arrives; a hook that can be copied and pickled."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None and self.layer.alive < parameter.numel():
            ops.mask_([parameter.grad], [self.layer.bits])


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
            parameters are pruned too. Criteria that need gradients take them from ``.grad``.
        sparsity: fraction of the units to prune, in [0, 1).
        threshold: prune every unit with a score below it. Exactly one of the two is given.

    Returns:
        bool masks by parameter name, True = alive.

    Raises:
        TypeError, ValueError: as for :class:`Pruner`; a missing gradient; NaN or Inf scores.
            Nothing is changed then.

    Equivalent to (Magnitude, Element, scope "layer"):
        ``w.view(-1)[w.abs().view(-1).argsort(stable=True)[:round(sparsity * w.numel())]] = 0``
    """
    if (sparsity is None) == (threshold is None):
        raise ValueError(
            f"expected one of sparsity and threshold, got sparsity={sparsity}, "
            f"threshold={threshold}"
        )
    _check_policy(criterion, scope)
    if threshold is not None:
        target = Target(threshold=Threshold(threshold).epsilon)
    else:
        target = Target(sparsity=OneShot(sparsity or 0.0).sparsity)
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
