"""Least-recently-used order of users: constant time for every operation."""

from collections import OrderedDict
from collections.abc import Iterator


class LruOrder:
    """Keys from the least to the most recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        """Keys, least recently used first."""
        return iter(self._order)

    def touch(self, key: int) -> None:
        """Make a key, new or known, the most recently used."""
        self._order[key] = None
        self._order.move_to_end(key)

    def remove(self, key: int) -> None:
        """Forget a key that is there."""
        del self._order[key]
