"""What secateur promises about training, one test a promise: start reading here.

The details are tested elsewhere: optimizers in test_pruner.py, files in test_checkpoint.py,
processes in test_distributed.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import secateur
from secateur import Block, Cubic, Element, OneShot, Pruner, Taylor


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 8),
    )


def make_optimizer(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, **options)


def make_pruner(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, end: int = 40, **change: Any
) -> Pruner:
    policy = {
        "criterion": Taylor(ema=0.9),
        "granularity": Element(),
        "schedule": Cubic(0.8, begin=5, end=end, every=5),
    }
    return Pruner(model, optimizer, **{**policy, **change})


def data(begin: int, end: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(begin, end):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        x = torch.randn(16, 32, generator=generator)
        yield x, x[:, :8].sin()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int, seed: int = 0
) -> None:
    for x, y in data(begin, end, seed):
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def expect_exact_zeros(pruner: Pruner, optimizer: torch.optim.Optimizer) -> None:
    """Bit for bit +0.0 where dead, in the weight and in all state of its shape."""
    for layer in pruner.layers:
        dead = ~whole(layer.mask)
        state = optimizer.state[layer.parameter].values()
        for t in (layer.parameter, *(t for t in state if t.shape == layer.shape)):
            values = whole(t.detach())[dead]
            assert torch.equal(values.view(torch.int32), torch.zeros_like(values).int())


def test_a_thousand_steps_of_adamw_leave_every_dead_weight_exactly_zero() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer, end=500)
    for begin in range(0, 1000, 100):
        train(model, optimizer, begin, begin + 100)
        expect_exact_zeros(pruner, optimizer)
    units = sum(layer.units for layer in pruner.layers)
    assert sum(layer.alive_units for layer in pruner.layers) == units - round(0.8 * units)
    pruner.check()


def resume(path: str, begin: int, end: int) -> None:
    """What a new process does: start afresh, load, go on, save."""
    torch.manual_seed(123)
    model = make_model()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer)
    secateur.load(path, model, optimizer, pruner)
    train(model, optimizer, begin, end)
    secateur.save(path, model, optimizer, pruner)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """N + M steps are N, save, load in a new process, M; dropout and the average go on, too."""
    path, n, m = str(tmp_path / "run.safetensors"), 23, 27
    model = make_model()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer)
    train(model, optimizer, 0, n)
    secateur.save(path, model, optimizer, pruner)
    train(model, optimizer, n, n + m)

    code = f"import test_promises; test_promises.resume({path!r}, {n}, {n + m})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)

    resumed = make_model()
    resumed_optimizer = make_optimizer(resumed)
    resumed_pruner = make_pruner(resumed, resumed_optimizer)
    secateur.load(path, resumed, resumed_optimizer, resumed_pruner)
    assert resumed_pruner.steps == pruner.steps == n + m
    assert resumed_pruner.sparsity() == pruner.sparsity() > 0.7
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, resumed_optimizer.state[theirs][key])
    for name, mask in pruner.masks.items():
        assert torch.equal(resumed_pruner.masks[name], mask)


@pytest.mark.parametrize("granularity", [Element(), Block(16)], ids=repr)
def test_masks_change_without_a_recompilation(granularity: secateur.Granularity) -> None:
    torch._dynamo.reset()
    model = make_model()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer, granularity=granularity)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = set()
    for step in range(50):
        train(compiled, optimizer, step, step + 1)
        seen.add(pruner.sparsity())
    assert len(seen) > 5
    assert counter.frame_count == 1
    expect_exact_zeros(pruner, optimizer)


def train_together(wrap: Callable[[nn.Module], nn.Module], rank: int) -> None:
    model = wrap(make_model().eval())
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer, end=20)
    train(model, optimizer, 0, 30, seed=rank)
    expect_exact_zeros(pruner, optimizer)
    masks = {name: whole(mask) for name, mask in pruner.masks.items()}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, masks)
    assert all(torch.equal(everyone[0][name], everyone[1][name]) for name in masks)
    alive = sum(int(mask.sum()) for mask in masks.values())
    units = sum(layer.units for layer in pruner.layers)
    assert alive == units - round(0.8 * units)
    pruner.check()


def two_ranks(rank: int, size: int) -> None:
    """One loop with DistributedDataParallel, one with fully_shard, on other data each."""
    train_together(nn.parallel.DistributedDataParallel, rank)
    train_together(fully_shard, rank)


def test_two_ranks_with_different_data_keep_the_same_masks(tmp_path: Path) -> None:
    """Data-parallel and sharded; test_distributed.py compares the choice with the gathered one."""
    processes.run(2, tmp_path, two_ranks)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_step_that_the_scaler_skips(dtype: torch.dtype, fused: bool) -> None:
    model = make_model()
    optimizer = make_optimizer(model, fused=fused)
    pruner = make_pruner(model, optimizer, schedule=OneShot(0.5, at=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step, (x, y) in enumerate(data(0, 8)):
        with torch.autocast("cpu", dtype):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        if step in (2, 3, 4):
            model[0].weight.grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        if step in (2, 3, 4):
            assert all(map(torch.equal, before, model.parameters()))
        scaler.update()
        optimizer.zero_grad()
        assert (pruner.sparsity() > 0) == (step >= 6)  # the fourth step that counted
    assert pruner.steps == 5
    expect_exact_zeros(pruner, optimizer)


def test_tied_weights_are_pruned_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(32, 32), nn.Linear(32, 32)
            self.decode.weight = self.encode.weight
            self.shared = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.shared(self.shared(self.encode(x))).relu())[:, :8]

    model = Tied()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer)
    train(model, optimizer, 0, 50)
    assert [layer.name for layer in pruner.layers] == ["encode.weight", "shared.weight"]
    assert model.decode.weight is model.encode.weight
    assert pruner.sparsity() == pytest.approx(0.8, abs=1e-3)
    expect_exact_zeros(pruner, optimizer)


def through_pickle(parts: Any) -> Any:
    return pickle.loads(pickle.dumps(parts))


def through_torch_save(parts: Any) -> Any:
    """State dicts only, read by a torch.load that unpickles nothing else."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    model = make_model()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer)
    states = torch.load(file, weights_only=True)
    model.load_state_dict(states[0], strict=True)
    optimizer.load_state_dict(states[1])
    pruner.load_state_dict(states[2])
    return model, optimizer, pruner


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_go_on_as_the_original(copied: Callable[[Any], Any]) -> None:
    model = make_model()
    keys = list(model.state_dict())
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer)
    train(model, optimizer, 0, 22)
    assert list(model.state_dict()) == keys
    twin, twin_optimizer, twin_pruner = copied((model, optimizer, pruner))
    generator = torch.get_rng_state()
    train(model, optimizer, 22, 50)
    torch.set_rng_state(generator)
    train(twin, twin_optimizer, 22, 50)
    assert twin_pruner.sparsity() == pruner.sparsity() > 0.7
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    expect_exact_zeros(twin_pruner, twin_optimizer)


def nothing_matches(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer, include="layers.*")


def nothing_to_prune(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(nn.LayerNorm(3), optimizer)


def percent(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer, schedule=OneShot(90))


def schedule_backwards(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer, schedule=Cubic(0.9, begin=100, end=50))


def other_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, make_optimizer(make_model()))


def frozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model.requires_grad_(False), optimizer)


def twice(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer)
    make_pruner(model, optimizer)


def step_before_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer)
    optimizer.step()


def zeroed_before_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer, criterion=Taylor(), schedule=OneShot(0.5))
    train_once = next(data(0, 1))
    nn.functional.mse_loss(model(train_once[0]), train_once[1]).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def not_a_number(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()


def replaced(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer, schedule=OneShot(0.5, at=1))
    train(model, optimizer, 0, 1)
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    optimizer.add_param_group({"params": model[3].weight})
    train(model, optimizer, 1, 2)


def masks_all_true(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, optimizer).load_masks_from(make_model())


def lbfgs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    make_pruner(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (nothing_matches, r"got no match for \['layers\.\*'\]"),
        (nothing_to_prune, r"a model with weights to prune, got none: weight \(norm\)"),
        (percent, r"in \[0, 1\), got 90; for 90 % write 0\.9"),
        (schedule_backwards, "begin=100.*end=50"),
        (other_parameters, r"got one without \['0\.weight', '3\.weight', '5\.weight'\]"),
        (frozen, r"got none: 0\.weight \(frozen\)"),
        (twice, r"no other pruner prunes, got '0\.weight'"),
        (step_before_backward, r"'0\.weight' to have a gradient .* got None"),
        (zeroed_before_step, r"got only zeros: step after backward\(\) and before zero_grad\(\)"),
        (not_a_number, r"got NaN or Inf in '0\.weight' at step 0"),
        (replaced, r"the parameter '3\.weight' .* got another one in its place"),
        (masks_all_true, "masks that prune something, got only living weights"),
        (lbfgs, "got LBFGS"),
    ],
)
def test_what_would_do_nothing_is_refused(
    mistake: Callable[[nn.Module, torch.optim.Optimizer], None], message: str
) -> None:
    model = make_model()
    with pytest.raises((TypeError, ValueError)) as caught:
        mistake(model, make_optimizer(model))
    assert re.search(message, str(caught.value))
    assert "expected" in str(caught.value)


def test_what_did_nothing_is_reported() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    pruner = make_pruner(model, optimizer, granularity=Block(64), schedule=OneShot(0.5))
    train(model, optimizer, 0, 2)
    plan = repr(pruner)
    assert "1 due steps had nothing to do" in plan
    assert "the schedule has ended and nothing is pruned" in plan
    assert plan.count("kept its best unit") == 3
