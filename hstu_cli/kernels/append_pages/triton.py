"""Writes keys and values into pages with one Triton kernel, on an NVIDIA GPU."""

import torch
import triton
import triton.language as tl

from hstu_cli.backend import backend_of
from hstu_cli.kernels.triton.aot import AotSpec
from hstu_cli.kernels.triton.arguments import row_major, type_name

NUM_WARPS = 4
"""Of 32 threads, each of which moves 16 bytes at a time: a token of 4 heads of 256 channels in bf16 takes them all."""


@triton.jit
def append_pages_kernel(
    k_ptr,
    v_ptr,
    rows_ptr,
    pages_ptr,
    slots_ptr,
    k_token,  # strides
    k_head,
    v_token,
    v_head,
    page_page,
    page_value,
    page_token,
    page_head,
    num_tokens,
    num_slots,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies one row of k and v to its slot; see `append_to_pages`. A slot or row that there is not is left out."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    if (slot < 0) | (slot >= num_slots) | (row < 0) | (row >= num_tokens):
        return
    head = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < NUM_HEADS) & (column < HEAD_DIM)
    k = tl.load(k_ptr + row * k_token + head * k_head + column, mask=inside)
    v = tl.load(v_ptr + row * v_token + head * v_head + column, mask=inside)
    target = pages_ptr + slot // PAGE_SIZE * page_page + slot % PAGE_SIZE * page_token + head * page_head + column
    tl.store(target, k, mask=inside)
    tl.store(target + page_value, v, mask=inside)


def append(k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """See `append_to_pages`; a slot outside the pages is skipped, so that a captured graph can be padded.

    Raises ValueError for pages whose last dimension is not contiguous.
    """
    if not slots.numel() or not k[:1].numel():
        return
    if pages.stride(4) != 1:
        raise ValueError("impl='triton' appends to pages whose last dimension is contiguous")
    k, v = row_major(k), row_major(v)
    with backend_of(k.device).as_current():
        append_pages_kernel[(slots.numel(),)](
            k,
            v,
            rows,
            pages,
            slots,
            *k.stride()[:2],
            *v.stride()[:2],
            *pages.stride()[:4],
            len(k),
            pages.shape[0] * pages.shape[2],
            **_constants(*k.shape[1:], pages.shape[2]),
            num_warps=NUM_WARPS,
        )


def aot_specs(chip: int) -> list[AotSpec]:
    """The kernel for bf16 and float32; it is the same for all chips."""
    strides = ("k_token", "k_head", "v_token", "v_head", "page_page", "page_value", "page_token", "page_head")
    return [
        AotSpec(
            kernel=append_pages_kernel,
            signature={
                **dict.fromkeys(("k_ptr", "v_ptr", "pages_ptr"), f"*{type_name(dtype)}"),
                **dict.fromkeys(("rows_ptr", "slots_ptr"), "*i64"),
                **dict.fromkeys((*strides, "num_tokens", "num_slots"), "i32"),
            },
            constexprs=_constants(4, 256, page_size=32),
            num_warps=NUM_WARPS,
            num_stages=1,
            label=f"{type_name(dtype)} 4x256",
            aligned=strides,
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _constants(num_heads: int, head_dim: int, page_size: int) -> dict[str, int]:
    """Arguments that the kernel is compiled for."""
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BLOCK_H": triton.next_power_of_2(num_heads),
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
