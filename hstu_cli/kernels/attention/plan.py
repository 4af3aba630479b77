"""A jagged batch, validated once and then used by every layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch

from hstu_cli.kernels.checks import int32_on, int_list

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Where the sequences of a batch are, on the device and on the host.

    seq_offsets: int32 [B + 1], num_candidates: int32 [B], on the device of q; see `hstu_attention`.
    num_tokens: rows of q, k and v. max_new_tokens: no sequence has more rows.
    offsets, candidates: the same as Python integers, or None where a graph is captured: what is on the device may
      then change between replays within num_tokens and max_new_tokens.
    Rows behind seq_offsets[B] are padding: `plan_batch` knows none, who pads a batch adds them to num_tokens.
    derived: what implementations worked out of this batch in one layer and need in the next; see `once`.
    """

    seq_offsets: torch.Tensor
    num_candidates: torch.Tensor
    num_tokens: int
    max_new_tokens: int
    offsets: list[int] | None
    candidates: list[int] | None
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.num_candidates.shape[0]

    def on_host(self) -> tuple[list[int], list[int]]:
        """Offsets and candidate counts for an implementation that needs them; ValueError where there are none."""
        if self.offsets is None or self.candidates is None:
            raise ValueError("this batch is described on the device alone, which impl='triton' can use and no other")
        return self.offsets, self.candidates

    def once(self, name: str, make: Callable[[], T], pages: object = None) -> T:
        """What `make` gives, made in the first layer alone; pages: the page plan that it comes from, if it does."""
        made_for = (self.num_tokens, self.seq_offsets.device)
        found = self.derived.get(name)
        if found is None or found[0] != made_for or found[1] is not pages:
            found = self.derived[name] = (made_for, pages, make())
        return found[2]


def plan_batch(
    seq_offsets: torch.Tensor, num_candidates: torch.Tensor | None, num_tokens: int, device: torch.device | str
) -> BatchPlan:
    """Validate a batch for tensors of `num_tokens` rows on `device`.

    seq_offsets [B + 1] and num_candidates [B] (None for none) are int32 or int64; on the host, nothing waits for a
    device. Raises ValueError for numbers that do not fit together.
    """
    offsets = int_list("seq_offsets", seq_offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != num_tokens:
        raise ValueError(f"seq_offsets must run from 0 to the {num_tokens} tokens, not {_ends(offsets)}")
    lengths = [end - start for start, end in pairwise(offsets)]
    if any(length < 0 for length in lengths):
        raise ValueError("seq_offsets must never decrease")
    candidates = [0] * len(lengths) if num_candidates is None else int_list("num_candidates", num_candidates)
    if len(candidates) != len(lengths):
        raise ValueError(
            f"num_candidates must hold one count for each of {len(lengths)} sequences, not {len(candidates)}"
        )
    for count, length in zip(candidates, lengths, strict=True):
        if not 0 <= count <= length:
            raise ValueError(f"num_candidates holds {count} for a sequence of {length} tokens")
    counts = torch.tensor(candidates, dtype=torch.int32) if num_candidates is None else num_candidates
    on_device = int32_on(device, seq_offsets, counts)
    return BatchPlan(
        seq_offsets=on_device[0],
        num_candidates=on_device[1],
        num_tokens=num_tokens,
        max_new_tokens=max(lengths, default=0),
        offsets=offsets,
        candidates=candidates,
    )


def _ends(offsets: list[int]) -> str:
    return f"from {offsets[0]} to {offsets[-1]}" if offsets else "empty"
