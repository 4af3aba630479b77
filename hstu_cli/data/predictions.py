"""Writes predictions: one row per request and candidate, to a Parquet file that is whole or absent."""

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_cli.config import TASKS
from hstu_cli.errors import InputError, RunError

PREDICTIONS_SCHEMA = pa.schema(
    {
        "request_id": pa.int64(),
        "user_id": pa.int64(),
        "video_id": pa.int64(),
        "label": pa.int16(),
        **{f"logit_{task}": pa.float32() for task in TASKS},
    }
)
ROW_GROUP_ROWS = 1 << 16


def check_writable(path: Path) -> None:
    """Raise InputError now where a file could not be written later."""
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--predictions-out {path} cannot be written.")


class PredictionsWriter:
    """Collects rows into row groups of one size, so that the file does not depend on the batches.

    A context manager: the file takes its name when the block ends well. InputError where it cannot
    be made, RunError where writing fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._pending: list[pa.Table] = []
        try:
            self._writer = pq.ParquetWriter(self._partial, PREDICTIONS_SCHEMA, compression="zstd")
        except OSError as error:
            raise InputError(f"--predictions-out {path} cannot be written: {error.strerror or error}.") from error

    def add(
        self, request_id: np.ndarray, user_id: np.ndarray, video_id: np.ndarray, label: np.ndarray, logits: np.ndarray
    ) -> None:
        """Rows in their final order: int64 [C] three times, int16 [C], float32 [C, 8]."""
        columns = [request_id, user_id, video_id, label, *np.ascontiguousarray(logits.T)]
        self._pending.append(pa.table(columns, schema=PREDICTIONS_SCHEMA))
        if sum(table.num_rows for table in self._pending) >= ROW_GROUP_ROWS:
            self._flush(whole_groups_only=True)

    def __enter__(self) -> "PredictionsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush(whole_groups_only=False)
            self._writer.close()
            if kind is None:
                self._partial.replace(self._path)
        except OSError as failure:
            raise RunError(f"{self._path} could not be written: {failure.strerror or failure}.") from failure
        finally:
            self._partial.unlink(missing_ok=True)

    def _flush(self, *, whole_groups_only: bool) -> None:
        rows = pa.concat_tables(self._pending or [PREDICTIONS_SCHEMA.empty_table()])
        end = rows.num_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS if whole_groups_only else rows.num_rows
        try:
            self._writer.write_table(rows.slice(0, end), row_group_size=ROW_GROUP_ROWS)
        except OSError as error:
            raise RunError(f"{self._path} could not be written: {error.strerror or error}.") from error
        self._pending = [rows.slice(end)]
