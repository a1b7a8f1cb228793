"""BlockSparse and its linear: laws, agreement with the masked dense product, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from secateur import BlockSparse, sparsify
from secateur.ops import block_sparse_linear
from secateur.sparse import Pattern

BLOCKS = [1, 8, 16, 32, 64, 128, (32, 16), (1, 4), (4, 1), (16, 1), (3, 5), (128, 64)]
# Against float64, relative to the largest magnitude; see TOLERANCE in test_ops.py.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def pair(block: int | tuple[int, int]) -> tuple[int, int]:
    return (block, block) if isinstance(block, int) else block


def random_mask(n: int, k: int, block: int | tuple[int, int], density: float) -> Tensor:
    rows, cols = pair(block)
    return torch.rand(-(-n // rows), -(-k // cols)) < density


def dense_mask(mask: Tensor, n: int, k: int, block: int | tuple[int, int]) -> Tensor:
    rows, cols = pair(block)
    return mask.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    tolerance = TOLERANCE[actual.dtype]
    scale = expected.abs().amax().item()
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=tolerance,
        atol=tolerance * max(scale, 1e-30),
        msg=lambda m: f"{what}: {m}",
    )


def check_against_dense(
    m: int, n: int, k: int, block: int | tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    x = torch.randn(m, k, dtype=dtype, requires_grad=True)
    dense = torch.randn(n, k, dtype=dtype)
    bias = torch.randn(n, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, dtype=dtype)
    mask = random_mask(n, k, block, density)
    alive = dense_mask(mask, n, k, block)

    weight = BlockSparse.from_dense(dense, block, mask)
    values = weight.values.requires_grad_()
    y = block_sparse_linear(x, weight.with_values(values), bias)
    got = torch.autograd.grad(y, (x, values, bias), dy)

    x64 = x.detach().double().requires_grad_()
    w64 = dense.double().mul(alive).requires_grad_()
    b64 = bias.detach().double().requires_grad_()
    expected_y = linear(x64, w64, b64)
    expected = torch.autograd.grad(expected_y, (x64, w64, b64), dy.double())

    assert y.dtype == dtype
    assert_close(y, expected_y, "y")
    assert_close(got[0], expected[0], "dx")
    assert_close(weight.with_values(got[1]).to_dense(), expected[1] * alive, "dw")
    assert_close(got[2], expected[2], "db")


# ---------------------------------------------------------------- the container


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 8, 16, 64])
def test_bits_do_not_depend_on_threads(block: int, dtype: torch.dtype) -> None:
    # Halves of the batch that are alike and that are not, in one part and in several.
    for m in (127, 128, 192, 323, 700):
        torch.manual_seed(m)
        x, dy = torch.randn(m, 192).to(dtype), torch.randn(m, 320).to(dtype)
        weight = BlockSparse.from_dense(
            torch.randn(320, 192).to(dtype), block, random_mask(320, 192, block, 0.3)
        )
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            xs, values = x.clone().requires_grad_(), weight.values.clone().requires_grad_()
            y = block_sparse_linear(xs, weight.with_values(values))
            results.append((y, *torch.autograd.grad(y, (xs, values), dy)))
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (70, 45), (1, 1), (0, 5), (5, 0)], ids=str)
def test_round_trip(block: int | tuple[int, int], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    dense = torch.randn(shape)
    mask = random_mask(*shape, block, 0.5)
    weight = BlockSparse.from_dense(dense, block, mask)
    expected = dense * dense_mask(mask, *shape, block)
    assert torch.equal(weight.to_dense(), expected)
    assert weight.to_dense().is_contiguous()
    assert weight.shape == shape
    assert weight.block == pair(block)
    assert torch.equal(weight.row_index.long(), mask.nonzero()[:, 0])
    assert torch.equal(weight.col_index.long(), mask.nonzero()[:, 1])
    alive = int(dense_mask(mask, *shape, block).sum())
    assert weight.density == (alive / dense.numel() if dense.numel() else 0.0)
    # The zeros of the result give the pattern back.
    again = BlockSparse.from_dense(expected, block)
    assert torch.equal(again.values, weight.values)
    assert all(map(torch.equal, again.pattern.tensors(), weight.pattern.tensors()))


def test_pattern() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    pattern = Pattern.from_mask(mask)
    assert all(t.dtype == torch.int32 for t in pattern.tensors())
    assert [t.tolist() for t in pattern.tensors()] == [
        [0, 2, 2, 5],
        [0, 2, 0, 1, 2],
        [0, 0, 2, 2, 2],
        [0, 2, 3, 5],
        [0, 2, 2, 0, 2],
        [0, 2, 3, 1, 4],
    ]


def test_from_dense_keeps_nan_and_follows_strides() -> None:
    dense = torch.zeros(6, 8)
    dense[5, 7] = float("nan")
    weight = BlockSparse.from_dense(dense.t(), (4, 3))
    assert weight.row_index.tolist() == [1]
    assert weight.col_index.tolist() == [1]
    assert weight.to_dense()[7, 5].isnan()


def test_from_dense_and_to_dense_are_differentiable() -> None:
    torch.manual_seed(0)
    mask = random_mask(7, 9, (2, 4), 0.5)

    def through(w: Tensor) -> Tensor:
        return BlockSparse.from_dense(w, (2, 4), mask).to_dense()

    w = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, w)
    assert torch.autograd.gradgradcheck(through, w)


def test_with_values_shares_the_pattern() -> None:
    weight = BlockSparse.from_dense(torch.randn(8, 8), 4)
    other = weight.with_values(weight.values * 2)
    assert other.pattern is weight.pattern
    assert torch.equal(other.to_dense(), weight.to_dense() * 2)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))], ids=["deepcopy", "pickle"]
)
def test_survives_copies(clone: Callable[[BlockSparse], BlockSparse]) -> None:
    weight = BlockSparse.from_dense(torch.randn(10, 7), (4, 2), random_mask(10, 7, (4, 2), 0.5))
    again = clone(weight)
    assert again.values is not weight.values
    assert torch.equal(again.to_dense(), weight.to_dense())
    assert again.block == weight.block


def test_to_and_repr() -> None:
    weight = BlockSparse.from_dense(torch.ones(8, 8), 4, torch.eye(2, dtype=torch.bool))
    half = weight.to(dtype=torch.float16)
    assert half.dtype == half.values.dtype == torch.float16
    assert half.device == torch.device("cpu")
    assert torch.equal(weight.to("cpu").to_dense(), weight.to_dense())
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert weight.to("meta").pattern.col.is_meta
    assert "density nan" in repr(weight.to("meta"))
    expected = "BlockSparse(8 x 8, blocks of 4 x 4, 2 live, density 0.5, float32, cpu)"
    assert repr(weight) == expected


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_equals_masked_dense(block: int | tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for m, n, k in ((130, 128, 256), (1, 130, 70), (8, 64, 128), (33, 61, 47), (16, 16, 32)):
        check_against_dense(m, n, k, block, 0.4, dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 140),
    n=st.integers(0, 150),
    k=st.integers(0, 150),
    block=st.one_of(st.sampled_from(BLOCKS), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_equals_masked_dense_anywhere(
    m: int, n: int, k: int, block: int | tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(m * 1000 + n + k)
    check_against_dense(m, n, k, block, density, dtype)


def test_large_and_skewed() -> None:
    torch.manual_seed(0)
    n, k, block = 512, 640, 32
    mask = torch.rand(n // block, k // block) < torch.linspace(1, 0, n // block)[:, None] ** 3
    x = torch.randn(700, k)
    weight = BlockSparse.from_dense(torch.randn(n, k), block, mask)
    assert_close(block_sparse_linear(x, weight), x.double() @ weight.to_dense().double().t(), "y")


@pytest.mark.parametrize("block", [1, (3, 5), 16, 32], ids=str)
@pytest.mark.parametrize("m", [3, 40])
def test_padding_never_leaks(block: int | tuple[int, int], m: int) -> None:
    torch.manual_seed(0)
    n, k = 37, 41
    rows, cols = pair(block)
    x, dy = torch.randn(m, k), torch.randn(m, n)
    weight = BlockSparse.from_dense(torch.randn(n, k), block)
    bad = torch.nn.functional.pad(weight.to_dense(), (0, -k % cols, 0, -n % rows), value=torch.nan)
    bad = bad.view(-(-n // rows), rows, -(-k // cols), cols).transpose(1, 2)
    values = bad[weight.row_index, weight.col_index].requires_grad_()
    x.requires_grad_()
    y = block_sparse_linear(x, weight.with_values(values))
    dx, dw = torch.autograd.grad(y, (x, values), dy)
    assert not y.isnan().any()
    assert not dx.isnan().any()
    assert (dw[values.isnan()] == 0).all()


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 3, 5), (2, 0, 5), (1, 1, 1, 5)], ids=str)
def test_batch_dimensions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = BlockSparse.from_dense(torch.randn(7, 5), (2, 2))
    y = block_sparse_linear(x, weight)
    torch.testing.assert_close(y, linear(x, weight.to_dense()))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_strided_input() -> None:
    torch.manual_seed(0)
    weight = BlockSparse.from_dense(torch.randn(32, 32), 16)
    dense = weight.to_dense()
    base = torch.randn(70, 3, 64)
    views = {
        "every other feature": base[:, 0, ::2],
        "transposed": torch.randn(32, 70).t(),
        "row stride": base[:, 1, :32],
        "batch permuted": base[:, :, 32:].transpose(0, 1),
        "expanded": torch.randn(1, 32).expand(40, 32),
    }
    for name, x in views.items():
        assert_close(block_sparse_linear(x, weight), x.double() @ dense.double().t(), name)


def test_infinite_gradients_stay_infinite() -> None:
    mask = torch.zeros(40, 24, dtype=torch.bool)
    mask[torch.arange(24), torch.arange(24)] = True  # one weight a column, so none else adds to dX
    mask[20:39, 0] = True  # more of them than one vector
    w = BlockSparse.from_dense(torch.ones(40, 24), 1, mask)
    dy = torch.zeros(3, 40)
    dy[0, 5] = dy[1, 0] = torch.inf
    x, pattern = torch.ones(3, 24), w.pattern.tensors()
    dx, _ = torch.ops.secateur.block_sparse_linear_backward(dy, x, w.values, *pattern)
    want = torch.zeros(3, 24)
    want[0, 5] = want[1, 0] = torch.inf
    assert torch.equal(dx, want)


def test_zero_gradient_expanded() -> None:
    """The gradient of a sum is one number expanded: stride 0."""
    torch.manual_seed(0)
    x = torch.randn(40, 32, requires_grad=True)
    weight = BlockSparse.from_dense(torch.randn(48, 32), 16)
    block_sparse_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(40, 32))


def test_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 32, requires_grad=True)
    bias = torch.randn(48, requires_grad=True)
    weight = BlockSparse.from_dense(torch.randn(48, 32), 16)
    values = weight.values.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block_sparse_linear(x, weight.with_values(values), bias)
        expected = linear(x, weight.to_dense(), bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert values.grad is not None
    assert values.grad.dtype == torch.float32


def test_second_derivatives_reach_everything() -> None:
    """A Hessian-vector product, as Hutchinson's estimator takes it."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64)
    weight = BlockSparse.from_dense(torch.randn(6, 8, dtype=torch.float64), 2, torch.eye(3, 4) > 0)
    values = weight.values.requires_grad_()
    alive = weight.with_values(torch.ones_like(values)).to_dense()

    def product(y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(y.pow(3).sum(), v, create_graph=True)
        return torch.autograd.grad((g * z).sum(), v)[0]

    z = torch.randn_like(values)
    got = product(block_sparse_linear(x, weight.with_values(values)), values, z)
    dense = weight.to_dense().detach().requires_grad_()
    expected = product(linear(x, dense), dense, weight.with_values(z).to_dense()) * alive
    torch.testing.assert_close(weight.with_values(got).to_dense(), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("block", [1, 16], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_activation(block: int, activation: Literal["relu", "gelu"], grad: bool) -> None:
    torch.manual_seed(0)
    weight = BlockSparse.from_dense(torch.randn(32, 48), block, random_mask(32, 48, block, 0.5))
    values = weight.values.requires_grad_(grad)
    x, bias = (torch.randn(shape, requires_grad=grad) for shape in ((20, 48), (32,)))
    y = block_sparse_linear(x, weight.with_values(values), bias, activation)

    x64, values64, bias64 = (t.detach().double().requires_grad_(grad) for t in (x, values, bias))
    z64 = block_sparse_linear(x64, weight.with_values(values64), bias64)
    expected = getattr(torch.nn.functional, activation)(z64)
    assert_close(y, expected, "y")
    if grad:
        got = torch.autograd.grad(y.square().sum(), (x, values, bias))
        want = torch.autograd.grad(expected.square().sum(), (x64, values64, bias64))
        for name, a, b in zip(("dx", "dw", "db"), got, want, strict=True):
            assert_close(a, b, name)


def test_gelu_is_as_good_as_its_comment_says() -> None:
    x = torch.linspace(-12, 12, 100_001)[:, None]
    y = block_sparse_linear(x, BlockSparse.from_dense(torch.ones(1, 1), 1), None, "gelu")
    x64 = x.double()
    off = (y - torch.nn.functional.gelu(x64)).abs() / x64.abs().clamp(min=1e-30)
    assert off.max() < 2e-7  # |x| / 2 times erf's error, and one rounding


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_is_refused_and_not_zero() -> None:
    w = BlockSparse.from_dense(torch.randn(6, 4), 2)
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivatives .* got a tangent"):
        torch.func.jvp(lambda x: block_sparse_linear(x, w), (x,), (torch.ones(3, 4),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(3, 4))
        with pytest.raises(NotImplementedError, match=r"got a tangent"):
            block_sparse_linear(dual, w)
        assert block_sparse_linear(x, w).shape == (3, 6)


def test_meta() -> None:
    w = BlockSparse.from_dense(torch.randn(6, 4), 2)
    assert block_sparse_linear(torch.ones(3, 4, device="meta"), w.to("meta")).shape == (3, 6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_sees_the_op_with_parameters_that_want_gradients() -> None:
    weight = BlockSparse.from_dense(torch.randn(32, 48), 16, random_mask(32, 48, 16, 0.5))
    weight.values.requires_grad_()
    x = torch.randn(3, 4, 48)
    each = torch.func.vmap(lambda x: block_sparse_linear(x, weight))(x)
    torch.testing.assert_close(each, block_sparse_linear(x, weight))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_of_a_layer_that_trains() -> None:
    layer = torch.nn.Linear(48, 32)
    layer.weight.data[:16] = 0
    sparse = sparsify(layer, block=16)
    traced = torch.jit.trace(sparse, torch.randn(3, 48))
    x = torch.randn(5, 48)
    torch.testing.assert_close(traced(x), sparse(x))


def test_compiled_autograd() -> None:
    weight = BlockSparse.from_dense(torch.randn(32, 48), 16)
    values, x = weight.values.requires_grad_(), torch.randn(3, 48)
    (want,) = torch.autograd.grad(block_sparse_linear(x, weight).sum(), values)
    y = block_sparse_linear(x, weight).sum()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        y.backward()
    torch.testing.assert_close(values.grad, want)


def test_a_subclass_that_handles_the_op_may_use_autograd() -> None:
    class Scaled(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * scale if "block_sparse_linear" in str(func) else out

    scale = torch.ones((), requires_grad=True)
    weight = BlockSparse.from_dense(torch.randn(32, 48), 16)
    y = block_sparse_linear(torch.randn(3, 48).as_subclass(Scaled), weight)
    (grad,) = torch.autograd.grad(y.sum(), scale)
    torch.testing.assert_close(
        grad.as_subclass(torch.Tensor), y.detach().sum().as_subclass(torch.Tensor)
    )


def test_a_result_that_no_memory_holds() -> None:
    weight = BlockSparse.from_dense(torch.randn(32, 16), 16)
    with pytest.raises(RuntimeError, match=r"memory for a result of shape \(1099511627776, 32\)"):
        block_sparse_linear(torch.zeros(1, 16).expand(2**40, 16), weight)


@pytest.mark.parametrize("block", [1, 16], ids=str)
def test_compile_fullgraph(block: int) -> None:
    torch.manual_seed(0)
    weight = BlockSparse.from_dense(torch.randn(32, 48), block, random_mask(32, 48, block, 0.5))
    values = weight.values.requires_grad_()
    x = torch.randn(4, 5, 48, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)

    def f(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return block_sparse_linear(x, weight.with_values(values), bias).relu()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, values, bias), f(x, values, bias)
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, values, bias)),
        torch.autograd.grad(expected.sum(), (x, values, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- bad input

W = torch.ones(4, 6)
BAD_WEIGHTS = {
    "block of 0": (lambda: BlockSparse.from_dense(W, 0), ValueError, "at least 1, got 0"),
    "block of 3 sizes": (
        lambda: BlockSparse.from_dense(W, (1, 2, 3)),  # type: ignore[arg-type]
        TypeError,
        r"int or \(rows, cols\), got \(1, 2, 3\)",
    ),
    "block of floats": (
        lambda: BlockSparse.from_dense(W, 2.0),  # type: ignore[arg-type]
        TypeError,
        "got 2.0",
    ),
    "1-D weight": (lambda: BlockSparse.from_dense(W[0], 2), ValueError, r"2 dim.*got shape \(6,\)"),
    "int weight": (lambda: BlockSparse.from_dense(W.int(), 2), TypeError, "got torch.int32"),
    "mask of numbers": (
        lambda: BlockSparse.from_dense(W, 2, torch.ones(2, 3)),
        TypeError,
        "torch.bool, got torch.float32",
    ),
    "mask of weights": (
        lambda: BlockSparse.from_dense(W, 2, W > 0),
        ValueError,
        r"mask of shape \(2, 3\).*got \(4, 6\)",
    ),
    "mask elsewhere": (
        lambda: BlockSparse.from_dense(W, 2, torch.ones(2, 3, dtype=torch.bool, device="meta")),
        ValueError,
        "mask on cpu.*got meta",
    ),
    "values of another shape": (
        lambda: BlockSparse.from_dense(W, 2).with_values(torch.ones(5, 2, 2)),
        ValueError,
        r"\(6, 2, 2\), got \(5, 2, 2\)",
    ),
    "int values": (
        lambda: BlockSparse.from_dense(W, 2).with_values(torch.ones(6, 2, 2).int()),
        TypeError,
        "got torch.int32",
    ),
    "values elsewhere": (
        lambda: BlockSparse.from_dense(W, 2).with_values(torch.ones(6, 2, 2, device="meta")),
        ValueError,
        "values on cpu.*got meta",
    ),
    "pattern of another shape": (
        lambda: BlockSparse(torch.ones(6, 2, 2), BlockSparse.from_dense(W, 2).pattern, (9, 9)),
        ValueError,
        "5 x 5 blocks.*got 2 x 3",
    ),
    "flat values": (
        lambda: BlockSparse(torch.ones(24), BlockSparse.from_dense(W, 2).pattern, (4, 6)),
        ValueError,
        r"\(6, rows, cols\), got \(24,\)",
    ),
    "pattern of numbers": (lambda: Pattern.from_mask(W), TypeError, "torch.bool, got"),
    "1-D pattern": (lambda: Pattern.from_mask(W[0] > 0), ValueError, "2 dimensions, got 1"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS, ids=str)
def test_bad_weight(case: str) -> None:
    call, error, message = BAD_WEIGHTS[case]
    with pytest.raises(error, match=message):
        call()


SPARSE = BlockSparse.from_dense(W, 2)
BAD_PRODUCTS = {
    "dense weight": ((torch.ones(3, 6), W, None), TypeError, "BlockSparse.*got Tensor"),
    "x too narrow": ((torch.ones(3, 5), SPARSE, None), ValueError, r"\(..., 6\).*got \(3, 5\)"),
    "x a number": ((torch.ones(()), SPARSE, None), ValueError, r"got \(\)"),
    "x of ints": ((torch.ones(3, 6).int(), SPARSE, None), TypeError, "got torch.int32"),
    "x in double": (
        (torch.ones(3, 6).double(), SPARSE, None),
        TypeError,
        "weight.values to be torch.float64, as x, got torch.float32",
    ),
    "x elsewhere": (
        (torch.ones(3, 6, device="meta"), SPARSE, None),
        ValueError,
        "weight.values on meta, as x, got cpu",
    ),
    "bias too long": (
        (torch.ones(3, 6), SPARSE, torch.ones(6)),
        ValueError,
        r"bias of shape \(4,\), got \(6,\)",
    ),
    "bias in half": (
        (torch.ones(3, 6), SPARSE, torch.ones(4).half()),
        TypeError,
        "bias to be torch.float32, as x, got torch.float16",
    ),
    "a sparse layout": (
        (torch.ones(3, 6).to_sparse(), SPARSE),
        TypeError,
        "x to be strided, got torch.sparse_coo",
    ),
    "a bias of a sparse layout": (
        (torch.ones(3, 6), SPARSE, torch.ones(4).to_sparse()),
        TypeError,
        "bias to be strided, got torch.sparse_coo",
    ),
    "no such activation": (
        (torch.ones(3, 6), SPARSE, None, "tanh"),
        ValueError,
        "activation to be 'relu', 'gelu' or None, got 'tanh'",
    ),
}


@pytest.mark.parametrize("case", BAD_PRODUCTS, ids=str)
def test_bad_product(case: str) -> None:
    args, error, message = BAD_PRODUCTS[case]
    with pytest.raises(error, match=message):
        block_sparse_linear(*args)


def test_gather_reads_another_matrix_by_the_pattern() -> None:
    weight = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    sparse = BlockSparse.from_dense(weight, 4, mask)
    other = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)).t()
    assert torch.equal(sparse.gather(other), BlockSparse.from_dense(other, 4, mask).values)
    with pytest.raises(ValueError, match=r"shape \(10, 7\), got \(7, 10\)"):
        sparse.gather(other.t())
    with pytest.raises(TypeError, match="dense to be a Tensor, got list"):
        sparse.gather([[1.0]])  # type: ignore[arg-type]


def test_a_pattern_of_bad_indices_is_refused() -> None:
    good = BlockSparse.from_dense(torch.ones(8, 8), 4).pattern
    tensors = good.tensors()
    assert all(torch.equal(a, b) for a, b in zip(Pattern(*tensors).tensors(), tensors, strict=True))
    for i, change, match in [
        (1, torch.full_like(good.col, -(10**8)), "col to be 4 numbers of 0 to 1"),
        (2, good.row_of + 5, "row_of to be 4 numbers of 0 to 1"),
        (0, good.row_ptr + 1, "row_ptr to be what Pattern.from_mask makes"),
        (5, good.position_t.flip(0), "position_t to be what Pattern.from_mask makes"),
        (4, good.row_t.long(), "row_t to be torch.int32, got torch.int64"),
        (3, None, "col_ptr to be a Tensor, got NoneType"),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            Pattern(*tensors[:i], change, *tensors[i + 1 :])
