"""The HSTU layer and the block of layers; attention comes from outside, so that a cache can slot in."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, LayerPages, LayerWeights, fused_hstu_layer, hstu_layer
from hstu_cli.kernels.dispatch import wants_gradient

# Shapes: T tokens (jagged over the batch), D hidden_dim, H heads, d head_dim.


class Attention(Protocol):
    """What a layer asks of a batch: where its tokens are, and which keys and values are cached.

    impl: the implementation of the batch's operators, those of the layer included.
    """

    config: ModelConfig
    plan: BatchPlan
    impl: str

    def pages_of(self, layer: int) -> LayerPages | None:
        """What is cached for layer number `layer`; None where nothing is."""
        ...


@dataclass(frozen=True, slots=True)
class JaggedAttention:
    """Attention over the tokens of the batch alone: nothing is cached."""

    config: ModelConfig
    plan: BatchPlan
    impl: str = "auto"

    def pages_of(self, layer: int) -> None:
        """See `Attention`."""


class HSTULayer(nn.Module):
    """One layer: `x' = x + (LayerNorm(attention(q, k, v)) * u) W_o` with u, v, q, k from SiLU(norm(x) W).

    Equations 1 to 3 of "Actions Speak Louder than Words" (ICML 2024): `hstu_layer`, and in training, where gradients
    are wanted or something is dropped, `fused_hstu_layer`, which knows no cache.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.input_norm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.uvqk = nn.Linear(config.hidden_dim, 4 * config.attention_dim)
        self.output_norm = nn.LayerNorm(config.attention_dim, eps=config.norm_eps)
        self.output = nn.Linear(config.attention_dim, config.hidden_dim, bias=False)
        self.dropout = 0.0  # of the gated attention output, in training
        self.recompute = "none"  # by the backward pass; see `fused_hstu_layer`

    def forward(self, x: torch.Tensor, attention: Attention, layer: int) -> torch.Tensor:
        """X [T, D] to x' [T, D]."""
        cached, weights = attention.pages_of(layer), self.weights
        drops = bool(self.dropout) and self.training
        if cached is None and (drops or wants_gradient(x, *weights)):
            return self._fused(x, attention)
        if drops:
            raise ValueError("a layer in training drops; call eval() before it runs over cached keys and values")
        config = attention.config
        return hstu_layer(
            x,
            weights,
            attention.plan,
            cached,
            num_heads=self.num_heads,
            alpha=config.alpha,
            scaling_seqlen=config.scaling_seqlen,
            eps=self.input_norm.eps,
            impl=attention.impl,
        )

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

    def _fused(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
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
