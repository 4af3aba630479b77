"""Replaces a prepared data set in one step: a run that dies leaves the old one, or none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hstu_cli.data.layout import PREPARED_FILES, make_folder
from hstu_cli.errors import InputError, RunError

RESULT = "result"
"""The part of the scratch folder that is published."""


@contextmanager
def replaced_folder(root: Path, dataset: str) -> Iterator[Path]:
    """A scratch folder whose `result` becomes `root/dataset` when the block ends well.

    It vanishes in any case; after a kill, with the next run. One process at a time works on a data
    set: RunError while another one does, and where the disk is full. InputError where `root/dataset`
    is something that this program did not make.
    """
    make_folder(root)
    final, work, retired = root / dataset, root / f".{dataset}.building", root / f".{dataset}.old"
    with _locked(root / f".{dataset}.lock", final):
        try:
            _tidy(final, work, retired)
            if final.exists() and not (final.is_dir() and set(os.listdir(final)) <= set(PREPARED_FILES)):
                raise InputError(f"{final} is no prepared data set; move it away first.")
            (work / RESULT).mkdir(parents=True)
            yield work
            if final.exists():
                final.rename(retired)
            (work / RESULT).rename(final)
        except OSError as error:
            raise RunError(
                f"{final} could not be written: {error.strerror or error}. Nothing that was there has changed."
            ) from error
        finally:
            _tidy(final, work, retired)


def _tidy(final: Path, work: Path, retired: Path) -> None:
    """Remove what a run left, bringing back the old result where the new one did not take its place."""
    if retired.exists() and not final.exists():
        retired.rename(final)
    for leftover in (work, retired):
        if leftover.is_symlink():
            leftover.unlink()  # the data set was a link; what it led to is not ours to delete
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(path: Path, final: Path) -> Iterator[None]:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(f"Another process is preparing {final}. Wait for it, or choose another --data-root.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose another --data-root.") from error
    try:
        yield
    finally:
        lock.release()
