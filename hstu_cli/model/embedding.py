"""Embedding tables that are looked up by raw id."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

DEFAULT_KEY = -1
"""The key of the row that every unknown id takes."""

Lookup = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Turns the raw ids of every table, int64 [n], into their embeddings, [n, D] in the dtype of the weights."""


class EmbeddingTable(nn.Module):
    """One table: `weight` [rows, dim], and optionally `keys` [rows] int64, the raw id of each row.

    With keys, an id that is not among them takes the row of key -1 if there is one, else the zero
    vector. Without keys an id is a row number and must lie in the table: callers check with
    `out_of_range` while the ids are still on the host, where it costs no device synchronisation.
    """

    def __init__(self, weight: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        """Raise ValueError for an empty table, and for keys that are not unique or below -1."""
        super().__init__()
        if weight.dim() != 2 or weight.shape[0] == 0 or not weight.is_floating_point():
            raise ValueError(f"a table is [rows >= 1, dim] floating point, not {weight.dtype} {list(weight.shape)}")
        self.weight = nn.Parameter(weight)
        self.register_buffer("keys", keys)
        sorted_keys, row_of_sorted = (None, None) if keys is None else _sorted_keys(keys, len(weight))
        self.register_buffer("sorted_keys", sorted_keys, persistent=False)  # [rows] int64
        self.register_buffer("row_of_sorted", row_of_sorted, persistent=False)  # [rows] int64
        self.has_default = sorted_keys is not None and int(sorted_keys[0]) == DEFAULT_KEY

    @property
    def num_rows(self) -> int:
        """Rows of the table, the default row included."""
        return self.weight.shape[0]

    @property
    def has_row_for_all(self) -> bool:
        """Whether no id takes the zero vector."""
        return self.sorted_keys is None or self.has_default

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Row of each id, int64 like `ids`; -1 for an id that takes the zero vector."""
        if self.sorted_keys is None:
            return ids
        default = self.row_of_sorted[0] if self.has_default else -1
        place, known = self._find(ids)
        return torch.where(known, self.row_of_sorted[place], default)

    def is_known(self, ids: torch.Tensor) -> torch.Tensor:
        """Whether each id has a row of its own, bool like `ids`."""
        if self.sorted_keys is None:
            return (ids >= 0) & (ids < self.num_rows)
        return self._find(ids)[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [*ids.shape, dim] of int64 ids."""
        rows = self.rows_of(ids)
        if self.has_row_for_all:
            return nn.functional.embedding(rows, self.weight)
        return self.zero_unknown(nn.functional.embedding(rows.clamp(min=0), self.weight), rows)

    def zero_unknown(self, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`embeddings` [n, dim] with the zero vector where `rows` [n], as of `rows_of`, are -1."""
        return embeddings if self.has_row_for_all else embeddings * (rows >= 0)[..., None]

    def _find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Place among the sorted keys and whether the id is there, for each of `ids`."""
        place = torch.searchsorted(self.sorted_keys, ids).clamp_(max=self.num_rows - 1)
        return place, (self.sorted_keys[place] == ids) & (ids != DEFAULT_KEY)

    def out_of_range(self, ids: torch.Tensor) -> int | None:
        """The first id that is no row of a table without keys, or None; always None with keys."""
        if self.keys is not None or ids.numel() == 0:
            return None
        outside = ids[(ids < 0) | (ids >= self.num_rows)]
        return int(outside[0]) if outside.numel() else None

    def item_rows(self) -> torch.Tensor:
        """Rows that stand for an id, int64: all but the default row."""
        if not self.has_default:
            return torch.arange(self.num_rows, device=self.weight.device)
        rows = torch.arange(self.num_rows - 1, device=self.weight.device)
        return rows + (rows >= self.row_of_sorted[0])  # how many there are is known: nothing is read from the device


def _sorted_keys(keys: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys in ascending order and the row of each, both [rows] int64."""
    if keys.dtype != torch.int64 or keys.shape != (num_rows,):
        raise ValueError(f"keys must be {num_rows} int64, one for each row, not {keys.dtype} {list(keys.shape)}")
    ordered, rows = torch.sort(keys)
    if int(ordered[0]) < DEFAULT_KEY:
        raise ValueError(f"keys must be raw ids >= 0, or -1 for the default row, not {int(ordered[0])}")
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"keys must be unique, but {int(repeated[0])} stands twice")
    return ordered, rows
