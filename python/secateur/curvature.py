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
        TypeError: ``samples`` is not a whole number, ``loss`` is not a Tensor, or ``parameters`` is
            not a list or mapping of Tensors.
        ValueError: ``loss`` is not a finite scalar with a graph, there are no parameters, a
            parameter does not require a gradient, or an estimate is not finite.

    Source: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Bekas et
    al. 2007, "An estimator for the diagonal of a matrix", eq. 1.1.

    Equivalent to (in the limit):
        ``torch.autograd.functional.hessian(f, p).diagonal()`` for a flat parameter
    """
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"expected samples to be an int, got {samples!r}")
    if samples < 1:
        raise ValueError(f"expected samples to be at least 1, got {samples}")
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected loss to be a Tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.grad_fn is None:
        raise ValueError(
            "expected loss to be a scalar with a graph, got a tensor of shape "
            f"{tuple(loss.shape)}" + ("" if loss.grad_fn else " without one")
        )
    if not loss.isfinite():
        raise ValueError(f"expected a finite loss, got {loss.item()}")
    names = list(parameters) if isinstance(parameters, Mapping) else None
    leaves = _leaves(parameters)
    called = names or [f"parameters[{i}]" for i in range(len(leaves))]
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
    for name, d in zip(called, diagonal, strict=True):
        if not d.isfinite().all():
            raise ValueError(f"expected a finite Hessian diagonal, got NaN or Inf for {name}")
    return diagonal if names is None else dict(zip(names, diagonal, strict=True))


def _leaves(parameters: Iterable[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            "expected parameters to be a list or mapping of Tensors, got "
            + ("a Tensor" if isinstance(parameters, Tensor) else type(parameters).__name__)
        )
    named = (
        dict(parameters)
        if isinstance(parameters, Mapping)
        else {f"parameters[{i}]": p for i, p in enumerate(parameters)}
    )
    if not named:
        raise ValueError("expected at least one parameter, got none")
    for name, p in named.items():
        if not isinstance(p, Tensor):
            hint = "; dict(...) of named parameters is a mapping" if isinstance(p, tuple) else ""
            raise TypeError(f"expected {name} to be a Tensor, got {type(p).__name__}{hint}")
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if frozen:
        raise ValueError(f"expected parameters that require a gradient, got frozen {frozen}")
    return list(named.values())
