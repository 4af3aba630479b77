"""The layer norms as one Triton kernel: each row is read once, normalised in registers, and multiplied by u there."""

import torch
import triton
import triton.language as tl

from hstu_cli.backend import backend_of
from hstu_cli.kernels.triton.aot import AotSpec
from hstu_cli.kernels.triton.arguments import row_major, sum_dtype, type_name
from hstu_cli.kernels.triton.tuning import LaunchConfig, bucket, choose_config

MAX_BLOCK_WIDTH = 8192
"""Wider rows are read three times, in blocks of this: for the mean, the variance and the result."""


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """See `hstu_cli.kernels.norm.layer_norm`."""
    return _normalise(x, None, weight, bias, eps)


def layer_norm_mul(
    x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `hstu_cli.kernels.norm.layer_norm_mul`: rounded to a narrow dtype once, after the product with u."""
    return _normalise(x, u, weight, bias, eps)


def launch_configs(width: int) -> tuple[LaunchConfig, ...]:
    """The choices for rows of a width: 16 or 8 values a thread, and several narrow rows a block.

    They are the same for all chips: the kernel waits for memory on each of them.
    """
    block = min(bucket(width), MAX_BLOCK_WIDTH)
    choices = [(1, block // 512), (1, block // 256)]
    if block <= 1024:
        choices.append((4, block // 128))
    configs = (
        LaunchConfig.of(num_warps=min(max(warps, 1), 16), BLOCK_ROWS=rows, BLOCK_WIDTH=block) for rows, warps in choices
    )
    return tuple(dict.fromkeys(configs))


def aot_specs(chip: int) -> list[AotSpec]:
    """Every configuration, for widths of the models and one that is read in blocks; see `AotSpec`."""
    return [
        AotSpec(
            kernel=layer_norm_kernel,
            signature=dict.fromkeys(("x", "u", "weight", "bias", "out"), f"*{type_name(dtype)}")
            | {"num_rows": "i32", "x_stride": "i32", "u_stride": "i32"},
            constexprs={"WIDTH": width, "EPS": 1e-5, "GATED": gated, "SUMS": sum_dtype(dtype), **dict(config.blocks)},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            label=f"{'layer_norm_mul' if gated else 'layer_norm'} {width} {type_name(dtype)} {config.label}",
            aligned=("x_stride", "u_stride"),
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for width in (1024, 512, 2 * MAX_BLOCK_WIDTH)
        for gated in (False, True)
        for config in launch_configs(width)
    ]


def _normalise(
    x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    num_rows, width = x.shape
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    x, weight, bias = row_major(x), row_major(weight), row_major(bias)
    gate = x if u is None else row_major(u)

    def run(config: LaunchConfig) -> None:
        grid = (triton.cdiv(num_rows, config.block("BLOCK_ROWS")),)
        layer_norm_kernel[grid](
            x, gate, weight, bias, out, num_rows, x.stride(0), gate.stride(0),
            WIDTH=width, EPS=eps, GATED=u is not None, SUMS=sum_dtype(x.dtype), **config.options(),
        )  # fmt: skip

    with backend_of(x.device).as_current():
        key = (x.dtype, width, bucket(num_rows), u is not None)
        run(choose_config("layer_norm", key, launch_configs(width), run, device=x.device, source=__file__))
    return out


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    x, u, weight, bias, out, num_rows, x_stride, u_stride,
    WIDTH: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """`out = LayerNorm(x) [* u]`, BLOCK_ROWS rows a program; rows of x and u are so many elements apart.

    SUMS: the dtype of mean, variance and all arithmetic. The variance is that of the centred values: two passes.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = (row < num_rows)[:, None]
    x_row, u_row, out_row = x + row[:, None] * x_stride, u + row[:, None] * u_stride, out + row[:, None] * WIDTH
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    if BLOCK_WIDTH >= WIDTH:
        inside = exists & (column < WIDTH)
        values = tl.load(x_row + column, mask=inside, other=0.0).to(SUMS)
        centred = tl.where(inside, values - (tl.sum(values, 1) / WIDTH)[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / WIDTH
        normed = centred * (1.0 / tl.sqrt(variance + EPS))[:, None]
        _scale_and_store(normed, u_row, weight, bias, out_row, column, inside, WIDTH, GATED, SUMS)
    else:
        total = tl.zeros([BLOCK_ROWS], SUMS)
        for start in range(0, WIDTH, BLOCK_WIDTH):
            inside = exists & (start + column < WIDTH)
            total += tl.sum(tl.load(x_row + start + column, mask=inside, other=0.0).to(SUMS), 1)
        mean = (total / WIDTH)[:, None]
        squares = tl.zeros([BLOCK_ROWS], SUMS)
        for start in range(0, WIDTH, BLOCK_WIDTH):
            inside = exists & (start + column < WIDTH)
            values = tl.load(x_row + start + column, mask=inside, other=0.0).to(SUMS)
            centred = tl.where(inside, values - mean, 0.0)
            squares += tl.sum(centred * centred, 1)
        scale = (1.0 / tl.sqrt(squares / WIDTH + EPS))[:, None]
        for start in range(0, WIDTH, BLOCK_WIDTH):
            inside = exists & (start + column < WIDTH)
            values = tl.load(x_row + start + column, mask=inside, other=0.0).to(SUMS)
            normed = (values - mean) * scale
            _scale_and_store(normed, u_row, weight, bias, out_row, start + column, inside, WIDTH, GATED, SUMS)


@triton.jit
def _scale_and_store(
    normed, u_row, weight, bias, out_row, column, inside,
    WIDTH: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Apply weight, bias and u to normalised values [rows, columns], and store them."""
    result = normed * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(SUMS)
    result += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(SUMS)
    if GATED:
        result *= tl.load(u_row + column, mask=inside, other=0.0).to(SUMS)
    tl.store(out_row + column, result.to(out_row.dtype.element_ty), mask=inside)
