"""Extraction from archives that are good, damaged or hostile: the expected files, or nothing but an InputError."""

import gzip
import random
import tarfile
from pathlib import Path

import pytest
from support.kuairand_files import Archive, archive_at, member, pack, pack_members, run_hstu

from hstu_cli.data.archive import extract
from hstu_cli.errors import InputError

LOG = "log.csv"
USERS = "users.csv"
WANTED = (LOG, USERS)
MAX_BYTES = 10_000_000
FILES = {
    LOG: "".join(f"{random.Random(i).randrange(10**9)},{i}\n" for i in range(3000)).encode(),
    USERS: b"user_id\n" + b"1\n" * 2000,
}


@pytest.fixture
def good(tmp_path: Path) -> Archive:
    return pack(tmp_path / "good.tar.gz", FILES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files go; a sibling shows whether anything got out."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    return inner


def extracted(archive: Archive, folder: Path, max_bytes: int = MAX_BYTES) -> dict[str, bytes]:
    found = extract(archive.path, WANTED, folder, max_bytes=max_bytes)
    return {name: path.read_bytes() for name, path in found.items()}


def test_good_archive(good: Archive, folder: Path) -> None:
    assert extracted(good, folder) == FILES
    assert sorted(path.name for path in folder.iterdir()) == sorted(WANTED)


def test_folders_in_the_archive_do_not_matter(tmp_path: Path, folder: Path) -> None:
    members = [member("a", kind=tarfile.DIRTYPE), member("a/b/log.csv", b"1"), member("./users.csv", b"2")]
    assert extracted(pack_members(tmp_path / "a.tar.gz", members), folder) == {LOG: b"1", USERS: b"2"}
    assert sorted(path.name for path in folder.iterdir()) == sorted(WANTED)


def test_other_files_are_passed_over_and_never_written(tmp_path: Path, folder: Path) -> None:
    others = {"LICENSE": b"text", "video_features.csv": b"x" * 5000, "log.csv.bak": b"1", "old_log.csv": b"2"}
    assert extracted(pack(tmp_path / "a.tar.gz", {**others, **FILES}), folder) == FILES
    assert sorted(path.name for path in folder.iterdir()) == sorted(WANTED)


def test_an_unreadable_mode_does_not_stick(tmp_path: Path, folder: Path) -> None:
    members = [member(name, content) for name, content in FILES.items()]
    for info, _ in members:
        info.mode = 0o4000  # set-user-id and nothing else
    found = extract(pack_members(tmp_path / "a.tar.gz", members).path, WANTED, folder, max_bytes=MAX_BYTES)
    for path in found.values():
        assert path.stat().st_mode & 0o7600 == 0o600


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.9, 0.99])
def test_truncated(good: Archive, folder: Path, share: float) -> None:
    data = good.path.read_bytes()
    good.path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"good\.tar\.gz is damaged"):
        extracted(good, folder)


@pytest.mark.parametrize("missing", [1, 4, 8])
def test_truncated_behind_the_last_file(good: Archive, folder: Path, missing: int) -> None:
    """The end of a .gz holds its checksum; without it nothing vouches for the files."""
    good.path.write_bytes(good.path.read_bytes()[:-missing])
    with pytest.raises(InputError):
        extracted(good, folder)


def test_a_flipped_bit_never_gets_through(good: Archive, tmp_path: Path) -> None:
    """gzip has a checksum, but tarfile alone stops reading before it comes to it."""
    data = good.path.read_bytes()
    generator = random.Random(0)
    for number, place in enumerate(range(10, len(data) - 8, len(data) // 100)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << generator.randrange(8)
        good.path.write_bytes(flipped)
        folder = tmp_path / f"flip{number}"
        folder.mkdir()
        try:
            found = extracted(good, folder)
        except InputError:
            continue
        assert found == FILES, f"a bit flipped in byte {place} of {len(data)} changed a file, and nobody noticed"


@pytest.mark.parametrize(
    "content", [b"", b"hello" * 100, b"\x1f\x8b", gzip.compress(b"no tar " * 500)], ids=["empty", "text", "head", "gz"]
)
def test_not_an_archive(tmp_path: Path, folder: Path, content: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar\.gz"):
        extracted(archive_at(path), folder)
    assert list(folder.iterdir()) == []


def test_not_compressed(good: Archive, folder: Path) -> None:
    good.path.write_bytes(gzip.decompress(good.path.read_bytes()))
    with pytest.raises(InputError, match=r"good\.tar\.gz"):
        extracted(good, folder)


HOSTILE = {
    "parent": member("../log.csv", b"1"),
    "deep parent": member("a/../../log.csv", b"1"),
    "parent of another file": member("../../etc/passwd", b"1"),
    "absolute": member("/tmp/log.csv", b"1"),
    "symlink": member("other", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "symlink named as an expected file": member("data/log.csv", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": member("other", kind=tarfile.LNKTYPE, link="data/log.csv"),
    "hard link named as an expected file": member("data/log.csv", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "character device": member("data/log.csv", kind=tarfile.CHRTYPE),
    "block device": member("null", kind=tarfile.BLKTYPE),
    "pipe": member("data/log.csv", kind=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_hostile_members_are_refused(tmp_path: Path, folder: Path, name: str, first: bool) -> None:
    info, content = HOSTILE[name]
    harmless = [member(f"data/{file}", text) for file, text in FILES.items() if not info.name.endswith(file)]
    members = [(info, content), *harmless] if first else [*harmless, (info, content)]
    archive = pack_members(tmp_path / "a.tar.gz", members)
    with pytest.raises(InputError, match="Refused") as raised:
        extracted(archive, folder)
    assert info.name in str(raised.value)
    assert [path.name for path in (tmp_path / "outer").iterdir()] == ["inner"]
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize("name", ["data/log.csv", "data/other.bin"])
@pytest.mark.parametrize("size", [10_000_000_000, 1 << 62])
def test_a_member_that_promises_too_much(tmp_path: Path, folder: Path, name: str, size: int) -> None:
    info, content = member(name, b"few bytes")
    info.size = size
    archive = pack_members(tmp_path / "bomb.tar.gz", [(info, content)])
    with pytest.raises(InputError, match="more than"):
        extracted(archive, folder, max_bytes=4_000_000_000)
    assert list(folder.iterdir()) == []


def test_many_members_that_are_too_much_together(tmp_path: Path, folder: Path) -> None:
    archive = pack(tmp_path / "bomb.tar.gz", {**{f"part{i}": bytes(100_000) for i in range(20)}, **FILES})
    with pytest.raises(InputError, match="more than"):
        extracted(archive, folder, max_bytes=1_000_000)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("size", [-512, -1024, -(1 << 40)])
def test_a_member_of_negative_size(tmp_path: Path, size: int) -> None:
    """Such a header leads tarfile (CVE-2025-8194) back to itself, for ever: hence the process and its limit."""
    info, _ = member("data/other.bin")
    info.size = size
    archive = pack_members(tmp_path / "loop.tar.gz", [member("data/first", bytes(1024)), (info, b"")])
    finished = run_hstu(
        "preprocess", "kuairand", "--dataset", "pure", "--data-root", tmp_path / "root", *archive.options, timeout_s=20
    )
    assert finished.exit_code == 4
    assert "loop.tar.gz" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_missing_file_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"a\.tar\.gz lacks users\.csv"):
        extracted(pack(tmp_path / "a.tar.gz", {LOG: b"1"}), folder)


def test_a_folder_is_no_file(tmp_path: Path, folder: Path) -> None:
    archive = pack_members(tmp_path / "a.tar.gz", [member("data/log.csv", kind=tarfile.DIRTYPE), member(USERS, b"1")])
    with pytest.raises(InputError, match=r"lacks log\.csv"):
        extracted(archive, folder)


def test_the_same_file_twice(tmp_path: Path, folder: Path) -> None:
    members = [member("a/log.csv", b"1"), member("users.csv", b"2"), member("b/log.csv", b"3")]
    with pytest.raises(InputError, match=r"log\.csv twice"):
        extracted(pack_members(tmp_path / "a.tar.gz", members), folder)
