"""Prepares KuaiRand: fetch or take an archive, verify it, extract it, sort it, build the data set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_cli.data.archive import extract
from hstu_cli.data.database import ScratchDatabase
from hstu_cli.data.download import Progress, check_disk_space, download, file_md5
from hstu_cli.data.layout import DEFAULT_BASE_URL, RELEASES, KuaiRandRelease, make_folder
from hstu_cli.data.prepare import build_dataset
from hstu_cli.data.publish import replaced_folder
from hstu_cli.errors import InputError

WORK_FACTOR = 8
"""Free space that the work needs besides the archive, in archive sizes: CSV files unpack to about
four times, sorting and the result take less than two."""


@dataclass(frozen=True, slots=True)
class KuaiRandOptions:
    """How to prepare a release. `archive`: one on disk instead of the download; `md5`: its sum, or
    that of the file on another `base_url`, where it is not the official one.
    """

    archive: Path | None = None
    md5: str | None = None
    base_url: str = DEFAULT_BASE_URL
    offline: bool = False
    interval_ms: int = 300_000
    drop_duplicates: bool = False


def prepare_kuairand(
    dataset: str,
    root: Path,
    options: KuaiRandOptions,
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_download: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Prepare `root/dataset` and return its metadata.

    on_stage is called with a few words before each stage. Raises InputError for an archive or file
    that is missing or wrong, RunError for a lost connection, a full disk or a lock that is held.
    """
    release = RELEASES[dataset]
    with replaced_folder(root, dataset) as work:
        archive, md5 = _obtain(release, root, options, on_stage, on_download)
        check_disk_space(work, WORK_FACTOR * archive.stat().st_size)
        on_stage("extracting")
        files = extract(archive, [*release.log_files, release.user_file], work, max_bytes=release.max_unpacked_bytes)
        with ScratchDatabase(work) as database:
            on_stage("reading the logs")
            dropped = database.load_events(
                [files[name] for name in release.log_files], drop_duplicates=options.drop_duplicates
            )
            users = database.read_users(files[release.user_file])
            on_stage("building sequences and requests")
            metadata = build_dataset(
                work,
                database,
                users,
                interval_ms=options.interval_ms,
                dropped_rows={"exact_duplicate": dropped},
                provenance={
                    "dataset": dataset,
                    "source": {"kind": "archive", "name": archive.name, "official": md5 == release.md5},
                    "md5": md5,
                },
            )
    return metadata


def count_warnings(metadata: dict[str, Any]) -> list[str]:
    """Where the counts of an official archive differ from the published ones; nothing for any other."""
    release = RELEASES.get(metadata["dataset"])
    if release is None or metadata["md5"] != release.md5:
        return []
    published = {"num_rows_read": release.num_rows, "num_users_with_events": release.num_users}
    return [
        f"{name} is {metadata[name]:,}, but {release.archive} is published with {count:,}."
        for name, count in published.items()
        if metadata[name] != count
    ]


def _obtain(
    release: KuaiRandRelease,
    root: Path,
    options: KuaiRandOptions,
    on_stage: Callable[[str], None],
    on_download: Progress,
) -> tuple[Path, str]:
    """A verified archive on this machine, and its MD5."""
    expected = options.md5 or release.md5
    target = root / "downloads" / release.archive
    given = options.archive or (target if options.offline else None)
    if given is not None:
        on_stage("verifying the archive")
        if options.archive is None and not target.exists():
            raise InputError(f"--offline, but {target} does not exist. Put the archive there, or pass --archive PATH.")
        found = file_md5(given)
        if found != expected:
            raise InputError(
                f"{given} has MD5 {found}, expected {expected}. If it is an archive of your own, pass --md5 {found}."
            )
        return given, expected
    make_folder(target.parent)
    on_stage("downloading")
    url = f"{options.base_url.rstrip('/')}/{release.archive}"
    download(url, target, expected, on_progress=on_download, disk_factor=1 + WORK_FACTOR)
    return target, expected
