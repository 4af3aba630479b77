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

    def layer_event(self, layer: int) -> Event:
        """The end of this layer's copies."""
        return self._layer_events[layer]

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
    backend: Backend,
    source: PageStorage,
    target: PageStorage,
    copies: Sequence[PageCopy],
    *,
    to_host: bool,
    after: Sequence[TransferJob] = (),
) -> TransferJob:
    """Queue the copies of one direction, layer after layer, behind the work queued so far.

    after: jobs whose copies of a layer come before this one's of that layer.

    Pages that change hands are safe for these reasons. A copy comes behind all compute work that was queued before it,
    so no batch that still reads or appends to an entry's pages is disturbed when the entry is evicted. A batch's layers
    wait for all of its jobs, or `cancel` does; so compute work, and with it every copy that is queued later, comes
    behind the copies of earlier batches, in either direction: what was read from host memory may be overwritten there,
    and what was written there can be read. Within a batch, pages of a victim are written back before something else is
    copied into them (`after`) and before a layer appends to them (its event).
    """
    pairs = [pair for copy in copies for pair in zip(copy.source_pages, copy.target_pages, strict=True)]
    pairs.sort(key=lambda pair: pair[to_host])  # neighbours in host memory are copied together
    source_ids, target_ids = ([pair[i] for pair in pairs] for i in range(2))
    events = []
    for layer in range(source.num_layers):
        copy_layer = partial(source.copy_layer_to, target, layer, source_ids, target_ids)
        before = [job.layer_event(layer) for job in after]
        events.append(backend.submit_copy(copy_layer, to_host=to_host, after=before))
    return TransferJob(events)
