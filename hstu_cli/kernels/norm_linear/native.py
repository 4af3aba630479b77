"""Norm and product as one operator, in bf16 where the C++ operators have tiles, into which many rows are normed."""

import torch

from hstu_cli.kernels.linear.native import in_separate_parts, packed_tiles


def norm_linear_silu(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_parts: int,
) -> torch.Tensor:
    """See `hstu_cli.kernels.norm_linear.norm_linear_silu`."""
    packed = packed_tiles(weight)

    def compute(parts: int) -> torch.Tensor:
        return torch.ops.hstu_native.norm_linear_silu(x, norm_weight, norm_bias, eps, packed, bias, parts)

    return in_separate_parts(compute, len(bias), num_parts)


def norm_mul_linear_residual(
    x: torch.Tensor,
    u: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """See `hstu_cli.kernels.norm_linear.norm_mul_linear_residual`."""
    packed = packed_tiles(weight)
    return torch.ops.hstu_native.norm_mul_linear_residual(x, u, norm_weight, norm_bias, eps, packed, residual)
