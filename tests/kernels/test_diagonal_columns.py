"""The sparse form against the dense definition."""

import pytest
import torch

from dittune.kernels.diagonal_columns import (
    diagonal_columns_attention,
    diagonal_columns_reference,
)


def inputs(batch, heads, rows, columns, dim, dtype=torch.float64):
    shapes = [(batch, heads, rows, dim)] * 3 + [(batch, heads, columns, dim)] * 2
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 4), (2, 3, 15, 7, 8), (1, 2, 6, 0, 5), (3, 1, 1, 9, 16), (2, 2, 33, 1, 3)],
)
def test_equals_the_reference(shape, scale):
    tensors = inputs(*shape)
    out = diagonal_columns_attention(*tensors, scale)
    assert (out - diagonal_columns_reference(*tensors, scale)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(7,), (2, 1, 1, 7), (1, 3, 15, 7)])
def test_a_bias_is_added_to_columns_and_may_hide_them(shape):
    tensors = inputs(2, 3, 15, 7, 8)
    bias = torch.randn(shape, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    out = diagonal_columns_attention(*tensors, 0.7, bias)
    assert (out - diagonal_columns_reference(*tensors, 0.7, bias)).abs().max() < 1e-12
    assert (out - diagonal_columns_attention(*tensors, 0.7)).abs().max() > 1e-3


def test_without_columns_it_is_the_value():
    tensors = inputs(2, 2, 5, 0, 4)
    assert torch.equal(diagonal_columns_attention(*tensors), tensors[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_only(dtype):
    exact = inputs(2, 3, 40, 11, 32)
    rounded = [tensor.to(dtype) for tensor in exact]
    truth = diagonal_columns_reference(*[tensor.double() for tensor in rounded])
    ours = (diagonal_columns_attention(*rounded).double() - truth).abs().max()
    assert ours <= 2 * torch.finfo(dtype).eps * truth.abs().max()


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in inputs(1, 1, 3, 2, 4)]
    assert torch.autograd.gradcheck(diagonal_columns_attention, tensors)


def test_a_diagonal_needs_aligned_rows():
    query, _, value, *columns = inputs(1, 1, 4, 2, 4)
    with pytest.raises(ValueError, match="as many queries as keys, got 4, 3 and 4"):
        diagonal_columns_attention(query, query[:, :, :3], value, *columns)
