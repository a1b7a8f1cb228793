"""What processes that prune one model exchange, and selection over rows spread over them.

Every method of :class:`Ranks` that exchanges something is collective: all ranks call it, in the
same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur import ops
from secateur.ops.topk import check_selection

__all__ = ["Ranks"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Ranks:
    """The processes that prune one model together.

    Attributes:
        group: the processes; None for this one alone, without torch.distributed.
    """

    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copy is made in the same process

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError(
                "expected a pruner of one process to pickle, got one that works with others: "
                "save its state_dict()"
            )
        return Ranks, ()

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a tensor of one shape and dtype everywhere, as a new tensor."""
        total = values.clone(memory_format=torch.contiguous_format)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, by rank, of one shape and dtype everywhere."""
        if self.group is None:
            return [values]
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self.group)
        return parts

    def join(self, part: Tensor) -> Tensor:
        """The parts of all ranks one after the other along dim 0, where lengths may differ."""
        lengths = torch.cat(self.gather(torch.tensor([len(part)], device=part.device))).tolist()
        padded = part.new_zeros((max(lengths), *part.shape[1:]))
        padded[: len(part)] = part
        parts = self.gather(padded)
        return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)])

    def agree(self, what: str, ours: str) -> None:
        """Check that all ranks have the same text.

        Args:
            what: names what the text tells, in the error.
            ours: the text of this rank.

        Raises:
            ValueError: on every rank, if the text of some rank is not that of rank 0.
        """
        if len(set(self._every(hashlib.sha256(ours.encode()).digest()))) == 1:
            return
        texts = self._every(ours)
        others = [rank for rank, text in enumerate(texts) if text != texts[0]]
        raise ValueError(
            f"expected every rank to have the same {what}, got {texts[0]} on rank 0 and "
            f"{texts[others[0]]} on rank {others[0]}; different from rank 0: "
            f"{', '.join(map(str, others))}"
        )

    def share(self, values: list[int]) -> list[int]:
        """The values of rank 0."""
        if self.group is None:
            return values
        shared = [values]
        dist.broadcast_object_list(shared, group=self.group, group_src=0)
        return shared[0]

    def attempt(self, what: str, work: Callable[[], _Result]) -> _Result:
        """``work()``; where it fails on some rank, an error on all of them, none left waiting.

        Args:
            what: what a rank is expected to do, in the error.
            work: makes no exchange of its own that another rank could miss.

        Raises:
            RuntimeError: another rank has failed. On that one, its own error.
        """
        if self.size == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            self._every(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self._every(None)):
            if failure is not None:
                raise RuntimeError(
                    f"expected every rank to {what}, got an error on rank {rank}: {failure}"
                )
        return result

    def select(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
        states: Sequence[Tensor] | None = None,
        *,
        formula: str,
        alive: Sequence[Tensor] | None = None,
        keep: int | None = None,
        threshold: float | None = None,
        largest: bool = True,
        normalizers: Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Mark the best elements of weights of which every rank has some rows.

        The arguments are those of :func:`secateur.ops.select`, every tensor being this rank's rows
        of a weight, in the order of the ranks; a rank may have none. Only counts and histograms
        travel: each pass over the rows tells 11 more bits of the k-th key.

        Returns:
            For each weight the packed mask of this rank's rows: together they are bit for bit what
            :func:`secateur.ops.select` returns for the whole weights.

        Raises:
            TypeError, ValueError, NonFiniteScoreError: on every rank, what
                :func:`secateur.ops.select` raises for the whole weights.
            ValueError: on every rank: they do not make the same selection; or, over several ranks,
                formula ``"random"`` without states, whose scores depend on the index in the whole
                weight: pass them as weights of formula ``"given"``.
            RuntimeError: another rank's arguments do not fit, or it cannot score its rows.
        """
        arguments: dict[str, Any] = {
            "formula": formula,
            "alive": alive,
            "largest": largest,
            "normalizers": normalizers,
            "seeds": seeds,
        }
        limit: dict[str, Any] = {"keep": keep, "threshold": threshold}
        if self.size == 1:
            return ops.select(weights, grads, states, **arguments, **limit)
        bins, counts, info = self.attempt(
            "score its rows", lambda: ops.histogram(weights, grads, states, **arguments)
        )
        dtypes = sorted({str(ops.compute_dtype(w.dtype)) for w in weights})
        self.agree(
            "selection",
            f"{keep=} {threshold=} {formula=} by_state={states is not None} {largest=} "
            f"normalizers={normalizers and list(normalizers)} weights={len(weights)} {dtypes}",
        )
        if formula == "random" and states is None:
            raise ValueError(
                f"expected scores that do not depend on the index, got formula {formula!r} for "
                f"weights spread over {self.size} ranks"
            )
        if not weights:
            return ops.select(weights, formula=formula, **limit)
        infos = torch.stack(self.gather(info)).tolist()
        n_alive = sum(n for _, n in infos)
        bad = min((bad for bad, _ in infos if bad >= 0), default=-1)
        check_selection(formula, keep, bad, n_alive)
        if keep is None or threshold is not None:  # each score decides for itself, or an error
            return ops.select(weights, grads, states, **arguments, **limit)

        # The last `wanted` of the kept are among the `inside` keys of low..high.
        low, high = ops.key_range(weights[0].dtype)
        wanted, inside = keep, n_alive
        while wanted not in (0, inside) and low < high:
            low, high, wanted, inside = ops.narrow(self.sum(bins), low, high, wanted)
            bins, counts, _ = ops.histogram(weights, grads, states, **arguments, low=low, high=high)

        # Either all of them are kept or they are ties, which go by weight, then by rank.
        ties = torch.stack(self.gather(counts[:, 1]), dim=1)
        before = ties.flatten().cumsum(0).view_as(ties) - ties
        kept = torch.minimum((wanted - before).clamp(min=0), ties)
        masks: list[Tensor] = []
        for i, count in enumerate((counts[:, 0] + kept[:, self.rank]).tolist()):
            masks += ops.select(
                [weights[i]],
                _at(grads, i),
                _at(states, i),
                formula=formula,
                alive=_at(alive, i),
                keep=count,
                largest=largest,
                normalizers=_at(normalizers, i),
                seeds=_at(seeds, i),
            )
        return masks

    def _every(self, value: Any) -> list[Any]:
        """The small values of all ranks, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _at(given: Sequence[Any] | None, i: int) -> list[Any] | None:
    return None if given is None else [given[i]]
