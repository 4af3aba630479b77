"""Writes new keys and values into pages."""

import torch

from hstu_cli.kernels.dispatch import choose_impl_for


def append_to_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Write rows of k and v to slots of the pages, in place.

    k, v: [tokens, heads, head_dim]; rows: [n] int64, which tokens to write.
    pages: [num_pages, 2, page_size, heads, head_dim] of one layer; slots: [n] int64, each a page id
    times page_size plus the place in the page, all different.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    if k.shape != v.shape or pages.shape[1:2] + pages.shape[3:] != (2, *k.shape[1:]) or rows.shape != slots.shape:
        raise ValueError(
            f"k and v [tokens, heads, head_dim], pages [num_pages, 2, page_size, heads, head_dim] and as many rows "
            f"as slots do not fit: {list(k.shape)}, {list(v.shape)}, {list(pages.shape)}, {len(rows)}, {len(slots)}"
        )
    if {k.dtype, v.dtype} != {pages.dtype} or len({t.device for t in (k, v, rows, pages, slots)}) > 1:
        raise ValueError("k, v and pages must have one dtype, and all arguments one device")
    match choose_impl_for(impl, k, v, pages):
        case "native" if pages.is_contiguous():
            from hstu_cli.kernels.append_pages.native import append
        case _:
            from hstu_cli.kernels.append_pages.reference import append
    append(k, v, rows, pages, slots)
