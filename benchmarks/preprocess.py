"""Time and peak memory of `hstu preprocess kuairand` on real rows, on 10 and 24 times as many, and by engine.

Method. Every run is a fresh process; its wall time includes the start of Python and every import, and
its peak memory is the kernel's `ru_maxrss` for that process alone (`os.wait4`). The sample archive is
KuaiRand-Pure in the official layout. Larger inputs are its own rows, repeated with other user ids (so
10 times the rows have 10 times the users) and packed as an archive before the clock starts. Cases that
are compared run in turn, round after round, and a ratio is the median of the ratios of its rounds.
Nothing drops the page cache: all inputs are read from memory, as they are right after a download.

Engines: DuckDB as shipped (1 GB memory limit, work on disk) against Polars in memory and streaming, on
the stage that matters: CSV parse, checks, bit packing, stable sort by user and time, every row handed
out. Their time leaves imports out, and equal checksums show that they did the same work.

    python benchmarks/preprocess.py --archive KuaiRand-Pure-sample.tar.gz --md5 SUM
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hstu_cli.hardware import cpu_name
from hstu_cli.report import environment, package_version

ENGINES_SCRIPT = Path(__file__).with_name("preprocess_engines.py")
RESULTS = Path(__file__).parent / "results"

REFERENCE_S = 416.0
"""NVIDIA's recsys-examples preprocessor, inference files with 300 s windows, on this sample and such a machine."""

SCALES = (1, 10, 24)
ENGINES = ("duckdb", "polars", "polars-streaming")
ENGINE_ROUNDS = {1: 5, 10: 3, 24: 2}
"""Times that every engine runs, by scale."""
TARGETS = {
    "sample_speedup_vs_reference": ("at least", 100.0),
    "time_ratio_10x_to_1x": ("at most", 11.0),
    "peak_rss_bytes_24x": ("at most", 4e9),
}

console = Console(highlight=False, stderr=True)


def run_measured(command: list[str]) -> dict[str, Any]:
    """Run a command to its end: wall seconds, peak resident bytes, and the JSON object that it prints."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise typer.Exit(1)  # the command has said why on stderr
        output.seek(0)
        return {"wall_s": wall_s, "peak_rss_bytes": 1024 * usage.ru_maxrss, "printed": json.loads(output.read())}


def prepare(case: str, archive: Path, md5: str, folder: Path) -> dict[str, Any]:
    """One run of the command over an archive, into an empty data root."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        command = [sys.executable, "-m", "hstu_cli", "preprocess", "kuairand", "--dataset", "pure", "--format", "json"]
        measured = run_measured([*command, "--archive", str(archive), "--md5", md5, "--data-root", root])
    record = measured.pop("printed")
    sizes = {name: record[name] for name in ("num_events", "num_users_with_events", "num_requests")}
    console.print(f"{case:>8}: {measured['wall_s']:6.2f} s  {measured['peak_rss_bytes'] / 1e6:7,.0f} MB")
    return {"case": case, **measured, **sizes}


def run_engine(engine: str, scale: int, folder: Path) -> dict[str, Any]:
    """One run of one engine's stage over the CSV files in a folder."""
    measured = run_measured([sys.executable, str(ENGINES_SCRIPT), "run", engine, str(folder)])
    row = {"scale": scale, **measured.pop("printed"), **measured}
    console.print(f"{scale:>7}x: {row['stage_s']:6.2f} s  {row['peak_rss_bytes'] / 1e6:7,.0f} MB  {engine}")
    return row


def multiply(archive: Path, folder: Path, copies: int) -> dict[str, Any]:
    """Make an archive of the sample's rows, so many times over, and its CSV files beside it."""
    folder.mkdir()
    return run_measured([sys.executable, str(ENGINES_SCRIPT), "multiply", str(archive), str(folder), str(copies)])[
        "printed"
    ]


def summary(rows: list[dict[str, Any]], keys: tuple[str, ...], seconds: str) -> list[dict[str, Any]]:
    """Rows of the same keys as one: median and least seconds, greatest memory, number of runs, and the samples."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **{name: value for name, value in group[0].items() if name not in ("wall_s", "stage_s")},
            "runs": len(group),
            f"median_{seconds}": statistics.median(row[seconds] for row in group),
            f"min_{seconds}": min(row[seconds] for row in group),
            "peak_rss_bytes": max(row["peak_rss_bytes"] for row in group),
            f"samples_{seconds}": [row[seconds] for row in group],
        }
        for group in groups.values()
    ]


def judge(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The three figures that have a target, with it and whether they meet it."""
    by_case = {row["case"]: row for row in cases}
    pairs = zip(by_case["10x"]["samples_wall_s"], by_case["1x"]["samples_wall_s"], strict=True)
    figures = {
        "sample_speedup_vs_reference": REFERENCE_S / by_case["sample"]["median_wall_s"],
        "time_ratio_10x_to_1x": statistics.median(ten / one for ten, one in pairs),
        "peak_rss_bytes_24x": by_case["24x"]["peak_rss_bytes"],
    }
    return {
        name: {
            "value": figures[name],
            "target": f"{relation} {bound:g}",
            "met": figures[name] >= bound if relation == "at least" else figures[name] <= bound,
        }
        for name, (relation, bound) in TARGETS.items()
    }


def tables(record: dict[str, Any]) -> list[Table]:
    command = Table("Input", "Events", "Runs", "Median s", "Least s", "Peak MB", title="hstu preprocess kuairand")
    for row in record["cases"]:
        command.add_row(
            row["case"],
            f"{row['num_events']:,}",
            str(row["runs"]),
            *(f"{row[name]:.2f}" for name in ("median_wall_s", "min_wall_s")),
            f"{row['peak_rss_bytes'] / 1e6:,.0f}",
        )
    engines = Table(
        "Input", "Engine", "Runs", "Median s", "Least s", "Peak MB", title="CSV to sorted events, by engine"
    )
    for row in record["engines"]:
        engines.add_row(
            f"{row['scale']}x",
            row["engine"],
            str(row["runs"]),
            *(f"{row[name]:.2f}" for name in ("median_stage_s", "min_stage_s")),
            f"{row['peak_rss_bytes'] / 1e6:,.0f}",
        )
    targets = Table("Figure", "Value", "Target", "Met", title="Targets")
    for name, judged in record["targets"].items():
        targets.add_row(name, f"{judged['value']:,.4g}", judged["target"], "yes" if judged["met"] else "no")
    return [command, engines, targets]


def slug(name: str) -> str:
    """A processor's name as a folder's."""
    plain = re.sub(r"\((r|tm)\)", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def measure(archive: Path, md5: str, repeats: int, folder: Path) -> dict[str, Any]:
    """All runs, with their inputs made and removed below `folder`."""
    start, load_before = time.time(), os.getloadavg()[0]
    runs, engine_rows = [], []
    inputs = {scale: multiply(archive, folder / f"{scale}x", scale) for scale in SCALES}
    prepare("warm-up", archive, md5, folder)
    for _ in range(repeats):
        runs.append(prepare("sample", archive, md5, folder))
        runs += [prepare(f"{n}x", Path(inputs[n]["archive"]), inputs[n]["md5"], folder) for n in (1, 10)]
    runs.append(prepare("24x", Path(inputs[24]["archive"]), inputs[24]["md5"], folder))
    for scale, rounds in ENGINE_ROUNDS.items():
        for _ in range(rounds):
            engine_rows += [run_engine(engine, scale, folder / f"{scale}x") for engine in ENGINES]
        if len({row["checksum"] for row in engine_rows if row["scale"] == scale}) != 1:
            console.print(f"The engines disagree about the rows at {scale}x: their times mean nothing.")
            raise typer.Exit(1)
    cases = summary(runs, ("case",), "wall_s")
    return {
        "schema_version": 1,
        "benchmark": "preprocess",
        "method": __doc__,
        "archive": {"name": archive.name, "md5": md5},
        "reference_s": REFERENCE_S,
        "env": environment() | {"polars": package_version("polars")},
        "load_average_before": load_before,
        "empty_process_peak_rss_bytes": run_measured([sys.executable, "-c", "print(0)"])["peak_rss_bytes"],
        "targets": judge(cases),
        "cases": cases,
        "engines": summary(engine_rows, ("scale", "engine"), "stage_s"),
        "took_s": time.time() - start,
    }


def main(
    archive: Annotated[Path, typer.Option(help="A KuaiRand-Pure archive in the official layout.", exists=True)],
    md5: Annotated[str, typer.Option(help="Its MD5.")],
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over the sample, 1x and 10x.")] = 3,
    temp_dir: Annotated[Path | None, typer.Option(help="Where about 10 GB may lie for a while.")] = None,
) -> None:
    """Measure the preparation; print tables and write benchmarks/results/<cpu>/preprocess.json."""
    with tempfile.TemporaryDirectory(prefix="hstu-preprocess-", dir=temp_dir) as folder:
        record = measure(archive, md5, repeats, Path(folder))
    if (
        max(row["median_wall_s"] / row["min_wall_s"] for row in record["cases"]) > 2
        or record["load_average_before"] > 1
    ):
        console.print("[yellow]Warning:[/yellow] machine busy: others were at work, and times are too long.")
    target = RESULTS / slug(cpu_name()) / "preprocess.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    output = Console(highlight=False)
    for table in tables(record):
        output.print(table)
    output.print(f"Written to {target}")


if __name__ == "__main__":
    typer.run(main)
