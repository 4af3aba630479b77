"""Writes keys and values into pages with torch's indexing, on any device."""

import torch


def append(k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """See `append_to_pages`."""
    page_size = pages.shape[2]
    page, place = slots // page_size, slots % page_size
    pages[page, 0, place] = k[rows]
    pages[page, 1, place] = v[rows]
