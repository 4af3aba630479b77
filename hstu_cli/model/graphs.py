"""Runs the block over cached steps as graphs: captured once for a few sizes, replayed on padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hstu_cli.backend import Backend
from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels import BatchPlan, PagePlan, plan_batch, plan_pages
from hstu_cli.kvcache import KVCacheManager
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.model.buckets import Bucket, smallest_that_holds
from hstu_cli.model.captured import CapturedBlock, packed_length, packed_places, upload_packed
from hstu_cli.model.layer import Attention, HSTUBlock

# Shapes: a bucket of T tokens and B sequences; n tokens of a batch, D hidden_dim, P page ids.

CAPTURABLE = ("triton",)
"""Implementations that learn a batch's sizes on the device; the others loop over them on the host."""

CAPTURABLE_IN_SHAPES = ("blocked",)
"""Those that compute the same for all batches of one padded shape, on devices that batches are padded for."""


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """Whether graphs are used, and why, as table and JSON show it."""

    enabled: bool
    reason: str


def choose_graphs(requested: bool | None, backend: Backend, impl: str, *, cached: bool) -> GraphChoice:
    """Resolve `--cuda-graph/--no-cuda-graph`, of which None is neither; what is asked for is done or refused.

    cached: the run has a KV cache. Raises UnavailableError where the backend has no graphs, UsageError for an
    implementation that cannot be captured and for a run without a cache.
    """
    if requested is False:
        return GraphChoice(False, "as requested")
    absent, impossible = backend.why_no_graphs(), why_not_captured(impl, backend, cached=cached)
    if requested and absent:
        raise UnavailableError(f"--cuda-graph: {absent}.")
    if requested and impossible:
        raise UsageError(f"--cuda-graph: {impossible}.")
    if requested:
        return GraphChoice(True, "as requested")
    if reason := absent or impossible or backend.why_graphs_only_on_request:
        return GraphChoice(False, f"auto: {reason}")
    return GraphChoice(True, f"auto: impl {impl} can be captured")


def why_not_captured(impl: str, backend: Backend | type[Backend], *, cached: bool = True) -> str | None:
    """Why a run with this implementation cannot be captured on such a device, as a clause; None where it can."""
    if not cached:
        return "graphs run cached steps alone, and there is no KV cache"
    capturable = CAPTURABLE_IN_SHAPES if backend.few_shapes else CAPTURABLE
    if impl not in capturable:
        return f"impl {impl} reads a batch's sizes on the host, so it cannot be captured; {', '.join(capturable)} can"
    return None


class GraphRunner(CapturedBlock[Bucket]):
    """Graphs for a few sizes that are known ahead, with an implementation that reads lengths on the device.

    A step is padded to its bucket by sequences of length 0 and by rows that no sequence has.
    """

    def __init__(
        self,
        layers: HSTUBlock,
        cache: KVCacheManager,
        impl: str,
        buckets: Sequence[Bucket],
    ) -> None:
        """Graphs are not captured yet: `capture` does that, before anything is timed."""
        self.buckets = sorted(buckets)
        most_tokens = max(bucket.num_tokens for bucket in self.buckets)
        most_sequences = max(bucket.batch_size for bucket in self.buckets)
        super().__init__(layers, cache, impl, most_tokens)
        self.max_new_tokens = self.config.max_history_tokens + self.config.max_candidates
        # Users are distinct and windows bounded, so no step has more pages than this.
        self.max_pages = min(cache.config.num_pages, most_sequences * cache.pages_for(self.config.max_history_tokens))
        # The memory that all buckets share: each uses the first part of every buffer.
        largest, device = Bucket(most_tokens, most_sequences), self.storage.pages.device
        self._int32 = torch.zeros(packed_length(self._int32_sizes(largest)), dtype=torch.int32, device=device)
        self._int64 = torch.zeros(packed_length(_int64_sizes(largest)), dtype=torch.int64, device=device)

    def sizes_to_capture(self) -> list[Bucket]:
        """See `CapturedBlock`: the largest first, as the others then fit into the memory of its intermediates."""
        return self.buckets[::-1]

    def size_for(self, attention: PagedAttention) -> Bucket | None:
        """See `CapturedBlock`: none for a step beyond all buckets that were captured, or beyond their bounds."""
        plan, pages = attention.plan, attention.page_plan
        within_bounds = (
            plan.max_new_tokens <= self.max_new_tokens
            and pages.max_cached_tokens <= self.config.max_history_tokens
            and len(pages.page_ids) <= self.max_pages
        )
        return smallest_that_holds(self._captured, plan.num_tokens, plan.num_sequences) if within_bounds else None

    def input_of(self, size: Bucket) -> torch.Tensor:
        """See `CapturedBlock`."""
        return self._x[: size.num_tokens]

    def static_attention(self, size: Bucket) -> Attention:
        """See `CapturedBlock`: sizes are on the device alone, and bounded."""
        storage, config = self.storage, self.config
        parts = packed_places(self._int32_sizes(size))
        offsets, candidates, indptr, lengths, ids = (self._int32[part] for part in parts)
        plan = BatchPlan(
            seq_offsets=offsets,
            num_candidates=candidates,
            num_tokens=size.num_tokens,
            max_new_tokens=min(size.num_tokens, self.max_new_tokens),
            offsets=None,
            candidates=None,
        )
        page_plan = PagePlan(
            page_indptr=indptr,
            page_ids=ids,
            cached_lengths=lengths,
            num_pages=storage.pages.shape[1],
            page_size=storage.pages.shape[3],
            max_cached_tokens=config.max_history_tokens,
            tables=None,
            lengths=None,
        )
        rows, slots = (self._int64[part] for part in packed_places(_int64_sizes(size)))
        return PagedAttention(config, storage, [], plan, page_plan, rows, slots, self.impl, self.cache.append.name)

    def load_full_step(self, size: Bucket) -> None:
        """See `CapturedBlock`: what warms up, and is tuned for, is like a full batch."""
        each = min(size.num_tokens // size.batch_size, self.max_new_tokens)
        page_size = self.storage.pages.shape[3]
        pages_each = self.max_pages // size.batch_size
        cached = min(pages_each * page_size, self.config.max_history_tokens)
        sequences = torch.arange(size.batch_size + 1)
        num_tokens = size.batch_size * each
        page_plan = plan_pages(
            sequences * pages_each,
            torch.arange(size.batch_size * pages_each),
            torch.full((size.batch_size,), cached),
            num_sequences=size.batch_size,
            num_pages=self.storage.pages.shape[1],
            page_size=page_size,
            device="cpu",
        )
        plan = plan_batch(sequences * each, None, num_tokens, "cpu")
        nothing = torch.empty(0, dtype=torch.int64)
        step = PagedAttention(
            self.config, self.storage, [], plan, page_plan, nothing, nothing, self.impl, self.cache.append.name
        )
        self.load(size, torch.zeros_like(self._x[:num_tokens]), step)

    def load(self, size: Bucket, x: torch.Tensor, attention: PagedAttention) -> None:
        """See `CapturedBlock`: three copies."""
        plan, pages = attention.plan, attention.page_plan
        tokens, sequences = size.num_tokens, size.batch_size
        stored = len(attention.new_rows)
        upload_packed(
            self._int32,
            [
                _padded(plan.seq_offsets, sequences + 1, plan.num_tokens),
                _padded(plan.num_candidates, sequences, 0),
                _padded(pages.page_indptr, sequences + 1, len(pages.page_ids)),
                _padded(pages.cached_lengths, sequences, 0),
                pages.page_ids,
            ],
        )
        slots = torch.cat([attention.new_slots, self._padding_slots[: tokens - stored]])
        upload_packed(self._int64, [_padded(attention.new_rows, tokens, 0), slots])
        self._x[: len(x)].copy_(x)
        self._x[len(x) : tokens].zero_()  # else what earlier steps left there would grow from replay to replay

    def described(self, size: Bucket) -> dict[str, int]:
        """See `CapturedBlock`."""
        return {"batch_size": size.batch_size, "num_tokens": size.num_tokens}

    def buffer_bytes(self) -> int:
        """See `CapturedBlock`."""
        return super().buffer_bytes() + self._int32.nbytes + self._int64.nbytes

    def _int32_sizes(self, bucket: Bucket) -> list[torch.Tensor]:
        """Empty tensors as long as those in the int32 buffer; the page ids come last, so a step may bring fewer."""
        sequences = bucket.batch_size
        sizes = (sequences + 1, sequences, sequences + 1, sequences, self.max_pages)
        return [torch.empty(size, dtype=torch.int32) for size in sizes]


def _int64_sizes(bucket: Bucket) -> list[torch.Tensor]:
    """Empty tensors as long as those in the int64 buffer: a row and a slot for each token."""
    return [torch.empty(bucket.num_tokens, dtype=torch.int64) for _ in range(2)]


def _padded(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """A row of integers made longer with a value."""
    return F.pad(tensor, (0, length - len(tensor)), value=value)
