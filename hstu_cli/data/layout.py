"""Where prepared data lives, and what the KuaiRand archives hold."""

import os
from dataclasses import dataclass
from pathlib import Path

from hstu_cli.errors import InputError, UsageError

SCHEMA_VERSION = 1
SYNTHETIC = "synthetic"

SEQUENCES_FILE = "sequences.parquet"
USERS_FILE = "users.parquet"
REQUESTS_FILE = "requests.parquet"
METADATA_FILE = "metadata.json"
PREPARED_FILES = (SEQUENCES_FILE, USERS_FILE, REQUESTS_FILE, METADATA_FILE)

DEFAULT_BASE_URL = "https://zenodo.org/records/10439422/files"

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class KuaiRandRelease:
    """One published archive: its files, its MD5, the counts of its standard logs, and a size bound.

    `max_unpacked_bytes` is well above what the archive holds; more is a damaged or hostile file.
    """

    dataset: str
    archive: str
    md5: str
    log_files: tuple[str, ...]
    user_file: str
    num_users: int
    num_rows: int
    max_unpacked_bytes: int


def _release(
    name: str, md5: str, num_users: int, num_rows: int, max_unpacked_bytes: int, parts: tuple[str, ...] = ("",)
) -> KuaiRandRelease:
    suffix = name.lower()
    return KuaiRandRelease(
        dataset=f"kuairand-{suffix}",
        archive=f"KuaiRand-{name}.tar.gz",
        md5=md5,
        log_files=tuple(
            f"log_standard_{period}_{suffix}{part}.csv"
            for period in ("4_08_to_4_21", "4_22_to_5_08")  # the order decides ties in time
            for part in parts
        ),
        user_file=f"user_features_{suffix}.csv",
        num_users=num_users,
        num_rows=num_rows,
        max_unpacked_bytes=max_unpacked_bytes,
    )


RELEASES: dict[str, KuaiRandRelease] = {
    release.dataset: release
    for release in (
        _release("Pure", "0820331067a3784d9691136f772b35a7", 27_077, 1_436_609, 4 * GIB),
        _release("1K", "6b0b9c8222d67fcd4c676218edca3f1f", 1_000, 11_713_045, 32 * GIB),
        _release("27K", "3e3c799a24e2d23a4d2c757fbf9adf59", 27_285, 322_278_385, 256 * GIB, ("_part1", "_part2")),
    )
}

DATASETS = (*RELEASES, SYNTHETIC)


def dataset_name(text: str) -> str:
    """The data set that a user means: `KuaiRand-1K`, `kuairand_1k` and `1k` are one. UsageError if unknown."""
    name = text.strip().lower().replace("_", "-")
    for candidate in (name, f"kuairand-{name}"):
        if candidate in DATASETS:
            return candidate
    raise UsageError(f"There is no data set {text!r}; choose from {', '.join(DATASETS)} (short: pure, 1k, 27k).")


def data_root(option: Path | None) -> Path:
    """The folder that holds prepared data sets, by option, `$HSTU_HOME`, ./tmp_data or the user's cache."""
    if option is not None:
        return option.expanduser()
    if home := os.environ.get("HSTU_HOME"):
        return Path(home).expanduser()
    if prepared_datasets(Path("tmp_data")):
        return Path("tmp_data")
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hstu"


def prepared_datasets(root: Path) -> list[str]:
    """Names of the data sets under `root` that have a metadata file."""
    # os.path.exists, because Path.exists raises where the folder may not be read.
    return [name for name in DATASETS if os.path.exists(root / name / METADATA_FILE)]  # noqa: PTH110


def prepare_command(dataset: str, root: Path | None = None) -> str:
    """The command line that prepares a data set, for messages."""
    source = "--synthetic" if dataset == SYNTHETIC else f"--dataset {dataset}"
    return f"hstu preprocess kuairand {source}" + (f" --data-root {root}" if root else "")


def make_folder(folder: Path) -> Path:
    """Create a folder that this program writes to; InputError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be made: {error.strerror}. Choose another --data-root."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"The folder {folder} is not writable. Choose another --data-root.")
    return folder
