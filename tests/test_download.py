"""Downloads against a real server that drops, stalls, lies and fails: resumed, verified, or one clear error."""

import hashlib
import random
from pathlib import Path

import pytest
from support.http_server import FileServer

from hstu_cli.data import download as download_module
from hstu_cli.data.download import check_disk_space, download
from hstu_cli.errors import InputError, RunError

CONTENT = random.Random(0).randbytes(3_500_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
OTHER_CONTENT = random.Random(1).randbytes(3_000_000)
PATH = "/KuaiRand-Pure.tar.gz"
TINY_BACKOFF_S = 0.001


def fetch(server: FileServer, target: Path, md5: str = MD5, **options: object) -> Path:
    return download(server.url + PATH, target, md5, **{"backoff_s": TINY_BACKOFF_S, **options})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "archive.tar.gz"


@pytest.fixture
def incomplete(target: Path) -> Path:
    return target.with_name(target.name + ".incomplete")


def test_plain_download_is_one_request_and_tells_its_progress(target: Path, incomplete: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    with FileServer({PATH: CONTENT}) as server:
        assert fetch(server, target, on_progress=lambda done, total: seen.append((done, total))) == target
    assert target.read_bytes() == CONTENT
    assert not incomplete.exists()
    assert server.ranges == [None]
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_verified_target_needs_no_request(target: Path) -> None:
    target.write_bytes(CONTENT)
    with FileServer({PATH: CONTENT}) as server:
        fetch(server, target)
    assert server.requests == []


def test_a_dropped_connection_is_continued_where_it_ended(target: Path) -> None:
    seen: list[int] = []
    with FileServer({PATH: CONTENT}, drop_after=2_500_000, drops=1) as server:
        fetch(server, target, on_progress=lambda done, total: seen.append(done))
    assert target.read_bytes() == CONTENT
    assert seen == sorted(seen), "the second connection began before the end of the first"
    first, second = server.ranges
    assert first is None
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert start in seen, "the rest begins where the first connection's bytes end"
    assert 1_250_000 < start <= 2_500_000, "most of what had come was kept"


def test_many_short_connections_get_there(target: Path) -> None:
    """Each connection brings some bytes, so each makes progress, however short it is."""
    with FileServer({PATH: CONTENT[:700_000]}, drop_after=100_000) as server:
        fetch(server, target, md5=hashlib.md5(CONTENT[:700_000]).hexdigest())
    assert target.read_bytes() == CONTENT[:700_000]
    starts = [int(value.removeprefix("bytes=").removesuffix("-")) for value in server.ranges[1:]]
    assert starts == sorted(set(starts))


def test_an_earlier_incomplete_file_is_continued(target: Path, incomplete: Path) -> None:
    incomplete.write_bytes(CONTENT[:1_234_567])
    with FileServer({PATH: CONTENT}) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1234567-"]


def test_a_server_without_range_sends_the_whole_file_again(target: Path, incomplete: Path) -> None:
    incomplete.write_bytes(CONTENT[:1_234_567])
    with FileServer({PATH: CONTENT}, ignore_range=True, drop_after=3_000_000, drops=1) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_an_incomplete_file_that_is_whole_already_is_taken(target: Path, incomplete: Path) -> None:
    """The server answers 416: there is nothing behind the last byte."""
    incomplete.write_bytes(CONTENT)
    with FileServer({PATH: CONTENT}) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_an_incomplete_file_that_is_too_long_is_begun_anew(target: Path, incomplete: Path) -> None:
    incomplete.write_bytes(OTHER_CONTENT + CONTENT)
    with FileServer({PATH: CONTENT}) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(OTHER_CONTENT + CONTENT)}-", None]


def test_an_incomplete_file_of_another_version_is_begun_anew(target: Path, incomplete: Path) -> None:
    incomplete.write_bytes(OTHER_CONTENT)
    with FileServer({PATH: CONTENT}) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(OTHER_CONTENT)}-", None]
    assert not incomplete.exists()


def test_a_damaged_target_is_fetched_again(target: Path) -> None:
    target.write_bytes(CONTENT[:-1] + b"x")
    with FileServer({PATH: CONTENT}) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None]


def test_no_content_length(target: Path) -> None:
    totals: set[int | None] = set()
    with FileServer({PATH: CONTENT}, send_length=False) as server:
        fetch(server, target, on_progress=lambda done, total: totals.add(total))
    assert target.read_bytes() == CONTENT
    assert totals == {None}


def test_an_empty_file(target: Path) -> None:
    with FileServer({PATH: b""}) as server:
        fetch(server, target, md5=hashlib.md5(b"").hexdigest())
    assert target.read_bytes() == b""


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_missing_file_fails_at_once(status: int, target: Path, incomplete: Path) -> None:
    with FileServer({PATH: CONTENT}, statuses=[status]) as server, pytest.raises(InputError, match=f"{status}"):
        fetch(server, target)
    assert len(server.requests) == 1
    assert not target.exists()
    assert not incomplete.exists()


def test_a_server_in_trouble_is_asked_again(target: Path) -> None:
    with FileServer({PATH: CONTENT}, statuses=[500, 503, 429, 408]) as server:
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 5


def test_a_server_that_stays_in_trouble_is_an_error(target: Path) -> None:
    with FileServer({PATH: CONTENT}, statuses=[500] * 100) as server, pytest.raises(RunError, match="500"):
        fetch(server, target)
    assert 2 <= len(server.requests) < 100
    assert list(target.parent.iterdir()) == []


def test_what_came_is_kept_and_named_where_the_rest_never_comes(target: Path, incomplete: Path) -> None:
    """After the first bytes, every connection ends at once."""
    with FileServer({PATH: CONTENT}, drop_after=2_500_000) as server:

        def cut_the_next_ones_at_once(done: int, total: int | None) -> None:
            server.faults.drop_after = 0

        with pytest.raises(RunError) as raised:
            fetch(server, target, on_progress=cut_the_next_ones_at_once)
        kept = incomplete.stat().st_size
        assert 1_250_000 < kept <= 2_500_000
        assert str(incomplete) in str(raised.value)
        assert f"{kept:,} bytes" in str(raised.value)
        assert not target.exists()

        server.faults.drop_after = None
        fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={kept}-"


def test_nothing_is_said_to_be_kept_where_nothing_came(target: Path, incomplete: Path) -> None:
    with FileServer({PATH: CONTENT}, statuses=[500] * 100) as server, pytest.raises(RunError) as raised:
        fetch(server, target)
    assert not incomplete.exists()
    assert str(incomplete) not in str(raised.value), "the message names a file that does not exist"


def test_a_stalled_server_is_left_and_asked_for_the_rest(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT_S", 0.3)
    with FileServer({PATH: CONTENT}, stall_after=2_500_000) as server:

        def stall_only_once(done: int, total: int | None) -> None:
            server.faults.stall_after = None

        fetch(server, target, on_progress=stall_only_once)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 2
    assert server.ranges[1] is not None


def test_nobody_listens(target: Path) -> None:
    with FileServer({}) as server:
        url = server.url  # its port is free again once the server is gone
    with pytest.raises(RunError, match="could not be fetched"):
        download(url + PATH, target, MD5, backoff_s=TINY_BACKOFF_S)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("url", ["zenodo.org/records", "ftp://example.org/a.tar.gz", "http://"])
def test_an_address_that_is_none_fails_at_once(url: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No retry helps against a mistyped --base-url: it is the user's, not the network's, mistake."""
    waits: list[float] = []
    monkeypatch.setattr(download_module.time, "sleep", waits.append)
    with pytest.raises(InputError):
        download(url, target, MD5)
    assert waits == []


def test_a_wrong_sum_leaves_nothing(target: Path) -> None:
    with FileServer({PATH: OTHER_CONTENT}) as server, pytest.raises(InputError, match=MD5) as raised:
        fetch(server, target)
    assert hashlib.md5(OTHER_CONTENT).hexdigest() in str(raised.value)
    assert list(target.parent.iterdir()) == []
    assert len(server.requests) == 1


def test_a_wrong_sum_after_a_resume_leaves_nothing(target: Path, incomplete: Path) -> None:
    incomplete.write_bytes(CONTENT[:1_000_000])
    with FileServer({PATH: OTHER_CONTENT}) as server, pytest.raises(InputError, match=MD5):
        fetch(server, target)
    assert list(target.parent.iterdir()) == []
    assert server.ranges == ["bytes=1000000-", None], "one try with the rest, one from the start"


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(target: Path) -> None:
    with FileServer({PATH: CONTENT}) as server, pytest.raises(RunError, match="GB free"):
        fetch(server, target, disk_factor=1e12)
    assert not target.exists()
    assert sum(file.stat().st_size for file in target.parent.iterdir()) == 0


def test_disk_space_is_judged_by_the_folder(tmp_path: Path) -> None:
    check_disk_space(tmp_path, 1)
    with pytest.raises(RunError, match=str(tmp_path)):
        check_disk_space(tmp_path, 1 << 60)
