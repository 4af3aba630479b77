"""A model to train: tables for the ids of the training period, and weights to begin with."""

import math

import numpy as np
import torch
from torch import nn

from hstu_cli.backend import Backend
from hstu_cli.config import NUM_ACTION_WEIGHTS, TASKS, ModelConfig
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.errors import RunError
from hstu_cli.model.embedding import DEFAULT_KEY, EmbeddingTable
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import VIDEO_TABLE
from hstu_cli.training.examples import ExampleSource

USER_TABLE = "user_id"

USER_SHARE = 0.1
"""Size of a user's first embedding beside an item's: most users are seen once an epoch."""

BIT_SHARE = 0.5
"""Size of a bit's first vector beside an item's embedding."""

POSITION_STD = 0.02
"""Of the first position embeddings; token embeddings have unit variance."""

COPIES_IN_TRAINING = 4
"""Of a table: the weights, their gradient, and AdamW's two moments."""

KEYED_TABLES = (USER_TABLE, VIDEO_TABLE)
"""Tables that are looked up by raw id, and have a default row for the unknown ones."""


class ActionBits(nn.Module):
    """The table of action weights [256, D] as sums of one vector per bit and one for every action, [9, D].

    Few of the 256 sums occur in a training period, and an action of the validation period may be none
    of them; as sums of known bits all rows mean something. The vectors are what is trained.
    """

    def __init__(self, table: EmbeddingTable, generator: torch.Generator) -> None:
        """Draw the vectors, and fill the table."""
        super().__init__()
        self._weight = [table.weight]  # in a list: the parameter stays the table's alone
        bits = torch.arange(NUM_ACTION_WEIGHTS)[:, None] >> torch.arange(len(TASKS)) & 1
        self.register_buffer("bits", torch.cat([torch.ones(NUM_ACTION_WEIGHTS, 1), bits], 1))  # [256, 9]
        dim = table.weight.shape[1]
        self.vectors = nn.Parameter(torch.randn(1 + len(TASKS), dim, generator=generator) * BIT_SHARE * dim**-0.5)
        self.to(table.weight)
        self.write()

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Give the vectors the gradient that the table's rows have, by the chain rule."""
        (weight,) = self._weight
        self.vectors.grad = self.bits.T @ weight.grad
        weight.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Make the table's rows those of the vectors."""
        (weight,) = self._weight
        torch.mm(self.bits, self.vectors, out=weight)


def new_model(
    dataset: PreparedDataset, config: ModelConfig, source: ExampleSource, backend: Backend, seed: int
) -> RankingModel:
    """A model for the ids of a training period, float32 on the device, with weights to begin with.

    Raises RunError where its tables, with all that training keeps beside them, would not fit into memory.
    """
    keys = {USER_TABLE: source.user_ids, VIDEO_TABLE: source.video_ids()}
    ids = {name: torch.from_numpy(np.concatenate([[DEFAULT_KEY], known])) for name, known in keys.items()}
    sizes = {name: 1 + len(values) for name, values in dataset.metadata["category_maps"].items()}
    table_bytes = COPIES_IN_TRAINING * 4 * config.hidden_dim * sum(map(len, ids.values()))
    if table_bytes > 0.8 * min(backend.memory_bytes, Backend().memory_bytes):
        raise RunError(
            f"Embedding tables for {dataset.name} would take {table_bytes / 1e9:,.0f} GB in training. "
            "Choose a narrower --config such as tiny."
        )
    model = random_model(config, ids, sizes, seed=seed)
    with torch.no_grad():
        if USER_TABLE in model.embeddings:
            model.embeddings[USER_TABLE].weight.mul_(USER_SHARE)
        model.position.weight.mul_(POSITION_STD * math.sqrt(config.hidden_dim))
    return model.to(backend.device)


def set_dropout(model: RankingModel, share: float) -> None:
    """Dropout of token embeddings and of every layer's gated output, in training mode alone."""
    model.dropout = share
    for layer in model.layers:
        layer.dropout = share


def set_recompute(model: RankingModel, recompute: str) -> None:
    """What the backward pass of every layer computes again instead of keeping it; results stay the same."""
    for layer in model.layers:
        layer.recompute = recompute
