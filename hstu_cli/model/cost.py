"""What the block costs: FLOPs, bytes and memory, from the shapes alone.

FLOPs are counted as the reference implementation counts them: a multiply-add is two, attention
counts the pairs that the mask allows and two products of 2 * d for each pair and head, and norms,
activations and work done again are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hstu_cli.config import ModelConfig

# Shapes: D hidden_dim, H heads, d head_dim.


@dataclass(frozen=True, slots=True)
class SequenceShape:
    """One request in tokens: before the candidates, how many of those are cached, and candidates."""

    num_history: int
    num_cached: int
    num_candidates: int

    @property
    def num_new(self) -> int:
        """Tokens that must be computed."""
        return self.num_history - self.num_cached + self.num_candidates

    @property
    def num_pairs(self) -> int:
        """Pairs (new token, token that it sees): history sees what precedes it and itself, a candidate all of it."""
        causal = (self.num_history * (self.num_history + 1) - self.num_cached * (self.num_cached + 1)) // 2
        return causal + self.num_candidates * (self.num_history + 1)


def linear_flops(config: ModelConfig, num_tokens: int) -> int:
    """The two linear layers of one HSTU layer: D to 4 * H * d, and H * d to D."""
    return 2 * num_tokens * config.hidden_dim * 5 * config.attention_dim


def attention_flops(config: ModelConfig, num_pairs: int) -> int:
    """Scores and weighted values of one HSTU layer: two products of 2 * d for each pair and head."""
    return 4 * config.attention_dim * num_pairs


def block_flops(config: ModelConfig, sequences: Iterable[SequenceShape]) -> int:
    """All layers over a batch."""
    sequences = list(sequences)
    linear = linear_flops(config, sum(s.num_new for s in sequences))
    return config.num_layers * (linear + attention_flops(config, sum(s.num_pairs for s in sequences)))


def training_flops(config: ModelConfig, sequences: Iterable[SequenceShape]) -> float:
    """Forward and backward pass of all layers: three times the linear layers', three and a half times attention's.

    A linear layer's gradients are two products of its size; attention's backward pass makes its scores once more beside
    the gradients of scores, values, queries and keys: five products where the forward pass has two. What else is
    computed again is not counted.
    """
    sequences = list(sequences)
    linear = linear_flops(config, sum(s.num_new for s in sequences))
    return config.num_layers * (3 * linear + 3.5 * attention_flops(config, sum(s.num_pairs for s in sequences)))


STATS_BYTES = 16
"""Mean and deviation of a token in both layer norms of a layer, float32."""


def kept_bytes(config: ModelConfig, num_tokens: int, itemsize: int, variant: str, *, dropout: bool) -> int:
    """What one layer keeps of so many tokens from its forward to its backward pass, its input included.

    variant: `baseline`, where every operator keeps its own inputs, or one of `fused_layer.RECOMPUTE`. dropout: whether
    there is any; torch's own keeps what it multiplies by.
    """
    hidden, inner = config.hidden_dim, config.attention_dim
    if variant == "baseline":
        # x, normed x; SiLU's input and output; o, normed o, gated; statistics, on a CPU in the dtype of the rest.
        elements = 2 * hidden + 8 * inner + (4 if dropout else 3) * inner + 4
        return num_tokens * elements * itemsize
    elements = hidden + 4 * inner + inner  # x; SiLU's input; o
    if "layernorm" not in variant:
        elements += hidden  # normed x
    if "silu" not in variant:
        elements += 4 * inner  # u, v, q and k
    return num_tokens * (elements * itemsize + STATS_BYTES)


def block_bytes(config: ModelConfig, sequences: Iterable[SequenceShape], itemsize: int, *, stored: bool) -> int:
    """The least memory traffic of all layers over a batch: what lies between the operations stays on the chip.

    The weights once, the block's input and output, the cached keys and values read and, with `stored`,
    the new ones written. itemsize: bytes of an element.
    """
    sequences = list(sequences)
    new, cached = sum(s.num_new for s in sequences), sum(s.num_cached for s in sequences)
    written = sum(s.num_history - s.num_cached for s in sequences) if stored else 0
    keys_and_values = config.kv_elements_per_token * (cached + written)
    return itemsize * (block_parameters(config) + 2 * new * config.hidden_dim + keys_and_values)


def block_parameters(config: ModelConfig) -> int:
    """Weights of all layers: linear layers, their biases, and both norms."""
    inner, hidden = config.attention_dim, config.hidden_dim
    return config.num_layers * (4 * inner * (hidden + 1) + inner * hidden + 2 * hidden + 2 * inner)


def activation_bytes(config: ModelConfig, sequences: Iterable[SequenceShape], itemsize: int, *, dense: bool) -> int:
    """About the most memory that one layer's intermediates take at a time.

    u, v, q, k before and after SiLU, three rows of the layer's width, padded copies of q, k, v and
    the output, and scores: those of a strip of 512 rows, or, with `dense`, three whole matrices of
    the longest sequence.
    """
    sequences = list(sequences)
    rows = sum(s.num_new for s in sequences) * (8 * config.attention_dim + 3 * config.hidden_dim)
    copies = max(s.num_cached + s.num_new for s in sequences) * 4 * config.attention_dim
    scores = max(
        (s.num_new if dense else min(s.num_new, 512)) * (s.num_cached + s.num_new) * config.num_heads for s in sequences
    )
    return itemsize * (rows + copies + scores * (3 if dense else 2))
