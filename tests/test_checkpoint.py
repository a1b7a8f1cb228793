"""Checkpoints: resumed to the bit, whole whatever happens, refused before anything changes."""

from __future__ import annotations

import collections
import contextlib
import copy
import decimal
import enum
import errno
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import processes
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import Cubic, Element, Pruner, Taylor, checkpoint

# Building blocks.


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def make_pruner(model: nn.Module, optimizer: torch.optim.Optimizer) -> Pruner:
    schedule = Cubic(0.7, begin=0, end=12, every=2)
    return Pruner(
        model, optimizer, criterion=Taylor(ema=0.9), granularity=Element(), schedule=schedule
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> list[float]:
    """Losses of steps begin to end; the batch of a step depends on its number alone."""
    losses = []
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        loss = nn.functional.mse_loss(model(x), torch.randn(16, 4, generator=generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(kind: str = "adamw", steps: int = 5) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = make_pruner(model, optimizer)
    train(model, optimizer, 0, steps)
    return model, optimizer, pruner


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are of the same types and the same to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        flat = (t.detach().contiguous().resolve_neg().reshape(-1) for t in (a, b))
        return torch.equal(*(t.view(torch.uint8) for t in flat))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        keys = zip(a, b, strict=False)  # in this order; NaN is no key that could be looked up
        return (
            len(a) == len(b)
            and all(same(x, y) for x, y in keys)
            and all(same(x, y) for x, y in zip(a.values(), b.values(), strict=True))
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and str(a) == str(b))
    return bool(a == b)


def everything(*parts: Any) -> list[Any]:
    return [copy.deepcopy(part.state_dict()) for part in parts]


@contextlib.contextmanager
def unchanged(*parts: Any) -> Iterator[None]:
    before = everything(*parts)
    yield
    assert same(before, everything(*parts))


def round_trip(extra: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.safetensors"
        secateur.save(path, nn.Linear(1, 1), extra=extra)
        return secateur.load(path, nn.Linear(1, 1))


# Resuming.


def resume_in_this_process(directory: str) -> None:
    """What the new process of the next test does."""
    torch.set_num_threads(1)
    for kind, make in OPTIMIZERS.items():
        model = make_model(seed=1)
        optimizer = make(model.parameters())
        pruner = make_pruner(model, optimizer)
        at = secateur.load(f"{directory}/{kind}.safetensors", model, optimizer, pruner)["step"]
        losses = train(model, optimizer, at, at + 6)
        torch.save((losses, *everything(model, optimizer, pruner)), f"{directory}/{kind}.pt")


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path: Path, restore: None) -> None:
    torch.set_num_threads(1)
    expected = {}
    for kind in OPTIMIZERS:
        model, optimizer, pruner = trained(kind, steps=7)
        assert 0.3 < pruner.sparsity() < 0.65  # midway
        secateur.save(tmp_path / f"{kind}.safetensors", model, optimizer, pruner, extra={"step": 7})
        expected[kind] = (train(model, optimizer, 7, 13), *everything(model, optimizer, pruner))
    command = "import sys, test_checkpoint; test_checkpoint.resume_in_this_process(sys.argv[1])"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", command, str(tmp_path)], check=True, env=here)
    for kind, uninterrupted in expected.items():
        resumed = torch.load(tmp_path / f"{kind}.pt")
        assert same(list(resumed), list(uninterrupted)), kind


def test_several_optimizers_and_the_scheduler(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, list[torch.optim.Optimizer], Any]:
        model = make_model()
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(model[0].parameters()),
            torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9),
        ]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizers[1], [2, 3, 3, 9], gamma=0.5)
        return model, optimizers, scheduler

    model, optimizers, scheduler = make()
    for _ in range(4):
        model(torch.randn(5, 6)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
    path = tmp_path / "x.safetensors"
    secateur.save(path, model, tuple(optimizers), extra=scheduler.state_dict())
    fresh, fresh_optimizers, fresh_scheduler = make()
    fresh_scheduler.load_state_dict(secateur.load(path, fresh, fresh_optimizers))
    assert same(
        everything(fresh, *fresh_optimizers, fresh_scheduler),
        everything(model, *optimizers, scheduler),
    )
    assert isinstance(fresh_scheduler.milestones, collections.Counter)
    assert optimizers[1].param_groups[0]["lr"] == 0.1 * 0.5**3


def test_the_model_alone_can_be_loaded(tmp_path: Path) -> None:
    model, optimizer, pruner = trained()
    secateur.save(tmp_path / "x", model, optimizer, pruner, extra=[1])
    fresh = make_model(seed=1)
    assert secateur.load(tmp_path / "x", fresh) == [1]
    assert same(everything(fresh), everything(model))


def test_any_reader_of_safetensors_finds_the_weights(tmp_path: Path) -> None:
    model, optimizer, _ = trained()
    secateur.save(tmp_path / "x", model, optimizer)
    entries = safetensors.torch.load_file(tmp_path / "x")
    for key, value in model.state_dict().items():
        assert same(entries[f"model.{key}"], value)
    assert same(entries["optimizer.state[0].exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_hyper_parameters_come_back_as_they_were(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)

    def make(lr: Any, beta: float) -> torch.optim.Optimizer:
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
        return torch.optim.Adam(groups, lr=lr, betas=(beta, 0.99), foreach=False)

    optimizer = make(torch.tensor(0.1, dtype=torch.float64), 0.3)
    secateur.save(tmp_path / "x", model, optimizer)
    fresh = make(torch.tensor(0.2), 0.9)
    secateur.load(tmp_path / "x", model, fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())
    assert fresh.param_groups[0]["betas"] == (0.3, 0.99)


class Wide(torch.optim.Optimizer):
    """Keeps what torch would cast to the parameter's dtype, or take apart."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            generator = torch.Generator().manual_seed(0)
            self.state[parameter] = {
                "master": torch.randn(parameter.shape, generator=generator),
                "row": torch.randn(parameter.shape[0], generator=generator, dtype=torch.float64),
                "quantized": torch.arange(parameter.numel(), dtype=torch.uint8) + 250,
                "count": torch.tensor(2**40 + 1),
                "history": [torch.full((2,), 1 / 3), (torch.full((2,), 1 / 7), "name")],
                "nested": {"scale": torch.tensor(1 / 3), "kind": "int8"},
                "bf16": torch.ones(2, dtype=torch.bfloat16),
            }


def test_optimizer_state_keeps_its_dtype_whatever_the_parameter_has(tmp_path: Path) -> None:
    model = nn.Linear(5, 3, dtype=torch.bfloat16)
    optimizer = Wide(model.parameters())
    optimizer.step()
    secateur.save(tmp_path / "x", model, optimizer)
    fresh_model = nn.Linear(5, 3, dtype=torch.bfloat16)
    fresh = Wide(fresh_model.parameters())
    secateur.load(tmp_path / "x", fresh_model, fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())


def test_moments_are_strided_like_their_parameter(tmp_path: Path) -> None:
    """Fused optimizers on a GPU refuse others."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    secateur.save(tmp_path / "x", model, optimizer)
    fresh = torch.optim.AdamW(model.parameters())
    secateur.load(tmp_path / "x", model, fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())
    assert fresh.state[model.weight]["exp_avg"].stride() == model.weight.stride() != (27, 9, 3, 1)


def test_what_is_loaded_lives_on_without_the_file(tmp_path: Path) -> None:
    model, optimizer, pruner = trained()
    secateur.save(tmp_path / "x", model, optimizer, pruner, extra=torch.zeros(5000))
    extra = secateur.load(tmp_path / "x", model, optimizer, pruner)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps, to see which files are mapped")
    assert str(tmp_path) not in maps.read_text(encoding="utf-8")
    extra += 1
    assert same(secateur.load(tmp_path / "x", model), torch.zeros(5000))


# Wrappers.


class Versioned(nn.Linear):
    """A module whose state dict has a version."""

    _version = 7
    seen: Any = None

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        self.seen = local_metadata
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Inner(nn.Module):
    """Has a module that is named like what DataParallel adds."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        layer = Versioned(3, 3)
        self.module = nn.Sequential(torch.compile(layer) if compiled else layer, nn.Linear(3, 2))
        self.scale = nn.Parameter(torch.randn(3))


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "bare": lambda: Inner(False),
    "compiled": lambda: torch.compile(Inner(False)),  # type: ignore[dict-item]
    "compiled inside": lambda: Inner(True),
    "data parallel": lambda: nn.DataParallel(Inner(False)),
    "both": lambda: nn.DataParallel(torch.compile(Inner(True))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("saved", "loaded"), [*itertools.product(WRAPPED, WRAPPED)])
def test_a_file_knows_no_wrappers(saved: str, loaded: str, tmp_path: Path) -> None:
    source, target = WRAPPED[saved](), WRAPPED[loaded]()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    secateur.save(tmp_path / "x", source, optimizer)
    secateur.load(tmp_path / "x", target, torch.optim.SGD(target.parameters(), lr=0.1))
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert same(ours, theirs)
    (versioned,) = (m for m in target.modules() if isinstance(m, Versioned))
    assert versioned.seen["version"] == 7
    keys = {name for name in safetensors.torch.load_file(tmp_path / "x") if "model" in name}
    assert keys == {f"model.{name}" for name in Inner(False).state_dict()}


# Values.


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
)
DTYPES = sorted(checkpoint._CODES, key=str)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = torch.empty(0, dtype=dtype).element_size()
    values = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        values %= 2
    return values.reshape(-1).view(dtype).reshape(shape).transpose(0, -1 if shape else 0)


VALUES = st.recursive(
    SCALARS | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(SCALARS, inner, max_size=4)
        | st.dictionaries(SCALARS, inner, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(SCALARS, st.integers(), max_size=4).map(collections.Counter)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_nested_values_come_back_to_the_bit(value: Any) -> None:
    assert same(round_trip(value), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_as_weight_and_buffer(dtype: torch.dtype, tmp_path: Path) -> None:
    def make(fill: int) -> nn.Module:
        model = nn.Module()
        for i, shape in enumerate([(), (0, 3), (3,), (2, 5)]):
            model.register_buffer(f"b{i}", torch.full(shape, fill).to(dtype))
        return model

    model, fresh = make(1), make(0)
    secateur.save(tmp_path / "x", model)
    secateur.load(tmp_path / "x", fresh)
    assert same(everything(fresh), everything(model))


def test_every_tensor_is_aligned_for_those_who_map_the_file(tmp_path: Path) -> None:
    values = [torch.zeros(3, dtype=dtype) for dtype in DTYPES]
    secateur.save(tmp_path / "x", nn.Linear(3, 3), extra=values)
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    entries = json.loads(data[8 : 8 + size])
    for i, value in enumerate(values):
        assert entries[f"extra[{i}]"]["data_offsets"][0] % value.element_size() == 0


def test_places_that_read_alike_are_told_apart() -> None:
    value = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3)}
    value |= {"[1]": torch.tensor(4), "1": torch.tensor(5), "\ud800": torch.tensor(6)}
    assert same(round_trip(value), value)


def test_tied_weights_are_stored_once_and_restored_for_both(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(400, 8)
            self.head = nn.Linear(8, 400, bias=False)
            self.head.weight = self.embed.weight

    model, fresh = Tied(), Tied()
    ema = {"ema": model.state_dict(), "again": [model.embed.weight]}
    secateur.save(tmp_path / "x", model, extra=ema)
    assert list(safetensors.torch.load_file(tmp_path / "x")) == ["model.embed.weight"]
    extra = secateur.load(tmp_path / "x", fresh)
    assert fresh.head.weight is fresh.embed.weight
    assert same(fresh.head.weight, model.head.weight)
    assert extra["again"][0] is extra["ema"]["head.weight"] is extra["ema"]["embed.weight"]


def test_equal_memory_is_shared_only_where_it_is_read_alike() -> None:
    base = torch.arange(6.0)
    views = [base, base.view(2, 3), base.view(2, 3).t(), base[:3], base.view(torch.int32)]
    views += [torch._neg_view(base), torch.zeros(0), torch.zeros(0, 2)]
    assert same(round_trip(views), views)


def test_views_do_not_drag_their_base_along(tmp_path: Path) -> None:
    base = torch.randn(1000, 1000)
    views = [base[3], base[:, 3], base[::500, ::500], torch.ones(1).expand(2, 3)]
    secateur.save(tmp_path / "x", nn.Linear(1, 1), extra=views)
    assert (tmp_path / "x").stat().st_size < 12_000
    assert same(secateur.load(tmp_path / "x", nn.Linear(1, 1)), views)


class Color(enum.IntEnum):
    RED = 1


class Sub(Tensor):
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)
Pair = collections.namedtuple("Pair", "a b")

REFUSED: dict[str, Any] = {
    "object": object(),
    "set": {1},
    "bytes": b"x",
    "complex": 1j,
    "Decimal": decimal.Decimal(1),
    "function": len,
    "Color": Color.RED,
    "float64": np.float64(1),
    "int64": np.int64(1),
    "ndarray": np.zeros(2),
    "Pair": Pair(1, 2),
    "Size": torch.Size([1]),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "defaultdict": collections.defaultdict(int),
    "a Sub": torch.ones(1).as_subclass(Sub),
    "UninitializedParameter": nn.UninitializedParameter(),
    "sparse_coo": torch.eye(2).to_sparse(),
    "meta device": torch.ones(1, device="meta"),
    "complex64": torch.ones(1, dtype=torch.complex64),
    "tuple": {(1, 2): 3},
    "more": LOOP,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_by_its_place(name: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "x"
    path.write_bytes(b"old")
    for extra, place in (
        ({"a": [0, REFUSED[name]]}, r"extra\.a\[1\]"),
        ({3: {"b-c": (REFUSED[name],)}}, r"extra\[3\]\.b-c\[0\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"expected .* at {place}.*") as caught:
            secateur.save(path, model, extra=extra)
        assert name in str(caught.value)
    optimizer.param_groups[0]["foo"] = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=r"at optimizer\.param_groups\[0\]\.foo"):
        secateur.save(path, model, optimizer)
    with pytest.raises((TypeError, ValueError), match=r"at optimizer\[1\]\.param_groups\[0\]\.foo"):
        secateur.save(path, model, [torch.optim.SGD(model.parameters(), lr=0.1), optimizer])
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def test_nested_tensors_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    with pytest.raises(TypeError, match="at extra, got one of layout nested"):
        secateur.save(tmp_path / "x", nn.Linear(1, 1), extra=nested)


def test_a_header_that_no_reader_takes_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint._HEADER_LIMIT == 100_000_000
    monkeypatch.setattr(checkpoint, "_HEADER_LIMIT", 100_000)
    with pytest.raises(ValueError, match="expected at most 100,000 bytes"):
        secateur.save(tmp_path / "x", nn.Linear(1, 1), extra="x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_extra_state_of_modules_is_part_of_the_model(tmp_path: Path) -> None:
    class Stateful(nn.Module):
        def __init__(self, state: Any) -> None:
            super().__init__()
            self.state = state

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    state = {"scale": torch.ones(3), "history": (1, 2.5)}
    secateur.save(tmp_path / "x", nn.Sequential(Stateful(state)))
    model = nn.Sequential(Stateful({}))
    secateur.load(tmp_path / "x", model)
    assert same(model[0].state, state)
    with pytest.raises(ValueError, match=r"0\._extra_state in .* to be a tensor, got another"):
        secateur.load(tmp_path / "x", nn.Sequential(Stateful(torch.ones(3))))


# Whole or not at all.


def test_the_file_is_on_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        calls.append(("fsync", os.fstat(descriptor).st_ino, size))
        fsync(descriptor)

    def logged_replace(source: str, target: str) -> None:
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        assert Path(source).parent == Path(target).parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    path = tmp_path / "x"
    secateur.save(path, make_model())
    file = (path.stat().st_ino, path.stat().st_size)
    directory = (tmp_path.stat().st_ino, tmp_path.stat().st_size)
    assert calls == [("fsync", *file), ("replace", *file), ("fsync", *directory)]


def test_a_directory_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    code = errno.EINVAL

    def fsync_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "no")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files_only)
    secateur.save(tmp_path / "x", nn.Linear(1, 1), extra=3)
    assert secateur.load(tmp_path / "x", nn.Linear(1, 1)) == 3
    code = errno.EIO
    with pytest.raises(OSError, match="cannot save: no"):
        secateur.save(tmp_path / "x", nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    secateur.save(path, nn.Linear(1, 1), extra="old")

    def fail(*args: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(type(error)) as caught:
            secateur.save(path, nn.Linear(1, 1), extra="new")
    if isinstance(error, OSError):
        assert "cannot save: No space left" in str(caught.value)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [path]
    assert secateur.load(path, nn.Linear(1, 1)) == "old"


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    secateur.save(path, nn.Linear(1, 1), extra="old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot save: File too large"):
            secateur.save(path, nn.Linear(100, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path]
    assert secateur.load(path, nn.Linear(1, 1)) == "old"


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a directory that exists") as caught:
        secateur.save(tmp_path / "none" / "x", nn.Linear(1, 1))
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="expected a file to save to, got a directory"):
        secateur.save(tmp_path, nn.Linear(1, 1))
    with pytest.raises(IsADirectoryError):
        secateur.load(tmp_path, nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError):
        secateur.load(tmp_path / "x", nn.Linear(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_and_the_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "x")
    secateur.save(tmp_path / "link", nn.Linear(1, 1), extra=1)
    assert (tmp_path / "link").is_symlink()
    assert secateur.load(tmp_path / "scratch" / "x", nn.Linear(1, 1)) == 1
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "scratch" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def filled(value: int) -> nn.Module:
    model = nn.Linear(600, 300)  # some writes, whatever the buffer
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(value))
    return model


def check_whole(path: Path) -> int:
    """Which of the states of ``filled`` the file holds."""
    model = filled(-1)
    value: int = secateur.load(path, model)
    assert all(torch.all(p == value) for p in model.parameters())
    return value


def trace_writes(at_line: Callable[[], None]) -> None:
    """Call ``at_line`` before every line that puts a file in place."""

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            at_line()
        return local

    def entered(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        mine = code.co_filename == checkpoint.__file__
        return local if mine and code.co_name in ("_write", "_sync_directory") else None

    sys.settrace(entered)


def save_until_line(path: str, fatal: int) -> None:
    lines = itertools.count()

    def at_line() -> None:
        if next(lines) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    model = filled(1)
    trace_writes(at_line)
    secateur.save(path, model, extra=1)


def save_for_ever(path: str, started: Connection) -> None:
    torch.set_num_threads(1)
    for value in itertools.count(1):
        secateur.save(path, filled(value), extra=value)
        started.send(value)


@pytest.fixture(scope="module")
def forks() -> Any:
    """Starts a process in milliseconds: it is forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    imports = ("hypothesis.strategies", "numpy", "pytest", "safetensors.torch", "secateur")
    context.set_forkserver_preload(["torch.multiprocessing", *imports])
    return context


def test_a_process_killed_at_any_line_leaves_a_whole_file(forks: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    count = 0

    def at_line() -> None:
        nonlocal count
        count += 1

    before, model = sys.gettrace(), filled(0)
    try:
        trace_writes(at_line)
        secateur.save(path, model, extra=0)
    finally:
        sys.settrace(before)
    assert count > 15
    found, stale = [], 0
    for fatal in range(count):
        secateur.save(path, model, extra=0)
        child = forks.Process(target=save_until_line, args=(str(path), fatal))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found.append(check_whole(path))
        left = [p for p in tmp_path.iterdir() if p != path]
        stale += len(left)
        for temporary in left:
            assert temporary.name.startswith(f"saving-{child.pid}-")
            assert temporary.suffix == ".tmp"
            temporary.unlink()
    assert stale > 5
    assert found == sorted(found)  # old, then new from the rename on
    assert set(found) == {0, 1}


def test_a_process_killed_at_any_time_leaves_a_whole_file(forks: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    begin = time.perf_counter()
    secateur.save(path, filled(0), extra=0)
    duration = time.perf_counter() - begin
    for i in range(20):
        started, send = forks.Pipe(duplex=False)
        child = forks.Process(target=save_for_ever, args=(str(path), send))
        child.start()
        assert started.poll(60)
        time.sleep(random.Random(i).random() * 3 * duration)
        child.kill()
        child.join()
        assert check_whole(path) >= 1


# Damage.


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, bytes, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "x.safetensors"
    secateur.save(path, model, optimizer, extra={"é": [1, "A"]})
    assert secateur.load(path, model, optimizer) == {"é": [1, "A"]}
    return path, path.read_bytes(), model, optimizer


def test_no_byte_can_change(small: Any) -> None:
    path, data, model, optimizer = small
    generator = random.Random(0)
    with unchanged(model, optimizer):
        for i in range(len(data)):
            # 0x20 turns a hex digit's A into a, a space into NUL; any other bit may as well.
            flip = generator.choice((0x20, generator.randrange(1, 256)))
            path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            with pytest.raises(ValueError, match="expected") as caught:
                secateur.load(path, model, optimizer)
            assert str(path) in str(caught.value), i


def test_bytes_that_no_reader_cares_about_cannot_change_either(small: Any) -> None:
    path, data, model, _ = small
    digits = data.index(b"sha256") + 9
    escape = data.index(b"u00e9")
    for other in (
        data[:digits] + data[digits : digits + 64].upper() + data[digits + 64 :],
        data[:escape] + b"u00E9" + data[escape + 5 :],
    ):
        assert other != data
        path.write_bytes(other)
        assert safetensors.torch.load_file(path)
        with pytest.raises(ValueError, match="the file is damaged"):
            secateur.load(path, model)


def test_no_byte_can_be_missing_or_added(small: Any) -> None:
    path, data, model, optimizer = small
    lengths = {*range(0, len(data), 5), *range(len(data) - 80, len(data))}
    with unchanged(model, optimizer):
        for cut in [*(data[:i] for i in lengths), data[1:], data + b" ", data + data]:
            path.write_bytes(cut)
            with pytest.raises(ValueError, match=r"a whole checkpoint, got .*x\.safetensors"):
                secateur.load(path, model, optimizer)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    model = nn.Linear(2, 2)
    safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected a checkpoint .* got .*x, .* format 'pt'"):
        secateur.load(path, model)
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"expected a checkpoint .* got .*x, .* format None"):
        secateur.load(path, model)
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint, got .*x"):
        secateur.load(path, model)


@pytest.mark.parametrize(
    ("version", "message"), [(2, "takes a newer secateur"), (99, "newer"), (0, "of version '0'")]
)
def test_other_versions_are_refused(
    version: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        head = checkpoint._HEAD.replace(b'"version":"1"', b'"version":"%d"' % version)
        patch.setattr(checkpoint, "_HEAD", head)
        secateur.save(tmp_path / "x", model)
    with unchanged(model), pytest.raises(ValueError, match=message):
        secateur.load(tmp_path / "x", model)


@pytest.mark.parametrize(
    "structure",
    [
        "",
        "[" * 100_000,
        '{"object":["os.system"]}',
        '{"tensor":"none"}',
        '{"tensor":1}',
        '{"dict":[1]}',
        '{"float":"x"}',
        '{"dict":[],"tuple":[]}',
    ],
)
def test_a_forged_structure_is_refused(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = json.dumps
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda x, **kw: structure if kw else dumps(x))
        secateur.save(tmp_path / "x", nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"expected a structure in .*x, got none"):
        secateur.load(tmp_path / "x", nn.Linear(1, 1))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner = trained()
    secateur.save(tmp_path / "x", model, optimizer, pruner, extra=[torch.ones(2)])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", fail)
    monkeypatch.setattr(torch, "load", fail)
    secateur.load(tmp_path / "x", model, optimizer, pruner)


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    secateur.save(path, filled(1), extra=1)
    opened = checkpoint.safe_open
    times = 0

    def replace_and_open(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        times += 1
        if times == 1:
            secateur.save(path, filled(2), extra=2)
        return opened(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", replace_and_open)
    assert check_whole(path) == 2
    assert times == 2


# Misfits.


def other_model(*changes: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = make_model(seed=1)
    for change in changes:
        change(model)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](model.parameters())


def grouped(*names: list[str]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(
        [{"params": [model.get_parameter(name) for name in group]} for group in names], lr=0.1
    )


NAMES = [name for name, _ in make_model().named_parameters()]
SWAPPED = [NAMES[0], NAMES[2], NAMES[1], *NAMES[3:]]  # three of shape (8,) in a row

MISFITS: dict[str, tuple[Any, Any, str]] = {
    "missing": (
        other_model(lambda m: m.append(nn.Linear(4, 2))),
        None,
        r"got 2 missing \(4.weight, 4.bias\)$",
    ),
    "unexpected": (
        other_model(lambda m: m.pop(3)),
        None,
        r"2 unexpected \(3.weight, 3.bias\)$",
    ),
    "both": (
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.PReLU()),
        None,
        r"got 7 unexpected \(0.bias, 1.bias, 1.running_mean, 1.running_var, \.\.\.\)$",
    ),
    "shape": (
        other_model(lambda m: m.__setitem__(3, nn.Linear(9, 4))),
        None,
        r"expected 3.weight in .* to be torch.float32 \(4, 9\) .* got torch.float32 \(4, 8\)",
    ),
    "dtype": (
        other_model(lambda m: m[3].half()),
        None,
        r"3.weight .*float16.* got .*float32",
    ),
    "meta": (other_model(lambda m: m[3].to("meta")), None, "3.weight on the meta device"),
    "type": (
        make_model(),
        lambda m: torch.optim.Adam(m.parameters()),
        "to hold the state of a Adam, got AdamW",
    ),
    "groups": (make_model(), grouped(NAMES[:3], NAMES[3:]), r"groups of \[3, 3\] .* got \[6\]"),
    "number": (make_model(), grouped(NAMES[:-1]), r"groups of \[5\] parameters, got \[6\]"),
    "order": (
        make_model(),
        grouped(SWAPPED),
        r"of 1.weight of shape \(8,\) as parameter 1 of group 0 of AdamW, got 0.bias of",
    ),
    "parameter": (
        make_model(),
        lambda m: torch.optim.AdamW([*list(m.parameters())[:-1], nn.Parameter(torch.ones(3))]),
        r"of a parameter of shape \(3,\) as parameter 5 of group 0 .* got 3.bias of shape \(4,\)",
    ),
    "optimizers": (make_model(), lambda m: [adamw(m)] * 2, r"of 2 optimizer\(s\), got 1"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_fit_changes_nothing(name: str, tmp_path: Path) -> None:
    target, make, message = MISFITS[name]
    secateur.save(tmp_path / "x", *trained())
    optimizer = None if make is None else make(target)
    stateful = [] if optimizer is None or isinstance(optimizer, list) else [optimizer]
    watched = [part for part in (target, *stateful) if name != "meta"]
    with unchanged(*watched), pytest.raises(ValueError, match=message) as caught:
        secateur.load(tmp_path / "x", target, optimizer)
    assert name == "meta" or str(tmp_path) in str(caught.value)


def test_what_is_given_must_be_in_the_file(tmp_path: Path) -> None:
    model, optimizer, pruner = trained()
    secateur.save(tmp_path / "x", model)
    with pytest.raises(ValueError, match=r"state of 1 optimizer\(s\), got 0"):
        secateur.load(tmp_path / "x", model, optimizer)
    with pytest.raises(ValueError, match="the state of a pruner, got none"):
        secateur.load(tmp_path / "x", model, pruner=pruner)


def test_a_pruner_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    secateur.save(tmp_path / "x", *trained())
    model = make_model(seed=1)
    optimizer = adamw(model)
    pruner = Pruner(
        model,
        optimizer,
        criterion=Taylor(),
        granularity=Element(),
        schedule=Cubic(0.5, begin=0, end=9),
    )
    with (
        unchanged(model, optimizer, pruner),
        pytest.raises(ValueError, match="expected a state saved with criterion="),
    ):
        secateur.load(tmp_path / "x", model, optimizer, pruner)


def test_the_pruner_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner = trained()
    secateur.save(tmp_path / "x", model, optimizer, pruner)
    calls = []
    for part in (model, optimizer, pruner):
        monkeypatch.setattr(
            part, "load_state_dict", lambda state, part=part: calls.append(part) and None
        )
    secateur.load(tmp_path / "x", model, optimizer, pruner)
    assert [id(part) for part in calls] == [id(model), id(optimizer), id(pruner)]


def test_block_sparse_layers_of_another_pattern_are_refused(tmp_path: Path) -> None:
    def make(where: int) -> nn.Module:
        torch.manual_seed(where)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        for layer in model:
            with torch.no_grad():
                layer.weight[:32, 32 * where : 32 * where + 32] = 0
        return secateur.sparsify(model, block=32)

    model = make(0)
    secateur.save(tmp_path / "x", model)
    other = make(1)
    with unchanged(other), pytest.raises(ValueError, match=r"0.col_index in .* to be the pattern"):
        secateur.load(tmp_path / "x", other)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    secateur.load(tmp_path / "x", fresh)
    assert same(everything(fresh), everything(model))


def test_arguments_of_another_type_are_refused(tmp_path: Path) -> None:
    model, optimizer, pruner = trained()
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((model.state_dict(),), "expected model to be a torch.nn.Module, got OrderedDict"),
        ((model, pruner), "expected optimizer to be .* got Pruner"),
        ((model, [optimizer, None]), "expected optimizer to be .* got NoneType"),
        ((model, optimizer, optimizer), "expected pruner to be a Pruner or None, got AdamW"),
    ]
    secateur.save(tmp_path / "x", model, optimizer, pruner)
    for arguments, message in wrong:
        with pytest.raises(TypeError, match=message):
            secateur.save(tmp_path / "y", *arguments)
        with pytest.raises(TypeError, match=message):
            secateur.load(tmp_path / "x", *arguments)
    assert not (tmp_path / "y").exists()


# Several processes.


def sharded(seed: int, world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = deep(seed)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


def deep(seed: int) -> nn.Sequential:
    """7 and 1 rows, for shards that differ in size or are empty; a tied weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 1))
    model[2].weight = model[1].weight
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for i in range(count):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value: Any) -> Any:
    """A nested value with its DTensors gathered."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(whole, value))
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def two_ranks(rank: int, size: int, directory: str) -> None:
    """Load what one process saved; save; every failure of a save; DistributedDataParallel."""
    from torch.distributed.tensor import DTensor

    model, optimizer = sharded(1, 2)
    assert secateur.load(f"{directory}/one", model, optimizer) == "one"
    bare = deep(2)
    bare_optimizer = adamw(bare)
    secateur.load(f"{directory}/one", bare, bare_optimizer)
    assert same(whole(dict(model.state_dict())), dict(bare.state_dict()))
    assert same(whole(optimizer.state_dict()), bare_optimizer.state_dict())
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert isinstance(value, DTensor) == (key != "step")
            if key != "step":
                assert value.placements == parameter.placements
                local = value.to_local()
                assert local.untyped_storage().nbytes() == local.nbytes  # not the whole tensor

    # Onwards, saved on the way: the resumed run is the uninterrupted one.
    steps(model, optimizer, 2)
    secateur.save(f"{directory}/two", model, optimizer, extra=f"rank {rank}")
    assert os.path.exists(f"{directory}/two")
    steps(model, optimizer, 2)
    resumed, resumed_optimizer = sharded(3, 2)
    assert secateur.load(f"{directory}/two", resumed, resumed_optimizer) == "rank 0"
    steps(resumed, resumed_optimizer, 2)
    assert same(whole(dict(resumed.state_dict())), whole(dict(model.state_dict())))
    assert same(whole(resumed_optimizer.state_dict()), whole(optimizer.state_dict()))

    # Whatever fails on one rank fails on all, and none waits for ever.
    def fails(error: type[Exception], message: str, path: str = "two", **kwargs: Any) -> None:
        with pytest.raises(error, match=message):
            secateur.save(f"{directory}/{path}", model, optimizer, **kwargs)

    first = rank == 0
    fails(FileNotFoundError if first else RuntimeError, "directory that exists", path="none/x")
    fails(
        RuntimeError if first else TypeError,
        "got builtins.set",
        extra=0 if first else {1},
    )
    fails(ValueError, "the same DTensors", extra=model[0].weight.detach() if first else None)
    fails(ValueError, "the same DTensors", path="two" if first else "other")
    with pytest.raises(FileNotFoundError if first else RuntimeError, match="No such file"):
        secateur.load(f"{directory}/{'none' if first else 'two'}", model, optimizer)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        fails(OSError if first else RuntimeError, "No space left on device")

    class Failing:
        """A checksum in whose middle the disk is full."""

        def __init__(self, data: bytes) -> None:
            self.tensors = 0

        def update(self, data: Any) -> None:
            self.tensors += 1
            if self.tensors == 3:
                fail()

        def digest(self) -> bytes:
            return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashlib, "sha256", Failing)
        fails(OSError if first else RuntimeError, "No space left on device")
    plain, plain_optimizer = sharded(3, 2)
    assert secateur.load(f"{directory}/two", plain, plain_optimizer) == "rank 0"

    # DistributedDataParallel: one rank saves, with no other taking part.
    parallel = nn.parallel.DistributedDataParallel(make_model())
    if rank == 1:
        secateur.save(f"{directory}/ddp", parallel, adamw(parallel), extra=rank)
    dist.barrier()
    target = nn.parallel.DistributedDataParallel(make_model(seed=5))
    assert secateur.load(f"{directory}/ddp", target, adamw(target)) == 1
    assert same(everything(target), everything(parallel))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel

        flat = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"fully_shard .* got FullyShardedDataParallel"):
        secateur.save(f"{directory}/flat", flat)


def three_ranks(rank: int, size: int, directory: str) -> None:
    """Load what two ranks saved, and save it again."""
    model, optimizer = sharded(4, 3)
    extra = secateur.load(f"{directory}/two", model, optimizer)
    secateur.save(f"{directory}/three", model, optimizer, extra=extra)


def test_any_number_of_processes_loads_what_any_number_saved(tmp_path: Path) -> None:
    model = deep(0)
    optimizer = adamw(model)
    steps(model, optimizer, 3)
    secateur.save(tmp_path / "one", model, optimizer, extra="one")
    processes.run(2, tmp_path / "2", two_ranks, str(tmp_path))
    processes.run(3, tmp_path / "3", three_ranks, str(tmp_path))
    two = (tmp_path / "two").read_bytes()
    assert (tmp_path / "three").read_bytes() == two
    assert secateur.load(tmp_path / "two", model, optimizer) == "rank 0"
    secateur.save(tmp_path / "again", model, optimizer, extra="rank 0")
    assert (tmp_path / "again").read_bytes() == two
    entries = safetensors.torch.load_file(tmp_path / "two")
    assert "model.1.weight" in entries
    assert "model.2.weight" not in entries  # tied
    secateur.load(tmp_path / "ddp", make_model(), adamw(make_model()))
    assert not list(tmp_path.glob("*.tmp"))
