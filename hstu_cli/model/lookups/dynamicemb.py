"""Looks embeddings up in DynamicEmb's hash tables on an NVIDIA GPU, filled with copies of the model's tables.

Written against the interface that DynamicEmb documents; it has not been run on a GPU yet.
"""

import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path

import torch
from dynamicemb import (
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbPoolingMode,
    DynamicEmbScoreStrategy,
    DynamicEmbTableOptions,
)
from dynamicemb.batched_dynamicemb_tables import BatchedDynamicEmbeddingTablesV2
from torch import nn

from hstu_cli.errors import RunError
from hstu_cli.model.dynamicemb_dump import write_table
from hstu_cli.model.embedding import DEFAULT_KEY, EmbeddingTable
from hstu_cli.model.identity import WeightsIdentity

# Shapes: n ids of one table, N ids of all tables, D width.

BUCKET_ROWS = 128
"""Rows of a hash bucket, DynamicEmb's default. A key may stand in one bucket only."""

CHECKED_ROWS = 1 << 16
"""Rows that are compared at a time after the tables were filled."""


class DynamicEmbLookup:
    """One BatchedDynamicEmbeddingTablesV2 over all tables, in evaluation mode: it never inserts or evicts.

    It holds copies, made again whenever the model's weights have changed, and every row of them is
    compared with its original before use: RunError where one is missing. Negative ids, which a hash
    table keeps for itself, and unknown ids take the model's default row or the zero vector.
    """

    def __init__(self, tables: nn.ModuleDict) -> None:
        self.tables = tables
        self._identity = WeightsIdentity(tables)
        self._filled_with: bytes | None = None
        self._module: BatchedDynamicEmbeddingTablesV2 | None = None

    def __call__(self, ids: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Lookup`."""
        identity = self._identity.current()
        if identity != self._filled_with:
            self._fill()
            self._filled_with = identity
        found = self._find({name: ids[name] for name in self.tables})
        return {name: _with_default(table, ids[name], found[name]) for name, table in self.tables.items()}

    def _find(self, ids: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Embeddings [n, D] of ids in every table's hash table; zeros where one is not there or negative."""
        lengths = [len(of_table) for of_table in ids.values()]
        first = next(iter(self.tables.values())).weight
        if not sum(lengths):
            return {name: first.new_zeros(0, first.shape[1]) for name in ids}
        keys = torch.cat(list(ids.values()))  # [N]
        offsets = torch.tensor(list(accumulate(lengths, initial=0)), device=keys.device)
        found = self._module(keys.clamp(min=0), offsets) * (keys >= 0)[:, None]  # [N, D]
        return dict(zip(ids, found.split(lengths), strict=True))

    @torch.no_grad()
    def _fill(self) -> None:
        """Make hash tables with the rows of the tables as they are now."""
        first = next(iter(self.tables.values())).weight
        with redirect_stdout(sys.stderr):  # it prints what it does, and stdout is for the result
            self._module = BatchedDynamicEmbeddingTablesV2(
                table_options=[_options(table) for table in self.tables.values()],
                table_names=list(self.tables),
                pooling_mode=DynamicEmbPoolingMode.NONE,
                output_dtype=first.dtype,
                device=first.device,
            ).eval()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    for name, table in self.tables.items():
                        keys, rows = _keys_and_rows(table)
                        write_table(Path(folder), name, keys, table.weight[rows])
                    self._module.load(folder)
            except OSError as error:
                raise RunError(f"The tables cannot be handed to DynamicEmb: {error.strerror or error}.") from error
        self._compare()

    def _compare(self) -> None:
        """RunError where a row of a table is not found as it is: a full bucket drops keys without a word."""
        empty = {name: table.weight.new_empty(0, dtype=torch.int64) for name, table in self.tables.items()}
        for name, table in self.tables.items():
            keys, rows = _keys_and_rows(table)
            for part, of_part in zip(keys.split(CHECKED_ROWS), rows.split(CHECKED_ROWS), strict=True):
                found = self._find(empty | {name: part})[name]
                wrong = (found != table.weight[of_part]).any(1)
                if bool(wrong.any()):
                    raise RunError(f"DynamicEmb does not return row {int(part[wrong][0])} of table {name} as it is.")


def _keys_and_rows(table: EmbeddingTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw ids that have a row of their own, and these rows, both int64 on the table's device."""
    rows = table.item_rows()
    return (rows if table.keys is None else table.keys[rows]), rows


def _with_default(table: EmbeddingTable, ids: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """What was found for ids, with the table's default row for those that it does not know."""
    if not table.has_default:
        return found
    default = table(torch.full_like(ids[:1], DEFAULT_KEY))  # [1, D]
    return torch.where(table.is_known(ids)[:, None], found, default)


def _options(table: EmbeddingTable) -> DynamicEmbTableOptions:
    """A hash table on the GPU that is half full at most: no bucket overflows, so nothing is evicted."""
    capacity = -(-2 * table.num_rows // BUCKET_ROWS) * BUCKET_ROWS
    weight = table.weight
    return DynamicEmbTableOptions(
        index_type=torch.int64,
        embedding_dtype=weight.dtype,
        dim=weight.shape[1],
        max_capacity=capacity,
        init_capacity=capacity,
        bucket_capacity=BUCKET_ROWS,
        local_hbm_for_values=2 * capacity * weight.shape[1] * weight.element_size(),  # room for its own rounding up
        training=False,
        score_strategy=DynamicEmbScoreStrategy.STEP,  # others wait for torch.distributed when they load
        initializer_args=DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=0.0),
    )
