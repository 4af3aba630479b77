"""A random life of the cache against a dictionary model: what it serves is right, whatever happens."""

import zlib

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.cache_model import CacheModel
from support.deferred import CopyFailedError, DeferredBackend

from hstu_cli.config import ModelConfig
from hstu_cli.kernels import paged_attention, plan_batch
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.batch import CacheBatch
from hstu_cli.kvcache.fingerprint import HistoryFingerprint

CONFIG = ModelConfig(
    num_layers=2, hidden_dim=4, num_heads=1, head_dim=2, max_history=12, max_candidates=2, position_buckets=64,
    scaling_seqlen=32, head_dims=(8,), contextual_features=("user_id",),
)  # fmt: skip
USERS = st.integers(0, 5)
EXAMPLES, STEPS_PER_EXAMPLE = 260, 50
steps_taken = 0


class CacheMachine(RuleBasedStateMachine):
    """Six users, two layers, a pool of 7 to 12 pages, sometimes a host tier; copies come late."""

    @initialize(
        page_size=st.sampled_from([1, 3, 4, 16]), spare_pages=st.integers(0, 5), host_pages=st.sampled_from([0, 3, 20])
    )
    def start(self, page_size: int, spare_pages: int, host_pages: int) -> None:
        self.backend = DeferredBackend()
        needed = -(-CONFIG.max_history_tokens // page_size)
        page_bytes = page_size * 2 * CONFIG.num_layers * CONFIG.attention_dim * 4
        num_pages = needed + spare_pages
        sizes = KVCacheConfig(num_pages, page_size, host_pages * page_bytes, verify_host=True)
        self.cache = KVCacheManager(sizes, CONFIG, torch.float32, self.backend)
        self.model = CacheModel(num_pages, host_pages, page_size)
        self.weights = 0
        self.events: dict[int, list[int]] = {user: [] for user in range(6)}

    def window(self, user: int) -> tuple[int, list[int]]:
        start = CONFIG.window_start(len(self.events[user]))
        return start, self.events[user][start:]

    def fingerprint(self, user: int) -> HistoryFingerprint:
        start, events = self.window(user)
        actions = np.array(events, np.int64) % 3
        identity = self.weights.to_bytes(8, "little")
        return HistoryFingerprint(identity, np.array([user]), np.array(events, np.int64), actions, start)

    def values(self, user: int) -> np.ndarray:
        """One number per token before the candidates that stands for its key: all that it depends on."""
        start, events = self.window(user)
        prefix = [self.weights, start, user]
        values = [zlib.crc32(repr(prefix).encode()) % 9973]
        for event in events:
            for token in (event, -event % 3):
                prefix.append(token)
                values.append(zlib.crc32(repr(prefix).encode()) % 9973)
        return np.array(values, np.float32)

    def prepare(self, users: list[int]) -> CacheBatch:
        return self.cache.prepare(users, [self.fingerprint(user) for user in users])

    def run(self, users: list[int], batch: CacheBatch) -> None:
        """Write the keys of the tokens that are not cached, as a model would, and read all back."""
        expected = [self.values(user) for user in users]
        new = [values[n:] for values, n in zip(expected, batch.num_cached_tokens, strict=True)]
        assert all(len(values) > 0 for values in new), "the last token is always computed"
        numbers = torch.from_numpy(np.concatenate(new))
        plan = plan_batch(torch.tensor([0, *map(len, new)]).cumsum(0), None, len(numbers), "cpu")
        attention = batch.attention(CONFIG, plan, "blocked")
        for layer in range(CONFIG.num_layers):
            key = (numbers + layer)[:, None, None].expand(-1, 1, 2)
            pages = attention.pages_of(layer)
            pages.store(key, -key)
            scales = {"alpha": CONFIG.alpha, "scaling_seqlen": CONFIG.scaling_seqlen, "impl": attention.impl}
            o = paged_attention(key, key, -key, attention.plan, pages.pages, pages.plan, **scales)
            assert o.isfinite().all()
        for request, values in zip(batch.requests, expected, strict=True):
            pages = self.cache.device_storage.pages[:, request.pages]  # [layers, pages, 2, page_size, 1, 2]
            stored = pages.transpose(1, 2).flatten(2, 3)[:, :, : len(values), 0, 0].numpy()
            for layer in range(CONFIG.num_layers):
                np.testing.assert_array_equal(stored[layer, 0], values + layer)
                np.testing.assert_array_equal(stored[layer, 1], -values - layer)

    def sizes(self, users: list[int]) -> dict[int, int]:
        return {user: 1 + 2 * len(self.window(user)[1]) for user in users}

    def drop_stale(self, users: list[int]) -> None:
        """Tell the model of entries that a look at these users finds wrong: the books know them by content."""
        for user in users:
            for tier in (self.cache.device, self.cache.host):
                entry = tier.get(user) if tier else None
                if entry is not None and not self.fingerprint(user).matches(entry.tokens):
                    self.model.drop(user)

    @rule(users=st.lists(USERS, min_size=1, max_size=3, unique=True), grow=st.integers(0, 5), seed=st.integers(0, 99))
    def request(self, users: list[int], grow: int, seed: int) -> None:
        for user in users:
            self.events[user] += [seed + i for i in range(grow)]
        for members, cached in self.cache.split(users, list(self.sizes(users).values())):
            group = [users[i] for i in members]
            assert cached
            self.drop_stale(group)
            known = {u: max(self.model.device.tokens.get(u, 0), self.model.host.tokens.get(u, 0)) for u in group}
            batch = self.prepare(group)
            sizes = self.sizes(group)
            assert batch.num_cached_tokens == [min(known[u], sizes[u] - 1) for u in group]
            self.run(group, batch)
            self.cache.complete(batch)
            self.model.run(sizes)

    @rule(user=USERS, at=st.integers(0, 30), value=st.integers(100, 199))
    def correct_history(self, user: int, at: int, value: int) -> None:
        if self.events[user]:
            self.events[user][at % len(self.events[user])] = value

    @rule(user=USERS, by=st.integers(1, 4))
    def shrink_history(self, user: int, by: int) -> None:
        del self.events[user][-by:]

    @rule(user=USERS)
    def reorder_history(self, user: int) -> None:
        self.events[user].reverse()

    @rule()
    def load_new_weights(self) -> None:
        self.weights += 1

    @rule(users=st.lists(USERS, min_size=1, max_size=2, unique=True), layers=st.integers(0, 1))
    def run_fails(self, users: list[int], layers: int) -> None:
        members, _ = self.cache.split(users, list(self.sizes(users).values()))[0]
        group = [users[i] for i in members]
        self.drop_stale(group)
        batch = self.prepare(group)
        if layers:
            for job in batch.jobs:
                job.wait_layer(0)
        self.cache.cancel(batch)
        self.model.run(self.sizes(group), completes=False)
        assert self.backend.num_pending == 0, "pages are free while copies may still write to them"

    @rule(user=USERS, grow=st.integers(0, 12), after=st.integers(0, 3))
    def transfer_fails(self, user: int, grow: int, after: int) -> None:
        self.events[user] += [7] * grow
        self.drop_stale([user])
        self.backend.submissions_until_failure = after
        host_before = self.cache.host.users() if self.cache.host else []
        held = len(self.cache.host.get(user).pages) if user in host_before else 0
        device_before = {u: list(self.cache.device.get(u).pages) for u in self.cache.device.users()}
        try:
            batch = self.prepare([user])
        except CopyFailedError:
            gone = {u: pages for u, pages in device_before.items() if u != user and not self.cache.device.get(u)}
            kept = {u: pages for u, pages in device_before.items() if u != user and u not in gone}
            assert all(self.cache.device.get(u).pages == pages for u, pages in kept.items())
            lost = [u for u in gone if not self.cache.host.get(u)]
            written = sum(len(pages) for u, pages in gone.items() if u not in lost)
            # Victims are dropped only where those written back and what the batch needs leave no room.
            assert all(len(gone[u]) > self.cache.host.pool.num_pages - held - written for u in lost)
            assert self.backend.num_pending == 0
            self.follow_books(host_before)
        else:
            self.backend.submissions_until_failure = None
            self.run([user], batch)
            self.cache.complete(batch)
            self.model.run(self.sizes([user]))

    def follow_books(self, host_before: list[int]) -> None:
        """After a failure between two copies the books decide; nobody may have appeared from nowhere."""
        known = set(self.model.device.tokens) | set(host_before)
        for tier, model in ((self.cache.device, self.model.device), (self.cache.host, self.model.host)):
            users = tier.users() if tier else []
            assert set(users) <= known
            model.tokens.clear()
            model.tokens.update({u: tier.get(u).tokens.num_tokens for u in users})

    @rule(place=st.integers(0, 5), page=st.integers(0, 9))
    def flip_a_bit_in_host_memory(self, place: int, page: int) -> None:
        users = self.cache.host.users() if self.cache.host else []
        if not users:
            return
        user = users[place % len(users)]
        self.backend.synchronize()
        pages = self.cache.host.get(user).pages
        self.cache.host_storage.pages[1, pages[page % len(pages)], 0, 0, 0, 0].view(torch.int32).bitwise_xor_(1 << 20)
        drops = self.cache.counters.corrupt_drops
        self.drop_stale([user])
        noticed = user in self.model.host.tokens
        self.model.drop(user)
        batch = self.prepare([user])
        assert self.cache.counters.corrupt_drops == drops + noticed
        self.run([user], batch)
        self.cache.complete(batch)
        self.model.run(self.sizes([user]))

    @invariant()
    def books_are_in_order(self) -> None:
        global steps_taken
        steps_taken += 1
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        assert self.cache.device.users() == list(self.model.device.tokens)
        assert (self.cache.host.users() if self.cache.host else []) == list(self.model.host.tokens)
        for user in self.cache.device.users():
            assert self.cache.device.get(user).tokens.num_tokens == self.model.device.tokens[user]


def test_ten_thousand_random_steps() -> None:
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS_PER_EXAMPLE)
    )
    assert steps_taken >= 10_000
