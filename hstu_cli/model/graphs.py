"""Runs the block over cached steps as graphs: captured once for a few sizes, replayed on padded batches."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hstu_cli.backend import Backend, Graph, GraphPool, packed
from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels import BatchPlan, PagePlan, plan_batch, plan_pages
from hstu_cli.kvcache import KVCacheManager
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.model.buckets import Bucket, smallest_that_holds
from hstu_cli.model.layer import Attention, HSTUBlock

# Shapes: a bucket of T tokens and B sequences; n tokens of a batch, D hidden_dim, P page ids.

CAPTURABLE = ("triton",)
"""Implementations that learn a batch's sizes on the device; the others loop over them on the host."""


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
    absent, impossible = backend.why_no_graphs(), why_not_captured(impl, cached=cached)
    if requested and absent:
        raise UnavailableError(f"--cuda-graph: {absent}.")
    if requested and impossible:
        raise UsageError(f"--cuda-graph: {impossible}.")
    if absent or impossible:
        return GraphChoice(False, f"auto: {absent or impossible}")
    return GraphChoice(True, "as requested" if requested else f"auto: impl {impl} can be captured")


def why_not_captured(impl: str, *, cached: bool = True) -> str | None:
    """Why a run with this implementation cannot be captured, as a clause; None where it can."""
    if not cached:
        return "graphs run cached steps alone, and there is no KV cache"
    if impl not in CAPTURABLE:
        return f"impl {impl} reads a batch's sizes on the host, so it cannot be captured; {', '.join(CAPTURABLE)} can"
    return None


class GraphRunner:
    """The block over a KV cache, from graphs where a step fits into a bucket, else as ever.

    A graph repeats the same operations on the same memory. So a step is written into buffers that live as long as the
    runner, and padded to its bucket: sequences of length 0, rows that no sequence has, and for what those rows append
    slots that no user has. With a host tier there is a graph for each layer, and the copies of a layer's pages are
    waited for between two of them; without one there is a single graph.
    """

    def __init__(
        self,
        layers: HSTUBlock,
        cache: KVCacheManager,
        impl: str,
        buckets: Sequence[Bucket],
    ) -> None:
        """Graphs are not captured yet: `capture` does that, before anything is timed."""
        self.layers, self.cache, self.impl = layers, cache, impl
        self.config, self.storage = cache.model, cache.device_storage
        self.buckets = sorted(buckets)
        self.is_layerwise = cache.host is not None
        self.max_new_tokens = self.config.max_history_tokens + self.config.max_candidates
        self.left_out: list[Bucket] = []
        self.replays = 0
        self.eager_steps = 0
        self.capture_ms = 0.0
        self._captured: dict[Bucket, list[Graph]] = {}  # a graph for each layer, or one for all
        self._weights: list[tuple[torch.nn.Module, str, int]] = []
        self._pool: GraphPool | None = None
        self._allocate()

    def _allocate(self) -> None:
        """The memory that all buckets share: each uses the first part of every buffer."""
        pages, config = self.storage.pages, self.config
        most_tokens = max(bucket.num_tokens for bucket in self.buckets)
        most_sequences = max(bucket.batch_size for bucket in self.buckets)
        # Users are distinct and windows bounded, so no step has more pages than this.
        self.max_pages = min(
            self.cache.config.num_pages, most_sequences * self.cache.pages_for(config.max_history_tokens)
        )
        device = pages.device
        self._x = torch.zeros(most_tokens, config.hidden_dim, dtype=pages.dtype, device=device)
        largest = Bucket(most_tokens, most_sequences)
        self._int32 = torch.zeros(_length(self._int32_sizes(largest)), dtype=torch.int32, device=device)
        self._int64 = torch.zeros(_length(_int64_sizes(largest)), dtype=torch.int64, device=device)
        slots = self.cache.spare_slots
        self._padding_slots = torch.arange(most_tokens) % len(slots) + slots.start

    @torch.no_grad()
    def capture(self, on_bucket: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture every bucket, the largest first: the others then fit into the memory of its intermediates.

        A bucket for which memory does not suffice is left out, and its steps run in a larger one or without a graph.
        on_bucket: called with the buckets that are done and all of them.
        """
        start = time.perf_counter()
        self._captured, self.left_out = {}, []
        self._pool = self.cache.backend.graph_pool()
        self._weights = [
            (module, name, weight.data_ptr())
            for module in self.layers.modules()
            for name, weight in module.named_parameters(recurse=False)
        ]
        for done, bucket in enumerate(reversed(self.buckets)):
            on_bucket(done, len(self.buckets))
            graphs = self._capture_if_it_fits(bucket)
            if graphs is None:
                self.left_out.append(bucket)
                self._pool.release()  # of the graphs of layers that came before the one for which memory ran out
            else:
                self._captured[bucket] = graphs
        on_bucket(len(self.buckets), len(self.buckets))
        self.cache.backend.synchronize()
        self.capture_ms = (time.perf_counter() - start) * 1e3

    @torch.no_grad()
    def run(self, x: torch.Tensor, attention: PagedAttention) -> torch.Tensor:
        """The block's output [n, D] for the token embeddings x [n, D] of a step; its attention is on the host.

        A result from a graph is overwritten by the next run. ValueError for an x that the graphs cannot read.
        """
        if x.shape[1:] != self._x.shape[1:] or x.dtype != self._x.dtype or x.device != self._x.device:
            raise ValueError(
                f"x must be [tokens, {self._x.shape[1]}] {self._x.dtype} on {self._x.device}, "
                f"not {list(x.shape)} {x.dtype} on {x.device}"
            )
        bucket = self.bucket_for(attention)
        if bucket is None:
            self.eager_steps += 1
            return self.layers(x, attention.to(x.device))
        if any(getattr(module, name).data_ptr() != address for module, name, address in self._weights):
            self.capture()  # the graphs would go on reading weights that were replaced
            bucket = self.bucket_for(attention)
            if bucket is None:
                return self.run(x, attention)
        self._load(bucket, x, attention)
        for layer, graph in enumerate(self._captured[bucket]):
            for job in attention.jobs:
                if self.is_layerwise:
                    job.wait_layer(layer)
                else:
                    job.wait()
            graph.replay()
        self.replays += 1
        return self._x[: x.shape[0]]

    def bucket_for(self, attention: PagedAttention) -> Bucket | None:
        """The bucket in which a step runs; None for one beyond all that were captured, or beyond their bounds."""
        plan, pages = attention.plan, attention.page_plan
        within_bounds = (
            plan.max_new_tokens <= self.max_new_tokens
            and pages.max_cached_tokens <= self.config.max_history_tokens
            and len(pages.page_ids) <= self.max_pages
        )
        return smallest_that_holds(self._captured, plan.num_tokens, plan.num_sequences) if within_bounds else None

    def summary(self) -> dict[str, Any]:
        """What was captured and replayed, named as in the JSON record."""
        buffers = sum(tensor.nbytes for tensor in (self._x, self._int32, self._int64))
        return {
            "buckets": [_described(bucket) for bucket in sorted(self._captured)],
            "left_out": [_described(bucket) for bucket in sorted(self.left_out)],
            "layerwise": self.is_layerwise,
            "captured_graphs": sum(map(len, self._captured.values())),
            "capture_ms": self.capture_ms,
            "memory_bytes": buffers + (self._pool.memory_bytes if self._pool else 0),
            "replays": self.replays,
            "eager_steps": self.eager_steps,
        }

    def static_attention(self, bucket: Bucket) -> Attention:
        """The attention of a bucket's captured batch: sizes are on the device alone, and bounded."""
        storage, config = self.storage, self.config
        parts = _places(self._int32_sizes(bucket))
        offsets, candidates, indptr, lengths, ids = (self._int32[part] for part in parts)
        plan = BatchPlan(
            seq_offsets=offsets,
            num_candidates=candidates,
            num_tokens=bucket.num_tokens,
            max_new_tokens=min(bucket.num_tokens, self.max_new_tokens),
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
        rows, slots = (self._int64[part] for part in _places(_int64_sizes(bucket)))
        return PagedAttention(config, storage, [], plan, page_plan, rows, slots, self.impl, self.cache.append.name)

    def _capture_if_it_fits(self, bucket: Bucket) -> list[Graph] | None:
        """The graphs of a bucket, or None where memory does not suffice."""
        x, attention = self._x[: bucket.num_tokens], self.static_attention(bucket)
        layers = list(enumerate(self.layers))
        parts = [[layer] for layer in layers] if self.is_layerwise else [layers]

        def work(part: Sequence[tuple[int, torch.nn.Module]]) -> None:
            hidden = x
            for index, layer in part:
                hidden = layer(hidden, attention, index)
            x.copy_(hidden)

        self._load(bucket, *self._full_step(bucket))
        try:
            return [self._pool.capture(partial(work, part)) for part in parts]
        except (RuntimeError, UnavailableError) as error:  # the latter where no configuration of a kernel had room
            if "out of memory" not in str(error).lower():
                raise
            return None

    def _full_step(self, bucket: Bucket) -> tuple[torch.Tensor, PagedAttention]:
        """A step as heavy as the bucket allows, which stores nothing: what warms up, and is tuned for, is like it."""
        each = min(bucket.num_tokens // bucket.batch_size, self.max_new_tokens)
        page_size = self.storage.pages.shape[3]
        pages_each = self.max_pages // bucket.batch_size
        cached = min(pages_each * page_size, self.config.max_history_tokens)
        sequences = torch.arange(bucket.batch_size + 1)
        num_tokens = bucket.batch_size * each
        page_plan = plan_pages(
            sequences * pages_each,
            torch.arange(bucket.batch_size * pages_each),
            torch.full((bucket.batch_size,), cached),
            num_sequences=bucket.batch_size,
            num_pages=self.storage.pages.shape[1],
            page_size=page_size,
            device="cpu",
        )
        plan = plan_batch(sequences * each, None, num_tokens, "cpu")
        nothing = torch.empty(0, dtype=torch.int64)
        x = torch.zeros_like(self._x[:num_tokens])
        return x, PagedAttention(
            self.config, self.storage, [], plan, page_plan, nothing, nothing, self.impl, self.cache.append.name
        )

    def _load(self, bucket: Bucket, x: torch.Tensor, attention: PagedAttention) -> None:
        """Write a step into the buffers, padded to the bucket; three copies, for which nobody waits."""
        plan, pages = attention.plan, attention.page_plan
        tokens, sequences = bucket.num_tokens, bucket.batch_size
        stored = len(attention.new_rows)
        self._upload(
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
        self._upload(self._int64, [_padded(attention.new_rows, tokens, 0), slots])
        self._x[: len(x)].copy_(x)
        self._x[len(x) : tokens].zero_()  # else what earlier steps left there would grow from replay to replay

    def _upload(self, buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        host, _ = packed(parts, buffer.device)
        buffer[: len(host)].copy_(host, non_blocking=True)

    def _int32_sizes(self, bucket: Bucket) -> list[torch.Tensor]:
        """Empty tensors as long as those in the int32 buffer; the page ids come last, so a step may bring fewer."""
        sequences = bucket.batch_size
        sizes = (sequences + 1, sequences, sequences + 1, sequences, self.max_pages)
        return [torch.empty(size, dtype=torch.int32) for size in sizes]


def _int64_sizes(bucket: Bucket) -> list[torch.Tensor]:
    """Empty tensors as long as those in the int64 buffer: a row and a slot for each token."""
    return [torch.empty(bucket.num_tokens, dtype=torch.int64) for _ in range(2)]


def _length(parts: Sequence[torch.Tensor]) -> int:
    """Of the buffer in which these lie at aligned places."""
    return len(packed(parts, torch.device("cpu"))[0])


def _places(parts: Sequence[torch.Tensor]) -> list[slice]:
    """Where they lie there."""
    return packed(parts, torch.device("cpu"))[1]


def _padded(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """A row of integers made longer with a value."""
    return F.pad(tensor, (0, length - len(tensor)), value=value)


def _described(bucket: Bucket) -> dict[str, int]:
    return {"batch_size": bucket.batch_size, "num_tokens": bucket.num_tokens}
