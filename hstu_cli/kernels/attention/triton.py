"""HSTU attention on NVIDIA GPUs, for whole sequences and for pages: how the kernels are launched.

The host uses bounds alone, so that a launch captured in a graph serves every batch within them.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton

from hstu_cli.backend import backend_of
from hstu_cli.kernels.attention import triton_kernel
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.attention.triton_kernel import hstu_attention_kernel, hstu_attention_sum_kernel
from hstu_cli.kernels.paged_attention.plan import PagePlan
from hstu_cli.kernels.triton.aot import AotSpec
from hstu_cli.kernels.triton.arguments import row_major, type_name
from hstu_cli.kernels.triton.chips import chip_of
from hstu_cli.kernels.triton.state import is_interpreting
from hstu_cli.kernels.triton.tuning import LaunchConfig, bucket, choose_config

# Shapes: T tokens, B sequences, H heads, d head_dim, M = BLOCK_M rows, N = BLOCK_N keys, S splits of the keys.

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LARGEST_HEAD_DIM = 256

FP32_CHANNELS = 32
"""Channels of q and k at a time in float32, which is multiplied without matrix units, out of registers."""

SMALL_BATCH = 32
"""Sequences up to which a program looks its own up in one short load."""

SPLIT_BLOCKS, MOST_SPLITS = 4, 16
"""A split has at least so many blocks of keys; so many splits share the keys of a row at most, as each adds traffic."""

MORE_SPLITS, FEW_ROUNDS = "split", 4
"""The variant with twice the splits, and below how many programs for each multiprocessor it is tried."""

REDUCED_ELEMENTS = 1024
"""Elements of the output for each program that adds the splits."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The inputs of one call; it can be run with any configuration."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: BatchPlan
    pages: torch.Tensor | None
    page_plan: PagePlan | None
    alpha: float
    scaling_seqlen: int
    num_multiprocessors: int

    def run(self, config: LaunchConfig) -> torch.Tensor:
        """Launch with one configuration; returns o [T, H, d]."""
        q, k, v, plan = self.q, self.k, self.v, self.plan
        num_tokens, num_heads, head_dim = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        num_splits = self.num_splits(config)
        scale = 1.0 / self.scaling_seqlen
        target = out if num_splits == 1 else out.new_empty(num_splits, *out.shape, dtype=torch.float32)
        num_tiles = num_tokens // config.block("BLOCK_M") + plan.num_sequences
        hstu_attention_kernel[(num_tiles * num_heads * num_splits,)](
            q,
            k,
            v,
            target,
            plan.seq_offsets,
            plan.num_candidates,
            *self._page_tensors(),
            plan.num_sequences,
            num_tokens,
            num_splits,
            self.alpha / 2,
            scale,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *(self.pages.stride()[:4] if self.pages is not None else (0, 0, 0, 0)),
            **constants(q.dtype, num_heads, head_dim, self.page_size, num_splits > 1, plan.num_sequences),
            **config.options(),
        )
        if num_splits > 1:
            hstu_attention_sum_kernel[(triton.cdiv(out.numel(), REDUCED_ELEMENTS),)](
                target, out, out.numel(), num_splits, scale, BLOCK=REDUCED_ELEMENTS
            )
        return out

    def num_splits(self, config: LaunchConfig) -> int:
        """Programs that share the keys of a row, so that all multiprocessors have work; from bounds alone."""
        most_cached = self.page_plan.max_cached_tokens if self.page_plan is not None else 0
        num_blocks = triton.cdiv(most_cached + self.plan.max_new_tokens, config.block("BLOCK_N"))
        wanted = self.num_multiprocessors // self._num_programs(config)
        if config.variant == MORE_SPLITS:
            wanted = max(2, 2 * wanted)
        return max(1, min(wanted, num_blocks // SPLIT_BLOCKS, MOST_SPLITS))

    def choices(self, chip: int) -> tuple[LaunchConfig, ...]:
        """The configurations to choose from; where programs are few, also with twice the splits.

        The first rows of a causal batch have few keys and the last ones many, so that a single round of programs
        leaves half of the device waiting for the longest.
        """
        configs = configurations(chip, self.q.dtype, self.q.shape[2])
        few = (config for config in configs if self._num_programs(config) < FEW_ROUNDS * self.num_multiprocessors)
        return (*configs, *map(_with_more_splits, few))

    def _num_programs(self, config: LaunchConfig) -> int:
        """Tiles of rows times heads, as if no sequence began within a tile of another."""
        num_tiles = max(self.plan.num_sequences, triton.cdiv(self.q.shape[0], config.block("BLOCK_M")))
        return num_tiles * self.q.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page; 0 without pages."""
        return self.page_plan.page_size if self.page_plan is not None else 0

    def _page_tensors(self) -> tuple[torch.Tensor, ...]:
        """Pages and their tables; without pages, tensors that are never read."""
        if self.page_plan is None:
            return self.q, self.plan.seq_offsets, self.plan.seq_offsets, self.plan.num_candidates
        return self.pages, self.page_plan.page_indptr, self.page_plan.page_ids, self.page_plan.cached_lengths

    def key(self) -> tuple[str | int, ...]:
        """What the best configuration depends on."""
        plan, page_plan = self.plan, self.page_plan
        sizes = (plan.num_sequences, plan.num_tokens, plan.max_new_tokens)
        cached = (bucket(page_plan.max_cached_tokens), page_plan.page_size) if page_plan is not None else ()
        return (type_name(self.q.dtype), *self.q.shape[1:], *map(bucket, sizes), *cached)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, *, alpha: float, scaling_seqlen: int
) -> torch.Tensor:
    """See `jagged_attention`; no gradients. Raises ValueError for dtypes and head dims that there is no kernel for."""
    return launch("hstu_attention", q, k, v, plan, None, None, alpha, scaling_seqlen)


def launch(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BatchPlan,
    pages: torch.Tensor | None,
    page_plan: PagePlan | None,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """Attention of new tokens over pages, where there are any, and themselves; kernel: its name for tuning.

    A tensor whose last dimension is not contiguous is copied first.
    """
    if q.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"impl='triton' computes in {names}, not in {q.dtype}; use another implementation")
    if q.shape[2] > LARGEST_HEAD_DIM:
        raise ValueError(f"impl='triton' takes head dims up to {LARGEST_HEAD_DIM}, not {q.shape[2]}")
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v = row_major(q), row_major(k), row_major(v)
    if pages is not None:
        pages = row_major(pages)
    backend = backend_of(q.device)
    call = _Call(q, k, v, plan, pages, page_plan, alpha, scaling_seqlen, backend.num_multiprocessors)
    with backend.as_current():
        choices, source = call.choices(chip_of(q.device)), triton_kernel.__file__
        return call.run(choose_config(kernel, call.key(), choices, call.run, device=q.device, source=source))


def constants(
    dtype: torch.dtype, num_heads: int, head_dim: int, page_size: int, split: bool, num_sequences: int
) -> dict[str, int | bool | str]:
    """Arguments that the kernel is compiled for, its block sizes apart."""
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
        "PAGE_SIZE": page_size,
        "SPLIT": split,
        "BATCH_BLOCK": SMALL_BATCH if num_sequences <= SMALL_BATCH else 16 * SMALL_BATCH,
        "APPROXIMATE": dtype != torch.float32 and not is_interpreting(),
        "BLOCK_D": FP32_CHANNELS if dtype == torch.float32 else LARGEST_HEAD_DIM,
    }


@functools.cache
def _with_more_splits(config: LaunchConfig) -> LaunchConfig:
    return dataclasses.replace(config, variant=MORE_SPLITS)


@functools.cache  # every layer asks
def configurations(chip: int, dtype: torch.dtype, head_dim: int) -> tuple[LaunchConfig, ...]:
    """The choices for a chip of `CHIPS`, the best guess first; each of them fits, as `make aot` shows."""
    size = max(64, triton.next_power_of_2(head_dim))
    table = FP32_CONFIGS if dtype == torch.float32 else HALF_CONFIGS[chip]
    return tuple(
        LaunchConfig.of(
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages, max_registers=max_registers
        )
        for block_m, block_n, num_warps, num_stages, max_registers in table[size]
    )


# Loads run ahead of the products by stages - 1 blocks from 9.0 on, before that by stages - 2. With 128 registers two
# programs of 8 warps share a multiprocessor: one multiplies while the other is at SiLU.
_8_9 = {
    64: ((128, 64, 8, 3, None), (64, 64, 4, 3, None)),
    128: ((128, 64, 8, 3, None), (128, 32, 8, 3, None), (64, 64, 4, 3, None)),
    256: ((64, 32, 8, 2, None), (64, 64, 8, 1, None), (64, 16, 4, 3, None)),
}
HALF_CONFIGS = {
    80: {
        64: ((128, 64, 8, 3, None), (64, 64, 4, 3, None)),
        128: ((128, 64, 8, 3, None), (64, 64, 4, 3, None)),
        256: ((128, 32, 8, 3, None), (128, 64, 8, 2, None), (64, 64, 8, 2, None)),
    },
    89: _8_9,
    90: {
        64: ((128, 64, 8, 3, 128), (128, 128, 8, 3, None), (64, 64, 4, 3, None)),
        128: ((128, 64, 8, 2, 128), (128, 64, 8, 3, None), (64, 64, 4, 2, None)),
        256: ((128, 64, 8, 2, None), (128, 32, 8, 4, None), (64, 64, 8, 2, None)),
    },
    100: {
        64: ((128, 128, 8, 3, None), (128, 64, 4, 3, None), (64, 64, 4, 3, None)),
        128: ((128, 64, 8, 3, None), (128, 128, 8, 2, None), (64, 64, 4, 2, None)),
        256: ((128, 64, 8, 2, None), (128, 32, 8, 4, None), (64, 64, 8, 2, None)),
    },
    120: _8_9,
}
"""For bf16 and fp16: BLOCK_M, BLOCK_N, num_warps, num_stages and max_registers by chip and head_dim, rounded up."""

FP32_CONFIGS = {
    64: ((64, 32, 8, 1, None),),
    128: ((64, 32, 8, 1, None), (32, 32, 8, 1, None)),
    256: ((32, 32, 8, 1, None), (32, 16, 8, 1, None)),
}
"""For fp32, which is multiplied without matrix units: the same for all chips."""


def aot_specs(chip: int) -> list[AotSpec]:
    """Every compilation that tuning may choose for whole sequences, for `hstu_cli.kernels.triton.aot`."""
    sums = AotSpec(
        kernel=hstu_attention_sum_kernel,
        signature={
            "partial_ptr": "*fp32",
            "out_ptr": "*bf16",
            "num_elements": "i32",
            "num_splits": "i32",
            "scale": "fp32",
        },
        constexprs={"BLOCK": REDUCED_ELEMENTS},
        num_warps=4,
        num_stages=1,
        label="bf16",
    )
    return [*kernel_specs(chip, page_size=0), sums]


def kernel_specs(chip: int, page_size: int) -> list[AotSpec]:
    """The attention kernel with every configuration of a chip, for head dims 64, 128 and 256."""
    return [
        AotSpec(
            kernel=hstu_attention_kernel,
            signature=_signature(type_name(dtype), split),
            constexprs=constants(dtype, 4, head_dim, page_size, split, num_sequences=1) | dict(config.blocks),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            label=f"{type_name(dtype)} d={head_dim}{' split' * split}{' pages' * (page_size > 0)} {config.label}",
            aligned=STRIDES,
            max_registers=config.max_registers,
        )
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (128, 256, 64)
        for split in (False, True)
        for config in configurations(chip, dtype, head_dim)
    ]


STRIDES = (
    "q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "page_page", "page_value", "page_token", "page_head",
)  # fmt: skip


def _signature(dtype: str, split: bool) -> dict[str, str]:
    """Types of the kernel's arguments."""
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "pages_ptr"), f"*{dtype}")
    tables = ("seq_offsets_ptr", "num_candidates_ptr", "page_indptr_ptr", "page_ids_ptr", "cached_lengths_ptr")
    sizes = ("num_sequences", "num_tokens", "num_splits", *STRIDES)
    return {
        **inputs,
        "out_ptr": "*fp32" if split else f"*{dtype}",
        **dict.fromkeys(tables, "*i32"),
        **dict.fromkeys(sizes, "i32"),
        "half_alpha": "fp32",
        "scale": "fp32",
    }
