"""One HSTU layer of inference, over whole sequences or over cached pages."""

import torch

from hstu_cli.kernels.attention import check_scaling, check_tokens, jagged_attention
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.dispatch import AUTO, choose_impl_for, runs_on, wants_gradient
from hstu_cli.kernels.fused_layer.settings import LayerWeights
from hstu_cli.kernels.inputs import check_alike
from hstu_cli.kernels.layer.pages import LayerPages
from hstu_cli.kernels.norm_linear import norm_linear_silu, norm_mul_linear_residual
from hstu_cli.kernels.paged_attention import paged_attention

__all__ = ["LayerPages", "hstu_layer"]

# Shapes: T tokens, D width, H heads, d head_dim.


def hstu_layer(
    x: torch.Tensor,
    weights: LayerWeights,
    plan: BatchPlan,
    cached: LayerPages | None = None,
    *,
    num_heads: int,
    alpha: float,
    scaling_seqlen: int,
    eps: float,
    impl: str = AUTO,
) -> torch.Tensor:
    """`x + (LayerNorm(attention(q, k, v)) * u) W_o` with u, v, q, k from `SiLU(LayerNorm(x) W + b)`.

    Equations 1 to 3 of "Actions Speak Louder than Words" (ICML 2024).
    x: [T, D], its tokens in the order of `plan`; result like x. weights: see `LayerWeights`, of the dtype of x.
    cached: what attention sees besides the tokens of the batch, as in `hstu_paged_attention`; None for nothing.
    alpha, scaling_seqlen: see `hstu_attention`. eps: of both layer norms. impl: that of every operator of the layer.
    Gradients, where nothing is cached, are those of its operators; `fused_hstu_layer` has better ones.
    Raises ValueError for inputs that do not fit together, before anything is stored, and what `choose_impl` does.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, width], not {list(x.shape)}")
    check_tokens(x, plan)
    check_scaling(scaling_seqlen)
    weights.check(x.shape[1], num_heads, x.device)
    check_alike("weights", x, *weights)
    head_dim = len(weights.output_norm_weight) // num_heads
    if cached is not None:
        cached.check(x, num_heads, head_dim, plan)
        if wants_gradient(x, *weights):
            raise ValueError("a layer has no gradients over cached pages; run it under torch.no_grad()")
    if _is_one_call(x, weights, cached, impl):
        from hstu_cli.kernels.layer.native import layer

        return layer(x, weights, plan, cached, num_heads=num_heads, alpha=alpha, scaling_seqlen=scaling_seqlen, eps=eps)
    w = weights
    u, *vqk = norm_linear_silu(
        x, w.input_norm_weight, w.input_norm_bias, w.uvqk_weight, w.uvqk_bias, eps=eps, num_parts=4, impl=impl
    )  # [T, H * d] each
    v, q, k = (part.unflatten(1, (num_heads, head_dim)) for part in vqk)  # [T, H, d]
    if cached is None:
        o = jagged_attention(q, k, v, plan, alpha=alpha, scaling_seqlen=scaling_seqlen, impl=impl)
    else:
        cached.store(k, v)
        o = paged_attention(
            q, k, v, plan, cached.pages, cached.plan, alpha=alpha, scaling_seqlen=scaling_seqlen, impl=impl
        )
    return norm_mul_linear_residual(
        o.flatten(1), u, w.output_norm_weight, w.output_norm_bias, w.output_weight, x, eps=eps, impl=impl
    )


def _is_one_call(x: torch.Tensor, weights: LayerWeights, cached: LayerPages | None, impl: str) -> bool:
    """Whether the C++ operators compute the whole layer at once."""
    if not runs_on("native", x.device.type) or choose_impl_for(impl, x, *weights) != "native":
        return False
    from hstu_cli.kernels.linear.native import goes_into_tiles

    return goes_into_tiles(x) and (cached is None or cached.append_impl == "native" or not len(cached.new_rows))
