"""Selection over processes: bit for bit that of one process, and errors on all of them alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from secateur import ops
from secateur.ranks import Ranks

# Few rows, one row, none; more elements than one chunk of the kernels.
SHAPES = ((5, 13), (1, 9), (64, 48), (7,), (3, 4, 2), (0, 3), (101, 99))
NAN = math.nan


def draw(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def rows(ranks: Ranks, whole: Tensor) -> Tensor:
    """What fully_shard leaves to a rank."""
    parts = whole.chunk(ranks.size)
    return parts[ranks.rank] if ranks.rank < len(parts) else whole[:0]


def rows_of_bits(ranks: Ranks, bits: Tensor, whole: Tensor) -> Tensor:
    return ops.pack_mask(rows(ranks, ops.unpack_mask(bits, whole.shape)))


def check_select(ranks: Ranks, case: str, whole: dict[str, Any], **call: Any) -> None:
    weights = whole["weights"]
    part = {name: [rows(ranks, t) for t in tensors] for name, tensors in whole.items()}
    if "alive" in call:
        bits = call.pop("alive")
        call["alive"] = [rows_of_bits(ranks, b, w) for b, w in zip(bits, weights, strict=True)]
        want = ops.select(**whole, **(call | {"alive": bits}))
    else:
        want = ops.select(**whole, **call)
    got = ranks.select(**part, **call)
    assert len(got) == len(want), case
    for i, (mask, bits) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mask, rows_of_bits(ranks, bits, weights[i])), f"{case}, weights[{i}]"


def check_selections(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for ties in (False, True):
            weights, grads = draw(0, dtype), draw(1, dtype)
            if ties:
                weights, grads = ([t.round() for t in ts] for ts in (weights, grads))
            states = [t.abs().to(ops.compute_dtype(dtype)) for t in grads]
            lives = [t < 0.6 for t in draw(2, torch.float32)]
            alive = [ops.pack_mask(t) for t in lives]
            living = sum(int(t.sum()) for t in lives)
            total = sum(t.numel() for t in weights)
            by_weight = {"weights": weights}
            by_grad = by_weight | {"grads": grads}
            by_state = by_weight | {"states": states}
            for formula, largest, whole, some in (
                ("magnitude", True, by_weight, {}),
                ("magnitude", False, by_weight, {"alive": alive}),
                ("taylor", True, by_grad, {"alive": alive}),
                ("movement", False, by_grad, {}),
                ("obd", True, by_state, {"alive": alive}),
            ):
                call = {"formula": formula, "largest": largest, "normalizers": [0.7] * 7}
                case = f"{call} {dtype} {ties=}"
                n = living if some else total
                for keep in (0, n // 3, n):
                    check_select(ranks, f"{case} {keep=}", whole, **call, **some, keep=keep)
                check_select(ranks, f"{case} threshold", whole, **call, **some, threshold=0.5)


def check_ties(ranks: Ranks) -> None:
    """Every possible count, so every rank and weight is once where the ties end."""
    weights = [torch.ones(5, 2), torch.zeros(3), torch.ones(1, 3), torch.ones(7)]
    for keep in range(24):
        check_select(ranks, f"ties, {keep=}", {"weights": weights}, formula="magnitude", keep=keep)


def check_neighbours(ranks: Ranks) -> None:
    """Scores whose keys follow one another: nothing less than the exact key tells them apart."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        steps = torch.randint(5000, (30, 90), generator=generator)
        weights = [1 + steps.to(dtype) * torch.finfo(dtype).eps]
        for keep in (10, 1234, 2600):
            check_select(
                ranks, f"{dtype} {keep=}", {"weights": weights}, formula="given", keep=keep
            )


def check_no_weights(ranks: Ranks) -> None:
    assert ranks.select([], formula="magnitude", keep=0) == []
    check_raises(ValueError, "between 0 and 0", ranks.select, [], formula="magnitude", keep=1)
    empty = {"weights": [torch.empty(0, 3)]}
    check_select(ranks, "no elements", empty, formula="magnitude", keep=0)


def check_raises(
    error: type[Exception], words: str, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Exception:
    with pytest.raises(error, match=words) as caught:
        call(*args, **kwargs)
    assert caught.type is error
    return caught.value


def check_errors(ranks: Ranks) -> None:
    last = ranks.size - 1
    weights, grads = draw(0, torch.float32), draw(1, torch.float32)
    total = sum(t.numel() for t in weights)
    part = {
        "weights": [rows(ranks, t) for t in weights],
        "grads": [rows(ranks, t) for t in grads],
        "formula": "taylor",
    }
    for keep in (total + 1, -1):
        words = f"between 0 and {total}, the number of alive elements, got {keep}"
        check_raises(ValueError, words, ranks.select, **part, keep=keep)
    check_raises(TypeError, "int, got True", ranks.select, **part, keep=True)
    check_raises(ValueError, "one of keep and threshold", ranks.select, **part)
    check_raises(
        ValueError, "one of keep and threshold", ranks.select, **part, keep=1, threshold=0.5
    )
    check_raises(ValueError, "threshold to be a number", ranks.select, **part, threshold=NAN)
    check_raises(
        ValueError, "depend on the index", ranks.select, **part | {"formula": "random"}, keep=1
    )

    # What one rank does differently is an error on all.
    mine = 1 + (ranks.rank == last)
    words = f"same selection, got keep=1.* on rank 0 and keep=2.* on rank {last}"
    check_raises(ValueError, words, ranks.select, **part, keep=mine)
    given = part | {"grads": None} if ranks.rank == last else part
    error, words = RuntimeError, f"rank {last}: ValueError: expected grads for formula 'taylor'"
    if ranks.rank == last:
        error, words = ValueError, "expected grads for formula 'taylor'"
    check_raises(error, words, ranks.select, **given, keep=1)

    # Bad scores: the last rank's come first in the list.
    weights[2][-1, 3] = NAN
    weights[4][0, 1, 1] = math.inf
    part["weights"] = [rows(ranks, t) for t in weights]
    for limit in ({"keep": 0}, {"keep": 99}, {"keep": total}, {"threshold": 0.5}):
        error = check_raises(
            ops.NonFiniteScoreError, r"finite taylor.*weights\[2\]", ranks.select, **part, **limit
        )
        assert error.index == 2
    finite = {"alive": [ops.pack_mask(t.isfinite()) for t in weights]}
    check_select(
        ranks,
        "dead and not finite",
        {"weights": weights, "grads": grads},
        **finite,
        formula="taylor",
        keep=99,
    )


def check_exchanges(ranks: Ranks) -> None:
    rank, size = ranks.rank, ranks.size
    mine = torch.tensor([[1.0, rank], [0.5, 2.0]]).t()
    kept = mine.clone()
    assert torch.equal(ranks.sum(mine)[0, 0], torch.tensor(float(size)))
    assert ranks.sum(mine)[1, 0] == size * (size - 1) / 2
    assert torch.equal(mine, kept)
    gathered = ranks.gather(mine)
    assert [t[1, 0].item() for t in gathered] == list(range(size))
    assert all(torch.equal(t[:, 1], mine[:, 1]) for t in gathered)

    for whole in (
        torch.arange(10),
        torch.arange(5 * 3 * 2).view(5, 3, 2).double(),
        torch.ones(0, 2),
    ):
        assert torch.equal(ranks.join(rows(ranks, whole)), whole)
        assert torch.equal(ranks.join(rows(ranks, whole % 2 == 0)), whole % 2 == 0)
    backwards = torch.full((size - 1 - rank,), rank)
    want = [r for r in range(size) for _ in range(size - 1 - r)]
    assert ranks.join(backwards).tolist() == want

    assert ranks.share([rank, 2**62 + rank, -1]) == [0, 2**62, -1]

    ranks.agree("names", "a, b")
    last = size - 1
    words = f"^expected every rank to have the same names, got a, b on rank 0 and a on rank {last}"
    check_raises(
        ValueError,
        f"{words}; different from rank 0: {last}$",
        ranks.agree,
        "names",
        "a" if rank == last else "a, b",
    )
    others = ", ".join(map(str, range(1, size)))
    words = f"got 0 on rank 0 and 1 on rank 1; different from rank 0: {others}$"
    check_raises(ValueError, words, ranks.agree, "names", str(rank))


CHECKS = (
    check_exchanges,
    check_selections,
    check_ties,
    check_neighbours,
    check_no_weights,
    check_errors,
)


def work(rank: int, size: int) -> None:
    """One process: everything that there is to check, for one start of the processes."""
    world = Ranks(dist.group.WORLD)
    assert (world.rank, world.size) == (rank, size)
    for check in CHECKS:
        check(world)
    if size == 4:
        group = dist.new_group([1, 3])
        if rank in (1, 3):
            two = Ranks(group)
            assert (two.rank, two.size) == (rank // 2, 2)
            check_exchanges(two)
            check_ties(two)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes(size: int, tmp_path: Path) -> None:
    processes.run(size, tmp_path, work)


# One process


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    alone = Ranks()
    assert (alone.rank, alone.size) == (0, 1)
    values = torch.tensor([1, 2])
    total = alone.sum(values)
    assert torch.equal(total, values)
    assert total.data_ptr() != values.data_ptr()
    assert [t.tolist() for t in alone.gather(values)] == [[1, 2]]
    assert alone.join(values).tolist() == [1, 2]
    assert alone.share([3, 4]) == [3, 4]
    alone.agree("names", "a, b")


def test_one_process_selects_by_the_op() -> None:
    alone, weights = Ranks(), draw(0, torch.float32)
    for call in ({"formula": "random", "seeds": [3] * 7}, {"formula": "magnitude"}):
        for limit in ({"keep": 100}, {"threshold": 0.5}):
            got, want = (f(weights, **call, **limit) for f in (alone.select, ops.select))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
