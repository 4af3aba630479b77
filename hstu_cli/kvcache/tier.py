"""The books of one tier: whose tokens are in which pages, and whom to evict. Ids alone, no memory.

A change has two phases. `prepare` finds out whether it is possible, protects everything that takes
part, and changes nothing; the caller then moves bytes; `take_pages`, `complete` and `cancel` say how
it went. A reservation that is cancelled leaves the books as they were.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hstu_cli.kvcache.lru import LruOrder
from hstu_cli.kvcache.pool import PagePool


class CacheFullError(Exception):
    """A reservation does not fit, even with every user evicted who may be."""


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """What an entry holds: the first `num_tokens` tokens of a sequence, known by their digest."""

    num_tokens: int
    num_events: int
    window_start: int
    digest: bytes
    checksum: int | None = None


@dataclass(slots=True)
class Entry:
    """A user's pages, in order and at least one, and the tokens in them."""

    pages: list[int]
    tokens: CachedTokens


@dataclass(frozen=True, slots=True)
class Hold:
    """Entries that stay where they are until the hold ends: each of their pages has a reference more."""

    users: list[int]
    pages: list[int]


@dataclass(slots=True)
class Reservation:
    """Pages in the making: how many more for each user, from which victims, and which they become."""

    more_pages: dict[int, int]
    existing: Hold
    victims: Hold
    new_pages: dict[int, list[int]] | None = None  # None until the victims have gone


class Tier:
    """Entries by user over one pool of pages, with an LRU order of the users."""

    def __init__(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self._entries: dict[int, Entry] = {}
        self._order = LruOrder()
        self._reservations: list[Reservation] = []

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, user_id: int) -> Entry | None:
        """The user's entry, or None. Does not count as a use."""
        return self._entries.get(user_id)

    def users(self) -> list[int]:
        """Users with an entry, least recently used first."""
        return list(self._order)

    def is_held(self, user_id: int) -> bool:
        """Whether a hold keeps the user's entry from being evicted or dropped."""
        return self.pool.ref_count(self._entries[user_id].pages[0]) > 1

    def hold(self, user_ids: Iterable[int]) -> Hold:
        """Protect these users' entries; `let_go` ends it."""
        users = list(user_ids)
        pages = [page for user in users for page in self._entries[user].pages]
        self.pool.retain(pages)
        return Hold(users, pages)

    def let_go(self, hold: Hold) -> None:
        """End a hold."""
        self.pool.release(hold.pages)

    def drop(self, user_id: int) -> Entry:
        """Remove an entry that nothing holds; its pages are free."""
        assert not self.is_held(user_id), f"user {user_id} is held"
        entry = self._entries.pop(user_id)
        self._order.remove(user_id)
        self.pool.release(entry.pages)
        return entry

    def prepare(self, num_pages: Mapping[int, int]) -> Reservation:
        """Reserve so many pages in all for each user; users with an entry keep the pages they have.

        Holds these entries and those of the victims, the least recently used ones that free enough.
        Raises CacheFullError, with nothing changed, where held entries leave too little room.
        """
        existing = [user for user in num_pages if user in self._entries]
        more = dict(num_pages)
        for user in existing:
            more[user] -= len(self._entries[user].pages)
            assert more[user] >= 0, f"the entry of user {user} would shrink"
        missing = sum(more.values()) - self.pool.num_free
        victims = []
        for user in self._order:
            if missing <= 0:
                break
            if user not in num_pages and not self.is_held(user):
                victims.append(user)
                missing -= len(self._entries[user].pages)
        if missing > 0:
            raise CacheFullError(f"{missing} pages too few")
        reservation = Reservation(more, self.hold(existing), self.hold(victims))
        self._reservations.append(reservation)
        return reservation

    def take_pages(self, reservation: Reservation) -> None:
        """Evict the victims and take the new pages."""
        assert reservation.new_pages is None, "the pages are taken already"
        self.let_go(reservation.victims)
        for user in reservation.victims.users:
            self.drop(user)
        reservation.victims = Hold([], [])
        reservation.new_pages = {user: self.pool.allocate(n) for user, n in reservation.more_pages.items()}

    def pages_of(self, reservation: Reservation, user_id: int) -> list[int]:
        """All pages of a user of the reservation, in order, the new ones included."""
        assert reservation.new_pages is not None, "take the pages first"
        entry = self._entries.get(user_id)
        return (entry.pages if entry else []) + reservation.new_pages[user_id]

    def complete(self, reservation: Reservation, tokens: Mapping[int, CachedTokens]) -> None:
        """The pages are written: each user's entry now holds these tokens and is the most recent."""
        assert reservation.new_pages is not None, "take the pages first"
        self.let_go(reservation.existing)
        for user, new_pages in reservation.new_pages.items():
            entry = self._entries.get(user)
            if entry is None:
                self._entries[user] = Entry(new_pages, tokens[user])
            else:
                entry.pages += new_pages
                entry.tokens = tokens[user]
            self._order.touch(user)
        self._reservations.remove(reservation)

    def cancel(self, reservation: Reservation) -> None:
        """Nothing came of it: new pages are free again, entries and order are as they were.

        Victims are back too, unless their pages were taken already.
        """
        self.let_go(reservation.existing)
        self.let_go(reservation.victims)
        for new_pages in (reservation.new_pages or {}).values():
            self.pool.release(new_pages)
        self._reservations.remove(reservation)

    def check_invariants(self) -> None:
        """Every page has exactly the holders that the books know; nothing is counted twice."""
        self.pool.check_invariants()
        holders: Counter[int] = Counter()
        for entry in self._entries.values():
            assert entry.pages, "an entry has at least one page"
            assert entry.tokens.num_tokens > 0
            holders.update(entry.pages)
        assert all(count == 1 for count in holders.values()), "a page has two owners"
        for reservation in self._reservations:
            new_pages = [page for pages in (reservation.new_pages or {}).values() for page in pages]
            assert not set(new_pages) & set(holders), "a new page has an owner"
            holders.update(new_pages)
        owned = len(holders)
        for reservation in self._reservations:
            holders.update(reservation.existing.pages + reservation.victims.pages)
        for page in range(self.pool.num_pages):
            assert self.pool.ref_count(page) >= holders[page], f"page {page} has fewer references than holders"
        assert owned + self.pool.num_free == self.pool.num_pages
        assert set(self._order) == set(self._entries)
