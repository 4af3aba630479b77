"""Tensors as arguments of Triton kernels: layouts that kernels take, and dtypes by Triton's names."""

import functools
from typing import Any

import torch

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a contiguous copy where elements of its last dimension are not side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def type_name(dtype: torch.dtype) -> str:
    """A dtype as signatures of kernels name it, such as `bf16`; KeyError for one that no kernel takes."""
    return _TYPE_NAMES[dtype]


@functools.cache
def sum_dtype(dtype: torch.dtype) -> Any:
    """What kernels compute in, as triton.language names it: float32, and float64 for float64."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
