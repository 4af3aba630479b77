"""A layer norm and the linear layer that reads it: one operator where an implementation does both at once."""

import torch

from hstu_cli.kernels.dispatch import choose_impl_for, runs_on
from hstu_cli.kernels.linear import check_linear, check_parts, linear_residual, linear_silu
from hstu_cli.kernels.norm import check_norm, layer_norm, layer_norm_mul


def norm_linear_silu(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    num_parts: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`SiLU(LayerNorm(x) W' + b)`: x [rows, in], norm_weight and norm_bias [in]; else as `layer_norm`, `linear_silu`.

    The norm is rounded to the dtype before it is multiplied: the result is that of the two operators, bit for bit.
    """
    if _is_one_operator(impl, x, norm_weight, norm_bias, weight, bias):
        check_norm(x, norm_weight, norm_bias, x)
        check_linear(x, weight, "bias", bias, weight.shape[:1])
        check_parts(num_parts, bias)
        from hstu_cli.kernels.norm_linear.native import norm_linear_silu

        parts = norm_linear_silu(x, norm_weight, norm_bias, eps, weight, bias, num_parts or 1)
        return parts[0] if num_parts is None else parts
    normed = layer_norm(x, norm_weight, norm_bias, eps=eps, impl=impl)
    return linear_silu(normed, weight, bias, num_parts=num_parts, impl=impl)


def norm_mul_linear_residual(
    x: torch.Tensor,
    u: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    *,
    eps: float,
    impl: str = "auto",
) -> torch.Tensor:
    """`residual + (LayerNorm(x) * u) W'`: x and u [rows, in], norm_weight and norm_bias [in].

    Else as `layer_norm_mul` and `linear_residual`, whose result it is, bit for bit.
    """
    if _is_one_operator(impl, x, u, norm_weight, norm_bias, weight, residual):
        check_norm(x, norm_weight, norm_bias, u)
        check_linear(x, weight, "residual", residual, (*x.shape[:1], *weight.shape[:1]))
        from hstu_cli.kernels.norm_linear.native import norm_mul_linear_residual

        return norm_mul_linear_residual(x, u, norm_weight, norm_bias, eps, weight, residual)
    gated = layer_norm_mul(x, u, norm_weight, norm_bias, eps=eps, impl=impl)
    return linear_residual(gated, weight, residual, impl=impl)


def _is_one_operator(impl: str, *tensors: torch.Tensor) -> bool:
    if not runs_on("native", tensors[0].device.type) or choose_impl_for(impl, *tensors) != "native":
        return False
    from hstu_cli.kernels.linear.native import goes_into_tiles

    return goes_into_tiles(tensors[0])
