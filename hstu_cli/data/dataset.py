"""Reads a prepared data set: the request timeline and, of the users in it, their events."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_cli.config import KUAIRAND_TIMEZONE
from hstu_cli.data.layout import (
    METADATA_FILE,
    PREPARED_FILES,
    REQUESTS_FILE,
    SCHEMA_VERSION,
    SEQUENCES_FILE,
    USERS_FILE,
    prepare_command,
    prepared_datasets,
)
from hstu_cli.errors import InputError


@dataclass(frozen=True, slots=True)
class RequestTimeline:
    """Requests in time order; every array is int64 [requests]."""

    request_id: np.ndarray
    user_id: np.ndarray
    history_end: np.ndarray
    num_candidates: np.ndarray

    def __len__(self) -> int:
        return len(self.request_id)


@dataclass(frozen=True, slots=True)
class EventStore:
    """The events of some users, one after another.

    user_ids: int64 [users], ascending; offsets: int64 [users + 1] into video_id (int64 [events])
    and action_weights (int16 [events]).
    """

    user_ids: np.ndarray
    offsets: np.ndarray
    video_id: np.ndarray
    action_weights: np.ndarray

    def events_of(self, user_id: int) -> slice:
        """Where this user's events are."""
        place = int(np.searchsorted(self.user_ids, user_id))
        return slice(int(self.offsets[place]), int(self.offsets[place + 1]))


class PreparedDataset:
    """A prepared data set in `root/name`; InputError where it is missing, foreign or damaged."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.path = root / name
        missing = [file for file in PREPARED_FILES if not (self.path / file).is_file()]
        if missing:
            raise InputError(f"{self.path} holds no prepared data set ({', '.join(missing)} missing). {self._again()}")
        try:
            self.metadata: dict[str, Any] = json.loads((self.path / METADATA_FILE).read_text(encoding="utf-8"))
            version = self.metadata["schema_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path / METADATA_FILE} cannot be read: {error}. {self._again()}") from error
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{self.path} has schema_version {version}, this program reads {SCHEMA_VERSION}. {self._again()}"
            )
        lacking = [key for key in ("category_maps", "first_time_ms", "last_time_ms") if key not in self.metadata]
        if lacking:
            raise InputError(f"{self.path / METADATA_FILE} lacks {', '.join(lacking)}. {self._again()}")

    @property
    def time_span(self) -> str:
        """The first and the last event, as people write them: "from … to …", in UTC+8."""
        return f"from {format_time(self.metadata['first_time_ms'])} to {format_time(self.metadata['last_time_ms'])}"

    def requests(
        self, *, from_ms: int | None = None, until_ms: int | None = None, limit: int | None = None
    ) -> RequestTimeline:
        """Requests with from_ms <= request_time_ms < until_ms, the first `limit` of them."""
        columns = ["request_id", "user_id", "history_end", "num_candidates"]
        parts: list[pa.Table] = []
        found = 0
        for rows in self._row_groups(REQUESTS_FILE, [*columns, "request_time_ms"]):
            time_ms = rows["request_time_ms"].to_numpy()  # ascending over the whole file
            first = 0 if from_ms is None else int(np.searchsorted(time_ms, from_ms))
            last = len(time_ms) if until_ms is None else int(np.searchsorted(time_ms, until_ms))
            if limit is not None:
                last = min(last, first + limit - found)
            parts.append(rows.select(columns).slice(first, max(0, last - first)))
            found += parts[-1].num_rows
            if (limit is not None and found >= limit) or last < len(time_ms):
                break
        table = pa.concat_tables(parts)
        return RequestTimeline(*(table[name].to_numpy() for name in columns))

    def events(self, user_ids: np.ndarray) -> EventStore:
        """All events of these users (int64, any order, repeated or not)."""
        wanted = pa.array(np.unique(user_ids))
        columns = ["user_id", "video_id", "action_weights"]
        groups = self._row_groups(SEQUENCES_FILE, columns)
        table = pa.concat_tables([rows.filter(pc.is_in(rows["user_id"], wanted)) for rows in groups])
        if table["user_id"].to_pylist() != wanted.to_pylist():
            raise InputError(f"{self.path / SEQUENCES_FILE} lacks users of {REQUESTS_FILE}. {self._again()}")
        offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(table["video_id"]).to_numpy())])
        return EventStore(
            user_ids=table["user_id"].to_numpy(),
            offsets=offsets.astype(np.int64),
            video_id=pc.list_flatten(table["video_id"]).to_numpy(),
            action_weights=pc.list_flatten(table["action_weights"]).to_numpy(),
        )

    def users(self, columns: Sequence[str]) -> np.ndarray:
        """The users' columns, int64 [users, len(columns)], by user_id."""
        table = pa.concat_tables(self._row_groups(USERS_FILE, list(columns)))
        return np.stack([table[name].to_numpy() for name in columns], axis=1)

    def video_ids(self) -> np.ndarray:
        """Every video of the events once, int64, ascending."""
        groups = self._row_groups(SEQUENCES_FILE, ["video_id"])
        return np.unique(np.concatenate([pc.unique(pc.list_flatten(rows["video_id"])).to_numpy() for rows in groups]))

    def _row_groups(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """The row groups of a file one by one; each holds about a million events or requests."""
        path = self.path / name
        try:
            with pq.ParquetFile(path) as file:
                missing = set(columns) - set(file.schema_arrow.names)
                if missing:
                    raise InputError(f"{path} lacks the column {', '.join(sorted(missing))}. {self._again()}")
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read: {error}. {self._again()}") from error

    def _again(self) -> str:
        return f"Prepare it with: {prepare_command(self.name, self.path.parent)}"


def last_prepared(root: Path) -> str | None:
    """The data set under `root` that was prepared last, or None."""

    def prepared_at(name: str) -> str:
        return str(PreparedDataset(root, name).metadata.get("prepared_at", ""))

    return max(prepared_datasets(root), key=prepared_at, default=None)


def format_time(time_ms: int) -> str:
    """A time in UTC+8, KuaiRand's own."""
    return datetime.fromtimestamp(time_ms / 1000, KUAIRAND_TIMEZONE).strftime("%Y-%m-%d %H:%M UTC+8")
