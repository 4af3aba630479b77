"""Graphs on a CPU: a backend that keeps captured work and does it again on replay."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, LayerPages, plan_batch, plan_pages
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
    def config(self) -> ModelConfig:
        return self.static.config

    @property
    def impl(self) -> str:
        return self.static.impl

    @property
    def plan(self) -> BatchPlan:
        static = self.static.plan
        batch = plan_batch(static.seq_offsets, static.num_candidates, int(static.seq_offsets[-1]), "cpu")
        return replace(batch, num_tokens=static.num_tokens)  # rows of padding too

    def pages_of(self, layer: int) -> LayerPages:
        static, pages = self.static.plan, self.static.page_plan
        page_plan = plan_pages(
            pages.page_indptr, pages.page_ids[: int(pages.page_indptr[-1])], pages.cached_lengths,
            num_sequences=static.num_sequences, num_pages=pages.num_pages, page_size=pages.page_size, device="cpu",
        )  # fmt: skip
        return replace(self.static.pages_of(layer), plan=page_plan)
