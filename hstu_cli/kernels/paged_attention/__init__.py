"""HSTU attention of new tokens over cached pages and themselves."""

from itertools import pairwise

import torch

from hstu_cli.kernels.attention import check_jagged_inputs
from hstu_cli.kernels.checks import int_list
from hstu_cli.kernels.dispatch import choose_impl_for


def hstu_paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_offsets: torch.Tensor,
    num_candidates: torch.Tensor | None,
    pages: torch.Tensor,
    page_indptr: torch.Tensor,
    page_ids: torch.Tensor,
    cached_lengths: torch.Tensor,
    *,
    alpha: float,
    scaling_seqlen: int,
    impl: str = "auto",
) -> torch.Tensor:
    """HSTU attention where the first tokens of each sequence are in pages already.

    q, k, v: [tokens, heads, head_dim], the new tokens alone, jagged by seq_offsets [B + 1]: of each
      sequence its history that is not cached, then its num_candidates [B] candidates.
    pages: [num_pages, 2, page_size, heads, head_dim], keys and values of one layer, like q.
    page_indptr [B + 1], page_ids: sequence b's cached tokens are the first cached_lengths[b] of the
      pages page_ids[page_indptr[b] : page_indptr[b + 1]], in order; int32 or int64.
    alpha, scaling_seqlen, impl: as in `hstu_attention`.

    Every new token sees all cached tokens of its sequence; among the new ones the mask is that of
    `hstu_attention`. Returns o, [tokens, heads, head_dim] contiguous, in q's dtype.
    Raises ValueError for inputs that do not fit together, a page id outside the pool included.
    """
    offsets, candidates = check_jagged_inputs(q, k, v, seq_offsets, num_candidates)
    if scaling_seqlen < 1:
        raise ValueError(f"scaling_seqlen must be at least 1, not {scaling_seqlen}")
    tables, lengths = check_page_tables(q, pages, page_indptr, page_ids, cached_lengths, len(candidates))
    match choose_impl_for(impl, q, k, v, pages):
        case "reference":
            from hstu_cli.kernels.paged_attention.reference import attention
        case "blocked":
            from hstu_cli.kernels.paged_attention.blocked import attention
        case "native":
            from hstu_cli.kernels.paged_attention.native import attention
    return attention(q, k, v, offsets, candidates, pages, tables, lengths, alpha=alpha, scaling_seqlen=scaling_seqlen)


def check_page_tables(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_indptr: torch.Tensor,
    page_ids: torch.Tensor,
    cached_lengths: torch.Tensor,
    num_sequences: int,
) -> tuple[list[list[int]], list[int]]:
    """Validate page tables; return each sequence's page ids, those in use alone, and cached length."""
    if pages.dim() != 5 or pages.shape[1] != 2 or pages.shape[3:] != q.shape[1:] or pages.shape[2] < 1:
        heads, head_dim = q.shape[1:]
        raise ValueError(f"pages must be [num_pages, 2, page_size, {heads}, {head_dim}], not {list(pages.shape)}")
    if pages.dtype != q.dtype or pages.device != q.device:
        raise ValueError(f"pages must be {q.dtype} on {q.device} like q, not {pages.dtype} on {pages.device}")
    indptr, ids = int_list("page_indptr", page_indptr), int_list("page_ids", page_ids)
    lengths = int_list("cached_lengths", cached_lengths)
    if len(indptr) != num_sequences + 1 or len(lengths) != num_sequences:
        raise ValueError(
            f"page_indptr and cached_lengths must describe {num_sequences} sequences, "
            f"not {len(indptr) - 1} and {len(lengths)}"
        )
    if indptr[0] != 0 or indptr[-1] != len(ids) or any(a > b for a, b in pairwise(indptr)):
        raise ValueError(f"page_indptr must rise from 0 to the {len(ids)} page ids, not {indptr}")
    num_pages, page_size = pages.shape[0], pages.shape[2]
    tables = []
    for start, end, length in zip(indptr, indptr[1:], lengths, strict=False):
        in_use = -(-length // page_size)
        if length < 0 or in_use > end - start:
            raise ValueError(f"cached_lengths holds {length} for {end - start} pages of {page_size} tokens")
        tables.append(ids[start : start + in_use])
    outside = next((page for table in tables for page in table if not 0 <= page < num_pages), None)
    if outside is not None:
        raise ValueError(f"page_ids holds {outside}, but there are {num_pages} pages")
    return tables, lengths
