"""Weights of one layer, at random."""

from collections.abc import Callable

import torch

from hstu_cli.kernels import LayerWeights


def random_weights(normal: Callable[..., torch.Tensor], width: int, inner: int) -> LayerWeights:
    """Those of a layer whose heads are `inner` wide together; normal: takes sizes, and `mean` and `std`."""
    return LayerWeights(
        normal(width, mean=1, std=0.2),
        normal(width, std=0.2),
        normal(4 * inner, width, std=width**-0.5),
        normal(4 * inner, std=0.2),
        normal(inner, mean=1, std=0.2),
        normal(inner, std=0.2),
        normal(width, inner, std=inner**-0.5),
    )
