"""Writes keys and values into pages with FlashInfer's kernel, where the user has it.

Its pages are ours, [num_pages, 2, page_size, heads, head_dim] ("NHD"). It finds a token's place by a page table and a
position. With a table that lists the whole pool in order, a slot is the position.
"""

import functools
import importlib

import torch

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
"""What the kernel is compiled for."""


def why_unavailable(device_type: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why FlashInfer cannot append such keys here, as a clause; None where it can. Imports it, which takes seconds.

    head_dim: None leaves it open.
    """
    if device_type != "cuda":
        return f"FlashInfer runs on NVIDIA GPUs alone, and this device is {device_type}"
    try:
        importlib.import_module("flashinfer.page")
    # A part made for another torch or CUDA fails as any of these.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return (
            f"flashinfer cannot be loaded ({type(error).__name__}: {error}); pip install flashinfer-python, "
            "which compiles its kernels with nvcc"
        )
    if dtype not in DTYPES:
        return f"FlashInfer appends fp16 and bf16, not {dtype}"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"FlashInfer appends heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def append(k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """See `append_to_pages`."""
    append_paged_kv_cache = importlib.import_module("flashinfer.page").append_paged_kv_cache
    num_pages, page_size = pages.shape[0], pages.shape[2]
    page_ids, indptr, last_page_length = _whole_pool(num_pages, page_size, pages.device)
    positions = slots.to(torch.int32)
    append_paged_kv_cache(
        append_key=k[rows],
        append_value=v[rows],
        batch_indices=torch.zeros_like(positions),
        positions=positions,
        paged_kv_cache=pages,
        kv_indices=page_ids,
        kv_indptr=indptr,
        kv_last_page_len=last_page_length,
        kv_layout="NHD",
    )


@functools.lru_cache(maxsize=8)
def _whole_pool(num_pages: int, page_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """One sequence that holds all pages in order, int32: page ids, indptr [2], length of the last page [1].

    Kept, so that a captured graph goes on reading memory that is there.
    """
    page_ids = torch.arange(num_pages, dtype=torch.int32, device=device)
    return (
        page_ids,
        torch.arange(2, dtype=torch.int32, device=device) * num_pages,
        torch.full((1,), page_size, dtype=torch.int32, device=device),
    )
