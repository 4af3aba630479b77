"""Builds a prepared data set from a database of events: sequences, users, requests and metadata.

Events come sorted by user and time, batch by batch, so memory holds a batch and the longest single
user, whatever the size of the data.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_cli import __version__
from hstu_cli.data.database import MAX_TIME_MS, USER_COLUMNS, ScratchDatabase
from hstu_cli.data.layout import METADATA_FILE, REQUESTS_FILE, SCHEMA_VERSION, SEQUENCES_FILE, USERS_FILE
from hstu_cli.data.publish import RESULT
from hstu_cli.data.windows import request_starts
from hstu_cli.errors import InputError

SEQUENCES_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "video_id": pa.list_(pa.int64()),
        "action_weights": pa.list_(pa.int16()),
        "time_ms": pa.list_(pa.int64()),
    }
)
REQUESTS_SCHEMA = pa.schema(
    {
        "request_id": pa.int64(),
        "user_id": pa.int64(),
        "request_time_ms": pa.int64(),
        "history_end": pa.int64(),
        "num_candidates": pa.int64(),
    }
)
COMPRESSION = "zstd"


@dataclass(slots=True)
class EventTotals:
    """What is known of the events once all batches have passed."""

    user_ids: list[np.ndarray] = field(default_factory=list)  # per batch, ascending over all
    num_events: int = 0
    longest_history: int = 0
    first_time_ms: int = MAX_TIME_MS
    last_time_ms: int = 0


def build_dataset(
    work: Path,
    database: ScratchDatabase,
    user_features: pa.Table,
    *,
    interval_ms: int,
    dropped_rows: Mapping[str, int],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the four files of a data set into `work/result` from the database's events.

    user_features: `user_id` int64 and the feature columns as strings, by user_id. dropped_rows:
    counts by reason. provenance: `dataset`, `source` and `md5` for the metadata, which is returned.
    Raises InputError where there is no event at all.
    """
    result, unsorted_requests = work / RESULT, work / "requests.parquet"
    totals = _write_sequences(result / SEQUENCES_FILE, unsorted_requests, database.sorted_events(), interval_ms)
    if not totals.num_events:
        raise InputError("The log files hold no events.")
    num_requests = _write_requests(result / REQUESTS_FILE, database.sorted_requests(unsorted_requests))
    user_ids = np.concatenate(totals.user_ids)
    users, category_maps = users_table(user_ids, user_features)
    pq.write_table(users, result / USERS_FILE, compression=COMPRESSION)
    metadata = {
        "schema_version": SCHEMA_VERSION,
        **provenance,
        "prepared_at": datetime.now(UTC).isoformat(),
        "prepared_by": f"hstu {__version__}",
        "time_interval_s": interval_ms / 1000,
        "num_rows_read": totals.num_events + sum(dropped_rows.values()),
        "dropped_rows": dict(dropped_rows),
        "num_events": totals.num_events,
        "num_users_with_events": len(user_ids),
        "num_users": users.num_rows,
        "num_requests": num_requests,
        "vocabulary_size": database.count_videos(),
        "longest_history": totals.longest_history,
        "first_time_ms": totals.first_time_ms,
        "last_time_ms": totals.last_time_ms,
        "category_maps": category_maps,
    }
    text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
    (result / METADATA_FILE).write_text(text, encoding="utf-8")
    return metadata


def users_table(user_ids: np.ndarray, features: pa.Table) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """The table of all users, and the id of each category.

    user_ids: int64, the users of the logs; those without a row in `features` get 0 everywhere.
    A category's id is 1 + the rank of its first appearance with users in ascending order.
    """
    known = features["user_id"].to_numpy()  # ascending
    everyone = np.union1d(user_ids, known)
    rows = np.searchsorted(everyone, known)
    columns = {"user_id": pa.array(everyone)}
    category_maps = {}
    for name in USER_COLUMNS:
        # dictionary_encode numbers values in the order in which they appear.
        encoded = features[name].combine_chunks().dictionary_encode()
        ids = np.zeros(len(everyone), np.int64)
        ids[rows] = pc.fill_null(pc.add(encoded.indices, 1), 0).to_numpy()
        columns[name] = pa.array(ids)
        category_maps[name] = {value: i for i, value in enumerate(encoded.dictionary.to_pylist(), start=1)}
    return pa.table(columns), category_maps


def _write_sequences(
    sequences: Path, requests: Path, events: Iterable[pa.RecordBatch], interval_ms: int
) -> EventTotals:
    """Write sequences.parquet, and the requests in the order of the users."""
    totals = EventTotals()
    with (
        pq.ParquetWriter(sequences, SEQUENCES_SCHEMA, compression=COMPRESSION) as sequence_writer,
        pq.ParquetWriter(requests, REQUESTS_SCHEMA.remove(0), compression=COMPRESSION) as request_writer,
    ):
        for batch in _whole_users(events):
            user_id, time_ms = batch["user_id"].to_numpy(), batch["time_ms"].to_numpy()
            starts = np.flatnonzero(np.diff(user_id, prepend=-1))  # ids are >= 0
            ends = np.append(starts[1:], len(user_id))
            offsets = pa.array(np.append(starts, len(user_id)), pa.int32())
            lists = [
                pa.ListArray.from_arrays(offsets, batch[name].combine_chunks()) for name in SEQUENCES_SCHEMA.names[1:]
            ]
            sequence_writer.write_table(pa.table([user_id[starts], *lists], schema=SEQUENCES_SCHEMA))

            opens = request_starts(time_ms, starts, interval_ms)
            user_of_request = np.searchsorted(starts, opens, side="right") - 1
            history_end = opens - starts[user_of_request]
            num_candidates = np.append(opens[1:], len(user_id)) - opens
            rows = [user_id[opens], time_ms[opens], history_end, num_candidates]
            request_writer.write_table(pa.table(rows, schema=REQUESTS_SCHEMA.remove(0)))

            totals.user_ids.append(user_id[starts])
            totals.num_events += len(user_id)
            totals.longest_history = max(totals.longest_history, int((ends - starts).max()))
            totals.first_time_ms = min(totals.first_time_ms, int(time_ms.min()))
            totals.last_time_ms = max(totals.last_time_ms, int(time_ms.max()))
    return totals


def _write_requests(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Write requests.parquet from requests in their final order, numbering them; return their count."""
    count = 0
    with pq.ParquetWriter(path, REQUESTS_SCHEMA, compression=COMPRESSION) as writer:
        for batch in batches:
            if batch.num_rows == 0:
                continue
            request_ids = pa.array(np.arange(count, count + batch.num_rows))
            writer.write_table(pa.table([request_ids, *batch.columns], schema=REQUESTS_SCHEMA))
            count += batch.num_rows
    return count


def _whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows, cut where the user changes, so that no user is split."""
    rest: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        rest = table if rest is None else pa.concat_tables([rest, table])
        if rest.num_rows == 0:
            continue
        user_id = rest["user_id"].to_numpy()
        last_user = int(np.searchsorted(user_id, user_id[-1]))
        if last_user:
            yield rest.slice(0, last_user)
            rest = rest.slice(last_user)
    if rest is not None and rest.num_rows:
        yield rest
