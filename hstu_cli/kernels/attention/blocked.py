"""HSTU attention in plain torch, strip by strip: computes only what the mask allows.

A strip of query rows meets the keys up to its last row, so the work is the causal half and the
largest intermediate is one strip. SiLU(0) = 0 does the masking: scores that must not count are
zeroed before SiLU, and zero padding adds nothing.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# Shapes: a group of G sequences padded to R new tokens and m cached ones, N = m + R, H heads, d head_dim.

BLOCK_ROWS = 512
"""Query rows of one strip."""

TRANSPOSED_ROWS = 256
"""Strips of at most this many rows compute k q' instead of q k', which is up to twice as fast."""

GROUPED_SCORES = 1 << 16
"""Sequences with at most this many scores a head run together, padded to the largest of their group."""

FREE_SCORES = 1 << 15
"""Scores a head that cost less than another group would: padding by this much is no waste."""

GROUP_TOKENS = 8192
"""The most padded tokens of a group, which bounds its intermediates."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: list[int],
    num_candidates: list[int],
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `hstu_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = [slice(start, end) for start, end in pairwise(offsets)]
    for group in groups_of_similar_size([r.stop - r.start for r in rows], [0] * len(rows)):
        new = [rows[b] for b in group]
        keys, values = pad(k, new), pad(v, new)
        attend(out, q, keys, values, new, [num_candidates[b] for b in group], alpha, scaling_seqlen)
    return out


def attend(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: list[slice],
    num_candidates: list[int],
    alpha: float,
    scaling_seqlen: int,
) -> None:
    """Write the attention of a group of sequences to their rows of out.

    out, q: [T, H, d], of which rows [G] are the new tokens of each sequence, candidates last.
    k, v: [H, G, N, d] contiguous, overwritten: the cached tokens padded with zeros to m, then the
    new ones padded with zeros to R.
    """
    value_scale, output_scale = split_scale(scaling_seqlen, q.dtype)
    if value_scale != 1.0:
        v.mul_(value_scale)
    num_history = [r.stop - r.start - c for r, c in zip(rows, num_candidates, strict=True)]
    queries = pad(q, rows).mul_(alpha)  # [H, G, R, d]
    if queries.shape[2] <= BLOCK_ROWS:
        result = _strip(queries, k, v, forbidden_mask(0, queries.shape[2], num_history, q.device))
    else:
        result = _strips_of_one(queries[:, 0], k[:, 0], v[:, 0], num_history[0])[:, None]
    for r, one in zip(rows, result.unbind(1), strict=True):
        torch.mul(one[:, : r.stop - r.start].transpose(0, 1), output_scale, out=out[r])


def split_scale(scaling_seqlen: int, dtype: torch.dtype) -> tuple[float, float]:
    """1 / L as a factor of v and one of the output.

    In fp16 the sum over the keys may pass the range before it is divided by L, and weights divided
    by L first may fall below it. The factor of v is a power of two, so it does not round.
    """
    value_scale = 2.0 ** -round(math.log2(scaling_seqlen) / 2) if dtype == torch.float16 else 1.0
    return value_scale, 1.0 / (scaling_seqlen * value_scale)


def _strips_of_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_history: int) -> torch.Tensor:
    """A long sequence strip by strip; q (scaled by alpha) and result [H, R, d], k and v [H, N, d]."""
    num_cached = k.shape[1] - q.shape[1]
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, q.shape[1])
        forbidden = forbidden_mask(start, end, [num_history], q.device)[0]
        # Head by head, scores stay in the caches and the operands are plain matrices, of which a
        # product makes no copies.
        for q_1, k_1, v_1, out_1 in zip(q[:, start:end], k, v, out[:, start:end], strict=True):
            if start < num_history:
                seen = slice(0, num_cached + end)
                out_1.copy_(_strip(q_1, k_1[seen], v_1[seen], forbidden))
            else:  # candidates alone see nothing between the history and themselves
                history, own = slice(0, num_cached + num_history), slice(num_cached + start, num_cached + end)
                torch.add(
                    _strip(q_1, k_1[history], v_1[history]), _strip(q_1, k_1[own], v_1[own], forbidden), out=out_1
                )
    return out


def _strip(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forbidden: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU(q k') v; q (scaled by alpha) and result [..., R, d], k and v [..., N, d].

    forbidden: bool [..., R, C], which scores of the last C columns do not count.
    """
    few_rows = q.shape[-2] <= TRANSPOSED_ROWS
    scores = (k @ q.mT).mT if few_rows else q @ k.mT  # [..., R, N]
    if forbidden is not None:
        scores[..., scores.shape[-1] - forbidden.shape[-1] :].masked_fill_(forbidden, 0.0)
    return F.silu(scores, inplace=True) @ v


def forbidden_mask(start: int, end: int, num_history: list[int], device: torch.device) -> torch.Tensor:
    """Which of the new tokens start to end each of them must not see, bool [G, end - start, end - start]."""
    j = torch.arange(start, end, device=device)
    i = j[:, None]
    # History sees what comes before it, a candidate what is history; everyone sees itself.
    history = torch.tensor(num_history, device=device)[:, None, None]
    return (j >= torch.minimum(i, history)) & (j != i)


def groups_of_similar_size(new_lengths: list[int], cached_lengths: list[int]) -> Iterator[list[int]]:
    """Numbers of the sequences with new tokens, in groups to pad together: each large one is alone."""
    group: list[int] = []
    most_new = most_cached = scores = 0  # of the group: the padded lengths, and the scores that count
    numbers = [b for b, length in enumerate(new_lengths) if length]
    for b in sorted(numbers, key=lambda b: (new_lengths[b], cached_lengths[b])):
        new, cached = max(most_new, new_lengths[b]), max(most_cached, cached_lengths[b])
        own_scores = new_lengths[b] * (new_lengths[b] + cached_lengths[b])
        padded = (len(group) + 1) * (new + cached)
        wasteful = padded * new > 1.25 * (scores + own_scores) + FREE_SCORES
        if group and (wasteful or padded > GROUP_TOKENS or own_scores > GROUPED_SCORES or new > BLOCK_ROWS):
            yield group
            group, scores = [], 0
            new, cached = new_lengths[b], cached_lengths[b]
        group.append(b)
        most_new, most_cached, scores = new, cached, scores + own_scores
    if group:
        yield group


def pad(x: torch.Tensor, rows: list[slice], out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of x [T, H, d] as [H, G, longest, d], zero behind the end of the shorter ones; always a copy."""
    if out is None:
        out = x.new_empty(x.shape[1], len(rows), max(r.stop - r.start for r in rows), x.shape[2])
    if len(rows) == 1:
        return out.copy_(x[rows[0]].transpose(0, 1)[:, None])
    padded = pad_sequence([x[r] for r in rows], batch_first=True)  # [G, longest, H, d]
    return out.copy_(padded.permute(2, 0, 1, 3))
