"""One HSTU layer for training: fused operators, and a backward pass that keeps or computes again what it needs."""

import torch

from hstu_cli.kernels.attention import check_scaling, check_tokens
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.dispatch import AUTO, choose_impl
from hstu_cli.kernels.fused_layer.dropout import dropout_level
from hstu_cli.kernels.fused_layer.reference import composition, seeded_dropout
from hstu_cli.kernels.fused_layer.settings import RECOMPUTE, LayerSettings, LayerWeights

__all__ = ["RECOMPUTE", "LayerSettings", "LayerWeights", "composition", "fused_hstu_layer", "seeded_dropout"]


def fused_hstu_layer(
    x: torch.Tensor,
    weights: LayerWeights,
    plan: BatchPlan,
    *,
    num_heads: int,
    alpha: float,
    scaling_seqlen: int,
    eps: float,
    dropout: float = 0.0,
    seed: int = 0,
    recompute: str = "none",
    dtype: torch.dtype | None = None,
    impl: str = AUTO,
) -> torch.Tensor:
    """`x + dropout(LayerNorm(attention(q, k, v)) * u) W_o` with u, v, q, k from `SiLU(LayerNorm(x) W + b)`.

    Equations 1 to 3 of "Actions Speak Louder than Words" (ICML 2024).
    x: [T, D], its tokens in the order of `plan`; result like x. weights: see `LayerWeights`, any floating dtype.
    alpha, scaling_seqlen: see `hstu_attention`. eps: of both layer norms.
    dropout: the share of the gated output that is zeroed, rounded to a multiple of 2**-16; which elements is decided by
      `seed` alone, so that the backward pass makes the same mask again.
    recompute: what the backward pass computes again instead of keeping it, one of `RECOMPUTE`: nothing, the normalised
      input, u, v, q and k, or both; results are the same, bit for bit.
    dtype: of activations and matrix products, None for that of x; gradients have the dtype of their tensors.
    impl: `auto`, `blocked`, `native`, `triton` (activations in float32, float16 or bfloat16, head dims up to 256, rows
      up to 16,384 elements), or `reference`, which computes in the dtype of x and recomputes nothing.
    Differentiable once in x and the weights. Kept between the passes, for each token: x (D), the normalised input (D),
    SiLU's input (4 H d), u, v, q, k (4 H d), attention's output (H d) and two means and deviations.
    Raises ValueError for inputs that do not fit together, and what `choose_impl` does.
    """
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be [tokens, width] of a floating dtype, not {list(x.shape)} {x.dtype}")
    check_tokens(x, plan)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, not {recompute!r}")
    check_scaling(scaling_seqlen)
    dropout_level(dropout)
    weights.check(x.shape[1], num_heads, x.device)
    name = choose_impl(impl, x.device.type, gradients=True).name
    settings = LayerSettings(num_heads, alpha, scaling_seqlen, eps, dropout, seed, recompute, dtype or x.dtype)
    if name == "reference":
        if settings.dtype != x.dtype or recompute != "none":
            raise ValueError("impl='reference' computes in the dtype of x and recomputes nothing")
        from hstu_cli.kernels.fused_layer.reference import layer

        return layer(x, weights, plan, settings)
    from hstu_cli.kernels.fused_layer.function import FusedLayer

    if name == "triton":
        from hstu_cli.kernels.fused_layer import triton as pieces
    elif name == "native":
        from hstu_cli.kernels.fused_layer import native as pieces
    else:
        from hstu_cli.kernels.fused_layer import blocked as pieces
    return FusedLayer.apply(x, plan, settings, pieces, *weights)
