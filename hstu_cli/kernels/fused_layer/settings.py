"""What a fused HSTU layer computes with, besides its input: the weights, and what decides how."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

RECOMPUTE = ("none", "layernorm", "silu", "layernorm+silu")
"""What a backward pass computes again instead of keeping it: the normalised input, and u, v, q and k."""


class LayerWeights(NamedTuple):
    """Weights of one layer: width D, H heads of d, H * d together."""

    input_norm_weight: torch.Tensor  # [D]
    input_norm_bias: torch.Tensor  # [D]
    uvqk_weight: torch.Tensor  # [4 * H * d, D]
    uvqk_bias: torch.Tensor  # [4 * H * d]
    output_norm_weight: torch.Tensor  # [H * d]
    output_norm_bias: torch.Tensor  # [H * d]
    output_weight: torch.Tensor  # [D, H * d]

    def check(self, width: int, num_heads: int, device: torch.device) -> None:
        """ValueError naming the first weight whose shape or device does not fit an input of this width."""
        inner = self.output_norm_weight.shape[0] if self.output_norm_weight.dim() == 1 else 0
        if inner < 1 or num_heads < 1 or inner % num_heads:
            raise ValueError(
                f"output_norm_weight must be one row for {num_heads} equal heads, "
                f"not {list(self.output_norm_weight.shape)}"
            )
        shapes = ((width,), (width,), (4 * inner, width), (4 * inner,), (inner,), (inner,), (width, inner))
        for name, weight, shape in zip(self._fields, self, shapes, strict=True):
            if weight.shape != torch.Size(shape) or weight.device != device:
                raise ValueError(
                    f"{name} must be {list(shape)} on {device}, not {list(weight.shape)} on {weight.device}"
                )
            if not weight.dtype.is_floating_point:
                raise ValueError(f"{name} must be floating point, not {weight.dtype}")


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """How a layer is computed; see `fused_hstu_layer`. dtype: of activations and matrix products."""

    num_heads: int
    alpha: float
    scaling_seqlen: int
    eps: float
    dropout: float
    seed: int
    recompute: str
    dtype: torch.dtype

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `fused_hstu_layer`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def keeps_normed(self) -> bool:
        """Whether the normalised input is kept for the backward pass."""
        return "layernorm" not in self.recompute

    @property
    def keeps_activated(self) -> bool:
        """Whether u, v, q and k are kept beside what SiLU made them of."""
        return "silu" not in self.recompute
