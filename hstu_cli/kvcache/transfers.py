"""Copies of users' pages between tiers, as jobs that complete layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Queue the copies on the backend's copy stream, layer after layer, behind the work queued so far."""
    events = []
    for layer in range(source.num_layers):

        def copy_layer(layer: int = layer) -> None:
            for copy in copies:
                source.copy_layer_to(target, layer, copy.source_pages, copy.target_pages)

        events.append(backend.submit_copy(copy_layer))
    return TransferJob(events)
