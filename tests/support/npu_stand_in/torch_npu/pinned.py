"""Memory of the host beside the stand-in device: pinned where that is asked for, for which torch has no allocator."""

import itertools
from typing import Any

import torch

from torch_npu import memory

_addresses: set[int] = set()
_storages: list[Any] = []  # for the life of the process, so that the addresses name nothing else


def host_empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    """`empty.memory_format` of the CPU."""
    contiguous_alone(memory_format)
    result = torch.empty_strided(size, contiguous_strides(size), dtype=dtype or torch.get_default_dtype())
    if pin_memory:
        _keep(result)
    return result


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """`_pin_memory`: a copy."""
    result = tensor.clone()
    _keep(result)
    return result


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """Whether a tensor of the host is in pinned memory."""
    return memory.storage_address(tensor) in _addresses


def contiguous_strides(size: Any) -> list[int]:
    """Strides of a contiguous tensor of this size."""
    strides = list(itertools.accumulate(reversed([max(n, 1) for n in size[1:]]), lambda a, b: a * b, initial=1))
    return strides[::-1][: len(size)]


def contiguous_alone(memory_format: Any) -> None:
    """NotImplementedError for any other format."""
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        raise NotImplementedError(f"empty of {memory_format}")


def _keep(tensor: torch.Tensor) -> None:
    _addresses.add(memory.storage_address(tensor))
    _storages.append(tensor.untyped_storage())
