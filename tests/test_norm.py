"""The layer norms of an HSTU layer: every implementation against float64."""

import pytest
import torch
import torch.nn.functional as F
from support.implementations import IMPLEMENTATIONS

from hstu_cli.kernels import layer_norm, layer_norm_mul

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 8), (1, 1), (1, 16), (3, 41), (128, 64), (7, 401), (65, 512), (5, 1271)]
"""Rows, width."""
EPS = 1e-5

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x and u [rows, width], u a part of wider rows; weight and bias [width]."""
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) * 3 + 1
    wide = torch.randn(rows, 4 * width, generator=generator)
    weight, bias = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
    return x.to(dtype), wide.to(dtype)[:, :width], weight.to(dtype), bias.to(dtype)


def assert_right(found: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> None:
    """Exact up to a few roundings: of float32 or wider in the terms, of the dtype in the factors."""
    wide_eps = min(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    bound = 1.5 * torch.finfo(found.dtype).eps * exact.abs() + 32 * wide_eps * terms
    assert torch.isfinite(found).all()
    assert ((found.double() - exact).abs() <= bound).all()


@every_implementation
@every_dtype
@every_shape
def test_they_are_the_formulas_up_to_rounding(shape: tuple[int, int], dtype: torch.dtype, impl: str) -> None:
    x, u, weight, bias = inputs(shape, dtype)
    wide_x, wide_u, wide_weight, wide_bias = (tensor.double() for tensor in (x, u, weight, bias))
    exact = F.layer_norm(wide_x, shape[1:], wide_weight, wide_bias, EPS)
    # An error of the mean is one of |x|'s rounding, divided by the deviation; the sum with the bias may cancel.
    spread = ((wide_x - wide_x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + EPS).sqrt()
    terms = wide_x.abs().amax(-1, keepdim=True) / spread * wide_weight.abs() + wide_bias.abs()
    with torch.no_grad():
        found = layer_norm(x, weight, bias, eps=EPS, impl=impl)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert_right(found, exact, terms)
        assert_right(layer_norm_mul(x, u, weight, bias, eps=EPS, impl=impl), exact * wide_u, terms * wide_u.abs())


def test_gradients_take_the_plain_road() -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs((5, 12), torch.float64)]
    assert torch.autograd.gradcheck(lambda x, u, w, b: layer_norm_mul(x, u, w, b, eps=EPS), leaves)
    assert torch.autograd.gradcheck(lambda x, u, w, b: layer_norm(x * u, w, b, eps=EPS), leaves)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4,), (4,), (4,), (4,)), "rows"),
        (((3, 4), (3, 4), (3,), (4,)), "weight"),
        (((3, 4), (4, 3), (4,), (4,)), "u must"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_norm_mul(*(torch.zeros(shape) for shape in shapes), eps=EPS)


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="float32"):
        layer_norm(torch.zeros(2, 3), torch.zeros(3).double(), torch.zeros(3), eps=EPS)
