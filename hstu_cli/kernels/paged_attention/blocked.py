"""Paged HSTU attention in plain torch: new tokens among themselves, plus each over its pages.

SiLU attention has no normaliser, so the two parts just add. Pages are gathered head by head for a
few sequences at a time, never padded to the longest of the batch.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from hstu_cli.kernels.attention import blocked

# Shapes: G sequences, at most R new and m cached tokens each, P pages each, H heads, d head_dim.

GROUPED_PAGES = 256
"""The most pages that are gathered at a time for more than one sequence."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: list[int],
    num_candidates: list[int],
    pages: torch.Tensor,
    page_tables: list[list[int]],
    cached_lengths: list[int],
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `hstu_paged_attention`."""
    out = blocked.attention(q, k, v, offsets, num_candidates, alpha=alpha, scaling_seqlen=scaling_seqlen)
    value_scale, output_scale = blocked.split_scale(scaling_seqlen, q.dtype)
    new_rows = [slice(start, end) for start, end in pairwise(offsets)]
    for group in _groups(page_tables, new_rows):
        keys, values = _gather(pages, [page_tables[b] for b in group], [cached_lengths[b] for b in group])
        rows = [new_rows[b] for b in group]
        queries = blocked.pad(q, rows).transpose(0, 1).contiguous() * alpha  # [H, G, R, d]
        partial = blocked.strip(queries, keys, blocked.scaled(values, value_scale))  # [H, G, R, d]
        blocked.add_unpadded(out, rows, partial.transpose(0, 1), output_scale)
    return out


def _groups(page_tables: list[list[int]], new_rows: list[slice]) -> Iterator[list[int]]:
    """Sequences with cached and new tokens, in groups of similar page counts."""
    group: list[int] = []
    for b in sorted(range(len(page_tables)), key=lambda b: len(page_tables[b])):
        num_pages = len(page_tables[b])
        if num_pages == 0 or new_rows[b].start == new_rows[b].stop:
            continue
        if group and (num_pages > 2 * len(page_tables[group[0]]) or (len(group) + 1) * num_pages > GROUPED_PAGES):
            yield group
            group = []
        group.append(b)
    if group:
        yield group


def _gather(
    pages: torch.Tensor, page_tables: list[list[int]], cached_lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cached keys and values of a group, each [H, G, m, d] contiguous, zero behind each one's end."""
    _, _, page_size, num_heads, head_dim = pages.shape
    most = max(map(len, page_tables))
    ids = torch.tensor([table + table[:1] * (most - len(table)) for table in page_tables], device=pages.device)
    # One copy both gathers and brings the heads to the front.
    gathered = pages.permute(1, 3, 0, 2, 4).index_select(2, ids.flatten())  # [2, H, G * P, page_size, d]
    cached = gathered.view(2, num_heads, len(page_tables), most * page_size, head_dim)
    for g, length in enumerate(cached_lengths):
        cached[:, :, g, length:].zero_()
    return cached[0], cached[1]
