"""Moments of a parameter, for optimizers of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur import surgery


def trained(optimizer_type: type[torch.optim.Optimizer]) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = optimizer_type(
        [{"params": [model.bias]}, {"params": [model.weight], "lr": 0.1}], lr=0.01
    )
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_moments_are_found_and_step_counts_are_not() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    state = optimizer.state[model.weight]
    found = [t for _, t in surgery.moments(optimizer, model.weight)]
    assert [id(t) for t in found] == [id(state["exp_avg"]), id(state["exp_avg_sq"])]
    assert list(surgery.moments(optimizer, nn.Parameter(torch.ones(2)))) == []


def test_group_of() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    assert surgery.group_of(optimizer, model.weight) is optimizer.param_groups[1]
    assert surgery.group_of(optimizer, nn.Parameter(torch.ones(4, 6))) is None


def test_a_parameter_is_replaced_in_place_with_its_state() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    old = dict(optimizer.state[model.weight])
    new = nn.Parameter(model.weight.detach()[:2].clone())
    surgery.replace_parameter(optimizer, model.weight, new, lambda t: t[:2].clone())
    group = optimizer.param_groups[1]
    assert group["params"][0] is new
    assert group["lr"] == 0.1
    assert model.weight not in optimizer.state
    assert torch.equal(optimizer.state[new]["exp_avg"], old["exp_avg"][:2])
    assert torch.equal(optimizer.state[new]["step"], old["step"])
    new.grad = torch.ones_like(new)
    optimizer.step()
    assert optimizer.state[new]["step"] == 2


def test_a_stranger_is_refused() -> None:
    _, optimizer = trained(torch.optim.SGD)
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\)"):
        surgery.replace_parameter(optimizer, stranger, stranger, lambda t: t)


def test_only_moments_and_numbers_can_be_carried_over() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    surgery.check_replaceable(optimizer, model.weight, "weight", ndim=3)
    optimizer.state[model.weight]["history"] = [torch.ones(4, 6), torch.ones(2)]
    with pytest.raises(ValueError, match=r"got 'history' with torch.float32 of shape \(4, 6\)"):
        surgery.check_replaceable(optimizer, model.weight, "weight", ndim=3)
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"got one without other"):
        surgery.check_replaceable(optimizer, stranger, "other", ndim=3)
    surgery.check_replaceable(optimizer, stranger.requires_grad_(False), "other", ndim=3)
