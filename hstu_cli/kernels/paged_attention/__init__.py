"""HSTU attention of new tokens over cached pages and themselves."""

import torch

from hstu_cli.backend import prefers_few_shapes
from hstu_cli.kernels.attention import check_like_q, check_planned
from hstu_cli.kernels.attention.plan import BatchPlan, plan_batch
from hstu_cli.kernels.dispatch import choose_impl_for, wants_gradient
from hstu_cli.kernels.paged_attention.plan import PagePlan, plan_pages


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

    Plans the batch on every call; who runs several layers on one batch calls `plan_batch` and
    `plan_pages` once and `paged_attention` for each.
    """
    check_like_q(q, k, v)
    check_pages(q, *q.shape[1:], pages)
    plan = plan_batch(seq_offsets, num_candidates, q.shape[0], q.device)
    page_plan = plan_pages(
        page_indptr,
        page_ids,
        cached_lengths,
        num_sequences=plan.num_sequences,
        num_pages=pages.shape[0],
        page_size=pages.shape[2],
        device=pages.device,
    )
    return paged_attention(q, k, v, plan, pages, page_plan, alpha=alpha, scaling_seqlen=scaling_seqlen, impl=impl)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BatchPlan,
    pages: torch.Tensor,
    page_plan: PagePlan,
    *,
    alpha: float,
    scaling_seqlen: int,
    impl: str = "auto",
) -> torch.Tensor:
    """`hstu_paged_attention` of a planned batch: looks at shapes, dtypes and devices alone, and waits for nothing."""
    check_planned(q, k, v, plan, scaling_seqlen)
    check_pages(q, *q.shape[1:], pages)
    check_pool(pages, page_plan, plan)
    match choose_impl_for(impl, q, k, v, pages):
        case "reference":
            from hstu_cli.kernels.paged_attention.reference import attention
        case "blocked":
            if prefers_few_shapes(q.device) and not wants_gradient(q, k, v, pages):
                from hstu_cli.kernels.attention.bucketed import attention

                return attention(q, k, v, plan, pages, page_plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
            from hstu_cli.kernels.paged_attention.blocked import attention
        case "native":
            from hstu_cli.kernels.paged_attention.native import attention
        case "ascend":
            from hstu_cli.kernels.attention.ascend import paged_attention as attention

            return attention(q, k, v, plan, pages, page_plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
        case "triton":
            from hstu_cli.kernels.paged_attention.triton import attention

            return attention(q, k, v, plan, pages, page_plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
    return attention(q, k, v, *plan.on_host(), pages, *page_plan.on_host(), alpha=alpha, scaling_seqlen=scaling_seqlen)


def check_pool(pages: torch.Tensor, page_plan: PagePlan, plan: BatchPlan) -> None:
    """ValueError unless the page tables were planned for this pool and for as many sequences as the batch has."""
    pool = (page_plan.num_pages, page_plan.page_size)
    if (pages.shape[0], pages.shape[2]) != pool or page_plan.cached_lengths.shape[0] != plan.num_sequences:
        raise ValueError(
            f"the page tables were planned for {page_plan.cached_lengths.shape[0]} sequences and {pool[0]} pages of "
            f"{pool[1]} tokens, not {plan.num_sequences} and {pages.shape[0]} of {pages.shape[2]}"
        )


def check_pages(x: torch.Tensor, num_heads: int, head_dim: int, pages: torch.Tensor) -> None:
    """ValueError unless pages is [num_pages, 2, page_size, num_heads, head_dim] of the dtype and on the device of x."""
    if pages.dim() != 5 or pages.shape[1] != 2 or pages.shape[3:] != (num_heads, head_dim) or pages.shape[2] < 1:
        raise ValueError(f"pages must be [num_pages, 2, page_size, {num_heads}, {head_dim}], not {list(pages.shape)}")
    if pages.dtype != x.dtype or pages.device != x.device:
        raise ValueError(f"pages must be {x.dtype} on {x.device} like q, not {pages.dtype} on {pages.device}")
