"""The layer norms as the formulas say them."""

import torch
import torch.nn.functional as F


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """See `hstu_cli.kernels.norm.layer_norm`."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm_mul(
    x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `hstu_cli.kernels.norm.layer_norm_mul`."""
    return layer_norm(x, weight, bias, eps) * u
