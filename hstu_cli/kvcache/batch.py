"""A batch on the cache: which tokens each request skips, and the attention of those that it computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hstu_cli.config import ModelConfig
from hstu_cli.kernels import append_to_pages, hstu_paged_attention
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
    reservation: Reservation
    host_hold: Hold
    jobs: list[TransferJob] = field(default_factory=list)

    @property
    def num_cached_tokens(self) -> list[int]:
        """Tokens that each request skips."""
        return [request.num_cached for request in self.requests]

    def attention(
        self, config: ModelConfig, seq_offsets: torch.Tensor, num_candidates: torch.Tensor, impl: str
    ) -> "PagedAttention":
        """Attention of the run that computes all tokens that are not skipped, and stores the new ones.

        seq_offsets [B + 1], num_candidates [B] int64: the batch of those tokens.
        """
        rows, slots = self._new_slots(seq_offsets.tolist())
        return self._attention(
            config, self.requests, self.num_cached_tokens, seq_offsets, num_candidates, impl, rows, slots
        )

    def candidate_attention(
        self,
        config: ModelConfig,
        members: Sequence[int],
        seq_offsets: torch.Tensor,
        num_candidates: torch.Tensor,
        impl: str,
    ) -> "PagedAttention":
        """Attention of more candidates of some requests, after the first run: all history is in pages."""
        requests = [self.requests[i] for i in members]
        lengths = [request.num_tokens for request in requests]
        nothing = np.empty(0, np.int64)
        return self._attention(config, requests, lengths, seq_offsets, num_candidates, impl, nothing, nothing)

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
        seq_offsets: torch.Tensor,
        num_candidates: torch.Tensor,
        impl: str,
        rows: np.ndarray,
        slots: np.ndarray,
    ) -> "PagedAttention":
        device = self.storage.pages.device
        tables = [request.pages for request in requests]
        return PagedAttention(
            config=config,
            storage=self.storage,
            jobs=self.jobs,
            seq_offsets=seq_offsets.to(device),
            num_candidates=num_candidates.to(device),
            page_indptr=torch.tensor([0, *map(len, tables)]).cumsum(0).to(device),
            page_ids=torch.tensor([page for table in tables for page in table], dtype=torch.int64, device=device),
            cached_lengths=torch.tensor(cached_lengths, dtype=torch.int64, device=device),
            new_rows=torch.from_numpy(rows).to(device),
            new_slots=torch.from_numpy(slots).to(device),
            impl=impl,
        )


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """The attention of one run over a cache batch; see `hstu_paged_attention` for the tensors."""

    config: ModelConfig
    storage: PageStorage
    jobs: list[TransferJob]
    seq_offsets: torch.Tensor
    num_candidates: torch.Tensor
    page_indptr: torch.Tensor
    page_ids: torch.Tensor
    cached_lengths: torch.Tensor
    new_rows: torch.Tensor
    new_slots: torch.Tensor
    impl: str

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Wait for this layer's pages, store what is new, and attend: q, k, v and result [T, H, d]."""
        for job in self.jobs:
            job.wait_layer(layer)
        pages = self.storage.pages[layer]
        if len(self.new_rows):
            append_to_pages(k, v, self.new_rows, pages, self.new_slots)
        return hstu_paged_attention(
            q,
            k,
            v,
            self.seq_offsets,
            self.num_candidates,
            pages,
            self.page_indptr,
            self.page_ids,
            self.cached_lengths,
            alpha=self.config.alpha,
            scaling_seqlen=self.config.scaling_seqlen,
            impl=self.impl,
        )
