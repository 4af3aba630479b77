"""A CPU backend whose copies happen as late as the protocol allows, and can fail."""

from collections.abc import Callable

from hstu_cli.backend import Backend, Event


class CopyFailedError(Exception):
    """The failure that a test asked for."""


class DeferredEvent(Event):
    """Waiting for it performs the copies that were queued up to it, in order."""

    def __init__(self, backend: "DeferredBackend", number: int) -> None:
        self._backend, self._number = backend, number

    def wait(self) -> None:
        self._backend.perform_up_to(self._number)

    def synchronize(self) -> None:
        self.wait()


class DeferredBackend(Backend):
    """Copies wait in one queue, as on a side stream. What is not waited for has not happened yet."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: list[Callable[[], None]] = []
        self._performed = 0
        self.submissions_until_failure: int | None = None

    def submit_copy(self, copy: Callable[[], None]) -> Event:
        if self.submissions_until_failure is not None:
            self.submissions_until_failure -= 1
            if self.submissions_until_failure < 0:
                self.submissions_until_failure = None
                raise CopyFailedError
        self._queue.append(copy)
        return DeferredEvent(self, self._performed + len(self._queue))

    def perform_up_to(self, number: int) -> None:
        """Perform queued copies until `number` are done in all."""
        while self._performed < number and self._queue:
            self._queue.pop(0)()
            self._performed += 1

    def synchronize(self) -> None:
        self.perform_up_to(self._performed + len(self._queue))

    @property
    def num_pending(self) -> int:
        """Copies that nobody has waited for."""
        return len(self._queue)
