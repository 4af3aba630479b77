"""Copies of users' pages between tiers, as jobs that complete layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from hstu_cli.backend import Backend, Event
from hstu_cli.kvcache.storage import PageStorage


@dataclass(frozen=True, slots=True)
class PageCopy:
    """One user's pages: where they are and where they go."""

    source_pages: list[int]
    target_pages: list[int]


class TransferJob:
    """Copies under way. Work that needs layer i waits for it alone, so later layers hide behind it."""

    def __init__(self, layer_events: list[Event]) -> None:
        self._layer_events = layer_events

    def wait_layer(self, layer: int) -> None:
        """Make the work that is queued from now on see the pages of this layer."""
        self._layer_events[layer].wait()

    def wait(self) -> None:
        """Make the work that is queued from now on see all pages, and may overwrite what they came from."""
        self._layer_events[-1].wait()

    def synchronize(self) -> None:
        """Block this thread until the copies are done."""
        self._layer_events[-1].synchronize()


def start_transfer(
    backend: Backend, source: PageStorage, target: PageStorage, copies: Sequence[PageCopy]
) -> TransferJob:
    """Queue the copies on the backend's copy stream, layer after layer, behind the work queued so far.

    All copies of a backend are on one stream, and that is what keeps pages safe that change hands. Pages of a victim
    are written back before anything new is copied into them (same stream, queued earlier) and before a batch appends
    to them (a layer waits for its event of every job of the batch). Pages that are copied from, in host memory, are
    not written to before they were read (same stream again), though the books call them free as soon as the batch is
    complete. And a copy reads or writes device pages only after all work that was queued before it, so that neither a
    batch that still reads an entry's pages nor one that still appends to them is disturbed when the entry is evicted.
    """
    pairs = [pair for copy in copies for pair in zip(copy.source_pages, copy.target_pages, strict=True)]
    on_host = 0 if source.pages.device.type == "cpu" else 1  # which of the two ids
    pairs.sort(key=lambda pair: pair[on_host])  # neighbours in host memory are copied together
    source_ids, target_ids = ([pair[i] for pair in pairs] for i in range(2))
    events = []
    for layer in range(source.num_layers):
        copy_layer = partial(source.copy_layer_to, target, layer, source_ids, target_ids)
        events.append(backend.submit_copy(copy_layer))
    return TransferJob(events)
