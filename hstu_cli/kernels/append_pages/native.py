"""Appending by the C++ operators, which must be loaded: `choose_impl` sees to it."""

import torch


def append(k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """See `hstu_cli.kernels.append_pages.append_to_pages`; ValueError for a row or slot that is none."""
    torch.ops.hstu_native.append(k, v, rows, pages, slots)
