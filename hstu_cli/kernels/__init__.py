"""The operators: one folder each, with a public function and its implementations."""

from hstu_cli.kernels.append_pages import append_to_pages
from hstu_cli.kernels.attention import hstu_attention
from hstu_cli.kernels.linear import linear_residual, linear_silu
from hstu_cli.kernels.norm import layer_norm, layer_norm_mul
from hstu_cli.kernels.paged_attention import hstu_paged_attention

__all__ = [
    "append_to_pages",
    "hstu_attention",
    "hstu_paged_attention",
    "layer_norm",
    "layer_norm_mul",
    "linear_residual",
    "linear_silu",
]
