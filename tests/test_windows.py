"""Cutting event streams into requests, against a loop over one user's events at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_cli.data.windows import request_starts

LATE_MS = 4_000_000_000_000  # the year 2096

TIMES = st.lists(st.one_of(st.integers(0, 30), st.integers(LATE_MS, LATE_MS + 30)), min_size=1, max_size=12).map(sorted)
USERS = st.lists(TIMES, max_size=6)


def starts_by_loop(users: list[list[int]], interval_ms: int) -> list[int]:
    """A window opens at the first event in none yet and takes all that are less than the interval later."""
    starts, before = [], 0
    for times in users:
        opened_at = None
        for place, time_ms in enumerate(times):
            if opened_at is None or not time_ms - opened_at < interval_ms:
                opened_at = time_ms
                starts.append(before + place)
        before += len(times)
    return starts


def starts_by_code(users: list[list[int]], interval_ms: int) -> np.ndarray:
    lengths = [len(times) for times in users]
    user_starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)[: len(users)]
    return request_starts(np.array([t for times in users for t in times], np.int64), user_starts, interval_ms)


@given(USERS, st.one_of(st.integers(1, 40), st.just(LATE_MS)))
def test_requests_start_where_the_loop_starts_them(users: list[list[int]], interval_ms: int) -> None:
    starts = starts_by_code(users, interval_ms)
    assert starts.dtype == np.int64
    assert starts.tolist() == starts_by_loop(users, interval_ms)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0], [0]),
        ([0, 0, 0], [0]),
        ([0, 299_999, 300_000], [0, 2]),
        ([0, 300_000, 300_001, 600_000], [0, 1, 3]),
        ([0, 200_000, 400_000, 600_000], [0, 2]),  # not the gap between neighbours counts, but the window's start
    ],
)
def test_windows_of_300_seconds(times: list[int], expected: list[int]) -> None:
    assert starts_by_code([times], 300_000).tolist() == expected


def test_no_window_reaches_across_users() -> None:
    assert starts_by_code([[5], [5], [6], [1]], 1000).tolist() == [0, 1, 2, 3]


def test_no_events() -> None:
    assert starts_by_code([], 300_000).tolist() == []


def test_many_users_from_first_to_last_time_do_not_overflow() -> None:
    users = [[0, LATE_MS]] * 100_000
    assert len(starts_by_code(users, 300_000)) == 200_000
