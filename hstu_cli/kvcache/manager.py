"""The KV cache: looks histories up, makes room, moves pages, and hands a batch its page tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hstu_cli.backend import Backend
from hstu_cli.config import ModelConfig
from hstu_cli.kernels.append_pages import choose_append_impl
from hstu_cli.kvcache.batch import CacheBatch, CachedRequest
from hstu_cli.kvcache.fingerprint import HistoryFingerprint
from hstu_cli.kvcache.storage import PageStorage
from hstu_cli.kvcache.tier import CachedTokens, Entry, Hold, Reservation, Tier
from hstu_cli.kvcache.transfers import PageCopy, TransferJob, start_transfer


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """Sizes of a cache: pages on the device, tokens in a page, bytes of host memory behind it.

    verify_host: keep a checksum of every page in host memory, and drop what was changed there.
    append_impl: what writes new keys and values into pages; impl: what its auto follows; see `choose_append_impl`.
    """

    num_pages: int
    page_size: int = 32
    host_bytes: int = 0
    verify_host: bool = False
    append_impl: str = "auto"
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("num_pages", 1), ("page_size", 1), ("host_bytes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(slots=True)
class CacheCounters:
    """What the cache did. Tokens are those before the candidates; bytes count all layers."""

    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    recomputed_tokens: int = 0
    evictions: int = 0
    stale_drops: int = 0
    window_moves: int = 0
    corrupt_drops: int = 0
    uncached_requests: int = 0
    bytes_onloaded: int = 0
    bytes_offloaded: int = 0


def kv_bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token: 2 * layers * heads * head_dim * bytes per element."""
    return model.kv_elements_per_token * dtype.itemsize


class KVCacheManager:
    """Keys and values of users' context and history tokens, in pages on the device and in host memory.

    Use: `split` requests into batches that fit; for each, `prepare`, run the model with the batch's
    attention, then `complete`, or `cancel` if the run failed. One batch is under way at a time.
    """

    def __init__(self, config: KVCacheConfig, model: ModelConfig, dtype: torch.dtype, backend: Backend) -> None:
        self.config, self.model, self.backend = config, model, backend
        self.append = choose_append_impl(
            config.append_impl, backend.type, dtype, head_dim=model.head_dim, impl=config.impl
        )
        self.counters = CacheCounters()
        shape = (2, config.page_size, model.num_heads, model.head_dim)
        # One page more than the books know: what the padding of a batch appends goes there, and is never read.
        device_pages = backend.device_tensor((model.num_layers, config.num_pages + 1, *shape), dtype)
        self.device, self.device_storage = Tier(config.num_pages), PageStorage(device_pages)
        self.page_bytes = config.page_size * kv_bytes_per_token(model, dtype)
        host_pages = config.host_bytes // self.page_bytes
        self.host: Tier | None = None
        if host_pages:
            self.host = Tier(host_pages)
            self.host_storage = PageStorage(backend.host_tensor((model.num_layers, host_pages, *shape), dtype))

    @property
    def spare_slots(self) -> range:
        """Slots of the device's pages that no user is ever given."""
        first = self.config.num_pages * self.config.page_size
        return range(first, first + self.config.page_size)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.config.page_size)

    def split(self, user_ids: Sequence[int], num_tokens: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Group requests so that each group's pages fit into the pool and its users are distinct.

        user_ids, num_tokens: per request, the tokens before its candidates. Returns the groups, in
        order, as request numbers and whether the group is cached: a request that is larger than the
        pool alone is a group of its own that is not.
        """
        groups: list[tuple[list[int], bool]] = []
        members: list[int] = []
        users: set[int] = set()
        pages = 0
        for i, (user, tokens) in enumerate(zip(user_ids, num_tokens, strict=True)):
            needed = self.pages_for(tokens)
            alone = needed > self.config.num_pages
            if members and (alone or user in users or pages + needed > self.config.num_pages):
                groups.append((members, True))
                members, users, pages = [], set(), 0
            if alone:
                groups.append(([i], False))
                self.counters.uncached_requests += 1
            else:
                members.append(i)
                users.add(user)
                pages += needed
        if members:
            groups.append((members, True))
        return groups

    def prepare(self, user_ids: Sequence[int], fingerprints: Sequence[HistoryFingerprint]) -> CacheBatch:
        """Find what is cached of each request and reserve pages for the rest; nothing is evicted in vain.

        The users must be distinct and the pages fit, as after `split`. Where a copy fails, the error
        goes on: while victims are written back, with the cache as it was; later, with the victims gone.
        """
        if len(set(user_ids)) != len(user_ids):
            raise ValueError("a batch holds a user twice; split it first")
        found = [self._find(user, fingerprint) for user, fingerprint in zip(user_ids, fingerprints, strict=True)]
        onloaded = [user for user, where in zip(user_ids, found, strict=True) if where and where.on_host]
        sizes = {u: self.pages_for(f.num_tokens) for u, f in zip(user_ids, fingerprints, strict=True) if f.num_tokens}
        host_hold = self.host.hold(onloaded) if self.host else Hold([], [])
        reservation = None
        try:
            reservation = self.device.prepare(sizes)
            jobs = self._write_back(reservation.victims.users, len(host_hold.pages))
            self.counters.evictions += len(reservation.victims.users)
            self.device.take_pages(reservation)
            jobs += self._onload(reservation, onloaded, jobs)
        except BaseException:
            try:
                self.backend.synchronize()  # copies that did start must not write into pages that are free again
            finally:
                if reservation is not None:
                    self.device.cancel(reservation)
                if self.host:
                    self.host.let_go(host_hold)
            raise
        requests = []
        for user, fingerprint, where in zip(user_ids, fingerprints, found, strict=True):
            num_known = where.tokens.num_tokens if where else 0
            requests.append(
                CachedRequest(
                    user_id=user,
                    fingerprint=fingerprint,
                    pages=self.device.pages_of(reservation, user) if fingerprint.num_tokens else [],
                    num_known=num_known,
                    # The last token is computed in any case: the next-item head needs its row.
                    num_cached=max(0, min(num_known, fingerprint.num_tokens - 1)),
                    from_host=where is not None and where.on_host,
                )
            )
        return CacheBatch(
            requests, self.device_storage, self.config.page_size, self.append.name, reservation, host_hold, jobs
        )

    def complete(self, batch: CacheBatch) -> None:
        """The batch has run: its histories are cached whole."""
        self.device.complete(
            batch.reservation, {r.user_id: r.fingerprint.tokens() for r in batch.requests if r.num_tokens}
        )
        if self.host:
            self.host.let_go(batch.host_hold)
            for user in batch.host_hold.users:
                self.host.drop(user)
        for request in batch.requests:
            if request.from_host:
                self.counters.host_hit_tokens += request.num_cached
            else:
                self.counters.device_hit_tokens += request.num_cached
            self.counters.recomputed_tokens += request.num_tokens - request.num_cached

    def cancel(self, batch: CacheBatch) -> None:
        """The batch has failed: nothing that it computed is cached."""
        for job in batch.jobs:
            job.wait()  # its pages are free from here on
        self.device.cancel(batch.reservation)
        if self.host:
            self.host.let_go(batch.host_hold)

    def clear(self) -> None:
        """Forget every user, between batches; the counters go on."""
        for tier in (self.device, self.host):
            for user in list(tier.users()) if tier else []:
                tier.drop(user)

    def summary(self) -> dict[str, Any]:
        """Counters, hit rate and page counts, named as in the JSON record."""
        counters = self.counters
        hits = counters.device_hit_tokens + counters.host_hit_tokens
        tokens = hits + counters.recomputed_tokens
        return {
            "page_size": self.config.page_size,
            "page_bytes": self.page_bytes,
            "append_impl": self.append.name,
            "append_reason": self.append.reason,
            **asdict(counters),
            "token_hit_rate": hits / tokens if tokens else None,
            "device_pages": _page_counts(self.device),
            "host_pages": _page_counts(self.host),
        }

    def check_invariants(self) -> None:
        """The books of both tiers are consistent, and no user is in both."""
        self.device.check_invariants()
        if self.host:
            self.host.check_invariants()
            held = {user for user in self.host.users() if self.host.is_held(user)}
            assert not (set(self.device.users()) & set(self.host.users())) - held

    def _find(self, user_id: int, fingerprint: HistoryFingerprint) -> "_Found | None":
        """What is cached of exactly this history; an entry with anything else is dropped."""
        for tier in (self.device, self.host):
            entry = tier.get(user_id) if tier else None
            if tier is None or entry is None:
                continue
            if not fingerprint.matches(entry.tokens):
                moved = entry.tokens.window_start != fingerprint.window_start
                self.counters.window_moves += moved
                self.counters.stale_drops += not moved
            elif tier is self.host and self._is_corrupt(entry):
                self.counters.corrupt_drops += 1
            else:
                return _Found(entry.tokens, on_host=tier is self.host)
            tier.drop(user_id)
        return None

    def _write_back(self, victims: list[int], num_held_pages: int) -> list[TransferJob]:
        """Copy the victims' pages to host memory, the most recently used ones first, while there is room.

        num_held_pages: pages of host memory that are needed for this very batch.
        """
        if self.host is None:
            return []
        room = self.host.pool.num_pages - num_held_pages
        sizes: dict[int, int] = {}
        for user in reversed(victims):
            pages = len(self.device.get(user).pages)
            if pages <= room:
                sizes[user] = pages
                room -= pages
        if not sizes:
            return []
        sizes = dict(reversed(sizes.items()))  # the most recently used is stored last, so that it stays longest
        reservation = self.host.prepare(sizes)
        try:
            self.host.take_pages(reservation)
            pages = {user: self.host.pages_of(reservation, user) for user in sizes}
            job = start_transfer(
                self.backend,
                self.device_storage,
                self.host_storage,
                [PageCopy(self.device.get(user).pages, pages[user]) for user in sizes],
                to_host=True,
            )
            tokens = {user: self.device.get(user).tokens for user in sizes}
            if self.config.verify_host:
                job.synchronize()
                tokens = {u: replace(t, checksum=self.host_storage.checksum(pages[u])) for u, t in tokens.items()}
        except BaseException:
            self.host.cancel(reservation)
            raise
        self.host.complete(reservation, tokens)
        self.counters.bytes_offloaded += sum(sizes.values()) * self.page_bytes
        return [job]

    def _onload(
        self, reservation: Reservation, users: list[int], write_backs: Sequence[TransferJob]
    ) -> list[TransferJob]:
        """Copy the users' pages from host memory to the first of their reserved pages, some of them victims' before."""
        if not users:
            return []
        copies = []
        for user in users:
            source = self.host.get(user).pages
            copies.append(PageCopy(source, self.device.pages_of(reservation, user)[: len(source)]))
        job = start_transfer(
            self.backend, self.host_storage, self.device_storage, copies, to_host=False, after=write_backs
        )
        self.counters.bytes_onloaded += sum(len(copy.source_pages) for copy in copies) * self.page_bytes
        return [job]

    def _is_corrupt(self, entry: Entry) -> bool:
        """Whether host memory no longer holds what was written there; only known with `verify_host`."""
        expected = entry.tokens.checksum
        return expected is not None and self.host_storage.checksum(entry.pages) != expected


@dataclass(frozen=True, slots=True)
class _Found:
    """Cached tokens of a user, and in which tier."""

    tokens: CachedTokens
    on_host: bool


def _page_counts(tier: Tier | None) -> dict[str, int]:
    """Pages of a tier by state."""
    if tier is None:
        return {"total": 0, "used": 0, "free": 0, "pinned": 0}
    pool = tier.pool
    return {
        "total": pool.num_pages,
        "used": pool.num_pages - pool.num_free,
        "free": pool.num_free,
        "pinned": pool.num_shared,
    }
