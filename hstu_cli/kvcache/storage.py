"""The memory behind the page ids of a tier, and copies of pages from one tier to another."""

import zlib
from collections.abc import Iterator, Sequence

import torch


class PageStorage:
    """Keys and values of all layers: `pages` [layers, num_pages, 2, page_size, heads, head_dim]."""

    def __init__(self, pages: torch.Tensor) -> None:
        self.pages = pages

    @property
    def num_layers(self) -> int:
        """Layers, each with the same page ids."""
        return self.pages.shape[0]

    def copy_layer_to(
        self, target: "PageStorage", layer: int, page_ids: Sequence[int], target_ids: Sequence[int]
    ) -> None:
        """Copy one layer of pages to as many pages of another storage, on any device, asynchronously."""
        for start, target_start, count in _runs(page_ids, target_ids):
            source = self.pages[layer, start : start + count]
            target.pages[layer, target_start : target_start + count].copy_(source, non_blocking=True)

    def checksum(self, page_ids: Sequence[int]) -> int:
        """CRC-32 of pages in host memory, over all layers."""
        value = 0
        for page in page_ids:
            value = zlib.crc32(self.pages[:, page].contiguous().view(torch.uint8).numpy(), value)
        return value


def _runs(page_ids: Sequence[int], target_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches in which both sides count up by one, as (first, first target, length): one copy each."""
    start = 0
    for end in range(1, len(page_ids) + 1):
        if end == len(page_ids) or page_ids[end] != page_ids[end - 1] + 1 or target_ids[end] != target_ids[end - 1] + 1:
            yield page_ids[start], target_ids[start], end - start
            start = end
