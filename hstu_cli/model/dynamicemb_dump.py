"""DynamicEmb's dumps: the raw ids of a table and their embeddings, as flat files of one rank each.

`<table>_emb_keys.rank_<r>.world_size_<w>` holds little-endian int64, `<table>_emb_values…` float32
[keys, dim]. Nothing of DynamicEmb is needed to read or write them.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hstu_cli.errors import InputError

_FILE = re.compile(r"(?P<table>.+)_emb_(?P<kind>keys|values)\.rank_(?P<rank>\d+)\.world_size_(?P<world>\d+)")
_IGNORED = re.compile(r".+_emb_scores.*|.+_opt_values.*|.+_counter_.*|.+_opt_args\.json")

KEY_BYTES, VALUE_BYTES = 8, 4


@dataclass(frozen=True, slots=True)
class RankFiles:
    """What one rank wrote of a table."""

    keys: Path
    values: Path


def find_dumps(folder: Path) -> tuple[dict[str, list[RankFiles]], int]:
    """The files of each table, rank by rank, and how many files there are that no inference needs.

    Raises InputError where a rank lacks a file, world sizes differ, or a file is none of DynamicEmb's.
    """
    found: dict[str, dict[tuple[int, str], Path]] = {}
    worlds: dict[int, Path] = {}
    ignored = 0
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match is None:
            if not _IGNORED.fullmatch(path.name):
                raise InputError(f"{path} is no file of a DynamicEmb dump.")
            ignored += 1
            continue
        worlds.setdefault(int(match["world"]), path)
        found.setdefault(match["table"], {})[int(match["rank"]), match["kind"]] = path
    if len(worlds) > 1:
        names = " and ".join(path.name for path in worlds.values())
        raise InputError(f"{folder} mixes dumps of different world sizes: {names}.")
    world = next(iter(worlds), 0)
    tables = {}
    for table, files in found.items():
        expected = [(rank, kind) for rank in range(world) for kind in ("keys", "values")]
        missing = [
            f"{table}_emb_{kind}.rank_{rank}.world_size_{world}" for rank, kind in expected if (rank, kind) not in files
        ]
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}.")
        extra = sorted(str(files[key]) for key in files.keys() - set(expected))
        if extra:
            raise InputError(f"{extra[0]}: its rank is not below its world size {world}.")
        tables[table] = [RankFiles(files[rank, "keys"], files[rank, "values"]) for rank in range(world)]
    return tables, ignored


def write_table(folder: Path, table: str, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write keys int64 [rows] and embeddings [rows, dim] as the dump of a single rank; OSError where that fails.

    Each key has score 1: a table that keeps scores does not load without.
    """
    of_rank = "rank_0.world_size_1"
    keys.cpu().numpy().astype("<i8").tofile(folder / f"{table}_emb_keys.{of_rank}")
    values.float().cpu().numpy().astype("<f4").tofile(folder / f"{table}_emb_values.{of_rank}")
    np.ones(len(keys), "<u8").tofile(folder / f"{table}_emb_scores.{of_rank}")
    (folder / f"{table}_opt_args.json").write_text("{}\n", encoding="utf-8")


def read_table(ranks: Sequence[RankFiles], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings float32 [rows, dim] and their keys int64 [rows], rank after rank.

    The embeddings are mapped from disk, those of several ranks from one scratch file, so that a
    table beyond memory can be read. Raises InputError for files that are cut off or disagree in
    length, and for a key that stands twice.
    """
    keys = []
    for rank in ranks:
        key_bytes, value_bytes = rank.keys.stat().st_size, rank.values.stat().st_size
        if key_bytes % KEY_BYTES:
            raise InputError(f"{rank.keys} is cut off: {key_bytes:,} bytes are no whole number of int64 keys.")
        count = key_bytes // KEY_BYTES
        if value_bytes != count * dim * VALUE_BYTES:
            raise InputError(
                f"{rank.values} holds {value_bytes:,} bytes, but {count:,} keys of {dim} float32 are "
                f"{count * dim * VALUE_BYTES:,}: it is cut off, or of another width."
            )
        keys.append(np.fromfile(rank.keys, "<i8"))
    all_keys = np.concatenate(keys) if keys else np.empty(0, np.int64)
    _refuse_repeated(ranks, keys, all_keys)
    return _mapped_values(ranks, [len(part) for part in keys], dim), torch.from_numpy(all_keys)


def _refuse_repeated(ranks: Sequence[RankFiles], keys: Sequence[np.ndarray], all_keys: np.ndarray) -> None:
    """InputError naming the first key that stands twice, and where."""
    ordered = np.sort(all_keys)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        places = [rank.keys.name for rank, part in zip(ranks, keys, strict=True) if (part == repeated[0]).any()]
        raise InputError(f"Key {repeated[0]} stands twice, in {' and '.join(places)} of {ranks[0].keys.parent}.")


def _mapped_values(ranks: Sequence[RankFiles], counts: Sequence[int], dim: int) -> torch.Tensor:
    """The values of all ranks, float32 [rows, dim], mapped from disk and writable without changing a file of theirs."""
    filled = [(rank, count) for rank, count in zip(ranks, counts, strict=True) if count]
    if not filled:
        return torch.empty(0, dim)
    if len(filled) == 1:
        rank, count = filled[0]
        return torch.from_numpy(np.memmap(rank.values, "<f4", mode="c", shape=(count, dim)))
    with tempfile.TemporaryFile() as scratch:  # its name is gone at once, its bytes when the last map is
        size = sum(counts) * dim * VALUE_BYTES
        try:
            os.posix_fallocate(scratch.fileno(), 0, size)  # a full disk is an error here, and a crash in a map
        except OSError as error:
            raise InputError(
                f"The values of several ranks need {size:,} bytes of scratch space in {tempfile.gettempdir()}: "
                f"{error.strerror}. Set TMPDIR to a folder with room."
            ) from error
        whole = np.memmap(scratch, "<f4", mode="w+", shape=(sum(counts), dim))
        start = 0
        for rank, count in filled:
            whole[start : start + count] = np.memmap(rank.values, "<f4", mode="r", shape=(count, dim))
            start += count
        return torch.from_numpy(whole)
