"""The attention operator alone over sequence lengths and head dims: milliseconds and TFLOP/s of each implementation.

    python benchmarks/attention.py --device cuda --output-json attention.json

A batch of equal sequences without candidates, in bf16 as a layer hands it over: q, k and v are views of one tensor.
FLOPs are those of the pairs that the causal mask allows, two products of 2 * head_dim each. Before anything is timed,
the first sequence is compared with float32: an error beyond what rounding explains ends with exit code 1.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from hstu_cli.backend import DTYPES, open_device, resolve_dtype
from hstu_cli.bench.session import most_rounding, relative_error
from hstu_cli.kernels import jagged_attention, plan_batch
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.report import environment
from hstu_cli.timing import Case, latency_summary, measure


def causal_flops(lengths: list[int], num_heads: int, head_dim: int) -> int:
    """Scores and weighted values of sequences without candidates."""
    return sum(length * (length + 1) // 2 for length in lengths) * num_heads * 4 * head_dim


def inputs(tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Q, k and v [tokens, heads, head_dim], of unit variance, within one tensor of u, v, q and k."""
    uvqk = torch.empty(tokens, 4, num_heads, head_dim, dtype=dtype, device=device).normal_()
    _, v, q, k = uvqk.unbind(1)
    return [q, k, v]


def measure_case(
    backend: Any, dtype: torch.dtype, impls: list[str], batch: int, length: int, heads: int, dim: int, iterations: int
) -> list[dict[str, Any]]:
    """A row for each implementation, timed in turns."""
    q, k, v = inputs(batch * length, heads, dim, dtype, backend.device)
    scale = {"alpha": dim**-0.5, "scaling_seqlen": length}
    plan = plan_batch(torch.arange(batch + 1) * length, None, batch * length, backend.device)
    first = [x[:length].float() for x in (q, k, v)]
    alone = plan_batch(torch.tensor([0, length]), None, length, backend.device)
    exact = jagged_attention(*first, alone, **scale, impl="blocked")
    runs = {impl: partial(jagged_attention, q, k, v, plan, **scale, impl=impl) for impl in impls}
    errors = {impl: relative_error(run()[:length], exact) for impl, run in runs.items()}
    samples = measure([Case(impl, [run]) for impl, run in runs.items()], backend, warmup=3, iterations=iterations)
    rows = []
    for impl in impls:
        latency = latency_summary(samples[impl])
        tflops = causal_flops([length] * batch, heads, dim) / latency["p50"] * 1e-9
        rows.append(
            {
                "impl": impl, "batch_size": batch, "seqlen": length, "num_heads": heads, "head_dim": dim,
                "latency_ms": latency, "tflops": tflops, "output_error": errors[impl],
            }
        )  # fmt: skip
    return rows


def main(
    output_json: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
    device: Annotated[str, typer.Option(help="As in hstu --device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    impls: Annotated[str, typer.Option(help="Implementations, separated by commas.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    num_heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dims: Annotated[str, typer.Option(help="Separated by commas.")] = "128,256",
    seqlens: Annotated[str, typer.Option(help="Separated by commas.")] = "1024,2048,4096,8192",
    num_iters: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
) -> None:
    """Time attention over lengths and head dims."""
    backend = open_device(device).backend
    backend.tune_process()
    kind = DTYPES[resolve_dtype(dtype, backend)]
    names = list(dict.fromkeys(choose_impl(name, backend.type).name for name in impls.split(",")))
    torch.manual_seed(0)
    rows = [
        row
        for dim in map(int, head_dims.split(","))
        for length in map(int, seqlens.split(","))
        for row in measure_case(backend, kind, names, batch_size, length, num_heads, dim, num_iters)
    ]
    record = {"env": environment(backend.device_name, backend.memory_bytes), "dtype": dtype, "rows": rows}
    if output_json is not None:
        output_json.parent.mkdir(parents=True, exist_ok=True)
        output_json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    columns = ("head dim", "length", "impl", "ms, median", "TFLOP/s", "error")
    table = Table(*columns, title=f"{backend.device_name}, {dtype}, batch {batch_size}, {num_heads} heads")
    for row in rows:
        table.add_row(
            str(row["head_dim"]), f"{row['seqlen']:,}", row["impl"], f"{row['latency_ms']['p50']:.3f}",
            f"{row['tflops']:.1f}", f"{row['output_error']:.2g}",
        )  # fmt: skip
    Console().print(table)
    if not all(row["output_error"] <= most_rounding(kind, 1) for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
