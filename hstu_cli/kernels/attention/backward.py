"""Gradients of blocked HSTU attention: scores are computed again block by block, never kept."""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.attention.function import differentiable

FORBIDDEN = -1e4
"""A score at which SiLU and its slope are 0 in every dtype: exp(1e4) is infinite."""

# Shapes: a group of G sequences padded to R tokens, n of them before the candidates, H heads, d head_dim.


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
    batch = {"offsets": offsets, "num_candidates": num_candidates, "alpha": alpha, "scaling_seqlen": scaling_seqlen}
    return differentiable(q, k, v, partial(blocked.attention, **batch), partial(attention_gradients, **batch))


def attention_gradients(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    offsets: list[int],
    num_candidates: list[int],
    *,
    alpha: float,
    scaling_seqlen: int,
) -> None:
    """Write the gradients of q, k and v to `grads`, all [T, H, d] of one dtype and any strides.

    Of a long sequence each block of keys meets all queries that see it, so that its keys' and values' gradients are one
    product each. Sums over blocks are taken in float32 at least.
    """
    value_scale, output_scale = blocked.split_scale(scaling_seqlen, q.dtype)
    scales = (alpha, 1.0, value_scale, output_scale)
    sequences = [slice(start, end) for start, end in pairwise(offsets)]
    for group in blocked.groups_of_similar_size([s.stop - s.start for s in sequences], [0] * len(sequences)):
        rows = [sequences[b] for b in group]
        num_history = [r.stop - r.start - num_candidates[b] for r, b in zip(rows, group, strict=True)]
        if rows[0].stop - rows[0].start > blocked.BLOCK_ROWS:  # alone in its group
            for head in range(q.shape[1]):
                operands = [
                    _scaled(x[rows[0], head], scale) for x, scale in zip((q, k, v, grad_out), scales, strict=True)
                ]
                found = _long_gradients(*operands, num_history[0])
                for grad, one, scale in zip(grads, found, scales[:3], strict=True):
                    grad[rows[0], head] = one if scale == 1.0 else one.mul_(scale)
            continue
        padded = [blocked.pad(x, rows).mul_(scale) for x, scale in zip((q, k, v, grad_out), scales, strict=True)]
        found = _group_gradients(*padded, num_history)  # [H, G, R, d] each
        for grad, one, scale in zip(grads, found, scales[:3], strict=True):
            for r, sequence in zip(rows, one.mul_(scale).unbind(1), strict=True):
                grad[r] = sequence[:, : r.stop - r.start].transpose(0, 1)


def _group_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, num_history: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (scaled by alpha), k and v of a group of short sequences, [H, G, R, d] each."""
    scores, grad_scores = k @ q.mT, v @ grad_out.mT  # transposed: [H, G, keys, queries]
    forbidden = blocked.forbidden_mask(0, q.shape[2], num_history, q.device).mT
    weights = _weights(scores, grad_scores, forbidden)
    return grad_scores.mT @ k, grad_scores @ q, weights @ grad_out


def _long_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, num_history: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (scaled by alpha), k and v of one head of a long sequence, [R, d] each."""
    grad_q = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    size = min(blocked.BLOCK_ROWS, num_history)
    earlier = torch.ones(size, size, dtype=torch.bool, device=q.device).tril_(-1)  # queries before the key
    for start in range(0, num_history, blocked.BLOCK_ROWS):
        keys = slice(start, min(start + blocked.BLOCK_ROWS, num_history))
        size = keys.stop - start
        scores, grad_scores = k[keys] @ q[start:].T, v[keys] @ grad_out[start:].T  # [keys, queries]
        weights = _weights(scores, grad_scores, earlier[:size, :size])
        torch.mm(weights, grad_out[start:], out=grad_v[keys])
        torch.mm(grad_scores, q[start:], out=grad_k[keys])
        grad_q[start:] += grad_scores.T @ k[keys]
        del scores, grad_scores, weights  # before the next block's
    own = slice(num_history, None)  # no other token sees a candidate
    wide_q, wide_k, wide_v, wide_grad = (x[own].to(grad_q.dtype) for x in (q, k, v, grad_out))
    scores = (wide_q * wide_k).sum(-1, keepdim=True)  # [R - n, 1]
    grad_scores = torch.ops.aten.silu_backward((wide_grad * wide_v).sum(-1, keepdim=True), scores)
    grad_q[own] += grad_scores * wide_k
    grad_k[own] = grad_scores * wide_q
    grad_v[own] = F.silu(scores) * wide_grad
    return grad_q, grad_k, grad_v


def _weights(scores: torch.Tensor, grad_scores: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """SiLU of scores; `grad_scores`, the gradient of that, becomes that of the scores themselves.

    scores, grad_scores: [..., keys, queries]; forbidden: bool [..., keys, C], which of the first C queries must not see
    a key: there both become 0.
    """
    scores[..., : forbidden.shape[-1]].masked_fill_(forbidden, FORBIDDEN)
    torch.ops.aten.silu_backward.grad_input(grad_scores, scores, grad_input=grad_scores)
    return F.silu(scores, inplace=True)


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """A contiguous copy of x times a factor."""
    copy = x.clone(memory_format=torch.contiguous_format)
    return copy if scale == 1.0 else copy.mul_(scale)
