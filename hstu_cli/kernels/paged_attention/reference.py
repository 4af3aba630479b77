"""Paged HSTU attention as the formula says it: gathers a sequence's pages, then one dense matrix."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from hstu_cli.kernels.attention.reference import attention_mask

# Shapes: m cached and R new tokens of one sequence, N = m + R, H heads, d head_dim.


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: list[int],
    num_candidates: list[int],
    pages: torch.Tensor,
    page_tables: list[list[int]],
    cached_lengths: list[int],
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `hstu_paged_attention`; every operation runs in the dtype of the inputs."""
    outputs = []
    for b, (start, end) in enumerate(pairwise(offsets)):
        m = cached_lengths[b]
        cached = pages[page_tables[b]].transpose(0, 1).flatten(1, 2)[:, :m]  # [2, m, H, d]
        keys = torch.cat([cached[0], k[start:end]])  # [N, H, d]
        values = torch.cat([cached[1], v[start:end]])  # [N, H, d]
        mask = attention_mask(m + end - start, num_candidates[b], q.device)[m:]  # [R, N]
        scores = alpha * torch.einsum("ihd,jhd->hij", q[start:end], keys)  # [H, R, N]
        weights = F.silu(scores) / scaling_seqlen * mask  # [H, R, N]
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))  # [R, H, d]
    outputs.append(q.new_zeros(len(q) - offsets[-1], *q.shape[1:]))  # rows of padding, which no sequence has
    return torch.cat(outputs)
