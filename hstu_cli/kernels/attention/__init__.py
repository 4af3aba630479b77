"""Jagged HSTU attention: causal over the history, each candidate sees the history and itself.

Section 3.2 of "Actions Speak Louder than Words" (ICML 2024): SiLU takes the softmax's place, so a
row needs no normalisation and partial sums over keys simply add.
"""

from itertools import pairwise

import torch

from hstu_cli.kernels.checks import int_list
from hstu_cli.kernels.dispatch import choose_impl_for


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
    q, k and v, but for native.
    Raises ValueError for inputs that do not fit together, and for native where a gradient is wanted;
    UnavailableError for native where it cannot be built.
    """
    offsets, candidates = check_jagged_inputs(q, k, v, seq_offsets, num_candidates)
    if scaling_seqlen < 1:
        raise ValueError(f"scaling_seqlen must be at least 1, not {scaling_seqlen}")
    match choose_impl_for(impl, q, k, v):
        case "reference":
            from hstu_cli.kernels.attention.reference import attention
        case "blocked":
            from hstu_cli.kernels.attention.backward import attention
        case "native":
            from hstu_cli.kernels.attention.native import attention
    return attention(q, k, v, offsets, candidates, alpha=alpha, scaling_seqlen=scaling_seqlen)


def check_jagged_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_offsets: torch.Tensor,
    num_candidates: torch.Tensor | None,
) -> tuple[list[int], list[int]]:
    """Validate a jagged batch; return its offsets [B + 1] and candidate counts [B] as Python ints."""
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
    offsets = int_list("seq_offsets", seq_offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != q.shape[0]:
        raise ValueError(f"seq_offsets must run from 0 to the {q.shape[0]} tokens, not {_ends(offsets)}")
    lengths = [end - start for start, end in pairwise(offsets)]
    if any(length < 0 for length in lengths):
        raise ValueError("seq_offsets must never decrease")
    if num_candidates is None:
        return offsets, [0] * len(lengths)
    candidates = int_list("num_candidates", num_candidates)
    if len(candidates) != len(lengths):
        raise ValueError(
            f"num_candidates must hold one count for each of {len(lengths)} sequences, not {len(candidates)}"
        )
    for count, length in zip(candidates, lengths, strict=True):
        if not 0 <= count <= length:
            raise ValueError(f"num_candidates holds {count} for a sequence of {length} tokens")
    return offsets, candidates


def _ends(offsets: list[int]) -> str:
    return f"from {offsets[0]} to {offsets[-1]}" if offsets else "empty"
