"""The cache manager on real pages: transfers, failures, and what is served to whom."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.deferred import CopyFailedError, DeferredBackend

from hstu_cli.backend import Backend
from hstu_cli.config import ModelConfig
from hstu_cli.kernels import plan_batch
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.batch import CacheBatch
from hstu_cli.kvcache.fingerprint import HistoryFingerprint
from hstu_cli.kvcache.manager import kv_bytes_per_token
from hstu_cli.kvcache.storage import PageStorage, offload_pages, onload_pages
from hstu_cli.kvcache.transfers import PageCopy, start_transfer

CONFIG = ModelConfig(
    num_layers=3, hidden_dim=4, num_heads=2, head_dim=4, max_history=16, max_candidates=2, position_buckets=64,
    scaling_seqlen=32, head_dims=(8,), contextual_features=(),
)  # fmt: skip
PAGE_SIZE = 4
PAGE_BYTES = PAGE_SIZE * kv_bytes_per_token(CONFIG, torch.float32)


def cache(num_pages: int = 4, host_pages: int = 0, backend: DeferredBackend | None = None) -> KVCacheManager:
    sizes = KVCacheConfig(num_pages, PAGE_SIZE, host_pages * PAGE_BYTES, verify_host=True)
    return KVCacheManager(sizes, CONFIG, torch.float32, backend or DeferredBackend())


def history(num_events: int, seed: int = 0, identity: bytes = b"weights") -> HistoryFingerprint:
    events = np.arange(num_events) + 100 * seed
    return HistoryFingerprint(identity, np.empty(0, np.int64), events, events % 3, 0)


def run(manager: KVCacheManager, batch: CacheBatch, seed: int = 0) -> None:
    """Compute random keys and values for what is not cached."""
    new = [r.num_tokens - r.num_cached for r in batch.requests]
    plan = plan_batch(torch.tensor([0, *new]).cumsum(0), None, sum(new), "cpu")
    attention = batch.attention(CONFIG, plan, "blocked")
    generator = torch.Generator().manual_seed(seed)
    for layer in range(CONFIG.num_layers):
        attention.pages_of(layer).store(*torch.randn(2, sum(new), 2, 4, generator=generator))


def serve(manager: KVCacheManager, events_by_user: dict[int, int], seed: int = 0) -> list[int]:
    """Run a batch of users with histories of so many events; return the tokens that were cached."""
    batch = manager.prepare(list(events_by_user), [history(n, user) for user, n in events_by_user.items()])
    run(manager, batch, seed)
    manager.complete(batch)
    manager.check_invariants()
    return batch.num_cached_tokens


def contents(manager: KVCacheManager, user: int) -> torch.Tensor:
    return manager.device_storage.pages[:, manager.device.get(user).pages].clone()


def test_bytes_of_a_token() -> None:
    assert kv_bytes_per_token(CONFIG, torch.bfloat16) == 2 * 3 * 2 * 4 * 2


def test_a_growing_history_is_computed_once() -> None:
    manager = cache()
    assert serve(manager, {1: 3}) == [0]
    assert serve(manager, {1: 5}) == [6]
    assert manager.device.get(1).pages == [0, 1, 2]
    assert serve(manager, {1: 5}) == [9]  # nothing new: the last token is computed again
    assert (manager.counters.device_hit_tokens, manager.counters.recomputed_tokens) == (15, 6 + 4 + 1)


@pytest.mark.parametrize("num_tokens", [2, 4, 6, 8, 12, 14, 16])
def test_lengths_around_the_page_size(num_tokens: int) -> None:
    manager = cache()
    serve(manager, {1: num_tokens // 2})
    assert len(manager.device.get(1).pages) == -(-num_tokens // PAGE_SIZE)
    before = contents(manager, 1)
    assert serve(manager, {1: num_tokens // 2}, seed=9) == [num_tokens - 1]
    assert torch.equal(contents(manager, 1), before)


def test_an_empty_history_takes_no_page() -> None:
    manager = cache()
    assert serve(manager, {1: 0, 2: 2}) == [0, 0]
    assert manager.device.get(1) is None
    assert manager.device.get(2).pages == [0]


def test_changed_histories_and_weights_are_recomputed() -> None:
    manager = cache()
    for changed in (
        history(2),  # shrunk
        history(3, seed=5),  # other events
        history(3, identity=b"new weights"),
        HistoryFingerprint(b"weights", np.empty(0, np.int64), np.arange(3)[::-1], np.arange(3) % 3, 0),  # reordered
        HistoryFingerprint(b"weights", np.empty(0, np.int64), np.arange(3), np.arange(3) % 2, 0),  # an action changed
        HistoryFingerprint(b"weights", np.array([7]), np.arange(3), np.arange(3) % 3, 0),  # another context
    ):
        drops = manager.counters.stale_drops
        for fingerprint, cached in ((history(3), 0), (changed, 0)):
            batch = manager.prepare([1], [fingerprint])
            assert batch.num_cached_tokens == [cached]
            run(manager, batch)
            manager.complete(batch)
        assert manager.counters.stale_drops > drops
        manager.device.drop(1)


def test_a_moved_window_is_recomputed_and_counted_apart() -> None:
    manager = cache()
    serve(manager, {1: 3})
    moved = HistoryFingerprint(b"weights", np.empty(0, np.int64), np.arange(3), np.arange(3) % 3, 4)
    batch = manager.prepare([1], [moved])
    assert batch.num_cached_tokens == [0]
    manager.cancel(batch)
    assert (manager.counters.window_moves, manager.counters.stale_drops) == (1, 0)


def test_split_keeps_users_apart_and_sizes_within_the_pool() -> None:
    manager = cache(num_pages=4)
    users, tokens = [1, 2, 1, 3, 4, 5], [8, 8, 4, 16, 17, 0]
    assert manager.split(users, tokens) == [([0, 1], True), ([2], True), ([3], True), ([4], False), ([5], True)]
    assert manager.counters.uncached_requests == 1


def test_a_user_twice_in_a_batch_is_refused_by_prepare() -> None:
    with pytest.raises(ValueError, match="twice"):
        cache().prepare([1, 1], [history(1), history(2)])


def test_evicted_users_come_back_from_the_host_bit_for_bit() -> None:
    manager = cache(num_pages=4, host_pages=8)
    serve(manager, {1: 8})
    before = contents(manager, 1)
    serve(manager, {2: 8}, seed=1)
    assert manager.device.get(1) is None
    assert serve(manager, {1: 8}, seed=2) == [15]
    assert torch.equal(contents(manager, 1), before)
    assert manager.host.users() == [2]
    counters = manager.counters
    assert (counters.evictions, counters.host_hit_tokens) == (2, 15)
    assert (counters.bytes_offloaded, counters.bytes_onloaded) == (8 * PAGE_BYTES, 4 * PAGE_BYTES)


@pytest.mark.parametrize("to_host", [False, True])
def test_transfers_touch_the_pages_they_name_and_no_other(to_host: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = (PageStorage(torch.randn(3, 6, 2, PAGE_SIZE, 2, 4, generator=generator)) for _ in range(2))
    expected_source, expected = source.pages.clone(), target.pages.clone()
    copies = [PageCopy([0, 1, 2], [3, 4, 0]), PageCopy([5], [1])]
    for copy in copies:
        for a, b in zip(copy.source_pages, copy.target_pages, strict=True):
            expected[:, b] = source.pages[:, a]
    backend = DeferredBackend()
    untouched = target.pages.clone()
    job = start_transfer(backend, source, target, copies, to_host=to_host)
    assert torch.equal(target.pages, untouched)
    job.wait_layer(0)
    assert torch.equal(target.pages[0], expected[0])
    assert torch.equal(target.pages[1:], untouched[1:])
    job.wait()
    assert torch.equal(target.pages, expected)
    assert torch.equal(source.pages, expected_source)


@pytest.mark.parametrize("ids", [[], [4], [0, 1, 2, 5, 3], [5, 4, 3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("copy", [onload_pages, offload_pages])
def test_pages_between_host_and_device_go_through_one_place(
    copy: Callable[[torch.Tensor, torch.Tensor, Sequence[int], Sequence[int]], None], ids: list[int]
) -> None:
    """What is copied in stretches and gathered or spread by a kernel; here both sides are a CPU's."""
    source, target = torch.randn(2, 6, 2, PAGE_SIZE, 2, 4)
    target_ids = [2, 0, 5, 4, 1, 3][: len(ids)]
    expected = target.clone()
    expected[target_ids] = source[ids]
    kept = source.clone()
    copy(source, target, ids, target_ids)
    assert torch.equal(target, expected)
    assert torch.equal(source, kept)


def test_neighbours_in_host_memory_are_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever users they are of, and in whatever order their pages were given to them."""
    source, target = (PageStorage(torch.randn(1, 8, 2, PAGE_SIZE, 2, 4)) for _ in range(2))
    copied: list[tuple[list[int], list[int]]] = []

    def note(
        self: PageStorage, target: PageStorage, layer: int, pages: Sequence[int], target_pages: Sequence[int]
    ) -> None:
        copied.append((list(pages), list(target_pages)))

    monkeypatch.setattr(PageStorage, "copy_layer_to", note)
    copies = [PageCopy([7, 2, 4], [1, 0, 5]), PageCopy([3, 5], [7, 2])]
    for to_host in (False, True):
        start_transfer(Backend(), source, target, copies, to_host=to_host)
    assert copied == [([2, 3, 4, 5, 7], [0, 7, 5, 2, 1]), ([2, 7, 5, 4, 3], [0, 1, 2, 5, 7])]


def test_a_page_is_written_back_before_something_else_is_copied_into_it() -> None:
    """Layer by layer: the copies of the other direction do not wait for a whole victim."""
    device, first, second = (PageStorage(torch.randn(3, 1, 2, PAGE_SIZE, 2, 4)) for _ in range(3))
    old, new = device.pages.clone(), second.pages.clone()
    backend = DeferredBackend()
    write_back = start_transfer(backend, device, first, [PageCopy([0], [0])], to_host=True)
    onload = start_transfer(backend, second, device, [PageCopy([0], [0])], to_host=False, after=[write_back])
    for layer in range(3):
        onload.wait_layer(layer)
        assert backend.num_pending == 2 * (2 - layer)
        assert torch.equal(device.pages[: layer + 1], new[: layer + 1])
        assert torch.equal(first.pages[: layer + 1], old[: layer + 1])


def state(manager: KVCacheManager) -> tuple[object, ...]:
    """Who is where, and every byte of every page that is in use."""
    tiers: list[object] = []
    for tier, storage in ((manager.device, manager.device_storage), (manager.host, manager.host_storage)):
        for user in tier.users():
            entry = tier.get(user)
            tiers.append((user, list(entry.pages), entry.tokens, storage.pages[:, entry.pages].numpy().tobytes()))
        tiers.append(tier.pool.num_free)
    return tuple(tiers)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_an_offload_that_fails_midway_is_undone(fails_at: int) -> None:
    backend = DeferredBackend()
    manager = cache(num_pages=4, host_pages=8, backend=backend)
    serve(manager, {1: 4})
    serve(manager, {2: 4})
    before = state(manager)
    counters = manager.summary()
    backend.submissions_until_failure = fails_at  # a submission is a layer of both victims
    with pytest.raises(CopyFailedError):
        manager.prepare([3], [history(8, 3)])
    assert backend.num_pending == 0
    manager.check_invariants()
    assert state(manager) == before
    assert manager.summary() == counters
    assert serve(manager, {3: 8}) == [0]
    assert manager.host.users() == [1, 2]


def test_an_offload_that_fails_within_its_second_layer_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = cache(num_pages=4, host_pages=8)
    serve(manager, {1: 4})
    serve(manager, {2: 4})
    before = state(manager)
    copy_layer_to = PageStorage.copy_layer_to

    def fail_on_second(
        self: PageStorage, target: PageStorage, layer: int, pages: Sequence[int], target_pages: Sequence[int]
    ) -> None:
        if layer == 1:
            copy_layer_to(self, target, layer, pages[:1], target_pages[:1])
            raise CopyFailedError
        copy_layer_to(self, target, layer, pages, target_pages)

    monkeypatch.setattr(PageStorage, "copy_layer_to", fail_on_second)
    with pytest.raises(CopyFailedError):
        manager.prepare([3], [history(8, 3)])
    monkeypatch.undo()
    manager.check_invariants()
    assert state(manager) == before
    assert serve(manager, {3: 8}) == [0]
    assert manager.host.users() == [1, 2]


def test_an_onload_that_fails_keeps_the_host_copy() -> None:
    backend = DeferredBackend()
    manager = cache(num_pages=4, host_pages=8, backend=backend)
    serve(manager, {1: 8})
    kept = contents(manager, 1)
    serve(manager, {2: 8})
    backend.submissions_until_failure = CONFIG.num_layers + 1  # user 2 is written back, then user 1's second layer
    with pytest.raises(CopyFailedError):
        manager.prepare([1], [history(8, 1)])
    manager.check_invariants()
    assert manager.host.users() == [1, 2]
    assert manager.device.users() == []
    assert serve(manager, {1: 8}) == [15]
    assert torch.equal(contents(manager, 1), kept)


def test_what_is_being_copied_in_is_not_evicted() -> None:
    backend = DeferredBackend()
    manager = cache(num_pages=4, host_pages=8, backend=backend)
    serve(manager, {1: 8})
    serve(manager, {2: 8})
    batch = manager.prepare([1], [history(8, 1)])
    assert backend.num_pending > 0
    with pytest.raises(Exception, match="pages too few"):
        manager.device.prepare({9: 1})
    assert manager.host.is_held(1)
    run(manager, batch)
    manager.complete(batch)
    manager.check_invariants()


def test_a_host_too_small_keeps_the_most_recent() -> None:
    manager = cache(num_pages=4, host_pages=2)
    serve(manager, {1: 4})
    serve(manager, {2: 4})
    serve(manager, {3: 8})
    assert manager.host.users() == [2]
    serve(manager, {4: 8})
    assert manager.host.users() == [2]  # user 3 does not fit and does not push user 2 out
    assert manager.counters.evictions == 3


def test_a_flipped_bit_on_the_host_is_found_and_recomputed() -> None:
    manager = cache(num_pages=4, host_pages=8)
    serve(manager, {1: 8})
    serve(manager, {2: 8})
    page = manager.host.get(1).pages[-1]
    manager.host_storage.pages[2, page, 1, -1, -1, -1].view(torch.int32).bitwise_xor_(1)
    assert serve(manager, {1: 8}) == [0]
    assert manager.counters.corrupt_drops == 1
    assert manager.host.get(1) is None


def test_wrong_sizes_are_refused() -> None:
    for sizes in ({"num_pages": 0}, {"num_pages": 1, "page_size": 0}, {"num_pages": 1, "host_bytes": -1}):
        with pytest.raises(ValueError, match="at least"):
            KVCacheConfig(**sizes)
