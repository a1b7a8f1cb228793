"""Pruning inside a training loop: the only file that knows model and optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur import ops, state, surgery
from secateur.criteria import Criterion
from secateur.granularity import Granularity
from secateur.layers import Layer, count, find_layers, named_tensors, wrappers
from secateur.masks import read_masks
from secateur.ops.mask import mask_fresh_, mask_unchecked_
from secateur.plan import plan
from secateur.ranks import Ranks
from secateur.schedules import Schedule, Target
from secateur.scope import share_out
from secateur.selection import Inputs, choose, measured, non_finite, normalizer, unit_scores
from secateur.shards import ALONE, is_sharded, part

__all__ = ["Pruner", "prune_"]

_VERSION = 1  # of state_dict()
_OPTIMIZER_FILE = Optimizer.step.__code__.co_filename
_LISTED = 6  # names that an error shows
_CHECK_STEPS, _CHECK_UPDATES = 100, 10  # how often check() runs by itself


class Pruner:
    """Prunes a model while it trains: masks are chosen just before an optimizer step.

    The model's parameters stay the dense parameters they were, zero where dead: no
    parametrization, no renamed keys. Gradients of dead weights are zeroed as they arrive, so
    clipping sees the pruned network; weights and optimizer moments are zeroed after every update,
    so that a dead weight stays exactly zero under any optimizer.

    Args:
        model: the module; wrappers (DataParallel, DistributedDataParallel, torch.compile) are seen
            through; it may be sharded by ``fully_shard``.
        optimizer: holds the model's parameters; its ``step`` drives the schedule. Several, in the
            order in which they step, take turns: scores are taken before the step of the one that
            trains the weight, and masks are chosen when the last has its turn. None with
            :meth:`update`, for hand-rolled updates.
        criterion: what a weight is worth (``secateur.criteria``).
        granularity: what lives or dies together (``secateur.granularity``).
        schedule: when, and how far (``secateur.schedules``).
        scope: ``"global"``: all layers compete for the target; ``"layer"``: each layer meets it.
        include: name globs of the parameters to prune, whatever they are, or of modules, which
            stand for all weights inside. None: every weight of the model. A weight is a parameter
            of two dimensions or more that belongs to no norm and no embedding.
        exclude: name globs of the parameters or modules to leave out.
        masters: by parameter name, the copies of higher precision that the optimizer trains in the
            place of the parameters. They, their gradients and moments are scored and masked.
        process_group: the processes that train copies of this model; their masks are compared at
            every update. ``"auto"``: those of DistributedDataParallel or of the mesh, else the
            default group where there is one. None: this process prunes on its own.

    Attributes:
        layers: what is pruned, one :class:`Layer` a parameter.
        skipped: names of the parameters that are left out, and why.
        steps: optimizer steps taken since the pruner was made (of several optimizers: how often all
            of them have stepped): the schedule's clock.
        idle_steps: due steps that had nothing to prune.

    Raises:
        TypeError, ValueError: an argument is not what it should be, a glob matches nothing, the
            model has nothing to prune, an included parameter is frozen, no optimizer holds a
            parameter to prune, or another process was given something else.

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
        optimizer: Optimizer | Sequence[Optimizer] | None,
        *,
        criterion: Criterion,
        granularity: Granularity,
        schedule: Schedule,
        scope: str = "global",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        masters: Mapping[str, Tensor] | None = None,
        process_group: dist.ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        _check_policy(criterion, scope)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"expected a schedule such as Cubic(0.9, ...), got {schedule!r}")
        self.optimizers = _optimizers(optimizer)
        self.layers, self.skipped = find_layers(
            model, granularity, include, exclude, copies=_copies(model, process_group)
        )
        self.split = self.layers[0].split
        # Groups that come to be later are a mistake to be found.
        self._expects_group = process_group == "auto" and self.split == ALONE
        _set_masters(self.layers, masters or {})
        *_, self.model = wrappers(model)
        for layer in self.layers:
            if _GradientHook.hangs_on(layer.parameter):
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
        self._mask_updates = 0
        self._in_update = False
        self._turns: list[_Turn] = []
        self._scored: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._assign_turns()
        self._agree()
        self._attach()

    def _attach(self) -> None:
        # torch.compile of a step breaks the graph around the hooks rather than look inside.
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
        try:
            for optimizer in self.optimizers:
                self._handles.append(optimizer.register_step_pre_hook(before))
                self._handles.append(optimizer.register_step_post_hook(after))
        except AttributeError as error:
            self.remove()
            raise TypeError(
                "expected optimizers made by torch.optim.Optimizer.__init__, got a "
                f"{type(optimizer).__name__}: pass the optimizer that it wraps"
            ) from error
        for layer in self.layers:
            hook = _GradientHook(layer)
            self._handles.append(layer.parameter.register_post_accumulate_grad_hook(hook))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": bool(self._handles)}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """A copy drives the copies of model and optimizer that it was copied with."""
        attached = saved.pop("_handles")
        self.__dict__.update(saved, _handles=[])
        if attached:
            self._attach()

    @property
    def masks(self) -> dict[str, Tensor]:
        """bool masks by parameter name, True = alive; copies. DTensors where the parameter is."""
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
        self._before_update(self.layers, last=True)
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

    @torch.no_grad()
    def mask_(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Zero the dead weights in another model of the same parameters, such as an average.

        Args:
            model: a module (``AveragedModel`` and other wrappers are seen through), or tensors by
                parameter name. Changed in place.

        Raises:
            TypeError: ``model`` is neither.
            ValueError: it lacks a pruned parameter, or has one of another shape. Nothing is changed
                then.

        Equivalent to:
            ``for name, mask in pruner.masks.items(): model.get_parameter(name).data *= mask``
        """
        if not isinstance(model, (nn.Module, Mapping)):
            raise TypeError(
                "expected a torch.nn.Module or a mapping of names to tensors, got "
                f"{type(model).__name__}"
            )
        tensors = named_tensors(model) if isinstance(model, nn.Module) else model
        for layer in self.layers:
            found = tensors.get(layer.name)
            if not isinstance(found, Tensor) or part(found).shape != layer.own.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                if got == tuple(layer.shape):
                    got = "one that is sharded otherwise"
                raise ValueError(
                    f"expected {layer.name!r} of shape {tuple(layer.shape)}, got {got} in a model "
                    f"of {', '.join(sorted(tensors)[:_LISTED])}, ...: if it wraps the model, pass "
                    "what it wraps"
                )
        self._mask((layer, tensors[layer.name]) for layer in self.layers)

    @torch.no_grad()
    def load_masks_from(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Take over the masks of another model; the dead become zero here.

        They are looked for under each parameter's name: first a mask of ``torch.nn.utils.prune``
        (``weight_mask``), then one of ``torch.ao.pruning`` (``parametrizations.weight.0.mask``),
        then the parameter itself: what is zero in it is dead.

        Args:
            source: a module, or tensors by name such as a state dict or :attr:`masks`.

        Raises:
            TypeError: ``source`` is neither.
            ValueError: nothing is found for a parameter, or of another shape; nothing is pruned;
                all of a layer is; or a mask cuts through units. Nothing is changed then.
        """
        unit_bits = self.split.copies.attempt(
            "read the masks", lambda: read_masks(source, self.layers)
        )
        self._expect_same_masks(unit_bits)
        for layer, units in zip(self.layers, unit_bits, strict=True):
            layer.take_units(units)
            layer.floor_held = False
        count(self.layers)
        self._mask_weights()
        self._mask_gradients()

    @torch.no_grad()
    def check(self) -> None:
        """Raise unless all that a pruner relies on holds.

        Runs by itself every 100 steps and at every 10th mask update.

        Raises:
            ValueError: a pruned parameter was replaced in the model or is in no optimizer any more,
                its gradient is no longer masked, a dead weight or its moment is not zero (the
                message says which tensor), or another process has other masks.
        """
        self._expect_parameters()
        for layer in self.layers:
            if self._handles and not _GradientHook.hangs_on(layer.parameter):
                raise ValueError(
                    f"expected the pruner's gradient hook on {layer.name!r}, got none: something "
                    "cleared the hooks of the parameter"
                )
        tensors = list(self._masked_tensors(self.layers))
        revived = self._mask((layer, t) for layer, _, t in tensors).tolist()
        everywhere = self.split.total(revived, self.layers[0].own.device, copies=True)
        for (layer, what, _), alive in zip(tensors, everywhere, strict=True):
            if alive:
                raise ValueError(
                    f"expected the dead weights of {layer.name!r} to be zero in {what}, got others "
                    "(they are zeroed now): something other than a step of the optimizer wrote to "
                    "it, such as a state dict that was loaded; call mask_(model) after that"
                )
        self._expect_same_masks([layer.unit_bits for layer in self.layers])

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit, besides model and optimizer.

        Masks (one bit a weight), running scores, the position in the schedule, the settings, and
        the state of torch's random generators. Tensors and plain values only, so that
        ``torch.load(weights_only=True)`` reads it. Where the model is sharded every process has to
        call it; masks are then of the whole, running scores sharded.
        """
        return {
            "version": _VERSION,
            "settings": self._settings(),
            "steps": self.steps,
            "idle_steps": self.idle_steps,
            "mask_updates": self._mask_updates,
            "turns": [turn.over for turn in self._turns],
            "layers": {
                layer.name: state.save_layer(layer, self._scored.get(layer.name))
                for layer in self.layers
            },
            "rng": state.save_rng(self.split, self.layers[0].own.device),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; weights and moments of the dead become zero.

        Sets torch's random generators, too: a process that saved gets its own state back, another
        one a state that follows from it.

        Args:
            saved: of a pruner of the same criterion, granularity, schedule and scope.

        Raises:
            ValueError: the state is of other settings, names or shapes, or is no state. Nothing is
                changed then.
        """
        units = self._check_state(saved)
        self._begin_round()
        for layer, bits in zip(self.layers, units, strict=True):
            scored = state.load_layer(layer, saved["layers"][layer.name], bits)
            if scored is not None:
                self._scored[layer.name] = scored
        for turn, over in zip(self._turns, saved["turns"], strict=True):
            turn.over = over
        count(self.layers)
        self.steps, self.idle_steps = saved["steps"], saved["idle_steps"]
        self._mask_updates = saved["mask_updates"]
        self._mask_weights()
        self._mask_gradients()
        state.load_rng(saved["rng"], self.layers[0].own.device)

    def _check_state(self, saved: Mapping[str, Any]) -> list[Tensor]:
        """The packed masks of units in a saved state; ValueError where it does not fit."""
        numbers = ("steps", "idle_steps", "mask_updates")
        keys = {"version", "settings", *numbers, "turns", "layers", "rng"}
        state.expect_keys("the state of a Pruner", saved, keys)
        if saved["version"] != _VERSION:
            raise ValueError(f"expected a state of version {_VERSION}, got {saved['version']!r}")
        state.expect_keys("settings", saved["settings"], self._settings())
        for key, setting in self._settings().items():
            if saved["settings"][key] != setting:
                raise ValueError(
                    f"expected a state saved with {key}={setting}, got {saved['settings'][key]}"
                )
        for key in numbers:
            if type(saved[key]) is not int or saved[key] < 0:
                raise ValueError(f"expected {key} to be a whole number, got {saved[key]!r}")
        turns = saved["turns"]
        if not isinstance(turns, list) or [type(over) for over in turns] != [bool] * len(
            self._turns
        ):
            raise ValueError(
                f"expected one bool for each of {len(self._turns)} optimizers that train what is "
                f"pruned, got {turns!r}"
            )
        state.expect_keys("layers", saved["layers"], {layer.name for layer in self.layers})
        state.check_rng(saved["rng"])
        return [state.check_layer(layer, saved["layers"][layer.name]) for layer in self.layers]

    def __repr__(self) -> str:
        """The plan, and how far it has got."""
        last = self.schedule.last
        lines = [
            f"Pruner after {self.steps} steps: {self.sparsity():.4f} of {self._numel():,} weights "
            "are dead"
            + (f"; {self.idle_steps} due steps had nothing to do" if self.idle_steps else "")
            + (
                "; the schedule has ended and nothing is pruned"
                if last is not None and self.steps > last and self.sparsity() == 0
                else ""
            )
        ]
        lines += [f"  {key:<12} {value}" for key, value in self._settings().items()]
        planned = plan(self.layers, self.skipped, self.schedule, self.scope)
        return "\n".join([*lines, *(f"  {line}" for line in planned)])

    def _settings(self) -> dict[str, str]:
        return {
            "criterion": _described(self.criterion),
            "granularity": _described(self.granularity),
            "schedule": _described(self.schedule),
            "scope": repr(self.scope),
        }

    def _numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def _agree(self) -> None:
        """Take over rank 0's seed; ValueError on every process if one was given something else."""
        parameters = [(layer.name, tuple(layer.shape)) for layer in self.layers]
        for ranks in (self.split.shards, self.split.copies):
            seed = getattr(self.criterion, "seed", None)
            (first,) = ranks.share([seed or 0])
            if seed is not None:
                self.criterion = dataclasses.replace(self.criterion, seed=first)  # type: ignore[call-arg]
            ranks.agree("settings", f"{self._settings()} for {parameters}")

    def _assign_turns(self) -> None:
        """Find which optimizer trains each layer; ValueError where none does."""
        optimizers: Sequence[Optimizer | None] = self.optimizers or (None,)
        owners: dict[int, list[Layer]] = {}
        lost: list[str] = []
        for layer in self.layers:
            for i, optimizer in enumerate(optimizers):
                if optimizer is None or surgery.group_of(optimizer, layer.trained) is not None:
                    owners.setdefault(i, []).append(layer)
                    break
            else:
                lost.append(layer.name)
        if lost:
            raise ValueError(
                "expected the optimizer to hold every parameter that is pruned, got one without "
                f"{lost}: it was given other parameters, or they were replaced (sparsify); make "
                "the pruner after that, or remove() it before"
            )
        turns = [_Turn(optimizers[i], owners[i]) for i in sorted(owners)]
        if [turn.layers for turn in turns] != [turn.layers for turn in self._turns]:
            self._turns = turns

    def _expect_parameters(self) -> None:
        """ValueError unless the model and the optimizers still hold what is pruned."""
        initialized = dist.is_available() and dist.is_initialized()
        if self._expects_group and initialized and dist.get_world_size() > 1:
            raise ValueError(
                "expected the pruner to be made after init_process_group, got one that does not "
                "know of the other processes; process_group=None prunes on its own"
            )
        self._assign_turns()
        tensors = named_tensors(self.model)
        for layer in self.layers:
            found = tensors.get(layer.name)
            # fully_shard puts whole parameters in the place of shards while it computes.
            unsharded = is_sharded(layer.parameter) and not is_sharded(found)
            if found is not layer.parameter and not unsharded:
                raise ValueError(
                    f"expected the model to hold the parameter {layer.name!r} that is pruned, got "
                    "another one in its place: it was replaced after the pruner was made (by "
                    "load_state_dict(assign=True), fully_shard, a new layer)"
                )

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        turn = self._turn_of(optimizer)
        if turn is None:
            return None
        turn.moments_untouched = turn.moments_left == turn.moment_versions()
        place = self._turns.index(turn)
        if any(later.over for later in self._turns[place:]):  # one left out its turn: start again
            self._begin_round()
        last = all(other.over for other in self._turns if other is not turn)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update(turn.layers, last)
            return None

        # The closure makes the gradients, so the masks are chosen right after it has first run.
        scored = False

        def scored_closure() -> Any:
            nonlocal scored
            loss = closure()
            if not scored:
                scored = True
                self._before_update(turn.layers, last)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": scored_closure}
        return (args[0], scored_closure, *args[2:]), kwargs

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        turn = self._turn_of(optimizer)
        if turn is None:
            return
        self._mask_updated(turn)
        turn.over = True
        if all(turn.over for turn in self._turns):
            self._count_step()

    def _turn_of(self, optimizer: Optimizer) -> _Turn | None:
        """Its turn; None where it trains nothing that is pruned, or this is no step of its own."""
        if self._in_update or _is_skipped(optimizer) or _is_inner(optimizer):
            return None
        return next((turn for turn in self._turns if turn.optimizer is optimizer), None)

    @torch.no_grad()
    def _before_update(self, mine: Sequence[Layer], last: bool) -> None:
        """Score what is about to be updated, and choose masks if it is the last of a round."""
        target = self.schedule.target(self.steps)
        if target is not None and not isinstance(target, Target):
            raise TypeError(
                f"expected {self.schedule!r} to ask for a Target or None, got {target!r}"
            )
        if last and (
            self.steps % _CHECK_STEPS == _CHECK_STEPS - 1
            or (target is not None and self._mask_updates % _CHECK_UPDATES == 0)
        ):
            self.check()
        elif last and target is not None:
            self._expect_parameters()
        accumulation = self.criterion.accumulation if self._expects_more() else None
        if target is None and accumulation is None:
            return
        for layer in self.layers:
            layer.follow()
        inputs = Inputs(self.steps, self._gradient, self._given_state, self._scored)
        if accumulation is not None:
            self._observe(mine, inputs, *accumulation)
        if target is None:
            return
        self._expect_signal(mine)
        if last:
            self._prune(target, inputs)
            return
        scored = {i: layer for i, layer in enumerate(self.layers) if layer in mine}
        scores = unit_scores(scored, self.criterion, self.granularity, inputs)
        self._scored.update((self.layers[i].name, x) for i, x in scores.items())

    def _expects_more(self) -> bool:
        """Whether the schedule has a due step yet to come, or may have."""
        return self.schedule.last is None or self.steps <= self.schedule.last

    def _gradient(self, layer: Layer) -> Tensor | None:
        grad = layer.trained.grad
        if grad is None:
            self._expect_parameters()  # one that was replaced has none: that error tells more
        # A fused optimizer unscales inside its step: here the gradient still carries GradScaler's
        # scale, and half precision may hold neither the scale nor the quotient.
        scale: Tensor | None = getattr(self._optimizer_of(layer), "grad_scale", None)
        if grad is None or scale is None:
            return None if grad is None else _dense(layer, grad)
        return grad.to(layer.score_dtype) / float(scale)

    def _given_state(self, layer: Layer) -> tuple[Tensor, float] | None:
        optimizer = self._optimizer_of(layer)
        if optimizer is None:
            return self.criterion.given_state(layer.name, {}, {})
        group = surgery.group_of(optimizer, layer.trained)
        moments = optimizer.state.get(layer.trained, {})
        return self.criterion.given_state(layer.name, moments, group or {})

    def _optimizer_of(self, layer: Layer) -> Optimizer | None:
        return next((turn.optimizer for turn in self._turns if layer in turn.layers), None)

    def _expect_signal(self, mine: Sequence[Layer]) -> None:
        """ValueError where gradients decide and every one of them is zero: ties decided then."""
        if not self.criterion.needs_gradient:
            return
        averages = self.criterion.accumulation is not None
        signals = (layer.state if averages else layer.trained.grad for layer in mine)
        here = any(signal is None or bool(part(signal).any()) for signal in signals)
        if not self.split.total([int(here)], mine[0].own.device)[0]:
            raise ValueError(
                f"expected gradients to score by at step {self.steps}, got only zeros: step after "
                "backward() and before zero_grad()"
            )

    def _observe(self, mine: Sequence[Layer], inputs: Inputs, decay: float, gain: float) -> None:
        """Write this step's scores into the running ones; nothing where one is not finite."""
        measurements = [measured(self.criterion, layer, inputs) for layer in mine]
        # One NaN would stay in the running score for ever; it reaches every gradient it touches.
        bad = [
            int(observed.numel() > 0 and not all(isfinite(x.item()) for x in observed.aminmax()))
            for observed in (weight if grad is None else grad for weight, grad in measurements)
        ]
        for layer, somewhere in zip(mine, self.split.total(bad, mine[0].own.device), strict=True):
            if somewhere:
                raise non_finite(layer, self.steps)
        for layer, (weight, grad) in zip(mine, measurements, strict=True):
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
        choice = self.split.copies.attempt(
            "choose its masks",
            lambda: choose(
                self.layers, self.criterion, self.granularity, target, self.scope, inputs
            ),
        )
        self._expect_same_masks(choice.unit_bits)
        own = [
            int(not torch.equal(bits, layer.unit_bits))
            for layer, bits in zip(self.layers, choice.unit_bits, strict=True)
        ]
        changed = self.split.total(own, self.layers[0].own.device)
        for layer, bits, floor, other in zip(
            self.layers, choice.unit_bits, choice.floor_held, changed, strict=True
        ):
            layer.floor_held = floor or (layer.floor_held and not other)
            if target.sparsity is not None:
                layer.target = target.sparsity
            if target.permanent and other:
                layer.take_units(bits)
            elif not target.permanent:
                once = ops.pack_mask(layer.expanded(bits))
                both = {layer.parameter, layer.trained}
                ops.mask_([part(t) for t in both], [once] * len(both))
        self._mask_updates += 1
        if any(changed):
            count(self.layers)
            self._mask_weights()
            self._mask_gradients()
        elif target.sparsity != 0:  # a ramp begins at 0, where there is nothing to do
            self.idle_steps += 1

    def _expect_same_masks(self, unit_bits: Sequence[Tensor]) -> None:
        """ValueError, on all of them, unless every process that has a copy chose these masks."""
        copies = self.split.copies
        if copies.size == 1:
            return
        clock = torch.tensor([self.steps], device=unit_bits[0].device)
        clocks = torch.cat(copies.gather(clock)).tolist()
        if len(set(clocks)) > 1:
            raise ValueError(
                f"expected every process to be at the same step, got steps {clocks} by rank: some "
                "skipped an optimizer step that others took"
            )
        prints = torch.stack([state.fingerprint(bits) for bits in unit_bits])
        everyone = torch.stack(copies.gather(prints))
        differs = everyone != everyone[0]
        if differs.any():
            ranks = differs.any(1).nonzero().flatten().tolist()
            layer = self.layers[int(differs.any(0).nonzero()[0])]
            raise ValueError(
                f"expected every process to choose the same masks at step {self.steps}, got others "
                f"on ranks {ranks} for {layer.name!r}: their weights or gradients differ (a "
                "gradient that was not synchronised, or a model of its own: process_group=None)"
            )

    def _masked_tensors(self, layers: Iterable[Layer]) -> Iterator[tuple[Layer, str, Tensor]]:
        """All that is zero where a weight is dead, with the words for it."""
        for layer in layers:
            yield layer, "the model", layer.parameter
            if layer.master is not None:
                yield layer, "its master copy", layer.master
            for optimizer in self.optimizers:
                for key, moment in surgery.moments(optimizer, layer.trained):
                    yield layer, f"{key!r} of {type(optimizer).__name__}", moment

    @torch.no_grad()
    def _mask_weights(self) -> None:
        """Zero the dead in weights and moments."""
        self._mask((layer, t) for layer, _, t in self._masked_tensors(self.layers))

    @torch.no_grad()
    def _mask_updated(self, turn: _Turn) -> None:
        """Zero the dead in what an optimizer has just updated.

        In the weights after every update: that holds for any optimizer, any learning rate, and
        whatever is loaded into the model meanwhile. Moments are spared, which halves the cost,
        where the optimizer left them zero: it keeps zeros, nobody else wrote to them, and no weight
        moved, as one would whose gradient was tampered with after it arrived.
        """
        dead = [layer for layer in turn.layers if layer.alive < layer.numel]
        for layer in dead:
            layer.follow()
        copied = [layer for layer in dead if layer.master is not None]
        # Layer has checked that these can be masked.
        revived = mask_unchecked_(
            [layer.own for layer in dead] + [part(layer.parameter) for layer in copied],
            [layer.bits for layer in dead + copied],
        )
        optimizer = turn.optimizer
        if optimizer is None:
            return
        spared = (
            turn.moments_untouched
            and surgery.keeps_zeros(optimizer, [layer.trained for layer in dead])
            and not revived.any()
        )
        if not spared:
            self._mask(
                (layer, moment)
                for layer in dead
                for _, moment in surgery.moments(optimizer, layer.trained)
            )
        turn.moments_left = turn.moment_versions()

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        self._mask(
            (layer, _dense(layer, tensor.grad))
            for layer in self.layers
            for tensor in {layer.parameter, layer.trained}
            if tensor.grad is not None
        )

    def _mask(self, pairs: Iterable[tuple[Layer, Tensor]]) -> Tensor:
        """Zero the dead in each tensor; whether one was not zero, tensor by tensor."""
        listed = [(layer, part(t)) for layer, t in pairs]
        return ops.mask_([t for _, t in listed], [layer.bits for layer, _ in listed])

    def _count_step(self) -> None:
        self.steps += 1
        self._begin_round()
        if not self._expects_more():
            for layer in self.layers:
                layer.state = None

    def _begin_round(self) -> None:
        self._scored = {}
        for turn in self._turns:
            turn.over = False


@dataclasses.dataclass(eq=False)
class _Turn:
    """An optimizer and the layers that it trains.

    Attributes:
        optimizer: None: updates by hand.
        over: whether it has stepped in this round.
        moments_left: the versions of the moments after its last step.
        moments_untouched: whether nobody else had written to them when its step began.
    """

    optimizer: Optimizer | None
    layers: list[Layer]
    over: bool = False
    moments_left: list[tuple[int, int]] | None = None
    moments_untouched: bool = False

    def moment_versions(self) -> list[tuple[int, int]]:
        """Which tensors the optimizer keeps, and how often each was written to."""
        if self.optimizer is None:
            return []
        return surgery.versions(self.optimizer, [layer.trained for layer in self.layers])


class _GradientHook:
    """Zeroes the gradient of dead weights as it arrives: whatever comes after sees zeros."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    @classmethod
    def hangs_on(cls, parameter: Tensor) -> bool:
        """Whether a pruner's hook hangs on the parameter."""
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        return any(isinstance(hook, cls) for hook in hooks.values())

    def __call__(self, parameter: Tensor) -> None:
        layer, grad = self._layer, parameter.grad
        if grad is None or layer.alive == layer.numel:
            return
        # autograd has made it: it is of the shape and dtype of the parameter.
        if not mask_fresh_(grad, layer.bits):
            layer.follow()
            mask_unchecked_([part(_dense(layer, grad))], [layer.bits])


def _dense(layer: Layer, grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise ValueError(
            f"expected a dense gradient of {layer.name!r}, got one of {grad.layout}: exclude it, "
            "or make it with sparse=False"
        )
    return grad


def _described(policy: Criterion | Granularity | Schedule) -> str:
    # A subclass that is no dataclass itself inherits a repr that does not know its attributes.
    own = "__dataclass_params__" in vars(type(policy)) or "__repr__" in vars(type(policy))
    return repr(policy) if own else f"{type(policy).__name__}({vars(policy)})"


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if given is None:
        return ()
    optimizers = (given,) if isinstance(given, Optimizer) else given
    if (
        not isinstance(optimizers, Sequence)
        or not optimizers
        or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers)
    ):
        raise TypeError(
            "expected optimizer to be a torch.optim.Optimizer, a list of them or None, got "
            f"{given!r}"
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise TypeError(
            "expected an optimizer that evaluates the gradient once a step, got LBFGS, whose "
            "curvature history spans every weight: its steps would move the dead ones"
        )
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ValueError("expected every optimizer once, got one of them twice")
    return tuple(optimizers)


def _copies(
    model: nn.Module, process_group: dist.ProcessGroup | Literal["auto"] | None
) -> Ranks | None:
    """The processes that train copies; None where only the parameters can tell."""
    if process_group == "auto":
        found = [w for w in wrappers(model) if isinstance(w, nn.parallel.DistributedDataParallel)]
        return Ranks(found[0].process_group) if found else None
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f'expected process_group to be a ProcessGroup, "auto" or None, got {process_group!r}'
        )
    return Ranks(process_group)


def _set_masters(layers: Sequence[Layer], masters: Mapping[str, Tensor]) -> None:
    if not isinstance(masters, Mapping):
        raise TypeError(
            "expected masters to be a mapping of parameter names to tensors, got "
            f"{type(masters).__name__}"
        )
    by_name = {layer.name: layer for layer in layers}
    for name, master in masters.items():
        layer = by_name.get(name)
        if layer is None:
            raise ValueError(
                f"expected masters of parameters that are pruned, got one of {name!r}, not in "
                f"{sorted(by_name)}"
            )
        if (
            not isinstance(master, Tensor)
            or master.shape != layer.shape
            or master.device != layer.parameter.device
            or not master.is_floating_point()
        ):
            got = (
                f"{master.dtype} {tuple(master.shape)} on {master.device}"
                if isinstance(master, Tensor)
                else repr(master)
            )
            raise ValueError(
                f"expected the master of {name!r} to be a floating-point tensor of shape "
                f"{tuple(layer.shape)} on {layer.parameter.device}, got {got}"
            )
        layer.master = master


def _check_policy(criterion: Criterion, scope: str) -> None:
    if not isinstance(criterion, Criterion):
        raise TypeError(f"expected a criterion such as Taylor(), got {criterion!r}")
    share_out(scope, 0.0, [])


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused step under GradScaler, which runs the hooks either way, does nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _is_inner(optimizer: Optimizer) -> bool:
    """Whether the step is one that a subclass's step calls: torch runs the hooks of both."""
    steps = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename == _OPTIMIZER_FILE:
            steps += frame.f_locals["args"][0] is optimizer
        frame = frame.f_back
    return steps > 1


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
        layer.take_units(units)
    count(layers)
    ops.mask_([layer.own for layer in layers], [layer.bits for layer in layers])
    return {layer.name: layer.mask for layer in layers}
