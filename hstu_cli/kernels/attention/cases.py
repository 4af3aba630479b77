"""The cases of the attention operators: one table for their tests and their benchmarks."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A jagged batch: history and candidate tokens per sequence, and the head shape."""

    history: tuple[int, ...]
    candidates: tuple[int, ...]
    num_heads: int = 2
    head_dim: int = 32

    @property
    def id(self) -> str:
        """A readable name for a test or a table row."""
        shape = "_".join(f"{h}+{c}" for h, c in zip(self.history, self.candidates, strict=True)) or "empty"
        return f"{shape}-{self.num_heads}x{self.head_dim}"

    @property
    def num_tokens(self) -> int:
        """Rows of q, k and v."""
        return sum(self.history) + sum(self.candidates)


ATTENTION_CASES = (
    AttentionCase((), ()),
    AttentionCase((0,), (0,)),
    AttentionCase((0,), (1,)),
    AttentionCase((1,), (0,)),
    AttentionCase((1,), (1,)),
    AttentionCase((0, 0, 7), (3, 0, 0)),
    AttentionCase((41, 0, 1, 300), (5, 17, 0, 2), num_heads=3, head_dim=40),
    AttentionCase((256, 257), (0, 100), num_heads=1, head_dim=64),
    AttentionCase((5, 6, 7, 8, 9, 300), (1, 1, 2, 1, 40, 1), num_heads=4, head_dim=16),
    AttentionCase((513,), (300,), num_heads=2, head_dim=128),
    AttentionCase((64,) * 8, (8,) * 8, num_heads=4, head_dim=256),
)
"""Lengths 0 and 1, no multiples of any block, very uneven batches, more candidates than a strip."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The arguments of `hstu_attention` for a case."""

    q: torch.Tensor  # [T, H, d], like k and v
    k: torch.Tensor
    v: torch.Tensor
    seq_offsets: torch.Tensor  # [B + 1] int64
    num_candidates: torch.Tensor  # [B] int64
    alpha: float
    scaling_seqlen: int


def make_inputs(
    case: AttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> AttentionInputs:
    """Random inputs for a case: q, k and v are views into one wider tensor, as in the model."""
    generator = torch.Generator().manual_seed(seed)
    uvqk = torch.randn(case.num_tokens, 4, case.num_heads, case.head_dim, generator=generator)
    _, v, q, k = uvqk.to(dtype=dtype, device=device).unbind(1)
    lengths = torch.tensor([0, *(h + c for h, c in zip(case.history, case.candidates, strict=True))])
    return AttentionInputs(
        q=q,
        k=k,
        v=v,
        seq_offsets=lengths.cumsum(0).to(device),
        num_candidates=torch.tensor(case.candidates, dtype=torch.int64, device=device),
        alpha=case.head_dim**-0.5,
        scaling_seqlen=max(case.history, default=0) + 100,
    )
