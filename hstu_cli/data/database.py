"""Reads KuaiRand's CSV files and sorts rows in bounded memory, with DuckDB in a scratch folder."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from hstu_cli.config import CONTEXTUAL_FEATURES, TASKS
from hstu_cli.errors import InputError, RunError

MEMORY_LIMIT = "1GB"
"""What DuckDB may keep in memory; sorts that need more go through its temporary files."""

BATCH_ROWS = 1 << 20
"""Rows of one sorted batch."""

MAX_TIME_MS = 4_102_444_800_000
"""The year 2100: a larger `time_ms` is no time in milliseconds."""

LOG_COLUMNS = ("user_id", "video_id", "time_ms", *TASKS)
USER_COLUMNS = CONTEXTUAL_FEATURES[1:]
"""The columns of the feature file that become context tokens; `user_id` itself is the first."""

_EVENT_COLUMNS = "user_id, video_id, action_weights, time_ms"

_NUMBER = "DECIMAL(38,18)"
"""Holds every int64 exactly and keeps a fraction visible, which a cast to integer would round away."""

_MAX_ID = (1 << 63) - 1


class ScratchDatabase:
    """A DuckDB database that lives in a folder of its own: rows go in, sorted batches come out."""

    def __init__(self, folder: Path) -> None:
        self._connection = duckdb.connect(
            folder / "scratch.duckdb",
            config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(folder / "spill")},
        )
        self._run("CREATE TABLE events (user_id BIGINT, video_id BIGINT, action_weights SMALLINT, time_ms BIGINT)")

    def __enter__(self) -> "ScratchDatabase":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()

    def load_events(self, files: Sequence[Path], *, drop_duplicates: bool) -> int:
        """Read the log files in order, which decides ties in time; return the number of rows dropped.

        drop_duplicates: keep the first of the rows that agree in every column of the files.
        Raises InputError for a missing column and for a cell that does not hold what it must.
        """
        headers = [_read_header(file, LOG_COLUMNS) for file in files]
        if not drop_duplicates:
            for file, header in zip(files, headers, strict=True):
                scan = _csv_scan(file, header, LOG_COLUMNS)
                self._run(f"INSERT INTO events SELECT {_EVENT} FROM {scan}", source=file)
            return 0
        others = ", ".join(_quoted(column) for column in headers[0] if column not in LOG_COLUMNS)
        whole_row = f"{_EVENT}, {others}" if others else _EVENT
        for file, header in zip(files, headers, strict=True):
            if set(header) != set(headers[0]):
                raise InputError(f"{file} and {files[0]} have different columns, so their rows cannot be compared.")
            verb = "CREATE TABLE whole_rows AS" if file == files[0] else "INSERT INTO whole_rows"
            self._run(f"{verb} SELECT {whole_row} FROM {_csv_scan(file, header, LOG_COLUMNS)}", source=file)
        self._run(
            f"INSERT INTO events SELECT {_EVENT_COLUMNS} FROM whole_rows "
            f"WHERE rowid IN (SELECT min(rowid) FROM whole_rows GROUP BY {_EVENT_COLUMNS}{others and ', ' + others}) "
            "ORDER BY rowid"  # the order of the files decides ties
        )
        num_rows = self._count("whole_rows", "count(*)")
        self._run("DROP TABLE whole_rows")
        return num_rows - self._count("events", "count(*)")

    def add_events(self, events: pa.Table) -> None:
        """Add rows of `user_id, video_id, action_weights, time_ms`."""
        with _translated_errors():
            self._connection.from_arrow(events).insert_into("events")

    def count_videos(self) -> int:
        """Distinct videos of the loaded events."""
        return self._count("events", "count(DISTINCT video_id)")

    def sorted_events(self) -> Iterator[pa.RecordBatch]:
        """`user_id, video_id, action_weights, time_ms` by user, time and order in the files."""
        return self._batches(f"SELECT {_EVENT_COLUMNS} FROM events ORDER BY user_id, time_ms, rowid")

    def sorted_requests(self, file: Path) -> Iterator[pa.RecordBatch]:
        """The rows of a Parquet file by `request_time_ms` and `user_id`."""
        return self._batches(f"SELECT * FROM read_parquet({_literal(file)}) ORDER BY request_time_ms, user_id")

    def read_users(self, file: Path) -> pa.Table:
        """`user_id` int64 and the feature columns as strings (null where empty), by user_id."""
        header = _read_header(file, ("user_id", *USER_COLUMNS))
        columns = ", ".join([_id("user_id"), *(f"{c}::VARCHAR AS {c}" for c in USER_COLUMNS)])
        scan = _csv_scan(file, header, ("user_id",))
        self._run(f"CREATE TABLE users AS SELECT {columns} FROM {scan}", source=file)
        with _translated_errors():
            repeated = self._connection.execute(
                "SELECT user_id FROM users GROUP BY user_id HAVING count(*) > 1"
            ).fetchone()
        if repeated:
            raise InputError(f"{file} holds user {repeated[0]} more than once.")
        return pa.Table.from_batches(self._batches("SELECT * FROM users ORDER BY user_id"))

    def _count(self, table: str, expression: str) -> int:
        with _translated_errors():
            return self._connection.execute(f"SELECT {expression} FROM {table}").fetchone()[0]

    def _batches(self, query: str) -> Iterator[pa.RecordBatch]:
        with _translated_errors():
            reader = self._connection.sql(query).to_arrow_reader(BATCH_ROWS)
            yield pa.RecordBatch.from_pylist([], schema=reader.schema)  # gives the schema where no row follows
            yield from reader

    def _run(self, statement: str, source: Path | None = None) -> None:
        with _translated_errors(source):
            self._connection.execute(statement)


def _read_header(file: Path, required: Sequence[str]) -> list[str]:
    """The column names of a CSV file; InputError where it is empty or lacks a required one."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    if not header:
        raise InputError(f"{file} is empty.")
    missing = [column for column in required if column not in header]
    if missing:
        raise InputError(f"{file} lacks the column {', '.join(missing)}. It has {', '.join(header)}.")
    if len({column.lower() for column in header}) != len(header):  # to DuckDB the case of a name is nothing
        raise InputError(f"{file} names a column twice: {', '.join(header)}.")
    return header


def _csv_scan(file: Path, header: Sequence[str], numeric: Sequence[str]) -> str:
    """A FROM clause that reads a CSV file with these columns; those in `numeric` must be numbers."""
    types = ", ".join(f"{_literal(c)}: '{_NUMBER if c in numeric else 'VARCHAR'}'" for c in header)
    return (
        f"read_csv({_literal(file)}, auto_detect=false, header=true, delim=',', quote='\"', escape='\"', "
        f"columns={{{types}}})"
    )


def _checked(column: str, condition: str, expected: str) -> str:
    """An SQL expression: the column, or an error that says what it holds where the condition fails."""
    message = f"concat('column {column} holds ', coalesce({column}::VARCHAR, 'nothing'), ', expected {expected}')"
    return f"CASE WHEN {condition} THEN {column} ELSE error({message}) END"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


@contextmanager
def _translated_errors(source: Path | None = None) -> Iterator[None]:
    """Turn DuckDB's errors into ours: bad cells of `source` and full disks have one line each."""
    try:
        yield
    except duckdb.InterruptException as error:
        raise KeyboardInterrupt from error
    except RuntimeError as error:  # the Python package's own form of an interruption
        if "interrupted" in str(error).lower():
            raise KeyboardInterrupt from error
        raise
    except (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.TransactionException) as error:
        raise RunError(
            f"Sorting the rows failed, most likely because the disk is full: {_first_line(error)}. "
            "Free some space or choose another --data-root; nothing that was there has changed."
        ) from error
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        if source is None:
            raise
        raise InputError(f"{source}{_explain(str(error))}.") from error


def _explain(message: str) -> str:
    """What is wrong in a CSV file, from DuckDB's many lines about it: `, line 3: ...`."""
    line = re.search(r"CSV Error on Line: (\d+)", message)
    where = f", line {line[1]}" if line else ""
    if cell := re.search(r'converting column "(.*?)"\. Could not convert string "(.*?)" to', message, re.DOTALL):
        return f"{where}: column {cell[1]} holds {_shortened(cell[2])!r}, expected a number"
    if count := re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message):
        return f"{where}: {count[2]} columns, expected {count[1]}"
    if checked := re.search(r"column \w+ holds .*", message):
        return f": {_shortened(checked[0])}"
    return f"{where}: not a CSV file with one kind of line end and quotes in pairs ({_first_line(message)})"


def _shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _id(column: str) -> str:
    whole = _checked(
        column,
        f"{column} BETWEEN 0 AND {_MAX_ID} AND {column} = trunc({column})",
        f"a whole number from 0 to {_MAX_ID}",
    )
    return f"({whole})::BIGINT AS {column}"


def _time() -> str:
    condition = f"time_ms >= 0 AND time_ms < {MAX_TIME_MS} AND time_ms = trunc(time_ms)"
    return f"({_checked('time_ms', condition, 'milliseconds since 1970')})::BIGINT AS time_ms"


def _action_weights() -> str:
    bits = [f"({_checked(task, f'{task} IN (0, 1)', '0 or 1')})::SMALLINT * {1 << t}" for t, task in enumerate(TASKS)]
    return f"({' + '.join(bits)})::SMALLINT AS action_weights"


_EVENT = ", ".join([_id("user_id"), _id("video_id"), _action_weights(), _time()])
"""The SELECT list that turns a checked log row into an event."""
