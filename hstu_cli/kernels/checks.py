"""Checks of arguments that several operators share."""

import torch


def int_list(name: str, tensor: torch.Tensor) -> list[int]:
    """A one-dimensional int32 or int64 tensor as Python integers; ValueError for anything else."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be one row of int32 or int64, not {tensor.dtype} {list(tensor.shape)}")
    return tensor.tolist()
