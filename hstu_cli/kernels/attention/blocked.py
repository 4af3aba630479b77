"""HSTU attention in plain torch, block by block: computes only what the mask allows.

A block of query rows meets the keys up to its last row in one strip, so the work is the causal half
and the largest intermediate is one strip. SiLU(0) = 0 does the masking: scores that must not count
are zeroed before SiLU, and zero padding adds nothing.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# Shapes: G sequences padded to n history tokens and c candidates, H heads, d head_dim, R rows.

BLOCK_ROWS = 512
"""Query rows of one strip."""

GROUPED_LENGTH = 256
"""Sequences with at most this much history run together, padded to the longest of their group."""

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
    value_scale, output_scale = split_scale(scaling_seqlen, q.dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in _groups_of_similar_length(offsets, num_candidates):
        history = [slice(offsets[b], offsets[b + 1] - num_candidates[b]) for b in group]
        candidates = [slice(offsets[b + 1] - num_candidates[b], offsets[b + 1]) for b in group]
        k_h, v_h = pad(k, history), scaled(pad(v, history), value_scale)  # [G, H, n, d]
        write_unpadded(out, history, causal_attention(pad(q, history) * alpha, k_h, v_h), output_scale)
        if any(num_candidates[b] for b in group):
            q_c = pad(q, candidates) * alpha  # [G, H, c, d]
            k_c, v_c = pad(k, candidates), scaled(pad(v, candidates), value_scale)
            write_unpadded(out, candidates, candidate_attention(q_c, k_c, v_c, k_h, v_h), output_scale)
    return out


def split_scale(scaling_seqlen: int, dtype: torch.dtype) -> tuple[float, float]:
    """1 / L as a factor of v and one of the output.

    In fp16 the sum over the keys may pass the range before it is divided by L, and weights divided
    by L first may fall below it. The factor of v is a power of two, so it does not round.
    """
    value_scale = 2.0 ** -round(math.log2(scaling_seqlen) / 2) if dtype == torch.float16 else 1.0
    return value_scale, 1.0 / (scaling_seqlen * value_scale)


def scaled(v: torch.Tensor, scale: float) -> torch.Tensor:
    """Values times a scale, without a pass over them where that is 1."""
    return v if scale == 1.0 else v * scale


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every history row over the rows up to itself; q (scaled by alpha), k, v, result: [G, H, n, d]."""
    num_rows = q.shape[2]
    if num_rows <= BLOCK_ROWS:
        return F.silu((q @ k.transpose(-1, -2)).tril_(), inplace=True) @ v
    # Head by head, a strip of scores stays in the caches and the operands are plain matrices, of
    # which a product makes no copies.
    out = torch.empty_like(q)
    for q_1, k_1, v_1, out_1 in zip(*(x.flatten(0, 1).unbind() for x in (q, k, v, out)), strict=True):
        for start in range(0, num_rows, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, num_rows)
            scores = q_1[start:end] @ k_1[:end].T  # [R, end]
            scores[:, start:].tril_()
            torch.mm(F.silu(scores, inplace=True), v_1[:end], out=out_1[start:end])
    return out


def candidate_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_history: torch.Tensor, v_history: torch.Tensor
) -> torch.Tensor:
    """Every candidate over the whole history and itself.

    q (scaled by alpha), k, v, result: [G, H, c, d]; k_history, v_history: [G, H, n, d].
    """
    wide = torch.promote_types(q.dtype, torch.float32)  # a single dot product loses most to rounding
    own_score = (q.to(wide) * k.to(wide)).sum(-1, keepdim=True)  # [G, H, c, 1]
    return strip(q, k_history, v_history).add_(F.silu(own_score).to(v.dtype) * v)


def strip(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SiLU(q k') v without a mask; q (scaled by alpha), result [..., R, d], k, v [..., n, d].

    Matrix products are fastest on contiguous k. Rows go a block at a time, which bounds the scores.
    """
    parts = [F.silu(rows @ k.transpose(-1, -2), inplace=True) @ v for rows in q.split(BLOCK_ROWS, dim=-2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _groups_of_similar_length(offsets: list[int], num_candidates: list[int]) -> Iterator[list[int]]:
    """Sequence numbers in groups to pad together: short ones by length, each long one alone."""
    lengths = [end - start - c for start, end, c in zip(offsets, offsets[1:], num_candidates, strict=False)]
    group: list[int] = []
    for b in sorted(range(len(lengths)), key=lambda b: (lengths[b], num_candidates[b])):
        padded = lengths[b] + max(num_candidates[b], *(num_candidates[g] for g in group), 0)
        wasteful = group and lengths[b] > 2 * lengths[group[0]] + 16
        if group and (wasteful or lengths[b] > GROUPED_LENGTH or (len(group) + 1) * padded > GROUP_TOKENS):
            yield group
            group = []
        group.append(b)
    if group:
        yield group


def pad(x: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    """Rows of x [T, H, d] as [G, H, longest, d] contiguous, zero behind the end of the shorter ones."""
    if len(rows) == 1:
        return x[rows[0]].transpose(0, 1).contiguous()[None]
    return pad_sequence([x[r] for r in rows], batch_first=True).transpose(1, 2).contiguous()


def write_unpadded(out: torch.Tensor, rows: list[slice], padded: torch.Tensor, scale: float) -> None:
    """Write the filled part of padded [G, H, longest, d], times scale, to its rows of out [T, H, d]."""
    for r, one in zip(rows, padded.unbind(), strict=True):
        torch.mul(one[:, : r.stop - r.start].transpose(0, 1), scale, out=out[r])


def add_unpadded(out: torch.Tensor, rows: list[slice], padded: torch.Tensor, scale: float) -> None:
    """Add the filled part of padded [G, H, longest, d], times scale, to its rows of out [T, H, d]."""
    for r, one in zip(rows, padded.unbind(), strict=True):
        out[r].add_(one[:, : r.stop - r.start].transpose(0, 1), alpha=scale)
