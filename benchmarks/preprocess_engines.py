"""The stage of the preparation that decides its time, by engine: CSV files in, events by user and time out.

Each engine reads the same log files, checks every number, packs the eight signals into one, sorts by
user and time with ties in the order of the files, and hands out all rows, which go into a checksum
that depends on their order. `duckdb` is what `hstu preprocess` runs, with its memory limit; the two
Polars variants are written for this comparison. Also makes larger archives out of the sample's rows.

    python benchmarks/preprocess_engines.py run duckdb FOLDER
    python benchmarks/preprocess_engines.py multiply ARCHIVE FOLDER COPIES

Both print one JSON object. `benchmarks/preprocess.py` runs each in a process of its own.
"""

import hashlib
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hstu_cli.config import TASKS
from hstu_cli.data.database import LOG_COLUMNS, MAX_TIME_MS, ScratchDatabase
from hstu_cli.data.layout import RELEASES

RELEASE = RELEASES["kuairand-pure"]
USER_ID_STEP = 100_000
"""How far the user ids of one copy of the rows are from those of the next."""

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""user_id, video_id, action_weights and time_ms of some events."""


def duckdb_as_shipped(files: list[Path]) -> Iterator[Batch]:
    with tempfile.TemporaryDirectory(dir=files[0].parent) as folder, ScratchDatabase(Path(folder)) as database:
        database.load_events(files, drop_duplicates=False)
        for batch in database.sorted_events():
            if batch.num_rows:
                yield tuple(column.to_numpy() for column in batch.columns)


def polars_in_memory(files: list[Path]) -> Iterator[Batch]:
    return _polars(files, "in-memory")


def polars_streaming(files: list[Path]) -> Iterator[Batch]:
    return _polars(files, "streaming")


def _polars(files: list[Path], engine: str) -> Iterator[Batch]:
    import polars as pl

    logs = pl.concat([pl.scan_csv(file, schema_overrides=dict.fromkeys(LOG_COLUMNS, pl.Int64)) for file in files])
    signals = [pl.col(task) for task in TASKS]
    weights = pl.sum_horizontal((signal * (1 << t)).cast(pl.Int16) for t, signal in enumerate(signals))
    valid = pl.all_horizontal(
        *(signal.is_in([0, 1]) for signal in signals),
        pl.col("user_id") >= 0,
        pl.col("video_id") >= 0,
        pl.col("time_ms").is_between(0, MAX_TIME_MS, closed="left"),
    )
    events = (
        logs.select("user_id", "video_id", weights.alias("action_weights"), "time_ms", valid.alias("valid"))
        .sort("user_id", "time_ms", maintain_order=True)
        .collect(engine=engine)
    )
    if not events["valid"].fill_null(value=False).all():
        raise ValueError("a cell holds what it must not")
    for part in events.drop("valid").iter_slices(1 << 20):
        yield tuple(part[name].to_numpy() for name in part.columns)


ENGINES: dict[str, Callable[[list[Path]], Iterator[Batch]]] = {
    "duckdb": duckdb_as_shipped,
    "polars": polars_in_memory,
    "polars-streaming": polars_streaming,
}


def run(engine: str, folder: Path) -> dict[str, object]:
    """One engine over the logs in a folder: its time without imports, and what came out."""
    if engine != "duckdb":
        import polars  # noqa: F401 (before the clock starts)
    files = [folder / name for name in RELEASE.log_files]
    start = time.perf_counter()
    rows, checksum = 0, 0
    for user_id, video_id, action_weights, time_ms in ENGINES[engine](files):
        place = np.arange(rows + 1, rows + 1 + len(user_id), dtype=np.uint64)
        mixed = (user_id * 31 + video_id) * 257 + action_weights + time_ms
        checksum = (checksum + int(np.sum(place * mixed.astype(np.uint64)))) % 2**64
        rows += len(user_id)
    return {"engine": engine, "rows": rows, "checksum": f"{checksum:016x}", "stage_s": time.perf_counter() - start}


def multiply(archive: Path, folder: Path, copies: int) -> dict[str, object]:
    """The archive's logs and features, repeated with other user ids: CSV files and a .tar.gz of them."""
    import polars as pl

    target = folder / "rows.tar.gz"
    with tarfile.open(archive) as tar, tarfile.open(target, "w:gz", compresslevel=1) as packed:
        for name in (*RELEASE.log_files, RELEASE.user_file):
            rows = pl.read_csv(tar.extractfile(f"KuaiRand-Pure/data/{name}").read(), infer_schema=False)
            user_id = pl.col("user_id").cast(pl.Int64)
            with (folder / name).open("wb") as file:
                for copy in range(copies):
                    shifted = rows.with_columns(user_id + USER_ID_STEP * copy)
                    shifted.write_csv(file, include_header=copy == 0)
            packed.add(folder / name, f"KuaiRand-Pure/data/{name}")
    with target.open("rb") as file:
        return {"archive": str(target), "md5": hashlib.file_digest(file, "md5").hexdigest()}


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "run":
        print(json.dumps(run(arguments[0], Path(arguments[1]))))
    else:
        print(json.dumps(multiply(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))))
