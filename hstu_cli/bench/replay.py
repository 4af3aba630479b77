"""Replays a data set's requests through the engine, in time order, and measures speed and quality."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hstu_cli.backend import Backend
from hstu_cli.bench.metrics import CUTOFFS, ReplayMetrics
from hstu_cli.config import ModelConfig
from hstu_cli.data.dataset import EventStore, PreparedDataset, RequestTimeline
from hstu_cli.data.predictions import PredictionsWriter
from hstu_cli.errors import InputError, RunError, UsageError
from hstu_cli.model.engine import InferenceEngine, StepResult
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import VIDEO_TABLE, UserRequest
from hstu_cli.timing import latency_summary


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Which requests to replay, how many at a time, and what to report of them.

    num_steps: batches at most (None: all). from_ms, until_ms: bounds on the request time, the first
    inclusive. top_k: a cutoff of the user's own for hit rate and NDCG.
    """

    batch_size: int = 32
    num_steps: int | None = None
    from_ms: int | None = None
    until_ms: int | None = None
    top_k: int | None = None


class RequestSource:
    """The requests of a period, ready for the engine: histories, candidates, context and labels."""

    def __init__(self, dataset: PreparedDataset, config: ModelConfig, options: ReplayOptions) -> None:
        limit = None if options.num_steps is None else options.num_steps * options.batch_size
        self.timeline: RequestTimeline = dataset.requests(
            from_ms=options.from_ms, until_ms=options.until_ms, limit=limit
        )
        self._events: EventStore = dataset.events(self.timeline.user_id)
        users = dataset.users(["user_id", *config.contextual_features])
        self._user_ids, self._context = users[:, 0], users[:, 1:]

    def __len__(self) -> int:
        return len(self.timeline)

    def request(self, index: int) -> UserRequest:
        """Request number `index` of the period, with the user's whole history up to it."""
        first, middle, last = self._bounds(index)
        context_row = np.searchsorted(self._user_ids, self.timeline.user_id[index])
        return UserRequest(
            context=self._context[context_row],
            video_ids=self._events.video_id[first:middle],
            action_weights=self._events.action_weights[first:middle],
            candidates=self._events.video_id[middle:last],
        )

    def labels(self, index: int) -> np.ndarray:
        """Bit sums int16 of the candidates of request number `index`."""
        _, middle, last = self._bounds(index)
        return self._events.action_weights[middle:last]

    def batches(self, batch_size: int, num_steps: int | None) -> Iterator[range]:
        """Consecutive requests of distinct users; a batch closes early at a user who is in it already."""
        start = steps = 0
        while start < len(self) and steps != num_steps:
            users: set[int] = set()
            end = start
            while end < min(start + batch_size, len(self)) and self.timeline.user_id[end] not in users:
                users.add(self.timeline.user_id[end])
                end += 1
            yield range(start, end)
            start, steps = end, steps + 1

    def _bounds(self, index: int) -> tuple[int, int, int]:
        """Where the user's events, the request's candidates and what follows begin."""
        first = self._events.events_of(self.timeline.user_id[index]).start
        middle = first + int(self.timeline.history_end[index])
        return first, middle, middle + int(self.timeline.num_candidates[index])


class Replay:
    """One replay: `warm_up`, `run`, then ask for the `summary`, also after an interruption."""

    def __init__(
        self, engine: InferenceEngine, dataset: PreparedDataset, options: ReplayOptions, backend: Backend
    ) -> None:
        self.engine, self.options, self.backend = engine, options, backend
        self.vocab_size = len(engine.model.vocabulary)
        if options.top_k is not None and options.top_k > self.vocab_size:
            raise UsageError(f"--top-k {options.top_k} is more than the vocabulary's {self.vocab_size} items.")
        self.source = RequestSource(dataset, engine.model.config, options)
        if not len(self.source):
            raise InputError(
                f"{dataset.path} has no request in this period; its events run from "
                f"{_date(dataset.metadata['first_time_ms'])} to {_date(dataset.metadata['last_time_ms'])}."
            )
        self.batches = list(self.source.batches(options.batch_size, options.num_steps))
        self.metrics = ReplayMetrics()
        self.latencies_ms: list[float] = []
        self.num_requests = 0

    def warm_up(self) -> None:
        """Score the first batch once, untimed: loads libraries and kernels, and finds wrong ids early."""
        self.engine.step([self.source.request(i) for i in self.batches[0]])

    def run(
        self,
        writer: PredictionsWriter | None = None,
        on_batch: Callable[[int, tuple[int, ...]], None] = lambda done, shape: None,
    ) -> None:
        """Replay all batches. on_batch is called after each with the requests so far and the shape of its logits."""
        for batch in self.batches:
            requests = [self.source.request(i) for i in batch]
            self.backend.synchronize()
            start = time.perf_counter()
            result = self.engine.step(requests)
            self.backend.synchronize()
            self.latencies_ms.append((time.perf_counter() - start) * 1e3)
            self.num_requests += len(batch)
            labels = np.concatenate([self.source.labels(i) for i in batch])
            self.metrics.add(self._target_ranks(requests, result), result.logits, labels)
            if writer is not None:
                self._write(writer, batch, requests, labels, result.logits)
            on_batch(self.num_requests, result.logits.shape)

    def summary(self) -> dict[str, Any]:
        """What was measured so far, named as in the JSON record."""
        total_s = sum(self.latencies_ms) / 1e3
        return {
            "num_batches": len(self.latencies_ms),
            "batch_size": self.options.batch_size,
            "num_requests": self.num_requests,
            "vocab_size": self.vocab_size,
            "latency_ms": latency_summary(self.latencies_ms),
            "throughput_rps": self.num_requests / total_s if total_s else None,
            "metrics": self.metrics.summary([*CUTOFFS, *([self.options.top_k] if self.options.top_k else [])]),
        }

    def _write(
        self,
        writer: PredictionsWriter,
        batch: range,
        requests: list[UserRequest],
        labels: np.ndarray,
        logits: np.ndarray,
    ) -> None:
        rows = slice(batch.start, batch.stop)
        counts = [len(request.candidates) for request in requests]
        writer.add(
            np.repeat(self.source.timeline.request_id[rows], counts),
            np.repeat(self.source.timeline.user_id[rows], counts),
            np.concatenate([request.candidates for request in requests]),
            labels,
            logits,
        )

    def _target_ranks(self, requests: list[UserRequest], result: StepResult) -> np.ndarray:
        """Rank of the first candidate of each request that has a prediction, int64."""
        targets = np.array([request.candidates[0] for request in requests])[result.has_last]
        model = self.engine.model
        return model.next_item_rank(result.last_hidden, torch.from_numpy(targets).to(model.device)).cpu().numpy()


def random_model_for(dataset: PreparedDataset, config: ModelConfig, backend: Backend, seed: int) -> RankingModel:
    """Seeded random weights with a row for every id of the data set.

    Raises RunError where the tables alone would not fit into the device's memory.
    """
    ids = {VIDEO_TABLE: dataset.video_ids(), "user_id": dataset.users(["user_id"])[:, 0]}
    sizes = {name: 1 + len(values) for name, values in dataset.metadata["category_maps"].items()}
    table_bytes = 4 * config.hidden_dim * sum(map(len, ids.values()))
    if table_bytes > 0.8 * min(backend.memory_bytes, Backend().memory_bytes):
        raise RunError(
            f"Random embedding tables for {dataset.name} would take {table_bytes / 1e9:.0f} GB. "
            "Choose a narrower --config such as tiny, or pass a --checkpoint."
        )
    return random_model(config, {name: torch.from_numpy(keys) for name, keys in ids.items()}, sizes, seed=seed)


def _date(time_ms: int) -> str:
    """A time in UTC+8, KuaiRand's own."""
    from datetime import datetime, timedelta, timezone

    return datetime.fromtimestamp(time_ms / 1000, timezone(timedelta(hours=8))).strftime("%Y-%m-%d %H:%M UTC+8")
