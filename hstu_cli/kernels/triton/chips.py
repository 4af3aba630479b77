"""The chips that launch settings are made for, and the shared memory of each."""

import torch

from hstu_cli.backend import backend_of

CHIPS = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability without its dot to the KB of shared memory that one block may take.

From the table of technical specifications in NVIDIA's CUDA C++ programming guide.
"""

OLDEST = (8, 0)
"""The first compute capability with bfloat16 and asynchronous copies."""


def chip_of(device: torch.device) -> int:
    """The entry of `CHIPS` that stands for a device; that with least shared memory where there is no GPU."""
    capability = backend_of(device).compute_capability
    return 89 if capability is None else nearest_chip(capability)


def nearest_chip(capability: tuple[int, int]) -> int:
    """The entry of `CHIPS` of the same generation: 8.6 and 8.7 are taken as 8.9, 10.3 and 11.0 as 10.0."""
    major, minor = capability
    if major == 8:
        return 80 if minor == 0 else 89
    return {9: 90, 10: 100, 11: 100}.get(major, 120)
