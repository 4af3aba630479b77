"""Gradients of HSTU attention on NVIDIA GPUs: how the kernels of the backward pass are launched."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton

from hstu_cli.backend import backend_of
from hstu_cli.kernels.attention import triton as forward_pass
from hstu_cli.kernels.attention import triton_backward_kernel as kernels
from hstu_cli.kernels.attention.function import differentiable
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.triton.aot import AotSpec
from hstu_cli.kernels.triton.arguments import row_major, type_name
from hstu_cli.kernels.triton.chips import chip_of
from hstu_cli.kernels.triton.tuning import LaunchConfig, bucket, choose_config

# Shapes: T tokens, H heads, d head_dim.

Run = Callable[[LaunchConfig], None]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, *, alpha: float, scaling_seqlen: int
) -> torch.Tensor:
    """See `jagged_attention`; with gradients where q, k or v asks for them."""
    batch = {"plan": plan, "alpha": alpha, "scaling_seqlen": scaling_seqlen}
    return differentiable(q, k, v, partial(forward_pass.attention, **batch), partial(attention_gradients, **batch))


def attention_gradients(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    plan: BatchPlan,
    *,
    alpha: float,
    scaling_seqlen: int,
) -> None:
    """Write the gradients of q, k and v to `grads`, all [T, H, d] of one dtype, elements of a head side by side."""
    if not q.numel():
        return
    q, k, v, grad_out = map(row_major, (q, k, v, grad_out))
    scale = 1.0 / scaling_seqlen
    inputs = (q, k, v, grad_out)
    batch = (plan.seq_offsets, plan.num_candidates, plan.num_sequences, alpha / 2)
    strides = [stride for tensor in inputs for stride in tensor.stride()[:2]]
    key = (type_name(q.dtype), *q.shape[1:], *map(bucket, (plan.num_sequences, plan.num_tokens, plan.max_new_tokens)))
    work: dict[str, Run] = {
        "hstu_attention_query_gradients": partial(
            _launch,
            kernels.hstu_attention_query_gradients_kernel,
            "BLOCK_M",
            (*inputs, grads[0], *batch, alpha * scale, *strides, *grads[0].stride()[:2]),
            q,
            plan,
        ),
        "hstu_attention_key_gradients": partial(
            _launch,
            kernels.hstu_attention_key_gradients_kernel,
            "BLOCK_N",
            (
                *inputs,
                *grads[1:],
                *batch,
                alpha * scale,
                scale,
                *strides,
                *grads[1].stride()[:2],
                *grads[2].stride()[:2],
            ),
            q,
            plan,
        ),
    }
    with backend_of(q.device).as_current():
        for name, run in work.items():
            configs = configurations(chip_of(q.device), q.dtype, q.shape[2])
            run(choose_config(name, key, configs, run, device=q.device, source=kernels.__file__))


def configurations(chip: int, dtype: torch.dtype, head_dim: int) -> list[LaunchConfig]:
    """The choices for a chip of `CHIPS`, the best guess first."""
    size = max(64, triton.next_power_of_2(head_dim))
    table = FP32_CONFIGS if dtype == torch.float32 else HALF_CONFIGS["large" if chip in (90, 100) else "small"]
    return [
        LaunchConfig.of(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)
        for block_m, block_n, num_warps, num_stages in table[size]
    ]


HALF_CONFIGS = {
    "large": {
        64: ((64, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)),
        256: ((64, 32, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1)),
    },
    "small": {
        64: ((64, 64, 4, 2), (64, 128, 8, 1)),
        128: ((32, 64, 4, 2), (64, 64, 8, 1)),
        256: ((32, 32, 8, 1), (16, 32, 4, 2)),
    },
}
"""For bf16 and fp16, by the chip's shared memory: BLOCK_M, BLOCK_N, num_warps, num_stages by head_dim, rounded up."""

FP32_CONFIGS = {
    64: ((32, 32, 8, 1),),
    128: ((16, 32, 8, 1),),
    256: ((16, 16, 8, 1),),
}
"""For fp32, which is multiplied without matrix units: the same for all chips."""


def aot_specs(chip: int) -> list[AotSpec]:
    """Every compilation that tuning may choose, for head dims 64, 128 and 256."""
    return [
        AotSpec(
            kernel=kernel,
            signature=_signature(kernel.arg_names, type_name(dtype)),
            constexprs=_constants(dtype, 4, head_dim, num_sequences=32) | dict(config.blocks),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            label=f"{type_name(dtype)} d={head_dim} {config.label}",
            aligned=tuple(name for name in kernel.arg_names if name.endswith(("_token", "_head"))),
        )
        for kernel in (kernels.hstu_attention_query_gradients_kernel, kernels.hstu_attention_key_gradients_kernel)
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (256, 128, 64)
        for config in configurations(chip, dtype, head_dim)
    ]


def _launch(
    kernel: Any, tiled: str, arguments: tuple[Any, ...], q: torch.Tensor, plan: BatchPlan, config: LaunchConfig
) -> None:
    """Run a kernel over all tiles of `tiled` rows and all heads."""
    num_heads, head_dim = q.shape[1:]
    num_tiles = plan.num_tokens // config.block(tiled) + plan.num_sequences
    constants = _constants(q.dtype, num_heads, head_dim, plan.num_sequences)
    kernel[(num_tiles * num_heads,)](*arguments, **constants, **config.options())


def _constants(dtype: torch.dtype, num_heads: int, head_dim: int, num_sequences: int) -> dict[str, int | bool | str]:
    """Those of the forward pass that the backward pass has, too."""
    constants = forward_pass.constants(dtype, num_heads, head_dim, 0, False, num_sequences)
    return {name: constants[name] for name in ("NUM_HEADS", "HEAD_DIM", "PADDED_DIM", "BATCH_BLOCK", "APPROXIMATE")}


def _signature(names: list[str], dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments, the constants apart."""
    types = {"half_alpha": "fp32", "scale": "fp32", "value_scale": "fp32"}
    types |= dict.fromkeys(("seq_offsets_ptr", "num_candidates_ptr"), "*i32")
    arguments = [name for name in names if not name.isupper()]
    return {name: types.get(name) or (f"*{dtype}" if name.endswith("_ptr") else "i32") for name in arguments}
