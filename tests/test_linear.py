"""The linear layers of an HSTU layer: every implementation against float64, and weights that change."""

import copy
import gc

import pytest
import torch
from support.implementations import IMPLEMENTATIONS

from hstu_cli.kernels import linear_residual, linear_silu
from hstu_cli.kernels.linear import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 8, 12), (1, 16, 16), (3, 40, 24), (128, 64, 256), (300, 33, 7)]
"""Rows, in, out."""

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x [rows, in], a view into a wider tensor; weight [out, in]; bias [out]; residual [rows, out]."""
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * width, generator=generator)[:, :width]
    weight = torch.randn(out, width, generator=generator) * width**-0.5
    bias, residual = torch.randn(out, generator=generator), torch.randn(rows, out, generator=generator)
    return tuple(tensor.to(dtype) for tensor in (x, weight, bias, residual))


@every_implementation
@every_dtype
@every_shape
def test_they_are_the_formulas_up_to_rounding(shape: tuple[int, int, int], dtype: torch.dtype, impl: str) -> None:
    x, weight, bias, residual = inputs(shape, dtype)
    wide = [tensor.double() for tensor in (x, weight, bias, residual)]
    product = wide[0] @ wide[1].T
    # Terms and sums are rounded to float32 at least, the product and the result to the dtype.
    terms = wide[0].abs() @ wide[1].abs().T * shape[1] * torch.finfo(torch.float32).eps
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        found = linear_silu(x, weight, bias, impl=impl)
        exact = torch.nn.functional.silu(product + wide[2])
        assert found.dtype == dtype
        bound = terms + eps * (product.abs() + wide[2].abs() + exact.abs())
        assert ((found.double() - exact).abs() <= 1.1 * bound).all()
        found = linear_residual(x, weight, residual, impl=impl)
        exact = product + wide[3]
        assert ((found.double() - exact).abs() <= terms + eps * (product.abs() + exact.abs())).all()


@pytest.mark.native
def test_a_weight_that_was_written_to_or_moved_is_packed_again() -> None:
    x, weight, bias, _ = inputs((128, 64, 256), torch.bfloat16)

    def is_right() -> bool:
        plain = linear_silu(x, weight, bias, impl="reference").float()
        difference = (linear_silu(x, weight, bias, impl="native").float() - plain).abs()
        return bool((difference <= 0.02 * (plain.abs() + 1)).all())

    with torch.no_grad():
        assert is_right()
        weight.mul_(3)
        assert is_right()
        weight.data = torch.randn_like(weight)
        assert is_right()


def packs_weights() -> bool:
    return torch.ops.hstu_native.has_bf16_tiles() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.native
def test_packed_weights_go_with_their_weight() -> None:
    x, weight, bias, _ = inputs((4, 64, 256), torch.bfloat16)
    gc.collect()
    before = len(native._packed)
    with torch.no_grad():
        linear_silu(x, weight, bias, impl="native")
        linear_silu(x, copy.deepcopy(weight), bias, impl="native")
    gc.collect()
    assert len(native._packed) == before + packs_weights()
    del weight
    gc.collect()
    assert len(native._packed) == before


def test_gradients_take_the_plain_road() -> None:
    x, weight, bias, residual = inputs((5, 8, 12), torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(lambda x, w, b, r: linear_residual(linear_silu(x, w, b)[:, :8], w, r), leaves)
    with pytest.raises(ValueError, match="no gradients"):
        linear_silu(*leaves[:3], impl="native")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((3, 4), (5, 6), (5,)), "weight"), (((3, 4), (5, 4), (4,)), "bias"), (((4,), (5, 4), (5,)), "rows")],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_silu(*(torch.zeros(shape) for shape in shapes))
