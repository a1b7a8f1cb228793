"""Pruning inside a training loop, against plain PyTorch written out."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.pruning
import torch.nn.utils.prune
from torch import Tensor, nn

import secateur
from secateur import Block, Cubic, Element, OneShot, Pruner, Taylor, Threshold


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 48),
        nn.LayerNorm(48),
        nn.ReLU(),
        nn.Linear(48, 40),
        nn.ReLU(),
        nn.Linear(40, 4),
    )


def batches(count: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 20, generator=generator)
        yield x, torch.randn(16, 4, generator=generator)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    for batch in batches(count, seed):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2, weight_decay=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2),
}
GOOD = {"criterion": Taylor(), "granularity": Element(), "schedule": OneShot(0.5)}
GRANULARITIES = [Element(), Block(8), Block(4, 16, reduce="max"), Block(5, 7, reduce="l2")]
CRITERIA = [
    secateur.Magnitude(),
    secateur.Gradient(),
    secateur.Taylor(),
    secateur.Taylor(squared=True, ema=0.5),
    secateur.HessianDiagonal(),
    secateur.OBD(),
    secateur.OBD(hessian="adam"),
    secateur.Entropy(),
    secateur.Movement(),
    secateur.Random(seed=3),
    secateur.Magnitude(keep="smallest"),
]


def check_dead_are_zero(pruner: Pruner, optimizer: torch.optim.Optimizer) -> None:
    for layer in pruner.layers:
        dead = ~layer.mask
        assert torch.all(layer.parameter[dead] == 0), layer.name
        for key, value in optimizer.state.get(layer.trained, {}).items():
            if isinstance(value, Tensor) and value.shape == layer.shape:
                assert torch.all(value[dead] == 0), (layer.name, key)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loop_ends_at_the_exact_target(name: str, granularity: secateur.Granularity) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = Cubic(0.75, begin=2, end=20, every=4)
    pruner = Pruner(
        model, optimizer, criterion=Taylor(), granularity=granularity, schedule=schedule
    )
    train(model, optimizer, 30)
    units = sum(layer.units for layer in pruner.layers)
    assert sum(layer.alive_units for layer in pruner.layers) == units - round(0.75 * units)
    assert not any(layer.floor_held for layer in pruner.layers)
    check_dead_are_zero(pruner, optimizer)
    for layer_name, mask in pruner.masks.items():
        weight = model.get_parameter(layer_name)
        assert mask.shape == weight.shape
        assert mask.dtype == torch.bool
        assert torch.all(weight[mask] != 0)
    alive = sum(int(m.sum()) for m in pruner.masks.values())
    assert pruner.sparsity() == 1 - alive / sum(m.numel() for m in pruner.masks.values())


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=repr)
def test_masks_are_nested_as_sparsity_grows(
    criterion: secateur.Criterion, granularity: secateur.Granularity
) -> None:
    model = make_model()
    optimizer = adamw(model)
    schedule = secateur.Linear(0.8, begin=1, end=21, every=5)
    pruner = Pruner(
        model, optimizer, criterion=criterion, granularity=granularity, schedule=schedule
    )
    before, alive = pruner.masks, []
    for batch in batches(22):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        after = pruner.masks
        for name, mask in after.items():
            assert not torch.any(mask & ~before[name])
        before = after
        alive.append(sum(int(m.sum()) for m in after.values()))
    assert len(set(alive)) == 5
    check_dead_are_zero(pruner, optimizer)


def unit_scores(scores: Tensor, granularity: secateur.Granularity) -> Tensor:
    """Scores of units, written out one by one."""
    rows, cols = granularity.block(*scores.shape)
    reduce = {
        "mean": lambda t: t.mean(),
        "max": lambda t: t.max(),
        "l2": lambda t: t.square().sum().sqrt(),
    }[granularity.reduction]
    return torch.stack(
        [
            torch.stack([reduce(part) for part in strip.split(cols, 1)])
            for strip in scores.split(rows, 0)
        ]
    )


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_one_shot_prunes_the_lowest_scores(granularity: secateur.Granularity, scope: str) -> None:
    model = make_model().double()  # float64: no two scores tie, no rounding decides
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=granularity,
        schedule=OneShot(0.6),
        scope=scope,
    )
    x, y = next(batches(1))
    backward(model, (x.double(), y.double()))
    scores = {
        layer.name: unit_scores((layer.parameter.grad * layer.parameter).abs(), granularity)
        for layer in pruner.layers
    }
    optimizer.step()
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in groups:
        pooled = torch.cat([scores[name].flatten() for name in names]).sort().values
        worst_alive = pooled[round(0.6 * pooled.numel())]
        for name in names:
            layer = next(layer for layer in pruner.layers if layer.name == name)
            assert torch.equal(pruner.masks[name], layer.expand(scores[name] >= worst_alive))


@pytest.mark.parametrize("permanent", [True, False])
def test_threshold_is_gradient_pruning(permanent: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    epsilon = 2e-3
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Element(),
        schedule=Threshold(epsilon, permanent=permanent),
    )
    twin = model.weight.detach().clone()
    dead = torch.zeros_like(twin, dtype=torch.bool)
    some = False
    for x, y in batches(40):
        backward(model, (x[:, :4].double(), y[:, :3].double()))
        residual = x[:, :4].double() @ twin.T + model.bias.detach() - y[:, :3].double()
        grad = 2 * residual.T @ x[:, :4].double() / residual.numel()
        low = (grad * twin).abs() < epsilon
        if permanent:
            dead |= low
            grad = grad.masked_fill(dead, 0)
        some |= bool(low.any())
        twin = twin.masked_fill(low, 0) - 0.1 * grad
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach(), twin)
        assert torch.equal(pruner.masks["weight"], ~dead)
    assert some


def test_each_layer_keeps_its_best_unit() -> None:
    model = make_model()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)  # the weakest layer would lose everything
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=secateur.Magnitude(),
        granularity=Element(),
        schedule=OneShot(0.9),
    )
    best = int(model[3].weight.detach().abs().argmax())
    train(model, optimizer, 1)
    assert [layer.floor_held for layer in pruner.layers] == [False, True, False]
    assert pruner.masks["3.weight"].flatten().nonzero().tolist() == [[best]]
    total = sum(layer.units for layer in pruner.layers)
    assert sum(layer.alive for layer in pruner.layers) == total - round(0.9 * total)
    assert "kept its best unit" in repr(pruner)
    train(model, optimizer, 3)
    assert pruner.layers[1].floor_held


def test_the_floor_is_reported_wherever_it_holds() -> None:
    """Also where a layer's last unit is asked for, and where every layer is held."""
    for scope in ("global", "layer"):
        model = make_model()
        pruner = Pruner(
            model,
            None,
            criterion=secateur.Magnitude(),
            granularity=Block(64),  # one block a layer
            schedule=OneShot(0.9),
            scope=scope,
        )
        with pruner.update():
            pass
        assert [layer.floor_held for layer in pruner.layers] == [True] * 3
        assert pruner.sparsity() == 0
        assert pruner.idle_steps == 1
    model = nn.Linear(4, 4)
    pruner = Pruner(
        model,
        None,
        criterion=secateur.Magnitude(),
        granularity=Element(),
        schedule=Threshold(1e9, permanent=False),
    )
    with pruner.update():
        assert int(model.weight.count_nonzero()) == 1
    assert pruner.layers[0].floor_held


def test_floor_outranks_the_target() -> None:
    model = make_model()
    pruner_masks = secateur.prune_(model, secateur.Magnitude(), Block(64), sparsity=0.9)
    assert all(mask.all() for mask in pruner_masks.values())  # one block a layer: nothing to lose
    masks = secateur.prune_(model, secateur.Magnitude(), Element(), threshold=1e9)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 1]


def test_ema_follows_its_definition() -> None:
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(ema=0.8),
        granularity=Element(),
        schedule=OneShot(0.5, at=4),
    )
    expected: dict[str, Tensor] = {}
    for i, (x, y) in enumerate(batches(5)):
        for part in (slice(0, 8), slice(8, 16)):  # micro-batches: the step sees their sum
            backward(model, (x[part].double(), y[part].double()))
        for layer in pruner.layers:
            score = (layer.parameter.grad * layer.parameter).abs().detach()
            expected[layer.name] = score if i == 0 else 0.8 * expected[layer.name] + 0.2 * score
        optimizer.step()
        optimizer.zero_grad()
        if i < 4:
            for layer in pruner.layers:
                torch.testing.assert_close(layer.state, expected[layer.name])
    pooled = torch.cat([t.flatten() for t in expected.values()]).sort().values
    worst_alive = pooled[round(0.5 * pooled.numel())]
    for layer in pruner.layers:
        assert layer.state is None  # the schedule has ended
        assert torch.equal(layer.mask, expected[layer.name] >= worst_alive)


def test_obd_takes_adams_second_moment() -> None:
    model = make_model().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = Pruner(
        model,
        optimizer,
        criterion=secateur.OBD(hessian="adam"),
        granularity=Element(),
        schedule=Threshold(1e-7, begin=3, end=3),
    )
    for i, (x, y) in enumerate(batches(4)):
        backward(model, (x.double(), y.double()))
        if i == 3:
            alive = {
                layer.name: optimizer.state[layer.parameter]["exp_avg_sq"]
                / (1 - 0.999**3)
                * layer.parameter.detach() ** 2
                / 2
                >= 1e-7
                for layer in pruner.layers
            }
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in pruner.masks.items():
        assert 0 < mask.sum() < mask.numel()
        assert torch.equal(mask, alive[name])


def test_obd_takes_a_given_hessian() -> None:
    model = make_model().double()
    x, y = next(batches(1))
    loss = nn.functional.mse_loss(model(x.double()), y.double())
    hessian = secateur.hutchinson_diagonal(loss, dict(model.named_parameters()), samples=4)
    masks = secateur.prune_(
        model, secateur.OBD(hessian=hessian), Element(), sparsity=0.3, scope="layer"
    )
    assert all(int(m.sum()) == m.numel() - round(0.3 * m.numel()) for m in masks.values())
    with pytest.raises(ValueError, match=r"hessian to hold '0.weight', got \[\]"):
        secateur.prune_(model, secateur.OBD(hessian={}), Element(), sparsity=0.3)
    wrong = {name: h[:1] for name, h in hessian.items()}
    with pytest.raises(ValueError, match=r"shape \(48, 20\) for '0.weight', got \(1, 20\)"):
        secateur.prune_(model, secateur.OBD(hessian=wrong), Element(), sparsity=0.3)


class Doubled(secateur.Criterion):
    """A user's criterion: one class, plain PyTorch."""

    def measure(self, weight: Tensor, grad: Tensor | None) -> Tensor:
        return 2 * weight.abs()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_a_criterion_in_plain_pytorch(granularity: secateur.Granularity) -> None:
    ours, theirs = make_model(), make_model()
    masks = secateur.prune_(ours, Doubled(), granularity, sparsity=0.5)
    expected = secateur.prune_(theirs, secateur.Magnitude(), granularity, sparsity=0.5)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_prune_in_place_changes_only_the_dead() -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = secateur.prune_(model, secateur.Magnitude(), Element(), sparsity=0.5)
    assert set(masks) == {"0.weight", "3.weight", "5.weight"}
    for name, p in model.named_parameters():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(p.detach(), expected)


def test_gradients_of_the_dead_are_zero_before_clipping() -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(
        model, optimizer, criterion=Taylor(), granularity=Element(), schedule=OneShot(0.5)
    )
    train(model, optimizer, 1)
    backward(model, next(batches(1)))
    for layer in pruner.layers:
        assert torch.all(layer.parameter.grad[~layer.mask] == 0)
        assert torch.any(layer.parameter.grad != 0)


def test_closure_is_scored_after_it_ran() -> None:
    ours, theirs = make_model(), make_model()
    for model, closure in ((ours, True), (theirs, False)):
        optimizer = adamw(model)
        Pruner(
            model,
            optimizer,
            criterion=Taylor(),
            granularity=Element(),
            schedule=Cubic(0.5, begin=0, end=4),
        )
        for batch in batches(6):
            optimizer.zero_grad()
            if closure:
                optimizer.step(lambda m=model, b=batch: backward(m, b))
            else:
                backward(model, batch)
                optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hand_rolled_update() -> None:
    model = make_model()
    pruner = Pruner(
        model,
        None,
        criterion=Taylor(),
        granularity=Block(8),
        schedule=secateur.Linear(0.5, begin=0, end=4),
    )
    for batch in batches(8):
        model.zero_grad()
        backward(model, batch)
        with pruner.update(), torch.no_grad():
            for p in model.parameters():
                p.sub_(0.01 * p.grad + 0.01)  # moves dead weights as well
    for layer in pruner.layers:
        assert torch.all(layer.parameter[~layer.mask] == 0)
    units = sum(layer.units for layer in pruner.layers)
    assert sum(layer.alive_units for layer in pruner.layers) == units - round(0.5 * units)


def test_an_optimizer_step_inside_an_update_counts_once() -> None:
    ours, theirs = make_model(), make_model()
    schedule = Cubic(0.5, begin=0, end=4)
    for model, inside in ((ours, True), (theirs, False)):
        optimizer = adamw(model)
        pruner = Pruner(
            model, optimizer, criterion=Taylor(), granularity=Element(), schedule=schedule
        )
        for batch in batches(6):
            optimizer.zero_grad()
            backward(model, batch)
            if inside:
                with pruner.update():
                    optimizer.step()
            else:
                optimizer.step()
        assert pruner.steps == 6
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_update_that_fails_does_not_count() -> None:
    model = make_model()
    pruner = Pruner(model, None, **GOOD)
    backward(model, next(batches(1)))
    with pytest.raises(KeyError), pruner.update():
        raise KeyError
    assert pruner.steps == 0


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))],
    ids=["copy", "pickle"],
)
def test_a_copy_prunes_its_own_model(clone: Callable[[Any], Any]) -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Element(),
        schedule=Cubic(0.8, begin=0, end=20),
    )
    train(model, optimizer, 5)
    twin, twin_optimizer, twin_pruner = clone((model, optimizer, pruner))
    train(model, optimizer, 20)
    assert twin_pruner.steps == 5
    train(twin, twin_optimizer, 20)
    assert twin_pruner.sparsity() == pruner.sparsity()
    check_dead_are_zero(twin_pruner, twin_optimizer)
    pruner.remove()
    assert not clone(pruner)._handles


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(fused: bool) -> None:
    """Scores see unscaled gradients; a skipped step is no step."""

    def run(scaler: torch.amp.GradScaler | None) -> tuple[nn.Module, Pruner]:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        pruner = Pruner(
            model,
            optimizer,
            criterion=Taylor(),
            granularity=Element(),
            schedule=Threshold(1e-4, begin=1),
        )
        for i, (x, y) in enumerate(batches(6)):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            if scaler is None:
                if i != 2:
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if i == 2:
                model[3].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return model, pruner

    plain, expected = run(None)
    scaled, got = run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert got.steps == expected.steps == 5
    assert 0 < got.sparsity() < 1
    for name, mask in expected.masks.items():
        assert torch.equal(mask, got.masks[name])
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_under_a_fused_grad_scaler() -> None:
    """float16 holds neither a scale of 65536 nor, often, the unscaled gradient."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False).half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    pruner = Pruner(model, optimizer, **GOOD)
    gradient = torch.rand(16, 16) * 1e-7
    model.weight.grad = (gradient * 65536).half()
    scores = (model.weight.grad.float() / 65536 * model.weight.detach().float()).abs()
    optimizer.grad_scale = torch.tensor(65536.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(pruner.masks["weight"], scores >= scores.flatten().sort().values[128])


@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=repr)
def test_a_running_score_refuses_a_diverged_step(granularity: secateur.Granularity) -> None:
    model = make_model()
    optimizer = adamw(model)
    schedule = OneShot(0.5, at=3)
    pruner = Pruner(
        model, optimizer, criterion=Taylor(ema=0.9), granularity=granularity, schedule=schedule
    )
    train(model, optimizer, 1)
    states = [layer.state.clone() for layer in pruner.layers]
    backward(model, next(batches(1)))
    model[3].weight.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in '3.weight' at step 1"):
        optimizer.step()
    assert all(torch.equal(a, layer.state) for a, layer in zip(states, pruner.layers, strict=True))
    optimizer.zero_grad()
    train(model, optimizer, 4)  # a caught error leaves a pruner that works
    assert pruner.sparsity() > 0


def test_the_dead_stay_dead_whatever_is_loaded_or_scheduled() -> None:
    """Dense weights or moments loaded later; a learning rate that is 0 at first; resumed Muon."""

    def start(optimizer_type: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = make_model()
        optimizer = optimizer_type([p for p in model.parameters() if p.ndim == 2], lr=0.05)
        return model, optimizer, Pruner(model, optimizer, **GOOD)

    model, optimizer, pruner = start(torch.optim.AdamW)
    dense, moments = copy.deepcopy(model.state_dict()), None
    other, other_optimizer, _ = start(torch.optim.AdamW)
    train(other, other_optimizer, 2)
    moments = copy.deepcopy(other_optimizer.state_dict())
    for state in moments["state"].values():
        state["exp_avg"].fill_(1.0)
    train(model, optimizer, 3)
    model.load_state_dict(dense)
    optimizer.load_state_dict(moments)
    train(model, optimizer, 1)
    check_dead_are_zero(pruner, optimizer)

    model, optimizer, pruner = start(torch.optim.Muon)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    for _ in range(5):
        train(model, optimizer, 1)
        warmup.step()
    check_dead_are_zero(pruner, optimizer)

    resumed, resumed_optimizer, again = start(torch.optim.Muon)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(pruner.state_dict())
    train(resumed, resumed_optimizer, 1)
    check_dead_are_zero(again, resumed_optimizer)


def test_an_update_that_raises_leaves_the_dead_dead() -> None:
    model = make_model()
    pruner = Pruner(model, None, **{**GOOD, "criterion": secateur.Magnitude()})

    def fail() -> None:
        with pruner.update(), torch.no_grad():
            model[0].weight.add_(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.all(model[0].weight[~pruner.masks["0.weight"]] == 0)


@pytest.mark.parametrize(
    "scores",
    [
        lambda w: w.abs().t(),
        lambda w: w[:1],
        lambda w: None,
        lambda w: w > 0,
        lambda w: w.abs().sum(),
    ],
)
@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=repr)
def test_scores_of_a_users_criterion_are_checked(
    scores: Callable[[Tensor], Any], granularity: secateur.Granularity
) -> None:
    class Odd(secateur.Criterion):
        def measure(self, weight: Tensor, grad: Tensor | None) -> Tensor:
            return scores(weight)

    with pytest.raises(ValueError, match=r"Odd.measure to return .* for '0.weight', got"):
        secateur.prune_(make_model(), Odd(), granularity, sparsity=0.5)


def test_policies_of_a_user_are_checked() -> None:
    class Nothing(secateur.Granularity):
        def block(self, rows: int, cols: int) -> tuple[int, int]:
            return 0, cols

    class Half(secateur.Schedule):
        last = None

        def target(self, step: int) -> Any:
            return 0.5

    with pytest.raises(ValueError, match=r"both at least 1, got \(0, 20\)"):
        secateur.prune_(make_model(), secateur.Magnitude(), Nothing(), sparsity=0.5)
    pruner = Pruner(make_model(), None, **{**GOOD, "schedule": Half()})
    with pytest.raises(TypeError, match=r"a Target or None, got 0.5"):
        pruner.update().__enter__()


def test_two_pruners_of_one_parameter_are_refused() -> None:
    model = make_model()
    first = Pruner(model, None, **GOOD, include="0")
    Pruner(model, None, **GOOD, include="3")
    with pytest.raises(ValueError, match=r"no other pruner prunes, got '0.weight'"):
        Pruner(model, None, **GOOD, include="0")
    first.remove()
    Pruner(model, None, **GOOD, include="0")


def test_what_cannot_be_pruned_is_left_out_or_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    secateur.prune_(model, secateur.Magnitude(), Block(16), sparsity=0.5, include="0")
    secateur.sparsify(model)
    pruner = Pruner(model, None, **GOOD)
    assert pruner.skipped["0.values"] == "block-sparse"
    pruner.remove()
    with pytest.raises(ValueError, match=r"'0.values', block-sparse: densify first"):
        Pruner(model, None, **GOOD, include="0.values")
    with pytest.raises(ValueError, match=r"float64 only for \['1.weight'\]"):
        secateur.prune_(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()),
            secateur.Magnitude(),
            Element(),
            sparsity=0.5,
        )


def test_vectors_stored_with_more_dimensions_are_no_weights() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    attention.gamma = nn.Parameter(torch.ones(8, 1, 1))
    attention.cls_token = nn.Parameter(torch.ones(1, 1, 8))
    pruner = Pruner(attention, None, **GOOD)
    assert set(pruner.masks) == {"in_proj_weight", "out_proj.weight"}
    assert Pruner(nn.Linear(5, 1), None, **GOOD).masks["weight"].shape == (1, 5)


def test_a_tied_parameter_goes_by_all_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert list(Pruner(model, None, **GOOD, include="b").masks) == ["a.weight"]


def test_a_model_cast_in_mid_average() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(ema=0.9),
        granularity=Element(),
        schedule=OneShot(0.5, at=4),
    )
    train(model, optimizer, 2)
    model.double()
    for x, y in batches(3):
        backward(model, (x.double(), y.double()))
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.sparsity() > 0.49


def test_lbfgs_is_refused() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="got LBFGS"):
        Pruner(model, torch.optim.LBFGS(model.parameters()), **GOOD)


def test_remove_detaches() -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Element(),
        schedule=Cubic(0.9, begin=0, end=50),
    )
    train(model, optimizer, 5)
    pruner.remove()
    pruner.remove()
    reached = pruner.sparsity()
    train(model, optimizer, 5)
    assert pruner.sparsity() == reached
    assert any(torch.any(layer.parameter[~layer.mask] != 0) for layer in pruner.layers)


@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=repr)
@pytest.mark.parametrize("criterion", [Taylor(ema=0.9), secateur.Random()], ids=repr)
def test_resumed_run_equals_uninterrupted_run(
    criterion: secateur.Criterion, granularity: secateur.Granularity
) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = make_model(seed)
        optimizer = adamw(model)
        schedule = Cubic(0.8, begin=0, end=20, every=3)
        return (
            model,
            optimizer,
            Pruner(
                model, optimizer, criterion=criterion, granularity=granularity, schedule=schedule
            ),
        )

    whole, optimizer, pruner = start(0)
    train(whole, optimizer, 10, seed=1)
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    train(whole, optimizer, 15, seed=2)

    resumed, optimizer, again = start(7)
    file.seek(0)
    for part, state in zip(
        (resumed, optimizer, again), torch.load(file, weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(resumed, optimizer, 15, seed=2)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, again.masks[name])


def test_state_that_does_not_fit_is_refused() -> None:
    def start() -> tuple[nn.Module, Pruner]:
        model = make_model()
        optimizer = adamw(model)
        pruner = Pruner(
            model,
            optimizer,
            criterion=Taylor(ema=0.9),
            granularity=Element(),
            schedule=Cubic(0.5, begin=0, end=10),
        )
        train(model, optimizer, 5)
        return model, pruner

    _, donor = start()
    model, pruner = start()
    state, layer = donor.state_dict(), donor.state_dict()["layers"]["0.weight"]
    before, masks, steps = copy.deepcopy(model.state_dict()), pruner.masks, pruner.steps

    def with_layer(**change: Any) -> dict[str, Any]:
        return {"layers": {**state["layers"], "0.weight": {**layer, **change}}}

    for change, match in [
        ({"version": 2}, "version 1, got 2"),
        ({"settings": {**state["settings"], "scope": "'layer'"}}, "scope='global', got 'layer'"),
        ({"settings": None}, "settings to hold exactly .* got None"),
        ({"steps": "x"}, "steps to be a whole number, got 'x'"),
        ({"steps": -3}, "got -3"),
        ({"idle_steps": None}, "idle_steps to be a whole number, got None"),
        ({"layers": {}}, r"exactly \['0.weight', .*, got \[\]"),
        (with_layer(bits=torch.zeros(3, dtype=torch.uint8)), "120 bytes"),
        (with_layer(bits=None), "bits of '0.weight' to be a Tensor, got None"),
        (with_layer(state=torch.zeros(3)), r"\(48, 20\) for '0.weight', got .*\(3,\)"),
        (with_layer(state=torch.zeros(48, 20).half()), r"got \(torch.float16"),
        (with_layer(target=7.0), "target of '0.weight' .* got 7.0"),
        (with_layer(floor_held=None), "floor_held of '0.weight' to be a bool, got None"),
        (with_layer(surplus=1), "'surplus'"),
    ]:
        with pytest.raises(ValueError, match=match):
            pruner.load_state_dict({**state, **change})
    for broken in ({}, None, 3, {k: v for k, v in state.items() if k != "idle_steps"}):
        with pytest.raises(ValueError, match="the state of a Pruner to hold exactly"):
            pruner.load_state_dict(broken)  # type: ignore[arg-type]
    assert pruner.steps == steps
    assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks.items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_a_diverged_run_is_not_pruned(bad: float, granularity: secateur.Granularity) -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(
        model, optimizer, criterion=Taylor(), granularity=granularity, schedule=OneShot(0.5)
    )
    backward(model, next(batches(1)))
    model[3].weight.grad[2, 3] = bad
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"NaN or Inf in '3.weight' at step 0"):
        optimizer.step()
    for old, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, p.detach())
    assert pruner.sparsity() == 0


class Net(nn.Module):
    """Every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm((8, 6))
        self.fc = nn.Linear(48, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.pos_embed = nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight  # tied

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv((self.embed(tokens) + self.pos_embed).mT))
        return self.head(self.inner(self.fc(x.flatten(1))))


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, None, ["conv.weight", "fc.weight", "inner.0.weight", "inner.1.weight"]),
        (None, "conv", ["fc.weight", "inner.0.weight", "inner.1.weight"]),
        (None, ["*.weight", "nothing*"], None),
        ("fc", None, ["fc.weight"]),
        ("fc.*", None, ["fc.weight", "fc.bias"]),
        ("inner", None, ["inner.0.weight", "inner.1.weight"]),
        (None, ["inner", "conv*"], ["fc.weight"]),
        (["*.bias"], ["norm*", "inner"], ["conv.bias", "fc.bias"]),
        ("embed.weight", None, ["embed.weight"]),
        (
            "*",
            "inner",
            [
                "embed.weight",
                "pos_embed",
                *(f"{m}.{leaf}" for m in ("conv", "norm", "fc") for leaf in ("weight", "bias")),
            ],
        ),
    ],
)
def test_include_and_exclude(
    include: str | list[str] | None, exclude: str | list[str] | None, names: list[str] | None
) -> None:
    def make() -> Pruner:
        return Pruner(
            Net(),
            None,
            criterion=secateur.Magnitude(),
            granularity=Element(),
            schedule=OneShot(0.5),
            include=include,
            exclude=exclude,
        )

    if names is None:
        with pytest.raises(ValueError, match=r"no match for \['nothing\*'\]"):
            make()
    else:
        assert sorted(make().masks) == sorted(names)


def test_every_kind_of_parameter_can_be_pruned() -> None:
    model = Net()
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Block(4, 3),
        schedule=OneShot(0.5),
        include="*",
    )
    model(torch.randint(10, (4, 6))).square().mean().backward()
    optimizer.step()
    check_dead_are_zero(pruner, optimizer)
    units = sum(layer.units for layer in pruner.layers)
    assert sum(layer.alive_units for layer in pruner.layers) == units - round(0.5 * units)


def test_names_are_the_models_own() -> None:
    model = make_model()
    policy = {
        "criterion": secateur.Magnitude(),
        "granularity": Element(),
        "schedule": OneShot(0.5),
    }

    def names(wrapped: nn.Module) -> list[str]:
        pruner = Pruner(wrapped, None, **policy)
        pruner.remove()
        return list(pruner.masks)

    expected = names(model)
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model),
        torch.compile(nn.DataParallel(model)),
    ):
        assert names(wrapped) == expected
    inner = make_model()
    inner[3] = torch.compile(inner[3])
    inner[5] = nn.DataParallel(inner[5])
    assert names(inner) == expected


def test_frozen_parameters_are_listed_and_refused_only_where_named() -> None:
    model = make_model()
    model[3].weight.requires_grad_(False)
    pruner = Pruner(model, None, criterion=Taylor(), granularity=Element(), schedule=OneShot(0.5))
    assert list(pruner.masks) == ["0.weight", "5.weight"]
    assert pruner.skipped["3.weight"] == "frozen"
    assert "left out (frozen): 3.weight" in repr(pruner)
    pruner.remove()
    with pytest.raises(ValueError, match=r"got '3.weight', frozen"):
        Pruner(
            model,
            None,
            criterion=Taylor(),
            granularity=Element(),
            schedule=OneShot(0.5),
            include="3",
        )


def test_a_model_at_rest_may_be_frozen() -> None:
    model = make_model().requires_grad_(False)
    secateur.prune_(model, secateur.Magnitude(), Element(), sparsity=0.5, include="3")
    assert int(model[3].weight.count_nonzero()) == model[3].weight.numel() // 2


def test_the_plan_is_printed_before_anything_happens() -> None:
    model = make_model()
    pruner = Pruner(
        model,
        adamw(model),
        criterion=Taylor(),
        granularity=Block(8),
        schedule=Cubic(0.9, begin=5, end=10),
        scope="layer",
    )
    plan = str(pruner)
    for part in ("Taylor", "Block(rows=8", "Cubic(sparsity=0.9", "'layer'", "48x20", "18 of 8x8"):
        assert part in plan
    assert "left out (norm): 1.weight, 1.bias" in plan


def test_due_steps_with_nothing_to_do_are_counted() -> None:
    model = make_model()
    optimizer = adamw(model)
    schedule = Threshold(1e-30, begin=0, end=2)
    pruner = Pruner(
        model, optimizer, criterion=secateur.Magnitude(), granularity=Element(), schedule=schedule
    )
    train(model, optimizer, 5)
    assert pruner.idle_steps == 3
    assert "3 due steps had nothing to do" in str(pruner)


@pytest.mark.parametrize(
    ("model", "change", "error", "match"),
    [
        (make_model(), {"criterion": Taylor}, TypeError, "expected a criterion"),
        (make_model(), {"granularity": 32}, TypeError, "expected a granularity .* got 32"),
        (make_model(), {"schedule": 0.5}, TypeError, "expected a schedule .* got 0.5"),
        (make_model(), {"scope": "local"}, ValueError, "got 'local'"),
        (make_model(), {"include": "conv*"}, ValueError, r"no match for \['conv\*'\]"),
        (make_model(), {"include": []}, ValueError, "at least one name glob"),
        (make_model(), {"include": 3}, TypeError, "name globs .* got 3"),
        (make_model(), {"include": "1"}, ValueError, r"no match for \['1'\]"),
        (make_model(), {"scope": ["global"]}, ValueError, r"got \['global'\]"),
        (make_model(), {"exclude": "*"}, ValueError, "weights to prune, got none"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "weights to prune, got none"),
        (nn.LayerNorm(8), {}, ValueError, r"got none: weight \(norm\)"),
        ("model", {}, TypeError, "torch.nn.Module, got str"),
    ],
)
def test_bad_input_is_refused(
    model: Any, change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Pruner(model, None, **{**GOOD, **change})


def test_bad_optimizer_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"got one without \['0.weight', '3.weight', '5.weight'\]"):
        Pruner(model, adamw(make_model()), **GOOD)
    with pytest.raises(TypeError, match="Optimizer, a list of them or None"):
        Pruner(model, model.parameters(), **GOOD)  # type: ignore[arg-type]


def test_missing_gradient_is_refused_and_changes_nothing() -> None:
    model = make_model()
    optimizer = adamw(model)
    Pruner(model, optimizer, **GOOD)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected '0.weight' to have a gradient"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_replaced_parameters_are_noticed() -> None:
    model = make_model()
    optimizer = adamw(model)
    Pruner(model, optimizer, **{**GOOD, "schedule": Cubic(0.9, begin=0, end=100)})
    train(model, optimizer, 50)
    secateur.sparsify(model, optimizer, block=1)
    with pytest.raises(ValueError, match="they were replaced"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sparsity": 90}, ValueError, "got 90; for 90 % write 0.9"),
        ({"sparsity": 0.5, "threshold": 0.1}, ValueError, "one of sparsity and threshold"),
        ({}, ValueError, "got sparsity=None and threshold=None"),
        ({"sparsity": False}, TypeError, "got False"),
        ({"sparsity": ""}, TypeError, "got ''"),
        ({"threshold": True}, TypeError, "expected threshold to be a number, got True"),
        ({"threshold": float("nan")}, ValueError, "got nan"),
        ({"sparsity": 0.5, "scope": "x"}, ValueError, "got 'x'"),
    ],
)
def test_bad_prune_is_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model = make_model()
    with pytest.raises(error, match=match):
        secateur.prune_(model, secateur.Magnitude(), Element(), **change)
    assert all(torch.all(p != 0) for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    masks = secateur.prune_(model, secateur.Magnitude(), Element(), sparsity=0.5)
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - round(0.5 * total)


def test_several_optimizers_take_turns() -> None:
    """As one optimizer of two groups, when nothing but the masks joins them."""

    def run(several: bool) -> tuple[nn.Module, Pruner]:
        model = make_model().double()
        parts = [list(model[:2].parameters()), list(model[2:].parameters())]
        optimizers = (
            [torch.optim.SGD(part, lr=1e-2) for part in parts]
            if several
            else [torch.optim.SGD([{"params": part} for part in parts], lr=1e-2)]
        )
        pruner = Pruner(
            model,
            optimizers if several else optimizers[0],
            criterion=Taylor(ema=0.5),
            granularity=Block(4),
            schedule=Cubic(0.6, begin=1, end=9, every=2),
        )
        for x, y in batches(12):
            backward(model, (x.double(), y.double()))
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
        return model, pruner

    (one, expected), (two, got) = run(False), run(True)
    assert got.steps == expected.steps == 12
    assert got.sparsity() == expected.sparsity() > 0.5
    for name, mask in expected.masks.items():
        assert torch.equal(got.masks[name], mask)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_optimizer_is_scored_by_its_own_gradients() -> None:
    """As in a GAN: the gradients of one are gone, or stale, when the other has its turn."""
    model = make_model()
    parts = {"first": model[0], "second": model[3]}
    optimizers = {name: adamw(part) for name, part in parts.items()}
    pruner = Pruner(
        model, list(optimizers.values()), **{**GOOD, "schedule": OneShot(0.5, at=1)}, exclude="5"
    )
    scores = {}
    for i, batch in enumerate(batches(6)):
        backward(model, batch)
        name = "second" if i in (2, 5) else "first"  # two steps of the first for each of the other
        optimizer = optimizers[name]
        weight = parts[name].weight
        scores[name] = (weight.grad * weight).abs().detach()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        assert pruner.steps == (i + 1) // 3
        assert (pruner.sparsity() > 0) == (i == 5)
    pooled = torch.cat([t.flatten() for t in scores.values()]).sort().values
    worst_alive = pooled[round(0.5 * pooled.numel())]
    assert torch.equal(pruner.masks["0.weight"], scores["first"] >= worst_alive)
    assert torch.equal(pruner.masks["3.weight"], scores["second"] >= worst_alive)
    for optimizer, layer in zip(optimizers.values(), pruner.layers, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.all(optimizer.state[layer.parameter][moment][~layer.mask] == 0)


def test_an_optimizer_that_trains_nothing_pruned_does_not_count() -> None:
    model = make_model()
    weights = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2])
    pruner = Pruner(model, [rest, weights], **GOOD)
    for batch in batches(3):
        backward(model, batch)
        weights.step()
        model.zero_grad()
    assert pruner.steps == 3
    check_dead_are_zero(pruner, weights)


def test_groups_may_be_added_later() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model[5].parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, **GOOD, include="5")
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model[:5].parameters(), "lr": 1e-3})
    train(model, optimizer, 2)
    check_dead_are_zero(pruner, optimizer)
    pruner.remove()
    everything = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 2)
    check_dead_are_zero(everything, optimizer)
    assert pruner.steps == 4


def test_state_of_unknown_optimizers_is_masked() -> None:
    class Nested(torch.optim.Optimizer):
        """Keeps its moments in a list and a dict; moves every weight whatever its gradient."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                if not state:
                    state["moments"] = [torch.ones_like(p), {"second": torch.ones_like(p)}]
                    state["step"] = torch.zeros(())
                for t in (p, state["moments"][0], state["moments"][1]["second"]):
                    t.add_(1)

    model = make_model()
    optimizer = Nested(model.parameters())
    pruner = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 2)
    for layer in pruner.layers:
        first, others = optimizer.state[layer.parameter]["moments"]
        for t in (layer.parameter, first, others["second"]):
            assert torch.all(t[~layer.mask] == 0)
            assert torch.all(t[layer.mask] != 0)
    optimizer.state[model[3].weight]["moments"][1]["second"].fill_(1)
    with pytest.raises(ValueError, match=r"'3.weight' to be zero in 'moments' of Nested, got"):
        pruner.check()


def test_masters_of_higher_precision() -> None:
    """The usual loop: gradients to float32, step, weights back."""
    model = make_model().bfloat16()
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, weight_decay=0.1)
    weights = {name: masters[name] for name in ("0.weight", "3.weight", "5.weight")}
    pruner = Pruner(model, optimizer, **GOOD, masters=weights)
    for i, (x, y) in enumerate(batches(4)):
        nn.functional.mse_loss(model(x.bfloat16()), y.bfloat16()).backward()
        for name, p in model.named_parameters():
            masters[name].grad, p.grad = p.grad.float(), None
        if i == 0:
            scores = {name: (w * w.grad).abs().detach() for name, w in weights.items()}
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    pooled = torch.cat([t.flatten() for t in scores.values()]).sort().values
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, scores[name] >= pooled[round(0.5 * pooled.numel())])
        assert torch.all(model.get_parameter(name)[~mask] == 0)
        assert torch.all(masters[name][~mask] == 0)
    check_dead_are_zero(pruner, optimizer)
    with torch.no_grad():
        masters["3.weight"].fill_(1)
    with pytest.raises(ValueError, match=r"'3.weight' to be zero in its master copy"):
        pruner.check()


@pytest.mark.parametrize(
    ("masters", "match"),
    [
        ({"bias": torch.zeros(3)}, r"got one of 'bias', not in \['weight'\]"),
        ({"weight": torch.zeros(4, 3)}, r"shape \(3, 4\) on cpu, got torch.float32 \(4, 3\)"),
        ({"weight": torch.zeros(3, 4).int()}, "got torch.int32"),
        ({"weight": None}, "got None"),
    ],
)
def test_masters_that_do_not_fit_are_refused(masters: dict[str, Any], match: str) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=match):
        Pruner(model, torch.optim.SGD(model.parameters()), **GOOD, masters=masters)


def test_an_average_of_the_model_is_masked() -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **{**GOOD, "schedule": OneShot(0.5, at=1)})
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(3):
        train(model, optimizer, 1)
        average.update_parameters(model)
    mask = pruner.masks["3.weight"]
    assert torch.any(average.module[3].weight[~mask] != 0)
    alive = average.module[3].weight[mask].clone()
    pruner.mask_(average)
    assert torch.all(average.module[3].weight[~mask] == 0)
    assert torch.equal(average.module[3].weight[mask], alive)
    shadow = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    pruner.mask_(shadow)
    assert torch.equal(shadow["3.weight"], mask.float())
    assert torch.all(shadow["3.bias"] == 1)


def test_another_model_cannot_be_masked() -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 1)
    other = nn.Sequential(nn.Linear(20, 48), nn.ReLU())
    before = other[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"expected '3.weight' of shape \(40, 48\), got None"):
        pruner.mask_(other)
    assert torch.equal(other[0].weight, before)
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(48, 20\), got \(2, 20\)"):
        pruner.mask_(nn.Sequential(nn.Linear(20, 2)))
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module or a mapping"):
        pruner.mask_([model])


def revive_moment(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    optimizer.state[model[3].weight]["exp_avg"].fill_(1)


def revive_weight(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    model.load_state_dict(make_model().state_dict())


def replace_parameter(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())


def lose_parameter(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not model[3].weight]


def clear_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    model[3].weight._post_accumulate_grad_hooks.clear()


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (revive_moment, r"dead weights of '3.weight' to be zero in 'exp_avg' of AdamW, got others"),
        (revive_weight, r"dead weights of '0.weight' to be zero in the model, got others"),
        (replace_parameter, r"to hold the parameter '3.weight' .* got another one in its place"),
        (lose_parameter, r"got one without \['3.weight'\]"),
        (clear_hooks, r"gradient hook on '3.weight', got none"),
    ],
)
@pytest.mark.parametrize("by_itself", [True, False])
def test_check_names_the_parameter_and_the_culprit(
    harm: Callable[..., None], match: str, by_itself: bool
) -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Element(),
        schedule=Cubic(0.9, begin=0, end=100),
    )
    train(model, optimizer, 20)
    pruner.check()
    harm(model, optimizer, pruner)
    if not by_itself:
        with pytest.raises(ValueError, match=match):
            pruner.check()
        return
    backward(model, next(batches(1)))
    with pytest.raises(ValueError, match=match):
        optimizer.step()  # the 20th mask update


def foreign_prune(model: nn.Module) -> Any:
    for module in (model[0], model[3], model[5]):
        nn.utils.prune.l1_unstructured(module, "weight", 0.5)
    return model


def foreign_ao(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.pruning is deprecated
        sparsifier = torch.ao.pruning.WeightNormSparsifier(0.5, sparse_block_shape=(1, 1))
        names = ("0.weight", "3.weight", "5.weight")
        sparsifier.prepare(model, [{"tensor_fqn": name} for name in names])
        sparsifier.step()
    return model


def foreign_zeros(model: nn.Module) -> Any:
    secateur.prune_(model, secateur.Magnitude(), Element(), sparsity=0.5, scope="layer")
    return model


def foreign_state(model: nn.Module) -> Any:
    return foreign_prune(model).state_dict()


def foreign_masks(model: nn.Module) -> Any:
    return secateur.prune_(model, secateur.Magnitude(), Element(), sparsity=0.5, scope="layer")


@pytest.mark.parametrize(
    "foreign", [foreign_prune, foreign_ao, foreign_zeros, foreign_state, foreign_masks]
)
def test_masks_are_taken_over(foreign: Callable[[nn.Module], Any]) -> None:
    source = make_model(seed=1)
    magnitudes = {name: p.detach().abs() for name, p in source.named_parameters() if p.ndim == 2}
    source = foreign(source)
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **{**GOOD, "schedule": OneShot(0.5, at=5)})
    train(model, optimizer, 2)
    pruner.load_masks_from(source)
    check_dead_are_zero(pruner, optimizer)
    for name, weight in magnitudes.items():
        worst_alive = weight.flatten().sort().values[round(0.5 * weight.numel())]
        assert torch.equal(pruner.masks[name], weight >= worst_alive), name
    train(model, optimizer, 2)
    assert pruner.sparsity() == 0.5
    check_dead_are_zero(pruner, optimizer)


@pytest.mark.parametrize(
    ("source", "granularity", "error", "match"),
    [
        (3, Element(), TypeError, "a torch.nn.Module or a mapping"),
        ({}, Element(), ValueError, r"one of \['weight_mask', 'weight'\], got \[\]"),
        ({"weight": torch.ones(2)}, Element(), ValueError, r"shape \(4, 4\), got \(2,\)"),
        ({"weight": torch.ones(4, 4)}, Element(), ValueError, "only living weights for"),
        ({"weight": torch.zeros(4, 4)}, Element(), ValueError, "a living weight in every layer"),
        ({"weight": torch.eye(4)}, Block(2), ValueError, r"whole units of 2 x 2 .* cuts through"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    source: Any, granularity: secateur.Granularity, error: type[Exception], match: str
) -> None:
    model = nn.Linear(4, 4)
    pruner = Pruner(model, None, **{**GOOD, "granularity": granularity})
    with pytest.raises(error, match=match):
        pruner.load_masks_from(source)
    assert pruner.sparsity() == 0


def test_random_state_is_resumed() -> None:
    model = nn.Sequential(nn.Linear(20, 48), nn.Dropout(0.5), nn.Linear(48, 4))
    pruner = Pruner(model, None, **GOOD)
    torch.manual_seed(5)
    saved = pruner.state_dict()
    expected = torch.rand(3)
    torch.rand(100)
    pruner.load_state_dict(saved)
    assert torch.equal(torch.rand(3), expected)
    foreign = {**saved, "rng": {"7": saved["rng"]["0"]}}  # saved by another process
    pruner.load_state_dict(foreign)
    other = torch.rand(3)
    assert not torch.equal(other, expected)
    pruner.load_state_dict(foreign)
    assert torch.equal(torch.rand(3), other)


@pytest.mark.parametrize("average", [None, 0.5])
def test_gradients_zeroed_too_early_are_noticed(average: float | None) -> None:
    """Ties would decide: the first weights of the first layer would go."""
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(ema=average),
        granularity=Element(),
        schedule=OneShot(0.5),
    )
    backward(model, next(batches(1)))
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match=r"got only zeros: step after backward\(\) and before"):
        optimizer.step()
    assert pruner.sparsity() == 0


def test_masks_follow_the_model_to_another_device() -> None:
    model = nn.Linear(4, 4)
    pruner = Pruner(model, None, **{**GOOD, "criterion": secateur.Magnitude()})
    with pruner.update():
        pass
    (layer,) = pruner.layers
    layer.state = torch.zeros(4, 4)
    layer.parameter = nn.Parameter(layer.parameter.to("meta"))  # as .to("cuda") does to its data
    layer.follow()
    assert {t.device.type for t in (layer.bits, layer.unit_bits, layer.state)} == {"meta"}


def test_a_schedule_that_pruned_nothing_says_so() -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **{**GOOD, "granularity": Block(64)})  # one a layer
    train(model, optimizer, 2)
    assert "the schedule has ended and nothing is pruned" in repr(pruner)


class Drifting(torch.optim.AdamW):
    """Moves its moments, but not the weights, where everything is zero."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for state in self.state.values():
            state["exp_avg"].add_(1)
        return loss


def add_noise(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad.add_(0.1)


def assign_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def write_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg_sq"].fill_(1)


def replace_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        moments["exp_avg_sq"].fill_(1)
    optimizer.load_state_dict(state)


def write_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.data.fill_(1)  # unseen by autograd's version counters


@pytest.mark.parametrize(
    "tamper", [add_noise, assign_gradients, write_moments, replace_moments, write_weights]
)
@pytest.mark.parametrize("rate", [1e-2, 0.0])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Drifting])
def test_everything_dead_is_zero_after_a_step_whatever_happened_before(
    tamper: Callable[..., None], rate: float, kind: type[torch.optim.AdamW]
) -> None:
    model = make_model()
    optimizer = kind(model.parameters(), lr=rate)
    pruner = Pruner(model, optimizer, **GOOD)
    for step, batch in enumerate(batches(6)):
        backward(model, batch)
        if step == 4:
            tamper(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        check_dead_are_zero(pruner, optimizer)


def test_sparse_gradients_are_refused() -> None:
    for criterion in (Taylor(), secateur.Magnitude()):
        table = nn.Embedding(12, 8, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters())
        Pruner(table, optimizer, **{**GOOD, "criterion": criterion}, include="weight")
        table(torch.arange(6)).sum().backward()
        with pytest.raises(ValueError, match=r"a dense gradient of 'weight', got .*sparse_coo"):
            optimizer.step()


def test_optimizers_fall_back_into_step_after_one_was_skipped() -> None:
    """As a GradScaler skips one: the next round begins with the first of them."""
    model = make_model()
    optimizers = [adamw(model[0]), adamw(model[3])]
    pruner = Pruner(model, optimizers, **{**GOOD, "schedule": OneShot(0.5, at=3)}, exclude="5")
    for i, batch in enumerate(batches(5)):
        backward(model, batch)
        weights = [model[0].weight, model[3].weight]
        scores = [(w.grad * w).abs().detach() for w in weights]
        for optimizer in optimizers[i == 1 :]:  # the first is left out once
            optimizer.step()
        model.zero_grad()
        assert pruner.steps == (i + 1 if i < 1 else i)
    pooled = torch.cat([t.flatten() for t in scores]).sort().values
    for name, score in zip(("0.weight", "3.weight"), scores, strict=True):
        assert torch.equal(pruner.masks[name], score >= pooled[round(0.5 * pooled.numel())])


def test_a_run_is_resumed_between_the_turns_of_optimizers() -> None:
    def start() -> tuple[nn.Module, list[torch.optim.Optimizer], Pruner]:
        model = make_model()
        optimizers = [adamw(model[0]), adamw(model[3])]
        schedule = Cubic(0.7, begin=0, end=4)
        return (
            model,
            optimizers,
            Pruner(model, optimizers, **{**GOOD, "schedule": schedule}, exclude="5"),
        )

    def go(model: nn.Module, optimizers: list[Any], begin: int, end: int) -> None:
        for i, batch in enumerate(batches(12)):
            if begin <= i < end:
                backward(model, batch)
                optimizers[i % 3 == 2].step()  # two steps of the first for each of the second
                model.zero_grad()

    model, optimizers, pruner = start()
    go(model, optimizers, 0, 4)
    twin, twin_optimizers, twin_pruner = start()
    twin.load_state_dict(model.state_dict())
    for ours, theirs in zip(optimizers, twin_optimizers, strict=True):
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    twin_pruner.load_state_dict(pruner.state_dict())
    go(model, optimizers, 4, 12)
    go(twin, twin_optimizers, 4, 12)
    assert twin_pruner.sparsity() == pruner.sparsity() > 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hooks_of_the_user_see_masked_gradients() -> None:
    """Also those that take the gradient away, as main_grad does."""
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 1)
    taken = {}
    for name, p in model.named_parameters():

        def take(p: Tensor, name: str = name) -> None:
            taken[name], p.grad = p.grad, None

        p.register_post_accumulate_grad_hook(take)
    backward(model, next(batches(1)))
    for name, mask in pruner.masks.items():
        assert torch.all(taken[name][~mask] == 0)
        assert torch.any(taken[name] != 0)


def test_half_precision_moments_are_masked_where_updates_underflow() -> None:
    model = make_model().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-38, momentum=0.9)
    pruner = Pruner(model, optimizer, **GOOD)
    for x, y in batches(4):
        nn.functional.mse_loss(model(x.bfloat16()), y.bfloat16()).backward()
        for p in model.parameters():
            p.grad.sub_(1e-3)
        optimizer.step()
        optimizer.zero_grad()
        check_dead_are_zero(pruner, optimizer)


def test_moments_of_a_wrapped_optimizer_are_masked() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As ZeroRedundancyOptimizer: the state is the inner optimizer's."""

        def __init__(self, params: Any) -> None:
            params = list(params)
            super().__init__(params, {})
            self.optim = torch.optim.Adamax(params, lr=1e-2)

        def step(self, closure: Any = None) -> None:
            self.optim.step()

    model = make_model()
    optimizer = Wrapper(model.parameters())
    pruner = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 3)
    check_dead_are_zero(pruner, optimizer.optim)


def test_an_optimizer_without_hooks_is_refused_and_leaves_nothing_behind() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: it never calls Optimizer.__init__."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    model = make_model()
    optimizer = adamw(model)
    with pytest.raises(TypeError, match="got a Wrapper: pass the optimizer that it wraps"):
        Pruner(model, Wrapper(optimizer), **GOOD)
    pruner = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 1)
    assert pruner.sparsity() > 0
    with pytest.raises(ValueError, match="every optimizer once"):
        Pruner(make_model(), [optimizer, optimizer], **GOOD)


def test_a_compiled_step_runs_the_hooks() -> None:
    model = make_model()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **GOOD)
    step = torch.compile(optimizer.step, backend="eager")
    for batch in batches(4):
        backward(model, batch)
        step()
        optimizer.zero_grad()
    assert pruner.steps == 4
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)
    check_dead_are_zero(pruner, optimizer)


def test_a_closure_that_runs_twice_counts_once() -> None:
    class Twice(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any) -> None:
            for _ in range(2):
                with torch.enable_grad():
                    closure()
            super().step()

    def close(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model.zero_grad()
        return backward(model, batch)

    model = make_model()
    optimizer = Twice(model.parameters(), lr=1e-2)
    pruner = Pruner(
        model,
        optimizer,
        criterion=secateur.Movement(),
        granularity=Element(),
        schedule=OneShot(0.5, at=9),
    )
    batch = next(batches(1))
    expected = make_model()
    backward(expected, batch)
    optimizer.step(lambda: close(model, batch))
    first = -(expected[0].weight.grad * expected[0].weight).detach()
    assert torch.equal(pruner.layers[0].state, first)


def test_lost_parameters_are_noticed_after_the_schedule_too() -> None:
    model = make_model()
    optimizer = adamw(model)
    Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 20)
    model.load_state_dict(make_model().state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"another one in its place.*assign=True"):
        train(model, optimizer, 100)


def test_what_cannot_be_seen_is_left_out_or_refused() -> None:
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
    model = nn.Sequential(orthogonal, nn.Linear(8, 4))
    pruner = Pruner(model, None, **GOOD)
    assert [layer.name for layer in pruner.layers] == ["1.weight"]
    assert "parametrized" in pruner.skipped.values()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' sharing it"):
        Pruner(model, None, **GOOD)
    with pytest.raises(ValueError, match=r"got \['0.weight', '0.bias'\] of lazy modules: run it"):
        Pruner(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), None, **GOOD)


def test_settings_tell_policies_of_a_user_apart() -> None:
    class Mine(secateur.Schedule):
        def __init__(self, sparsity: float) -> None:
            object.__setattr__(self, "sparsity", sparsity)

        def target(self, step: int) -> secateur.Target:
            return secateur.Target(sparsity=self.sparsity)

        @property
        def last(self) -> None:
            return None

    saved = Pruner(make_model(), None, **{**GOOD, "schedule": Mine(0.5)}).state_dict()
    other = Pruner(make_model(), None, **{**GOOD, "schedule": Mine(0.9)})
    with pytest.raises(ValueError, match=r"schedule=Mine\(\{'sparsity': 0.9\}\), got Mine"):
        other.load_state_dict(saved)


def test_masks_of_a_chain_are_combined() -> None:
    masks = [torch.rand(3, 4) < 0.7 for _ in range(2)]
    tensors = {f"parametrizations.weight.{i}.mask": mask for i, mask in enumerate(masks)}
    pruner = Pruner(nn.Linear(4, 3), None, **GOOD)
    pruner.load_masks_from(tensors)
    assert torch.equal(pruner.masks["weight"], masks[0] & masks[1])


def test_a_step_that_calls_the_step_of_its_base_class_counts_once() -> None:
    model = make_model()
    train(model, adamw(model), 1)  # torch hangs hooks on AdamW.step when it first makes one
    optimizer = Drifting(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, **GOOD)
    train(model, optimizer, 3)
    assert pruner.steps == 3


def test_moments_of_mixed_precision_are_masked() -> None:
    """One layer in float32 does not speak for one in bfloat16, whose updates underflow."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False).bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-38, momentum=0.9)
    pruner = Pruner(model, optimizer, **{**GOOD, "scope": "layer"})
    for step in range(4):
        for p in model.parameters():
            p.grad = -torch.rand_like(p)  # an update that rounds to +0.0, not to a -0.0 that tells
            if p.dtype == torch.float32 and step:
                p.grad *= pruner.masks["0.weight"]  # nothing revives the layer that could tell
            elif step:
                p.grad *= 1e-3
        optimizer.step()
        check_dead_are_zero(pruner, optimizer)
