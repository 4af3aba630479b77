"""The sequences of a batch in groups of one padded size, planned once for all layers: few shapes, whatever the lengths.

What a group holds on the device is index tensors; the same buffers may be filled with another batch of that shape, so
that a graph can read them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from hstu_cli.backend import upload
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.buckets import padded, power_of_two
from hstu_cli.kernels.paged_attention.plan import PagePlan

# Shapes: G sequences padded to R new tokens and P pages of S tokens, m = P S, N = m + R keys; T rows of q.

LEAST_NEW = 32
"""The fewest new tokens that a sequence is padded to: below, launching costs more than computing."""

LEAST_CACHED = 128
"""The fewest cached tokens that a sequence with any is padded to."""

PADDED_STEP = 512
"""From here on lengths are padded to multiples of this; below, to powers of two."""

GROUP_SCORES = 1 << 22
"""The most scores of one head and `PADDED_STEP` query rows of a group, which bounds its intermediates."""

SEEN = "bucketed"
"""The name under which a plan keeps its groups; see `BatchPlan.once`."""


@dataclass(frozen=True, slots=True, order=True)
class PaddedSize:
    """What sequences of a group are padded to: R new tokens and P pages."""

    num_new: int
    num_pages: int

    @classmethod
    def of(cls, num_new: int, num_pages: int, page_size: int) -> "PaddedSize":
        """The size of a sequence with so many new tokens, and so many pages in use."""
        cached = _padded_tokens(num_pages * page_size, LEAST_CACHED)
        return cls(_padded_tokens(num_new, LEAST_NEW), -(-cached // page_size) if num_pages else 0)

    def num_scores(self, page_size: int) -> int:
        """Scores of a head that one sequence computes: strips of new tokens stop at their last one."""
        starts = range(0, self.num_new, PADDED_STEP)
        ends = [min(start + PADDED_STEP, self.num_new) for start in starts]
        return sum((end - start) * (self.num_pages * page_size + end) for start, end in zip(starts, ends, strict=True))

    def group_sizes(self, count: int, page_size: int) -> list[int]:
        """G of each group in which `count` sequences run: as many as are allowed, and the rest as a power of two."""
        scores = min(self.num_new, PADDED_STEP) * (self.num_new + self.num_pages * page_size)
        most = power_of_two(max(1, GROUP_SCORES // scores) + 1) // 2
        rest = count % most
        return [most] * (count // most) + ([power_of_two(rest)] if rest else [])


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of one padded size; the numbers are on the device.

    rows: int64 [G * R], the rows of q, k and v, 0 for padding; out_rows: the same, T for padding.
    page_ids: int64 [G * P], 0 for padding, or None where P is 0.
    num_cached, num_new, num_history: int64 [G], each sequence's lengths; history is that among the new tokens.
    masks: what layers share: that of padding, and those of strips by their rows, together R (m + R / 2) bytes a
      sequence.
    """

    num_new_padded: int
    num_pages: int
    page_size: int
    rows: torch.Tensor
    out_rows: torch.Tensor
    page_ids: torch.Tensor | None
    num_cached: torch.Tensor
    num_new: torch.Tensor
    num_history: torch.Tensor
    masks: dict[tuple[int, int] | str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_cached_padded(self) -> int:
        """What the legend calls m."""
        return self.num_pages * self.page_size

    def not_keys(self) -> torch.Tensor:
        """Which keys are padding, bool [G, N, 1]; made in the first layer."""
        if "padding" not in self.masks:
            place = torch.arange(self.num_cached_padded + self.num_new_padded, device=self.rows.device)
            new = place - self.num_cached_padded
            is_cached = place < self.num_cached[:, None]
            is_new = (new >= 0) & (new < self.num_new[:, None])
            self.masks["padding"] = ~(is_cached | is_new)[:, :, None]
        return self.masks["padding"]

    def forbidden(self, start: int, end: int) -> torch.Tensor:
        """Which keys up to new token `end` the new tokens start to end must not see, bool [G, end - start, m + end].

        Made in the first layer, as the padding's is.
        """
        if (start, end) not in self.masks:
            m, device = self.num_cached_padded, self.rows.device
            i = torch.arange(start, end, device=device)[:, None]
            j = torch.arange(m + end, device=device) - m  # negative for a cached key, which all see
            # History sees what comes before it, a candidate what is history; everyone sees itself.
            self.masks[start, end] = (j >= torch.minimum(i, self.num_history[:, None, None])) & (j != i)
        return self.masks[start, end]


@dataclass(frozen=True, slots=True)
class GroupedBatch:
    """The sequences with new tokens of a planned batch, by the size that they are padded to; on the host."""

    plan: BatchPlan
    page_plan: PagePlan | None
    members: dict[PaddedSize, list[int]]

    @classmethod
    def of(cls, plan: BatchPlan, page_plan: PagePlan | None) -> "GroupedBatch":
        """Each sequence in the smallest size that holds it; ValueError for a batch that is on the device alone."""
        offsets, _ = plan.on_host()
        members: dict[PaddedSize, list[int]] = {}
        tables = page_plan.on_host()[0] if page_plan is not None else [[]] * plan.num_sequences
        page_size = page_plan.page_size if page_plan is not None else 1
        for b, (start, end) in enumerate(pairwise(offsets)):
            if end > start:
                members.setdefault(PaddedSize.of(end - start, len(tables[b]), page_size), []).append(b)
        return cls(plan, page_plan, dict(sorted(members.items())))

    @property
    def page_size(self) -> int:
        """S; 1 where there are no pages."""
        return self.page_plan.page_size if self.page_plan is not None else 1

    @property
    def num_scores(self) -> int:
        """Scores of a head that all groups compute, padding included."""
        return sum(
            size.num_scores(self.page_size) * sum(size.group_sizes(len(members), self.page_size))
            for size, members in self.members.items()
        )

    def as_one_size(self) -> "GroupedBatch":
        """All sequences in the smallest size that holds each of them; ValueError for a batch without any."""
        num_new, num_pages = (max(getattr(size, n) for size in self.members) for n in ("num_new", "num_pages"))
        everyone = sorted(b for members in self.members.values() for b in members)
        return GroupedBatch(self.plan, self.page_plan, {PaddedSize(num_new, num_pages): everyone})

    def indices(self, size: PaddedSize) -> list[torch.Tensor]:
        """What the groups of a size hold, int64 on the host, one behind the other: see `Group` and `groups_of`.

        rows and out_rows [G * R], page_ids [G * P], num_cached, num_new and num_history [G], where G counts the
        sequences of all these groups.
        """
        offsets, candidates = (torch.tensor(x, dtype=torch.int64) for x in self.plan.on_host())
        members = self.members[size]
        total = sum(size.group_sizes(len(members), self.page_size))
        nothing = [[]] * self.plan.num_sequences, [0] * self.plan.num_sequences
        tables, cached = self.page_plan.on_host() if self.page_plan is not None else nothing
        of_members = [[*tables[b], *[0] * (size.num_pages - len(tables[b]))] for b in members]
        ids = torch.tensor(of_members, dtype=torch.int64).view(len(members), size.num_pages)
        num_cached = torch.tensor([cached[b] for b in members])
        num_new = offsets.diff()[members]
        place = torch.arange(size.num_new)
        rows = torch.where(place < num_new[:, None], offsets[members, None] + place, -1)
        flat = padded(rows, total, -1).flatten()
        return [
            flat.clamp(min=0),
            torch.where(flat < 0, self.plan.num_tokens, flat),
            padded(ids, total).flatten(),
            *(padded(x, total) for x in (num_cached, num_new, num_new - candidates[members])),
        ]

    def on_device(self) -> list[Group]:
        """The groups on the device of the plan: one copy, for which nobody waits."""
        if not self.members:
            return []
        tensors = [tensor for size in self.members for tensor in self.indices(size)]
        parts = iter(upload(tensors, self.plan.seq_offsets.device))
        return [
            group
            for size, members in self.members.items()
            for group in groups_of(
                [next(parts) for _ in range(6)], size, size.group_sizes(len(members), self.page_size), self.page_size
            )
        ]


def groups_of(
    indices: Sequence[torch.Tensor], size: PaddedSize, group_sizes: Iterable[int], page_size: int
) -> list[Group]:
    """Groups of so many sequences each, as views of what `GroupedBatch.indices` gives."""
    rows, out_rows, ids, *lengths = indices
    groups, first = [], 0
    for count in group_sizes:
        new, of_pages = (slice(first * n, (first + count) * n) for n in (size.num_new, size.num_pages))
        groups.append(
            Group(
                size.num_new,
                size.num_pages,
                page_size,
                rows[new],
                out_rows[new],
                ids[of_pages] if size.num_pages else None,
                *(length[first : first + count] for length in lengths),
            )
        )
        first += count
    return groups


def planned_groups(plan: BatchPlan, page_plan: PagePlan | None) -> list[Group]:
    """The groups of a batch, made in the first layer alone."""
    return plan.once(SEEN, lambda: GroupedBatch.of(plan, page_plan).on_device(), page_plan)


def _padded_tokens(length: int, least: int) -> int:
    """Powers of two up to a step, then whole steps; 0 is `least`."""
    return power_of_two(length, least) if length <= PADDED_STEP else -(-length // PADDED_STEP) * PADDED_STEP
