"""The layer norms of an HSTU layer: every implementation against float64."""

import pytest
import torch
import torch.nn.functional as F
from support.far_apart import rows_far_apart
from support.implementations import IMPLEMENTATIONS, TRITON_DEVICE, device_of

from hstu_cli.kernels import layer_norm, layer_norm_mul
from hstu_cli.kernels.triton.tuning import LaunchConfig, pinned_configs

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
    assert_formulas(*(tensor.to(device_of(impl)) for tensor in inputs(shape, dtype)), impl)


def assert_formulas(x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, impl: str) -> None:
    """Both operators against float64, with errors bounded by the terms of each sum."""
    wide_x, wide_u, wide_weight, wide_bias = (tensor.double() for tensor in (x, u, weight, bias))
    exact = F.layer_norm(wide_x, x.shape[1:], wide_weight, wide_bias, EPS)
    # An error of the mean is one of |x|'s rounding, divided by the deviation; the sum with the bias may cancel.
    spread = ((wide_x - wide_x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + EPS).sqrt()
    terms = wide_x.abs().amax(-1, keepdim=True) / spread * wide_weight.abs() + wide_bias.abs()
    with torch.no_grad():
        found = layer_norm(x, weight, bias, eps=EPS, impl=impl)
        assert found.dtype == x.dtype
        assert found.is_contiguous()
        assert_right(found, exact, terms)
        assert_right(layer_norm_mul(x, u, weight, bias, eps=EPS, impl=impl), exact * wide_u, terms * wide_u.abs())


CONFIGS = [
    LaunchConfig.of(num_warps=4, BLOCK_ROWS=4, BLOCK_WIDTH=64),
    LaunchConfig.of(num_warps=1, BLOCK_ROWS=1, BLOCK_WIDTH=16),
    LaunchConfig.of(num_warps=1, BLOCK_ROWS=2, BLOCK_WIDTH=32),
]
"""Rows whole, in blocks, and in blocks of which the last is full."""


@pytest.mark.triton
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.label)
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 41), (7, 64), (5, 33)], ids=str)
def test_every_block_size(shape: tuple[int, int], dtype: torch.dtype, config: LaunchConfig) -> None:
    with pinned_configs({"layer_norm": config}):
        assert_formulas(*(tensor.to(TRITON_DEVICE) for tensor in inputs(shape, dtype)), "triton")


@pytest.mark.triton
def test_the_kernel_is_what_runs() -> None:
    from triton.errors import TritonError

    tensors = [tensor.to(TRITON_DEVICE) for tensor in inputs((5, 33), torch.float32)]
    impossible = LaunchConfig.of(num_warps=1, BLOCK_ROWS=3, BLOCK_WIDTH=64)
    with pinned_configs({"layer_norm": impossible}), pytest.raises(TritonError, match="power of 2"):
        assert_formulas(*tensors, "triton")


@pytest.mark.triton
def test_any_layout() -> None:
    x, u, weight, bias = (tensor.to(TRITON_DEVICE) for tensor in inputs((7, 41), torch.float32))
    x, weight = x.T.contiguous().T, torch.stack([weight, bias], 1)[:, 0]
    assert_formulas(x, u[:1].expand(7, 41), weight, bias, "triton")


@pytest.mark.triton
def test_rows_far_apart() -> None:
    x, u, weight, bias = (tensor.to(TRITON_DEVICE) for tensor in inputs((3, 40), torch.float16))
    with rows_far_apart(x) as far_x, rows_far_apart(u) as far_u:
        assert_formulas(far_x, far_u, weight, bias, "triton")


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1024), (17, 512), (4352, 1024), (4352, 4096), (300, 20_000)], ids=str)
def test_large_inputs_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_formulas(*(tensor.to("cuda") for tensor in inputs(shape, dtype)), "triton")


@every_implementation
def test_rows_without_elements(impl: str) -> None:
    nothing = torch.empty(3, 0, device=device_of(impl))
    with torch.no_grad():
        assert layer_norm(nothing, nothing[0], nothing[0], eps=EPS, impl=impl).shape == (3, 0)
        assert layer_norm_mul(nothing, nothing, nothing[0], nothing[0], eps=EPS, impl=impl).shape == (3, 0)


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


def test_within_autocast_torch_casts() -> None:
    x, u, weight, bias = inputs((3, 41), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer_norm_mul(x, u, weight.float(), bias.float(), eps=EPS)
        assert torch.equal(found, F.layer_norm(x, x.shape[1:], weight.float(), bias.float(), EPS) * u)
        with pytest.raises(ValueError, match="autocast"):
            layer_norm(x, weight, bias, eps=EPS, impl="native")


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="float32"):
        layer_norm(torch.zeros(2, 3), torch.zeros(3).double(), torch.zeros(3), eps=EPS)
