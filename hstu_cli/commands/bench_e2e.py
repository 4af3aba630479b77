"""`hstu bench-e2e`: whole requests of growing users, with and without the cache."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from hstu_cli.charts import Panel

EXAMPLE = "Example: hstu bench-e2e --dtype bf16 --num-users 1,8 --output-json e2e.json"

NUM_USERS = "1,2,4,8"
NUM_ITERS = 3
VARIANTS = "baseline,kvcache,kvcache+graph"


def bench_e2e(
    num_users: Annotated[
        str | None, typer.Option(metavar="LIST", help="Users of a batch.", show_default=NUM_USERS)
    ] = None,
    history_step: Annotated[int, typer.Option(min=2, help="Tokens that each batch adds to every history.")] = 256,
    num_batches: Annotated[int, typer.Option(min=1, help="Batches of the workload.")] = 16,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of a request.")] = 256,
    variants: Annotated[str, typer.Option(metavar="LIST", help="What to run.")] = VARIANTS,
    embedding: Annotated[
        str, typer.Option(metavar="LIST", help="What looks embeddings up: auto (torch), torch, torchrec, dynamicemb.")
    ] = "auto",
    append_impl: options.AppendImpl = "auto",
    config: options.Config = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a page.", show_default="32, or the hardware preset's")
    ] = None,
    num_iters_warmup: options.Warmup = 1,
    num_iters: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds; all variants take turns in each.", show_default="3")
    ] = None,
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
    """Time requests of users whose histories grow, from embedding to logits."""
    args = dict(locals())
    options.check_outputs(dry_run=dry_run, plot=plot, profile=profile, output_json=output_json)
    users = options.parse_counts("--num-users", NUM_USERS if num_users is None else num_users, least=1)
    chosen = _parse_variants(variants)
    from hstu_cli.bench.e2e import GrowingUsers, dry_rows, run_e2e_benchmark
    from hstu_cli.bench.session import benchmark_config
    from hstu_cli.charts import check_plot
    from hstu_cli.commands import bench
    from hstu_cli.commands.opening import note_block_rows, open_run
    from hstu_cli.kernels.append_pages import choose_append_impl
    from hstu_cli.model.lookups import choose_embedding

    if plot is not None:
        check_plot(plot)
    opened = open_run(
        "bench-e2e",
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
    choices = {choice.name: choice for choice in (choose_embedding(n, opened.backend.type) for n in _names(embedding))}
    preset = opened.choice.preset
    model_config = benchmark_config(config, preset)
    # The bound limits memory and never results; with fewer, the baseline would recompute the history for each chunk.
    model_config = replace(model_config, max_candidates=max(candidates, model_config.max_candidates))
    workloads = [GrowingUsers(count, history_step, num_batches, candidates) for count in users]
    workloads[0].check(model_config)
    tokens = page_size or (preset.page_size if preset else 32)
    append = choose_append_impl(
        append_impl, opened.backend.type, opened.dtype, head_dim=model_config.head_dim, impl=impl
    )
    opened.reporter.record |= {
        "model": model_config.to_dict(),
        "page_size": tokens,
        "append": asdict(append),
        "embeddings": [asdict(choice) for choice in choices.values()],
    }
    if dry_run:
        rows = dry_rows(
            workloads,
            chosen,
            model_config,
            opened.dtype.itemsize,
            impl=opened.impl.name,
            page_size=tokens,
            embeddings=list(choices),
        )
        bench.dry_run(opened, rows)
        return
    iterations = NUM_ITERS if num_iters is None else num_iters
    with bench.benchmark(
        opened, _tables, _panels, warmup=num_iters_warmup, iterations=iterations, plot=plot, profile=profile
    ) as run:
        note_block_rows(opened, model_config)
        if opened.backend.type == "cpu":
            is_free = num_users is None and not full
            slower = 5 if opened.impl.name == "reference" else 1  # a dense composition

            def seconds() -> float:
                kinds = {name != "baseline" for name in chosen} | {False}
                costs = [w.cost(model_config, opened.dtype.itemsize, cached=kind) for kind in kinds for w in workloads]
                rounds = slower * len(choices) * (run.session.warmup + run.session.iterations)
                return bench.estimated_seconds(run.session, sum(flops for flops, _ in costs), rounds)

            while is_free and len(workloads) > 1 and seconds() > bench.CPU_SECONDS:
                workloads.pop()
            while is_free and num_iters is None and run.session.iterations > 1 and seconds() > bench.CPU_SECONDS:
                run.session.iterations -= 1
            if len(workloads) < len(users) or run.session.iterations < iterations:
                listed = ", ".join(str(workload.num_users) for workload in workloads)
                bench.say_scaled(opened, f"{listed} of {NUM_USERS} users, timed rounds: {run.session.iterations}")
            bench.note_estimate(opened, seconds(), bench.CPU_SECONDS)
        for row in run_e2e_benchmark(
            run.session,
            model_config,
            workloads,
            chosen,
            impl=opened.impl.name,
            append_impl=append.name,
            page_size=tokens,
            seed=seed,
            embeddings=list(choices),
            preset=preset.name if preset and config is None else None,  # figures of this very model
            on_group=lambda done, total: run.progress.count(done, total, "numbers of users"),
        ):
            run.rows.append(row)  # one by one, so that an interrupted run keeps what is finished


def _names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list, once each."""
    return tuple(dict.fromkeys(item.strip() for item in text.split(",")))


def _parse_variants(text: str) -> tuple[str, ...]:
    names = _names(text)
    known = VARIANTS.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--variants knows {', '.join(known)}, not {name!r}.")
    return names


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.commands.bench import bar, overview, percent, published_name, ratio, speedup_text, spread
    from hstu_cli.report import format_value

    published = any(row.get("published_ms") for row in record["rows"])
    table = Table(title="Total of all batches", title_justify="left")
    several = len(record["embeddings"]) > 1
    names = [
        "Users",
        *(["Embedding"] if several else []),
        "Variant",
        "ms (range)",
        "of roofline",
        "Speed-up (range)",
        "Limit",
        "",
    ]
    if published:
        names += [f"{published_name(record)}: ms"]
    names += ["Logits differ by"]
    for name in names:
        table.add_column(
            name,
            justify="left" if name in ("", "Embedding", "Variant") else "right",
            no_wrap="range" in name or name in ("", "Embedding", "Variant"),
            overflow="fold",
        )
    for row in record["rows"]:
        start = [f"{row['num_users']}", *([row["embedding"]] if several else []), row["variant"]]
        theirs = [format_value(row["published_ms"])] if published else []
        if "skipped" in row:
            table.add_row(*start, f"skipped: {row['skipped']}", *[""] * 4, *theirs)
            continue
        speedup, limit = row["speedup_vs_baseline"], row["speedup_limit"]
        table.add_row(
            *start,
            spread(row["total_latency_ms"]),
            percent(row["roofline_fraction"]),
            speedup_text(speedup, row["speedup_range"]),
            ratio(limit),
            bar(speedup, limit),
            *theirs,
            f"{row['max_abs_logit_difference']:.2g}",
        )
    return [overview(record), table]


def _panels(record: Mapping[str, Any]) -> "list[Panel]":
    from hstu_cli.charts import Panel
    from hstu_cli.commands.bench import published_name

    rows = [row for row in record["rows"] if "skipped" not in row]
    users = list(dict.fromkeys(row["num_users"] for row in rows))
    several = len(record["embeddings"]) > 1
    found: dict[str, dict[int, Mapping[str, Any]]] = {}  # rows by the name of their series, then by users
    for row in rows:
        name = f"{row['variant']}, {row['embedding']}" if several else row["variant"]
        found.setdefault(name, {})[row["num_users"]] = row
    labels = [f"{count} user{'s' if count > 1 else ''}" for count in users]

    def values(field: str, name: str) -> list[float | None]:
        return [found[name].get(count, {}).get(field) for count in users]

    totals = {name: values("total_ms", name) for name in found}
    for name, of_users in found.items():
        variant = next(iter(of_users.values()))["variant"]
        if any(values("published_ms", name)):
            totals[f"{variant}, {published_name(record)}"] = values("published_ms", name)
    cached = [name for name in found if not name.startswith("baseline")]
    speedups = {name: values("speedup_vs_baseline", name) for name in cached}
    panels = [Panel("Total of all batches", "ms", labels, totals)]
    if cached:
        panels.append(Panel("Speed-up over the baseline", "x", labels, speedups, values("speedup_limit", cached[0])))
    return panels
