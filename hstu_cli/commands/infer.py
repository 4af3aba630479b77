"""`hstu infer`: replay a data set's requests through a model; latency, throughput and quality."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import RunError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from hstu_cli.model.captured import CapturedBlock
    from hstu_cli.report import Reporter

EXAMPLE = "Example: hstu infer --config tiny --dataset pure --from 2022-04-25 --predictions-out scores.parquet"
WORTHWHILE_RATIO = 1.5
"""Below this ratio of tokens, uncached to cached, what the cache saves is about what it costs."""


def infer(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder, .safetensors, .pt or .pth; without one, random weights.")
    ] = None,
    config: options.Config = None,
    dataset: options.Dataset = None,
    data_root: options.DataRoot = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Batches to run; without it, all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of distinct users scored at once.")] = 32,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="DATE", help="First request time, UTC+8; older events are history.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="DATE", help="Request times before this only, UTC+8.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="A cutoff of hit rate and NDCG besides 1, 5, 10 and 50.")
    ] = None,
    predictions_out: Annotated[
        Path | None, typer.Option(help="Write the scores to this Parquet file, a row per request and candidate.")
    ] = None,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache/--no-kv-cache", help="Keep keys and values of histories between requests.")
    ] = True,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens in a page of the cache.")] = 32,
    num_pages: Annotated[
        int | None, typer.Option(min=1, help="Pages on the device; without it, what the users need and memory allows.")
    ] = None,
    host_cache_gb: Annotated[
        float | None, typer.Option(min=0, help="Host memory for evicted users, in GB; 0 on a CPU unless given.")
    ] = None,
    verify_cache: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Recompute every Nth request uncached; differences fail."),
    ] = None,
    append_impl: options.AppendImpl = "auto",
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Replay cached steps as graphs; without either, where that is possible, but not on NPUs.",
        ),
    ] = None,
    embedding: options.Embedding = "auto",
    dump_logits: Annotated[bool, typer.Option("--dump-logits", help="Print the shape of each batch's logits.")] = False,
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
    """Replay requests in time order through an HSTU ranking model."""
    args = {name.rstrip("_"): value for name, value in locals().items()}
    from_ms, until_ms = options.parse_date("--from", from_), options.parse_date("--until", until)
    if from_ms is not None and until_ms is not None and from_ms >= until_ms:
        raise UsageError(f"--from {from_} must be before --until {until}.")
    if host_cache_gb is not None and not math.isfinite(host_cache_gb):
        raise UsageError(f"--host-cache-gb takes a number of gigabytes, not {host_cache_gb}.")
    if predictions_out is not None and predictions_out == output_json:
        raise UsageError("--predictions-out and --output-json name the same file.")
    if not kv_cache and (num_pages or host_cache_gb or verify_cache or append_impl != "auto"):
        raise UsageError(
            "--num-pages, --host-cache-gb, --verify-cache and --append-impl need the cache: drop --no-kv-cache."
        )
    if not kv_cache and cuda_graph:
        raise UsageError("--cuda-graph captures cached steps: drop --no-kv-cache.")
    from hstu_cli.bench.replay import Replay
    from hstu_cli.bench.requests import RequestSource
    from hstu_cli.bench.setup import CacheOptions, build_cache, random_model_for, unknown_context_ids
    from hstu_cli.commands.opening import (
        note_block_rows,
        open_checkpoint,
        open_dataset,
        open_run,
    )
    from hstu_cli.config import DEFAULT_PRESET, MODEL_PRESETS, resolve_model_config
    from hstu_cli.data.predictions import PredictionsWriter, check_writable
    from hstu_cli.kernels.append_pages import choose_append_impl
    from hstu_cli.model.buckets import default_buckets
    from hstu_cli.model.engine import InferenceEngine
    from hstu_cli.model.graphs import choose_graphs
    from hstu_cli.model.lookups import choose_embedding, make_lookup
    from hstu_cli.model.recsys_examples import is_recsys_examples
    from hstu_cli.model.shaped_graphs import graph_runner

    if predictions_out is not None:
        check_writable(predictions_out)
    foreign = checkpoint is not None and is_recsys_examples(checkpoint)  # whose --config may leave much open
    model_config = resolve_model_config(config) if config is not None and not foreign else None
    opened = open_run(
        "infer",
        args,
        device=device,
        require_device=require_device,
        dtype=dtype,
        impl=impl,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=metadata,
        page_size=page_size if kv_cache else None,
        cuda_graph=bool(cuda_graph),
    )
    reporter, backend = opened.reporter, opened.backend
    chosen_embedding = choose_embedding(embedding, backend.type)
    choose_append_impl(append_impl, backend.type, opened.dtype, impl=impl)  # refused before data is read
    graph_choice = choose_graphs(cuda_graph, backend, opened.impl.name, cached=kv_cache)
    prepared = open_dataset(dataset, data_root, reporter)
    if checkpoint is not None:
        loaded = open_checkpoint(checkpoint, config)
        model = loaded.model
        if loaded.num_ignored:
            reporter.note(f"{loaded.num_ignored:,} entries of the checkpoint are not needed for inference.")
        for feature, count in unknown_context_ids(model, prepared).items():
            reporter.warn(
                f"{count:,} users have a {feature} that the checkpoint's table does not hold; row 0 stands in."
            )
    else:
        model = random_model_for(prepared, model_config or MODEL_PRESETS[DEFAULT_PRESET], backend, seed)
        reporter.warn("No --checkpoint: the weights are random, so expect an AUC of about 0.5.")
    model = model.to(device=backend.device, dtype=opened.dtype)
    limit = None if steps is None else steps * batch_size
    source = RequestSource(prepared, model.config, from_ms=from_ms, until_ms=until_ms, limit=limit)
    cache = None
    if kv_cache:
        host_bytes = None if host_cache_gb is None else int(host_cache_gb * 1e9)
        sizes = CacheOptions(page_size, num_pages, host_bytes, verify_cache is not None, append_impl, impl)
        cache = build_cache(source, model.config, model.dtype, backend, sizes)
    graphs = None
    if graph_choice.enabled:
        graphs = graph_runner(model.layers, cache, opened.impl.name, default_buckets(model.config, batch_size))
    replay = Replay(
        InferenceEngine(model, opened.impl.name, cache, make_lookup(chosen_embedding.name, model), graphs),
        source,
        backend,
        batch_size=batch_size,
        num_steps=steps,
        top_k=top_k,
        verify_every=verify_cache,
    )

    reporter.record |= {
        "dataset": {"name": prepared.name, "path": str(prepared.path)},
        "model": model.config.to_dict() | {"weights": "checkpoint" if checkpoint else "random"},
        "embedding": asdict(chosen_embedding),
    }
    note_block_rows(opened, model.config)
    replay.warm_up()
    writer = PredictionsWriter(predictions_out) if predictions_out is not None else None
    with reporter.running(_tables) as record, writer or nullcontext(), reporter.progress() as progress:
        if graphs is not None:
            progress.stage("capturing graphs")
            graphs.capture(lambda done, total: progress.count(done, total, "sizes of a batch"))
            if not graphs.learns_sizes:
                _warn_of_left_out(reporter, graphs)
        progress.stage("replaying")

        def on_batch(done: int, logits_shape: tuple[int, int]) -> None:
            progress.count(done, replay.total_requests, "requests")
            if dump_logits:
                reporter.note(f"batch {len(replay.latencies_ms) - 1}: logits {list(logits_shape)} float32")

        try:
            replay.run(writer, on_batch)
        finally:
            record |= replay.summary()
            record["cuda_graph"]["reason"] = graph_choice.reason
        if graphs is not None and graphs.learns_sizes:
            _warn_of_left_out(reporter, graphs)
        if replay.failure is not None:
            raise RunError(replay.failure)


def _warn_of_left_out(reporter: "Reporter", graphs: "CapturedBlock") -> None:
    """Say for which steps memory did not suffice, each in words of its own."""
    for size in graphs.summary()["left_out"]:
        sequences = f"{size['num_tokens']:,} tokens, {size['batch_size']:,} sequences"
        if "pages_each" in size:
            sequences += f" of {size['new_tokens_each']:,} new tokens and {size['pages_each']:,} pages"
        reporter.warn(f"Memory did not suffice for the graph of steps of {sequences}.")


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.commands.opening import strips_line
    from hstu_cli.report import format_value, key_value_table

    device, latency, metrics = record["device"], record["latency_ms"], record["metrics"]
    overview = key_value_table(
        "hstu infer" + ("" if record["status"] == "valid" else f" ({', '.join(record['reasons'])})"),
        {
            "Data": f"{record['dataset']['name']} ({record['dataset']['path']})",
            "Weights": record["model"]["weights"],
            "Device": f"{device['name']} ({device['actual']}), {device['dtype']}",
            "Implementation": f"{device['impl']} ({device['impl_reason']})",
            **strips_line(device),
            "Embedding": f"{record['embedding']['name']} ({record['embedding']['reason']})",
            _graphs_label(device): _graphs_line(record["cuda_graph"]),
            "Requests": f"{record['num_requests']:,} in {record['num_batches']:,} batches",
            "Throughput": f"{format_value(record['throughput_rps'])} requests/s",
        },
    )
    speed = Table(title="Latency of a batch (ms)", title_justify="left")
    names = [name for name in latency if name != "samples"]
    for name in names:
        speed.add_column(name, justify="right")
    speed.add_row(*(format_value(latency[name]) for name in names))
    items = Table("K", title=f"Next item, of {record['vocab_size']:,}", title_justify="left")
    tasks = Table("Task", "AUC", title="Candidates", title_justify="left")
    items.add_column("hit rate", justify="right")
    items.add_column("NDCG", justify="right")
    for k, hits in metrics["hit_rate"].items():
        items.add_row(k, format_value(hits), format_value(metrics["ndcg"][k]))
    for task, auc in metrics["auc"].items():
        tasks.add_row(task, format_value(auc) if auc is not None else f"- ({metrics['auc_reason'][task]})")
    return [overview, speed, _cache_table(record["kv_cache"]), items, tasks]


def _graphs_label(device: Mapping[str, Any]) -> str:
    """What graphs are called; a CPU, which has none, is told what GPUs have."""
    return "Graphs" if device["actual"].startswith("npu") else "CUDA graphs"


def _graphs_line(graphs: Mapping[str, Any]) -> str:
    """What was captured and how often it was replayed, or why nothing was."""
    if not graphs["enabled"]:
        return f"off ({graphs['reason']})"
    sizes = [bucket["num_tokens"] for bucket in graphs["buckets"]]
    span = f"for up to {min(sizes):,} to {max(sizes):,} new tokens" if sizes else "for no step"
    # Where sizes are learned: those that came when there were graphs enough.
    beyond = f", {graphs['steps_beyond']:,} of them beyond the most shapes" if graphs.get("steps_beyond") else ""
    return (
        f"{graphs['captured_graphs']:,} {span}, {graphs['memory_bytes'] / 1e6:,.1f} MB, {graphs['replays']:,} replays, "
        f"{graphs['eager_steps']:,} steps without{beyond} ({graphs['reason']})"
    )


def _cache_table(cache: Mapping[str, Any]) -> "Table":
    """What the cache did, or that there was none."""
    from hstu_cli.report import format_value, key_value_table

    if not cache["enabled"]:
        return key_value_table("KV cache", {"Enabled": False})
    device, host = cache["device_pages"], cache["host_pages"]
    ratio = cache["token_work_ratio"]
    short = " (histories too short for the cache to pay)" if ratio is not None and ratio < WORTHWHILE_RATIO else ""
    rows = {
        "Token hit rate": cache["token_hit_rate"],
        "Tokens to compute without it, over with it": f"{format_value(ratio)}{short}",
        "Tokens: device hits, host hits, recomputed": _several(
            cache["device_hit_tokens"], cache["host_hit_tokens"], cache["recomputed_tokens"]
        ),
        "Pages on the device: used, free, pinned": _several(device["used"], device["free"], device["pinned"]),
        "Pages on the host: used, free, pinned": _several(host["used"], host["free"], host["pinned"]),
        "Page": f"{cache['page_size']} tokens, {cache['page_bytes']:,} bytes",
        "Appended by": f"{cache['append_impl']} ({cache['append_reason']})",
        "Evictions": cache["evictions"],
        "Dropped: stale, window moved, corrupt": _several(
            cache["stale_drops"], cache["window_moves"], cache["corrupt_drops"]
        ),
        "Requests larger than the cache": cache["uncached_requests"],
        "Bytes to and from the host": _several(cache["bytes_offloaded"], cache["bytes_onloaded"]),
    }
    if verified := cache.get("verified"):
        rows["Verified requests"] = verified["num_requests"]
        rows["Worst error, cached and uncached (budget)"] = (
            f"{verified['worst_cached_error']:.3g}, {verified['worst_uncached_error']:.3g} ({verified['budget']:.3g})"
        )
        rows["Worst difference of a logit"] = verified["worst_difference"]
    return key_value_table("KV cache", rows)


def _several(*counts: int) -> str:
    return ", ".join(f"{count:,}" for count in counts)
