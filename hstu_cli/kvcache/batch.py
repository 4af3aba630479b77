"""A batch on the cache: which tokens each request skips, and the attention of those that it computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hstu_cli.backend import prefers_few_shapes, upload
from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, LayerPages, PagePlan, plan_pages
from hstu_cli.kernels.buckets import bucket, padded
from hstu_cli.kvcache.fingerprint import HistoryFingerprint
from hstu_cli.kvcache.storage import PageStorage
from hstu_cli.kvcache.tier import Hold, Reservation
from hstu_cli.kvcache.transfers import TransferJob

# Shapes: B requests, T new tokens of the batch, H heads, d head_dim.


@dataclass(frozen=True, slots=True)
class CachedRequest:
    """One request of a batch: its pages, and how many of its tokens are known.

    num_known: tokens in the pages already; num_cached: tokens that the run skips, at least one less
    than there are before the candidates.
    """

    user_id: int
    fingerprint: HistoryFingerprint
    pages: list[int]
    num_known: int
    num_cached: int
    from_host: bool

    @property
    def num_tokens(self) -> int:
        """Tokens before the candidates."""
        return self.fingerprint.num_tokens


@dataclass(frozen=True, slots=True)
class CacheBatch:
    """What `KVCacheManager.prepare` reserved: to be run, then completed or cancelled."""

    requests: list[CachedRequest]
    storage: PageStorage
    page_size: int
    append_impl: str
    reservation: Reservation
    host_hold: Hold
    jobs: list[TransferJob] = field(default_factory=list)

    @property
    def num_cached_tokens(self) -> list[int]:
        """Tokens that each request skips."""
        return [request.num_cached for request in self.requests]

    def attention(self, config: ModelConfig, plan: BatchPlan, impl: str) -> "PagedAttention":
        """Attention of the run that computes all tokens that are not skipped, and stores the new ones.

        plan: the batch of those tokens; on the host, so are all tensors of the result, which `to` then brings to
          the device of the pages.
        """
        rows, slots = self._new_slots(plan.on_host()[0])
        return self._attention(config, self.requests, self.num_cached_tokens, plan, impl, rows, slots)

    def candidate_attention(
        self, config: ModelConfig, members: Sequence[int], plan: BatchPlan, impl: str
    ) -> "PagedAttention":
        """Attention of more candidates of some requests, after the first run: all history is in pages."""
        requests = [self.requests[i] for i in members]
        lengths = [request.num_tokens for request in requests]
        nothing = np.empty(0, np.int64)
        return self._attention(config, requests, lengths, plan, impl, nothing, nothing)

    def _new_slots(self, offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the batch whose keys and values are new, and their slots in the pages."""
        rows, slots = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for request, offset in zip(self.requests, offsets, strict=False):
            token = np.arange(request.num_known, request.num_tokens)
            pages = np.asarray(request.pages, np.int64)
            rows.append(offset + token - request.num_cached)
            slots.append(pages[token // self.page_size] * self.page_size + token % self.page_size)
        return np.concatenate(rows), np.concatenate(slots)

    def _attention(
        self,
        config: ModelConfig,
        requests: Sequence[CachedRequest],
        cached_lengths: Sequence[int],
        plan: BatchPlan,
        impl: str,
        rows: np.ndarray,
        slots: np.ndarray,
    ) -> "PagedAttention":
        device, pages = plan.seq_offsets.device, self.storage.pages
        new_rows, new_slots = torch.from_numpy(rows), torch.from_numpy(slots)
        if prefers_few_shapes(pages.device):  # padding goes to the last page, which no user has
            length = bucket(len(rows))
            spare = (pages.shape[1] - 1) * self.page_size + torch.arange(length - len(rows)) % self.page_size
            new_rows, new_slots = padded(new_rows, length), torch.cat([new_slots, spare])
        tables = [request.pages for request in requests]
        page_plan = plan_pages(
            torch.tensor([0, *map(len, tables)]).cumsum(0),
            torch.tensor([page for table in tables for page in table], dtype=torch.int64),
            torch.tensor(cached_lengths, dtype=torch.int64),
            num_sequences=plan.num_sequences,
            num_pages=pages.shape[1],
            page_size=self.page_size,
            device=device,
            history_stored=True,
        )
        return PagedAttention(
            config=config,
            storage=self.storage,
            jobs=self.jobs,
            plan=plan,
            page_plan=page_plan,
            new_rows=new_rows.to(device),
            new_slots=new_slots.to(device),
            impl=impl,
            append_impl=self.append_impl,
        )


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """The attention of one run over a cache batch, planned once for all layers.

    jobs: copies into and out of the pages; a layer waits for its own alone.
    new_rows, new_slots: int64 [n], which of the batch's tokens are stored and where; see `append_to_pages`.
    The tensors are on the device of the pages, or on the host until `to` brings them there.
    """

    config: ModelConfig
    storage: PageStorage
    jobs: list[TransferJob]
    plan: BatchPlan
    page_plan: PagePlan
    new_rows: torch.Tensor
    new_slots: torch.Tensor
    impl: str
    append_impl: str = "torch"

    def to(self, device: torch.device) -> "PagedAttention":
        """The same with its tensors on a device: two copies, for which nobody waits."""
        plan, pages = self.plan, self.page_plan
        offsets, candidates, indptr, ids, lengths = upload(
            [plan.seq_offsets, plan.num_candidates, pages.page_indptr, pages.page_ids, pages.cached_lengths], device
        )
        rows, slots = upload([self.new_rows, self.new_slots], device)
        return replace(
            self,
            plan=replace(plan, seq_offsets=offsets, num_candidates=candidates),
            page_plan=replace(pages, page_indptr=indptr, page_ids=ids, cached_lengths=lengths),
            new_rows=rows,
            new_slots=slots,
        )

    def pages_of(self, layer: int) -> LayerPages:
        """What is cached for a layer; who stores into its pages waits for the copies of this layer alone."""

        def wait() -> None:
            for job in self.jobs:
                job.wait_layer(layer)

        return LayerPages(
            self.storage.pages[layer], self.page_plan, self.new_rows, self.new_slots, self.append_impl, wait
        )
