"""The Hessian's diagonal by random signs: its laws, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import secateur


def test_hutchinson_is_exact_for_a_diagonal_hessian() -> None:
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = (w**4).sum() / 12 + unused.sum()
    diagonal, zero = secateur.hutchinson_diagonal(loss, [w, unused], samples=1)
    torch.testing.assert_close(diagonal, w.detach() ** 2)
    assert torch.equal(zero, torch.zeros(2, dtype=torch.float64))


def test_hutchinson_converges() -> None:
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a @ a.T
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    (diagonal,) = secateur.hutchinson_diagonal(
        w @ a @ w / 2, [w], samples=3000, generator=torch.Generator().manual_seed(0)
    )
    # The estimate's standard deviation is the norm of the row's other entries / sqrt(samples).
    sigma = (a.square().sum(1) - a.diagonal().square()).sqrt() / 3000**0.5
    assert torch.all((diagonal - a.diagonal()).abs() < 4 * sigma)


W = torch.ones(3, requires_grad=True)
FROZEN = torch.ones(3)
MODEL = torch.nn.Linear(3, 1)


def loss() -> torch.Tensor:
    return (W**4).sum() + MODEL(W).sum()


@pytest.mark.parametrize(
    ("loss", "parameters", "error", "match"),
    [
        (loss, W, TypeError, "list or mapping of Tensors, got a Tensor"),
        (loss, MODEL, TypeError, "list or mapping of Tensors, got Linear"),
        (loss, MODEL.named_parameters, TypeError, r"parameters\[0\] to be a Tensor, got tuple"),
        (loss, {"w": W, "b": FROZEN}, ValueError, r"require a gradient, got frozen \['b'\]"),
        (loss, [W, FROZEN], ValueError, r"got frozen \['parameters\[1\]'\]"),
        (loss, [], ValueError, "at least one parameter, got none"),
        (lambda: 1.0, [W], TypeError, "loss to be a Tensor, got float"),
        (lambda: W * 2, [W], ValueError, r"scalar with a graph, got a tensor of shape \(3,\)"),
        (lambda: loss() * math.nan, [W], ValueError, "finite loss, got nan"),
        (lambda: (W - 1).sqrt().sum(), {"w": W}, ValueError, "diagonal, got NaN or Inf for w"),
    ],
)
def test_bad_input(
    loss: Callable[[], Any], parameters: Any, error: type[Exception], match: str
) -> None:
    if parameters == MODEL.named_parameters:
        parameters = parameters()
    with pytest.raises(error, match=match):
        secateur.hutchinson_diagonal(loss(), parameters, 2)
