"""The two linear layers of an HSTU layer, each with what follows it: SiLU, and the residual sum."""

import torch

from hstu_cli.kernels.dispatch import choose_impl_for
from hstu_cli.kernels.inputs import check_alike


def linear_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_parts: int | None = None, impl: str = "auto"
) -> torch.Tensor:
    """`SiLU(x W' + b)`: x [rows, in], weight [out, in], bias [out], result [rows, out]; one floating dtype and device.

    num_parts: the result comes in so many parts of its columns, [num_parts, rows, out / num_parts], each of which may
      lie by itself in memory: who reads only some parts, or one of them row by row, reads less.
    Inputs are fastest where elements of the last dimension are side by side; other layouts may be copied first.
    impl: `auto` or a name from `hstu_cli.kernels.dispatch.IMPLEMENTATIONS`; native keeps weights packed
      while they are as they are, and rounds to a narrow dtype once instead of twice; so does triton, save where
      tuning finds torch's product faster.
    Raises ValueError for inputs that do not fit together.
    """
    check_linear(x, weight, "bias", bias, weight.shape[:1])
    check_parts(num_parts, bias)
    match choose_impl_for(impl, x, weight, bias):
        case "native":
            from hstu_cli.kernels.linear.native import linear_silu
        case "triton":
            from hstu_cli.kernels.linear.triton import linear_silu
        case _:
            from hstu_cli.kernels.linear.reference import linear_silu
    parts = linear_silu(x, weight, bias, num_parts or 1)
    return parts[0] if num_parts is None else parts


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """`residual + x W'`: x [rows, in], weight [out, in], residual and result [rows, out]; else as `linear_silu`."""
    check_linear(x, weight, "residual", residual, (*x.shape[:1], *weight.shape[:1]))
    match choose_impl_for(impl, x, weight, residual):
        case "native":
            from hstu_cli.kernels.linear.native import linear_residual
        case "triton":
            from hstu_cli.kernels.linear.triton import linear_residual
        case _:
            from hstu_cli.kernels.linear.reference import linear_residual
    return linear_residual(x, weight, residual)


def check_linear(x: torch.Tensor, weight: torch.Tensor, name: str, added: torch.Tensor, shape: tuple[int, ...]) -> None:
    """ValueError where x, a weight and what is added to their product, by name and of this shape, do not fit."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [rows, in] and weight [out, in], not {list(x.shape)} and {list(weight.shape)}")
    if added.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}, not {list(added.shape)}")
    check_alike(f"weight and {name}", x, weight, added)


def check_parts(num_parts: int | None, bias: torch.Tensor) -> None:
    """ValueError where so many parts do not divide the columns of a result."""
    if num_parts is not None and (num_parts < 1 or len(bias) % num_parts):
        raise ValueError(f"{num_parts} parts do not divide {len(bias)} columns")
