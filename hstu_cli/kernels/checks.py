"""Checks of arguments that several operators share."""

import torch

from hstu_cli.backend import upload


def int_list(name: str, tensor: torch.Tensor) -> list[int]:
    """A one-dimensional int32 or int64 tensor as Python integers; ValueError for anything else."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be one row of int32 or int64, not {tensor.dtype} {list(tensor.shape)}")
    return tensor.tolist()


def int32_on(device: torch.device | str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Rows of integers as int32 on a device; from the host together, in one copy that nobody waits for."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return upload([tensor.to(torch.int32) for tensor in tensors], torch.device(device))
    return [tensor.to(device, torch.int32) for tensor in tensors]
