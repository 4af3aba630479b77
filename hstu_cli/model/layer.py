"""The HSTU layer and the block of layers; attention comes from outside, so that a cache can slot in."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from hstu_cli.config import ModelConfig
from hstu_cli.kernels import (
    BatchPlan,
    LayerWeights,
    fused_hstu_layer,
    jagged_attention,
    layer_norm_mul,
    linear_residual,
    norm_linear_silu,
    norm_mul_linear_residual,
)
from hstu_cli.kernels.dispatch import wants_gradient

# Shapes: T tokens (jagged over the batch), D hidden_dim, H heads, d head_dim.


class Attention(Protocol):
    """What a layer asks of a batch: the attention output of its new tokens.

    impl: the implementation of the batch's operators, those of the layer included.
    """

    impl: str

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """O [T, H, d] for q, k and v [T, H, d] of layer number `layer`."""
        ...


@dataclass(frozen=True, slots=True)
class JaggedAttention:
    """Attention over the tokens of the batch alone: nothing is cached."""

    config: ModelConfig
    plan: BatchPlan
    impl: str = "auto"

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Attention`."""
        config = self.config
        return jagged_attention(
            q, k, v, self.plan, alpha=config.alpha, scaling_seqlen=config.scaling_seqlen, impl=self.impl
        )


class HSTULayer(nn.Module):
    """One layer: `x' = x + (LayerNorm(attention(q, k, v)) * u) W_o` with u, v, q, k from SiLU(norm(x) W).

    Equations 1 to 3 of "Actions Speak Louder than Words" (ICML 2024). Where gradients are wanted it is
    `fused_hstu_layer`, unless keys are cached.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.input_norm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.uvqk = nn.Linear(config.hidden_dim, 4 * config.attention_dim)
        self.output_norm = nn.LayerNorm(config.attention_dim, eps=config.norm_eps)
        self.output = nn.Linear(config.attention_dim, config.hidden_dim, bias=False)
        self.dropout = 0.0  # of the gated attention output, in training
        self.recompute = "none"  # by the backward pass; see `fused_hstu_layer`

    def forward(self, x: torch.Tensor, attention: Attention, layer: int) -> torch.Tensor:
        """X [T, D] to x' [T, D]."""
        impl = attention.impl
        if isinstance(attention, JaggedAttention) and wants_gradient(x, *self.weights):
            return self._fused(x, attention)
        norm, uvqk = self.input_norm, self.uvqk
        u, *vqk = norm_linear_silu(
            x, norm.weight, norm.bias, uvqk.weight, uvqk.bias, eps=norm.eps, num_parts=4, impl=impl
        )  # [T, H * d] each
        v, q, k = (part.unflatten(1, (self.num_heads, self.head_dim)) for part in vqk)
        o = attention(layer, q, k, v).flatten(1)  # [T, H * d]
        norm, weight = self.output_norm, self.output.weight
        if self.dropout and self.training:  # what is dropped lies between the norm and the product
            gated = layer_norm_mul(o, u, norm.weight, norm.bias, eps=norm.eps, impl=impl)
            return linear_residual(F.dropout(gated, self.dropout), weight, x, impl=impl)
        return norm_mul_linear_residual(o, u, norm.weight, norm.bias, weight, x, eps=norm.eps, impl=impl)

    @property
    def weights(self) -> LayerWeights:
        """The layer's parameters, as `fused_hstu_layer` takes them."""
        norm, output_norm = self.input_norm, self.output_norm
        return LayerWeights(
            norm.weight,
            norm.bias,
            self.uvqk.weight,
            self.uvqk.bias,
            output_norm.weight,
            output_norm.bias,
            self.output.weight,
        )

    def _fused(self, x: torch.Tensor, attention: JaggedAttention) -> torch.Tensor:
        """See `forward`; activations are in autocast's dtype where that is on, which `reference` follows by itself.

        The seed of a dropout mask comes from torch's generator, so the mask follows from that generator's seed.
        """
        config, device_type = attention.config, x.device.type
        casts = torch.is_autocast_enabled(device_type) and attention.impl != "reference"
        dropout = self.dropout if self.training else 0.0
        return fused_hstu_layer(
            x,
            self.weights,
            attention.plan,
            num_heads=self.num_heads,
            alpha=config.alpha,
            scaling_seqlen=config.scaling_seqlen,
            eps=self.input_norm.eps,
            dropout=dropout,
            seed=int(torch.randint(2**63 - 1, ())) if dropout else 0,
            recompute=self.recompute,
            dtype=torch.get_autocast_dtype(device_type) if casts else None,
            impl=attention.impl,
        )


class HSTUBlock(nn.ModuleList):
    """The layers in order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(HSTULayer(config) for _ in range(config.num_layers))

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """X [T, D] through all layers."""
        for index, layer in enumerate(self):
            x = layer(x, attention, index)
        return x
