"""`hstu bench-layer`: the block alone, cached against recomputed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from hstu_cli.charts import Panel

EXAMPLE = "Example: hstu bench-layer --dtype bf16 --history 4096 --cached 31/32 --candidates 0,256 --batch-size 1,8"

HISTORY = "128,256,512,1024,2048,4096"
CACHED = "0,1/2,3/4,7/8,15/16,31/32"
CANDIDATES = "0,256"
BATCH_SIZE = "1,2,4,8"


def bench_layer(
    history: Annotated[
        str | None, typer.Option(metavar="LIST", help="Tokens before the candidates.", show_default=HISTORY)
    ] = None,
    cached: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Cached tokens, or shares of the history.", show_default=CACHED),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="LIST", help="Candidates of a request.", show_default=CANDIDATES)
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="LIST", help="Requests at once.", show_default=BATCH_SIZE)
    ] = None,
    cache_tier: Annotated[
        str, typer.Option(help="device, or host: copying the cached pages from host memory counts.")
    ] = "device",
    compare: Annotated[
        str | None, typer.Option(help="eager: also time the plain PyTorch composition.", metavar="eager")
    ] = None,
    append_impl: options.AppendImpl = "auto",
    config: options.Config = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a page.", show_default="32, or the hardware preset's")
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
    impl: options.Impl = "auto",
    seed: options.Seed = 0,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Time the HSTU block over history, cached tokens, candidates and batch size."""
    args = dict(locals())
    options.check_outputs(dry_run=dry_run, plot=plot, profile=profile, output_json=output_json)
    histories = options.parse_counts("--history", HISTORY if history is None else history, least=1)
    shares = options.parse_shares("--cached", CACHED if cached is None else cached)
    counts = options.parse_counts("--candidates", CANDIDATES if candidates is None else candidates, least=0)
    sizes = options.parse_counts("--batch-size", BATCH_SIZE if batch_size is None else batch_size, least=1)
    if cache_tier not in ("device", "host"):
        raise UsageError(f"--cache-tier is device or host, not {cache_tier!r}.")
    if compare not in (None, "eager"):
        raise UsageError(f"--compare knows eager, not {compare!r}.")
    from hstu_cli.bench.layer import LayerGrid, LayerGroup, dry_rows, run_layer_benchmark, scaled_grid
    from hstu_cli.bench.session import benchmark_config
    from hstu_cli.charts import check_plot
    from hstu_cli.commands import bench
    from hstu_cli.commands.opening import note_block_rows, open_run
    from hstu_cli.kernels.append_pages import choose_append_impl

    grid = LayerGrid(histories, shares, counts, sizes, cache_tier == "host", compare == "eager")
    grid.groups()  # refuses what cannot be, before anything is opened
    if plot is not None:
        check_plot(plot)
    opened = open_run(
        "bench-layer",
        args,
        device=device,
        require_device=require_device,
        dtype=dtype,
        impl=impl,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=metadata,
        page_size=page_size,
    )
    preset = opened.choice.preset
    model_config = benchmark_config(config, preset)
    tokens = page_size or (preset.page_size if preset else 32)
    append = choose_append_impl(
        append_impl, opened.backend.type, opened.dtype, head_dim=model_config.head_dim, impl=impl
    )
    opened.reporter.record |= {"model": model_config.to_dict(), "page_size": tokens, "append": asdict(append)}
    if dry_run:
        rows = dry_rows(grid, model_config, opened.dtype.itemsize, impl=opened.impl.name, page_size=tokens)
        bench.dry_run(opened, rows)
        return
    with bench.benchmark(
        opened, _tables, _panels, warmup=num_iters_warmup, iterations=num_iters, plot=plot, profile=profile
    ) as run:
        note_block_rows(opened, model_config)
        if opened.backend.type == "cpu":
            # A dense composition takes several times as long.
            slower = 5 if grid.compare_eager or opened.impl.name == "reference" else 1

            def seconds(group: LayerGroup) -> float:
                flops = sum(group.cost(model_config, c, opened.dtype.itemsize)[0] for c in group.cached)
                rounds = num_iters_warmup + num_iters + 2  # and the checks
                return bench.estimated_seconds(run.session, flops, rounds * slower)

            given = {"histories": history, "candidates": candidates, "batch_sizes": batch_size}
            free = {name for name, text in given.items() if text is None and not full}
            whole, grid = grid, scaled_grid(grid, free, bench.CPU_SECONDS, seconds)
            if grid != whole:
                bench.say_scaled(
                    opened,
                    f"histories {_listed(grid.histories)}, candidates {_listed(grid.candidates)}, "
                    f"batch sizes {_listed(grid.batch_sizes)}",
                )
            bench.note_estimate(opened, sum(map(seconds, grid.groups())), bench.CPU_SECONDS)
        for row in run_layer_benchmark(
            run.session,
            model_config,
            grid,
            impl=opened.impl.name,
            append_impl=append.name,
            page_size=tokens,
            seed=seed,
            preset=preset.name if preset and config is None else None,  # figures of this very model
            on_group=lambda done, total: run.progress.count(done, total, "groups of cases"),
        ):
            run.rows.append(row)  # one by one, so that an interrupted run keeps what is finished


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    """Rows by candidates and batch size, as the published charts have them."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["num_candidates"], row["batch_size"]), []).append(row)
    return groups


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.commands.bench import bar, overview, percent, published_name, ratio, speedup_text, spread
    from hstu_cli.report import format_value

    tables = [overview(record)]
    published = any(row.get("published_ms") or row.get("published_speedup") for row in record["rows"])
    names = ["History", "Cached", "Impl", "ms (range)", "TFLOP/s", "of roofline", "Speed-up (range)", "Limit", ""]
    if published:
        names += [f"{published_name(record)}: ms", "speed-up"]
    names += ["Error"]
    for (candidates, batch), rows in _grouped(record["rows"]).items():
        table = Table(title=f"{candidates} candidates, batch size {batch}", title_justify="left")
        for name in names:
            table.add_column(
                name,
                justify="left" if name in ("", "Impl") else "right",
                no_wrap="range" in name or not name,
                overflow="fold",
            )
        for row in rows:
            start = [f"{row['history_length']:,}", f"{row['cached_length']:,}", row["impl"]]
            if "skipped" in row:
                table.add_row(*start, f"skipped: {row['skipped']}")
                continue
            speedup, limit = row["speedup_vs_uncached"], row["speedup_limit"]
            theirs = [format_value(row["published_ms"]), ratio(row["published_speedup"])] if published else []
            table.add_row(
                *start,
                spread(row["latency_ms"]),
                format_value(row["tflops"]),
                percent(row["roofline_fraction"]),
                speedup_text(speedup, row["speedup_range"]),
                ratio(limit),
                bar(speedup, limit),
                *theirs,
                f"{row['output_error']:.2g}",
            )
        tables.append(table)
    return tables


def _panels(record: Mapping[str, Any]) -> "list[Panel]":
    from hstu_cli.charts import Panel
    from hstu_cli.commands.bench import published_name

    panels = []
    for (candidates, batch), group in _grouped([row for row in record["rows"] if "skipped" not in row]).items():
        cases = list(dict.fromkeys((row["history_length"], row["cached_length"]) for row in group))
        impls = list(dict.fromkeys(row["impl"] for row in group))
        found = {(row["impl"], row["history_length"], row["cached_length"]): row for row in group}
        labels = [f"{cached} of {history}" for history, cached in cases]
        title = f"{candidates} candidates, batch size {batch}"

        def values(field: str, impl: str, found: Mapping = found, cases: Sequence = cases) -> list[float | None]:
            rows_of = [found.get((impl, *case), {}) for case in cases]
            return [row.get(field, {}).get("p50") if field == "latency_ms" else row.get(field) for row in rows_of]

        latency = {impl: values("latency_ms", impl) for impl in impls}
        if any(values("published_ms", impls[0])):
            latency[published_name(record)] = values("published_ms", impls[0])
        speedup = {impl: values("speedup_vs_uncached", impl) for impl in impls}
        panels.append(Panel(f"Latency, {title}", "ms", labels, latency))
        panels.append(Panel(f"Speed-up, {title}", "x", labels, speedup, values("speedup_limit", impls[0])))
    return panels
