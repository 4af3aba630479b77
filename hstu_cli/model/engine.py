"""The inference engine: one step scores the candidates of a batch of requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hstu_cli.backend import prefers_few_shapes, upload
from hstu_cli.config import ModelConfig
from hstu_cli.kernels.buckets import bucket, padded
from hstu_cli.kvcache import KVCacheManager
from hstu_cli.kvcache.batch import CacheBatch
from hstu_cli.kvcache.fingerprint import HistoryFingerprint
from hstu_cli.model.captured import CapturedBlock
from hstu_cli.model.embedding import Lookup
from hstu_cli.model.identity import WeightsIdentity
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.tokens import TokenBatch, UserRequest, build_token_batch

# Shapes: R requests of the step, D hidden_dim, 8 tasks.


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed.

    logits: float32 [candidates of all requests, 8] on the host, in the order of the requests.
    last_hidden: [R', D] on the device, the row of the last token before the candidates of those
      requests that have one; has_last: bool [R] on the host, which ones these are.
    """

    logits: np.ndarray
    last_hidden: torch.Tensor
    has_last: np.ndarray


class InferenceEngine:
    """Scores requests with a model, at most `max_candidates` of one request at a time.

    More candidates than that are scored in chunks against the same history: the bound limits
    memory, never results. With a cache, the keys and values of histories are kept between steps;
    the scores are the same up to rounding. `lookup` finds the embeddings; None leaves it to the model.
    `graphs` runs the block of cached steps of sizes that it captured; what it captures as it meets it, it does before
    the next step, or when `capture_pending` of it is called, as who times steps does.
    """

    def __init__(
        self,
        model: RankingModel,
        impl: str = "auto",
        cache: KVCacheManager | None = None,
        lookup: Lookup | None = None,
        graphs: CapturedBlock | None = None,
    ) -> None:
        self.model = model
        self.impl = impl
        self.cache = cache
        self.lookup = lookup
        self.graphs = graphs
        self.few_shapes = prefers_few_shapes(model.device)
        self.weights = WeightsIdentity(model)

    @torch.no_grad()
    def step(self, requests: Sequence[UserRequest], *, use_cache: bool = True) -> StepResult:
        """Score every candidate of one request or more; InputError for an id outside a table without keys.

        use_cache: False leaves the cache alone, as if there were none.
        """
        if self.cache is None or not use_cache:
            return self._score(requests, None)
        if self.graphs is not None:
            self.graphs.capture_pending()
        num_tokens = [request.num_history_tokens(self.model.config) for request in requests]
        groups = self.cache.split([request.user_id for request in requests], num_tokens)
        results = [self._step_group([requests[i] for i in members], cached) for members, cached in groups]
        return results[0] if len(results) == 1 else _joined(results)

    def _step_group(self, requests: Sequence[UserRequest], cached: bool) -> StepResult:
        """A step on requests that fit into the cache together, or on one that does not fit at all."""
        if not cached:
            return self._score(requests, None)
        identity = self.weights.current()
        fingerprints = [_fingerprint(self.model.config, identity, request) for request in requests]
        batch = self.cache.prepare([request.user_id for request in requests], fingerprints)
        try:
            result = self._score(requests, batch)
        except BaseException:
            self.cache.cancel(batch)
            raise
        self.cache.complete(batch)
        return result

    def _score(self, requests: Sequence[UserRequest], cache: CacheBatch | None) -> StepResult:
        """Run the model over the requests, in as many rounds as the most candidates need."""
        limit = self.model.config.max_candidates
        logits: list[list[np.ndarray]] = [[] for _ in requests]
        most = max((len(request.candidates) for request in requests), default=0)
        for start in range(0, max(most, 1), limit):
            members = [i for i, r in enumerate(requests) if start == 0 or start < len(r.candidates)]
            chunks = [replace(requests[i], candidates=requests[i].candidates[start : start + limit]) for i in members]
            hidden, batch = self._forward(chunks, cache, members, first=start == 0)  # hidden [T, D]
            last_rows = batch.last_rows()
            rows = [batch.candidate_rows(), last_rows[last_rows >= 0]]
            num_scores, num_last = map(len, rows)
            if self.few_shapes:
                rows = [padded(r, bucket(len(r))) for r in rows]
            candidate_rows, rows_with_last = upload(rows, self.model.device)
            if start == 0:
                has_last = (last_rows >= 0).numpy()
                last_hidden = hidden[rows_with_last][:num_last]
            scores = self.model.rank(hidden[candidate_rows])
            scores = scores.cpu().numpy()[:num_scores]  # the one place that waits for the device
            ends = np.cumsum([len(chunk.candidates) for chunk in chunks])
            for i, part in zip(members, np.split(scores, ends[:-1]), strict=True):
                logits[i].append(part)
        return StepResult(np.concatenate([part for parts in logits for part in parts]), last_hidden, has_last)

    def _forward(
        self, requests: Sequence[UserRequest], cache: CacheBatch | None, members: Sequence[int], *, first: bool
    ) -> tuple[torch.Tensor, TokenBatch]:
        """The block's output for the tokens that must be computed, and these tokens (on the host).

        members: which requests of the cache batch these are. first: the round that computes the
        history; a later one has its keys and values where there is a cache.
        """
        config = self.model.config
        num_cached = None
        if cache is not None:
            num_cached = cache.num_cached_tokens if first else [cache.requests[i].num_tokens for i in members]
        batch = build_token_batch(config, requests, num_cached)
        self.model.check_ids(batch)
        device = self.model.device
        run = batch.in_bucket() if self.few_shapes else batch
        on_device = run.to(device)
        if cache is None:
            plan = replace(batch.plan(device), num_tokens=run.num_tokens)
            return self.model(on_device, JaggedAttention(config, plan, self.impl), self.lookup), batch
        # On the host, like the page tables: it all goes to the device together.
        plan = replace(batch.plan(), num_tokens=run.num_tokens)
        if first:
            attention = cache.attention(config, plan, self.impl)
        else:
            attention = cache.candidate_attention(config, members, plan, self.impl)
        if self.graphs is not None:
            return self.graphs.run(self.model.embed(on_device, self.lookup), attention), batch
        return self.model(on_device, attention.to(device), self.lookup), batch


def _fingerprint(config: ModelConfig, identity: bytes, request: UserRequest) -> HistoryFingerprint:
    """The history of a request as the model sees it."""
    start = config.window_start(len(request.video_ids))
    return HistoryFingerprint(
        identity, request.context, request.video_ids[start:], request.action_weights[start:], start
    )


def _joined(results: Sequence[StepResult]) -> StepResult:
    """The results of consecutive requests as one."""
    return StepResult(
        np.concatenate([result.logits for result in results]),
        torch.cat([result.last_hidden for result in results]),
        np.concatenate([result.has_last for result in results]),
    )
