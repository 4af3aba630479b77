"""The reference implementation's own times, read off its charts; never measured here.

NVIDIA recsys-examples, HSTU with 8 layers, width 1024, bf16, 256 candidates.
"""

from dataclasses import dataclass

import torch

E2E_HISTORY_STEP, E2E_BATCHES = 256, 16
CANDIDATES = 256

E2E_TOTAL_MS: dict[str, dict[tuple[int, str], float]] = {
    "l20": {
        (users, variant): ms
        for users, totals in {1: (90, 83, 71), 2: (130, 89, 78), 4: (223, 114, 112), 8: (412, 160, 160)}.items()
        for variant, ms in zip(("baseline", "kvcache", "kvcache+graph"), totals, strict=True)
    }
}
"""Total of the 16 batches by hardware preset, users and variant."""

CACHED_TOKENS = (0, 2048, 3072, 3584, 3840, 3968)
LAYER_HISTORY = 4096

LAYER_MS: dict[str, dict[tuple[int, int], float]] = {
    preset: {(batch, cached): ms for batch, row in rows.items() for cached, ms in zip(CACHED_TOKENS, row, strict=True)}
    for preset, rows in {
        "l20": {1: (8.5, 6.0, 3.5, 3.0, 2.8, 2.7), 8: (71.5, 43.0, 25.0, 16.5, 10.7, 9.2)},
        "b200": {1: (0.60, 0.36, 0.24, 0.21, 0.19, 0.18)},
    }.items()
}
"""The block at 4096 tokens of history and 256 candidates, by hardware preset, batch size and cached tokens."""

NO_CANDIDATES_SPEEDUP: dict[str, dict[int, float]] = {"l20": {1: 3.0, 8: 20.0}, "b200": {1: 3.3, 8: 7.7}}
"""Speed-up of 3968 cached of 4096 tokens, no candidates, by hardware preset and batch size."""


@dataclass(frozen=True, slots=True)
class FusedCase:
    """A training layer to compare with; batch_size: sequences of full length, None where they are not full."""

    dtype: torch.dtype
    batch_size: int | None
    num_layers: int
    embedding_dim: int
    num_heads: int
    head_dim: int


FUSED_CASE = FusedCase(torch.bfloat16, batch_size=32, num_layers=1, embedding_dim=1024, num_heads=4, head_dim=256)
"""The published one, forward and backward."""

FUSED_TFLOPS: dict[str, dict[int, float]] = {
    step: dict(zip((1024, 2048, 4096, 8192), rates, strict=True))
    for step, rates in {
        "baseline": (195, 214, 229, 243),
        "+ CUTLASS attention": (229, 279, 343, 417),
        "+ fusion": (302, 353, 413, 477),
        "+ recompute": (270, 320, 382, 451),
    }.items()
}
"""TFLOP/s of the training layer on an H100, by what was added to the row before, and tokens of a sequence."""

FUSED_STEPS = {"baseline": "baseline", "optimized": "+ fusion", "+silu_recompute": "+ recompute"}
"""Our variant and the published one that does the same."""


def published_fused_tflops(variant: str, seqlen: int, case: FusedCase) -> float | None:
    """The H100's rate for this variant of this case; None where nothing was published."""
    if case != FUSED_CASE or variant not in FUSED_STEPS:
        return None
    return FUSED_TFLOPS[FUSED_STEPS[variant]].get(seqlen)


def published_e2e_ms(
    preset: str | None, users: int, variant: str, step: int, batches: int, candidates: int
) -> float | None:
    """The total of the published workload on the GPU that a preset names; None for another workload."""
    if preset is None or (step, batches, candidates) != (E2E_HISTORY_STEP, E2E_BATCHES, CANDIDATES):
        return None
    return E2E_TOTAL_MS.get(preset, {}).get((users, variant))


@dataclass(frozen=True, slots=True)
class PublishedLayer:
    """What was published for one case of the block; None where nothing was."""

    latency_ms: float | None
    speedup: float | None


def published_layer(preset: str | None, history: int, cached: int, candidates: int, batch: int) -> PublishedLayer:
    """The figures for a case of the `benchmark` model on the GPU that a preset names."""
    if preset is None or history != LAYER_HISTORY:
        return PublishedLayer(None, None)
    times = LAYER_MS.get(preset, {})
    if candidates == CANDIDATES:
        time, uncached = times.get((batch, cached)), times.get((batch, 0))
        return PublishedLayer(time, uncached / time if time and uncached else None)
    if candidates == 0 and cached == CACHED_TOKENS[-1]:
        return PublishedLayer(None, NO_CANDIDATES_SPEEDUP.get(preset, {}).get(batch))
    return PublishedLayer(None, None)
