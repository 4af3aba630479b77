"""The layer norms by the C++ operators, which must be loaded: `choose_impl` sees to it."""

import torch

from hstu_cli.kernels.norm import reference


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """See `hstu_cli.kernels.norm.layer_norm`; no gradients."""
    if x.dtype in (torch.float32, torch.float64):
        return reference.layer_norm(x, weight, bias, eps)  # torch's own is at the speed of memory there
    return torch.ops.hstu_native.layer_norm(x, None, weight, bias, eps)


def layer_norm_mul(
    x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `hstu_cli.kernels.norm.layer_norm_mul`; rounds to a narrow dtype once, no gradients."""
    return torch.ops.hstu_native.layer_norm(x, u, weight, bias, eps)
