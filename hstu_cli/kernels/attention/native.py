"""HSTU attention by the C++ operators, with gradients; they must be loaded: `choose_impl` sees to it."""

from functools import partial

import torch

from hstu_cli.kernels.attention.function import differentiable


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
    return differentiable(q, k, v, partial(_forward, **batch), partial(attention_gradients, **batch))


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
    """Write the gradients of q, k and v to `grads`, all [T, H, d] of one dtype."""
    torch.ops.hstu_native.attention_gradients(q, k, v, grad_out, offsets, num_candidates, alpha, scaling_seqlen, *grads)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: list[int],
    num_candidates: list[int],
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    if not len(q):
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return torch.ops.hstu_native.attention(q, k, v, offsets, num_candidates, None, [], [], [], alpha, scaling_seqlen)
