"""Every operator of inference alone, one implementation beside another: milliseconds, and how they compare.

    python benchmarks/operators.py --output-json operators.json

The cases are those of the tests (lengths 0 and 1, uneven batches, odd heads) and the operators of a layer of the
`benchmark` model. Implementations take turns, and ratios are medians of pairs; an operator that takes microseconds is
repeated within a turn. Ends with exit code 1 where the first implementation is slower than the second by more than a
tenth in every turn: two runs of one function differ by that.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hstu_cli.backend import DTYPES, open_device, resolve_dtype
from hstu_cli.kernels import jagged_attention, paged_attention, plan_batch, plan_pages
from hstu_cli.kernels.append_pages import append_to_pages
from hstu_cli.kernels.attention.cases import ATTENTION_CASES, AttentionCase, make_inputs
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.kernels.linear import linear_residual, linear_silu
from hstu_cli.kernels.norm import layer_norm, layer_norm_mul
from hstu_cli.kernels.norm_linear import norm_linear_silu, norm_mul_linear_residual
from hstu_cli.kernels.paged_attention.cases import PAGED_CASES, PagedCase, make_paged_inputs
from hstu_cli.report import environment
from hstu_cli.timing import Case, latency_summary, measure, paired_ratio

WIDTH, HEADS, HEAD_DIM = 1024, 4, 256  # of the `benchmark` model
ROWS = (1, 128, 384, 4352)
TURN_MS = 2.0
"""Operators that take less are repeated in a turn until they take about so long."""
LEAST_RATIO = 0.9

LARGE_ATTENTION = tuple(
    AttentionCase((length,) * batch, (candidates,) * batch, HEADS, HEAD_DIM)
    for length, candidates, batch in ((128, 0, 1), (1024, 0, 1), (4096, 256, 1), (512, 64, 8))
)
LARGE_PAGED = tuple(
    PagedCase(AttentionCase((4096,) * batch, (candidates,) * batch, HEADS, HEAD_DIM), (cached,) * batch, 32)
    for cached, candidates, batch in ((4095, 0, 1), (3968, 0, 1), (3968, 256, 1), (3968, 0, 8))
)

Operator = tuple[str, str, Callable[..., Any]]
"""Its name, its case, and a function of `impl`."""


def attention_operators(dtype: torch.dtype) -> Iterator[Operator]:
    """Jagged attention, and paged attention over the same tables as the tests."""
    for case in ATTENTION_CASES + LARGE_ATTENTION:
        i = make_inputs(case, dtype)
        plan = plan_batch(i.seq_offsets, i.num_candidates, len(i.q), "cpu")
        yield (
            "attention",
            case.id,
            partial(jagged_attention, i.q, i.k, i.v, plan, alpha=i.alpha, scaling_seqlen=i.scaling_seqlen),
        )
    for case in PAGED_CASES + LARGE_PAGED:
        i = make_paged_inputs(case, dtype)
        new = i.new
        plan = plan_batch(new.seq_offsets, new.num_candidates, len(new.q), "cpu")
        pages = plan_pages(
            i.page_indptr, i.page_ids, i.cached_lengths, num_sequences=plan.num_sequences, num_pages=len(i.pages),
            page_size=i.pages.shape[2], device="cpu",
        )  # fmt: skip
        yield "paged attention", case.id, partial(
            paged_attention, new.q, new.k, new.v, plan, i.pages, pages, alpha=new.alpha,
            scaling_seqlen=new.scaling_seqlen,
        )  # fmt: skip


def row_operators(dtype: torch.dtype) -> Iterator[Operator]:
    """Linear layers, norms and appending for so many rows, as in a layer of the `benchmark` model."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    wide, square = random(4 * WIDTH, WIDTH) / WIDTH**0.5, random(WIDTH, WIDTH) / WIDTH**0.5
    weight, bias, wide_bias = random(WIDTH), random(WIDTH), random(4 * WIDTH)
    for rows in ROWS:
        x, uvqk = random(rows, WIDTH), random(rows, 4, HEADS, HEAD_DIM)
        u, v, _, k = uvqk.unbind(1)
        pages = random(rows // 32 + 1, 2, 32, HEADS, HEAD_DIM)
        places = torch.arange(rows)
        case = f"{rows:,} rows"
        yield "linear + SiLU", case, partial(linear_silu, x, wide, wide_bias)
        yield "linear + residual", case, partial(linear_residual, x, square, u.flatten(1))
        yield "layer norm", case, partial(layer_norm, x, weight, bias, eps=1e-6)
        yield "layer norm x u", case, partial(layer_norm_mul, x, u.flatten(1), weight, bias, eps=1e-6)
        yield "norm + linear + SiLU", case, partial(norm_linear_silu, x, weight, bias, wide, wide_bias, eps=1e-6)
        gated = partial(norm_mul_linear_residual, x, u.flatten(1), weight, bias, square, x, eps=1e-6)
        yield "norm x u + linear + residual", case, gated
        yield "append", case, partial(append_to_pages, k, v, places, pages, places)


def repeated(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """So many runs as one."""

    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def compare(operator: Operator, impls: list[str], backend: Any, iterations: int) -> dict[str, Any]:
    """A row: milliseconds of each implementation, and the second's over the first's."""
    name, case, run = operator
    names = [("torch" if impl == "blocked" else impl) if name == "append" else impl for impl in impls]
    runs = {impl: partial(run, impl=own) for impl, own in zip(impls, names, strict=True)}
    probe = measure([Case(impl, [one]) for impl, one in runs.items()], backend, warmup=2, iterations=3)
    times = max(1, int(TURN_MS / max(1e-3, min(float(samples.min()) for samples in probe.values()))))
    cases = [Case(impl, [repeated(one, times)]) for impl, one in runs.items()]
    samples = measure(cases, backend, warmup=1, iterations=iterations)
    ratio = paired_ratio(samples[impls[1]], samples[impls[0]])
    return {
        "operator": name, "case": case, "repeats": times,
        "latency_ms": {impl: latency_summary(samples[impl] / times) for impl in impls},
        "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
    }  # fmt: skip


def main(
    output_json: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    impls: Annotated[str, typer.Option(help="Two implementations, separated by a comma.")] = "native,blocked",
    num_iters: Annotated[int, typer.Option(min=3, help="Timed turns of each.")] = 15,
) -> None:
    """Time the operators of inference on a CPU."""
    backend = open_device("cpu").backend
    backend.tune_process()
    names = [choose_impl(name, backend.type).name for name in impls.split(",")]
    if len(set(names)) != 2:
        raise typer.BadParameter("name two different implementations", param_hint="--impls")
    kind = DTYPES[resolve_dtype(dtype, backend)]
    operators = [*attention_operators(kind), *row_operators(kind)]
    rows = [compare(operator, names, backend, num_iters) for operator in track(operators, "Operators")]
    env = environment(backend.device_name, backend.memory_bytes)
    record = {"env": env, "dtype": dtype, "impls": names, "rows": rows}
    if output_json is not None:
        output_json.parent.mkdir(parents=True, exist_ok=True)
        output_json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    table = Table("operator", "case", *(f"{name}, ms" for name in names), f"{names[1]} / {names[0]}")
    table.title = f"{backend.device_name}, {dtype}, {torch.get_num_threads()} threads"
    for row in rows:
        medians = (f"{row['latency_ms'][name]['p50']:.4f}" for name in names)
        table.add_row(row["operator"], row["case"], *medians, f"{row['ratio']:.2f}")
    Console().print(table)
    if any(row["ratio_high"] < LEAST_RATIO for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
