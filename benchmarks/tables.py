"""Prints saved benchmark records as the Markdown tables of docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

COLUMNS = {
    "num_users": "users",
    "embedding": "embedding",
    "variant": "variant",
    "num_candidates": "candidates",
    "batch_size": "batch",
    "history_length": "history",
    "cached_length": "cached",
    "impl": "impl",
    "latency_ms": "ms, median (range)",
    "speedup": "speed-up (range)",
    "speedup_limit": "limit",
    "speedup_limit_roofline": "limit on this machine",
    "roofline_fraction": "of roofline",
}
"""Headers by field, in order; a column that no row has is left out, and so is one and the same embedding."""


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The texts of a row by field."""
    texts = {name: f"{row[name]:,}" if isinstance(row[name], int) else row[name] for name in COLUMNS if name in row}
    if "num_users" in row:
        texts.pop("batch_size")
    if "skipped" in row:
        return texts | {"latency_ms": row["skipped"]}
    latency = row.get("total_latency_ms") or row["latency_ms"]
    texts["latency_ms"] = "{p50:,.0f} ({min:,.0f}-{max:,.0f})".format(**latency)
    speedup = row.get("speedup_vs_uncached") or row["speedup_vs_baseline"]
    low, high = row["speedup_range"]
    texts["speedup"] = "1" if low == high == 1 else f"{speedup:.2f} ({low:.2f}-{high:.2f})"
    texts |= {name: f"{row[name]:.2f}" for name in ("speedup_limit", "speedup_limit_roofline")}
    return texts | {"roofline_fraction": f"{row['roofline_fraction']:.0%}"}


def main(records: Annotated[list[Path], typer.Argument(help="JSON records of hstu bench-layer or bench-e2e.")]) -> None:
    """Print a table for each record."""
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
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
