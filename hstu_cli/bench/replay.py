"""Replays requests through the engine, in time order, and measures speed and quality."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hstu_cli.backend import Backend, upload
from hstu_cli.bench.metrics import CUTOFFS, ReplayMetrics
from hstu_cli.bench.requests import RequestSource
from hstu_cli.bench.verify import CacheVerifier
from hstu_cli.data.predictions import PredictionsWriter
from hstu_cli.errors import UsageError
from hstu_cli.kernels.buckets import bucket, padded
from hstu_cli.model.engine import InferenceEngine, StepResult
from hstu_cli.model.tokens import UserRequest
from hstu_cli.timing import latency_summary


class Replay:
    """One replay: `warm_up`, `run`, then ask for the `summary`, also after an interruption."""

    def __init__(
        self,
        engine: InferenceEngine,
        source: RequestSource,
        backend: Backend,
        *,
        batch_size: int,
        num_steps: int | None = None,
        top_k: int | None = None,
        verify_every: int | None = None,
    ) -> None:
        """The replay of the first `num_steps` batches (None: all).

        top_k: a cutoff of the user's own for hit rate and NDCG; UsageError beyond the vocabulary.
        verify_every: compare every so manieth request with an uncached run.
        """
        self.engine, self.source, self.backend = engine, source, backend
        self.batch_size, self.top_k, self.verify_every = batch_size, top_k, verify_every
        self.vocab_size = len(engine.model.vocabulary)
        if top_k is not None and top_k > self.vocab_size:
            raise UsageError(f"--top-k {top_k} is more than the vocabulary's {self.vocab_size} items.")
        self.batches = list(source.batches(batch_size, num_steps))
        self.verifier = CacheVerifier(engine) if verify_every else None
        self.metrics = ReplayMetrics()
        self.latencies_ms: list[float] = []
        self.num_requests = 0
        self.num_candidates = 0
        self.num_not_finite = 0
        self.total_requests = sum(map(len, self.batches))

    def warm_up(self) -> None:
        """Score the first batch once, untimed and uncached: loads libraries, and finds wrong ids early."""
        self.engine.step([self.source.request(i) for i in self.batches[0]], use_cache=False)

    def run(
        self,
        writer: PredictionsWriter | None = None,
        on_batch: Callable[[int, tuple[int, ...]], None] = lambda done, shape: None,
    ) -> None:
        """Replay all batches. on_batch is called after each with the requests so far and the shape of its logits."""
        for batch in self.batches:
            requests = [self.source.request(i) for i in batch]
            if self.engine.graphs is not None:
                self.engine.graphs.capture_pending()
            self.backend.synchronize()
            start = time.perf_counter()
            result = self.engine.step(requests)
            self.backend.synchronize()
            self.latencies_ms.append((time.perf_counter() - start) * 1e3)
            self.num_requests += len(batch)
            self.num_candidates += len(result.logits)
            self.num_not_finite += int((~np.isfinite(result.logits)).sum())
            self._verify(batch, requests, result.logits)
            labels = np.concatenate([self.source.labels(i) for i in batch])
            self.metrics.add(self._target_ranks(requests, result), result.logits, labels)
            if writer is not None:
                self._write(writer, batch, requests, labels, result.logits)
            on_batch(self.num_requests, result.logits.shape)

    def summary(self) -> dict[str, Any]:
        """What was measured so far, named as in the JSON record."""
        total_s = sum(self.latencies_ms) / 1e3
        kv_cache: dict[str, Any] = {"enabled": self.engine.cache is not None}
        if self.engine.cache is not None:
            kv_cache |= self.engine.cache.summary()
            computed = kv_cache["recomputed_tokens"] + self.num_candidates
            skipped = kv_cache["device_hit_tokens"] + kv_cache["host_hit_tokens"]
            kv_cache["token_work_ratio"] = (computed + skipped) / computed if computed else None
        if self.verifier is not None:
            kv_cache["verified"] = self.verifier.summary()
        graphs = self.engine.graphs
        return {
            "kv_cache": kv_cache,
            "cuda_graph": {"enabled": graphs is not None, **(graphs.summary() if graphs is not None else {})},
            "num_batches": len(self.latencies_ms),
            "batch_size": self.batch_size,
            "num_requests": self.num_requests,
            "vocab_size": self.vocab_size,
            "latency_ms": latency_summary(self.latencies_ms),
            "throughput_rps": self.num_requests / total_s if total_s else None,
            "metrics": self.metrics.summary([*CUTOFFS, *([self.top_k] if self.top_k else [])]),
        }

    @property
    def failure(self) -> str | None:
        """Why the result is invalid, or None."""
        if self.num_not_finite:
            return f"{self.num_not_finite:,} logits are NaN or infinite: the weights overflow in this dtype."
        return self.verifier.failure if self.verifier else None

    def _verify(self, batch: range, requests: list[UserRequest], logits: np.ndarray) -> None:
        if self.verifier is None:
            return
        ends = np.cumsum([len(request.candidates) for request in requests])
        for i, request, cached in zip(batch, requests, np.split(logits, ends[:-1]), strict=True):
            if i % self.verify_every == 0:
                self.verifier.check(int(self.source.timeline.request_id[i]), request, cached)

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
        model, rows = self.engine.model, result.last_hidden
        length = bucket(len(rows)) if self.engine.few_shapes else len(rows)
        if length > len(rows):
            rows = torch.cat([rows, rows.new_zeros(length - len(rows), rows.shape[1])])
        target_ids = upload([padded(torch.from_numpy(targets), length)], model.device)[0]
        return model.next_item_rank(rows, target_ids).cpu().numpy()[: len(targets)]
