"""Paged HSTU attention in plain torch: the pages of a sequence are gathered before its new tokens.

Gathering is head by head and for a few sequences at a time, never padded to the longest of the batch.
"""

from itertools import pairwise

import torch

from hstu_cli.kernels.attention import blocked

# Shapes: a group of G sequences padded to R new and m cached tokens, N = m + R, P pages each, H heads,
# d head_dim.


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
    """See `hstu_paged_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = [slice(start, end) for start, end in pairwise(offsets)]
    for group in blocked.groups_of_similar_size([r.stop - r.start for r in rows], cached_lengths):
        new = [rows[b] for b in group]
        lengths = [cached_lengths[b] for b in group]
        keys, values = _keys_and_values(k, v, new, pages, [page_tables[b] for b in group], lengths)
        blocked.attend(out, q, keys, values, new, [num_candidates[b] for b in group], alpha, scaling_seqlen)
    return out


def _keys_and_values(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: list[slice],
    pages: torch.Tensor,
    page_tables: list[list[int]],
    cached_lengths: list[int],
) -> torch.Tensor:
    """Cached and then new keys and values of a group, [2, H, G, N, d], zero between the two of each one."""
    _, _, page_size, num_heads, head_dim = pages.shape
    num_new = max(r.stop - r.start for r in rows)
    pages_each = -(-(max(cached_lengths) + num_new) // page_size)  # with room for the new tokens
    num_cached = pages_each * page_size - num_new
    if any(page_tables):
        ids = torch.tensor([table + [0] * (pages_each - len(table)) for table in page_tables], device=pages.device)
        # One copy both gathers and brings the heads to the front.
        gathered = _as_words(pages).permute(1, 3, 0, 2, 4).index_select(2, ids.flatten())
        both = gathered.view(pages.dtype).view(2, num_heads, len(rows), -1, head_dim)
    else:
        both = pages.new_empty(2, num_heads, len(rows), num_cached + num_new, head_dim)
    for g, length in enumerate(cached_lengths):
        both[:, :, g, length:num_cached].zero_()
    for new, x in zip(both[:, :, :, num_cached:], (k, v), strict=True):
        blocked.pad(x, rows, out=new)
    return both


def _as_words(x: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes where its rows allow it: those are copied fastest."""
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x
