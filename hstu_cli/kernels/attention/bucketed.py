"""HSTU attention in plain torch for devices that prepare an operator for each shape anew: few shapes, no copies per
sequence.

The strips are those of `blocked.py`. But sequences run in groups of one padded size, their rows are gathered and
scattered by index, and all of it is planned once for all layers (`groups.py`). Padding is masked or written to a row
that is cut off.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from hstu_cli.kernels.attention.block_rows import CANDIDATES, MEASURED_CANDIDATES, BlockRowsChoice, choose_block_rows
from hstu_cli.kernels.attention.blocked import split_scale
from hstu_cli.kernels.attention.groups import Group, planned_groups
from hstu_cli.kernels.attention.plan import BatchPlan, plan_batch
from hstu_cli.kernels.paged_attention.plan import PagePlan

# Shapes: a group of G sequences padded to R new tokens and P pages of S tokens, m = P S, N = m + R keys; T rows of q,
# H heads, d head_dim.

SOURCES = tuple(str(Path(__file__).with_name(name)) for name in ("bucketed.py", "groups.py", "blocked.py"))
"""The files on which the time of a strip depends."""

WITHOUT_CHOICE = min(config.num_rows for config in CANDIDATES)
"""Sequences of up to so many new tokens are one strip, whatever is chosen."""


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
    groups = planned_groups(plan, page_plan)
    block_rows = WITHOUT_CHOICE
    if any(group.num_new_padded > block_rows for group in groups):
        block_rows = block_rows_for(q.device, q.dtype, *q.shape[1:]).num_rows
    return _attend(q, k, v, groups, pages, alpha, scaling_seqlen, block_rows)


def block_rows_for(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> BlockRowsChoice:
    """How many query rows a strip has for heads like these; the first call on a machine measures, once."""

    def run(x: torch.Tensor, num_rows: int) -> None:
        num_tokens = len(x)
        candidates = torch.tensor([min(MEASURED_CANDIDATES, num_tokens)])
        if num_tokens not in plans:
            plans[num_tokens] = plan_batch(torch.tensor([0, num_tokens]), candidates, num_tokens, device)
        groups = planned_groups(plans[num_tokens], None)
        _attend(x, x, x, groups, None, head_dim**-0.5, num_tokens, num_rows)

    plans: dict[int, BatchPlan] = {}
    with torch.no_grad():
        return choose_block_rows(device, dtype, num_heads, head_dim, run, *SOURCES)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: list[Group],
    pages: torch.Tensor | None,
    alpha: float,
    scaling_seqlen: int,
    block_rows: int,
) -> torch.Tensor:
    """Attention of these groups in strips of so many query rows, [T, H, d]."""
    num_rows, num_heads, head_dim = q.shape
    value_scale, output_scale = split_scale(scaling_seqlen, q.dtype)
    out = q.new_zeros(num_rows + 1, num_heads, head_dim)
    for group in groups:
        queries = _gathered(q, group).mul_(alpha)  # [H, G, R, d]
        keys, values = _keys_and_values(k, v, group, pages)  # [H, G, N, d] each
        if value_scale != 1.0:
            values.mul_(value_scale)
        strips = []
        for start in range(0, group.num_new_padded, block_rows):
            end = min(start + block_rows, group.num_new_padded)
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
