"""Pruning by several processes: DistributedDataParallel and fully_shard, over gloo."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import secateur
from secateur import Block, Cubic, Element, OneShot, Pruner, Taylor, Threshold
from secateur.shards import ALONE


class Net(nn.Module):
    """Rows that do not divide by 4, a shared layer, a convolution, a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.hidden = nn.Linear(24, 26)
        self.shared = nn.Linear(26, 26)
        self.narrow = nn.Linear(26, 3)  # fewer rows than processes
        self.scale = nn.Parameter(torch.rand(3) + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.view(-1, 1, 4, 4)).relu().flatten(1)
        y = self.shared(self.shared(self.hidden(y).relu()).relu())
        return self.narrow(y) * self.scale


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()  # so that sums in another order choose the same


def batches(count: int, rank: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a rank sees of common batches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        yield x.chunk(size)[rank], y.chunk(size)[rank]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    for name, p in model.named_parameters():  # what clipping sees
        if p.grad is not None and name.endswith("weight"):
            dead = whole(p.detach()) == 0
            assert torch.all(whole(p.grad)[dead] == 0), name
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def sharded(model: nn.Module) -> nn.Module:
    for module in (model.hidden, model.shared):
        fully_shard(module)
    return fully_shard(model)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@dataclass(frozen=True)
class Share(secateur.Criterion):
    """A user's criterion that looks at the whole layer."""

    def measure(self, weight: Tensor, grad: Tensor | None) -> Tensor:
        return weight.abs() / weight.abs().sum()


CHOICES: list[tuple[secateur.Criterion, secateur.Granularity, str]] = [
    (Taylor(), Element(), "global"),
    (Taylor(ema=0.8), Element(), "layer"),
    (secateur.Magnitude(keep="smallest"), Block(1, 4), "global"),
    (secateur.Entropy(), Element(), "global"),
    (secateur.Random(seed=5), Element(), "global"),
    (secateur.Random(seed=5), Block(1, 4), "layer"),
    (secateur.OBD(hessian="adam"), Element(), "global"),
    (secateur.Movement(), Block(1, 100), "layer"),
    (Share(), Element(), "global"),
]


def check_dead_are_zero(pruner: Pruner, optimizer: torch.optim.Optimizer) -> None:
    for layer in pruner.layers:
        dead = ~whole(layer.mask)
        for t in (layer.parameter, *optimizer.state[layer.parameter].values()):
            if t.shape == layer.shape:
                assert torch.all(whole(t.detach())[dead] == 0), layer.name


def shards_choose_as_the_whole(rank: int, size: int) -> None:
    """Bit for bit what is chosen on the gathered weights and gradients, step after step."""
    for criterion, granularity, scope in CHOICES:
        case = f"{criterion}, {granularity}, {scope}"
        policy = {
            "criterion": criterion,
            "granularity": granularity,
            "schedule": Cubic(0.7, begin=1, end=5, every=2),
            "scope": scope,
            "include": ["*.weight", "scale"],
        }
        model = sharded(make())
        optimizer = adamw(model)
        pruner = Pruner(model, optimizer, **policy)
        # A twin on one process is given the gathered weights, gradients and moments.
        twin = make()
        twin_optimizer = adamw(twin)
        alone = Pruner(twin, twin_optimizer, **policy, process_group=None)
        for batch in batches(6, rank, size):
            nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                theirs.grad = whole(ours.grad).clone()
            optimizer.step()
            twin_optimizer.step()
            for name, mask in alone.masks.items():
                assert torch.equal(whole(pruner.masks[name]), mask), (case, name)
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(whole(ours.detach()), theirs.detach()), case
            assert pruner.sparsity() == alone.sparsity(), case
            optimizer.zero_grad()
        assert 0.5 < pruner.sparsity() < 0.8, case
        assert [x.floor_held for x in pruner.layers] == [x.floor_held for x in alone.layers]
        check_dead_are_zero(pruner, optimizer)
        pruner.check()


def thresholds_are_shared(rank: int, size: int) -> None:
    model = sharded(make())
    optimizer = adamw(model)
    schedule = Threshold(1e-3, begin=0, end=5)
    pruner = Pruner(model, optimizer, criterion=Taylor(), granularity=Element(), schedule=schedule)
    for batch in batches(4, rank, size):
        step(model, optimizer, batch)
    assert 0 < pruner.sparsity() < 1
    check_dead_are_zero(pruner, optimizer)


def state_is_of_the_whole(rank: int, size: int) -> None:
    policy = {
        "criterion": Taylor(ema=0.8),
        "granularity": Element(),
        "schedule": Cubic(0.7, begin=1, end=8),
    }
    model = sharded(make())
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **policy)
    data = list(batches(8, rank, size))
    for batch in data[:4]:
        step(model, optimizer, batch)
    saved = pruner.state_dict()
    full = {k: whole(v).clone() for k, v in model.state_dict().items()}
    for name, mask in pruner.masks.items():
        bits = saved["layers"][name]["bits"]
        assert torch.equal(bits, secateur.ops.pack_mask(whole(mask)))
    assert len(saved["rng"]) == size
    drawn = torch.rand(3)
    pruner.load_state_dict(saved)
    assert torch.equal(torch.rand(3), drawn)

    # One process reads it, from running scores of the whole.
    alone = make()
    alone.load_state_dict(full)
    one = Pruner(alone, None, **policy, process_group=None)
    for layer in saved["layers"].values():
        layer["state"] = whole(layer["state"])
    one.load_state_dict(saved)
    for name, mask in one.masks.items():
        assert torch.equal(mask, whole(pruner.masks[name]))

    # And the sharded one reads that, and goes on as if nothing had happened.
    twin = sharded(make())
    twin_optimizer = adamw(twin)
    again = Pruner(twin, twin_optimizer, **policy)
    again.load_state_dict(one.state_dict())
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in data[4:]:
        step(model, optimizer, batch)
        step(twin, twin_optimizer, batch)
    for name, mask in pruner.masks.items():
        assert torch.equal(whole(mask), whole(again.masks[name]))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(a.detach()), whole(b.detach()))


def masks_go_in_and_out(rank: int, size: int) -> None:
    source = make(seed=3)
    masks = secateur.prune_(source, secateur.Magnitude(), Element(), sparsity=0.5)
    shards = sharded(make(seed=3))
    for name, mask in secateur.prune_(
        shards, secateur.Magnitude(), Element(), sparsity=0.5
    ).items():
        assert torch.equal(whole(mask), masks[name]), name
    model = sharded(make())
    optimizer = adamw(model)
    pruner = Pruner(
        model, optimizer, criterion=Taylor(), granularity=Element(), schedule=OneShot(0.5, at=9)
    )
    pruner.load_masks_from(source)
    average = sharded(make(seed=4))
    pruner.mask_(average)
    for name, mask in masks.items():
        assert torch.equal(whole(pruner.masks[name]), mask)
        assert torch.all(whole(average.get_parameter(name).detach())[~mask] == 0)
    for batch in batches(3, rank, size):
        step(model, optimizer, batch)
    check_dead_are_zero(pruner, optimizer)


def raises(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        call()
    dist.barrier()  # a rank that had not raised would not get here


def misfits_are_refused(rank: int, size: int) -> None:
    good = {"criterion": Taylor(), "granularity": Element(), "schedule": OneShot(0.5)}
    each = -(-26 // size)
    model = sharded(make())
    optimizer = adamw(model)
    raises(
        ValueError,
        rf"units of 4 rows, got 'conv.weight' of 6 rows in shards of {-(-6 // size)} over {size} "
        rf"processes: a number of rows that is a multiple of {4 * size} works",
        lambda: Pruner(model, optimizer, **{**good, "granularity": Block(4)}),
    )
    assert each * size >= 26
    raises(
        ValueError,
        "sharded alike or not at all, got 'conv.weight' not sharded and 'hidden.weight' placed as",
        lambda: Pruner(partly, adamw(partly), **good) if (partly := half_sharded()) else None,
    )
    raises(
        TypeError,
        r"fully_shard \(FSDP2\), got FullyShardedDataParallel \(FSDP1\)",
        lambda: Pruner(flattened, adamw(flattened), **good) if (flattened := fsdp1()) else None,
    )
    different = {**good, "schedule": OneShot(0.5 if rank else 0.6)}
    raises(
        ValueError,
        r"the same settings, got .*0\.6.* on rank 0 and .*0\.5.* on rank 1",
        lambda: Pruner(model, optimizer, **different),
    )
    pruner = Pruner(model, optimizer, **good)
    (x, y), *_ = batches(1, rank, size)
    nn.functional.mse_loss(model(x), y).backward()
    local = model.hidden.weight.grad.to_local()
    if rank == size - 1:
        local[0, 0] = float("nan")
    raises(ValueError, r"NaN or Inf in 'hidden.weight' at step 0", optimizer.step)
    if rank == size - 1:
        local[0, 0] = 0
    optimizer.step()
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)
    if rank == 1:
        with torch.no_grad():
            model.hidden.weight.to_local().fill_(1)
    raises(ValueError, r"dead weights of 'hidden.weight' to be zero in the model", pruner.check)


def fsdp1() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and looks for a GPU
        return FullyShardedDataParallel(make(), device_id=torch.device("cpu"))


def half_sharded() -> nn.Module:
    model = make()
    fully_shard(model.hidden)
    return model


def hybrid_shards(rank: int, size: int) -> None:
    """Two copies of two shards each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(make(), mesh=mesh)
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Element(),
        schedule=Cubic(0.7, begin=0, end=4),
    )
    assert (pruner.split.shards.size, pruner.split.copies.size) == (2, 2)
    for batch in batches(6, rank, size):
        step(model, optimizer, batch)
    assert pruner.sparsity() == pytest.approx(0.7, abs=1e-3)
    check_dead_are_zero(pruner, optimizer)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, {k: whole(m) for k, m in pruner.masks.items()})
    for masks in everyone:
        assert all(torch.equal(masks[name], everyone[0][name]) for name in masks)


def data_parallel_ranks_agree(rank: int, size: int) -> None:
    """Other data, other seeds; the pruner made before or after the model is wrapped."""
    for criterion in (Taylor(ema=0.9), secateur.Random(seed=rank), secateur.Magnitude()):
        for before in (True, False):
            model = make(seed=rank)  # DDP broadcasts rank 0's weights
            policy = {
                "criterion": criterion,
                "granularity": Block(2),
                "schedule": Cubic(0.8, begin=0, end=6, every=2),
            }
            optimizer = adamw(model)
            pruner = Pruner(model, optimizer, **policy) if before else None
            wrapped = nn.parallel.DistributedDataParallel(model)
            pruner = pruner or Pruner(wrapped, optimizer, **policy)
            for batch in batches(8, rank, size):
                step(wrapped, optimizer, batch)
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, (pruner.masks, model.state_dict(), pruner.criterion))
            assert pruner.sparsity() > 0.7
            for masks, weights, theirs in everyone:
                assert theirs == pruner.criterion
                assert all(torch.equal(masks[k], v) for k, v in pruner.masks.items())
                assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def data_parallel_in_all_its_ways(rank: int, size: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    policy = {
        "criterion": Taylor(ema=0.9),
        "granularity": Element(),
        "schedule": Cubic(0.8, begin=0, end=6, every=2),
    }
    for options in (
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"process_group": dist.new_group(list(range(size)))},
    ):
        model = nn.parallel.DistributedDataParallel(make(), **options)
        optimizer = adamw(model)
        pruner = Pruner(model, optimizer, **policy)
        for i, batch in enumerate(batches(16, rank, size)):
            if i % 2 == 0 and "static_graph" not in options:  # torch refuses the pair
                with model.no_sync():
                    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
            else:
                step(model, optimizer, batch)
        assert pruner.sparsity() == pytest.approx(0.8, abs=1e-3)
        check_dead_are_zero(pruner, optimizer)
        pruner.check()
    model = make()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adamax, lr=1e-2)
    pruner = Pruner(model, optimizer, **policy)
    for batch in batches(8, 0, 1):  # the same everywhere
        step(model, optimizer, batch)
    check_dead_are_zero(pruner, optimizer.optim)


def ranks_that_differ_are_refused(rank: int, size: int) -> None:
    model = make()
    optimizer = adamw(model)
    policy = {"criterion": Taylor(), "granularity": Element(), "schedule": OneShot(0.5)}
    pruner = Pruner(model, optimizer, **policy)  # gradients are never synchronised
    (x, y), *_ = batches(1, rank, size)
    nn.functional.mse_loss(model(x), y).backward()
    raises(ValueError, r"the same masks at step 0, got others on ranks \[1", optimizer.step)
    assert pruner.sparsity() == 0
    pruner.remove()
    own = Pruner(model, optimizer, **policy, process_group=None)
    optimizer.step()
    assert own.sparsity() == pytest.approx(0.5, abs=1e-3)
    raises(TypeError, "got one that works with others", lambda: pickle.dumps(pruner))
    own.remove()

    # Where one rank fails, none is left waiting.
    model = make()
    optimizer = adamw(model)
    pruner = Pruner(model, optimizer, **policy)
    (x, y), *_ = batches(1, 0, 1)
    nn.functional.mse_loss(model(x), y).backward()
    if rank == 1:
        model.hidden.weight.grad[0, 0] = float("nan")
    error = ValueError if rank == 1 else RuntimeError
    raises(error, r"NaN or Inf in 'hidden.weight'", optimizer.step)
    half = make()
    secateur.prune_(half, secateur.Magnitude(), Element(), sparsity=0.5)
    raises(
        error,
        "masks that prune something",
        lambda: pruner.load_masks_from(make() if rank == 1 else half),
    )
    pruner.steps = rank
    raises(ValueError, r"at the same step, got steps \[0, 1", pruner.check)
    # Swapped bits in one column are a difference, too.
    pruner.steps = 0
    masks = {name: torch.ones_like(mask) for name, mask in pruner.masks.items()}
    masks["shared.weight"] = torch.zeros(26, 64, dtype=torch.bool)[:, :26]
    masks["shared.weight"][[0, 3] if rank == 0 else [1, 2], 5] = True
    raises(ValueError, "others on ranks", lambda: pruner.load_masks_from(masks))


def a_pruner_made_too_early_is_refused(rank: int, size: int) -> None:
    model = make()
    optimizer = adamw(model)
    pruner = Pruner(
        model, optimizer, criterion=Taylor(), granularity=Element(), schedule=OneShot(0.5)
    )
    pruner.split, pruner._expects_group = ALONE, True  # as before init_process_group
    (x, y), *_ = batches(1, 0, 1)
    nn.functional.mse_loss(model(x), y).backward()
    raises(ValueError, "to be made after init_process_group", optimizer.step)


def run_all(rank: int, size: int, checks: tuple[Callable[[int, int], None], ...]) -> None:
    for check in checks:
        check(rank, size)


SHARDED = (
    shards_choose_as_the_whole,
    thresholds_are_shared,
    state_is_of_the_whole,
    masks_go_in_and_out,
    misfits_are_refused,
)
PARALLEL = (
    data_parallel_ranks_agree,
    data_parallel_in_all_its_ways,
    ranks_that_differ_are_refused,
    a_pruner_made_too_early_is_refused,
)


@pytest.mark.parametrize(
    ("size", "checks"), [(2, (*SHARDED, *PARALLEL)), (4, (*SHARDED, hybrid_shards))]
)
def test_processes(size: int, checks: tuple[Any, ...], tmp_path: Path) -> None:
    processes.run(size, tmp_path, run_all, checks)
