"""Block-sparse layers in a model: same function, same training, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import secateur
from secateur import BlockSparseLinear


def make_model(block: int, sparsity: float = 0.8) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    secateur.prune_(model, secateur.Magnitude(), secateur.Block(block), sparsity=sparsity)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    x = torch.randn(24, 96, generator=torch.Generator().manual_seed(seed)).to(
        next(model.parameters()).dtype
    )
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("block", [1, 8, 16, 32])
def test_the_block_size_is_found(block: int) -> None:
    model = make_model(block, sparsity=0.9)
    dense = copy.deepcopy(model)
    assert secateur.sparsify(model) is model
    for i in (0, 2):
        layer = model[i]
        assert isinstance(layer, BlockSparseLinear)
        assert layer.weight.block == (block, block)
        assert torch.equal(layer.weight.to_dense(), dense[i].weight)
        assert f"block={block}x{block}" in repr(layer)
    x = torch.randn(5, 3, 96)
    torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_as_if_dense(optimizer_type: Any) -> None:
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    if optimizer_type is torch.optim.SGD:
        settings["momentum"] = 0.9
    dense = make_model(16).double()
    dense_optimizer = optimizer_type(dense.parameters(), **settings)
    # Masks stay: the floor of what is alive is the pruner's business.
    masks = secateur.Pruner(
        dense,
        dense_optimizer,
        criterion=secateur.Magnitude(),
        granularity=secateur.Block(16),
        schedule=secateur.OneShot(0.8),
    )
    for i in range(3):
        step(dense, dense_optimizer, i)
    sparse = copy.deepcopy(dense)
    optimizer = optimizer_type(sparse.parameters(), **settings)
    optimizer.load_state_dict(copy.deepcopy(dense_optimizer.state_dict()))
    secateur.sparsify(sparse, optimizer)
    for i in range(3, 10):
        torch.testing.assert_close(step(sparse, optimizer, i), step(dense, dense_optimizer, i))
    assert masks.sparsity() > 0.7
    values = sum(p.numel() for p in sparse.parameters())
    assert values < 0.5 * sum(p.numel() for p in dense.parameters())
    for p in sparse.parameters():
        assert all(t.shape in (p.shape, ()) for t in optimizer.state[p].values() if t is not None)

    secateur.densify(sparse, optimizer)
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, n=name: f"{n}: {m}")
        for key, moment in dense_optimizer.state[p].items():
            torch.testing.assert_close(
                optimizer.state[q][key], moment, msg=lambda m, k=key: f"{k}: {m}"
            )
    torch.testing.assert_close(step(sparse, optimizer, 20), step(dense, dense_optimizer, 20))


def test_a_bare_linear_is_replaced() -> None:
    model = nn.Linear(64, 64)
    secateur.prune_(model, secateur.Magnitude(), secateur.Block(32), sparsity=0.5)
    sparse = secateur.sparsify(model)
    assert isinstance(sparse, BlockSparseLinear)
    dense = secateur.densify(sparse)
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, model.weight)
    assert dense.bias is model.bias


def test_state_dict_round_trip_and_pattern_mismatch() -> None:
    model = secateur.sparsify(make_model(16))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    twin.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    other = secateur.sparsify(make_model(16, sparsity=0.6))
    before = other[0].values.clone()
    with pytest.raises(RuntimeError, match=r"0.row_index to be the pattern of this layer"):
        other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].values, before)
    state = model.state_dict()
    del state["0.col_index"]
    with pytest.raises(RuntimeError, match=r"expected 0.col_index beside 0.values, got none"):
        twin.load_state_dict(state, strict=False)
    state["0.col_index"] = [0]
    with pytest.raises(RuntimeError, match=r"live blocks\), got a list"):
        twin.load_state_dict(state)
    state["0.col_index"] = twin[0].col_index.to("meta")
    with pytest.raises(RuntimeError, match=r"blocks on meta"):
        twin.load_state_dict(state)


def test_meta_device_and_a_bias_that_does_not_fit() -> None:
    model = secateur.sparsify(make_model(16))
    weight = model[0].weight
    assert "density=nan" in str(copy.deepcopy(model).to("meta"))
    with pytest.raises(TypeError, match=r"expected bias to be a Tensor or None, got int"):
        secateur.BlockSparseLinear(weight, 3)
    with pytest.raises(TypeError, match=r"expected bias to be torch.float32, as weight, got"):
        secateur.BlockSparseLinear(weight, torch.zeros(weight.shape[0]).half())
    with pytest.raises(ValueError, match=r"expected bias of shape"):
        secateur.BlockSparseLinear(weight, torch.zeros(1))


def test_gradients_are_carried_over() -> None:
    model = make_model(16)
    model(torch.randn(4, 96)).sum().backward()
    grad, live = model[0].weight.grad.clone(), model[0].weight.detach() != 0
    secateur.sparsify(model)
    secateur.densify(model)
    assert torch.equal(model[0].weight.grad, grad * live)


def test_dtype_moves_with_the_module() -> None:
    model = secateur.sparsify(make_model(16)).double()
    assert model(torch.randn(2, 96, dtype=torch.float64)).dtype == torch.float64


def test_shared_and_special_layers_stay_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 64, bias=False) for _ in range(3))
            self.b.weight = self.a.weight
            self.attention = nn.MultiheadAttention(64, 4)

    model = Tied()
    secateur.prune_(model, secateur.Magnitude(), secateur.Block(16), sparsity=0.8, scope="layer")
    secateur.sparsify(model)
    assert type(model.a) is nn.Linear
    assert isinstance(model.c, BlockSparseLinear)
    assert isinstance(model.attention.out_proj, nn.Linear)


def test_a_module_with_two_names_is_replaced_under_both() -> None:
    model = make_model(16)
    model.append(nn.Linear(64, 96))
    model.append(model[0])
    secateur.sparsify(model)
    assert isinstance(model[0], BlockSparseLinear)
    assert model[4] is model[0]


def test_frozen_layers_need_no_optimizer() -> None:
    model = make_model(16).requires_grad_(False)
    model[2].weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model[2].weight], lr=0.1)
    secateur.sparsify(model, optimizer)
    assert not model[0].values.requires_grad
    assert optimizer.param_groups[0]["params"] == [model[2].values]


def test_nothing_to_gain_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got the model \(density 1.000\)"):
        secateur.sparsify(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="got no Linear layer"):
        secateur.sparsify(nn.ReLU())
    with pytest.raises(ValueError, match="BlockSparseLinear layers, got none"):
        secateur.densify(nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("optimizer_type", "match"),
    [
        (torch.optim.Adafactor, r"Adafactor to keep for 0.weight only .* got 'row_var'"),
        (torch.optim.Muon, r"got Muon, which takes 2-D parameters only"),
    ],
)
def test_state_that_cannot_be_carried_over_is_refused(optimizer_type: Any, match: str) -> None:
    model = make_model(16)
    optimizer = optimizer_type([model[0].weight, model[2].weight], lr=1e-3)
    step(model, optimizer, 0)
    secateur.prune_(model, secateur.Magnitude(), secateur.Block(16), sparsity=0.8)
    with pytest.raises(ValueError, match=match):
        secateur.sparsify(model, optimizer)
    assert not any(isinstance(m, BlockSparseLinear) for m in model.modules())
    step(model, optimizer, 1)


def test_reparametrized_layers_stay_dense() -> None:
    model = make_model(16)
    prune.l1_unstructured(model[0], "weight", 0.9)
    parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"got 0 \(reparametrized"):
        secateur.sparsify(model)
    prune.remove(model[0], "weight")
    secateur.sparsify(model)
    assert isinstance(model[0], BlockSparseLinear)


def test_layers_with_hooks_are_not_replaced() -> None:
    model = make_model(16)
    seen = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    secateur.sparsify(model)
    model(torch.randn(2, 96))
    assert seen == [1]
    assert isinstance(model[2], BlockSparseLinear)
    handle.remove()
    model[2].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"without hooks, .* got '2'"):
        secateur.densify(model)


@pytest.mark.parametrize("block", [0, -4, (8, 0), 2.0, "8", (8,), (8, 8, 8), True])
def test_bad_blocks_are_refused(block: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="expected block"):
        secateur.sparsify(make_model(16), block=block)


def test_bad_arguments_are_refused() -> None:
    model = make_model(16)
    for call in (secateur.sparsify, secateur.densify):
        with pytest.raises(TypeError, match=r"torch.nn.Module, got int"):
            call(3)
        with pytest.raises(TypeError, match=r"torch.optim.Optimizer or None, got generator"):
            call(model, model.parameters())
    sparse = secateur.BlockSparse.from_dense(torch.ones(8, 4), 4)
    with pytest.raises(TypeError, match=r"a BlockSparse .* got Tensor"):
        BlockSparseLinear(torch.ones(8, 4))
    with pytest.raises(ValueError, match=r"bias of shape \(8,\), got \(4,\)"):
        BlockSparseLinear(sparse, torch.ones(4))


def test_a_layer_that_would_hardly_gain_stays_dense() -> None:
    model = nn.Linear(64, 64)
    secateur.prune_(model, secateur.Magnitude(), secateur.Element(), sparsity=0.7)
    with pytest.raises(ValueError, match=r"the model \(density 0.300\)"):
        secateur.sparsify(model)


def test_a_foreign_optimizer_is_refused_and_nothing_changes() -> None:
    model = make_model(16)
    foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got one without 0.weight"):
        secateur.sparsify(model, foreign)
    assert all(type(m) is not BlockSparseLinear for m in model.modules())
    secateur.sparsify(model)
    with pytest.raises(ValueError, match=r"got one without 0.values"):
        secateur.densify(model, foreign)
    assert isinstance(model[0], BlockSparseLinear)
