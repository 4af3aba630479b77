"""Pieces of the fused layer in plain torch, with few passes over memory; see `function.Pieces`."""

import torch
import torch.nn.functional as F

from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.attention.backward import attention_gradients as blocked_gradients
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.fused_layer.dropout import dropout_mask, dropout_scale
from hstu_cli.kernels.fused_layer.settings import LayerSettings

ROWS_OF_WEIGHT = 512
"""Rows of a weight's gradient that are computed at a time on a CPU in a narrow dtype."""


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    normed, mean, scale = _norm(x, *_norm_weights(x, weight, bias), settings.eps)
    return normed.to(settings.dtype), mean, scale


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
    grad_x, grad_weight, grad_bias = _norm_gradients(grad.to(x.dtype), x, mean, scale, *_norm_weights(x, weight, bias))
    return grad_x.add_(residual), grad_weight, grad_bias


def silu(x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    return F.silu(x)


def silu_gradients(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
    return grad.sum(0)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, settings: LayerSettings
) -> torch.Tensor:
    """See `Pieces`."""
    return blocked.attention(q, k, v, *plan.on_host(), alpha=settings.alpha, scaling_seqlen=settings.scaling_seqlen)


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
    blocked_gradients(grads, q, k, v, grad_out, *plan.on_host(), **scales)


def norm_mul_dropout(
    o: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`. What dropout multiplies by is a factor of weight and bias, so it costs no pass."""
    scaled = _norm_weights(o, weight, bias, dropout_scale(settings.dropout))
    normed, mean, scale = _norm(o, *scaled, settings.eps)
    gated = normed.mul_(u)
    if settings.dropout:
        gated.masked_fill_(dropout_mask(*o.shape, settings.dropout, settings.seed, o.device), 0.0)
    return gated, mean, scale


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
    """See `Pieces`."""
    factor = dropout_scale(settings.dropout)
    scaled = _norm_weights(o, weight, bias, factor)
    normed = _norm(o, *scaled, settings.eps)[0]
    if settings.dropout:
        dropped = dropout_mask(*o.shape, settings.dropout, settings.seed, o.device)
        grad.masked_fill_(dropped, 0.0)
    torch.mul(grad, normed, out=grad_u)
    gated, grad_normed = normed.mul_(u), grad.mul_(u)
    if settings.dropout:
        gated.masked_fill_(dropped, 0.0)
    grad_o, grad_weight, grad_bias = _norm_gradients(grad_normed, o, mean, scale, *scaled)
    return gated, grad_o, grad_weight.mul_(factor), grad_bias.mul_(factor)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`.

    On a CPU a product of a transposed narrow matrix takes twice the time of a plain one. So the smaller operand is
    transposed first, and the result block by block, while it is in the caches.
    """
    if grad.device.type != "cpu" or grad.dtype not in (torch.bfloat16, torch.float16):
        return grad.T @ x
    transposed = x.T.contiguous()
    result = x.new_empty(grad.shape[1], x.shape[1])
    for rows, columns in zip(result.split(ROWS_OF_WEIGHT), grad.split(ROWS_OF_WEIGHT, dim=1), strict=True):
        rows.copy_((transposed @ columns).T)
    return result


def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm in the dtype of x, mean and 1 / deviation [rows, 1]."""
    return torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)


def _norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, weight.shape, mean, scale, weight, bias, [True, True, True]
    )


def _norm_weights(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias times a factor, in the dtype that the norm of x takes them in.

    On a CPU that is float32 at least, and then mean and deviation are kept in it, too; elsewhere that of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return weight.to(dtype) * factor, bias.to(dtype) * factor
