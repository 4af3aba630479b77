"""The layer as the formulas say it, operator by operator, with torch's own gradients."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hstu_cli.kernels.attention import jagged_attention
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.fused_layer.dropout import dropout_scale
from hstu_cli.kernels.fused_layer.settings import LayerSettings, LayerWeights

# Shapes: T tokens, D width, H heads, d head_dim.


def layer(x: torch.Tensor, weights: LayerWeights, plan: BatchPlan, settings: LayerSettings) -> torch.Tensor:
    """See `fused_hstu_layer`; with dense attention, in the dtype of x."""
    return composition(x, weights, plan, settings, impl="reference", drop=seeded_dropout(settings))


def composition(
    x: torch.Tensor,
    weights: LayerWeights,
    plan: BatchPlan,
    settings: LayerSettings,
    *,
    impl: str,
    drop: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The layer in plain torch operators but for its attention, which is `impl`; drop: of the gated output [T, H * d].

    `settings.recompute` has no meaning here.
    """
    w = weights
    normed = F.layer_norm(x, x.shape[1:], w.input_norm_weight, w.input_norm_bias, settings.eps)  # [T, D]
    uvqk = F.silu(F.linear(normed, w.uvqk_weight, w.uvqk_bias))  # [T, 4 * H * d]
    head_dim = uvqk.shape[1] // (4 * settings.num_heads)
    u, v, q, k = uvqk.view(-1, 4, settings.num_heads, head_dim).unbind(1)  # [T, H, d]
    scales = {"alpha": settings.alpha, "scaling_seqlen": settings.scaling_seqlen}
    o = jagged_attention(q, k, v, plan, **scales, impl=impl).flatten(1)  # [T, H * d]
    normed_o = F.layer_norm(o, o.shape[1:], w.output_norm_weight, w.output_norm_bias, settings.eps)
    return x + F.linear(drop(normed_o * u.flatten(1)), w.output_weight)


def seeded_dropout(
    settings: LayerSettings, impl: str = "reference", device: torch.device | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Dropout by the settings' seed, with the mask that `impl` makes on `device`, None for that of the input."""

    def drop(x: torch.Tensor) -> torch.Tensor:
        if not settings.dropout:
            return x
        if impl == "triton":
            from hstu_cli.kernels.fused_layer.triton import dropout_mask
        elif impl == "native":
            from hstu_cli.kernels.fused_layer.native import dropout_mask
        else:
            from hstu_cli.kernels.fused_layer.dropout import dropout_mask
        dropped = dropout_mask(*x.shape, settings.dropout, settings.seed, device or x.device)
        return x.masked_fill(dropped.to(x.device), 0.0) * dropout_scale(settings.dropout)

    return drop
