"""The two layer norms of an HSTU layer: of its input, and of the attention's output, gated by u."""

import torch

from hstu_cli.kernels.dispatch import choose_impl_for
from hstu_cli.kernels.inputs import check_alike


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, impl: str = "auto"
) -> torch.Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension.

    x: [rows, width], best with the elements of a row side by side; weight, bias: [width]; result [rows, width]
    contiguous; one floating dtype and device. Mean and variance are taken in float32 at least.
    impl: `auto` or a name from `hstu_cli.kernels.dispatch.IMPLEMENTATIONS`.
    Raises ValueError for inputs that do not fit together.
    """
    check_norm(x, weight, bias, x)
    match choose_impl_for(impl, x, weight, bias):
        case "native":
            from hstu_cli.kernels.norm.native import layer_norm
        case "triton":
            from hstu_cli.kernels.norm.triton import layer_norm
        case _:
            from hstu_cli.kernels.norm.reference import layer_norm
    return layer_norm(x, weight, bias, eps)


def layer_norm_mul(
    x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, impl: str = "auto"
) -> torch.Tensor:
    """`LayerNorm(x) * u`: u like x, [rows, width]; else as `layer_norm`."""
    check_norm(x, weight, bias, u)
    match choose_impl_for(impl, x, u, weight, bias):
        case "native":
            from hstu_cli.kernels.norm.native import layer_norm_mul
        case "triton":
            from hstu_cli.kernels.norm.triton import layer_norm_mul
        case _:
            from hstu_cli.kernels.norm.reference import layer_norm_mul
    return layer_norm_mul(x, u, weight, bias, eps)


def check_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, u: torch.Tensor) -> None:
    """ValueError where the input of a norm, its parameters and what multiplies its result do not fit together."""
    if x.dim() != 2 or weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"x must be [rows, width], weight and bias [width], not {shapes}")
    if u.shape != x.shape:
        raise ValueError(f"u must be {list(x.shape)} like x, not {list(u.shape)}")
    check_alike("u, weight and bias", x, u, weight, bias)
