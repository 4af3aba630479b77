"""Pieces of the fused layer in plain torch, with few passes over memory; see `function.Pieces`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.attention.backward import attention_gradients as blocked_gradients
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.fused_layer.dropout import dropout_mask, dropout_scale
from hstu_cli.kernels.fused_layer.settings import LayerSettings

ROWS_OF_WEIGHT = 512
"""Rows of a weight's gradient that are computed at a time on a CPU in a narrow dtype."""

TOKENS = 512
"""Tokens that a sequence of passes takes at a time on a CPU, so that it finds them in the caches."""


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
    weights = _norm_weights(x, weight, bias)
    grad_x, sums = torch.empty_like(x), _Sums()
    for rows in _blocks_of_tokens(x):
        found, *grads = _norm_gradients(grad[rows], x[rows], mean[rows], scale[rows], *weights)
        grad_x[rows] = found.add_(residual[rows])
        sums.add(*grads)
    return grad_x, *sums.totals(weights)


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    linear = torch.addmm(bias, x, weight.T)
    return linear, F.silu(linear)


def silu(x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    return F.silu(x)


def silu_gradients(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    sums = _Sums()
    for rows in _blocks_of_tokens(x):
        torch.ops.aten.silu_backward.grad_input(grad[rows], x[rows], grad_input=grad[rows])
        sums.add(grad[rows].sum(0))
    return sums.totals((x.new_empty(x.shape[1]),))[0]


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
        dropped = dropout_mask(*o.shape, settings.dropout, settings.seed, o.device)
        for rows in _blocks_of_tokens(o):
            gated[rows].mul_(_kept(dropped[rows], o.dtype))
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
    weights = _norm_weights(o, weight, bias, factor)
    dropped = dropout_mask(*o.shape, settings.dropout, settings.seed, o.device) if settings.dropout else None
    gated, sums = torch.empty_like(o), _Sums()
    for rows in _blocks_of_tokens(o):
        normed, _, _ = _norm(o[rows], *weights, settings.eps)
        torch.mul(normed, u[rows], out=gated[rows])
        if dropped is not None:
            kept = _kept(dropped[rows], o.dtype)
            grad[rows].mul_(kept)
            gated[rows].mul_(kept)
        torch.mul(grad[rows], normed, out=grad_u[rows])
        grad_normed = torch.mul(grad[rows], u[rows], out=normed)
        grad[rows], *grads = _norm_gradients(grad_normed, o[rows], mean[rows], scale[rows], *weights)
        sums.add(*grads)
    grad_weight, grad_bias = sums.totals(weights)
    return gated, grad, grad_weight.mul_(factor), grad_bias.mul_(factor)


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
) -> list[torch.Tensor]:
    """Gradients of x, weight and bias, in the dtype of the weight.

    In bfloat16 torch's CPU kernel would sum the weight's and the bias's in that, and lose most of them.
    """
    grad, x = grad.to(weight.dtype), x.to(weight.dtype)
    return list(
        torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, scale, weight, bias, [True, True, True])
    )


def _kept(dropped: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Ones where an element stays, else zeros: a product with them takes a third of the time that filling does."""
    return dropped.logical_not().to(dtype)


class _Sums:
    """Sums of tensors over the blocks of tokens, in float32 at least."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, *values: torch.Tensor) -> None:
        """The values of one more block."""
        if self._sums:
            for total, value in zip(self._sums, values, strict=True):
                total += value
        else:
            self._sums = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]

    def totals(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sums; zeros shaped like these where there was no block."""
        return self._sums or [torch.zeros_like(tensor) for tensor in like]


def _blocks_of_tokens(x: torch.Tensor) -> list[slice]:
    """Rows to take at a time: all of them on an accelerator."""
    size = TOKENS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _norm_weights(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias times a factor, in the dtype that the norm of x takes them in.

    On a CPU that is float32 at least, and then mean and deviation are kept in it, too; elsewhere that of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return weight.to(dtype) * factor, bias.to(dtype) * factor
