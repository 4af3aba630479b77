"""Ranking quality over a replay: hit rate and NDCG of the next item, AUC of each task."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hstu_cli.config import TASKS

CUTOFFS = (1, 5, 10, 50)


class ReplayMetrics:
    """Collects, batch by batch, what the metrics need: 4 bytes a request and 34 a candidate."""

    def __init__(self) -> None:
        self._ranks: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, target_ranks: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> None:
        """target_ranks: int [R] from 1, 0 for a target outside the vocabulary, of the requests that
        have a prediction; logits: float32 [C, 8]; labels: int16 [C], bit sums.
        """
        self._ranks.append(target_ranks.astype(np.int32))
        self._logits.append(logits)
        self._labels.append(labels.astype(np.int16))

    def summary(self, cutoffs: Iterable[int]) -> dict[str, Any]:
        """`hit_rate` and `ndcg` keyed by K, `auc` and `auc_reason` keyed by task; null without data."""
        ranks = np.concatenate(self._ranks or [np.empty(0, np.int32)])
        labels = np.concatenate(self._labels or [np.empty(0, np.int16)])
        auc: dict[str, float | None] = {}
        reasons: dict[str, str] = {}
        for t, task in enumerate(TASKS):
            positive = (labels >> t) & 1
            auc[task] = None
            if not 0 < positive.sum() < len(positive):
                reasons[task] = f"every candidate has {task} {positive[0]}" if len(positive) else "no candidates"
                continue
            scores = np.concatenate([logits[:, t] for logits in self._logits])
            if np.isnan(scores).any():
                reasons[task] = f"{int(np.isnan(scores).sum())} logits of {task} are not numbers"
            else:
                auc[task] = _auc(scores, positive)
        return {
            "hit_rate": {str(k): hit_rate(ranks, k) for k in sorted(set(cutoffs))},
            "ndcg": {str(k): ndcg(ranks, k) for k in sorted(set(cutoffs))},
            "num_predictions": len(ranks),
            "auc": auc,
            "auc_reason": reasons,
        }


def hit_rate(ranks: np.ndarray, k: int) -> float | None:
    """Share of targets among the first k; a rank of 0 is a miss."""
    return float(((ranks >= 1) & (ranks <= k)).mean()) if len(ranks) else None


def ndcg(ranks: np.ndarray, k: int) -> float | None:
    """Normalised discounted cumulative gain at k with one relevant item each: 1 / log2(rank + 1)."""
    if not len(ranks):
        return None
    hits = (ranks >= 1) & (ranks <= k)
    return float(np.where(hits, 1 / np.log2(np.maximum(ranks, 1) + 1), 0).mean())


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve, ties counting half."""
    from torchmetrics.functional.classification import binary_auroc  # slow to import

    # The curve depends on the order alone; places in [0, 1] keep torchmetrics from squashing
    # distinct logits into equal probabilities.
    place = np.unique(scores, return_inverse=True)[1] / len(scores)
    return float(binary_auroc(torch.from_numpy(place), torch.from_numpy(positive.astype(np.int64))))
