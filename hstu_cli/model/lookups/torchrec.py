"""Looks embeddings up with TorchRec's EmbeddingCollection, over the very weights of the model's tables."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_cli.backend import upload
from hstu_cli.model.embedding import EmbeddingTable

# Shapes: n ids of one table, N ids of all tables, D width.


class TorchRecLookup:
    """One EmbeddingCollection over all tables, each of them a feature of its own, as one sequence.

    It holds the tables' own parameters, no copies. TorchRec knows rows, not raw ids: the tables find
    the rows. ValueError for weights wider than float32, to which TorchRec would round them.
    """

    def __init__(self, tables: nn.ModuleDict) -> None:
        self.tables = tables
        configs = [
            EmbeddingConfig(
                name=name,
                embedding_dim=table.weight.shape[1],
                num_embeddings=table.num_rows,
                feature_names=[name],
            )
            for name, table in tables.items()
        ]
        self.collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))  # without weights of its own
        self._share_weights()

    def __call__(self, ids: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Lookup`."""
        self._share_weights()
        rows = {name: table.rows_of(ids[name]) for name, table in self.tables.items()}  # [n], -1 for the zero vector
        lengths = [len(of_table) for of_table in rows.values()]
        values = torch.cat([_existing(self.tables[name], of_table) for name, of_table in rows.items()])  # [N]
        features = KeyedJaggedTensor(
            keys=list(rows),
            values=values,
            lengths=upload([torch.tensor(lengths)], values.device)[0],
            stride=1,
            length_per_key=lengths,  # known here; it would be read back from the device
            offset_per_key=list(accumulate(lengths, initial=0)),
        )
        found = self.collection(features)
        return {
            name: table.zero_unknown(found[name].values().to(table.weight.dtype), rows[name])  # [n, D]
            for name, table in self.tables.items()
        }

    def _share_weights(self) -> None:
        """Take the tables' parameters as they are now: loading a state dict may have replaced them."""
        for name, table in self.tables.items():
            if torch.finfo(table.weight.dtype).bits > 32:
                raise ValueError(f"TorchRec looks up in float32 at most, and table {name} is {table.weight.dtype}")
            if self.collection.embeddings[name].weight is not table.weight:
                self.collection.embeddings[name].weight = table.weight


def _existing(table: EmbeddingTable, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n] with some row for those that are -1: TorchRec has no zero vector."""
    return rows if table.has_row_for_all else rows.clamp(min=0)
