"""Bad input to a preparation, each as a real run: an exit code, one clear message, and the old result intact."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest
from support.http_server import FileServer
from support.kuairand_files import (
    FIRST_DAY_MS,
    GOOD_FILES,
    LOG_COLUMNS,
    Archive,
    archive_at,
    assert_refused,
    leftovers,
    log_files,
    pack,
    prepared_bytes,
    run_hstu,
    user_file,
)

NAME = "kuairand-pure"
PURE = ("preprocess", "kuairand", "--dataset", "pure")
FIRST_LOG, SECOND_LOG = log_files("pure")
USERS = user_file("pure")
ARCHIVE_PATH = "/KuaiRand-Pure.tar.gz"


@pytest.fixture(scope="module")
def good_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a finished preparation, to be copied."""
    root = tmp_path_factory.mktemp("good") / "root"
    finished = run_hstu(*PURE, "--data-root", root, *pack(root.parent / "good.tar.gz", GOOD_FILES).options)
    assert finished.exit_code == 0, finished.stderr
    return root


@pytest.fixture
def root(good_result: Path, tmp_path: Path) -> Path:
    """A data root of this test's own, with an earlier good result in it."""
    return Path(shutil.copytree(good_result, tmp_path / "root"))


def edited(name: str, column: str, value: str, columns: tuple[str, ...] = LOG_COLUMNS) -> dict[str, bytes]:
    """A file with another value in one cell of its third row."""
    lines = [line.split(",") for line in GOOD_FILES[name].decode().splitlines()]
    lines[3][columns.index(column)] = value
    return {name: "\n".join(map(",".join, lines)).encode()}


def replaced(name: str, old: bytes, new: bytes, count: int = -1) -> dict[str, bytes]:
    assert old in GOOD_FILES[name]
    return {name: GOOD_FILES[name].replace(old, new, count)}


HEADER = ",".join(LOG_COLUMNS).encode()
MANY_USERS = GOOD_FILES[USERS] + b"".join(b"%d," % user + b"," * 29 + b"0\n" for user in range(6, 3006))
LINES = GOOD_FILES[FIRST_LOG].splitlines(keepends=True)
BAD_FILES = {
    "missing log column": (replaced(FIRST_LOG, b"is_like", b"liked"), (FIRST_LOG, "is_like")),
    "missing column of the second log": (replaced(SECOND_LOG, b"time_ms", b"time"), (SECOND_LOG, "time_ms")),
    "missing feature": (replaced(USERS, b"register_days_range", b"days"), (USERS, "register_days_range")),
    "a column twice": (replaced(FIRST_LOG, b"is_rand", b"is_like"), (FIRST_LOG, "is_like")),
    "a column twice in another case": (replaced(FIRST_LOG, b"is_rand", b"IS_LIKE"), (FIRST_LOG, "IS_LIKE")),
    "other separator": (replaced(FIRST_LOG, b",", b";"), (FIRST_LOG, "user_id")),
    "text in a number": (edited(FIRST_LOG, "video_id", "seven"), (FIRST_LOG, "line 4", "video_id", "seven")),
    "text in a time": (edited(SECOND_LOG, "time_ms", "2022-04-25"), (SECOND_LOG, "line 4", "time_ms")),
    "fraction in an id": (edited(FIRST_LOG, "user_id", "7.5"), (FIRST_LOG, "user_id", "7.5")),
    "small fraction in an id": (edited(FIRST_LOG, "user_id", "7.0001"), (FIRST_LOG, "user_id", "7.0001")),
    "negative id": (edited(FIRST_LOG, "video_id", "-1"), (FIRST_LOG, "video_id", "-1")),
    "id of 64 bits": (edited(FIRST_LOG, "video_id", str(2**63)), (FIRST_LOG, "video_id", str(2**63))),
    "id of 30 digits": (edited(FIRST_LOG, "user_id", "9" * 30), (FIRST_LOG, "user_id")),
    "id of 100,000 digits": (edited(FIRST_LOG, "user_id", "9" * 100_000), (FIRST_LOG, "user_id")),
    "negative time": (edited(FIRST_LOG, "time_ms", "-5"), (FIRST_LOG, "time_ms", "-5")),
    "time in microseconds": (edited(FIRST_LOG, "time_ms", f"{FIRST_DAY_MS}000"), (FIRST_LOG, "time_ms")),
    "signal 2": (edited(FIRST_LOG, "is_follow", "2"), (FIRST_LOG, "is_follow", "2")),
    "signal 0.0001": (edited(FIRST_LOG, "is_follow", "0.0001"), (FIRST_LOG, "is_follow")),
    "signal true": (edited(FIRST_LOG, "is_hate", "true"), (FIRST_LOG, "line 4", "is_hate", "true")),
    "no signal": (edited(FIRST_LOG, "long_view", ""), (FIRST_LOG, "long_view")),
    "no user": (edited(FIRST_LOG, "user_id", ""), (FIRST_LOG, "user_id")),
    "no time": (edited(SECOND_LOG, "time_ms", ""), (SECOND_LOG, "time_ms")),
    "features of nobody": (replaced(USERS, b"\n3,", b"\n,"), (USERS, "user_id")),
    "features of text": (replaced(USERS, b"\n3,", b"\nx3,"), (USERS, "line 5", "user_id", "x3")),
    "features of a user twice": (replaced(USERS, b"\n3,", b"\n2,"), (USERS, "user 2")),
    "empty log": ({SECOND_LOG: b""}, (SECOND_LOG, "empty")),
    "empty features": ({USERS: b""}, (USERS, "empty")),
    "headers only": ({FIRST_LOG: HEADER + b"\n", SECOND_LOG: HEADER}, ("no events",)),
    "short row": ({FIRST_LOG: b"".join([*LINES[:5], b"1,2,3\n", *LINES[5:]])}, (FIRST_LOG, "line 6")),
    "long row": ({FIRST_LOG: GOOD_FILES[FIRST_LOG][:-1] + b",1\n"}, (FIRST_LOG, "line 13")),
    "last row cut off": ({FIRST_LOG: GOOD_FILES[FIRST_LOG][:-20]}, (FIRST_LOG, "line 13")),
    "open quote": ({USERS: GOOD_FILES[USERS] + b'9,"full_active,1\n'}, (USERS,)),
    "LF, then CRLF": (
        {FIRST_LOG: b"".join([*LINES[:6], *(x[:-1] + b"\r\n" for x in LINES[6:])])},
        (FIRST_LOG, "line end"),
    ),
    "CRLF, then LF": (
        {FIRST_LOG: b"".join([*(x[:-1] + b"\r\n" for x in LINES[:6]), *LINES[6:]])},
        (FIRST_LOG, "line end"),
    ),
    "latin-1": (replaced(USERS, b"full_active", b"caf\xe9", 1), (USERS,)),
    "latin-1 far behind the header": ({USERS: MANY_USERS + b"9999," + b"caf\xe9," * 30 + b"\n"}, (USERS, "line 3008")),
    "UTF-16": ({FIRST_LOG: GOOD_FILES[FIRST_LOG].decode().encode("utf-16")}, (FIRST_LOG,)),
    "noise": ({FIRST_LOG: random.Random(0).randbytes(300_000)}, (FIRST_LOG,)),
    "one long line": ({FIRST_LOG: b"x" * 300_000}, (FIRST_LOG,)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_a_reason(name: str, root: Path, tmp_path: Path) -> None:
    files, fragments = BAD_FILES[name]
    before = prepared_bytes(root / NAME)
    archive = pack(tmp_path / "bad.tar.gz", {**GOOD_FILES, **files})
    assert_refused(run_hstu(*PURE, "--data-root", root, *archive.options), 4, *fragments)
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


HARMLESS_FILES = {
    "BOM": {name: b"\xef\xbb\xbf" + content for name, content in GOOD_FILES.items()},
    "CRLF": {name: content.replace(b"\n", b"\r\n") for name, content in GOOD_FILES.items()},
    "no line end at the end": {name: content.rstrip(b"\n") for name, content in GOOD_FILES.items()},
    "quoted numbers": {FIRST_LOG: GOOD_FILES[FIRST_LOG].replace(b"\n1,", b'\n"1",')},
    "rubbish in a column that is not used": edited(FIRST_LOG, "duration_ms", "caf\u00e9"),
}


@pytest.mark.parametrize("name", HARMLESS_FILES)
def test_harmless_variants_change_nothing(name: str, root: Path, tmp_path: Path) -> None:
    before = prepared_bytes(root / NAME)
    archive = pack(tmp_path / "variant.tar.gz", {**GOOD_FILES, **HARMLESS_FILES[name]})
    finished = run_hstu(*PURE, "--data-root", root, *archive.options)
    assert finished.exit_code == 0, finished.stderr
    after = prepared_bytes(root / NAME)
    assert before.pop("metadata.json") != after.pop("metadata.json"), "it was not prepared again"
    assert after == before


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return pack(tmp_path / "archive.tar.gz", GOOD_FILES)


WRONG_COMMANDS = {
    "no data set": ([], "--dataset"),
    "unknown data set": (["--dataset", "pures"], "kuairand-27k"),
    "synthetic with archive": (["--synthetic", "--archive", "a.tar.gz"], "--archive"),
    "synthetic and another": (["--synthetic", "--dataset", "pure"], "--synthetic"),
    "archive and offline": (["--dataset", "pure", "--archive", "a.tar.gz", "--offline"], "--offline"),
    "no interval": (["--dataset", "pure", "--time-interval-s", "0"], "--time-interval-s"),
    "negative interval": (["--dataset", "pure", "--time-interval-s", "-5"], "--time-interval-s"),
    "no users": (["--synthetic", "--users", "0"], "--users"),
    "unknown shape": (["--synthetic", "--shape", "27k"], "--shape"),
    "unknown option": (["--dataset", "pure", "--sorted"], "--sorted"),
}


@pytest.mark.parametrize("name", WRONG_COMMANDS)
def test_wrong_commands_do_nothing(name: str, tmp_path: Path) -> None:
    arguments, fragment = WRONG_COMMANDS[name]
    finished = run_hstu("preprocess", "kuairand", "--data-root", tmp_path / "root", *arguments)
    assert finished.exit_code == 2
    assert finished.stdout == ""
    assert fragment in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "root").exists()


def test_spellings_of_earlier_tools_are_accepted(archive: Archive, tmp_path: Path) -> None:
    files = {name.replace("_pure.csv", "_1k.csv"): content for name, content in GOOD_FILES.items()}
    archive = pack(archive.path, files)
    root = tmp_path / "tmp_data"
    spelling = ("--dataset_name", "KuaiRand-1K", "--data_root", root, "--time_interval_s", "60", "--drop_duplicates")
    finished = run_hstu("preprocess", "kuairand", *spelling, *archive.options)
    assert finished.exit_code == 0, finished.stderr
    assert (root / "kuairand-1k" / "metadata.json").exists()


def test_a_wrong_sum_is_refused_and_told(archive: Archive, root: Path) -> None:
    before = prepared_bytes(root / NAME)
    arguments = (*PURE, "--data-root", root, "--archive", archive.path)
    assert_refused(run_hstu(*arguments, "--md5", "0" * 32), 4, archive.md5, "0" * 32)
    assert_refused(run_hstu(*arguments), 4, "0820331067a3784d9691136f772b35a7", f"--md5 {archive.md5}")
    assert prepared_bytes(root / NAME) == before


def test_archives_that_are_none(root: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.tar.gz"
    text.write_text("user_id,video_id\n1,2\n")
    arguments = (*PURE, "--data-root", root)
    before = prepared_bytes(root / NAME)
    assert_refused(run_hstu(*arguments, "--archive", tmp_path / "nowhere.tar.gz"), 4, "nowhere.tar.gz")
    assert_refused(run_hstu(*arguments, "--archive", tmp_path), 4, str(tmp_path))
    assert_refused(run_hstu(*arguments, *archive_at(text).options), 4, "text.tar.gz")
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


def test_offline_without_a_download(root: Path) -> None:
    finished = run_hstu(*PURE, "--data-root", root, "--offline")
    assert_refused(finished, 4, "--offline", "KuaiRand-Pure.tar.gz", "--archive")


def test_offline_with_a_damaged_download(archive: Archive, root: Path) -> None:
    """Offline is offline: no request, and what may be the user's only copy stays."""
    download = root / "downloads" / "KuaiRand-Pure.tar.gz"
    download.parent.mkdir()
    download.write_bytes(b"damaged")
    with FileServer({ARCHIVE_PATH: archive.path.read_bytes()}) as server:
        options = ("--offline", "--base-url", server.url, "--md5", archive.md5)
        finished = run_hstu(*PURE, "--data-root", root, *options)
    assert server.requests == []
    assert_refused(finished, 4, str(download), archive.md5, hashlib.md5(b"damaged").hexdigest())
    assert download.read_bytes() == b"damaged"


def test_a_download_is_kept_and_serves_offline(archive: Archive, tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    with FileServer({ARCHIVE_PATH: archive.path.read_bytes()}) as server:
        finished = run_hstu(*PURE, "--data-root", root, "--md5", archive.md5.upper(), "--base-url", server.url + "/")
        assert finished.exit_code == 0, finished.stderr
        assert finished.stderr == "", "no bar where stderr is no terminal"
    assert run_hstu(*PURE, "--data-root", root, "--md5", archive.md5, "--offline").exit_code == 0
    assert len(server.requests) == 1
    assert leftovers(root) == []


def test_a_server_without_the_archive(root: Path) -> None:
    before = prepared_bytes(root / NAME)
    with FileServer({}) as server:
        finished = run_hstu(*PURE, "--data-root", root, "--base-url", server.url)
    assert_refused(finished, 4, server.url, "404", "--archive")
    assert prepared_bytes(root / NAME) == before
    assert leftovers(root) == []


def test_data_roots_that_cannot_be_made(archive: Archive, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for root in (file, file / "below", Path("/proc/hstu")):
        assert_refused(run_hstu(*PURE, "--data-root", root, *archive.options), 4, str(root), "--data-root")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("content", [{"notes.txt": b"mine"}, {"metadata.json": b"{}", "more.parquet": b""}, None])
def test_what_is_not_ours_is_not_touched(content: dict[str, bytes] | None, archive: Archive, tmp_path: Path) -> None:
    """A folder with foreign files, or a file, where the data set would go."""
    place = tmp_path / "root" / NAME
    place.parent.mkdir()
    if content is None:
        place.write_bytes(b"mine")
    else:
        place.mkdir()
        for name, data in content.items():
            (place / name).write_bytes(data)
    assert_refused(run_hstu(*PURE, "--data-root", place.parent, *archive.options), 4, str(place))
    assert (place.read_bytes() == b"mine") if content is None else (prepared_bytes(place) == content)
    assert leftovers(place.parent) == []


def test_a_linked_data_set_can_be_prepared_again(archive: Archive, root: Path, tmp_path: Path) -> None:
    """The data set's folder is a link to another disk; each run leaves the next one a clean place."""
    (root / NAME).rename(tmp_path / "elsewhere")
    (root / NAME).symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        finished = run_hstu(*PURE, "--data-root", root, *archive.options)
        assert finished.exit_code == 0, finished.stderr
        assert (root / NAME / "metadata.json").exists()
        assert leftovers(root) == []


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--md5", "zz"), "--md5"),
        (("--users", "5"), "--synthetic"),
        (("--shape", "1k"), "--synthetic"),
        (("--seed", "1"), "--synthetic"),
    ],
)
def test_options_that_do_not_go_with_real_files(arguments: tuple[str, str], fragment: str, root: Path) -> None:
    assert_refused(run_hstu(*PURE, "--data-root", root, *arguments), 2, fragment)
