"""HSTU attention by the C++ operators, with gradients; they must be loaded: `choose_impl` sees to it."""

from typing import Any

import torch

from hstu_cli.kernels.dispatch import wants_gradient


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
    if wants_gradient(q, k, v):
        return NativeAttention.apply(q, k, v, offsets, num_candidates, alpha, scaling_seqlen)
    if not len(q):
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return torch.ops.hstu_native.attention(q, k, v, offsets, num_candidates, None, [], [], [], alpha, scaling_seqlen)


class NativeAttention(torch.autograd.Function):
    """`hstu_attention`, forward and backward; what is kept for the backward is q, k and v alone."""

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
        """See `attention`."""
        ctx.save_for_backward(q, k, v)
        ctx.offsets, ctx.num_candidates, ctx.scales = offsets, num_candidates, (alpha, scaling_seqlen)
        return attention(q, k, v, offsets, num_candidates, alpha=alpha, scaling_seqlen=scaling_seqlen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v, [T, H, d] each."""
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        torch.ops.hstu_native.attention_gradients(
            *inputs, grad_out, ctx.offsets, ctx.num_candidates, *ctx.scales, *grads
        )
        return *grads, None, None, None, None
