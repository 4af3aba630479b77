"""A norm and the linear layer that reads it: the two operators one after the other, bit for bit, in one pass or two."""

import pytest
import torch
from support.implementations import IMPLEMENTATIONS, TRITON_DEVICE, device_of

from hstu_cli.kernels import (
    layer_norm,
    layer_norm_mul,
    linear_residual,
    linear_silu,
    norm_linear_silu,
    norm_mul_linear_residual,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (0, 8, 12), (1, 16, 16), (9, 40, 1100), (65, 41, 24), (257, 64, 40), (513, 31, 32), (600, 33, 8), (1100, 160, 64),
]  # fmt: skip
"""Rows, in, out; in C++, two threads, the second operator norms rows beyond 256 on their way, the first beyond 512."""
EPS = 1e-5

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What both operators take: x and u [rows, in], residual [rows, out], views into wider tensors; parameters."""
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype).to(device)

    x, u = (normal(rows, 2 * width) * 3 + 1)[:, :width], normal(rows, 3 * width)[:, width : 2 * width]
    return {
        "x": x,
        "u": u,
        "norm_weight": normal(width),
        "norm_bias": normal(width),
        "weight": normal(out, width) * width**-0.5,
        "bias": normal(out),
        "residual": normal(rows, 2 * out)[:, :out],
    }


def silu_of(t: dict[str, torch.Tensor], impl: str, **options: int) -> torch.Tensor:
    """The first operator."""
    return norm_linear_silu(
        t["x"], t["norm_weight"], t["norm_bias"], t["weight"], t["bias"], eps=EPS, impl=impl, **options
    )


def residual_of(t: dict[str, torch.Tensor], impl: str) -> torch.Tensor:
    """The second operator."""
    return norm_mul_linear_residual(
        t["x"], t["u"], t["norm_weight"], t["norm_bias"], t["weight"], t["residual"], eps=EPS, impl=impl
    )


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_two_operators_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype, impl: str) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and TRITON_DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    t = inputs(shape, dtype, device_of(impl))
    with torch.no_grad():
        normed = layer_norm(t["x"], t["norm_weight"], t["norm_bias"], eps=EPS, impl=impl)
        assert torch.equal(silu_of(t, impl), linear_silu(normed, t["weight"], t["bias"], impl=impl))
        parts = linear_silu(normed, t["weight"], t["bias"], num_parts=2, impl=impl)
        assert torch.equal(silu_of(t, impl, num_parts=2), parts)
        gated = layer_norm_mul(t["x"], t["u"], t["norm_weight"], t["norm_bias"], eps=EPS, impl=impl)
        assert torch.equal(residual_of(t, impl), linear_residual(gated, t["weight"], t["residual"], impl=impl))


@every_implementation
@pytest.mark.parametrize("rows", [7, 700])
def test_what_is_not_a_number_stays_in_its_row(rows: int, impl: str) -> None:
    dtype = torch.float32 if impl == "triton" and TRITON_DEVICE == "cpu" else torch.bfloat16
    t, sound = inputs((rows, 64, 32), dtype, device_of(impl)), inputs((rows, 64, 32), dtype, device_of(impl))
    t["x"][3, 5], t["x"][4, 6] = torch.nan, torch.inf
    others = [row for row in range(rows) if row not in (3, 4)]
    with torch.no_grad():
        for operator in (silu_of, residual_of):
            found = operator(t, impl)
            assert found[3:5].isnan().all()
            assert torch.equal(found[others], operator(sound, impl)[others])


@pytest.mark.native
@pytest.mark.parametrize("num_threads", [1, 2, 5, 40])
def test_any_number_of_threads_gives_the_same(threads, num_threads: int) -> None:
    t = inputs((1300, 96, 128), torch.bfloat16)
    with torch.no_grad():
        expected = silu_of(t, "native", num_parts=4), residual_of(t, "native")
        threads(num_threads)
        found = silu_of(t, "native", num_parts=4), residual_of(t, "native")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_gradients_flow() -> None:
    leaves = {name: x.double().requires_grad_() for name, x in inputs((5, 8, 6), torch.float32).items()}

    def both(*tensors: torch.Tensor) -> torch.Tensor:
        t = dict(zip(leaves, tensors, strict=True))
        return silu_of(t, "auto") + residual_of(t, "auto")

    assert torch.autograd.gradcheck(both, tuple(leaves.values()))
    with pytest.raises(ValueError, match="computes no gradients"):
        silu_of({name: x.bfloat16() for name, x in leaves.items()}, "native")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("norm_weight", (7,)), ("weight", (12, 7)), ("bias", (11,)), ("u", (3, 7)), ("residual", (3, 11))],
)
def test_what_does_not_fit_is_a_message(name: str, shape: tuple[int, ...]) -> None:
    t = inputs((3, 8, 12), torch.bfloat16)
    t[name] = torch.zeros(shape, dtype=torch.bfloat16)
    operators = [silu_of] * (name not in ("u", "residual")) + [residual_of] * (name != "bias")
    for operator in operators:
        with torch.no_grad(), pytest.raises(ValueError, match=name.removeprefix("norm_")):
            operator(t, "auto")


@pytest.mark.parametrize("num_parts", [0, 5, -1])
def test_parts_must_divide_the_columns(num_parts: int) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="do not divide"):
        silu_of(inputs((3, 8, 12), torch.bfloat16), "auto", num_parts=num_parts)
