"""Prints saved benchmark records as the Markdown tables of docs/benchmarks.md and docs/training.md."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

COLUMNS = {
    "num_users": "users",
    "seqlen": "tokens",
    "num_layers": "layers",
    "embedding": "embedding",
    "variant": "variant",
    "num_candidates": "candidates",
    "batch_size": "batch",
    "history_length": "history",
    "cached_length": "cached",
    "impl": "impl",
    "latency_ms": "ms, median (range)",
    "forward_ms": "forward",
    "backward_ms": "backward",
    "speedup": "speed-up (range)",
    "peak_memory_bytes": "peak, MB",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "speedup_limit": "limit",
    "speedup_limit_roofline": "limit on this machine",
    "roofline_fraction": "of roofline",
}
"""Headers by field, in order; a column that no row has is left out, and so is one and the same embedding."""


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The texts of a row by field."""
    named = (name for name in COLUMNS if isinstance(row.get(name), int | str))
    texts = {name: f"{row[name]:,}" if isinstance(row[name], int) else row[name] for name in named}
    if "num_users" in row:
        texts.pop("batch_size")
    if "skipped" in row:
        return texts | {"latency_ms": row["skipped"]}
    latency = row.get("total_latency_ms") or row["latency_ms"]
    texts["latency_ms"] = "{p50:,.0f} ({min:,.0f}-{max:,.0f})".format(**latency)
    speedup = row.get("speedup_vs_uncached") or row["speedup_vs_baseline"]
    if speedup is not None:
        low, high = row["speedup_range"]
        texts["speedup"] = "1" if low == high == 1 else f"{speedup:.2f} ({low:.2f}-{high:.2f})"
    if "seqlen" in row:
        parts = {name: f"{row[name]['p50']:,.0f}" for name in ("forward_ms", "backward_ms")}
        rates = {"tflops": f"{row['tflops']:,.2f}", "mfu": f"{row['mfu']:.0%}"}
        return texts | parts | rates | {"peak_memory_bytes": f"{row['peak_memory_bytes'] / 1e6:,.1f}"}
    texts |= {name: f"{row[name]:.2f}" for name in ("speedup_limit", "speedup_limit_roofline")}
    return texts | {"roofline_fraction": f"{row['roofline_fraction']:.0%}"}


def print_quality(path: Path, record: dict[str, Any]) -> None:
    """The table of a record of benchmarks/quality.py: its rows, their mean, and what to compare it with."""
    names = {
        "hit_rate_10": "HR@10",
        "hit_rate_50": "HR@50",
        "auc_long_view": "AUC long_view",
        "auc_is_click": "AUC is_click",
    }
    options = record["options"]
    epochs = options["study_epochs"] if record["study"] else options["epochs"]
    print(f"`{path}`: {epochs} epochs, {options['dtype']}, {record['env']['threads']} thread a run\n")
    print("| run | " + " | ".join(names.values()) + " | minutes |")
    print("|" + "---|" * (len(names) + 2))
    for row in sorted(record["rows"], key=lambda row: row.get("seed", 0)):
        scores = " | ".join(f"{row[name]:.4f}" for name in names)
        name = row.get("variant", f"seed {row.get('seed')}")
        print(f"| {name} | {scores} | {(row['training_s'] + row['scoring_s']) / 60:.1f} |")
    if summary := record.get("summary"):
        spread = " | ".join("{mean:.4f} ± {std:.4f}".format(**summary[name]) for name in names)
        print(f"| mean ± standard deviation | {spread} | |")
        for title, values in (
            ("popularity; rates of item and user", record["baselines"]),
            ("target", record["targets"]),
        ):
            print(f"| {title} | " + " | ".join(f"{values[name]:.4f}" for name in names) + " | |")
    print()


def main(
    records: Annotated[list[Path], typer.Argument(help="JSON records of hstu bench-* or quality.py.")],
) -> None:
    """Print a table for each record."""
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["command"] == "benchmarks/quality.py":
            print_quality(path, record)
            continue
        rows = [cells(row) for row in record["rows"]]
        shown = [name for name in COLUMNS if any(name in row for row in rows)]
        if len({row.get("embedding") for row in rows}) == 1:
            shown = [name for name in shown if name != "embedding"]
        device, ceilings = record["device"], record["ceilings"]
        print(
            f"`{path}`: {device['name']}, {device['dtype']}, {record['env']['threads']} threads; ceilings "
            f"{ceilings['flops_per_s'] / 1e12:.2f} TFLOP/s, {ceilings['bytes_per_s'] / 1e9:.1f} GB/s\n"
        )
        print("| " + " | ".join(COLUMNS[name] for name in shown) + " |")
        print("|" + "---|" * len(shown))
        for row in rows:
            print("| " + " | ".join(row.get(name, "") for name in shown) + " |")
        print()


if __name__ == "__main__":
    typer.run(main)
