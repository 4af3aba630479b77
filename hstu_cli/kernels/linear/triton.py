"""The linear layers in Triton: a tiled product whose tiles get their SiLU or residual before they are stored.

There are three variants, between which tuning chooses for each shape: `tiles`; `split`, for fewer rows, where several
programs share a tile's sums and a second kernel adds them in a fixed order; and `library`, torch's own product.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hstu_cli.backend import backend_of
from hstu_cli.kernels.linear.reference import in_parts
from hstu_cli.kernels.triton.aot import AotSpec
from hstu_cli.kernels.triton.arguments import row_major, sum_dtype, type_name
from hstu_cli.kernels.triton.chips import chip_of
from hstu_cli.kernels.triton.tuning import LaunchConfig, bucket, choose_config

FEW_ROWS, SOME_ROWS = 128, 1024
"""Up to the first, rows are one tile high; up to the second, large tiles are too few to fill a GPU."""

LIBRARY = LaunchConfig.of(variant="library", num_warps=4)
FINISH = {"BLOCK": 1024, "num_warps": 4}
"""Launch of the second kernel, which waits for memory on every chip."""


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_parts: int) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_silu`: tiles are rounded to a narrow dtype once, after SiLU."""
    return in_parts(_linear("linear_silu", x, weight, bias), num_parts)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `hstu_cli.kernels.linear.linear_residual`: rounded to a narrow dtype once, after the sum."""
    return _linear("linear_residual", x, weight, residual)


def _tiles(m: int, n: int, k: int, num_warps: int, num_stages: int, splits: int = 1) -> LaunchConfig:
    """Tiles of m rows and n columns, that read k of the inputs at a time."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLITS": splits}
    variant = "tiles" if splits == 1 else "split"
    return LaunchConfig.of(variant=variant, num_warps=num_warps, num_stages=num_stages, **blocks)


_MANY_ROWS = {
    80: (_tiles(128, 128, 64, 8, 4), _tiles(128, 256, 32, 8, 4), _tiles(128, 64, 64, 4, 4), _tiles(64, 64, 64, 4, 4)),
    89: (_tiles(128, 128, 32, 8, 4), _tiles(128, 128, 64, 8, 3), _tiles(128, 64, 64, 4, 3), _tiles(64, 64, 64, 4, 4)),
    90: (_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 8, 4), _tiles(128, 128, 64, 4, 4), _tiles(64, 128, 64, 4, 4)),
    100: (_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 4, 4), _tiles(128, 64, 64, 4, 4), _tiles(64, 128, 64, 4, 4)),
}
_MANY_ROWS[120] = _MANY_ROWS[89]  # as much shared memory, and the same kind of matrix instructions
_SOME_ROWS = (
    *(_tiles(64, 128, 64, 4, 4), _tiles(64, 64, 64, 4, 4), _tiles(128, 128, 64, 8, 3)),
    *(_tiles(64, 128, 64, 4, 4, splits=2), _tiles(64, 128, 64, 4, 4, splits=4), LIBRARY),
)


@functools.cache
def launch_configs(chip: int, num_rows: int, dtype: torch.dtype) -> tuple[LaunchConfig, ...]:
    """The choices for so many rows, a power of two; the best guess first.

    Without TF32 no matrix unit computes in float32, so there torch's product is that; float64 has nothing else.
    """
    if dtype == torch.float64:
        return (LIBRARY,)
    if dtype == torch.float32:
        return LIBRARY, _tiles(64, 64, 32, 4, 2)
    if num_rows > SOME_ROWS:
        return (*_MANY_ROWS[chip], LIBRARY)
    if num_rows > FEW_ROWS:
        return _SOME_ROWS
    m = max(num_rows, 16)
    k = 128 if m <= 64 else 64
    whole = _tiles(m, 32, k, 4, 3), _tiles(m, 64, k, 4, 3)
    split = _tiles(m, 64, k, 4, 3, splits=4), _tiles(m, 64, 64, 4, 3, splits=8)
    return (*whole, *split, LIBRARY)


def _linear(kernel: str, x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Either layer; added: the bias [out] or the residual [rows, out]."""
    out = x.new_empty(len(x), len(weight))
    if not out.numel():
        return out
    x, weight, added = row_major(x), row_major(weight), row_major(added)
    rows = bucket(len(x))

    def run(config: LaunchConfig) -> None:
        _launch(kernel == "linear_silu", config, x, weight, added, out)

    with backend_of(x.device).as_current():
        configs = launch_configs(chip_of(x.device), rows, x.dtype)
        run(choose_config(kernel, (x.dtype, rows, *weight.shape), configs, run, device=x.device, source=__file__))
    return out


def _launch(
    silu: bool, config: LaunchConfig, x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor, out: torch.Tensor
) -> None:
    """Compute `out` by one of the variants."""
    if config.variant == "library":
        if silu:
            _finish(F.linear(x, weight).unsqueeze(0), added, out, silu)
        else:
            torch.addmm(added, x, weight.T, out=out)
        return
    num_rows, num_columns = out.shape
    splits = config.block("SPLITS")
    sums = out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    num_tiles = triton.cdiv(num_rows, config.block("BLOCK_M")) * triton.cdiv(num_columns, config.block("BLOCK_N"))
    linear_kernel[num_tiles, splits](
        x, weight, added, sums, num_rows, x.stride(0), weight.stride(0), added.stride(0),
        OUT=num_columns, IN=x.shape[1], SILU=silu, **config.options(),
    )  # fmt: skip
    if splits > 1:
        _finish(sums, added, out, silu)


def _finish(sums: torch.Tensor, added: torch.Tensor, out: torch.Tensor, silu: bool) -> None:
    """From partial sums [splits, rows, out] to the result."""
    finish_kernel[(triton.cdiv(out.numel(), FINISH["BLOCK"]),)](
        sums, added, out, out.numel(), added.stride(0),
        OUT=out.shape[1], SPLITS=len(sums), SILU=silu, SUMS=sum_dtype(out.dtype), **FINISH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x, weight, added, out, num_rows, x_stride, weight_stride, added_stride,
    OUT: tl.constexpr, IN: tl.constexpr, SILU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`out = SiLU(x weight' + added)`, or `added + x weight'` without SILU: one tile [BLOCK_M, BLOCK_N] a program.

    x [num_rows, IN], weight [OUT, IN], added [OUT] with SILU, else [num_rows, OUT], rows so many elements apart.
    With SPLITS > 1 program (tile, i) stores the i-th part of the sum over IN, to out [SPLITS, num_rows, OUT] float32,
    and leaves the rest to `finish_kernel`.
    """
    # Tiles in groups of 8 rows of them, column by column: those that run at once share rows of x and of weight.
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(OUT, BLOCK_N)
    group = tl.program_id(0) // (8 * column_tiles)
    group_rows = tl.minimum(row_tiles - group * 8, 8)
    place = tl.program_id(0) % (8 * column_tiles)
    row = (group * 8 + place % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = place // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns beyond the edges repeat the last: loads need no mask for them, and nothing of them is stored.
    inner = tl.arange(0, BLOCK_K)
    x_block = x + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_block = weight + tl.minimum(column, OUT - 1).to(tl.int64)[None, :] * weight_stride + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks_each = tl.cdiv(tl.cdiv(IN, BLOCK_K), SPLITS)
    first = tl.program_id(1) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(IN, BLOCK_K))):
        start = block * BLOCK_K
        if IN % BLOCK_K == 0:
            left, right = tl.load(x_block + start), tl.load(weight_block + start)
        else:
            left = tl.load(x_block + start, mask=(start + inner < IN)[None, :], other=0.0)
            right = tl.load(weight_block + start, mask=(start + inner < IN)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")

    exists = (row < num_rows)[:, None] & (column < OUT)[None, :]
    row = row.to(tl.int64)
    if SPLITS == 1:
        if SILU:
            total += tl.load(added + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
            total = total * tl.sigmoid(total)
        else:
            residual = tl.load(added + row[:, None] * added_stride + column[None, :], mask=exists, other=0.0)
            total += residual.to(tl.float32)
    else:
        row += tl.program_id(1).to(tl.int64) * num_rows
    tl.store(out + row[:, None] * OUT + column[None, :], total.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_elements"])
def finish_kernel(
    parts, added, out, num_elements, added_stride,
    OUT: tl.constexpr, SPLITS: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `linear_kernel` does after its sums, for sums in SPLITS parts, added in order: parts [SPLITS, rows, OUT]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < num_elements
    total = tl.load(parts + place, mask=exists, other=0.0).to(SUMS)
    place_in_part = place
    for _ in tl.static_range(1, SPLITS):
        place_in_part += num_elements
        total += tl.load(parts + place_in_part, mask=exists, other=0.0).to(SUMS)
    column = place % OUT
    if SILU:
        total += tl.load(added + column, mask=exists, other=0.0).to(SUMS)
        total = total * tl.sigmoid(total)
    else:
        total += tl.load(added + place // OUT * added_stride + column, mask=exists, other=0.0).to(SUMS)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


def aot_specs(chip: int) -> list[AotSpec]:
    """Every configuration, for both layers of a model of width 1024; see `AotSpec`."""
    specs = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        choices = (config for rows in (16, 32, 64, 128, 256, 4096) for config in launch_configs(chip, rows, dtype))
        for config in dict.fromkeys(choices):
            specs += _specs("linear_silu", config, dtype, {"OUT": 4096, "SILU": True})
            specs += _specs("linear_residual", config, dtype, {"OUT": 1024, "SILU": False})
    return specs


def _specs(kernel: str, config: LaunchConfig, dtype: torch.dtype, constexprs: dict[str, Any]) -> list[AotSpec]:
    """The kernels that one configuration launches."""
    tensor = f"*{type_name(dtype)}"
    sums = "*fp32" if config.variant == "split" else tensor
    label = f"{kernel} {type_name(dtype)} {config.label}"
    specs = []
    if config.variant != "library":
        strides = ("x_stride", "weight_stride", "added_stride")
        signature = {"x": tensor, "weight": tensor, "added": tensor, "out": sums, "num_rows": "i32"}
        signature |= dict.fromkeys(strides, "i32")
        blocks = {"IN": 1024, **dict(config.blocks)}
        launch = (config.num_warps, config.num_stages, label, strides)
        specs.append(AotSpec(linear_kernel, signature, constexprs | blocks, *launch))
    if config.variant == "split" or (config.variant == "library" and constexprs["SILU"]):
        signature = {"parts": sums, "added": tensor, "out": tensor, "num_elements": "i64", "added_stride": "i32"}
        blocks = {"SPLITS": dict(config.blocks).get("SPLITS", 1), "SUMS": sum_dtype(dtype), "BLOCK": FINISH["BLOCK"]}
        launch = (FINISH["num_warps"], 3, label, ("added_stride",))
        specs.append(AotSpec(finish_kernel, signature, constexprs | blocks, *launch))
    return specs
