"""Gradients of blocked HSTU attention: scores are computed again strip by strip, never kept."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from hstu_cli.kernels.attention import blocked

# Shapes: a group of G sequences padded to R tokens, H heads, d head_dim.


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
    """See `hstu_attention`; with gradients where q, k or v asks for them."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return BlockedAttention.apply(q, k, v, offsets, num_candidates, alpha, scaling_seqlen)
    return blocked.attention(q, k, v, offsets, num_candidates, alpha=alpha, scaling_seqlen=scaling_seqlen)


class BlockedAttention(torch.autograd.Function):
    """`hstu_attention` by strips, forward and backward; what is kept for the backward is q, k and v alone."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        offsets: list[int],
        num_candidates: list[int],
        alpha: float,
        scaling_seqlen: int,
    ) -> torch.Tensor:
        """See `blocked.attention`."""
        ctx.save_for_backward(q, k, v)
        ctx.offsets, ctx.num_candidates, ctx.alpha, ctx.scaling_seqlen = offsets, num_candidates, alpha, scaling_seqlen
        return blocked.attention(q, k, v, offsets, num_candidates, alpha=alpha, scaling_seqlen=scaling_seqlen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v, [T, H, d] each."""
        q, k, v = ctx.saved_tensors
        value_scale, output_scale = blocked.split_scale(ctx.scaling_seqlen, q.dtype)
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        sequences = [slice(start, end) for start, end in pairwise(ctx.offsets)]
        for group in blocked.groups_of_similar_size([s.stop - s.start for s in sequences], [0] * len(sequences)):
            rows = [sequences[b] for b in group]
            num_history = [r.stop - r.start - ctx.num_candidates[b] for r, b in zip(rows, group, strict=True)]
            padded = (
                blocked.pad(q, rows).mul_(ctx.alpha),
                blocked.pad(k, rows),
                blocked.pad(v, rows).mul_(value_scale),
                blocked.pad(grad_out, rows).mul_(output_scale),
            )  # [H, G, R, d] each
            found = _group_gradients(*padded, num_history)
            for grad, one, scale in zip(grads, found, (ctx.alpha, 1.0, value_scale), strict=True):
                for r, sequence in zip(rows, one.mul_(scale).unbind(1), strict=True):
                    grad[r] = sequence[:, : r.stop - r.start].transpose(0, 1)
        return *grads, None, None, None, None


def _group_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, num_history: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (scaled by alpha), k and v of a group, [H, G, R, d] each, summed in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for strip, seen, forbidden in _strips(q.shape[2], num_history, q.device):
        strip_q, strip_grad = q[:, :, strip], grad_out[:, :, strip]
        seen_k, seen_v = k[:, :, seen], v[:, :, seen]
        scores = strip_q @ seen_k.mT  # [H, G, strip, seen]
        gate = torch.sigmoid(scores)
        grad_scores = strip_grad @ seen_v.mT
        # SiLU(s) = s g, and its slope is g (1 + s (1 - g)), with g = sigmoid(s).
        slope = torch.addcmul(gate, scores * gate, 1 - gate)
        weights = scores.mul_(gate)
        grad_scores.mul_(slope)
        if forbidden is not None:
            for x in (weights, grad_scores):
                x[..., x.shape[-1] - forbidden.shape[-1] :].masked_fill_(forbidden, 0.0)
        grad_q[:, :, strip] += grad_scores @ seen_k
        grad_k[:, :, seen] += grad_scores.mT @ strip_q
        grad_v[:, :, seen] += weights.mT @ strip_grad
    return grad_q, grad_k, grad_v


def _strips(
    num_rows: int, num_history: list[int], device: torch.device
) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Pieces of the score matrix: rows, columns, and which scores of the last columns are forbidden, bool [G, R, C]."""
    for start in range(0, num_rows, blocked.BLOCK_ROWS):
        end = min(start + blocked.BLOCK_ROWS, num_rows)
        forbidden = blocked.forbidden_mask(start, end, num_history, device)
        if start < max(num_history) or start == 0:
            yield slice(start, end), slice(0, end), forbidden
        else:  # candidates alone see nothing between the history and themselves
            yield slice(start, end), slice(0, max(num_history)), None
            yield slice(start, end), slice(start, end), forbidden
