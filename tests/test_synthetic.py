"""The synthetic generator: seeded, of any size, and shaped like KuaiRand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.kuairand_files import FEATURES, SIGNALS, leftovers, prepared_bytes, run_hstu

from hstu_cli.data import synthetic
from hstu_cli.data.synthetic import NUM_TOPICS, SIGNAL_RATES, SyntheticOptions, prepare_synthetic

DAYS = 31


class Events:
    """A prepared set as flat arrays: one entry per event, by user and time."""

    def __init__(self, folder: Path) -> None:
        sequences = pq.read_table(folder / "sequences.parquet")
        self.counts = np.array([len(times) for times in sequences["time_ms"].to_pylist()])
        self.user_ids = sequences["user_id"].to_numpy()
        self.user = np.repeat(self.user_ids, self.counts)
        self.video_id = np.concatenate(sequences["video_id"].to_numpy())
        self.action_weights = np.concatenate(sequences["action_weights"].to_numpy())
        self.time_ms = np.concatenate(sequences["time_ms"].to_numpy())
        self.requests = pq.read_table(folder / "requests.parquet")
        self.metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))

    def same_user_as_before(self) -> np.ndarray:
        """For each event but the very first, whether the one before is of the same user; bool [events - 1]."""
        return self.user[1:] == self.user[:-1]


def make(root: Path, **options: Any) -> Events:
    prepare_synthetic(root, SyntheticOptions(**options))
    assert leftovers(root) == []
    return Events(root / "synthetic")


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return make(tmp_path_factory.mktemp("pure"), num_users=3000, num_events=93, num_items=5000, seed=1)


@pytest.fixture(scope="module")
def one_k(tmp_path_factory: pytest.TempPathFactory) -> Events:
    root = tmp_path_factory.mktemp("1k")
    return make(root, num_users=60, num_events=3000, num_items=5000, seed=2, shape="1k")


@pytest.mark.parametrize("shape", ["pure", "1k"])
def test_the_seed_decides_everything(tmp_path: Path, shape: str) -> None:
    contents = []
    for place, seed in enumerate((7, 7, 8)):
        root = tmp_path / str(place)
        make(root, num_users=30, num_events=150, num_items=400, seed=seed, shape=shape)
        contents.append(prepared_bytes(root / "synthetic"))
        metadata = json.loads(contents[-1].pop("metadata.json"))
        assert metadata["source"]["seed"] == seed
    first, again, other = contents
    assert first == again
    for name in first:
        assert first[name] != other[name]


def test_the_command_makes_it(tmp_path: Path) -> None:
    finished = run_hstu(
        *("preprocess", "kuairand", "--synthetic", "--users", 7, "--events", 20, "--items", 50, "--seed", 3),
        *("--shape", "1k", "--time-interval-s", 60, "--data-root", tmp_path, "--format", "json"),
    )
    assert finished.exit_code == 0, finished.stderr
    record = json.loads(finished.stdout)
    assert record["dataset"] == {"name": "synthetic", "path": str(tmp_path / "synthetic")}
    assert record["num_users_with_events"] == 7
    assert record["num_events"] == 140
    assert record["source"] == {"kind": "synthetic", "shape": "1k", "users": 7, "events": 20, "items": 50, "seed": 3}
    options = {"num_users": 7, "num_events": 20, "num_items": 50, "seed": 3, "shape": "1k", "interval_ms": 60_000}
    make(tmp_path / "api", **options)
    by_command, by_api = prepared_bytes(tmp_path / "synthetic"), prepared_bytes(tmp_path / "api" / "synthetic")
    assert by_command.pop("metadata.json") != by_api.pop("metadata.json")  # they have their times
    assert by_command == by_api


@pytest.mark.parametrize("shape", ["pure", "1k"])
def test_one_of_everything_is_enough(tmp_path: Path, shape: str) -> None:
    events = make(tmp_path, num_users=1, num_events=1, num_items=1, shape=shape)
    assert events.user_ids.tolist() == [0]
    assert events.video_id.tolist() == [0] * len(events.user)
    assert events.metadata["vocabulary_size"] == 1
    assert events.requests.num_rows >= 1


@pytest.mark.parametrize("num_items", [1, 2, NUM_TOPICS - 1, NUM_TOPICS, NUM_TOPICS + 1])
def test_every_item_is_one_of_the_asked(tmp_path: Path, num_items: int) -> None:
    events = make(tmp_path, num_users=100, num_events=100, num_items=num_items)
    assert set(events.video_id.tolist()) == set(range(num_items))


def test_pure_users_are_unequal_and_have_the_asked_mean(pure: Events) -> None:
    assert len(pure.counts) == 3000
    assert pure.counts.mean() == pytest.approx(93, rel=0.06)
    busy, quiet = np.percentile(pure.counts, [90, 10])
    assert busy > 4 * quiet


def test_pure_events_stand_alone_at_a_few_a_day(pure: Events) -> None:
    """Like KuaiRand-Pure: nearly every request has one candidate."""
    assert pure.counts.mean() / DAYS == pytest.approx(3, rel=0.06)
    candidates = pure.requests["num_candidates"].to_numpy()
    assert (candidates == 1).mean() > 0.95
    assert candidates.mean() < 1.1


def test_1k_users_have_exactly_the_asked_events(one_k: Events) -> None:
    assert one_k.counts.tolist() == [3000] * 60


def test_1k_sessions_share_a_time(one_k: Events) -> None:
    """Sessions of 60 to 100 events; a user's first and last may be a part of one."""
    keys = np.stack([one_k.user, one_k.time_ms])
    (begins,) = np.nonzero(np.any(np.diff(keys, prepend=-1), axis=0))
    lengths = np.diff(begins, append=len(one_k.user))
    user = one_k.user[begins]
    inner = np.concatenate([[False], (user[1:-1] == user[:-2]) & (user[1:-1] == user[2:]), [False]])
    assert lengths[inner].min() >= 60
    assert lengths[inner].max() <= 100
    assert lengths.max() <= 100
    assert inner.sum() > 60 * 25


def test_1k_requests_have_about_80_candidates(one_k: Events) -> None:
    candidates = one_k.requests["num_candidates"].to_numpy()
    assert 70 <= np.median(candidates) <= 90
    assert 70 <= candidates.mean() <= 90


@pytest.mark.parametrize("shape", ["pure", "one_k"])
def test_times_lie_in_kuairands_month_and_ascend(shape: str, request: pytest.FixtureRequest) -> None:
    events: Events = request.getfixturevalue(shape)
    start_ms = 1_649_347_200_000  # 2022-04-08 00:00 UTC+8
    assert events.time_ms.min() >= start_ms
    assert events.time_ms.max() < start_ms + DAYS * 86_400_000
    assert np.all(np.diff(events.time_ms)[events.same_user_as_before()] >= 0)


@pytest.mark.parametrize("shape", ["pure", "one_k"])
def test_signals_come_at_kuairands_rates(shape: str, request: pytest.FixtureRequest) -> None:
    events: Events = request.getfixturevalue(shape)
    for bit, signal in enumerate(SIGNALS):
        rate = ((events.action_weights >> bit) & 1).mean()
        chance = 5 * (SIGNAL_RATES[signal] / len(events.user)) ** 0.5
        assert rate == pytest.approx(SIGNAL_RATES[signal], rel=0.15, abs=chance), signal


def test_signals_depend_on_user_and_video(pure: Events) -> None:
    """Otherwise nothing could be learned: the rates of single users and videos differ by more than chance."""
    clicked = (pure.action_weights & 1).astype(float)
    for group in (pure.user, pure.video_id):
        counts = np.bincount(group)
        often = counts >= 50
        rates = np.bincount(group, clicked)[often] / counts[often]
        by_chance = np.sqrt(np.mean(clicked.mean() * (1 - clicked.mean()) / counts[often]))
        assert often.sum() > 100
        assert rates.std() > 1.5 * by_chance


@pytest.mark.parametrize("shape", ["pure", "one_k"])
def test_few_videos_have_most_of_the_events(shape: str, request: pytest.FixtureRequest) -> None:
    events: Events = request.getfixturevalue(shape)
    counts = np.sort(np.bincount(events.video_id, minlength=5000))[::-1]
    assert counts[:500].sum() > 0.4 * len(events.user)  # a tenth of the videos
    assert counts[:50].sum() > 0.2 * len(events.user)


@pytest.mark.parametrize("shape", ["pure", "one_k"])
def test_the_next_topic_is_partly_predictable(shape: str, request: pytest.FixtureRequest) -> None:
    """Half of the events and more stay with the topic of the one before; by chance one of 32 would."""
    events: Events = request.getfixturevalue(shape)
    topic = events.video_id % NUM_TOPICS
    stays = (topic[1:] == topic[:-1])[events.same_user_as_before()].mean()
    assert 0.55 < stays < 0.8
    between_users = topic[np.random.default_rng(0).permutation(len(topic))]
    assert (between_users[1:] == between_users[:-1]).mean() < 0.06


def test_many_draws_make_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users are drawn some at a time; here 4, with a shorter last draw."""
    monkeypatch.setattr(synthetic, "EVENTS_PER_DRAW", 200)
    events = make(tmp_path, num_users=43, num_events=50, num_items=300, shape="1k")
    assert events.user_ids.tolist() == list(range(43))
    assert events.counts.tolist() == [50] * 43
    by_user = events.video_id.reshape(43, 50)
    assert len({tuple(videos) for videos in by_user.tolist()}) == 43, "draws repeat each other"


def test_a_user_larger_than_a_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "EVENTS_PER_DRAW", 10)
    events = make(tmp_path, num_users=3, num_events=500, num_items=20, shape="1k")
    assert events.counts.tolist() == [500] * 3


def test_every_user_has_features(tmp_path: Path) -> None:
    make(tmp_path, num_users=300, num_events=2, num_items=10)
    users = pq.read_table(tmp_path / "synthetic" / "users.parquet")
    assert users["user_id"].to_pylist() == list(range(300))
    for name in FEATURES:
        ids = users[name].to_numpy()
        assert ids.min() == 1, "0 would be a missing feature"
        assert len(set(ids.tolist())) == ids.max() >= 5


def test_metadata_says_what_it_is(one_k: Events) -> None:
    metadata = one_k.metadata
    assert metadata["dataset"] == "synthetic"
    assert metadata["md5"] is None
    assert metadata["dropped_rows"] == {}
    assert metadata["num_rows_read"] == metadata["num_events"] == 180_000
    assert metadata["source"] == {
        "kind": "synthetic",
        "shape": "1k",
        "users": 60,
        "events": 3000,
        "items": 5000,
        "seed": 2,
    }
