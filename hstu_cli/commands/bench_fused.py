"""`hstu bench-fused`: the training layer, fused and with recompute, in latency and in memory."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from hstu_cli.charts import Panel, Timeline
    from hstu_cli.config import ModelConfig

EXAMPLE = "Example: hstu bench-fused 2 --dtype bf16 --seqlens 1024,2048 --batch-size 1 --plot fused.html"

SEQLENS = "1024,2048,4096,8192"
BATCH_SIZE = 32
EMBEDDING_DIM, NUM_HEADS = 1024, 4
SWITCHES = {"RECOMPUTE_INPUT_LAYERNORM": "+layernorm_recompute", "RECOMPUTE_INPUT_SILU": "+silu_recompute"}
"""Environment variables that leave a variant out where they are 0."""

REFUSED_IMPLS = {"reference": "is no fused layer (--compare eager adds its time)"}

PUBLISHED = "H100, published, batch 32, bf16"
"""How the reference implementation's figures are labelled, whatever runs here."""

CPU_SECONDS = 150.0
"""The estimated time that a CPU's default run may take; three minutes are the promise."""


def bench_fused(
    num_layers: Annotated[int, typer.Argument(min=1, help="Layers, one after another.")] = 1,
    seqlens: Annotated[
        str | None, typer.Option(metavar="LIST", help="Tokens of a sequence.", show_default=SEQLENS)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=options.MOST_COUNT, help="Sequences at once.", show_default=str(BATCH_SIZE))
    ] = None,
    embedding_dim: Annotated[int, typer.Option(min=1, max=65_536, help="Width of the tokens.")] = EMBEDDING_DIM,
    num_heads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Heads.", show_default=f"{NUM_HEADS}, or the hardware preset's")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Width of a head.", show_default="embedding dim / heads")
    ] = None,
    full_sequence: Annotated[
        bool,
        typer.Option("--full-sequence/--jagged", help="All sequences as long as named, or of random lengths up to it."),
    ] = True,
    dropout: Annotated[float, typer.Option(help="Of the gated attention output.")] = 0.2,
    compare: Annotated[
        str | None, typer.Option(help="eager: also time the plain PyTorch composition.", metavar="eager")
    ] = None,
    num_iters_warmup: options.Warmup = 1,
    num_iters: options.Iterations = 5,
    full: options.Full = False,
    dry_run: options.DryRun = False,
    plot: options.Plot = None,
    profile: options.Profile = None,
    device: options.Device = "auto",
    require_device: options.RequireDevice = False,
    dtype: options.Dtype = "auto",
    impl: options.LayerImpl = "auto",
    seed: options.Seed = 0,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Time training layers, forward and backward: plain, fused, and with recompute.

    RECOMPUTE_INPUT_LAYERNORM=0 and RECOMPUTE_INPUT_SILU=0 in the environment leave out the variants that compute the
    normalised input, or that and SiLU's output, again; unset or 1 means that they run.
    """
    args = dict(locals())
    options.check_outputs(dry_run=dry_run, plot=plot, profile=profile, output_json=output_json)
    lengths = options.parse_counts("--seqlens", SEQLENS if seqlens is None else seqlens, least=1)
    variants = _chosen_variants(os.environ)
    if not 0 <= dropout < 1:
        raise UsageError(f"--dropout takes a number from 0 to below 1, not {dropout}.")
    if compare not in (None, "eager"):
        raise UsageError(f"--compare knows eager, not {compare!r}.")
    from dataclasses import replace
    from functools import partial

    from hstu_cli.bench.fused import FusedGrid, apply_peak, dry_rows, run_fused_benchmark
    from hstu_cli.charts import check_plot
    from hstu_cli.commands import bench
    from hstu_cli.commands.opening import open_run
    from hstu_cli.config import MODEL_PRESETS

    if plot is not None:
        check_plot(plot)
    opened = open_run(
        "bench-fused",
        args,
        device=device,
        require_device=require_device,
        dtype=dtype,
        impl=impl,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=metadata,
        gradients=True,
        refused_impls=REFUSED_IMPLS,
    )
    preset = opened.choice.preset
    heads = num_heads or (preset.num_heads if preset and head_dim is None else NUM_HEADS)
    if head_dim is None and embedding_dim % heads:
        raise UsageError(f"{heads} heads do not divide --embedding-dim {embedding_dim}: give --head-dim, too.")
    model_config = replace(
        MODEL_PRESETS["benchmark"],
        num_layers=num_layers,
        hidden_dim=embedding_dim,
        num_heads=heads,
        head_dim=head_dim or embedding_dim // heads,
        scaling_seqlen=max(lengths),
    )
    if opened.impl.name == "triton":
        _check_triton(model_config)
    grid = FusedGrid(lengths, batch_size or BATCH_SIZE, variants, full_sequence, dropout, compare == "eager")
    reporter = opened.reporter
    reporter.record |= {"model": model_config.to_dict(), "dropout": dropout, "full_sequence": full_sequence}
    if dry_run:
        bench.dry_run(opened, dry_rows(model_config, grid, opened.dtype.itemsize, opened.impl.name))
        return
    with bench.benchmark(
        opened,
        _tables,
        _panels,
        warmup=num_iters_warmup,
        iterations=num_iters,
        plot=plot,
        profile=profile,
        on_ceilings=partial(apply_peak, reporter.record),
    ) as run:
        if opened.backend.type == "cpu":

            def seconds(grid: FusedGrid) -> float:
                # Rounds, three passes for memory, and the checks of one sequence, of which the exact one takes longer.
                rounds = num_iters_warmup + num_iters + 3 + 2 / grid.batch_size
                flops = sum(grid.flops(model_config, n) for n in grid.seqlens)
                slower = len(grid.variants) + 3 * grid.compare_eager
                return bench.estimated_seconds(run.session, flops, rounds * slower + 12 / grid.batch_size)

            whole = grid
            while not full and batch_size is None and grid.batch_size > 1 and seconds(grid) > CPU_SECONDS:
                grid = replace(grid, batch_size=grid.batch_size // 2)
            while not full and seqlens is None and len(grid.seqlens) > 1 and seconds(grid) > CPU_SECONDS:
                grid = replace(grid, seqlens=grid.seqlens[:-1])
            if grid != whole:
                listed = ", ".join(map(str, grid.seqlens))
                bench.say_scaled(opened, f"batch size {grid.batch_size}, sequences of {listed} tokens")
            bench.note_estimate(opened, seconds(grid), CPU_SECONDS)
        for row in run_fused_benchmark(
            run.session,
            model_config,
            grid,
            impl=opened.impl.name,
            seed=seed,
            on_group=lambda done, total: run.progress.count(done, total, "lengths"),
        ):
            run.rows.append(row)  # one by one, so that an interrupted run keeps what is finished


def _check_triton(config: "ModelConfig") -> None:
    """UsageError for a shape that the Triton kernels do not take."""
    from hstu_cli.kernels.attention.triton import LARGEST_HEAD_DIM
    from hstu_cli.kernels.fused_layer.triton import MOST_WIDTH

    if config.head_dim > LARGEST_HEAD_DIM or max(config.hidden_dim, config.attention_dim) > MOST_WIDTH:
        raise UsageError(
            f"Implementation 'triton' takes head dims up to {LARGEST_HEAD_DIM} and rows of up to {MOST_WIDTH} "
            "elements, all heads together: choose blocked, or another shape."
        )


def _chosen_variants(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The variants that the environment's switches leave."""
    variants = ["baseline", "optimized"]
    for switch, variant in SWITCHES.items():
        text = environment.get(switch, "1").strip().lower()
        if text not in ("0", "1", "false", "true"):
            raise UsageError(f"{switch} in the environment is 0 or 1, not {environment[switch]!r}.")
        if text in ("1", "true"):
            variants.append(variant)
    return tuple(variants)


def _name(row: Mapping[str, Any]) -> str:
    """The column of a row: its variant, or the peer."""
    return row["variant"] if row["impl"] != "eager" else "eager"


def _by_length(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Rows by length, then by column."""
    lengths: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        lengths.setdefault(row["seqlen"], {})[_name(row)] = row
    return lengths


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.commands.bench import overview, percent, speedup_text, spread
    from hstu_cli.report import format_value

    lengths = _by_length(record["rows"])
    names = list(dict.fromkeys(_name(row) for row in record["rows"]))
    tables = [overview(record)]
    summaries = {
        "Latency, ms (range)": lambda row: spread(row["latency_ms"]),
        "Peak memory beside inputs and weights, MB": lambda row: f"{row['peak_memory_bytes'] / 1e6:,.1f}",
    }
    for title, shown in summaries.items():
        table = Table(title=title, title_justify="left")
        table.add_column("Tokens", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        for seqlen, rows in lengths.items():
            cells = (
                "" if name not in rows else "skipped" if "skipped" in rows[name] else shown(rows[name])
                for name in names
            )
            table.add_row(f"{seqlen:,}", *cells)
        tables.append(table)
    details = Table(title=f"Forward and backward; MFU of {_peak_text(record)}", title_justify="left")
    published = any(row.get("published_tflops") for row in record["rows"])
    columns = ["Tokens", "Variant", "Forward ms", "Backward ms", "TFLOP/s", "MFU", "Speed-up (range)"]
    columns += [f"{PUBLISHED}: TFLOP/s"] if published else []
    columns += ["Error", "of gradients"]
    for name in columns:
        details.add_column(
            name, justify="left" if name == "Variant" else "right", no_wrap=name == "Variant", overflow="fold"
        )
    for row in record["rows"]:
        start = [f"{row['seqlen']:,}", _name(row)]
        if "skipped" in row:
            details.add_row(*start, f"skipped: {row['skipped']}")
            continue
        details.add_row(
            *start,
            format_value(row["forward_ms"]["p50"]),
            format_value(row["backward_ms"]["p50"]),
            format_value(row["tflops"]),
            percent(row["mfu"]),
            speedup_text(row["speedup_vs_baseline"], row["speedup_range"]) if row["speedup_range"] else "-",
            *([format_value(row["published_tflops"])] if published else []),
            f"{row['output_error']:.2g}",
            f"{row['gradient_error']:.2g}",
        )
    return [*tables, details]


def _peak_text(record: Mapping[str, Any]) -> str:
    """What MFU is a share of, in a few words."""
    if "peak" not in record:
        return "the peak"
    return f"{record['peak']['flops_per_s'] / 1e12:,.2f} TFLOP/s ({record['peak']['source']})"


def _panels(record: Mapping[str, Any]) -> "list[Panel | Timeline]":
    from hstu_cli.charts import Panel, Timeline

    lengths = _by_length([row for row in record["rows"] if "skipped" not in row])
    names = list(dict.fromkeys(name for rows in lengths.values() for name in rows))
    labels = [f"{seqlen:,} tokens" for seqlen in lengths]
    latency = {n: [rows[n]["latency_ms"]["p50"] if n in rows else None for rows in lengths.values()] for n in names}
    memory = {
        n: [rows[n]["peak_memory_bytes"] / 1e6 if n in rows else None for rows in lengths.values()] for n in names
    }
    panels: list[Panel | Timeline] = [
        Panel("Forward and backward", "ms", labels, latency),
        Panel("Peak memory beside inputs and weights", "MB", labels, memory),
    ]
    for seqlen, rows in lengths.items():
        series = {}
        for name, row in rows.items():
            times, values = zip(*row["memory_timeline"]["samples"], strict=True)
            series[name] = (times, [value / 1e6 for value in values])
        panels.append(Timeline(f"Memory of live tensors, {seqlen:,} tokens", "MB", "ms, while watched", series))
    return panels
