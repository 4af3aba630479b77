"""Pieces of the fused layer in Triton; see `function.Pieces`. Matrix products are the library's."""

import torch
import torch.nn.functional as F
import triton

from hstu_cli.backend import backend_of
from hstu_cli.kernels.attention import triton_backward
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.attention.triton import attention as triton_attention
from hstu_cli.kernels.fused_layer import triton_kernel as kernels
from hstu_cli.kernels.fused_layer.dropout import dropout_level
from hstu_cli.kernels.fused_layer.settings import LayerSettings
from hstu_cli.kernels.triton.aot import AotSpec
from hstu_cli.kernels.triton.arguments import type_name

# Shapes: T tokens, D width, W = H * d, P programs.

MOST_WIDTH = 16_384
"""A row is in the registers of one program."""

ROWS_EACH = 32
"""Rows whose sums a program adds: few enough for many programs, and partial sums are a small part of the traffic."""

SILU_BLOCK = {"BLOCK_ROWS": 4, "BLOCK": 512, "num_warps": 4}
"""Launch of `silu_gradients_kernel`, which waits for memory on every chip."""


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    return _norm(x, None, weight, bias, settings)


def norm_mul_dropout(
    o: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    return _norm(o, u, weight, bias, settings)


def layer_norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = _norm_gradients(grad, x, None, weight, bias, mean, scale, residual.contiguous(), grad_x, None, None, None)
    return grad_x, *sums


def norm_mul_dropout_gradients(
    grad_u: torch.Tensor,
    grad: torch.Tensor,
    o: torch.Tensor,
    u: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    settings: LayerSettings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    gated, grad_o = (torch.empty_like(o, memory_format=torch.contiguous_format) for _ in range(2))
    sums = _norm_gradients(grad, o, u, weight, bias, mean, scale, None, grad_o, grad_u, gated, settings)
    return gated, grad_o, *sums


def linear_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Pieces`."""
    linear = torch.addmm(bias, x, weight.T)
    return linear, silu(linear)


def silu(x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`: a single pass, of which torch's own kernel is as fast as memory."""
    return F.silu(x)


def silu_gradients(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    num_rows, width = x.shape
    programs = triton.cdiv(num_rows, ROWS_EACH)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if programs:
        with backend_of(x.device).as_current():
            grid = (programs, triton.cdiv(width, SILU_BLOCK["BLOCK"]))
            kernels.silu_gradients_kernel[grid](grad, x, sums, num_rows, ROWS_EACH, WIDTH=width, **SILU_BLOCK)
    return sums.sum(0)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, settings: LayerSettings
) -> torch.Tensor:
    """See `Pieces`."""
    return triton_attention(q, k, v, plan, alpha=settings.alpha, scaling_seqlen=settings.scaling_seqlen)


def attention_gradients(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    plan: BatchPlan,
    settings: LayerSettings,
) -> None:
    """See `Pieces`."""
    scales = {"alpha": settings.alpha, "scaling_seqlen": settings.scaling_seqlen}
    triton_backward.attention_gradients(grads, q, k, v, grad_out, plan, **scales)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `Pieces`."""
    return grad.T @ x


def dropout_mask(num_rows: int, width: int, share: float, seed: int, device: torch.device) -> torch.Tensor:
    """The mask that these kernels make, bool [num_rows, width]; see `dropout.dropout_mask`."""
    mask = torch.empty(num_rows, width, dtype=torch.int8, device=device)
    if mask.numel():
        with backend_of(device).as_current():
            kernels.dropout_mask_kernel[(num_rows,)](
                mask, seed, WIDTH=width, LEVEL=dropout_level(share), **_launch(width)
            )
    return mask.bool()


def aot_specs(chip: int) -> list[AotSpec]:
    """Every compilation for the widths of the models, and those of attention's backward pass; see `AotSpec`."""
    return [
        *triton_backward.aot_specs(chip),
        *(spec for dtype in (torch.bfloat16, torch.float32) for width in (1024, 512) for spec in _specs(dtype, width)),
    ]


def _norm(
    x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, settings: LayerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Either norm, in the settings' dtype; mean and 1 / deviation [T] float32."""
    num_rows, width = x.shape
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=settings.dtype, device=x.device)
    mean, scale = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    gate = x if u is None else u
    if num_rows:
        with backend_of(x.device).as_current():
            kernels.norm_kernel[(num_rows,)](
                x, gate, weight, bias, out, mean, scale, gate.stride(0), settings.seed,
                WIDTH=width, EPS=settings.eps, GATED=u is not None, LEVEL=_level(u, settings), **_launch(width),
            )  # fmt: skip
    return out, mean, scale


def _norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    grad_x: torch.Tensor,
    grad_u: torch.Tensor | None,
    gated: torch.Tensor | None,
    settings: LayerSettings | None,
) -> torch.Tensor:
    """Fill grad_x, and for the gated norm grad_u and gated; the gradients of weight and bias, [2, width] float32."""
    num_rows, width = x.shape
    programs = triton.cdiv(num_rows, ROWS_EACH)
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=x.device)
    if programs:
        x = x.contiguous()
        gate, grad_gate = (x, grad_x) if u is None or grad_u is None else (u, grad_u)
        with backend_of(x.device).as_current():
            kernels.norm_gradients_kernel[(programs,)](
                grad.contiguous(), x, gate, weight, bias, mean, scale,
                x if residual is None else residual, grad_x, grad_gate, grad_x if gated is None else gated, sums,
                num_rows, ROWS_EACH, gate.stride(0), grad_gate.stride(0), settings.seed if settings else 0,
                WIDTH=width, GATED=u is not None, LEVEL=_level(u, settings), **_launch(width),
            )  # fmt: skip
    return sums.sum(0)


def _level(u: torch.Tensor | None, settings: LayerSettings | None) -> int:
    """What the kernels need to know of dropout, which only the gated norm has."""
    return dropout_level(settings.dropout) if u is not None and settings is not None else 0


def _launch(width: int) -> dict[str, int]:
    """Block size and warps for rows of a width; ValueError for rows that do not fit into one program."""
    if width > MOST_WIDTH:
        raise ValueError(f"impl='triton' takes rows of at most {MOST_WIDTH} elements, not {width}; use 'blocked'")
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _specs(dtype: torch.dtype, width: int) -> list[AotSpec]:
    """One compilation of each kernel, the norms' with and without a gate."""
    launch = _launch(width)
    warps, block = launch["num_warps"], launch["BLOCK"]
    tensor, sums = f"*{type_name(dtype)}", "*fp32"

    def spec(kernel, tensors: dict[str, str], numbers: tuple[str, ...], label: str, warps: int = warps, **constants):
        signature = tensors | dict.fromkeys(numbers, "i32") | ({"seed": "i64"} if "seed" in kernel.arg_names else {})
        strides = tuple(name for name in numbers if name.endswith("stride"))
        label = f"{label} {width} {type_name(dtype)}"
        return AotSpec(kernel, signature, constants, num_warps=warps, num_stages=1, label=label, aligned=strides)

    forward = dict.fromkeys(("x", "u", "weight", "bias", "out"), tensor) | {"mean_out": sums, "scale_out": sums}
    inputs = ("grad", "x", "u", "weight", "bias", "residual", "grad_x", "grad_u", "gated")
    backward = dict.fromkeys(inputs, tensor) | dict.fromkeys(("mean_in", "scale_in", "sums"), sums)
    sizes = ("num_rows", "rows_each", "u_stride", "grad_u_stride")
    shape = {"WIDTH": width, "BLOCK": block}
    found = [spec(kernels.dropout_mask_kernel, {"out": "*i8"}, (), "dropout", LEVEL=6554, **shape)]
    for gated, level in ((False, 0), (True, 0), (True, 6554)):
        label = f"{'gated' if gated else 'plain'}{' dropout' * (level > 0)}"
        options = {"GATED": gated, "LEVEL": level, **shape}
        found.append(spec(kernels.norm_kernel, forward, ("u_stride",), label, EPS=1e-5, **options))
        found.append(spec(kernels.norm_gradients_kernel, backward, sizes, label, **options))
    blocks = {name: size for name, size in SILU_BLOCK.items() if name != "num_warps"}
    tensors = {"grad": tensor, "x": tensor, "sums": sums}
    silu = spec(
        kernels.silu_gradients_kernel, tensors, ("num_rows", "rows_each"), "silu", SILU_BLOCK["num_warps"],
        WIDTH=4 * width, **blocks,
    )  # fmt: skip
    return [*found, silu]
