"""The linear layers through oneDNN: weights are packed once, SiLU and the sum happen before the result is rounded.

`torch.nn.functional.linear` packs its weight on every call, which for few rows takes as long as the product.
"""

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hstu_cli.kernels.linear import reference


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight in oneDNN's layout, and the state of the tensor that it was made from."""

    address: int
    version: int
    weight: torch.Tensor

    def is_of(self, weight: torch.Tensor) -> bool:
        return (self.address, self.version) == (weight.data_ptr(), weight._version)


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> _Packed, as long as the weight lives


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_silu`."""
    if not _pays(x):
        return reference.linear_silu(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, _packed_weight(weight), bias, "swish", [], "")


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_residual`."""
    if not _pays(x):
        return reference.linear_residual(x, weight, residual)
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, _packed_weight(weight), None, "add")


def _pays(x: torch.Tensor) -> bool:
    """Whether oneDNN takes these rows and is faster: in float32 the product that torch calls anyway is."""
    return x.dtype == torch.bfloat16 and len(x) > 0 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's layout; packed again where it was written to or moved."""
    packed = _packed.get(weight)
    if packed is None or not packed.is_of(weight):
        layout = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        _packed[weight] = packed = _Packed(weight.data_ptr(), weight._version, layout)
    return packed.weight
