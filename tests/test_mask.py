"""The wrappers of bit-packed masks: what they refuse, and what they promise beyond the ops."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch

from secateur import ops
from secateur.ops.mask import mask_fresh_


def test_layout_is_numpys_little_endian_packing() -> None:
    mask = torch.rand(13, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = numpy.packbits(mask.flatten().numpy(), bitorder="little")
    assert ops.pack_mask(mask).tolist() == expected.tolist()
    assert torch.equal(ops.unpack_mask(ops.pack_mask(mask), mask.shape), mask)


def test_masking_is_seen_by_autograd() -> None:
    weight = torch.ones(8, requires_grad=True)
    squares = weight.square().sum()
    ops.mask_([weight], [torch.tensor([1], dtype=torch.uint8)])
    assert weight.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


BITS = torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.pack_mask(torch.ones(3)), TypeError, "torch.bool, got torch.float32"),
        (lambda: ops.pack_mask([True]), TypeError, "mask to be a Tensor, got list"),
        (lambda: ops.unpack_mask(BITS, (9,)), ValueError, r"expected 2 bytes .* shape \(1,\)"),
        (lambda: ops.unpack_mask(BITS.int(), (8,)), ValueError, "got torch.int32"),
        (lambda: ops.mask_([torch.ones(9)], [BITS]), ValueError, r"bits\[0\] to be 2 bytes"),
        (lambda: ops.mask_([torch.ones(8)], []), ValueError, "1 tensors and 0 masks"),
        (
            lambda: ops.mask_([torch.ones(1).expand(8)], [BITS]),
            ValueError,
            r"tensors\[0\] .* do not share memory, got strides \(0,\)",
        ),
        (
            lambda: ops.mask_([torch.ones(8).as_strided((2, 4), (1, 1))], [BITS]),
            ValueError,
            r"tensors\[0\] .* do not share memory, got strides \(1, 1\)",
        ),
        (lambda: ops.unpack_mask(BITS, (-2, -4)), ValueError, r"no negative size, got \(-2, -4\)"),
        (lambda: ops.unpack_mask(BITS, (2**32, 2**32)), ValueError, f"{2**61} bytes"),
        (lambda: ops.unpack_mask(BITS, 8), TypeError, "shape to be several ints, got 8"),
        (
            lambda: ops.mask_([torch.ones([2] * 9).permute(*range(8, -1, -1))], [BITS]),
            ValueError,
            r"tensors\[0\] to have at most 8 dimensions .* got 9",
        ),
        (lambda: ops.mask_([None], [BITS]), TypeError, r"tensors\[0\] to be a Tensor"),
        (lambda: ops.mask_([torch.ones(8)], [None]), TypeError, r"bits\[0\] to be a Tensor"),
        (lambda: ops.mask_(torch.ones(1, 8), [BITS]), TypeError, "tensors to be a list"),
        (lambda: ops.unpack_mask([1], (8,)), TypeError, "bits to be a Tensor, got list"),
        (lambda: ops.mask_([torch.arange(8)], [BITS]), TypeError, r"tensors\[0\] .* torch.int64"),
    ],
)
def test_bad_input_is_refused(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()


def test_tensors_that_share_memory_are_refused() -> None:
    whole = torch.ones(24)
    for tensors in (
        [whole[:8], whole[16:], whole[:8]],
        [whole[:8], whole[16:], whole[7:15]],
        [whole[::3], whole[16:], whole[:16:2]],
    ):
        with pytest.raises(ValueError, match=r"share no memory, got tensors\[0\] and tensors\[2\]"):
            ops.mask_(tensors, [BITS] * 3)
    assert whole.tolist() == [1] * 24
    ops.mask_(
        [whole[16:], whole[8:16], whole[:8:2], whole[1:8:2], whole[:0]], [BITS] * 4 + [BITS[:0]]
    )
    assert whole.tolist() == [0] * 24


def test_nothing_is_changed_where_one_mask_does_not_fit() -> None:
    good, bad = torch.ones(8), torch.ones(9)
    with pytest.raises(ValueError, match=r"bits\[1\]"):
        ops.mask_([good, bad], [BITS, BITS])
    assert good.tolist() == [1] * 8


def test_no_tensors_is_no_work() -> None:
    assert ops.mask_([], []).tolist() == []


def test_what_was_not_zero_is_reported() -> None:
    clean, dirty = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 2])
    assert ops.mask_([clean, dirty], [torch.tensor([1], dtype=torch.uint8)] * 2).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "empty"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fresh_gradients_are_masked_alike(dtype: torch.dtype, layout: str) -> None:
    grad = torch.randn(0 if layout == "empty" else 301, 520).to(dtype)
    grad = {"transposed": grad.t(), "sliced": grad[:, 1:]}.get(layout, grad)
    grad[:1, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    bits = ops.pack_mask(torch.rand(grad.shape) < 0.5)
    expected = grad.clone()
    done = mask_fresh_(grad, bits)
    assert done == (layout in ("contiguous", "empty"))
    if done:
        ops.mask_([expected], [bits])
    got, wanted = (t.contiguous().view(torch.uint8) for t in (grad, expected))
    assert torch.equal(got, wanted)


def test_gradients_in_a_graph_are_left_to_an_op_that_autograd_sees() -> None:
    grad = torch.ones(8, requires_grad=True)
    assert not mask_fresh_(grad, BITS)
    assert grad.detach().all()
