"""Tensors whose rows are so far apart that 32 bits do not hold the place of an element."""

import contextlib
import mmap
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def rows_far_apart(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A copy of a tensor [3, width] whose last row begins beyond element 2^31; what lies between takes no memory."""
    stride = (1 << 30) + 16
    num_elements = 2 * stride + tensor.shape[1]
    if tensor.device.type == "cpu":
        memory = mmap.mmap(-1, num_elements * tensor.itemsize)  # pages that nobody touches are not there
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
    else:
        flat = torch.empty(num_elements, dtype=tensor.dtype, device=tensor.device)
    far = flat.as_strided(tensor.shape, (stride, 1))
    far.copy_(tensor)
    yield far
