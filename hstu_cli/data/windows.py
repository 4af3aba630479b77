"""Cuts users' event streams into requests: windows of a fixed length that open at an event."""

import numpy as np


def request_starts(time_ms: np.ndarray, user_starts: np.ndarray, interval_ms: int) -> np.ndarray:
    """Index of the first event of every request, int64, ascending.

    time_ms: int64 [N], ascending within each user; user_starts: int64 [users], where each user's
    events begin (user_starts[0] == 0). A window opens at a user's first event that is in none yet
    and takes all events less than `interval_ms` after that one.
    """
    if len(time_ms) == 0:
        return np.empty(0, np.int64)
    user_ends = np.append(user_starts[1:], len(time_ms))
    next_start = _first_event_after(time_ms, user_starts, user_ends, interval_ms)
    # All users take a step at once: as many steps as the busiest user has requests.
    starts = []
    open_at, ends = user_starts, user_ends
    while len(open_at):
        starts.append(open_at)
        open_at = next_start[open_at]
        more = open_at < ends
        open_at, ends = open_at[more], ends[more]
    return np.sort(np.concatenate(starts))


def _first_event_after(
    time_ms: np.ndarray, user_starts: np.ndarray, user_ends: np.ndarray, interval_ms: int
) -> np.ndarray:
    """For each event the next one of its user at least `interval_ms` later, or the user's end; int64 [N]."""
    # One ascending key over all users: each user's times are moved behind those of the one before,
    # by a gap that no window reaches across.
    first, last = time_ms[user_starts], time_ms[user_ends - 1]
    shift = np.cumsum(np.concatenate([[0], (last - first + interval_ms + 1)[:-1]])) - first
    key = time_ms + np.repeat(shift, user_ends - user_starts)
    return np.searchsorted(key, key + interval_ms)
