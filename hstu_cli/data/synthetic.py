"""Seeded synthetic users shaped like KuaiRand: the same files, any size, no download.

What is modelled: few very active users and many quiet ones, a skewed popularity of videos, sessions,
signals at KuaiRand's rates that depend on the user and the video, and the habit of staying with a
topic from one video to the next, which makes the next item partly predictable.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hstu_cli.config import TASKS
from hstu_cli.data.database import USER_COLUMNS, ScratchDatabase
from hstu_cli.data.layout import SYNTHETIC
from hstu_cli.data.prepare import build_dataset
from hstu_cli.data.publish import replaced_folder

Shape = Literal["pure", "1k"]

START_MS = 1_649_347_200_000  # 2022-04-08 00:00 UTC+8, KuaiRand's first day
PERIOD_MS = 31 * 86_400_000
NUM_TOPICS = 32
POPULARITY_EXPONENT = 0.8
SAME_TOPIC = 0.6
"""Share of events that stay with the topic of the event before."""

SESSION_EVENTS = (60, 100)
"""Least and greatest length of the `1k` shape's sessions."""

EVENTS_PER_DRAW = 1 << 20
"""Events drawn at a time, of one user at least."""

SIGNAL_RATES = {
    "is_click": 0.36,
    "is_like": 0.018,
    "is_follow": 0.0012,
    "is_comment": 0.003,
    "is_forward": 0.0011,
    "is_hate": 0.0002,
    "long_view": 0.26,
    "is_profile_enter": 0.01,
}
"""Share of events with each signal, about those of KuaiRand's standard logs."""

CATEGORIES = {
    "user_active_degree": ("full_active", "high_active", "middle_active", "low_active", "UNKNOWN"),
    "follow_user_num_range": ("0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]", "(250,500]", "500+"),
    "fans_user_num_range": ("0", "[1,10)", "[10,100)", "[100,1k)", "[1k,5k)", "[5k,1w)", "[1w,10w)"),
    "friend_user_num_range": ("0", "[1,5)", "[5,30)", "[30,60)", "[60,120)", "[120,250)", "250+"),
    "register_days_range": ("15-30", "31-60", "61-90", "91-180", "181-365", "366-730", "730+"),
}


@dataclass(frozen=True, slots=True)
class SyntheticOptions:
    """How much to make, and of which shape.

    num_events: events per user on average. `pure`: sparse, a few events a day, each at a time of
    its own, and unequal users. `1k`: sessions of about 80 events that share their request's time,
    and every user with about the same long history.
    """

    num_users: int = 50
    num_events: int = 40
    num_items: int = 1000
    shape: Shape = "pure"
    seed: int = 0
    interval_ms: int = 300_000


def prepare_synthetic(
    root: Path, options: SyntheticOptions, *, on_stage: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """Prepare `root/synthetic` and return its metadata; the same options give the same data."""
    with replaced_folder(root, SYNTHETIC) as work, ScratchDatabase(work) as database:
        on_stage("generating events")
        for events in _events(options):
            database.add_events(events)
        on_stage("building sequences and requests")
        return build_dataset(
            work,
            database,
            _user_features(options),
            interval_ms=options.interval_ms,
            dropped_rows={},
            provenance={
                "dataset": SYNTHETIC,
                "source": {
                    "kind": "synthetic",
                    "shape": options.shape,
                    "users": options.num_users,
                    "events": options.num_events,
                    "items": options.num_items,
                    "seed": options.seed,
                },
                "md5": None,
            },
        )


def _events(options: SyntheticOptions) -> Iterator[pa.Table]:
    """The events of all users, some users at a time, by user and time."""
    item_seed, user_seed = np.random.SeedSequence(options.seed).spawn(2)
    item_appeal = np.random.default_rng(item_seed).normal(0.0, 0.5, options.num_items)
    users_per_draw = max(1, EVENTS_PER_DRAW // options.num_events)
    for first in range(0, options.num_users, users_per_draw):
        user_ids = np.arange(first, min(first + users_per_draw, options.num_users))
        yield _draw(np.random.default_rng(user_seed.spawn(1)[0]), user_ids, item_appeal, options)


def _draw(
    rng: np.random.Generator, user_ids: np.ndarray, item_appeal: np.ndarray, options: SyntheticOptions
) -> pa.Table:
    """All events of these users."""
    counts = _event_counts(rng, len(user_ids), options)
    user = np.repeat(np.arange(len(user_ids)), counts)  # the place in user_ids of each event
    time_ms = _event_times(rng, user, counts, options.shape)
    topic = _topics(rng, user, min(NUM_TOPICS, options.num_items))
    video_id = _videos(rng, topic, options.num_items)
    user_appeal = rng.normal(0.0, 0.5, len(user_ids))
    appeal = user_appeal[user] + item_appeal[video_id]
    return pa.table(
        {
            "user_id": user_ids[user],
            "video_id": video_id,
            "action_weights": _signals(rng, appeal),
            "time_ms": time_ms,
        }
    )


def _event_counts(rng: np.random.Generator, num_users: int, options: SyntheticOptions) -> np.ndarray:
    if options.shape == "1k":
        return np.full(num_users, options.num_events)
    sigma = 0.8
    counts = rng.lognormal(np.log(options.num_events) - sigma**2 / 2, sigma, num_users)
    return np.maximum(1, np.rint(counts)).astype(np.int64)


def _event_times(rng: np.random.Generator, user: np.ndarray, counts: np.ndarray, shape: Shape) -> np.ndarray:
    """Times of the events, ascending within each user."""
    if shape == "pure":
        return START_MS + np.sort(user * PERIOD_MS + rng.integers(0, PERIOD_MS, len(user))) % PERIOD_MS
    # Every user's sessions have a length of their own, and the first is a part of one.
    length = rng.integers(*SESSION_EVENTS, len(counts), endpoint=True)
    place = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts) + rng.integers(0, length)[user]
    begins = (np.diff(place // length[user], prepend=-1) != 0) | (np.diff(user, prepend=-1) != 0)
    session = np.cumsum(begins) - 1  # [events]
    user_of_session = user[begins]
    session_time = np.sort(user_of_session * PERIOD_MS + rng.integers(0, PERIOD_MS, len(user_of_session)))
    return START_MS + (session_time % PERIOD_MS)[session]


def _topics(rng: np.random.Generator, user: np.ndarray, num_topics: int) -> np.ndarray:
    """The topic of each event: that of the one before, one of the user's favourites, or any."""
    changes = (np.diff(user, prepend=-1) != 0) | (rng.random(len(user)) >= SAME_TOPIC)
    user_of_change = user[changes]
    favourites = rng.integers(0, num_topics, (user[-1] + 1, 3))
    favourite = favourites[user_of_change, rng.integers(0, 3, len(user_of_change))]
    anything = rng.integers(0, num_topics, len(user_of_change))
    topic_of_change = np.where(rng.random(len(user_of_change)) < 0.7, favourite, anything)
    return topic_of_change[np.cumsum(changes) - 1]


def _videos(rng: np.random.Generator, topic: np.ndarray, num_items: int) -> np.ndarray:
    """A video of each topic; topic t has the videos t, t + topics, ..., the popular ones first."""
    num_topics = min(NUM_TOPICS, num_items)
    videos_in_topic = (num_items - 1 - topic) // num_topics + 1
    # Inverse of the distribution function of a power law with this exponent, continuous form.
    share = rng.random(len(topic)) ** (1 / (1 - POPULARITY_EXPONENT))
    return topic + num_topics * (share * videos_in_topic).astype(np.int64)


def _signals(rng: np.random.Generator, appeal: np.ndarray) -> np.ndarray:
    """Bit sums int16: each signal at its rate, multiplied by how appealing the event is."""
    factor = np.exp(appeal - appeal.var() / 2)  # mean about 1
    bits = np.zeros(len(appeal), np.int16)
    for t, task in enumerate(TASKS):
        bits |= (rng.random(len(appeal)) < SIGNAL_RATES[task] * factor).astype(np.int16) << t
    return bits


def _user_features(options: SyntheticOptions) -> pa.Table:
    rng = np.random.default_rng([options.seed, options.num_users])
    columns = {name: rng.choice(CATEGORIES[name], options.num_users) for name in USER_COLUMNS}
    return pa.table({"user_id": np.arange(options.num_users), **columns})
