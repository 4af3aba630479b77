"""The linear layers as the formulas say them."""

import torch
import torch.nn.functional as F


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_silu`."""
    return F.silu(F.linear(x, weight, bias))


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_residual`."""
    return residual + F.linear(x, weight)
