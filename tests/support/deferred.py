"""A CPU backend whose copies happen as late as the protocol allows, and can fail."""

from collections.abc import Callable, Sequence

from hstu_cli.backend import Backend, Event


class CopyFailedError(Exception):
    """The failure that a test asked for."""


class DeferredEvent(Event):
    """Waiting for it performs the copies of its direction that were queued up to it, in order."""

    def __init__(self, queue: "_Queue", number: int) -> None:
        self._queue, self._number = queue, number

    def wait(self) -> None:
        self._queue.perform_up_to(self._number)

    def synchronize(self) -> None:
        self.wait()


class _Queue:
    """Copies of one direction, as on a side stream."""

    def __init__(self) -> None:
        self.pending: list[tuple[Callable[[], None], Sequence[Event]]] = []
        self._performed = 0

    def append(self, copy: Callable[[], None], after: Sequence[Event]) -> DeferredEvent:
        self.pending.append((copy, after))
        return DeferredEvent(self, self._performed + len(self.pending))

    def perform_up_to(self, number: int) -> None:
        """Perform queued copies until `number` are done in all, each behind what it waits for."""
        while self._performed < number and self.pending:
            copy, after = self.pending.pop(0)
            for event in after:
                event.wait()
            copy()
            self._performed += 1

    def perform_all(self) -> None:
        self.perform_up_to(self._performed + len(self.pending))


class DeferredBackend(Backend):
    """Copies wait in a queue for each direction, as on side streams. What is not waited for has not happened yet."""

    def __init__(self) -> None:
        super().__init__()
        self._queues = {True: _Queue(), False: _Queue()}
        self.submissions_until_failure: int | None = None

    def submit_copy(self, copy: Callable[[], None], *, to_host: bool, after: Sequence[Event] = ()) -> Event:
        if self.submissions_until_failure is not None:
            self.submissions_until_failure -= 1
            if self.submissions_until_failure < 0:
                self.submissions_until_failure = None
                raise CopyFailedError
        return self._queues[to_host].append(copy, after)

    def synchronize(self) -> None:
        for queue in self._queues.values():
            queue.perform_all()

    @property
    def num_pending(self) -> int:
        """Copies that nobody has waited for."""
        return sum(len(queue.pending) for queue in self._queues.values())
