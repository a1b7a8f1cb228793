"""Curvature of a loss by Hessian-vector products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import overload

import torch
from torch import Tensor

__all__ = ["hutchinson_diagonal"]


@overload
def hutchinson_diagonal(
    loss: Tensor,
    parameters: Iterable[Tensor],
    samples: int,
    *,
    generator: torch.Generator | None = None,
) -> list[Tensor]: ...
@overload
def hutchinson_diagonal(
    loss: Tensor,
    parameters: Mapping[str, Tensor],
    samples: int,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]: ...
def hutchinson_diagonal(
    loss: Tensor,
    parameters: Iterable[Tensor] | Mapping[str, Tensor],
    samples: int,
    *,
    generator: torch.Generator | None = None,
) -> list[Tensor] | dict[str, Tensor]:
    """Estimate the diagonal of the Hessian of a loss: the mean of z * (H z) over random signs z.

    Args:
        loss: scalar, with its graph; the graph is kept.
        parameters: leaves of the graph; as a mapping of names (``dict(model.named_parameters())``)
            the result is one too, as ``OBD(hessian=...)`` takes it.
        samples: number of Hessian-vector products, at least 1; the error falls as its root.
        generator: source of the signs; None: torch's default.

    Returns:
        Tensors of the parameters' shapes and dtypes; zero where the loss is linear in a parameter
        or does not depend on it. An estimate can be negative.

    Raises:
        TypeError: ``samples`` is not a whole number.
        ValueError: ``loss`` is not a scalar with a graph, or there are no parameters.

    Source: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Bekas et
    al. 2007, "An estimator for the diagonal of a matrix", eq. 1.1.

    Equivalent to (in the limit):
        ``torch.autograd.functional.hessian(f, p).diagonal()`` for a flat parameter
    """
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"expected samples to be an int, got {samples!r}")
    if samples < 1:
        raise ValueError(f"expected samples to be at least 1, got {samples}")
    if loss.numel() != 1 or loss.grad_fn is None:
        raise ValueError(
            "expected loss to be a scalar with a graph, got a tensor of shape "
            f"{tuple(loss.shape)}" + ("" if loss.grad_fn else " without one")
        )
    names = list(parameters) if isinstance(parameters, Mapping) else None
    leaves = list(parameters.values()) if isinstance(parameters, Mapping) else list(parameters)
    if not leaves:
        raise ValueError("expected at least one parameter, got none")
    grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    diagonal = [torch.zeros_like(p) for p in leaves]
    # A gradient without a graph does not depend on any parameter: its row of the Hessian is zero.
    curved = [g for g in grads if g is not None and g.grad_fn is not None]
    for _ in range(samples if curved else 0):
        signs = [
            torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype) * 2 - 1
            for p in leaves
        ]
        of_curved = [
            z for z, g in zip(signs, grads, strict=True) if g is not None and g.grad_fn is not None
        ]
        products = torch.autograd.grad(
            curved, leaves, of_curved, retain_graph=True, allow_unused=True
        )
        for d, z, hz in zip(diagonal, signs, products, strict=True):
            if hz is not None:
                d.add_(z * hz.detach(), alpha=1 / samples)
    return diagonal if names is None else dict(zip(names, diagonal, strict=True))
