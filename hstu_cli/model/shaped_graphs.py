"""Graphs for devices that batches are padded for: captured for the padded shapes that steps turn out to have."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hstu_cli.backend import Graph, prefers_few_shapes
from hstu_cli.kernels import BatchPlan, PagePlan
from hstu_cli.kernels.attention.groups import SEEN, Group, GroupedBatch, PaddedSize, groups_of, planned_groups
from hstu_cli.kernels.buckets import bucket
from hstu_cli.kvcache import KVCacheManager
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.model.buckets import Bucket
from hstu_cli.model.captured import CapturedBlock, packed_length, packed_places, upload_packed
from hstu_cli.model.cost import attention_flops, linear_flops
from hstu_cli.model.graphs import GraphRunner
from hstu_cli.model.layer import HSTUBlock

# Shapes: a step of T tokens, padding included, with G sequences padded to R new tokens and P pages.

MOST_SHAPES = 32
"""Shapes for which graphs are captured: each takes memory, and a moment while nothing is computed."""

CAPTURED_AT = 2
"""A shape is captured when so many steps have had it: one that does not come again is not worth it."""

MOST_WASTE = 2.0
"""A batch runs as one size where a layer then computes at most so many times the FLOPs, padding included."""


@dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """What a graph depends on: T tokens, G sequences, and what each of them is padded to."""

    num_tokens: int
    num_sequences: int
    sequence: PaddedSize

    @classmethod
    def of(cls, attention: PagedAttention) -> "StepShape | None":
        """The shape of a step as one size of sequences; None where too much of it would be padding."""
        batch = GroupedBatch.of(attention.plan, attention.page_plan)
        if not batch.members:
            return None
        whole, num_tokens = batch.as_one_size(), attention.plan.num_tokens
        linear = linear_flops(attention.config, num_tokens)
        flops, least = (linear + attention_flops(attention.config, b.num_scores) for b in (whole, batch))
        if flops > MOST_WASTE * least:
            return None
        ((size, members),) = whole.members.items()
        return cls(num_tokens, sum(size.group_sizes(len(members), whole.page_size)), size)


@dataclass(frozen=True, slots=True)
class _StepBuffers:
    """What the graphs of one shape read, as parts of one int64 buffer, and how attention sees it."""

    whole: torch.Tensor
    parts: list[torch.Tensor]
    groups: list[Group]


class ShapedGraphRunner(CapturedBlock[StepShape]):
    """Graphs of blocked attention over groups of padded size, for the shapes that steps turn out to have.

    There are too many possible shapes to capture ahead. A step of a new one runs operator by operator; a shape that
    comes again is captured by `capture_pending` before the next step. All sequences of a captured step are padded to
    one size. What tells it which rows and pages to read is in a buffer of the device, which a step fills by one copy;
    masks follow from lengths, inside the graph.
    """

    learns_sizes = True

    def __init__(
        self,
        layers: HSTUBlock,
        cache: KVCacheManager,
        impl: str,
        most_tokens: int,
        *,
        captured_at: int = CAPTURED_AT,
        most_shapes: int = MOST_SHAPES,
    ) -> None:
        """Nothing is captured yet. most_tokens: steps with more, before padding, run without a graph.

        captured_at: how many steps of a shape it takes. most_shapes: so many are captured at most.
        """
        super().__init__(layers, cache, impl, bucket(most_tokens + 1))  # a padded batch has a row of padding
        self.captured_at, self.most_shapes = captured_at, most_shapes
        self.num_beyond = 0  # steps of shapes that came when there were `most_shapes` already
        self._seen: Counter[StepShape] = Counter()  # steps that had a shape without graphs
        self._pending: list[StepShape] = []
        self._buffers: dict[StepShape, _StepBuffers] = {}

    def sizes_to_capture(self) -> list[StepShape]:
        """See `CapturedBlock`: what was captured before, the largest first."""
        return sorted([*self._captured, *self.left_out], reverse=True)

    def capture(self, on_size: Callable[[int, int], None] = lambda done, total: None) -> None:
        """See `CapturedBlock`."""
        before = self.capture_ms
        sizes = self.sizes_to_capture()
        self._buffers = {}
        if sizes:
            super().capture(on_size)
            self.capture_ms += before

    @torch.no_grad()
    def capture_pending(self) -> None:
        """See `CapturedBlock`: shapes that came often enough; the engine calls this before a step."""
        if not self._pending:
            return
        start = time.perf_counter()
        pending, self._pending = self._pending, []
        self._capture_each(sorted(pending, reverse=True), lambda done, total: None)
        self.capture_ms += (time.perf_counter() - start) * 1e3

    def size_for(self, attention: PagedAttention) -> StepShape | None:
        """See `CapturedBlock`."""
        shape = StepShape.of(attention)
        return shape if shape in self._captured else None

    def input_of(self, size: StepShape) -> torch.Tensor:
        """See `CapturedBlock`."""
        return self._x[: size.num_tokens]

    def static_attention(self, size: StepShape) -> PagedAttention:
        """See `CapturedBlock`: groups whose numbers are read anew at each replay."""
        buffers = self._buffers_of(size)
        pages, page_size = self.storage.pages, self.storage.pages.shape[3]
        lengths = buffers.groups[0].num_new.new_zeros(size.num_sequences, dtype=torch.int32)
        plan = BatchPlan(
            seq_offsets=lengths.new_zeros(size.num_sequences + 1),
            num_candidates=lengths,
            num_tokens=size.num_tokens,
            max_new_tokens=size.sequence.num_new,
            offsets=None,
            candidates=None,
        )
        page_plan = PagePlan(
            page_indptr=plan.seq_offsets,
            page_ids=lengths,
            cached_lengths=lengths,
            num_pages=pages.shape[1],
            page_size=page_size,
            max_cached_tokens=size.sequence.num_pages * page_size,
            tables=None,
            lengths=None,
        )
        plan.once(SEEN, lambda: buffers.groups, page_plan)
        rows, slots = buffers.parts[-2:]
        return PagedAttention(
            self.config, self.storage, [], plan, page_plan, rows, slots, self.impl, self.cache.append.name
        )

    def load_full_step(self, size: StepShape) -> None:
        """See `CapturedBlock`: all lengths as long as they may be; results go to the row that is cut off."""
        num_tokens, num_sequences = size.num_tokens, size.num_sequences
        new = torch.full((num_sequences,), size.sequence.num_new)
        rows = torch.arange(num_sequences * size.sequence.num_new) % num_tokens
        pages = torch.zeros(num_sequences * size.sequence.num_pages, dtype=torch.int64)
        cached = torch.full((num_sequences,), size.sequence.num_pages * self.storage.pages.shape[3])
        nothing = torch.zeros(num_tokens, dtype=torch.int64)
        indices = [rows, torch.full_like(rows, num_tokens), pages, cached, new, new]
        upload_packed(self._buffers_of(size).whole, [*indices, nothing, self._padding_slots[:num_tokens]])
        self._x[:num_tokens].zero_()

    def load(self, size: StepShape, x: torch.Tensor, attention: PagedAttention) -> None:
        """See `CapturedBlock`: two copies."""
        batch = GroupedBatch.of(attention.plan, attention.page_plan).as_one_size()
        missing = size.num_tokens - len(attention.new_rows)
        rows = torch.cat([attention.new_rows, attention.new_rows.new_zeros(missing)])
        slots = torch.cat([attention.new_slots, self._padding_slots[:missing]])
        upload_packed(self._buffers_of(size).whole, [*batch.indices(size.sequence), rows, slots])
        self._x[: size.num_tokens].copy_(x)

    def described(self, size: StepShape) -> dict[str, int]:
        """See `CapturedBlock`."""
        return {
            "batch_size": size.num_sequences,
            "num_tokens": size.num_tokens,
            "new_tokens_each": size.sequence.num_new,
            "pages_each": size.sequence.num_pages,
        }

    def summary(self) -> dict[str, object]:
        """See `CapturedBlock`; and steps of shapes that came when there were graphs enough."""
        return super().summary() | {"most_shapes": self.most_shapes, "steps_beyond": self.num_beyond}

    def forget_counts(self) -> None:
        """See `CapturedBlock`."""
        super().forget_counts()
        self.num_beyond = 0

    def buffer_bytes(self) -> int:
        """See `CapturedBlock`."""
        return super().buffer_bytes() + sum(buffers.whole.nbytes for buffers in self._buffers.values())

    def _note_eager_step(self, attention: PagedAttention) -> None:
        """Have the step's shape captured if it came often enough, memory sufficed, and there are not too many."""
        shape = StepShape.of(attention)
        if shape is None or shape.num_tokens > len(self._x) or shape in self.left_out or shape in self._captured:
            return
        self._seen[shape] += 1
        if self._seen[shape] < self.captured_at or shape in self._pending:
            return
        if len(self._captured) + len(self._pending) < self.most_shapes:
            self._pending.append(shape)
        else:
            self.num_beyond += 1

    def _capture_if_it_fits(self, size: StepShape) -> list[Graph] | None:
        """See `CapturedBlock`: a shape that is left out keeps no buffer either."""
        graphs = super()._capture_if_it_fits(size)
        if graphs is None:
            self._buffers.pop(size, None)
        return graphs

    def _work(self, part: Sequence[tuple[int, torch.nn.Module]], x: torch.Tensor, attention: PagedAttention) -> None:
        """See `CapturedBlock`: masks are made where a graph begins, as lengths change, and kept nowhere beyond it."""
        try:
            super()._work(part, x, attention)
        finally:
            for group in planned_groups(attention.plan, attention.page_plan):
                group.masks.clear()

    def _buffers_of(self, size: StepShape) -> _StepBuffers:
        """The buffer of a shape, made when it is captured."""
        if size not in self._buffers:
            num_new, num_pages = (size.num_sequences * n for n in (size.sequence.num_new, size.sequence.num_pages))
            lengths = (num_new, num_new, num_pages, *[size.num_sequences] * 3, *[size.num_tokens] * 2)
            empty = [torch.empty(length, dtype=torch.int64) for length in lengths]
            whole = torch.zeros(packed_length(empty), dtype=torch.int64, device=self.storage.pages.device)
            parts = [whole[part] for part in packed_places(empty)]
            page_size = self.storage.pages.shape[3]
            group_sizes = size.sequence.group_sizes(size.num_sequences, page_size)
            groups = groups_of(parts[:6], size.sequence, group_sizes, page_size)
            self._buffers[size] = _StepBuffers(whole, parts, groups)
        return self._buffers[size]


def graph_runner(
    layers: HSTUBlock,
    cache: KVCacheManager,
    impl: str,
    buckets: Sequence[Bucket],
    *,
    rehearsed_steps: int | None = None,
) -> GraphRunner | ShapedGraphRunner:
    """The runner that suits the cache's device.

    buckets: the sizes of steps. rehearsed_steps: so many steps will be run once before any of them counts, and their
    shapes captured then; None where nothing is known of the steps to come.
    """
    if not prefers_few_shapes(cache.device_storage.pages.device):
        return GraphRunner(layers, cache, impl, buckets)
    most_tokens = max(size.num_tokens for size in buckets)
    if rehearsed_steps is None:
        return ShapedGraphRunner(layers, cache, impl, most_tokens)
    return ShapedGraphRunner(layers, cache, impl, most_tokens, captured_at=1, most_shapes=rehearsed_steps)
