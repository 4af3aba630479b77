"""The page tables of a batch, validated once and then used by every layer."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from hstu_cli.kernels.checks import int32_on, int_list


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Where the cached tokens of a batch are, on the device and on the host.

    page_indptr [B + 1], page_ids, cached_lengths [B]: int32 on the device of the pages; see `hstu_paged_attention`.
    num_pages, page_size: of the pool that the ids were checked against.
    max_cached_tokens: no sequence has more cached tokens.
    tables, lengths: each sequence's page ids, those in use alone, and cached length, or None where a graph is
      captured: what is on the device may then change between replays, within these bounds.
    all_tables: page ids of each sequence, those for new history included. history_stored: whether that is in them.
    """

    page_indptr: torch.Tensor
    page_ids: torch.Tensor
    cached_lengths: torch.Tensor
    num_pages: int
    page_size: int
    max_cached_tokens: int
    tables: list[list[int]] | None
    lengths: list[int] | None
    all_tables: list[list[int]] = field(default_factory=list, repr=False)
    history_stored: bool = False

    def on_host(self) -> tuple[list[list[int]], list[int]]:
        """Tables and lengths for an implementation that needs them; ValueError where there are none."""
        if self.tables is None or self.lengths is None:
            raise ValueError("these pages are described on the device alone, which impl='triton' can use and no other")
        return self.tables, self.lengths


def plan_pages(
    page_indptr: torch.Tensor,
    page_ids: torch.Tensor,
    cached_lengths: torch.Tensor,
    *,
    num_sequences: int,
    num_pages: int,
    page_size: int,
    device: torch.device | str,
    history_stored: bool = False,
) -> PagePlan:
    """Validate the page tables of a batch for a pool of pages on `device`.

    history_stored: the pages also hold the history among the new tokens, by the time that attention runs.

    The tensors are int32 or int64; on the host, nothing waits for a device. Raises ValueError for numbers that do
    not fit together, a page id outside the pool included.
    """
    indptr, ids = int_list("page_indptr", page_indptr), int_list("page_ids", page_ids)
    lengths = int_list("cached_lengths", cached_lengths)
    if len(indptr) != num_sequences + 1 or len(lengths) != num_sequences:
        raise ValueError(
            f"page_indptr and cached_lengths must describe {num_sequences} sequences, "
            f"not {len(indptr) - 1} and {len(lengths)}"
        )
    if indptr[0] != 0 or indptr[-1] != len(ids) or any(a > b for a, b in pairwise(indptr)):
        raise ValueError(f"page_indptr must rise from 0 to the {len(ids)} page ids, not {indptr}")
    tables = []
    for start, end, length in zip(indptr, indptr[1:], lengths, strict=False):
        in_use = -(-length // page_size)
        if length < 0 or in_use > end - start:
            raise ValueError(f"cached_lengths holds {length} for {end - start} pages of {page_size} tokens")
        tables.append(ids[start : start + in_use])
    outside = next((page for table in tables for page in table if not 0 <= page < num_pages), None)
    if outside is not None:
        raise ValueError(f"page_ids holds {outside}, but there are {num_pages} pages")
    on_device = int32_on(device, page_indptr, page_ids, cached_lengths)
    return PagePlan(
        page_indptr=on_device[0],
        page_ids=on_device[1],
        cached_lengths=on_device[2],
        num_pages=num_pages,
        page_size=page_size,
        max_cached_tokens=max(lengths, default=0),
        tables=tables,
        lengths=lengths,
        all_tables=[ids[start:end] for start, end in pairwise(indptr)],
        history_stored=history_stored,
    )
