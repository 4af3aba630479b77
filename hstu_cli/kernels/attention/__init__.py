"""Jagged HSTU attention: causal over the history, each candidate sees the history and itself.

Section 3.2 of "Actions Speak Louder than Words" (ICML 2024): SiLU takes the softmax's place, so a
row needs no normalisation and partial sums over keys simply add.
"""

import torch

from hstu_cli.backend import prefers_few_shapes
from hstu_cli.kernels.attention.plan import BatchPlan, plan_batch
from hstu_cli.kernels.dispatch import choose_impl_for, wants_gradient


def hstu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_offsets: torch.Tensor,
    num_candidates: torch.Tensor | None = None,
    *,
    alpha: float,
    scaling_seqlen: int,
    impl: str = "auto",
) -> torch.Tensor:
    """HSTU attention over a jagged batch: `o_i = sum_j SiLU(alpha * q_i . k_j) / L * M_ij * v_j`.

    q, k, v: [tokens, heads, head_dim], one floating dtype and device; any strides. Sequence b is
      rows seq_offsets[b] to seq_offsets[b + 1]: its history, then its candidates.
    seq_offsets: [B + 1] int32 or int64, from 0 to `tokens`, never decreasing.
    num_candidates: [B] integers, the last tokens of each sequence, or None for none.
    alpha: scale of the scores; scaling_seqlen: the divisor L, a constant of the model.
    impl: `auto` or a name from `hstu_cli.kernels.dispatch.IMPLEMENTATIONS`.

    M_ij is 1 where token i may see token j: for a history token, j <= i; for a candidate, j in the
    history or j == i. Returns o, [tokens, heads, head_dim] contiguous, in q's dtype; differentiable in
    q, k and v. Triton computes in float32, float16 and bfloat16, head dims up to 256; a
    tensor whose last dimension is not contiguous it copies first.
    Raises ValueError for inputs that do not fit together; UnavailableError for native where it cannot be
    built, and for triton where it is not installed.

    Plans the batch on every call; who runs several layers on one batch calls `plan_batch` once and
    `jagged_attention` for each.
    """
    check_like_q(q, k, v)
    plan = plan_batch(seq_offsets, num_candidates, q.shape[0], q.device)
    return jagged_attention(q, k, v, plan, alpha=alpha, scaling_seqlen=scaling_seqlen, impl=impl)


def jagged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BatchPlan,
    *,
    alpha: float,
    scaling_seqlen: int,
    impl: str = "auto",
) -> torch.Tensor:
    """`hstu_attention` of a planned batch: looks at shapes, dtypes and devices alone, and waits for nothing."""
    check_planned(q, k, v, plan, scaling_seqlen)
    match choose_impl_for(impl, q, k, v, has_gradients=True):
        case "reference":
            from hstu_cli.kernels.attention.reference import attention
        case "blocked":
            if prefers_few_shapes(q.device) and not wants_gradient(q, k, v):
                from hstu_cli.kernels.attention.bucketed import attention

                return attention(q, k, v, plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
            from hstu_cli.kernels.attention.backward import attention
        case "native":
            from hstu_cli.kernels.attention.native import attention
        case "ascend":
            from hstu_cli.kernels.attention.ascend import attention

            return attention(q, k, v, plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
        case "triton":
            from hstu_cli.kernels.attention.triton_backward import attention

            return attention(q, k, v, plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
    return attention(q, k, v, *plan.on_host(), alpha=alpha, scaling_seqlen=scaling_seqlen)


def check_like_q(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """ValueError unless q is [tokens, heads, head_dim] of a floating dtype, and k and v are like it."""
    if q.dim() != 3:
        raise ValueError(f"q must be [tokens, heads, head_dim], not {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} must be like q, {list(q.shape)} {q.dtype} on {q.device}, "
                f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating point, not {q.dtype}")


def check_planned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, scaling_seqlen: int) -> None:
    """ValueError unless q, k and v fit together and are what was planned for."""
    check_like_q(q, k, v)
    check_tokens(q, plan)
    check_scaling(scaling_seqlen)


def check_tokens(x: torch.Tensor, plan: BatchPlan) -> None:
    """ValueError unless x has the rows, and is on the device, that the batch was planned for."""
    if x.shape[0] != plan.num_tokens or x.device != plan.seq_offsets.device:
        raise ValueError(
            f"the batch was planned for {plan.num_tokens} tokens on {plan.seq_offsets.device}, "
            f"not {x.shape[0]} on {x.device}"
        )


def check_scaling(scaling_seqlen: int) -> None:
    """ValueError for what scores cannot be divided by."""
    if scaling_seqlen < 1:
        raise ValueError(f"scaling_seqlen must be at least 1, not {scaling_seqlen}")
