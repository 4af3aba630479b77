"""`bench-fused`: the training layer forward and backward, fused and with recompute, against plain operators."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hstu_cli.bench.published import FusedCase, published_fused_tflops
from hstu_cli.bench.session import BenchSession, OutOfMemoryError, Progress, out_of_memory_named
from hstu_cli.bench.training_layer import EAGER, VARIANTS, TrainingWorkload
from hstu_cli.config import ModelConfig
from hstu_cli.hardware import HARDWARE_PRESETS
from hstu_cli.model.cost import SequenceShape, block_parameters, kept_bytes, training_flops
from hstu_cli.timing import Case, latency_summary

HALF_DTYPES = ("float16", "bfloat16")
"""Dtypes that data sheets give the peak rate for."""


@dataclass(frozen=True, slots=True)
class FusedGrid:
    """The cases of a run: every length with every variant. full: all sequences have this length, else at most this."""

    seqlens: tuple[int, ...]
    batch_size: int
    variants: tuple[str, ...]
    full: bool
    dropout: float
    compare_eager: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The variants, and the peer where it is wanted."""
        return (*self.variants, EAGER) if self.compare_eager else self.variants

    def flops(self, config: ModelConfig, seqlen: int) -> float:
        """FLOPs of one forward and backward pass over sequences of full length."""
        return training_flops(config, [SequenceShape(seqlen, 0, 0)] * self.batch_size)

    def memory_bytes(self, config: ModelConfig, seqlen: int, itemsize: int, name: str) -> int:
        """About the most that a variant takes: weights, gradients, what is kept, one layer's intermediates."""
        tokens, inner = self.batch_size * seqlen, config.attention_dim
        kept = kept_bytes(config, tokens, itemsize, _kept_as(name), dropout=self.dropout > 0)
        # q, k, v and the output's gradient once more and wider, and some strips of 512 rows of scores.
        strips = min(tokens, seqlen) * (16 * inner + 4 * 512 * config.num_heads)
        dense = 5 * self.batch_size * config.num_heads * seqlen**2 * config.num_layers if name == EAGER else 0
        weights = 2 * block_parameters(config)
        return config.num_layers * kept + itemsize * (
            weights + tokens * (9 * inner + 4 * config.hidden_dim) + strips + dense
        )


def run_fused_benchmark(
    session: BenchSession,
    config: ModelConfig,
    grid: FusedGrid,
    *,
    impl: str,
    seed: int,
    on_group: Progress = lambda done, total: None,
) -> Iterator[dict[str, Any]]:
    """Check and time every variant at every length; yields a length's rows as soon as they are done."""
    for done, seqlen in enumerate(grid.seqlens):
        on_group(done, len(grid.seqlens))
        names = []
        for name in grid.names:
            lacking = session.memory_lacking(grid.memory_bytes(config, seqlen, session.dtype.itemsize, name))
            if lacking is None:
                names.append(name)
            else:
                yield _row(grid, config, seqlen, name, impl) | {"skipped": lacking}
        if names:
            try:
                with out_of_memory_named():
                    rows = _measured_rows(session, config, grid, seqlen, names, impl, seed)
            except OutOfMemoryError:
                rows = [_row(grid, config, seqlen, name, impl) | {"skipped": "ran out of memory"} for name in names]
            yield from rows
    on_group(len(grid.seqlens), len(grid.seqlens))


def dry_rows(config: ModelConfig, grid: FusedGrid, itemsize: int, impl: str) -> Iterator[dict[str, Any]]:
    """The cases of a grid and what they would cost, for sequences of full length."""
    for seqlen in grid.seqlens:
        for name in grid.names:
            yield _row(grid, config, seqlen, name, impl) | {
                "flops": grid.flops(config, seqlen),
                "memory_bytes": grid.memory_bytes(config, seqlen, itemsize, name),
            }


def peak_flops(session: BenchSession) -> tuple[float, str]:
    """What MFU is a share of: the data sheet's dense rate of a GPU that is known, else the measured product's."""
    if session.backend.type == "cuda" and str(session.dtype).removeprefix("torch.") in HALF_DTYPES:
        for preset in HARDWARE_PRESETS.values():
            if preset.has_peak(session.backend.device_name):
                return preset.peak_bf16_tflops * 1e12, preset.peak_source
    return session.ceilings.matmul_flops_per_s, "large matrix product, measured before and after the cases"


def apply_peak(record: dict[str, Any], session: BenchSession) -> None:
    """Set the record's `peak` and each row's `mfu` by the ceilings that the session has now."""
    peak, source = peak_flops(session)
    record["peak"] = {"flops_per_s": peak, "source": source}
    for row in record["rows"]:
        if "tflops" in row:
            row["mfu"] = row["tflops"] * 1e12 / peak


def _measured_rows(
    session: BenchSession,
    config: ModelConfig,
    grid: FusedGrid,
    seqlen: int,
    names: Sequence[str],
    impl: str,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows of one length: first checks and memory of each variant, then time, in turns."""
    workload = TrainingWorkload(
        config,
        session.backend,
        session.dtype,
        seqlen=seqlen,
        batch_size=grid.batch_size,
        full=grid.full,
        dropout=grid.dropout,
        impl=impl,
        seed=seed,
    )
    group = f"{seqlen} tokens"
    errors = workload.check(session, group, names)
    memory = {name: workload.memory(name) for name in names}
    runs = {name: workload.timed(name) for name in names}
    samples = session.measure(group, [Case(name, [run]) for name, run in runs.items()])
    flops = training_flops(config, [SequenceShape(length, 0, 0) for length in workload.lengths])
    case = FusedCase(
        session.dtype,
        grid.batch_size if grid.full else None,
        config.num_layers,
        config.hidden_dim,
        config.num_heads,
        config.head_dim,
    )
    peak = peak_flops(session)[0]
    rows = []
    for name in names:
        forward, backward = runs[name].split_ms(session.iterations)
        latency = latency_summary(samples[name])
        speedup = session.speedup(group, "baseline", name) if "baseline" in names else None
        tflops = flops / latency["p50"] * 1e-9
        rows.append(
            _row(grid, config, seqlen, name, impl)
            | {
                "num_tokens": sum(workload.lengths),
                "forward_ms": latency_summary(forward),
                "backward_ms": latency_summary(backward),
                "latency_ms": latency,
                "peak_memory_bytes": memory[name].peak_bytes,
                "memory_timeline": memory[name].to_dict(),
                "tflops": tflops,
                "mfu": tflops * 1e12 / peak,
                "speedup_vs_baseline": speedup and speedup.median,
                "speedup_range": speedup and [speedup.low, speedup.high],
                "output_error": errors[name].output,
                "gradient_error": errors[name].gradient,
                "published_tflops": published_fused_tflops(name, seqlen, case),
            }
        )
    return rows


def _row(grid: FusedGrid, config: ModelConfig, seqlen: int, name: str, impl: str) -> dict[str, Any]:
    """What names a row; the peer is the baseline with another implementation."""
    return {
        "seqlen": seqlen,
        "batch_size": grid.batch_size,
        "num_layers": config.num_layers,
        "variant": "baseline" if name == EAGER else name,
        "impl": EAGER if name == EAGER else impl,
    }


def _kept_as(name: str) -> str:
    """The variant by the name that `kept_bytes` has for it."""
    return VARIANTS.get(name) or "baseline"
