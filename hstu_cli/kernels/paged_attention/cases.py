"""The cases of paged attention: one table for its tests and its benchmarks."""

from dataclasses import dataclass

import torch

from hstu_cli.kernels.attention.cases import AttentionCase, AttentionInputs, make_inputs


@dataclass(frozen=True, slots=True)
class PagedCase:
    """A jagged batch of whole sequences, and how many of each one's first tokens are in pages."""

    whole: AttentionCase
    cached: tuple[int, ...]
    page_size: int

    @property
    def id(self) -> str:
        """A readable name for a test or a table row."""
        return f"{self.whole.id}-cached_{'_'.join(map(str, self.cached)) or 'none'}-page_{self.page_size}"


PAGED_CASES = (
    PagedCase(AttentionCase((), ()), (), 16),
    PagedCase(AttentionCase((0, 5), (1, 0)), (0, 5), 4),
    PagedCase(AttentionCase((16, 17, 31), (1, 2, 3)), (16, 16, 31), 16),
    PagedCase(AttentionCase((1, 300, 40, 0), (0, 7, 1, 2), num_heads=3, head_dim=40), (0, 257, 39, 0), 32),
    PagedCase(AttentionCase((100, 90, 80, 9, 300), (1, 1, 1, 1, 1)), (98, 90, 64, 8, 299), 1),
    PagedCase(AttentionCase((64,) * 6, (4,) * 6, num_heads=4, head_dim=16), (62,) * 6, 128),
    PagedCase(AttentionCase((700,), (300,), num_heads=2, head_dim=128), (129,), 128),
)
"""Nothing cached, all cached, lengths around multiples of the page, one token a page, long strips."""


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """The arguments of `hstu_paged_attention`, and the whole sequences that they come from."""

    new: AttentionInputs
    pages: torch.Tensor
    page_indptr: torch.Tensor
    page_ids: torch.Tensor
    cached_lengths: torch.Tensor
    whole: AttentionInputs
    new_rows: torch.Tensor  # rows of the whole batch that are new


def make_paged_inputs(
    case: PagedCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> PagedInputs:
    """Random inputs for a case; the pages of a sequence are scattered and unused slots hold garbage."""
    whole = make_inputs(case.whole, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    counts = [-(-length // case.page_size) for length in case.cached]
    num_pages = sum(counts) + 3
    heads, head_dim = case.whole.num_heads, case.whole.head_dim
    pages = torch.randn(num_pages, 2, case.page_size, heads, head_dim, generator=generator).mul_(100).to(dtype)
    page_ids = torch.randperm(num_pages, generator=generator)[: sum(counts)]
    starts = whole.seq_offsets[:-1].tolist()
    page = 0
    for start, length, count in zip(starts, case.cached, counts, strict=True):
        for slot in range(length):
            target = pages[page_ids[page + slot // case.page_size], :, slot % case.page_size]  # [2, H, d]
            target[0], target[1] = whole.k[start + slot], whole.v[start + slot]
        page += count
    lengths = whole.seq_offsets.diff().tolist()
    new_rows = torch.cat(
        [torch.arange(s + m, s + n) for s, m, n in zip(starts, case.cached, lengths, strict=True)]
        or [torch.empty(0, dtype=torch.int64)]
    )
    new_lengths = torch.tensor([0, *(n - m for n, m in zip(lengths, case.cached, strict=True))])
    new = AttentionInputs(
        q=whole.q[new_rows].to(device),
        k=whole.k[new_rows].to(device),
        v=whole.v[new_rows].to(device),
        seq_offsets=new_lengths.cumsum(0).to(device),
        num_candidates=whole.num_candidates.to(device),
        alpha=whole.alpha,
        scaling_seqlen=whole.scaling_seqlen,
    )
    return PagedInputs(
        new=new,
        pages=pages.to(device),
        page_indptr=torch.tensor([0, *counts]).cumsum(0).to(device),
        page_ids=page_ids.to(device),
        cached_lengths=torch.tensor(case.cached, dtype=torch.int64, device=device),
        whole=whole,
        new_rows=new_rows,
    )
