"""The layer as one call of the C++ operators, in bf16 where these have tiles.

Between two operators that stream megabytes even short Python code comes from memory anew: some 50 µs each time.
"""

import torch

from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.fused_layer.settings import LayerWeights
from hstu_cli.kernels.layer.pages import LayerPages
from hstu_cli.kernels.linear.native import packed_tiles
from hstu_cli.kernels.paged_attention.native import flat


def layer(
    x: torch.Tensor,
    weights: LayerWeights,
    plan: BatchPlan,
    cached: LayerPages | None,
    *,
    num_heads: int,
    alpha: float,
    scaling_seqlen: int,
    eps: float,
) -> torch.Tensor:
    """See `hstu_cli.kernels.layer.hstu_layer`; no gradients."""
    w = weights
    pages = new_rows = new_slots = None
    indptr, ids, lengths = [], [], []
    if cached is not None:
        pages, new_rows, new_slots = cached.pages, cached.new_rows, cached.new_slots
        tables, lengths = cached.plan.on_host()
        indptr, ids = plan.once("flat page tables", lambda: flat(tables), cached.plan)
        cached.wait()
    return torch.ops.hstu_native.layer(
        x,
        w.input_norm_weight,
        w.input_norm_bias,
        packed_tiles(w.uvqk_weight),
        w.uvqk_bias,
        w.output_norm_weight,
        w.output_norm_bias,
        packed_tiles(w.output_weight),
        eps,
        num_heads,
        *plan.on_host(),
        pages,
        new_rows,
        new_slots,
        indptr,
        ids,
        lengths,
        alpha,
        scaling_seqlen,
    )
