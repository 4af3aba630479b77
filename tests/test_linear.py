"""The linear layers of an HSTU layer: every implementation against float64, and weights that change."""

import contextlib
import copy
import gc

import pytest
import torch
from support.far_apart import rows_far_apart
from support.implementations import IMPLEMENTATIONS, TRITON_DEVICE, device_of

from hstu_cli.kernels import linear_residual, linear_silu
from hstu_cli.kernels.linear import native
from hstu_cli.kernels.triton.chips import chip_of
from hstu_cli.kernels.triton.tuning import LaunchConfig, bucket, pinned_configs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 8, 12), (1, 16, 16), (3, 40, 24), (128, 64, 256), (300, 33, 7)]
"""Rows, in, out."""
NO_BFLOAT16 = "Triton's interpreter multiplies bfloat16 matrices wrongly"

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x [rows, in], a view into a wider tensor; weight [out, in]; bias [out]; residual [rows, out]."""
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * width, generator=generator)[:, :width]
    weight = torch.randn(out, width, generator=generator) * max(width, 1) ** -0.5
    bias, residual = torch.randn(out, generator=generator), torch.randn(rows, out, generator=generator)
    return tuple(tensor.to(dtype) for tensor in (x, weight, bias, residual))


@every_implementation
@every_dtype
@every_shape
def test_they_are_the_formulas_up_to_rounding(shape: tuple[int, int, int], dtype: torch.dtype, impl: str) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and TRITON_DEVICE == "cpu":
        pytest.skip(NO_BFLOAT16)
    assert_formulas(*(tensor.to(device_of(impl)) for tensor in inputs(shape, dtype)), impl)


@pytest.mark.native
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 31, 32, 33, 64, 65])
def test_few_rows_by_several_blocks_of_columns(threads, rows: int, num_threads: int) -> None:
    """Results of one block of 32 columns are stored while the next one is multiplied."""
    threads(num_threads)
    for width, out in ((40, 64), (600, 165), (33, 1100)):
        assert_formulas(*inputs((rows, width, out), torch.bfloat16), "native")


def assert_formulas(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, impl: str
) -> None:
    """Both operators against float64, with errors bounded by the terms of each sum."""
    wide = [tensor.double() for tensor in (x, weight, bias, residual)]
    product = wide[0] @ wide[1].T
    # Terms and sums are rounded to float32 at least, the product and the result to the dtype.
    eps = torch.finfo(x.dtype).eps
    terms = wide[0].abs() @ wide[1].abs().T * x.shape[1] * min(eps, torch.finfo(torch.float32).eps)
    with torch.no_grad():
        found = linear_silu(x, weight, bias, impl=impl)
        exact = torch.nn.functional.silu(product + wide[2])
        assert found.dtype == x.dtype
        bound = terms + eps * (product.abs() + wide[2].abs() + exact.abs())
        assert ((found.double() - exact).abs() <= 1.1 * bound).all()
        found = linear_residual(x, weight, residual, impl=impl)
        exact = product + wide[3]
        assert found.dtype == x.dtype
        assert ((found.double() - exact).abs() <= terms + eps * (product.abs() + exact.abs())).all()


def pinned(config: LaunchConfig) -> contextlib.AbstractContextManager[None]:
    """Both operators launched like this."""
    return pinned_configs({"linear_silu": config, "linear_residual": config})


def tiles(m: int, n: int, k: int, splits: int = 1) -> LaunchConfig:
    """A configuration with these block sizes."""
    variant = "tiles" if splits == 1 else "split"
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLITS": splits}
    return LaunchConfig.of(variant=variant, num_warps=4, num_stages=2, **blocks)


CONFIGS = [
    LaunchConfig.of(variant="library", num_warps=4),
    tiles(32, 16, 16),
    tiles(16, 32, 64),
    tiles(16, 16, 16, splits=2),
    tiles(32, 32, 16, splits=8),
]
"""Torch's product; small tiles; a block beyond all of the input; two parts of the sum; more parts than blocks."""


@pytest.mark.triton
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (17, 33, 41), (150, 32, 20), (5, 0, 4)], ids=str)
def test_every_way_to_compute(shape: tuple[int, int, int], dtype: torch.dtype, config: LaunchConfig) -> None:
    with pinned(config):
        assert_formulas(*(tensor.to(TRITON_DEVICE) for tensor in inputs(shape, dtype)), "triton")


@pytest.mark.triton
def test_the_kernel_is_what_runs() -> None:
    from triton.errors import TritonError

    tensors = [tensor.to(TRITON_DEVICE) for tensor in inputs((17, 33, 41), torch.float32)]
    with pinned(tiles(24, 16, 16)), pytest.raises(TritonError, match="power of 2"):
        assert_formulas(*tensors, "triton")


@pytest.mark.triton
def test_float64_has_torchs_product() -> None:
    assert_formulas(*(tensor.to(TRITON_DEVICE) for tensor in inputs((17, 33, 41), torch.float64)), "triton")


@pytest.mark.triton
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.label)
def test_any_layout(config: LaunchConfig) -> None:
    x, weight, bias, residual = (tensor.to(TRITON_DEVICE) for tensor in inputs((17, 33, 41), torch.float32))
    x, weight = x.T.contiguous().T, weight.T.contiguous().T
    bias, residual = bias.repeat_interleave(2)[::2], residual[:1].expand(17, 41)
    with pinned(config):
        assert_formulas(x, weight, bias, residual, "triton")


@pytest.mark.triton
@pytest.mark.parametrize("config", [tiles(16, 16, 16), tiles(16, 16, 16, splits=2)], ids=lambda config: config.label)
def test_rows_far_apart(config: LaunchConfig) -> None:
    x, weight, bias, residual = (tensor.to(TRITON_DEVICE) for tensor in inputs((3, 32, 16), torch.float16))
    with pinned(config), rows_far_apart(x) as far_x, rows_far_apart(residual) as far_residual:
        assert_formulas(far_x, weight, bias, far_residual, "triton")


GPU_SHAPES = [(1, 1024, 4096), (17, 1024, 4096), (100, 512, 2048), (128, 1024, 1024), (4352, 1024, 4096), (999, 33, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_every_configuration_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from hstu_cli.kernels.linear.triton import launch_configs

    tensors = [tensor.to("cuda") for tensor in inputs(shape, dtype)]
    for config in launch_configs(chip_of(tensors[0].device), bucket(shape[0]), dtype):
        with pinned(config):
            assert_formulas(*tensors, "triton")
    assert_formulas(*tensors, "triton")  # as tuned


@pytest.mark.gpu
def test_parts_of_sums_are_added_in_one_order() -> None:
    x, weight, bias, _ = (tensor.to("cuda") for tensor in inputs((17, 4096, 1024), torch.bfloat16))
    with pinned(tiles(32, 64, 64, splits=8)), torch.no_grad():
        first = linear_silu(x, weight, bias, impl="triton")
        assert all(torch.equal(linear_silu(x, weight, bias, impl="triton"), first) for _ in range(20))


@pytest.mark.gpu
def test_a_captured_graph_computes_the_same() -> None:
    x, weight, bias, residual = (tensor.to("cuda") for tensor in inputs((100, 1024, 1024), torch.bfloat16))

    def layers() -> torch.Tensor:
        return linear_residual(linear_silu(x, weight, bias, impl="triton"), weight, residual, impl="triton")

    with torch.no_grad():
        expected = layers()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layers()
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


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


@pytest.mark.native
def test_a_weight_that_torch_saw_no_write_to_is_packed_again_after_forget() -> None:
    x, weight, bias, _ = inputs((128, 64, 256), torch.bfloat16)
    with torch.no_grad():
        linear_silu(x, weight, bias, impl="native")
        weight.data.zero_()
        native.forget(weight)
        found = linear_silu(x, weight, bias, impl="native").float()
    expected = torch.nn.functional.silu(bias.float())
    assert ((found - expected).abs() <= torch.finfo(torch.bfloat16).eps * expected.abs()).all()


@pytest.mark.native
def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        x, weight, bias, residual = inputs((3, 40, 24), torch.bfloat16)
        found = linear_silu(x, weight, bias, impl="native").float()
        assert (found - linear_silu(x, weight, bias, impl="reference").float()).abs().max() < 0.05
        linear_residual(x, weight, residual, impl="native")


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_elements(dtype: torch.dtype) -> None:
    x, weight, bias = torch.empty(4, 0, dtype=dtype), torch.empty(64, 0, dtype=dtype), torch.ones(64, dtype=dtype)
    expected = linear_silu(x, weight, bias, impl="reference")
    assert torch.equal(linear_silu(x, weight, bias, impl="native"), expected)


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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(70, 40, 256), (5, 24, 72), (0, 24, 64), (300, 40, 4096)], ids=str)
def test_parts_are_the_columns_of_the_whole(shape: tuple[int, int, int], impl: str) -> None:
    dtype = torch.float32 if impl == "triton" else torch.bfloat16
    x, weight, bias = (tensor.to(device_of(impl)) for tensor in inputs(shape, dtype)[:3])
    with torch.no_grad():
        whole = linear_silu(x, weight, bias, impl=impl)
        parts = linear_silu(x, weight, bias, num_parts=4, impl=impl)
    assert parts.shape == (4, shape[0], shape[2] // 4)
    assert torch.equal(torch.cat(parts.unbind(), 1), whole)


@pytest.mark.parametrize("num_parts", [0, 3])
def test_parts_that_do_not_divide_the_columns(num_parts: int) -> None:
    with pytest.raises(ValueError, match=f"{num_parts} parts do not divide 8 columns"):
        linear_silu(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(8), num_parts=num_parts)


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


@pytest.mark.parametrize(
    "place", [{"dtype": torch.float64}, {"device": "meta"}], ids=lambda place: next(iter(place.values()))
)
def test_dtypes_and_devices_that_do_not_fit(place: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"weight and bias must be torch\.float32 on cpu"):
        linear_silu(torch.zeros(3, 4), torch.zeros(5, 4, **place), torch.zeros(5))
    with pytest.raises(ValueError, match=r"weight and residual must be torch\.float32 on cpu"):
        linear_residual(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 5, **place))
