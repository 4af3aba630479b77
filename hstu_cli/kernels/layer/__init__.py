"""One HSTU layer of inference, over whole sequences or over cached pages."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hstu_cli.kernels.append_pages import append_to_pages
from hstu_cli.kernels.attention import jagged_attention
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.dispatch import AUTO
from hstu_cli.kernels.fused_layer.settings import LayerWeights
from hstu_cli.kernels.norm_linear import norm_linear_silu, norm_mul_linear_residual
from hstu_cli.kernels.paged_attention import paged_attention
from hstu_cli.kernels.paged_attention.plan import PagePlan

# Shapes: T tokens, D width, H heads, d head_dim.


@dataclass(frozen=True, slots=True)
class LayerPages:
    """The cached keys and values of one layer, and which of the batch's join them.

    pages: [num_pages, 2, page_size, H, d]. plan: where in them the cached tokens are.
    new_rows, new_slots: int64 [n], which of the batch's tokens are stored and where, before attention reads the pages;
      see `append_to_pages`, append_impl is its impl.
    wait: called before the pages are touched, as they may still be on their way.
    """

    pages: torch.Tensor
    plan: PagePlan
    new_rows: torch.Tensor
    new_slots: torch.Tensor
    append_impl: str
    wait: Callable[[], None]

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the new ones of k and v [T, H, d] into the pages, once these are there."""
        self.wait()
        if len(self.new_rows):
            append_to_pages(k, v, self.new_rows, self.pages, self.new_slots, impl=self.append_impl)


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
    Raises ValueError for inputs that do not fit together, and what `choose_impl` does.
    """
    w = weights
    u, *vqk = norm_linear_silu(
        x, w.input_norm_weight, w.input_norm_bias, w.uvqk_weight, w.uvqk_bias, eps=eps, num_parts=4, impl=impl
    )  # [T, H * d] each
    v, q, k = (part.unflatten(1, (num_heads, part.shape[1] // num_heads)) for part in vqk)  # [T, H, d]
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
