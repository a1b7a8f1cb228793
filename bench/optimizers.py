"""What each torch optimizer does to a weight that should stay zero. Takes a few seconds.

A layer is trained, half of its weights are killed, and training goes on:

- zero gradient alone: weights and moments of the dead are zeroed once and their gradients at every
  step; nothing is masked after the update. Kept are the weights, or the moments as well.
- naive masking: the same, but the moments stay what training made them. How many updates it takes
  until a dead weight is no longer zero, and how large one grows in 25.
- with Pruner: a ``secateur.Pruner`` is attached for 100 steps. After each of them dead weights, and
  the dead of every state tensor of the weight's shape, must be exactly zero.

Every optimizer of ``torch.optim`` has its rows: with and without weight decay, in each of torch's
implementations. What torch or the Pruner refuses is a row that says so. The exit status is 1 where
the Pruner lets a dead weight or moment be anything but zero, or an optimizer of torch has no row.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

import secateur
from bench import harness

TRAINED, ALONE, STEPS = 20, 25, 100  # steps before the kill, after it, after it with a Pruner
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {  # beside the defaults; lr is 0.01
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "Adam": ({}, {"amsgrad": True}),
    "AdamW": ({}, {"amsgrad": True}),
    "Adamax": ({},),
    "NAdam": ({},),
    "RAdam": ({},),
    "RMSprop": ({}, {"centered": True, "momentum": 0.9}),
    "Rprop": ({},),
    "ASGD": ({"t0": 3},),
    "Adagrad": ({}, {"initial_accumulator_value": 0.1}),
    "Adadelta": ({"lr": 1.0},),
    "Adafactor": ({},),
    "SparseAdam": ({},),
    "Muon": ({},),
    "LBFGS": ({"lr": 0.1, "max_iter": 2},),
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "fused capturable": {"fused": True, "capturable": True},
}
REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)

Make = Callable[[list[Tensor]], Optimizer]


@dataclass(frozen=True)
class Case:
    """An optimizer with its settings, and in which of torch's implementations."""

    optimizer: str
    settings: str
    weight_decay: float
    implementation: str
    make: Make


def cases() -> Iterator[Case]:
    for name, settings in SETTINGS.items():
        kind = getattr(torch.optim, name)
        takes = inspect.signature(kind).parameters
        implementations = {
            label: more for label, more in IMPLEMENTATIONS.items() if set(more) <= set(takes)
        } or {"only": {}}
        decays = (0.0, 0.1) if "weight_decay" in takes else (None,)
        for setting, decay in itertools.product(settings, decays):
            given = {"lr": 0.01, **setting}
            if decay is not None:  # AdamW and Muon have one by default
                given["weight_decay"] = decay
            shown = " ".join(f"{k}={v}" for k, v in setting.items())
            for label, more in implementations.items():
                every = {**given, **more}
                yield Case(name, shown, decay or 0.0, label, lambda p, k=kind, e=every: k(p, **e))


class Training:
    """Least squares with fresh noise at every step, so that no gradient is ever zero."""

    def __init__(self, make: Make) -> None:
        torch.manual_seed(0)
        self.x, self.wanted = torch.randn(64, 12), torch.randn(8, 12)
        self.model = torch.nn.Linear(12, 8, bias=False)
        self.weight = self.model.weight
        self.optimizer = make([self.weight])
        for _ in range(TRAINED):
            self.step()

    def step(self, alive: Tensor | None = None) -> None:
        """One update; gradients of what is not ``alive`` are zeroed before it."""
        y = self.x @ self.wanted.t() + torch.randn(64, 8)

        def backward() -> Tensor:
            self.optimizer.zero_grad()
            if isinstance(self.optimizer, torch.optim.SparseAdam):  # refuses dense gradients
                rows = F.embedding(torch.arange(8), self.weight, sparse=True)
            else:
                rows = self.weight
            loss = F.mse_loss(self.x @ rows.t(), y)
            loss.backward()
            if alive is not None:
                self.weight.grad = self.weight.grad * alive
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):  # calls it as often as it likes
            self.optimizer.step(backward)
        else:
            backward()
            self.optimizer.step()

    def moments(self) -> list[Tensor]:
        """The state tensors of the weight's shape."""
        state = self.optimizer.state.get(self.weight, {}).values()
        return [t for t in state if isinstance(t, Tensor) and t.shape == self.weight.shape]


@torch.no_grad()
def kill(tensors: list[Tensor], alive: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(alive)


def without_pruner(make: Make, zero_moments: bool) -> tuple[int, float, bool]:
    """(updates until a dead weight is no longer zero or 0, the largest one, moments stay zero)."""
    training = Training(make)
    alive = torch.rand(training.weight.shape) < 0.5
    kill([training.weight, *(training.moments() if zero_moments else ())], alive)
    revived, largest, still = 0, 0.0, True
    for step in range(1, ALONE + 1):
        training.step(alive)
        size = training.weight.detach()[~alive].abs().max().item()
        revived = revived or (step if size != 0 else 0)
        largest = max(largest, size)
        still &= not any(t[~alive].any() for t in training.moments())
    return revived, largest, still


def with_pruner(make: Make) -> str:
    """Whether weights and moments of the dead are exactly zero, or who refused."""
    training = Training(make)
    try:
        pruner = secateur.Pruner(
            training.model,
            training.optimizer,
            criterion=secateur.Random(),
            granularity=secateur.Element(),
            schedule=secateur.OneShot(0.5),
        )
        for step in range(1, STEPS + 1):
            training.step()
            alive = pruner.masks["weight"]
            dead = int((~alive).sum())
            if dead != round(0.5 * alive.numel()):
                return f"WRONG: {dead} dead weights of {alive.numel()} at step {step}"
            for tensor in (training.weight.detach(), *training.moments()):
                if tensor[~alive].any():
                    return f"MOVES: at step {step}, by {tensor[~alive].abs().max().item():.1e}"
    except REFUSALS as error:
        return f"refused: {first_line(error)}"
    return "exactly zero"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def row(case: Case) -> dict[str, Any]:
    result: dict[str, Any] = {
        "optimizer": case.optimizer,
        "settings": case.settings,
        "weight decay": case.weight_decay,
        "implementation": case.implementation,
        "zero gradient alone keeps": "",
        "naive masking revives after": "",
        "largest revived": None,
        "with Pruner": "",
    }
    try:
        moved, _, still = without_pruner(case.make, zero_moments=True)
        revived, largest, _ = without_pruner(case.make, zero_moments=False)
    except REFUSALS as error:  # there is no pruner yet
        return {**result, "with Pruner": f"torch refuses: {first_line(error)}"}
    kept = [what for what, keeps in (("weights", not moved), ("moments", still)) if keeps]
    return {
        **result,
        "zero gradient alone keeps": ", ".join(kept) or "nothing",
        "naive masking revives after": revived or "never",
        "largest revived": largest,
        "with Pruner": with_pruner(case.make),
    }


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For print: what behaves alike in one line, messages cut short."""
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        varies = {"weight decay", "implementation", "largest revived"}
        if row["with Pruner"].startswith("torch refuses"):
            varies.add("settings")
        alike = tuple((k, v) for k, v in row.items() if k not in varies)
        lines.setdefault(alike, []).append(row)
    return [
        {
            **group[0],
            "settings": "; ".join(dict.fromkeys(row["settings"] or "-" for row in group)),
            "weight decay": ", ".join(dict.fromkeys(f"{row['weight decay']:g}" for row in group)),
            "implementation": ", ".join(dict.fromkeys(row["implementation"] for row in group)),
            "largest revived": largest(group),
            "with Pruner": group[0]["with Pruner"][:70],
        }
        for group in lines.values()
    ]


def largest(group: list[dict[str, Any]]) -> str:
    sizes = [row["largest revived"] for row in group if row["largest revived"]]
    return f"{max(sizes):.1g}" if sizes else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    harness.output_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny

    print(", ".join(f"{name} {value}" for name, value in harness.environment().items()))
    rows = [row(case) for case in cases()]
    harness.print_table(merged(rows))
    harness.save(rows, args)

    kinds = {n for n, k in vars(torch.optim).items() if inspect.isclass(k)} - {"Optimizer"}
    untried = sorted(
        n for n in kinds - set(SETTINGS) if issubclass(vars(torch.optim)[n], Optimizer)
    )
    wrong = [r for r in rows if not r["with Pruner"].startswith(("exactly", "refused", "torch"))]
    if untried or wrong:
        sys.exit(
            f"{len(wrong)} rows in which the Pruner failed; optimizers without a row: {untried}"
        )
    print("wherever it trains, the Pruner keeps every dead weight and moment exactly zero")


if __name__ == "__main__":
    main()
