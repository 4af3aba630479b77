"""HSTU attention by the C++ operators, which must be loaded: `choose_impl` sees to it."""

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: list[int],
    num_candidates: list[int],
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `hstu_attention`; no gradients."""
    if not len(q):
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return torch.ops.hstu_native.attention(q, k, v, offsets, num_candidates, None, [], [], [], alpha, scaling_seqlen)
