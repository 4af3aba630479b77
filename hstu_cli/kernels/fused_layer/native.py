"""Pieces of the fused layer (`function.Pieces`) by the C++ operators, which must be loaded: `choose_impl` sees to it.

Every row-wise operator is one pass over its rows. Products are torch's, but for those in bf16 that the C++ tiles do
faster here: the first linear layer with its SiLU, and the weights' gradients.
"""

import torch

from hstu_cli.kernels.attention.native import attention as native_attention
from hstu_cli.kernels.attention.native import attention_gradients as native_gradients
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.fused_layer import blocked
from hstu_cli.kernels.fused_layer.dropout import dropout_level
from hstu_cli.kernels.fused_layer.settings import LayerSettings
from hstu_cli.kernels.linear.native import goes_into_tiles


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    return torch.ops.hstu_native.norm_kept(x, None, weight, bias, settings.eps, settings.dtype, 0, 0)


def layer_norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = torch.ops.hstu_native.norm_gradients(
        grad, x, None, mean, scale, weight, bias, residual, grad_x, None, None, 0, 0
    )
    return grad_x, *sums.unbind()


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    if goes_into_tiles(x):
        return torch.ops.hstu_native.linear_silu_kept(x, weight, bias)
    linear = torch.addmm(bias, x, weight.T)
    return linear, silu(linear)


def silu(x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    return torch.ops.hstu_native.silu(x)


def silu_gradients(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    return torch.ops.hstu_native.silu_gradients(grad, x)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, settings: LayerSettings
) -> torch.Tensor:
    """See `Pieces`."""
    return native_attention(q, k, v, *plan.on_host(), alpha=settings.alpha, scaling_seqlen=settings.scaling_seqlen)


def attention_gradients(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    plan: BatchPlan,
    settings: LayerSettings,
) -> None:
    """See `Pieces`."""
    scales = {"alpha": settings.alpha, "scaling_seqlen": settings.scaling_seqlen}
    native_gradients(grads, q, k, v, grad_out, *plan.on_host(), **scales)


def norm_mul_dropout(
    o: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    return torch.ops.hstu_native.norm_kept(
        o, u, weight, bias, settings.eps, settings.dtype, settings.seed, dropout_level(settings.dropout)
    )


def norm_mul_dropout_gradients(
    grad_u: torch.Tensor,
    grad: torch.Tensor,
    o: torch.Tensor,
    u: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    settings: LayerSettings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`. The gradient of o takes the place of that of the result."""
    gated = torch.empty_like(o)
    level = dropout_level(settings.dropout)
    sums = torch.ops.hstu_native.norm_gradients(
        grad, o, u, mean, scale, weight, bias, None, grad, grad_u, gated, settings.seed, level
    )
    return gated, grad, *sums.unbind()


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    if goes_into_tiles(grad):
        return torch.ops.hstu_native.product(grad, x, True, False, None)
    return blocked.weight_gradient(grad, x)


def dropout_mask(num_rows: int, width: int, share: float, seed: int, device: torch.device) -> torch.Tensor:
    """The mask that these operators make, bool [num_rows, width]; see `dropout.dropout_mask`."""
    return torch.ops.hstu_native.dropout_mask(num_rows, width, seed, dropout_level(share)).to(device)
