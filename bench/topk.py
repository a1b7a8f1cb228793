"""Exact selection against what torch and numpy offer.

Ours scores and selects in one go (``ops.select``), or selects among given scores
(``ops.topk_mask``). Peers make bool masks: multiply, abs, cat, and then torch's ``kthvalue``,
torch's ``topk`` or numpy's ``partition``. ``prune`` is torch.nn.utils.prune.global_unstructured
with the scores as importance; it multiplies weights by masks as well, and needs scores that are not
negative. ``dot`` is ``torch.dot`` over the same weights and gradients: the time it takes to read
them once. ``--quick`` takes under a minute. ``--alone`` leaves the peers out, whose copies would
not fit where the scores barely do, and says how much memory a selection takes. On a GPU there is no
``partition``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from bench import harness
from bench.harness import Call
from secateur import ops
from secateur.report import peak_memory

PEERS = ("kthvalue", "topk", "partition", "prune")


def tensors(numel: int, count: int, seed: int) -> list[Tensor]:
    """``count`` tensors of mixed sizes, ``numel`` elements in all."""
    generator = harness.generator(seed)
    shares = [1 + i % 7 for i in range(count)]
    sizes = [numel * share // sum(shares) for share in shares]
    sizes[-1] += numel - sum(sizes)
    return [torch.randn(size, generator=generator) for size in sizes]


def by_kthvalue(scores: list[Tensor], keep: int) -> list[Tensor]:
    flat = torch.cat(scores)
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    return [s >= threshold for s in scores]


def by_topk(scores: list[Tensor], keep: int) -> list[Tensor]:
    threshold = torch.cat(scores).topk(keep, sorted=False).values.min()
    return [s >= threshold for s in scores]


def by_partition(numpy: ModuleType, scores: list[Tensor], keep: int) -> list[Tensor]:
    flat = torch.cat(scores)
    threshold = numpy.partition(flat.numpy(), len(flat) - keep)[len(flat) - keep].item()
    return [s >= threshold for s in scores]


def by_prune(weights: list[Tensor], scores: list[Tensor], keep: int) -> list[Tensor]:
    """New modules every time: what is pruned already would count."""
    pairs, importance = [], {}
    for weight, score in zip(weights, scores, strict=True):
        module = nn.Module()
        module.weight = nn.Parameter(weight)
        pairs.append((module, "weight"))
        importance[module, "weight"] = score
    dead = sum(s.numel() for s in scores) - keep
    prune.global_unstructured(pairs, prune.L1Unstructured, importance, amount=dead)
    return [module.weight_mask != 0 for module, _ in pairs]


def check(masks: list[Tensor], scores: list[Tensor], keep: int) -> None:
    """Exactly ``keep`` are marked, and none of them is worse than one that is not."""
    marked, scored = torch.cat(masks), torch.cat(scores)
    best = scored.sort(descending=True, stable=True).indices[:keep]
    expected = torch.zeros_like(marked)
    expected[best] = True
    if not torch.equal(marked, expected):
        raise RuntimeError(f"expected the {keep} best by a stable sort, got another mask")


def check_peer(
    masks: Iterable[Tensor], scores: Iterable[Tensor], keep: int, exact: bool = False
) -> None:
    """None left out is better than one marked; of equal scores, more may be, unless ``exact``."""
    count, worst, best = 0, torch.inf, -torch.inf
    for mask, score in zip(masks, scores, strict=True):
        count += int(mask.sum())
        worst = min(worst, score.where(mask, torch.inf).min().item())
        best = max(best, score.where(~mask, -torch.inf).max().item())
    if count < keep or (exact and count > keep) or worst < best:
        raise RuntimeError(f"expected the {keep} best, got another mask")


def peers(
    score: Callable[[], list[Tensor]], keep: int, numpy: ModuleType | None
) -> dict[str, Call]:
    """Each makes its scores with ``score``."""
    runs: dict[str, Callable[[], list[Tensor]]] = {
        "kthvalue": lambda: by_kthvalue(score(), keep),
        "topk": lambda: by_topk(score(), keep),
    }
    if numpy:
        runs["partition"] = lambda: by_partition(numpy, score(), keep)
    return {name: checked(run, score, keep) for name, run in runs.items()}


def checked(run: Callable[[], list[Tensor]], score: Callable[[], list[Tensor]], keep: int) -> Call:
    return Call(run, lambda masks: check_peer(masks, score(), keep))


def fused(
    weights: list[Tensor],
    grads: list[Tensor],
    keep: int,
    seconds: float,
    numpy: ModuleType | None,
) -> dict[str, Any]:
    """|g * w|: score and select."""

    def scores() -> list[Tensor]:
        return [(w * g).abs() for w, g in zip(weights, grads, strict=True)]

    def check_bits(bits: list[Tensor]) -> None:
        shapes = [w.shape for w in weights]
        masks = [ops.unpack_mask(b, s) for b, s in zip(bits, shapes, strict=True)]
        check(masks, scores(), keep)

    calls = {
        "ours": Call(lambda: ops.select(weights, grads, formula="taylor", keep=keep), check_bits),
        **peers(scores, keep, numpy),
        "prune": checked(lambda: by_prune(weights, scores(), keep), scores, keep),
        "dot": Call(lambda: [torch.dot(w, g) for w, g in zip(weights, grads, strict=True)]),
    }
    return timed("|g*w|", keep, calls, 8 * sum(w.numel() for w in weights), seconds)


def given(
    name: str, scores: list[Tensor], keep: int, seconds: float, numpy: ModuleType | None
) -> dict[str, Any]:
    """Selection among scores that are there already."""
    calls = {
        "ours": Call(lambda: ops.topk_mask(scores, keep), lambda masks: check(masks, scores, keep)),
        **peers(lambda: scores, keep, numpy),
        "dot": Call(lambda: [torch.dot(s, s) for s in scores]),
    }
    return timed(name, keep, calls, 4 * sum(s.numel() for s in scores), seconds)


def alone(weights: list[Tensor], grads: list[Tensor], keep: int, seconds: float) -> dict[str, Any]:
    """|g * w| without peers, and the memory it takes."""
    select = partial(ops.select, weights, grads, formula="taylor", keep=keep)
    if harness.on_gpu():
        torch.cuda.reset_peak_memory_stats()  # to what is there now
    peak = torch.cuda.max_memory_allocated if harness.on_gpu() else peak_memory
    before = peak()
    bits = select()
    taken = peak() - before
    masks = (ops.unpack_mask(b, w.shape) for b, w in zip(bits, weights, strict=True))
    scores = ((w * g).abs() for w, g in zip(weights, grads, strict=True))
    check_peer(masks, scores, keep, exact=True)
    calls = {
        "ours": Call(select),
        "dot": Call(lambda: [torch.dot(w, g) for w, g in zip(weights, grads, strict=True)]),
    }
    numel = sum(w.numel() for w in weights)
    row = timed("|g*w|", keep, calls, 8 * numel, seconds)
    packed = sum(b.nbytes for b in bits)
    row = {key: cell for key, cell in row.items() if cell is not None}
    return row | {"masks MiB": packed / 2**20, "beside MiB": max(0, taken - packed) / 2**20}


def timed(
    name: str, keep: int, calls: dict[str, Call], read: int, seconds: float
) -> dict[str, Any]:
    timer, clock_name = harness.timer()
    timings = harness.measure(calls, seconds, timer)
    ours, dot = timings["ours"].seconds, timings["dot"].seconds
    row: dict[str, Any] = {
        "clock": clock_name,
        "scores": name,
        "keep": keep,
        "ours ms": ours * 1e3,
        "dot ms": dot * 1e3,
        "GB/s": read / ours / 1e9,
        "of dot": ours / dot,
        "calls": min(timing.calls for timing in timings.values()),
    }
    for other in PEERS:
        timing = timings.get(other)
        row[f"{other} ms"] = timing and timing.seconds * 1e3
        row[f"x {other}"] = timing and timing.seconds / ours
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 M scores, short timings")
    parser.add_argument(
        "--numel",
        type=int,
        help="scores in all; default 16 M, on a GPU 100 M",
    )
    parser.add_argument("--tensors", type=int, default=50, help="in how many tensors")
    parser.add_argument("--threads", type=harness.positive, help="default: torch's")
    parser.add_argument(
        "--alone", action="store_true", help="no peers; says how much memory it took"
    )
    harness.device_argument(parser)
    harness.output_arguments(parser)
    args = parser.parse_args()
    harness.set_device(parser, args.device)
    numel = args.numel or (100_000_000 if harness.on_gpu() else 16_000_000)
    numel, seconds = (2_000_000, 1.0) if args.quick else (numel, 8.0)
    if args.threads:
        torch.set_num_threads(args.threads)

    weights, grads = tensors(numel, args.tensors, 0), tensors(numel, args.tensors, 1)
    if args.alone:
        rows = [alone(weights, grads, numel // 10, seconds)]
        harness.print_table(rows)
        harness.save(rows, args)
        return
    steps = [torch.randint(0, 252, w.shape) for w in weights]
    numpy = None if harness.on_gpu() else harness.peer("numpy")
    rows = [
        fused(weights, grads, numel * percent // 100, seconds, numpy) for percent in (1, 10, 50)
    ]
    keep = numel // 10
    for name, scores in {
        "random": weights,
        "all equal": [torch.ones_like(w) for w in weights],
        "1 to 1.00003": [1 + s * 2**-23 for s in steps],
        "sorted": list(torch.cat(weights).sort().values.split([w.numel() for w in weights])),
        "denormal": [s * 2**-149 for s in steps],
    }.items():
        rows.append(given(name, scores, keep, seconds, numpy))
    harness.print_table(rows)
    harness.save(rows, args)


if __name__ == "__main__":
    main()
