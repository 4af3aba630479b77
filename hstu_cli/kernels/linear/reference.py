"""The linear layers as the formulas say them."""

import torch
import torch.nn.functional as F


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_parts: int) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_silu`."""
    return in_parts(F.silu(F.linear(x, weight, bias)), num_parts)


def in_parts(y: torch.Tensor, num_parts: int) -> torch.Tensor:
    """A result [rows, out] by its columns, [num_parts, rows, out / num_parts]; a view."""
    return y.unflatten(1, (num_parts, -1)).transpose(0, 1)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_residual`."""
    return residual + F.linear(x, weight)
