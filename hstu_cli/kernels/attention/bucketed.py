"""HSTU attention in plain torch for devices that prepare an operator for each shape anew: few shapes, no copies per
sequence.

The strips are those of `blocked.py`. But sequences run in groups of one padded size, their rows are gathered and
scattered by index, and all of it is planned once for all layers. Padding is masked or written to a row that is cut off.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

from hstu_cli.backend import upload
from hstu_cli.kernels.attention.blocked import BLOCK_ROWS, split_scale
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.buckets import padded, power_of_two
from hstu_cli.kernels.paged_attention.plan import PagePlan

# Shapes: a group of G sequences padded to R new tokens and P pages of S tokens, m = P S, N = m + R keys; T rows of q,
# H heads, d head_dim.

LEAST_NEW = 32
"""The fewest new tokens that a sequence is padded to: below, launching costs more than computing."""

LEAST_CACHED = 128
"""The fewest cached tokens that a sequence with any is padded to."""

GROUP_SCORES = 1 << 22
"""The most scores of one head and strip of a group, which bounds its intermediates."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of one padded size; the numbers are on the device.

    rows: int64 [G * R], the rows of q, k and v, 0 for padding; out_rows: the same, T for padding.
    page_ids: int64 [G * P], 0 for padding, or None where P is 0.
    num_cached, num_new, num_history: int64 [G], each sequence's lengths; history is that among the new tokens.
    masks: what layers share: that of padding, and those of strips by their first row, R (m + R / 2) bytes a sequence.
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
    masks: dict[int | str, torch.Tensor] = field(default_factory=dict)

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
        if start not in self.masks:
            m, device = self.num_cached_padded, self.rows.device
            i = torch.arange(start, end, device=device)[:, None]
            j = torch.arange(m + end, device=device) - m  # negative for a cached key, which all see
            # History sees what comes before it, a candidate what is history; everyone sees itself.
            self.masks[start] = (j >= torch.minimum(i, self.num_history[:, None, None])) & (j != i)
        return self.masks[start]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BatchPlan,
    pages: torch.Tensor | None = None,
    page_plan: PagePlan | None = None,
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `hstu_attention`, and `hstu_paged_attention` where there are pages; rows that no sequence has become zero."""
    num_rows, num_heads, head_dim = q.shape
    value_scale, output_scale = split_scale(scaling_seqlen, q.dtype)
    out = q.new_zeros(num_rows + 1, num_heads, head_dim)
    for group in plan.once("bucketed", lambda: list(_groups(plan, page_plan)), page_plan):
        queries = _gathered(q, group).mul_(alpha)  # [H, G, R, d]
        keys, values = _keys_and_values(k, v, group, pages)  # [H, G, N, d] each
        if value_scale != 1.0:
            values.mul_(value_scale)
        strips = []
        for start in range(0, group.num_new_padded, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, group.num_new_padded)
            seen = slice(0, group.num_cached_padded + end)
            scores = queries[:, :, start:end] @ keys[:, :, seen].mT  # [H, G, end - start, m + end]
            scores.masked_fill_(group.forbidden(start, end), 0.0)
            strips.append(F.silu(scores, inplace=True) @ values[:, :, seen])
        result = (strips[0] if len(strips) == 1 else torch.cat(strips, 2)).permute(1, 2, 0, 3)  # [G, R, H, d]
        out.index_copy_(0, group.out_rows, result.reshape(-1, num_heads, head_dim).mul_(output_scale))
    return out[:num_rows]


def _keys_and_values(k: torch.Tensor, v: torch.Tensor, group: Group, pages: torch.Tensor | None) -> list[torch.Tensor]:
    """Cached and then new keys and values of a group, [H, G, N, d] each, zero where they are padding."""
    not_keys = group.not_keys()
    new = [_gathered(x, group) for x in (k, v)]
    if pages is None or group.page_ids is None:
        return [x.masked_fill_(not_keys, 0.0) for x in new]
    _, _, page_size, num_heads, head_dim = pages.shape
    # Whole pages are gathered as they lie; only what was gathered is turned round.
    gathered = pages.index_select(0, group.page_ids).view(-1, group.num_pages, 2, page_size, num_heads, head_dim)
    cached = gathered.permute(2, 4, 0, 1, 3, 5).reshape(2, num_heads, -1, group.num_cached_padded, head_dim)
    return [torch.cat([old, x], 2).masked_fill_(not_keys, 0.0) for old, x in zip(cached, new, strict=True)]


def _gathered(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Rows of x [T, H, d] that a group has, [H, G, R, d] contiguous; anything where they are padding."""
    rows = x.index_select(0, group.rows).view(-1, group.num_new_padded, *x.shape[1:])
    return rows.permute(2, 0, 1, 3).contiguous()


def _groups(plan: BatchPlan, page_plan: PagePlan | None) -> Iterator[Group]:
    """The sequences with new tokens, by padded size."""
    offsets, candidates = plan.on_host()
    tables, cached = page_plan.on_host() if page_plan is not None else ([[]] * len(candidates), [0] * len(candidates))
    page_size = page_plan.page_size if page_plan is not None else 1
    same_size: dict[tuple[int, int], list[int]] = {}
    for b, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            size = (_padded_tokens(end - start, LEAST_NEW), _padded_pages(len(tables[b]), page_size))
            same_size.setdefault(size, []).append(b)
    for (num_new, num_pages), members in sorted(same_size.items()):
        scores = min(num_new, BLOCK_ROWS) * (num_new + num_pages * page_size)
        most = power_of_two(max(1, GROUP_SCORES // scores) + 1) // 2
        for first in range(0, len(members), most):
            part = members[first : first + most]
            group_size = power_of_two(len(part))
            rows = torch.full((group_size, num_new), -1)
            ids = torch.zeros(group_size, num_pages, dtype=torch.int64)
            for g, b in enumerate(part):
                length = offsets[b + 1] - offsets[b]
                rows[g, :length] = torch.arange(offsets[b], offsets[b + 1])
                ids[g, : len(tables[b])] = torch.tensor(tables[b], dtype=torch.int64)
            lengths = torch.tensor([(cached[b], n := offsets[b + 1] - offsets[b], n - candidates[b]) for b in part])
            lengths = padded(lengths, group_size)
            flat = rows.flatten()
            on_device = upload(
                [flat.clamp(min=0), torch.where(flat < 0, plan.num_tokens, flat), ids.flatten(), *lengths.unbind(1)],
                plan.seq_offsets.device,
            )
            yield Group(
                num_new, num_pages, page_size, *on_device[:2], on_device[2] if num_pages else None, *on_device[3:]
            )


def _padded_tokens(length: int, least: int) -> int:
    """Powers of two up to a block, then whole blocks."""
    return power_of_two(length, least) if length <= BLOCK_ROWS else -(-length // BLOCK_ROWS) * BLOCK_ROWS


def _padded_pages(num_pages: int, page_size: int) -> int:
    """Pages that hold a padded number of tokens; 0 for none."""
    return -(-_padded_tokens(num_pages * page_size, LEAST_CACHED) // page_size) if num_pages else 0
