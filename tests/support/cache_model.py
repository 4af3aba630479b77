"""What the cache should hold, as dictionaries: the rules of both tiers without pages or tensors."""

from collections import OrderedDict


class TierModel:
    """Tokens by user, least recently used first, in so many pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.tokens: OrderedDict[int, int] = OrderedDict()

    def pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def used(self) -> int:
        return sum(self.pages(n) for n in self.tokens.values())

    def store(self, sizes: dict[int, int], protected: set[int]) -> list[tuple[int, int]]:
        """Make room by evicting the oldest who are neither stored now nor protected, then store."""
        evicted = []
        grown = self.used() + sum(self.pages(n) - self.pages(self.tokens.get(u, 0)) for u, n in sizes.items())
        for user in list(self.tokens):
            if grown <= self.num_pages:
                break
            if user not in sizes and user not in protected:
                evicted.append((user, self.tokens.pop(user)))
                grown -= self.pages(evicted[-1][1])
        assert grown <= self.num_pages
        for user, num_tokens in sizes.items():
            self.tokens[user] = num_tokens
            self.tokens.move_to_end(user)
        return evicted


class CacheModel:
    """A device tier, and a host tier that takes what the device evicts, most recent first."""

    def __init__(self, device_pages: int, host_pages: int, page_size: int) -> None:
        self.device = TierModel(device_pages, page_size)
        self.host = TierModel(host_pages, page_size)

    def drop(self, user: int) -> None:
        """The user's history was changed."""
        self.device.tokens.pop(user, None)
        self.host.tokens.pop(user, None)

    def run(self, sizes: dict[int, int], *, completes: bool = True) -> None:
        """A batch of users, with the tokens that each has then."""
        onloaded = {user for user in sizes if user in self.host.tokens}
        before = OrderedDict(self.device.tokens)
        evicted = self.device.store({u: n for u, n in sizes.items() if n}, set())
        room = self.host.num_pages - sum(self.host.pages(self.host.tokens[u]) for u in onloaded)
        written: dict[int, int] = {}
        for user, num_tokens in reversed(evicted):
            if self.host.pages(num_tokens) <= room:
                written[user] = num_tokens
                room -= self.host.pages(num_tokens)
        self.host.store(dict(reversed(written.items())), onloaded)
        if completes:
            for user in onloaded:
                del self.host.tokens[user]
        else:  # nothing of the batch is stored, but the evicted stay evicted
            self.device.tokens = OrderedDict((u, n) for u, n in before.items() if u not in dict(evicted))
