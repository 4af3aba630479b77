"""Paged HSTU attention by the C++ operators, which read keys and values where the pages are."""

from itertools import accumulate, chain

import torch


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
    """See `hstu_paged_attention`; no gradients."""
    if not len(q):
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return torch.ops.hstu_native.attention(
        q, k, v, offsets, num_candidates, pages, *flat(page_tables), cached_lengths, alpha, scaling_seqlen
    )


def flat(page_tables: list[list[int]]) -> tuple[list[int], list[int]]:
    """Where each table begins, [B + 1], and all tables, one behind the other."""
    return list(accumulate(map(len, page_tables), initial=0)), list(chain.from_iterable(page_tables))
