"""HSTU attention as the formula says it: one dense masked matrix per sequence and head."""

import torch
import torch.nn.functional as F

# Shapes: N tokens of one sequence, n of them before the candidates, H heads, d head_dim.


def attention_mask(num_tokens: int, num_candidates: int, device: torch.device) -> torch.Tensor:
    """M [N, N] bool: True where row i may see column j."""
    n = num_tokens - num_candidates
    i = torch.arange(num_tokens, device=device)[:, None]
    j = torch.arange(num_tokens, device=device)[None, :]
    return torch.where(i < n, j <= i, (j < n) | (j == i))


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
    """See `hstu_attention`; every operation runs in the dtype of the inputs."""
    outputs = []
    for start, end, candidates in zip(offsets, offsets[1:], num_candidates, strict=False):
        mask = attention_mask(end - start, candidates, q.device)  # [N, N]
        scores = alpha * torch.einsum("ihd,jhd->hij", q[start:end], k[start:end])  # [H, N, N]
        weights = F.silu(scores) / scaling_seqlen * mask  # [H, N, N]
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[start:end]))  # [N, H, d]
    outputs.append(q.new_zeros(len(q) - offsets[-1], *q.shape[1:]))  # rows of padding, which no sequence has
    return torch.cat(outputs)
