"""Paged HSTU attention on NVIDIA GPUs: the attention kernel, which reads cached keys and values where the pages are."""

import torch

from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.attention.triton import kernel_specs, launch
from hstu_cli.kernels.paged_attention.plan import PagePlan
from hstu_cli.kernels.triton.aot import AotSpec

AOT_PAGE_SIZE = 32
"""Of the compilations ahead of time; blocks of keys are longer than such a page and take several."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BatchPlan,
    pages: torch.Tensor,
    page_plan: PagePlan,
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `paged_attention`; no gradients. Raises ValueError for dtypes and head dims that there is no kernel for."""
    return launch("hstu_paged_attention", q, k, v, plan, pages, page_plan, alpha, scaling_seqlen)


def aot_specs(chip: int) -> list[AotSpec]:
    """Every compilation that tuning may choose for pages, for `hstu_cli.kernels.triton.aot`."""
    return kernel_specs(chip, AOT_PAGE_SIZE)
