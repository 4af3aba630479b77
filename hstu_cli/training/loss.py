"""The training loss: binary cross-entropy of every task, and cross-entropy of the next item."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hstu_cli.config import TASKS
from hstu_cli.model.ranking import RankingModel, l2_normalize
from hstu_cli.model.tokens import VIDEO_TABLE

# Shapes: E examples, R rows with a prediction, D hidden_dim, V items that the next one is told from.

FULL_SOFTMAX_ITEMS = 32_768
"""Up to so many items the next one is told from all others; beyond, from a sample."""

CHUNK_SCORES = {True: 1 << 19, False: 1 << 26}
"""Next-item scores held at a time, on a CPU and elsewhere: 2 MB stay in a core's cache, 256 MB fill a GPU."""


def task_targets(labels: torch.Tensor) -> torch.Tensor:
    """Bit sums int64 [E] as one float32 column per task, [E, 8]."""
    bits = torch.arange(len(TASKS), device=labels.device)
    return ((labels[:, None] >> bits) & 1).float()


def ranking_loss(logits: torch.Tensor, targets: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits [E, 8] against targets [E, 8], summed over examples and tasks int64 [n]."""
    return F.binary_cross_entropy_with_logits(logits[:, tasks], targets[:, tasks], reduction="sum")


@dataclass(frozen=True, slots=True)
class NextItemChoice:
    """The items that the next one is told from: rows of the video table, int64 [V], and what they are a sample of."""

    items: torch.Tensor
    sampled_from: int | None

    @classmethod
    def draw(cls, model: RankingModel, num_negatives: int | None, generator: torch.Generator) -> "NextItemChoice":
        """All items, or `num_negatives` of them at random (None: all, unless there are more than a softmax bears)."""
        items = model.vocabulary
        if num_negatives is None:
            num_negatives = min(FULL_SOFTMAX_ITEMS, len(items))
        if num_negatives >= len(items):
            return cls(items, None)
        drawn = torch.randint(len(items), (num_negatives,), generator=generator)
        return cls(items[drawn.to(items.device)], len(items))


def next_item_loss(
    model: RankingModel, rows: torch.Tensor, target_rows: torch.Tensor, choice: NextItemChoice
) -> torch.Tensor:
    """Cross-entropy of the next item, summed over rows [R, D]; target_rows: int64 [R], rows of the video table.

    The scores are those of `RankingModel.next_item_scores`. In a uniform sample each item stands for
    as many as it was drawn from, so that the partition function is right in expectation.
    """
    weight = model.embeddings[VIDEO_TABLE].weight
    queries = l2_normalize(rows) / model.config.next_item_temperature  # [R, D]
    own = (queries * l2_normalize(F.embedding(target_rows, weight))).sum(1)  # [R]
    items = l2_normalize(F.embedding(choice.items, weight))  # [V, D]
    if choice.sampled_from is None:
        return _LogPartition.apply(queries, items, own, None, None, 0.0) - own.sum()
    log_share = math.log(choice.sampled_from / len(items))
    return _LogPartition.apply(queries, items, own, target_rows, choice.items, log_share) - own.sum()


class _LogPartition(torch.autograd.Function):
    """`sum_r log(sum_v exp(q_r . item_v))` of queries [R, D] and items [V, D].

    With targets int64 [R] the items are negatives alone, a sample: `own` [R], the targets' scores, join
    the sum, and `log_share` is added to the scores of the items, of which those with the target's number
    in `numbers` int64 [V] do not count.

    The gradients are computed beside the value, chunk by chunk: scores are used while they are in the
    cache and never kept, and the division by the partition function happens on rows, not on scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        items: torch.Tensor,
        own: torch.Tensor,
        targets: torch.Tensor | None,
        numbers: torch.Tensor | None,
        log_share: float,
    ) -> torch.Tensor:
        total = queries.new_zeros(())
        grad_queries, grad_items, grad_own = torch.empty_like(queries), torch.zeros_like(items), torch.zeros_like(own)
        size = max(1, CHUNK_SCORES[queries.device.type == "cpu"] // len(items))
        for start in range(0, len(queries), size):
            chunk = slice(start, start + size)
            scores = queries[chunk] @ items.T  # [r, V]
            if targets is not None:
                scores.add_(log_share).masked_fill_(targets[chunk, None] == numbers, -torch.inf)
            highest = scores.amax(1) if targets is None else torch.maximum(scores.amax(1), own[chunk])
            weights = scores.sub_(highest[:, None]).exp_()
            partition = weights.sum(1)
            if targets is not None:
                own_weight = (own[chunk] - highest).exp_()
                partition += own_weight
                torch.div(own_weight, partition, out=grad_own[chunk])
            total += partition.log().add_(highest).sum()
            torch.mm(weights, items, out=grad_queries[chunk]).div_(partition[:, None])
            grad_items.addmm_(weights.T, queries[chunk] / partition[:, None])
        ctx.save_for_backward(grad_queries, grad_items, grad_own)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(saved * grad for saved in ctx.saved_tensors), None, None, None
