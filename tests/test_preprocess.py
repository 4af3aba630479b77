"""Prepared KuaiRand data against an oracle in plain Python, written apart from it."""

import csv
import json
import random
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.kuairand_files import (
    DATASETS,
    FEATURES,
    FIRST_DAY_MS,
    LOG_COLUMNS,
    SIGNALS,
    Row,
    leftovers,
    log_files,
    log_row,
    pack,
    prepared_bytes,
    release_files,
    run_hstu,
    user_file,
    user_row,
)

from hstu_cli.data import database
from hstu_cli.data.kuairand import KuaiRandOptions, count_warnings, prepare_kuairand

OFFICIAL_PURE_MD5 = "0820331067a3784d9691136f772b35a7"
SAMPLE_MD5 = "3caa8bfc7a72eab5f0a48be7140aea9c"
DAY_MS = 86_400_000
Files = Mapping[str, bytes]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a data set must hold, row by row."""

    sequences: Rows
    users: Rows
    requests: Rows
    category_maps: dict[str, dict[str, int]]
    num_dropped: int


def read_csv(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(content.decode().splitlines()))


def oracle(
    logs: Iterable[Mapping[str, str]], features: Sequence[Mapping[str, str]], interval_ms: int, *, drop_duplicates: bool
) -> Expected:
    """logs: the rows of all log files, the 4_08 files before the 4_22 files; features: those of the user file."""
    seen: set[tuple[str, ...]] = set()
    num_dropped = 0
    events: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for row in logs:
        cells = tuple(row[column] for column in LOG_COLUMNS)
        if drop_duplicates and cells in seen:
            num_dropped += 1
            continue
        seen.add(cells)
        weights = sum(int(row[signal]) * 2**bit for bit, signal in enumerate(SIGNALS))
        events[int(row["user_id"])].append((int(row["time_ms"]), int(row["video_id"]), weights))

    sequences, requests = [], []
    for user_id in sorted(events):
        ordered = sorted(events[user_id], key=lambda event: event[0])  # stable: ties keep the file order
        times, videos, weights = (list(column) for column in zip(*ordered, strict=True))
        sequences.append({"user_id": user_id, "video_id": videos, "action_weights": weights, "time_ms": times})
        begin = 0
        for end in range(1, len(times) + 1):
            if end == len(times) or times[end] - times[begin] >= interval_ms:
                requests.append((times[begin], user_id, begin, end - begin))
                begin = end
    names = ("request_id", "request_time_ms", "user_id", "history_end", "num_candidates")
    numbered = [dict(zip(names, (i, *request), strict=True)) for i, request in enumerate(sorted(requests))]

    row_of_user = {int(row["user_id"]): row for row in features}
    category_maps: dict[str, dict[str, int]] = {name: {} for name in FEATURES}
    users = []
    for user_id in sorted(row_of_user.keys() | events.keys()):
        ids = {"user_id": user_id}
        for name in FEATURES:
            category = row_of_user[user_id][name] if user_id in row_of_user else ""
            known = category_maps[name]
            ids[name] = known.setdefault(category, len(known) + 1) if category else 0
        users.append(ids)
    return Expected(sequences, users, numbered, category_maps, num_dropped)


def oracle_of_files(
    release: str, files: Files, interval_ms: int = 300_000, *, drop_duplicates: bool = False
) -> Expected:
    logs = [row for name in log_files(release) for row in read_csv(files[name])]
    return oracle(logs, read_csv(files[user_file(release)]), interval_ms, drop_duplicates=drop_duplicates)


def prepare(release: str, files: Files, folder: Path, **options: object) -> Path:
    """Prepare these files below `folder`; return the data set's folder."""
    archive = pack(folder / "archive.tar.gz", files)
    prepare_kuairand(DATASETS[release], folder, KuaiRandOptions(archive=archive.path, md5=archive.md5, **options))
    archive.path.unlink()
    assert leftovers(folder) == []
    return folder / DATASETS[release]


def rows_of(folder: Path, name: str) -> Rows:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def assert_holds(folder: Path, expected: Expected) -> None:
    assert rows_of(folder, "sequences") == expected.sequences
    assert rows_of(folder, "users") == expected.users
    assert rows_of(folder, "requests") == expected.requests
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    num_events = sum(len(row["video_id"]) for row in expected.sequences)
    assert metadata["category_maps"] == expected.category_maps
    assert metadata["num_rows_read"] == num_events + expected.num_dropped
    assert metadata["num_events"] == num_events
    assert metadata["dropped_rows"] == {"exact_duplicate": expected.num_dropped}
    assert metadata["num_users_with_events"] == len(expected.sequences)
    assert metadata["num_users"] == len(expected.users)
    assert metadata["num_requests"] == len(expected.requests)
    assert metadata["vocabulary_size"] == len({video for row in expected.sequences for video in row["video_id"]})


IDS = st.one_of(st.integers(0, 6), st.sampled_from([2**31, 2**53 + 1, 2**62 + 1, 2**63 - 1]))
MOMENTS = st.sampled_from([0, 0, 1, 999, 1000, 1001, 299_999, 300_000, 300_001, DAY_MS - 1, DAY_MS])
"""Sums of two of these lie on, just before and just behind the ends of windows."""
CATEGORIES = st.sampled_from(["", "", "UNKNOWN", "(0,10]", "[1,5)", "0", "full_active", 'quoted "word", comma', "用户"])


@st.composite
def log_blocks(draw: st.DrawFn) -> list[dict[str, object]]:
    """The rows of one file: blocks, each sorted by user."""
    rows: list[dict[str, object]] = []
    for _ in range(draw(st.integers(0, 3))):
        block = []
        for user_id, video_id in draw(st.lists(st.tuples(IDS, IDS), max_size=6)):
            bits = draw(st.one_of(st.just(0), st.integers(0, 255)))
            signals = {signal: bits >> bit & 1 for bit, signal in enumerate(SIGNALS)}
            time_ms = FIRST_DAY_MS + draw(MOMENTS) + draw(MOMENTS)
            block.append(log_row(user_id, video_id, time_ms, tab=draw(st.integers(0, 1)), **signals))
        rows += sorted(block, key=lambda row: row["user_id"])
    return rows


@st.composite
def user_features(draw: st.DrawFn) -> list[dict[str, object]]:
    """Rows in any order, of users with and without events."""
    ids = draw(st.lists(IDS, unique=True, max_size=8))
    return [user_row(user_id, **{name: draw(CATEGORIES) for name in FEATURES}) for user_id in ids]


@st.composite
def releases(draw: st.DrawFn) -> tuple[str, Files]:
    release = draw(st.sampled_from(sorted(DATASETS)))
    logs = [draw(log_blocks()) for _ in log_files(release)]
    rows = [row for log in logs for row in log]
    assume(rows)
    for row, number in draw(st.lists(st.tuples(st.sampled_from(rows), st.integers(0, len(logs) - 1)), max_size=4)):
        logs[number].append(row | {"tab": draw(st.integers(0, 1))})  # an exact duplicate, or nearly one
    return release, release_files(release, logs, draw(user_features()))


ONE_EVENT = ("pure", release_files("pure", [[], [log_row(3, 4, FIRST_DAY_MS)]], []))


@settings(max_examples=100)
@given(releases(), st.sampled_from([1, 2, 300, 86_400]), st.booleans())
@example(ONE_EVENT, 300, False)
def test_the_prepared_files_are_the_oracles(drawn: tuple[str, Files], interval_s: int, drop_duplicates: bool) -> None:
    release, files = drawn
    with tempfile.TemporaryDirectory() as folder:
        options = {"interval_ms": 1000 * interval_s, "drop_duplicates": drop_duplicates}
        prepared = prepare(release, files, Path(folder), **options)
        assert_holds(prepared, oracle_of_files(release, files, **options))


def scattered_rows(num_rows: int, num_users: int, *, num_times: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows of random users at random ones of `num_times` times; each has a video of its own."""
    generator = random.Random(seed)
    times = generator.choices(range(num_times), k=num_rows) if num_times < num_rows else range(num_rows)
    users = generator.choices(range(num_users), k=num_rows)
    rows = [
        log_row(user, video, FIRST_DAY_MS + 1000 * time)
        for video, (user, time) in enumerate(zip(users, times, strict=True))
    ]
    generator.shuffle(rows)
    return rows


def test_the_order_of_rows_does_not_matter_where_times_differ(tmp_path: Path) -> None:
    rows = scattered_rows(3000, 40, num_times=3000)
    users = [user_row(i, user_active_degree=f"degree {i % 7}", register_days_range=f"{i % 3}") for i in range(50)]
    contents = []
    for seed in range(3):
        generator = random.Random(seed)
        generator.shuffle(rows)
        generator.shuffle(users)
        folder = tmp_path / str(seed)
        folder.mkdir()
        files = release_files("pure", [rows[: 1000 * seed], rows[1000 * seed :]], users)
        contents.append(prepared_bytes(prepare("pure", files, folder)))
        contents[-1].pop("metadata.json")  # has the time of the preparation
    assert contents[0] == contents[1] == contents[2]


def test_the_order_of_rows_decides_ties_only(tmp_path: Path) -> None:
    rows = scattered_rows(2000, 10, num_times=25)
    contents = []
    for seed in range(2):
        random.Random(seed).shuffle(rows)
        folder = tmp_path / str(seed)
        folder.mkdir()
        files = release_files("pure", [rows[:700], rows[700:]], [])
        prepared = prepare("pure", files, folder)
        assert_holds(prepared, oracle_of_files("pure", files))
        contents.append((rows_of(prepared, "requests"), rows_of(prepared, "users"), rows_of(prepared, "sequences")))
    (*first_rest, first), (*second_rest, second) = contents
    assert first_rest == second_rest
    assert first != second, "no tie in the data: this test would show nothing"
    for one, other in zip(first, second, strict=True):
        assert one["time_ms"] == other["time_ms"]
        assert sorted(zip(one["time_ms"], one["video_id"], strict=True)) == sorted(
            zip(other["time_ms"], other["video_id"], strict=True)
        )


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users shorter and far longer than an internal batch, and a batch that ends where a user ends."""
    monkeypatch.setattr(database, "BATCH_ROWS", 1000)
    lengths = {1: 1, 2: 7000, 3: 1, 4: 2048, 5: 4096, 6: 30, 7: 9000, 8: 1}
    rows = [log_row(user, i, FIRST_DAY_MS + 700 * (i // 3)) for user, n in lengths.items() for i in range(n)]
    random.Random(0).shuffle(rows)
    files = release_files("1k", [rows[::2], rows[1::2]], [user_row(user) for user in lengths])
    prepared = prepare("1k", files, tmp_path, interval_ms=10_000)
    assert pq.ParquetFile(prepared / "sequences.parquet").num_row_groups > 2, "one batch: nothing was tested"
    assert_holds(prepared, oracle_of_files("1k", files, 10_000))


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_ties_keep_the_file_order_in_many_rows(tmp_path: Path, drop_duplicates: bool) -> None:
    """Enough rows for an engine to work on parts of them at once and to hand them on as they get ready."""
    num_rows = 300_000
    row = log_row(5, 0, FIRST_DAY_MS)
    before, after = (",".join(str(row[c]) for c in part) for part in (LOG_COLUMNS[:1], LOG_COLUMNS[2:]))
    header = ",".join(LOG_COLUMNS)
    lines = [f"{before},{video},{after}" for video in range(num_rows)]
    half = num_rows // 2
    names = log_files("pure")
    files = {
        names[0]: "\n".join([header, *lines[:half]]).encode(),
        names[1]: "\n".join([header, *lines[half:]]).encode(),
    }
    files |= {user_file("pure"): release_files("pure", [[], []], [])[user_file("pure")]}
    prepared = prepare("pure", files, tmp_path, drop_duplicates=drop_duplicates)
    assert rows_of(prepared, "sequences")[0]["video_id"] == list(range(num_rows))


def test_27k_reads_its_parts_in_order(tmp_path: Path) -> None:
    """All events at one time: the order of the files alone decides, not that of the archive."""
    logs = [[log_row(1, 10 * part + i, FIRST_DAY_MS) for i in range(3)] for part in range(4)]
    files = release_files("27k", logs, [user_row(1)])
    assert log_files("27k")[1:3] == [
        "log_standard_4_08_to_4_21_27k_part2.csv",
        "log_standard_4_22_to_5_08_27k_part1.csv",
    ]
    for number, order in enumerate([list(files), list(reversed(files))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepared = prepare("27k", {name: files[name] for name in order}, folder)
        assert rows_of(prepared, "sequences")[0]["video_id"] == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    """Columns in another order, and ones nobody knows, change nothing."""
    rows: Sequence[Row] = scattered_rows(50, 5, num_times=9)
    files = release_files("pure", [rows, []], [user_row(2)])
    name = log_files("pure")[0]
    table = list(csv.reader(files[name].decode().splitlines()))
    turned = "\n".join(",".join([*reversed(line), "new" if i == 0 else "1"]) for i, line in enumerate(table))
    prepared = prepare("pure", {**files, name: turned.encode()}, tmp_path)
    assert_holds(prepared, oracle_of_files("pure", files))


def test_schemas(tmp_path: Path) -> None:
    folder = prepare(*ONE_EVENT, tmp_path)
    int64 = pa.int64()
    assert {f.name: f.type for f in pq.read_schema(folder / "sequences.parquet")} == {
        "user_id": int64,
        "video_id": pa.list_(int64),
        "action_weights": pa.list_(pa.int16()),
        "time_ms": pa.list_(int64),
    }
    requests = pq.read_schema(folder / "requests.parquet")
    assert set(requests.names) == {"request_id", "user_id", "request_time_ms", "history_end", "num_candidates"}
    assert {f.type for f in requests} == {int64}
    users = pq.read_schema(folder / "users.parquet")
    assert users.names == ["user_id", *FEATURES]
    assert all(pa.types.is_integer(f.type) for f in users)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["sequences.parquet", "users.parquet", "requests.parquet", "metadata.json"]
    )


def test_metadata(tmp_path: Path) -> None:
    archive = pack(tmp_path / "mine.tar.gz", ONE_EVENT[1])
    options = KuaiRandOptions(archive=archive.path, md5=archive.md5, interval_ms=5000)
    returned = prepare_kuairand("kuairand-pure", tmp_path, options)
    stored = json.loads((tmp_path / "kuairand-pure" / "metadata.json").read_text(encoding="utf-8"))
    assert stored == returned
    assert stored["schema_version"] == 1
    assert stored["dataset"] == "kuairand-pure"
    assert stored["source"] == {"kind": "archive", "name": "mine.tar.gz", "official": False}
    assert stored["md5"] == archive.md5
    assert stored["time_interval_s"] == 5
    assert stored["first_time_ms"] == stored["last_time_ms"] == FIRST_DAY_MS
    assert stored["longest_history"] == 1


def test_counts_are_judged_only_where_the_archive_is_the_official_one(tmp_path: Path) -> None:
    metadata = json.loads((prepare(*ONE_EVENT, tmp_path) / "metadata.json").read_text(encoding="utf-8"))
    assert count_warnings(metadata) == []
    official = metadata | {"md5": OFFICIAL_PURE_MD5}
    warnings = " ".join(count_warnings(official))
    assert len(count_warnings(official)) == 2
    assert "1,436,609" in warnings
    assert "27,077" in warnings
    assert count_warnings(official | {"num_rows_read": 1_436_609, "num_users_with_events": 27_077}) == []
    assert len(count_warnings(official | {"num_rows_read": 1_436_609})) == 1
    assert count_warnings(metadata | {"dataset": "synthetic", "md5": None}) == []


def test_the_real_sample(sample_archive: Path, tmp_path: Path) -> None:
    finished = run_hstu(
        *("preprocess", "kuairand", "--dataset", "KuaiRand-Pure", "--data-root", tmp_path, "--format", "json"),
        *("--archive", sample_archive, "--md5", SAMPLE_MD5),
    )
    assert finished.exit_code == 0
    record = json.loads(finished.stdout)
    assert record["dataset"] == {"name": "kuairand-pure", "path": str(tmp_path / "kuairand-pure")}
    assert record["warnings"] == [], "the counts of the whole release say nothing about a sample"
    assert finished.stderr == ""
    counts = {"num_rows_read": 833_663, "num_users_with_events": 21_666, "num_users": 27_285, "num_requests": 814_114}
    assert {name: record[name] for name in counts} == counts
    assert leftovers(tmp_path) == []

    with tarfile.open(sample_archive) as tar:
        files = {name: tar.extractfile(f"KuaiRand-Pure/data/{name}").read() for name in log_files("pure")}
        features = read_csv(tar.extractfile(f"KuaiRand-Pure/data/{user_file('pure')}").read())
    # Every event of some users; all users for the categories, which depend on all of them.
    logs = []
    for content in files.values():
        header, *lines = content.decode().splitlines()
        some = [line for line in lines if int(line.partition(",")[0]) % 50 == 1]
        logs += csv.DictReader([header, *some])
    expected = oracle(logs, features, 300_000, drop_duplicates=False)
    assert len(expected.sequences) > 300
    folder = tmp_path / "kuairand-pure"
    some_users = [row["user_id"] for row in expected.sequences]
    assert (
        pq.read_table(folder / "sequences.parquet", filters=[("user_id", "in", some_users)]).to_pylist()
        == expected.sequences
    )
    requests = pq.read_table(folder / "requests.parquet", filters=[("user_id", "in", some_users)]).drop("request_id")
    assert requests.to_pylist() == [
        {name: value for name, value in row.items() if name != "request_id"} for row in expected.requests
    ]
    request_ids = pq.read_table(folder / "requests.parquet", columns=["request_id"])["request_id"].to_pylist()
    assert request_ids == list(range(814_114))
    assert rows_of(folder, "users") == expected.users
