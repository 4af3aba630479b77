"""The cache's books: pool, order and tier, as stories on four pages that assert exact ids."""

import subprocess
import sys

import pytest

from hstu_cli.kvcache.lru import LruOrder
from hstu_cli.kvcache.pool import PagePool
from hstu_cli.kvcache.tier import CachedTokens, CacheFullError, Tier


def tokens(count: int) -> CachedTokens:
    return CachedTokens(num_tokens=count, num_events=count // 2, window_start=0, digest=b"")


def store(tier: Tier, sizes: dict[int, int]) -> dict[int, list[int]]:
    """Reserve, take and complete; return the users' pages."""
    reservation = tier.prepare(sizes)
    tier.take_pages(reservation)
    pages = {user: tier.pages_of(reservation, user) for user in sizes}
    tier.complete(reservation, {user: tokens(2 * n) for user, n in sizes.items()})
    tier.check_invariants()
    return pages


def test_books_import_no_torch() -> None:
    code = "import sys\nfrom hstu_cli.kvcache import fingerprint, lru, pool, tier\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pool_hands_out_low_ids_first_and_frees_at_zero() -> None:
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.retain([1])
    assert (pool.num_free, pool.num_shared) == (1, 1)
    pool.release([0, 1, 2])
    assert pool.num_free == 3
    assert pool.ref_count(1) == 1
    pool.release([1])
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    pool.check_invariants()


def test_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)


def test_order_goes_from_least_to_most_recent() -> None:
    order = LruOrder()
    for key in (1, 2, 3, 1):
        order.touch(key)
    assert list(order) == [2, 3, 1]
    order.remove(3)
    assert list(order) == [2, 1]
    assert len(order) == 2


def test_a_user_grows_and_the_oldest_goes() -> None:
    tier = Tier(4)
    assert store(tier, {1: 1}) == {1: [0]}
    assert store(tier, {2: 2}) == {2: [1, 2]}
    assert store(tier, {1: 2}) == {1: [0, 3]}  # grows by one page; 2 is now the oldest
    assert tier.users() == [2, 1]
    assert store(tier, {3: 1}) == {3: [2]}  # 2 goes, though one page would do
    assert tier.users() == [1, 3]
    assert tier.get(2) is None
    assert tier.pool.num_free == 1


def test_preparing_changes_nothing_but_holds_all_that_takes_part() -> None:
    tier = Tier(4)
    store(tier, {1: 2})
    store(tier, {2: 2})
    reservation = tier.prepare({3: 2})
    assert reservation.victims.users == [1]
    assert tier.users() == [1, 2]
    assert tier.get(1).pages == [0, 1]
    assert tier.is_held(1)
    assert not tier.is_held(2)
    tier.check_invariants()
    with pytest.raises(CacheFullError):
        tier.prepare({4: 4})  # user 1 is spoken for
    tier.cancel(reservation)
    tier.check_invariants()
    assert tier.users() == [1, 2]
    assert not tier.is_held(1)
    assert tier.pool.num_free == 0


def test_cancelling_after_the_pages_were_taken_frees_them() -> None:
    tier = Tier(4)
    store(tier, {1: 2})
    store(tier, {2: 1})
    reservation = tier.prepare({2: 3})
    tier.take_pages(reservation)
    assert tier.get(1) is None
    assert tier.pages_of(reservation, 2) == [2, 1, 0]
    assert tier.get(2).pages == [2]
    tier.check_invariants()
    tier.cancel(reservation)
    tier.check_invariants()
    assert tier.get(2).pages == [2]
    assert tier.pool.num_free == 3


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    tier = Tier(4)
    store(tier, {1: 2})
    store(tier, {2: 1})
    hold = tier.hold([1])
    with pytest.raises(CacheFullError):
        tier.prepare({3: 3})
    tier.check_invariants()
    assert tier.users() == [1, 2]
    assert tier.pool.num_free == 1
    tier.let_go(hold)
    assert store(tier, {3: 3}) == {3: [1, 0, 3]}


def test_users_of_a_batch_do_not_evict_one_another() -> None:
    tier = Tier(4)
    store(tier, {1: 2})
    store(tier, {2: 1})
    with pytest.raises(CacheFullError):
        tier.prepare({1: 2, 2: 1, 3: 2})
    assert store(tier, {1: 2, 3: 2}) == {1: [0, 1], 3: [2, 3]}
    assert tier.users() == [1, 3]


def test_held_entries_cannot_be_dropped() -> None:
    tier = Tier(4)
    store(tier, {1: 1})
    hold = tier.hold([1])
    with pytest.raises(AssertionError, match="user 1 is held"):
        tier.drop(1)
    tier.let_go(hold)
    assert tier.drop(1).pages == [0]
    assert tier.pool.num_free == 4


def test_a_dropped_user_frees_its_pages() -> None:
    tier = Tier(4)
    store(tier, {1: 3})
    tier.drop(1)
    tier.check_invariants()
    assert len(tier) == 0
    assert store(tier, {2: 4}) == {2: [2, 1, 0, 3]}
