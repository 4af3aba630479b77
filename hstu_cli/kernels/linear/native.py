"""The linear layers on weights that are packed once; SiLU and the sum happen before the result is rounded.

In bf16: by the C++ operators where they have tiles, else by oneDNN. `torch.nn.functional.linear`
packs its weight on every call, which for few rows takes as long as the product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hstu_cli.kernels.linear import reference

PART_COLUMNS = 32
"""The C++ operator gives parts of a result places of their own where they are multiples of so many columns wide."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """A packed weight, and the state of the tensor that it was made from."""

    state: tuple[object, ...]
    weight: torch.Tensor


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> _Packed, as long as the weight lives


def forget(weight: torch.Tensor) -> None:
    """Pack this weight anew at its next use, after a write that torch does not count, as one through `weight.data`."""
    _packed.pop(weight, None)


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_parts: int) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_silu`."""
    if goes_into_tiles(x):
        packed = packed_tiles(weight)
        return in_separate_parts(
            lambda parts: torch.ops.hstu_native.linear_silu(x, packed, bias, parts), len(bias), num_parts
        )
    if _goes_to_onednn(x):
        packed = _packed_weight(weight, torch.ops.mkldnn._reorder_linear_weight)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "swish", [], "")
        return reference.in_parts(y, num_parts)
    return reference.linear_silu(x, weight, bias, num_parts)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_residual`."""
    if goes_into_tiles(x):
        return torch.ops.hstu_native.linear_residual(x, packed_tiles(weight), residual)
    if _goes_to_onednn(x):
        packed = _packed_weight(weight, torch.ops.mkldnn._reorder_linear_weight)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, None, "add")
    return reference.linear_residual(x, weight, residual)


def goes_into_tiles(x: torch.Tensor) -> bool:
    """Whether the C++ operators multiply these rows in tiles."""
    return x.dtype == torch.bfloat16 and x.numel() > 0 and torch.ops.hstu_native.has_bf16_tiles()


def _goes_to_onednn(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() > 0 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packed_tiles(weight: torch.Tensor) -> torch.Tensor:
    """A bf16 weight as the C++ operators multiply it in tiles; packed at its first use."""
    return _packed_weight(weight, torch.ops.hstu_native.pack_weight)


def in_separate_parts(compute: Callable[[int], torch.Tensor], columns: int, num_parts: int) -> torch.Tensor:
    """Parts of a result of so many columns, each in memory of its own where the C++ operator can do that.

    compute: takes a number of parts to [parts, rows, columns / parts].
    """
    if columns % (num_parts * PART_COLUMNS) == 0:
        return compute(num_parts)
    return reference.in_parts(compute(1)[0], num_parts)


def _packed_weight(weight: torch.Tensor, pack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The weight as its product wants it; packed again where it was written to or moved."""
    # Tensors of inference mode count no writes; what is written to them is seen after `forget` alone.
    version = None if weight.is_inference() else weight._version
    state = (weight.data_ptr(), version, weight.shape, weight.stride())
    packed = _packed.get(weight)
    if packed is None or packed.state != state:
        _packed[weight] = packed = _Packed(state, pack(weight.detach()))
    return packed.weight
