"""Sizes that tensors are padded to on devices that prepare an operator for each shape anew."""

import torch
import torch.nn.functional as F

LEAST_ROWS = 64
"""The smallest bucket: fewer rows cost as much, since launching an operator takes longer than computing it."""

STEPS = 4
"""Buckets from one power of two to the next, so that at most a quarter is padding."""


def bucket(size: int, least: int = LEAST_ROWS) -> int:
    """The smallest bucket that holds `size`: 0, `least`, then four from one power of two to the next.

    least: a power of two of at least 4. Between 64 and 65,536 there are 41 buckets.
    """
    if size <= 0:
        return 0
    if size <= least:
        return least
    step = (1 << ((size - 1).bit_length() - 1)) // STEPS
    return -(-size // step) * step


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that holds `size` and `least`, which is one itself."""
    return max(least, 1 << max(0, size - 1).bit_length())


def padded(x: torch.Tensor, length: int, value: int = 0) -> torch.Tensor:
    """A host tensor [n, ...] with rows of `value` behind its own, [length, ...]; itself where there are none to add."""
    added = length - len(x)
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, added), value=value) if added else x
