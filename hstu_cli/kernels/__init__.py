"""The operators: one folder each, with a public function and its implementations."""

from hstu_cli.kernels.append_pages import append_to_pages
from hstu_cli.kernels.attention import hstu_attention, jagged_attention
from hstu_cli.kernels.attention.plan import BatchPlan, plan_batch
from hstu_cli.kernels.fused_layer import LayerWeights, fused_hstu_layer
from hstu_cli.kernels.layer import LayerPages, hstu_layer
from hstu_cli.kernels.linear import linear_residual, linear_silu
from hstu_cli.kernels.norm import layer_norm, layer_norm_mul
from hstu_cli.kernels.norm_linear import norm_linear_silu, norm_mul_linear_residual
from hstu_cli.kernels.paged_attention import hstu_paged_attention, paged_attention
from hstu_cli.kernels.paged_attention.plan import PagePlan, plan_pages

__all__ = [
    "BatchPlan",
    "LayerPages",
    "LayerWeights",
    "PagePlan",
    "append_to_pages",
    "fused_hstu_layer",
    "hstu_attention",
    "hstu_layer",
    "hstu_paged_attention",
    "jagged_attention",
    "layer_norm",
    "layer_norm_mul",
    "linear_residual",
    "linear_silu",
    "norm_linear_silu",
    "norm_mul_linear_residual",
    "paged_attention",
    "plan_batch",
    "plan_pages",
]
