"""Graphs on a CPU: a backend that keeps captured work and does it again on replay."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hstu_cli.kernels import append_to_pages, paged_attention, plan_batch, plan_pages
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.model.buckets import Bucket
from hstu_cli.model.graphs import GraphRunner
from hstu_cli.model.layer import Attention
from support.deferred import DeferredBackend


@dataclass
class RecordedGraph:
    """Work that was captured; what it reads is read anew at each replay, as from fixed memory of a device."""

    work: Callable[[], object]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@dataclass
class RecordedPool:
    """Captures as a device does: the work runs once to warm up, and not while it is captured.

    fails_at: numbers of the captures that run out of memory; error: how that is told. Each graph takes 1000 bytes,
    which are free once it is gone, and given back by `release`.
    """

    fails_at: set[int] = field(default_factory=set)
    error: Exception = field(default_factory=lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    captured: list[weakref.ref[RecordedGraph]] = field(default_factory=list)
    num_tried: int = 0
    rounds: int = 0
    memory_bytes: int = 0

    @property
    def graphs(self) -> list[RecordedGraph]:
        """Those that somebody keeps."""
        return [graph for reference in self.captured if (graph := reference()) is not None]

    def capture(self, work: Callable[[], object]) -> RecordedGraph:
        self.num_tried += 1
        work()
        if self.num_tried in self.fails_at:
            raise self.error
        graph = RecordedGraph(work)
        self.captured.append(weakref.ref(graph))
        self.memory_bytes += 1000
        return graph

    def begin_round(self) -> None:
        self.rounds += 1

    def release(self) -> None:
        self.memory_bytes = 1000 * len(self.graphs)


class GraphBackend(DeferredBackend):
    """A CPU with graphs, and with copies that happen as late as the protocol allows."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.pool = RecordedPool()

    def why_no_graphs(self) -> None:
        return None

    def graph_pool(self) -> RecordedPool:
        return self.pool


class HostGraphRunner(GraphRunner):
    """A runner whose captured batches are planned on the host from what is in the buffers at that moment.

    So an implementation that needs lists of lengths can do what only Triton's kernels can on a GPU.
    """

    def static_attention(self, bucket: Bucket) -> Attention:
        return _PlannedAtReplay(super().static_attention(bucket))


@dataclass
class _PlannedAtReplay:
    static: PagedAttention

    @property
    def impl(self) -> str:
        return self.static.impl

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        static, batch, pages = self.static, self.static.plan, self.static.page_plan
        of_layer = static.storage.pages[layer]
        append_to_pages(k, v, static.new_rows, of_layer, static.new_slots)  # rows of padding too
        num_tokens = int(batch.seq_offsets[-1])
        plan = plan_batch(batch.seq_offsets, batch.num_candidates, num_tokens, "cpu")
        page_plan = plan_pages(
            pages.page_indptr, pages.page_ids[: int(pages.page_indptr[-1])], pages.cached_lengths,
            num_sequences=batch.num_sequences, num_pages=pages.num_pages, page_size=pages.page_size, device="cpu",
        )  # fmt: skip
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)  # what a row of padding holds is nobody's business
        out[:num_tokens] = paged_attention(
            q[:num_tokens], k[:num_tokens], v[:num_tokens], plan, of_layer, page_plan,
            alpha=static.config.alpha, scaling_seqlen=static.config.scaling_seqlen, impl=static.impl,
        )  # fmt: skip
        return out
