"""The fused layer's forward and backward pass; the pieces of both come from one of its implementations."""

from typing import Any, Protocol

import torch

from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.fused_layer.settings import LayerSettings, LayerWeights

# Shapes: T tokens, D width, H heads, d head_dim, W = H * d. uvqk is [T, 4 * W]: u, v, q and k side by side.


class Pieces(Protocol):
    """What an implementation offers, as functions of its module. Activations are of one dtype, `settings.dtype`."""

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """LayerNorm of x [T, D] in the settings' dtype, and what its gradient needs: mean and 1 / deviation."""

    def layer_norm_gradients(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of x, with `residual` [T, D] added, of weight and of bias, for `grad` [T, D] of the result."""

    def linear_silu(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x W' + b` [T, 4 * W] of x [T, D], weight [4 * W, D] and bias [4 * W] of one dtype, and `silu` of it."""

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """SiLU of x [T, 4 * W], as another tensor."""

    def silu_gradients(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Make `grad` [T, 4 * W] of SiLU's result that of x, in place; return its sum over the tokens, [4 * W]."""

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, settings: LayerSettings
    ) -> torch.Tensor:
        """Attention's output [T, H, d]."""

    def attention_gradients(
        self,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grad_out: torch.Tensor,
        plan: BatchPlan,
        settings: LayerSettings,
    ) -> None:
        """Write the gradients of q, k and v, [T, H, d] each, to `grads`, which are parts of wider rows."""

    def norm_mul_dropout(
        self, o: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`dropout(LayerNorm(o) * u)` of o [T, W] and u, a part of wider rows; mean and 1 / deviation of o."""

    def norm_mul_dropout_gradients(
        self,
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
        """The result of `norm_mul_dropout` once more, and gradients of o, weight and bias; that of u goes to grad_u.

        grad [T, W], the gradient of the result, may be overwritten.
        """

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`grad' x`, [out, in], for grad [T, out] and x [T, in]."""


class FusedLayer(torch.autograd.Function):
    """`fused_hstu_layer`. What its backward pass needs is all that is kept, and only for as long as it needs it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, plan: BatchPlan, settings: LayerSettings, pieces: Pieces, *weights: torch.Tensor
    ) -> torch.Tensor:
        """The output [T, D]."""
        w = LayerWeights(*weights)
        ctx.plan, ctx.settings, ctx.pieces = plan, settings, pieces
        with torch.autocast(x.device.type, enabled=False):
            normed, *input_stats = pieces.layer_norm(x, w.input_norm_weight, w.input_norm_bias, settings)  # [T, D]
            dtype = normed.dtype
            linear, uvqk = pieces.linear_silu(normed, w.uvqk_weight.to(dtype), w.uvqk_bias.to(dtype))  # [T, 4 * W]
            kept_normed = normed if settings.keeps_normed else None
            del normed
            u, v, q, k = _split(uvqk, settings.num_heads)  # [T, H, d]
            o = pieces.attention(q, k, v, plan, settings).flatten(1)  # [T, W]
            gated, *output_stats = pieces.norm_mul_dropout(
                o, u.flatten(1), w.output_norm_weight, w.output_norm_bias, settings
            )
            kept_uvqk = uvqk if settings.keeps_activated else None
            ctx.save_for_backward(x, *weights, *input_stats, linear, o, *output_stats, kept_normed, kept_uvqk)
            del u, v, q, k, uvqk
            output_weight = w.output_weight.to(gated.dtype)
            if x.dtype == gated.dtype:
                return torch.addmm(x, gated, output_weight.T)
            return x + gated @ output_weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the weights, each in the dtype of its tensor."""
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """See `FusedLayer.backward`."""
    settings, pieces = ctx.settings, ctx.pieces
    x, *rest = ctx.saved_tensors
    w = LayerWeights(*rest[:7])
    input_mean, input_scale, linear, o, output_mean, output_scale, normed, uvqk = rest[7:]
    if uvqk is None:
        uvqk = pieces.silu(linear)
    u, v, q, k = _split(uvqk, settings.num_heads)
    grad_uvqk = torch.empty_like(linear)  # [T, 4 * W], filled part by part
    grad_u, grad_v, grad_q, grad_k = _split(grad_uvqk, settings.num_heads)

    narrow_grad = grad.to(settings.dtype).contiguous()
    gated, grad_o, grad_output_norm_weight, grad_output_norm_bias = pieces.norm_mul_dropout_gradients(
        grad_u.flatten(1),
        narrow_grad @ w.output_weight.to(settings.dtype),
        o,
        u.flatten(1),
        output_mean,
        output_scale,
        w.output_norm_weight,
        w.output_norm_bias,
        settings,
    )
    grad_output_weight = pieces.weight_gradient(narrow_grad, gated)
    del gated, narrow_grad
    pieces.attention_gradients((grad_q, grad_k, grad_v), q, k, v, grad_o.view_as(q), ctx.plan, settings)
    del u, v, q, k, uvqk, grad_o
    grad_uvqk_bias = pieces.silu_gradients(grad_uvqk, linear)
    if normed is None:
        normed = pieces.layer_norm(x, w.input_norm_weight, w.input_norm_bias, settings)[0]
    grad_uvqk_weight = pieces.weight_gradient(grad_uvqk, normed)
    del normed
    grad_normed = grad_uvqk @ w.uvqk_weight.to(settings.dtype)  # [T, D]
    del grad_uvqk, grad_u, grad_v, grad_q, grad_k
    grad_x, grad_input_norm_weight, grad_input_norm_bias = pieces.layer_norm_gradients(
        grad_normed, x, input_mean, input_scale, w.input_norm_weight, w.input_norm_bias, grad
    )
    found = LayerWeights(
        grad_input_norm_weight,
        grad_input_norm_bias,
        grad_uvqk_weight,
        grad_uvqk_bias,
        grad_output_norm_weight,
        grad_output_norm_bias,
        grad_output_weight,
    )
    return grad_x, None, None, None, *(one.to(weight.dtype) for one, weight in zip(found, w, strict=True))


def _split(uvqk: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """u, v, q and k, [T, H, d] each, as views of [T, 4 * W]."""
    return uvqk.view(len(uvqk), 4, num_heads, uvqk.shape[1] // (4 * num_heads)).unbind(1)
