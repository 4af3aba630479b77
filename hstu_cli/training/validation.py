"""Validation: AUC of every task and hit rate of the next item over a period, one pass per user."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hstu_cli.backend import Backend
from hstu_cli.bench.metrics import CUTOFFS, ReplayMetrics
from hstu_cli.model.ranking import RankingModel
from hstu_cli.training.examples import ExampleSource, score_examples

BATCH_TOKENS = 16_384
"""Tokens of a validation step, one long user apart."""


@torch.no_grad()
def validate(
    model: RankingModel,
    source: ExampleSource,
    backend: Backend,
    impl: str,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """`hit_rate` and `ndcg` by K, `auc` and `auc_reason` by task, over every event of the period.

    Each event is scored with all of its user's earlier events as history, as the only candidate. An exact AUC orders
    all scores of a task, so the logits of the whole period are kept on the host: with the rest 38 bytes an event.
    """
    was_training = model.training
    model.eval()
    metrics = ReplayMetrics()
    done = 0
    for passes in source.batches_of_tokens(BATCH_TOKENS):
        batch = source.batch(passes)
        model.check_ids(batch.tokens)
        logits, previous = score_examples(model, batch, impl)  # [E, 8], [P, D]
        ranks = model.next_item_rank(previous, batch.video_ids[batch.has_previous].to(backend.device))
        metrics.add(ranks.cpu().numpy(), logits.cpu().numpy(), batch.labels)
        done += len(batch.labels)
        on_step(done, source.num_examples)
    model.train(was_training)
    return metrics.summary(CUTOFFS)


def mean_auc(metrics: Mapping[str, Any], tasks: Sequence[str]) -> float:
    """The mean over those of the tasks that have an AUC; NaN where none has."""
    values = [metrics["auc"][task] for task in tasks if metrics["auc"][task] is not None]
    return sum(values) / len(values) if values else math.nan
