"""The memory behind the page ids of a tier, and copies of pages from one tier to another."""

import zlib
from collections.abc import Iterator, Sequence

import torch

from hstu_cli.backend import upload

# Shapes: n pages to copy, each [2, page_size, heads, head_dim].


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
        """Copy one layer of pages to as many pages of another storage, asynchronously.

        Fastest where the ids on the host, or on both sides where both are there, count up.
        """
        here, there = self.pages[layer], target.pages[layer]
        if here.device == there.device:
            for start, target_start, count in _runs(page_ids, target_ids):
                there[target_start : target_start + count].copy_(here[start : start + count], non_blocking=True)
        elif here.device.type == "cpu":
            onload_pages(here, there, page_ids, target_ids)
        else:
            offload_pages(here, there, page_ids, target_ids)

    def checksum(self, page_ids: Sequence[int]) -> int:
        """CRC-32 of pages in host memory, over all layers."""
        value = 0
        for page in page_ids:
            value = zlib.crc32(self.pages[:, page].contiguous().view(torch.uint8).numpy(), value)
        return value


def onload_pages(host: torch.Tensor, device: torch.Tensor, host_ids: Sequence[int], device_ids: Sequence[int]) -> None:
    """Copy pages of one layer [pages, 2, page_size, heads, head_dim] from host memory to the device.

    A copy between the two takes microseconds to start, whatever its size, and pages lie scattered on the device. So
    they come in stretches of host memory to one place, and a kernel spreads them. All of it is queued on the current
    stream: the place and the ids are its own, and the next layer's copy finds them free again in its order.
    """
    staged = torch.empty(len(host_ids), *host.shape[1:], dtype=device.dtype, device=device.device)
    for start, place, count in _runs(host_ids, range(len(host_ids))):
        staged[place : place + count].copy_(host[start : start + count], non_blocking=True)
    device.index_copy_(0, _ids_on(device.device, device_ids), staged)


def offload_pages(device: torch.Tensor, host: torch.Tensor, device_ids: Sequence[int], host_ids: Sequence[int]) -> None:
    """Copy pages of one layer to host memory: gathered by a kernel, then in stretches; see `onload_pages`."""
    staged = device.index_select(0, _ids_on(device.device, device_ids))
    for place, start, count in _runs(range(len(host_ids)), host_ids):
        host[start : start + count].copy_(staged[place : place + count], non_blocking=True)


def _ids_on(device: torch.device, ids: Sequence[int]) -> torch.Tensor:
    """Page ids, int64 [n] on a device."""
    return upload([torch.tensor(ids, dtype=torch.int64)], device)[0]


def _runs(page_ids: Sequence[int], target_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches in which both sides count up by one, as (first, first target, length): one copy each."""
    start = 0
    for end in range(1, len(page_ids) + 1):
        if end == len(page_ids) or page_ids[end] != page_ids[end - 1] + 1 or target_ids[end] != target_ids[end - 1] + 1:
            yield page_ids[start], target_ids[start], end - start
            start = end
