"""Attention with gradients: a forward and a backward pass, whoever computes them, as one function of q, k and v."""

from collections.abc import Callable
from typing import Any

import torch

from hstu_cli.kernels.dispatch import wants_gradient

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The output [T, H, d] for q, k and v."""

Gradients = Callable[..., None]
"""Writes the gradients of q, k and v, of which it gets three tensors, for q, k, v and that of the output."""


def differentiable(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: Forward, gradients: Gradients
) -> torch.Tensor:
    """`forward(q, k, v)`, with `gradients(grads, q, k, v, grad_out)` where one of them asks for gradients.

    What is kept between the passes is q, k and v alone.
    """
    if wants_gradient(q, k, v):
        return AttentionFunction.apply(q, k, v, forward, gradients)
    return forward(q, k, v)


class AttentionFunction(torch.autograd.Function):
    """See `differentiable`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: Forward, gradients: Gradients
    ) -> torch.Tensor:
        """The output [T, H, d]."""
        ctx.save_for_backward(q, k, v)
        ctx.gradients = gradients
        return forward(q, k, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v, [T, H, d] each."""
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        ctx.gradients(grads, *inputs, grad_out)
        return *grads, None, None
