"""Small KuaiRand archives in the official layout, hostile ones too, and real runs of the `hstu` command."""

import csv
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

Row = Mapping[str, object]

SIGNALS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter")
"""Bit t of `action_weights` is signal t."""

LOG_COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms"),
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
    *("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
"""The header of the official log files."""

USER_COLUMNS = (
    *("user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range"),
    *("friend_user_num", "friend_user_num_range", "register_days", "register_days_range"),
    *(f"onehot_feat{i}" for i in range(18)),
)
"""The header of the official user feature files."""

FEATURES = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
"""The user features that become context tokens, besides the user's id."""

FIRST_DAY_MS = 1_649_347_200_000
"""2022-04-08 00:00 UTC+8."""

DATASETS = {"pure": "kuairand-pure", "1k": "kuairand-1k", "27k": "kuairand-27k"}
ARCHIVES = {"pure": "KuaiRand-Pure.tar.gz", "1k": "KuaiRand-1K.tar.gz", "27k": "KuaiRand-27K.tar.gz"}
PERIODS = ("4_08_to_4_21", "4_22_to_5_08")
PREPARED_FILES = ("sequences.parquet", "users.parquet", "requests.parquet", "metadata.json")


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive on disk, and its MD5."""

    path: Path
    md5: str

    @property
    def options(self) -> list[str]:
        """The options that make `hstu preprocess kuairand` use it."""
        return ["--archive", str(self.path), "--md5", self.md5]


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run of the command left."""

    exit_code: int
    stdout: str
    stderr: str


def log_files(release: str) -> list[str]:
    """The log files of a release, in the order that decides ties in time."""
    parts = ("_part1", "_part2") if release == "27k" else ("",)
    return [f"log_standard_{period}_{release}{part}.csv" for period in PERIODS for part in parts]


def user_file(release: str) -> str:
    return f"user_features_{release}.csv"


def log_row(user_id: int, video_id: int, time_ms: int, **values: object) -> dict[str, object]:
    """A row of a log file: no signal and plausible other columns, unless `values` says otherwise."""
    moment = datetime.fromtimestamp(time_ms / 1000, UTC) + timedelta(hours=8)
    row: dict[str, object] = dict.fromkeys(LOG_COLUMNS, 0)
    row |= {"user_id": user_id, "video_id": video_id, "time_ms": time_ms, "duration_ms": 10_000, "tab": 1}
    row |= {"date": f"{moment:%Y%m%d}", "hourmin": 100 * moment.hour}  # the official files have no minutes either
    return row | values


def user_row(user_id: int, **values: object) -> dict[str, object]:
    """A row of a feature file; the features hold commas as the official ones do."""
    row: dict[str, object] = dict.fromkeys(USER_COLUMNS, 0)
    row |= {"user_id": user_id, "user_active_degree": "full_active", "is_live_streamer": -124}
    row |= {"follow_user_num_range": "(0,10]", "fans_user_num_range": "[1,10)", "friend_user_num_range": "0"}
    return row | {"register_days_range": "730+"} | values


def csv_text(columns: Sequence[str], rows: Iterable[Row], line_end: str = "\n") -> str:
    """CSV with a header; cells with commas are quoted, and None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def release_files(release: str, logs: Sequence[Iterable[Row]], users: Iterable[Row]) -> dict[str, bytes]:
    """The files of a release, by base name; logs: the rows of each log file, in the order of log_files()."""
    texts = {name: csv_text(LOG_COLUMNS, rows) for name, rows in zip(log_files(release), logs, strict=True)}
    texts[user_file(release)] = csv_text(USER_COLUMNS, users)
    return {name: text.encode() for name, text in texts.items()}


GOOD_FILES: Mapping[str, bytes] = release_files(
    "pure",
    [
        [log_row(user, video, FIRST_DAY_MS + 1000 * video, is_click=1) for user in range(3) for video in range(4)],
        [log_row(user, video, FIRST_DAY_MS + 10**9, long_view=1) for user in range(1, 5) for video in range(3)],
    ],
    [user_row(user) for user in range(6)],
)
"""A small release without faults."""


def pack(path: Path, files: Mapping[str, bytes], folder: str = "KuaiRand/data/") -> Archive:
    """Files in a .tar.gz, below `folder`."""
    return pack_members(path, [member(folder + name, content) for name, content in files.items()])


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive, of any kind; its size is that of the content."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def pack_members(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Archive:
    """These members in a .tar.gz, written as they are: a header may promise more bytes than follow."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for info, content in members:
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
            tar.fileobj.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
    return archive_at(path)


def archive_at(path: Path) -> Archive:
    return Archive(path, hashlib.md5(path.read_bytes()).hexdigest())


def prepared_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared data set."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def leftovers(root: Path) -> list[str]:
    """What lies in a data root besides data sets and downloads; the lock files belong there."""
    known = {*DATASETS.values(), "synthetic", "downloads"}
    return sorted(name for name in os.listdir(root) if name not in known and not name.endswith(".lock"))


def hstu_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hstu_cli", *map(str, arguments)]


def run_hstu(*arguments: object, timeout_s: float = 120, preexec_fn: Callable[[], None] | None = None) -> Finished:
    """Run the `hstu` command to its end, in a process of its own."""
    finished = subprocess.run(
        hstu_command(*arguments), capture_output=True, text=True, timeout=timeout_s, preexec_fn=preexec_fn, check=False
    )
    return Finished(finished.returncode, finished.stdout, finished.stderr)


def start_hstu(*arguments: object) -> "subprocess.Popen[str]":
    """Start the `hstu` command; the caller ends it."""
    return subprocess.Popen(
        hstu_command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell may have switched Ctrl-C off for them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_refused(finished: Finished, exit_code: int, *fragments: str) -> None:
    """One message of readable length that holds the fragments, and nothing on stdout."""
    assert "Traceback" not in finished.stderr, finished.stderr[-2000:]
    assert finished.exit_code == exit_code, finished.stderr[-2000:]
    assert finished.stdout == ""
    assert finished.stderr.startswith("Error: ")
    assert finished.stderr.count("\n") == 1
    assert len(finished.stderr) < 2000
    for fragment in fragments:
        assert fragment in finished.stderr
