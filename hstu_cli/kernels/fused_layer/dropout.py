"""Dropout that is decided by a seed, so that a backward pass makes the same mask again instead of keeping it."""

import torch

LEVELS = 1 << 16
"""Shares are multiples of 1 / LEVELS: one 64-bit random number decides four elements."""


def dropout_level(share: float) -> int:
    """The share to drop, from 0 to below 1, in units of 1 / LEVELS, rounded; ValueError for any other."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"dropout must be from 0 to below 1, not {share}")
    return min(round(share * LEVELS), LEVELS - 1)


def dropout_scale(share: float) -> float:
    """What the elements that stay are multiplied by, so that the mean stays: 1 / (1 - share), share as rounded."""
    return LEVELS / (LEVELS - dropout_level(share))


def dropout_mask(num_rows: int, width: int, share: float, seed: int, device: torch.device) -> torch.Tensor:
    """Which elements are dropped, bool [num_rows, width]; equal arguments make equal masks on a kind of device."""
    # Elsewhere the host draws: not every device has random numbers of 64 bits.
    drawn_on = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    generator = torch.Generator(drawn_on).manual_seed(seed)
    numbers = torch.empty(-(-num_rows * width // 4), dtype=torch.int64, device=drawn_on)
    numbers.random_(-(2**63), None, generator=generator)  # every bit is random
    values = numbers.view(torch.int16)[: num_rows * width].view(num_rows, width)
    return (values < dropout_level(share) - LEVELS // 2).to(device)
