"""The ranking model: embeddings, the HSTU block, the ranking head and the next-item head."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from hstu_cli.config import NUM_ACTION_WEIGHTS, ModelConfig
from hstu_cli.errors import InputError
from hstu_cli.model.embedding import EmbeddingTable, Lookup
from hstu_cli.model.layer import Attention, HSTUBlock
from hstu_cli.model.tokens import ACTION_TABLE, VIDEO_TABLE, TokenBatch, table_names

# Shapes: T tokens, D hidden_dim, R selected rows, V items of the vocabulary.

L2_NORM_EPS = 1e-6
"""The least norm that a row is divided by before a head."""

VOCABULARY_CHUNK = 65_536
"""Items whose embeddings the next-item head normalises at a time."""

SCORE_ELEMENTS = 1 << 22
"""The most next-item scores held at a time (16 MB), unless two rows have more."""


class RankingModel(nn.Module):
    """An HSTU ranking model over named embedding tables.

    Its `state_dict` has the names of the native checkpoint. `tables` holds an `EmbeddingTable` for
    each contextual feature in use, `video_id` and `action_weights`; ValueError where they do not fit.
    """

    def __init__(self, config: ModelConfig, tables: Mapping[str, EmbeddingTable]) -> None:
        super().__init__()
        names = table_names(config)
        if set(tables) != set(names):
            raise ValueError(f"tables must be {', '.join(names)}, not {', '.join(tables)}")
        for name, table in tables.items():
            if table.weight.shape[1] != config.hidden_dim:
                raise ValueError(f"table {name} is {table.weight.shape[1]} wide, hidden_dim is {config.hidden_dim}")
        self.config = config
        self.embeddings = nn.ModuleDict({name: tables[name] for name in names})
        self.position = nn.Embedding(config.position_buckets, config.hidden_dim)
        self.layers = HSTUBlock(config)
        self.head = _mlp(config.hidden_dim, config.head_dims)
        self.dropout = 0.0  # of the token embeddings, in training

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.position.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and the activations."""
        return self.position.weight.dtype

    def check_ids(self, batch: TokenBatch) -> None:
        """Refuse ids outside a table without keys (InputError); for a batch on the host."""
        for name, table in self.embeddings.items():
            outside = table.out_of_range(batch.ids[name])
            if outside is not None:
                raise InputError(
                    f"The data holds {name} {outside}, but the model's table {name} has no keys and only "
                    f"{table.num_rows} rows. Use the data set that the model was made for."
                )

    def look_up(self, ids: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Embeddings [n, D] of the raw ids of every table, int64 [n], from the tables themselves."""
        return {name: table(ids[name]) for name, table in self.embeddings.items()}

    def embed(self, batch: TokenBatch, lookup: Lookup | None = None) -> torch.Tensor:
        """`h_t = sqrt(D) * e_t + P[position_t]` of every token, [T, D].

        lookup: what finds the embeddings (`hstu_cli.model.lookups`); None is `look_up`.
        """
        tokens = self.position.weight.new_empty(batch.num_tokens, self.config.hidden_dim)
        for name, embeddings in (lookup or self.look_up)(batch.ids).items():
            tokens.index_copy_(0, batch.slots[name], embeddings)
        return torch.add(self.position(batch.positions), tokens, alpha=math.sqrt(self.config.hidden_dim))

    def forward(self, batch: TokenBatch, attention: Attention, lookup: Lookup | None = None) -> torch.Tensor:
        """The block's output for every token of the batch, [T, D]; `lookup` as in `embed`."""
        tokens = F.dropout(self.embed(batch, lookup), self.dropout, self.training)
        return self.layers(tokens, attention)

    def rank(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [R, 8] float32, one per task, of candidate rows [R, D]."""
        return self.head(l2_normalize(rows).to(self.dtype)).float()

    def next_item_scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Cosine of rows [R, D] and every item of the vocabulary over temperature, [R, V] float32.

        The rows are those of the last token before the candidates. Column order: see `vocabulary`.
        """
        queries = l2_normalize(rows)
        scores = queries.new_empty(len(rows), len(self.vocabulary))
        start = 0
        for chunk in self.vocabulary.split(VOCABULARY_CHUNK):  # bounds the float32 copy of the table
            items = l2_normalize(F.embedding(chunk, self.embeddings[VIDEO_TABLE].weight))
            scores[:, start : start + len(chunk)] = queries @ items.T
            start += len(chunk)
        return scores.div_(self.config.next_item_temperature)

    @torch.no_grad()
    def next_item_rank(self, rows: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """Place of each target in the whole vocabulary, [R] int64 from 1; 0 for an id not in it, and for NaN.

        rows: [R, D], as for `next_item_scores`; target_ids: [R] int64 raw video ids. Equal scores
        are ordered by column, as in a stable sort; scores of equal items may differ in their last bits,
        by where a matrix product puts them, so a difference that rounding explains counts as equal.
        """
        table = self.embeddings[VIDEO_TABLE]
        if not len(self.vocabulary):
            return torch.zeros_like(target_ids)
        columns = torch.searchsorted(self.vocabulary, table.rows_of(target_ids)).clamp_(max=len(self.vocabulary) - 1)
        ranks = []
        step = max(2, SCORE_ELEMENTS // len(self.vocabulary))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scores = self.next_item_scores(rows[part])  # [R, V]
            column = columns[part, None]
            lead = scores.sub_(scores.gather(1, column))  # of every item over the target
            rounding = self._score_rounding(scores.dtype)
            earlier = torch.arange(scores.shape[1], device=scores.device) < column
            better = (lead > rounding) | ((lead >= -rounding) & earlier)
            # A sum is NaN where any of its terms is, and takes one pass.
            ranks.append(torch.where(lead.sum(1).isnan(), 0, 1 + better.sum(1, dtype=torch.int32)))
        known = table.is_known(target_ids)
        return torch.where(known, torch.cat(ranks).long(), 0) if ranks else torch.zeros_like(target_ids)

    @torch.no_grad()
    def next_item_top_k(self, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k most likely next items of rows [R, D]: raw video ids [R, k] int64 and scores [R, k].

        Equal scores are ordered by column; a difference that rounding explains counts as equal, as in `next_item_rank`.
        """
        scores, columns = self.next_item_scores(rows).sort(dim=1, descending=True, stable=True)
        apart = scores[:, :-1] - scores[:, 1:] > self._score_rounding(scores.dtype)
        group = F.pad(apart.cumsum(1), (1, 0))  # of equal scores
        order = (group * scores.shape[1] + columns).argsort(dim=1)[:, :k]
        scores, item_rows = scores.gather(1, order), self.vocabulary[columns.gather(1, order)]
        keys = self.embeddings[VIDEO_TABLE].keys
        return (item_rows if keys is None else keys[item_rows]), scores

    def _score_rounding(self, dtype: torch.dtype) -> float:
        """By how much the scores of equal items may differ."""
        return 4 * torch.finfo(dtype).eps / self.config.next_item_temperature

    @property
    def vocabulary(self) -> torch.Tensor:
        """Rows of the video table that stand for an item, [V] int64, ascending: not the default row."""
        return self.embeddings[VIDEO_TABLE].item_rows()


def l2_normalize(rows: torch.Tensor) -> torch.Tensor:
    """Rows [R, D] over max(their l2 norm, 1e-6), in float32 (float64 stays)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return F.normalize(rows.to(wide), dim=-1, eps=L2_NORM_EPS)


def random_model(
    config: ModelConfig, ids: Mapping[str, torch.Tensor], num_rows: Mapping[str, int], *, seed: int
) -> RankingModel:
    """A model with seeded random weights, float32 on the CPU.

    ids: raw ids [rows] int64 of the tables that are looked up by key; num_rows: the sizes of the
    others (`action_weights` need not be named). Unit-variance token embeddings, linear weights with
    variance 1 / fan-in, biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {ACTION_TABLE: NUM_ACTION_WEIGHTS, **num_rows}
    tables = {}
    for name in table_names(config):
        keys = ids.get(name)
        rows = len(keys) if keys is not None else sizes[name]
        weight = torch.randn(rows, config.hidden_dim, generator=generator).mul_(config.hidden_dim**-0.5)
        tables[name] = EmbeddingTable(weight, keys)
    model = RankingModel(config, tables)
    with torch.no_grad():
        for module in (model.position, *model.layers.modules(), *model.head.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=module.weight.shape[1] ** -0.5, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    return model.eval()


def _mlp(input_dim: int, dims: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them."""
    layers: list[nn.Module] = []
    for width in dims:
        layers += [nn.Linear(input_dim, width), nn.ReLU()]
        input_dim = width
    return nn.Sequential(*layers[:-1])
