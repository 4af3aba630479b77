"""Preparations that die, are interrupted, meet each other or a full disk: the old result or none, and no litter."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.http_server import FileServer
from support.kuairand_files import (
    FIRST_DAY_MS,
    GOOD_FILES,
    LOG_COLUMNS,
    Archive,
    Finished,
    assert_refused,
    leftovers,
    log_files,
    log_row,
    pack,
    prepared_bytes,
    run_hstu,
    start_hstu,
)

NAME = "kuairand-pure"
PURE = ("preprocess", "kuairand", "--dataset", "pure")
FIRST_LOG, SECOND_LOG = log_files("pure")
ARCHIVE_PATH = "/KuaiRand-Pure.tar.gz"
PATIENCE_S = 60.0
"""How long a test waits for something that takes a second; only a hanging run needs it."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return pack(tmp_path_factory.mktemp("small") / "small.tar.gz", GOOD_FILES)


def pack_logs(path: Path, num_rows: int, num_distinct: int) -> Archive:
    """Two logs of so many rows each, which repeat: the fewer distinct ones, the smaller the archive."""
    rows = [
        ",".join(map(str, log_row(i % 997, i % 103, FIRST_DAY_MS + 1000 * i).values())) for i in range(num_distinct)
    ]
    log = "\n".join([",".join(LOG_COLUMNS), *rows * (num_rows // num_distinct), ""]).encode()
    return pack(path, {**GOOD_FILES, FIRST_LOG: log, SECOND_LOG: log})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Enough rows for seconds of work."""
    return pack_logs(tmp_path_factory.mktemp("large") / "large.tar.gz", 400_000, 10_000)


@pytest.fixture(scope="module")
def good_result(small: Archive) -> Path:
    """A data root with a finished preparation, to be copied."""
    root = small.path.parent / "root"
    finished = run_hstu(*PURE, "--data-root", root, *small.options)
    assert finished.exit_code == 0, finished.stderr
    return root


@pytest.fixture
def root(good_result: Path, tmp_path: Path) -> Path:
    """A data root of this test's own, with an earlier good result in it."""
    return Path(shutil.copytree(good_result, tmp_path / "root"))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with these options, or skips where that is not allowed."""
    folder = tmp_path / "mount"
    folder.mkdir()

    def run_mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            pytest.skip(f"no file system can be mounted here: {finished.stderr.strip()}")
        return folder

    yield run_mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_data_root_that_is_read_only(small: Archive, good_result: Path, mount: Callable[[str], Path]) -> None:
    root = Path(shutil.copytree(good_result, mount("size=8m") / "root"))
    before = prepared_bytes(root / NAME)
    mount("remount,ro")
    for place in (root, root / "new"):
        assert_refused(run_hstu(*PURE, "--data-root", place, *small.options), 4, str(place), "--data-root")
    assert prepared_bytes(root / NAME) == before


def leave_free(folder: Path, num_bytes: int) -> None:
    """Fill the file system of a folder, but for so many bytes."""
    free = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(bytes(free - num_bytes))
    assert abs(shutil.disk_usage(folder).free - num_bytes) < 16_384


@pytest.mark.parametrize("num_rows", [40_000, 200_000])
@pytest.mark.parametrize(
    ("spare_bytes", "fragment"),
    [(None, "GB free"), (-600_000, "extracted"), (100_000, "full"), (500_000, "full")],
    ids=["before", "extracting", "loading", "loading later"],
)
def test_a_full_disk(
    num_rows: int,
    spare_bytes: int | None,
    fragment: str,
    good_result: Path,
    tmp_path: Path,
    mount: Callable[[str], Path],
) -> None:
    """spare_bytes: what the disk has besides the bytes of the unpacked logs; None is next to nothing at all.

    The database takes few rows to a log of its own first, and many straight to its file.
    """
    archive = pack_logs(tmp_path / "repetitive.tar.gz", num_rows, 100)
    folder = mount("size=64m")
    root = Path(shutil.copytree(good_result, folder / "root"))
    before = prepared_bytes(root / NAME)
    leave_free(folder, 100_000 if spare_bytes is None else unpacked_bytes(archive) + spare_bytes)
    assert_refused(run_hstu(*PURE, "--data-root", root, *archive.options), 1, fragment, str(root))
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []

    (folder / "ballast").unlink()
    finished = run_hstu(*PURE, "--data-root", root, *archive.options)
    assert finished.exit_code == 0, finished.stderr


def unpacked_bytes(archive: Archive) -> int:
    with tarfile.open(archive.path) as tar:
        return sum(member.size for member in tar)


def test_a_disk_that_fills_up_while_the_result_is_written(
    large: Archive, good_result: Path, mount: Callable[[str], Path]
) -> None:
    folder = mount("size=160m")
    root = Path(shutil.copytree(good_result, folder / "root"))
    before = prepared_bytes(root / NAME)
    process = start_hstu(*PURE, "--data-root", root, *large.options)
    wait_for_scratch(root, "sequences.parquet", process)
    process.send_signal(signal.SIGSTOP)  # so that the disk is full before the next byte is written
    with contextlib.suppress(OSError):  # no space left: as it should be
        (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free))
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert_refused(Finished(process.returncode, stdout, stderr), 1, str(root))
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


@pytest.mark.parametrize("limit_bytes", [1, 100_000])
def test_a_limit_on_the_size_of_files(limit_bytes: int, large: Archive, root: Path) -> None:
    """Writing fails where this process may write no more; the least limit even at its first byte."""
    before = prepared_bytes(root / NAME)
    limits = (limit_bytes, limit_bytes)
    arguments = (*PURE, "--data-root", root, *large.options)
    finished = run_hstu(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert_refused(finished, 1, str(root))
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


def wait_for_scratch(root: Path, pattern: str, process: "subprocess.Popen[str]") -> None:
    """Wait until the running preparation has made such a file in its temporary folder."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        if root.exists() and any(list((root / name).rglob(pattern)) for name in leftovers(root)):
            return
        time.sleep(0.001)
    process.kill()
    pytest.fail(f"no {pattern} was seen in a temporary folder; the run said: {process.communicate()}")


MOMENTS = [FIRST_LOG, "*duckdb", "*duckdb.wal", "sequences.parquet"]
"""Files whose appearance shows how far a preparation has come, in order."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_the_old_result_and_the_next_run_cleans_up(moment: str, large: Archive, root: Path) -> None:
    before = prepared_bytes(root / NAME)
    process = start_hstu(*PURE, "--data-root", root, *large.options)
    wait_for_scratch(root, moment, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert prepared_bytes(root / NAME) == before

    finished = run_hstu(*PURE, "--data-root", root, *large.options)
    assert finished.exit_code == 0, finished.stderr
    assert leftovers(root) == []
    assert prepared_bytes(root / NAME) != before


def test_a_kill_leaves_none_where_there_was_none(large: Archive, small: Archive, tmp_path: Path) -> None:
    root = tmp_path / "root"
    process = start_hstu(*PURE, "--data-root", root, *large.options)
    wait_for_scratch(root, "sequences.parquet", process)
    process.kill()
    process.communicate()
    assert not (root / NAME).exists()
    assert leftovers(root) != [], "nothing was under way"
    assert run_hstu(*PURE, "--data-root", root, *small.options).exit_code == 0
    assert leftovers(root) == []


def test_a_kill_between_the_two_renames_loses_nothing(small: Archive, root: Path, tmp_path: Path) -> None:
    """That moment is too short to be met: this is what it leaves. The next run fails, and still brings the old back."""
    before = prepared_bytes(root / NAME)
    (root / NAME).rename(root / f".{NAME}.old")
    (root / f".{NAME}.building" / "result").mkdir(parents=True)
    assert run_hstu(*PURE, "--data-root", root, "--archive", tmp_path / "nowhere").exit_code == 4
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


def interrupt(process: "subprocess.Popen[str]", number: int = signal.SIGINT) -> None:
    """Ctrl-C or SIGTERM, and what it must lead to."""
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in stderr, stderr[-2000:]
    assert process.returncode == 128 + number
    assert stdout == ""
    assert stderr == ("Terminated.\n" if number == signal.SIGTERM else "Interrupted.\n")


@pytest.mark.parametrize("options", [[], ["--drop-duplicates"]], ids=["plain", "drop-duplicates"])
@pytest.mark.parametrize(
    ("moment", "delay_s"),
    [(FIRST_LOG, 0.0), ("*duckdb.wal", 0.0), ("*duckdb.wal", 0.05), ("*duckdb.wal", 0.2), ("sequences.parquet", 0.02)],
)
def test_an_interrupt_leaves_the_old_result(
    moment: str, delay_s: float, options: list[str], large: Archive, root: Path
) -> None:
    """The delays reach into the database's work, where Ctrl-C is its to notice."""
    before = prepared_bytes(root / NAME)
    process = start_hstu(*PURE, "--data-root", root, *large.options, *options)
    wait_for_scratch(root, moment, process)
    time.sleep(delay_s)
    interrupt(process)
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


@pytest.mark.parametrize(("moment", "delay_s"), [(FIRST_LOG, 0.0), ("*duckdb.wal", 0.05), ("sequences.parquet", 0.02)])
def test_sigterm_leaves_the_old_result(moment: str, delay_s: float, large: Archive, root: Path) -> None:
    before = prepared_bytes(root / NAME)
    process = start_hstu(*PURE, "--data-root", root, *large.options)
    wait_for_scratch(root, moment, process)
    time.sleep(delay_s)
    interrupt(process, signal.SIGTERM)
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


def test_one_preparation_at_a_time(small: Archive, root: Path) -> None:
    """The first run waits for a server that stalls; the second one says so at once; then Ctrl-C ends the first."""
    before = prepared_bytes(root / NAME)
    download = (*PURE, "--data-root", root, "--md5", small.md5, "--base-url")
    with FileServer({ARCHIVE_PATH: small.path.read_bytes()}, stall_after=100) as server:
        first = start_hstu(*download, server.url)
        assert server.stalled.wait(PATIENCE_S)
        second = run_hstu(*PURE, "--data-root", root, *small.options)
        assert_refused(second, 1, str(root / NAME), "--data-root")
        other = run_hstu("preprocess", "kuairand", "--synthetic", "--users", 3, "--data-root", root)
        assert other.exit_code == 0, "another data set was locked as well"
        assert first.poll() is None
        interrupt(first)
        assert prepared_bytes(root / NAME) == before
        assert leftovers(root) == []

        server.faults.stall_after = None
        finished = run_hstu(*download, server.url)
        assert finished.exit_code == 0, finished.stderr
    assert prepared_bytes(root / NAME) != before
