"""Downloads that resume, verify before they count, and say what to do when they fail."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import urllib3
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from hstu_cli.errors import InputError, RunError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0
RETRIES = 5
"""Attempts that may follow one another without a single new byte."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes so far and the total, None where the server does not tell it."""


def download(
    url: str,
    target: Path,
    md5: str,
    *,
    on_progress: Progress = lambda done, total: None,
    backoff_s: float = 1.0,
    disk_factor: float = 1.0,
) -> Path:
    """Fetch `url` to `target` and verify its MD5; a target that is there already is verified alone.

    Bytes collect in `<target>.incomplete`, which a later call continues. disk_factor: free space
    needed, as a multiple of the download's size. Raises InputError for a missing file or a wrong
    MD5, RunError where the connection keeps failing or the disk is too small.
    """
    if target.exists():
        if file_md5(target) == md5:
            return target
        target.unlink()  # damaged on disk; the server has a good one
    incomplete = target.with_name(target.name + ".incomplete")
    resumed = incomplete.exists() and incomplete.stat().st_size > 0
    _fetch(url, incomplete, on_progress, backoff_s, disk_factor)
    found = file_md5(incomplete)
    if found != md5 and resumed:  # begun from another version of the file: once more from the start
        incomplete.unlink()
        _fetch(url, incomplete, on_progress, backoff_s, disk_factor)
        found = file_md5(incomplete)
    if found != md5:
        incomplete.unlink()
        raise InputError(
            f"{url} has MD5 {found}, expected {md5}. The download was discarded: the file on the server is another one "
            "(name its own sum with --md5 if you trust it) or something between changed it."
        )
    incomplete.rename(target)
    return target


def file_md5(path: Path) -> str:
    """MD5 of a file in hexadecimal; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _fetch(url: str, incomplete: Path, on_progress: Progress, backoff_s: float, disk_factor: float) -> None:
    """Continue `incomplete` until the server has no more bytes, over as many connections as it takes."""
    failures = 0
    while True:
        before = _size(incomplete)
        try:
            _continue(url, incomplete, on_progress, disk_factor)
            return
        except (MissingSchema, InvalidSchema, InvalidURL) as error:
            raise InputError(f"{url} is no address to download from: {error}. Check --base-url.") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            have = _size(incomplete)
            failures = 1 if have > before else failures + 1
            if failures > RETRIES:
                kept = f" {have:,} bytes are kept in {incomplete}; the same command continues there." if have else ""
                raise RunError(
                    f"{url} could not be fetched: {_reason(error)}.{kept} Without a network, pass --archive PATH."
                ) from error
            time.sleep(min(backoff_s * 2 ** (failures - 1), 30.0))


def _continue(url: str, incomplete: Path, on_progress: Progress, disk_factor: float) -> None:
    """One connection: append what the server sends from the end of `incomplete` on."""
    have = _size(incomplete)
    # Content-Length must count the bytes of the file itself, so no compression on the way.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 416 and _total_of(response) == have:
            return
        if response.status_code == 416 or (response.status_code == 206 and _start_of(response) != have):
            incomplete.unlink(missing_ok=True)  # another version of the file: start over
            raise requests.ConnectionError("the server's file changed")
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise InputError(
                f"{url} answers {response.status_code} {response.reason}. Check --base-url, "
                "or fetch the archive yourself and pass --archive PATH."
            )
        response.raise_for_status()
        if response.status_code != 206:
            have = 0  # a server without Range sends the whole file again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        if total is not None:
            check_disk_space(incomplete.parent, int(disk_factor * total) - have)
        with incomplete.open("ab" if have else "wb") as file:
            on_progress(have, total)
            # read1 hands out what has come; larger reads would lose it when the connection ends.
            while chunk := response.raw.read1(CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                on_progress(have, total)
        if total is not None and have < total:
            raise requests.ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise RunError unless the file system of `folder` has room for this many more bytes."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise RunError(
            f"{folder} has {free / 1e9:.2f} GB free, but {needed_bytes / 1e9:.2f} GB are needed. "
            "Free some, or choose another --data-root."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _total_of(response: requests.Response) -> int | None:
    """The file's size in `Content-Range: bytes */N` or `bytes A-B/N`."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _start_of(response: requests.Response) -> int | None:
    """A in `Content-Range: bytes A-B/N`."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else None


def _reason(error: Exception) -> str:
    cause: Any = error
    while isinstance(getattr(cause, "reason", None), Exception):
        cause = cause.reason
    return str(cause.args[0] if cause.args and isinstance(cause.args[0], str) else cause) or type(cause).__name__
