"""Hit rate, NDCG and AUC of a replay against their definitions in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_cli.bench.metrics import ReplayMetrics, hit_rate, ndcg
from hstu_cli.config import TASKS

CUTOFFS = (1, 5, 10)
FAR_RANK = 2**24 + 1
NO_CANDIDATES = (np.empty((0, 8), np.float32), np.empty(0, np.int16))
NO_FAR_RANKS = np.empty(0, np.int64)


def pair_counting_auc(scores: list[float], positive: list[bool]) -> float:
    """The share of (positive, negative) pairs in the right order; a tie counts half."""
    wins = pairs = 0.0
    for score, label in zip(scores, positive, strict=True):
        for other, other_label in zip(scores, positive, strict=True):
            if label and not other_label:
                pairs += 1
                wins += 1.0 if score > other else 0.5 if score == other else 0.0
    return wins / pairs


def summary_of(scores: list[float], positive: list[bool], task: int = 0, num_parts: int = 1) -> dict:
    """The summary where one task has these scores and labels, added in parts; the other tasks have neither."""
    logits = np.zeros((len(scores), 8), np.float32)
    logits[:, task] = scores
    labels = np.array(positive, np.int16) << task
    metrics = ReplayMetrics()
    for part in np.array_split(np.arange(len(scores)), num_parts):
        metrics.add(NO_FAR_RANKS, logits[part], labels[part])
    return metrics.summary(CUTOFFS)


@given(ranks=st.lists(st.integers(0, 12), min_size=1, max_size=30), k=st.integers(1, 12))
def test_hit_rate_and_ndcg_by_their_definitions(ranks: list[int], k: int) -> None:
    hits = [1 <= rank <= k for rank in ranks]
    gains = [1 / math.log2(rank + 1) if hit else 0.0 for rank, hit in zip(ranks, hits, strict=True)]
    assert hit_rate(np.array(ranks), k) == pytest.approx(sum(hits) / len(ranks), abs=1e-12)
    assert ndcg(np.array(ranks), k) == pytest.approx(sum(gains) / len(ranks), abs=1e-12)


def test_an_id_outside_the_vocabulary_is_a_miss() -> None:
    ranks = np.array([0, 1, 0, 3])
    assert hit_rate(ranks, 1) == 0.25
    assert hit_rate(ranks, 3) == 0.5
    assert ndcg(ranks, 3) == pytest.approx((1 + 1 / 2) / 4)


def test_without_predictions_the_ranking_metrics_are_null() -> None:
    metrics = ReplayMetrics()
    metrics.add(NO_FAR_RANKS, *NO_CANDIDATES)
    summary = metrics.summary(CUTOFFS)
    nothing = {"1": None, "5": None, "10": None}
    assert (summary["hit_rate"], summary["ndcg"], summary["num_predictions"]) == (nothing, nothing, 0)


def test_ranks_of_all_batches_count_and_cutoffs_are_sorted_once() -> None:
    metrics = ReplayMetrics()  # FAR_RANK is a hit at 1 for whoever keeps it in 16 bits
    for ranks in ([1, 0], [], [FAR_RANK, 7]):
        metrics.add(np.array(ranks, np.int64), *NO_CANDIDATES)
    summary = metrics.summary([10, 5, 1, 10, FAR_RANK])
    assert summary["hit_rate"] == {"1": 0.25, "5": 0.25, "10": 0.5, str(FAR_RANK): 0.75}
    assert list(summary["hit_rate"]) == list(summary["ndcg"]) == ["1", "5", "10", str(FAR_RANK)]
    assert summary["num_predictions"] == 4


labelled_scores = st.lists(
    st.tuples(st.sampled_from([-3.0, 0.0, 0.5, 20.0]) | st.floats(-(2.0**100), 2.0**100, width=32), st.booleans()),
    min_size=2,
    max_size=40,
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


@given(pairs=labelled_scores, task=st.integers(0, 7), num_parts=st.integers(1, 4))
def test_auc_counts_pairs_with_ties_as_half(pairs: list[tuple[float, bool]], task: int, num_parts: int) -> None:
    scores, positive = (list(column) for column in zip(*pairs, strict=True))
    auc = summary_of(scores, positive, task, num_parts)["auc"][TASKS[task]]
    assert auc == pytest.approx(pair_counting_auc(scores, positive), abs=1e-6)


@pytest.mark.parametrize("low", [20.0, -20.0, 88.0, 1e6, 1e-8])
def test_auc_tells_close_logits_apart(low: float) -> None:
    # Probabilities of such logits would be equal in float32, and so would logits that are pushed into [0, 1].
    high = float(np.nextafter(np.float32(low), np.float32(np.inf)))
    assert summary_of([low, high], [False, True])["auc"]["is_click"] == 1.0
    assert summary_of([low, high], [True, False])["auc"]["is_click"] == 0.0
    assert summary_of([20.0, 20.0001], [False, True])["auc"]["is_click"] == 1.0


@pytest.mark.parametrize("positive_is_nan", [False, True])
def test_a_score_that_is_not_a_number_gives_no_auc(positive_is_nan: bool) -> None:
    # fp16 can overflow; sorted, NaN would count as the best score of all.
    summary = summary_of([0.1, math.nan, 0.3], [not positive_is_nan, positive_is_nan, False])
    assert summary["auc"]["is_click"] is None
    assert summary["auc_reason"]["is_click"]


def test_auc_of_many_candidates() -> None:
    # Ranks 0 to n - 1, every third positive: counted in closed form, too many pairs to loop over.
    num_candidates = 300_000
    positions = np.arange(0, num_candidates, 3)
    expected = (positions - np.arange(len(positions))).sum() / (len(positions) * (num_candidates - len(positions)))
    scores = np.linspace(-30, 30, num_candidates).astype(np.float32)
    assert len(np.unique(scores)) == num_candidates
    positive = np.zeros(num_candidates, bool)
    positive[positions] = True
    shuffled = np.random.default_rng(0).permutation(num_candidates)
    auc = summary_of(scores[shuffled], positive[shuffled])["auc"]["is_click"]
    assert auc == pytest.approx(expected, abs=1e-6)


def test_each_task_reads_its_own_bit_and_column() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(60, 8)).astype(np.float32)
    labels = generator.integers(0, 256, 60).astype(np.int16)
    metrics = ReplayMetrics()
    metrics.add(NO_FAR_RANKS, logits, labels)
    expected = {
        task: pair_counting_auc(logits[:, bit].tolist(), [bool(label & 1 << bit) for label in labels])
        for bit, task in enumerate(TASKS)
    }
    assert metrics.summary(CUTOFFS)["auc"] == pytest.approx(expected, abs=1e-6)
    assert metrics.summary(CUTOFFS)["auc_reason"] == {}


def test_the_tasks_have_the_bits_of_the_data_set() -> None:
    names = "is_click is_like is_follow is_comment is_forward is_hate long_view is_profile_enter"
    assert list(TASKS) == names.split()


def test_a_task_with_one_class_is_null_with_its_reason() -> None:
    summary = summary_of([0.1, 0.2], [True, True], task=6)
    assert summary["auc"] == dict.fromkeys(TASKS)
    assert summary["auc_reason"]["long_view"] == "every candidate has long_view 1"
    assert summary["auc_reason"]["is_click"] == "every candidate has is_click 0"
    assert set(summary["auc_reason"]) == set(TASKS)


@pytest.mark.parametrize("num_batches", [0, 2])
def test_without_candidates_every_task_is_null(num_batches: int) -> None:
    metrics = ReplayMetrics()
    for _ in range(num_batches):
        metrics.add(NO_FAR_RANKS, *NO_CANDIDATES)
    summary = metrics.summary(CUTOFFS)
    assert summary["auc"] == dict.fromkeys(TASKS)
    assert summary["auc_reason"] == dict.fromkeys(TASKS, "no candidates")
