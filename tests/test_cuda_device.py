"""What only a GPU can tell of the CUDA kernels: streams, graphs, devices, sizes, the CPU's bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_ops import check_close, to_cpu
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

import secateur
from secateur import ops
from secateur.ops._spec import OpSpec, Sample

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

DEVICE = torch.device("cuda")
SLEEP = 100_000_000  # GPU cycles: longer than any launch takes to be queued
SAMPLES_EACH = 24  # of an op; the first of some are empty

each_spec = pytest.mark.parametrize("spec", ops.SPECS, ids=lambda spec: spec.name)


def each_case_of(specs: Iterable[OpSpec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("spec", "dtype"),
        [
            pytest.param(spec, dtype, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}")
            for spec in specs
            for dtype in spec.dtypes
        ],
    )


def some(spec: OpSpec) -> list[Sample]:
    """In float32 and bfloat16, which some kernels are told apart by."""
    samples = [s for dtype in spec.dtypes[:2] for s in spec.samples(dtype, DEVICE)]
    return samples[:: max(1, len(samples) // SAMPLES_EACH)]


def tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]


def fill(into: Any, values: Any) -> None:
    for a, b in zip(tensors(into), tensors(values), strict=True):
        a.copy_(b)


def turned(values: Any) -> Any:
    """Other numbers of the same sizes: floating point back to front, masks and indices as they are.

    Not where some numbers may stand only where they do, beyond the edge of a matrix.
    """

    def turn(t: Tensor) -> Tensor:
        return t.flatten().flip(0).view(t.shape) if t.is_floating_point() else t

    return tree_map_only(Tensor, turn, values)


# Matrix products, the ops that are differentiable, add up in another order.
@each_case_of(spec for spec in ops.SPECS if not spec.differentiable)
def test_scores_and_masks_have_the_bits_of_the_cpu(spec: OpSpec, dtype: torch.dtype) -> None:
    for sample in spec.samples(dtype, DEVICE):
        ours, theirs = sample.args, to_cpu(copy.deepcopy(sample.args))
        got, want = spec.op(*ours), spec.op(*theirs)
        check_close(to_cpu((got, ours)), (want, theirs), exact=True, case=sample.name)


@each_case_of(ops.SPECS)
def test_results_repeat_bit_for_bit(spec: OpSpec, dtype: torch.dtype) -> None:
    for sample in spec.samples(dtype, DEVICE):
        first, second = sample.args, copy.deepcopy(sample.args)
        check_close((spec.op(*first), first), (spec.op(*second), second), True, sample.name)


@each_spec
def test_kernels_run_on_the_current_stream(spec: OpSpec) -> None:
    """On any other they would read what is there before the copies, which wait."""
    stream = torch.cuda.Stream()
    for sample in some(spec):
        theirs = to_cpu(copy.deepcopy(sample.args))
        ours = tree_map_only(Tensor, torch.zeros_like, sample.args)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            fill(ours, sample.args)
            got = spec.op(*ours)
        stream.synchronize()
        want = spec.reference(*theirs)
        check_close(to_cpu((got, ours)), (want, theirs), spec.exact, sample.name)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # an empty tensor takes no kernel
@each_spec
def test_ops_are_captured_in_graphs_and_replayed_on_other_numbers(spec: OpSpec) -> None:
    for sample in some(spec):
        if "garbage" in sample.name:
            continue
        ours = copy.deepcopy(sample.args)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            spec.op(*copy.deepcopy(ours))  # what is done once is done before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # raises where the host waits for the GPU
            got = spec.op(*ours)
        for values in (sample.args, turned(sample.args), sample.args):
            fill(ours, values)
            graph.replay()
            theirs = to_cpu(copy.deepcopy(values))
            want = spec.reference(*theirs)
            check_close(to_cpu((got, ours)), (want, theirs), spec.exact, sample.name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_spec
def test_kernels_run_where_their_tensors_are(spec: OpSpec) -> None:
    other = torch.device("cuda", 1)
    for sample in some(spec):
        ours = tree_map_only(Tensor, lambda t: t.to(other), sample.args)
        theirs = to_cpu(copy.deepcopy(sample.args))
        got, want = spec.op(*ours), spec.reference(*theirs)
        assert torch.cuda.current_device() == 0
        assert all(t.device == other for t in tensors(got))
        check_close(to_cpu((got, ours)), (want, theirs), spec.exact, sample.name)


OTHERS = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda", 1),
        marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    ),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@each_spec
def test_tensors_on_two_devices_are_refused(spec: OpSpec, other: torch.device) -> None:
    (sample,) = (s for i, s in enumerate(spec.samples(spec.dtypes[0], DEVICE)) if i == 4)
    flat, structure = tree_flatten(sample.args)
    places = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]
    for i in places if len(places) > 1 else []:
        moved = [a.to(other) if j == i else a for j, a in enumerate(flat)]
        with pytest.raises(RuntimeError, match=f"{spec.name}: expected .* device"):
            spec.op(*structure.unflatten(moved))


# 2**31 elements and some, of two bytes, and as much again for what is made of them.
MANY = 2**31 + 1000


@contextmanager
def room(gigabytes: float) -> Iterator[None]:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def marked(bits: Tensor, numel: int) -> Tensor:
    """The indices of the ones; unpacking all of so many would take eight times the memory."""
    found = bits.nonzero().flatten()
    mask = ops.unpack_mask(bits[found], (8 * len(found),)).view(-1, 8)
    index = (found[:, None] * 8 + torch.arange(8, device=DEVICE))[mask]
    assert bool((index < numel).all())
    return index


def spread() -> Tensor:
    """Indices below and above 2**31, the last among them."""
    return torch.tensor([0, 7, 2**20, 2**31 - 1, 2**31, 2**31 + 501, MANY - 1], device=DEVICE)


def test_masks_of_more_than_2_to_the_31_elements_are_packed_and_unpacked() -> None:
    with room(8):
        mask = torch.zeros(MANY, dtype=torch.bool, device=DEVICE)
        mask[spread()] = True
        bits = ops.pack_mask(mask)
        assert torch.equal(marked(bits, MANY), spread())
        assert torch.equal(ops.unpack_mask(bits, mask.shape), mask)


def test_more_than_2_to_the_31_elements_are_masked() -> None:
    with room(8):
        weight = torch.ones(MANY, dtype=torch.bfloat16, device=DEVICE)
        bits = torch.zeros((MANY + 7) // 8, dtype=torch.uint8, device=DEVICE)
        bits.index_add_(0, spread() // 8, (1 << spread() % 8).to(torch.uint8))
        assert ops.mask_([weight], [bits]).tolist() == [True]
        assert int(weight.count_nonzero()) == len(spread())
        assert torch.equal(weight[spread()], torch.ones_like(weight[: len(spread())]))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_best_of_more_than_2_to_the_31_elements_are_selected(parts: int) -> None:
    with room(10):
        weight = torch.zeros(MANY, dtype=torch.bfloat16, device=DEVICE)
        weight[spread()] = -torch.arange(1, 8, device=DEVICE, dtype=weight.dtype)
        pieces = list(weight.chunk(parts))
        bits = ops.select(pieces, formula="magnitude", keep=5)
        first, found = 0, []
        for piece, b in zip(pieces, bits, strict=True):
            found.append(marked(b, piece.numel()) + first)
            first += piece.numel()
        assert torch.equal(torch.cat(found), spread()[2:])
        # Of equal scores the first are taken: all that is kept beside these is at the front.
        bits = ops.select(pieces, formula="magnitude", keep=107)
        assert torch.equal(marked(bits[0], pieces[0].numel())[:102], torch.arange(102).to(DEVICE))


def test_groups_of_more_than_2_to_the_31_elements_are_masked() -> None:
    with room(8):
        weight = torch.zeros(2**20 + 1, 2048, dtype=torch.bfloat16, device=DEVICE)
        weight[:, 3::4] = 1
        bits = ops.nm_mask(weight, formula="magnitude", n=1, m=4)
        assert bool((bits == 0b10001000).all())


@pytest.mark.parametrize("block", [(1, 1), (1, 2048), (64, 64), (2**20 + 1, 1)])
def test_more_than_2_to_the_31_elements_are_scored(block: tuple[int, int]) -> None:
    with room(16):
        weight = torch.zeros(2**20 + 1, 2048, dtype=torch.bfloat16, device=DEVICE)
        weight[-1, -1] = -3
        scores = ops.score(weight, formula="magnitude", block=block, reduce="sum")
        assert float(scores[-1, -1]) == 3
        assert int(scores.count_nonzero()) == 1


def test_products_of_more_than_2_to_the_31_elements() -> None:
    with room(20):
        rows, features = 2**17 + 1, 2**14
        mask = torch.zeros(features // 32, features // 32, dtype=torch.bool, device=DEVICE)
        mask[-1, -1] = mask[0, 0] = True
        dense = torch.zeros(features, features, dtype=torch.bfloat16, device=DEVICE)
        dense[-1, -1], dense[0, 0] = 2, 3
        weight = secateur.BlockSparse.from_dense(dense, 32, mask)
        x = torch.zeros(rows, features, dtype=torch.bfloat16, device=DEVICE)
        x[-1, -1], x[0, 0] = 5, 7
        y = ops.block_sparse_linear(x, weight)
        assert (float(y[-1, -1]), float(y[0, 0]), int(y.count_nonzero())) == (10, 21, 2)
        pattern = weight.pattern.tensors()
        dx, dw = torch.ops.secateur.block_sparse_linear_backward(y, x, weight.values, *pattern)
        assert (float(dx[-1, -1]), float(dx[0, 0]), int(dx.count_nonzero())) == (20, 63, 2)
        assert (float(dw[-1, -1, -1]), float(dw[0, 0, 0]), int(dw.count_nonzero())) == (50, 147, 2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 64))


@pytest.mark.parametrize("granularity", [secateur.Element(), secateur.Block(8)], ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_model_is_pruned_as_on_the_cpu(granularity: secateur.Granularity, scope: str) -> None:
    masks = {}
    for device in ("cpu", "cuda"):
        pruned = model().to(device)
        for i, p in enumerate(pruned.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device)
        masks[device] = secateur.prune_(
            pruned, secateur.Taylor(), granularity, sparsity=0.8, scope=scope
        )
    assert masks["cpu"].keys() == masks["cuda"].keys()
    for name, mask in masks["cuda"].items():
        assert torch.equal(mask.cpu(), masks["cpu"][name]), name


def test_a_model_that_is_pruned_and_made_sparse_trains() -> None:
    net = model().to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = secateur.OneShot(0.9, at=2)
    pruner = secateur.Pruner(
        net,
        optimizer,
        criterion=secateur.Taylor(),
        granularity=secateur.Block(8),
        schedule=schedule,
    )
    x, y = torch.randn(64, 96, device=DEVICE), torch.randn(64, 64, device=DEVICE)

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = nn.functional.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    train(5)
    assert pruner.sparsity() == pytest.approx(0.9, abs=0.01)
    secateur.sparsify(net, optimizer)
    losses = train(30)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_as_for_a_linear_layer(dtype: torch.dtype) -> None:
    weight = secateur.BlockSparse.from_dense(torch.randn(64, 96, device=DEVICE), 16)
    with torch.autocast("cuda", dtype=dtype):
        assert ops.block_sparse_linear(torch.randn(8, 96, device=DEVICE), weight).dtype == dtype


def same_error(run: Callable[[str], Any]) -> None:
    """What the wrapper refuses, it refuses in the same words on both devices."""
    words = {}
    for device in ("cpu", "cuda"):
        with pytest.raises((TypeError, ValueError)) as error:
            run(device)
        words[device] = (error.type, str(error.value).replace("cuda:0", "cpu"))
    assert words["cpu"] == words["cuda"]


def test_wrappers_refuse_in_the_words_of_the_cpu() -> None:
    def ones(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    same_error(lambda d: ops.pack_mask(ones(d, 3)))
    same_error(lambda d: ops.mask_([ones(d, 9)], [ones(d, 1, dtype=torch.uint8)]))
    same_error(lambda d: ops.score(ones(d, 3, dtype=torch.int32), formula="magnitude"))
    same_error(lambda d: ops.score(ones(d, 3), ones(d, 4), formula="taylor"))
    same_error(lambda d: ops.select([ones(d, 3)], formula="magnitude", keep=4))
    same_error(lambda d: ops.nm_mask(ones(d, 3), formula="magnitude", n=5, m=4))


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_wrappers_name_the_two_devices(place: str) -> None:
    here, there = torch.ones(8, device=DEVICE), torch.ones(8, device="cpu")
    if place == "cpu":
        here, there = there, here
    wanted = f"on the device of weight, {here.device}, got {there.device}"
    with pytest.raises(ValueError, match=wanted):
        ops.score(here, there, formula="taylor")
    with pytest.raises(ValueError, match=f"on {here.device} for a tensor of shape"):
        ops.mask_([here], [torch.zeros(1, dtype=torch.uint8, device=there.device)])
    with pytest.raises(ValueError, match=f"one device, got {here.device} and, .*{there.device}"):
        ops.select([here, there], formula="magnitude", keep=1)
