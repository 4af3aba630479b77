"""What the benchmark commands share: a session on a device, bars in tables, and how they end."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from hstu_cli.bench.ceilings import measure_ceilings
from hstu_cli.bench.session import MEMORY_SHARE, BenchSession
from hstu_cli.charts import Panel, Timeline, write_plot
from hstu_cli.commands.opening import Opened
from hstu_cli.errors import InputError, RunError
from hstu_cli.report import format_value, key_value_table, with_range

if TYPE_CHECKING:
    from hstu_cli.report import ProgressLine

BAR_WIDTH = 12

CPU_SECONDS = 70.0
"""The estimated time that a CPU's default run may take. Two minutes are the promise: the rest is for what the estimate
does not see, the ceilings and setting up, and for a machine that others use more than while it was measured."""

CPU_EFFICIENCY = {torch.float32: 0.6}
OTHER_CPU_EFFICIENCY = 0.35
"""Share of the matmul rate that the estimate of a CPU's run assumes, by dtype."""


def estimated_seconds(session: BenchSession, flops: float, rounds: float) -> float:
    """About how long a CPU takes for so many rounds of so many FLOPs."""
    efficiency = CPU_EFFICIENCY.get(session.dtype, OTHER_CPU_EFFICIENCY)
    return rounds * flops / (efficiency * session.ceilings.matmul_flops_per_s)


def say_scaled(opened: Opened, message: str) -> None:
    """Tell that the default run was made smaller, and how."""
    opened.reporter.record["scaled"] = f"{message}; --full runs everything"
    opened.reporter.warn(f"Scaled for a CPU to {opened.reporter.record['scaled']}.")


def note_estimate(opened: Opened, seconds: float, most: float) -> None:
    """Record how long the cases take by estimate; told where it is more than `most` seconds.

    So it is for a run that was not, or could not be, made small enough.
    """
    opened.reporter.record["estimated_seconds"] = seconds
    if seconds > most:
        text = f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
        opened.reporter.warn(f"This takes about {text} on this CPU, by estimate.")


@dataclass(slots=True)
class Run:
    """A benchmark under way: its session, the rows so far, and a line about its progress."""

    session: BenchSession
    rows: list[dict[str, Any]]
    progress: "ProgressLine"


@contextmanager
def benchmark(
    opened: Opened,
    tables: Callable[[Mapping[str, Any]], list[Table]],
    panels: Callable[[Mapping[str, Any]], Sequence[Panel | Timeline]],
    *,
    warmup: int,
    iterations: int,
    plot: Path | None,
    profile: Path | None,
    on_ceilings: Callable[[BenchSession], None] = lambda session: None,
) -> Iterator[Run]:
    """A run that measures the machine's ceilings, before and after, and fills the record's rows one by one.

    on_ceilings: called after each of the two. What is finished comes out in any case. Raises InputError where the
    profile's folder cannot be made, RunError where an output was wrong or no case could run.
    """
    if profile is not None:
        try:
            profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--profile {profile} cannot be made: {error.strerror or error}.") from error
    reporter = opened.reporter
    reporter.record |= {"rows": [], "warnings": []}
    with reporter.running(tables) as record, reporter.progress() as progress:
        progress.stage("measuring the machine")
        ceilings = measure_ceilings(opened.backend, opened.dtype)
        record["ceilings"] = ceilings.to_dict()
        session = BenchSession(opened.backend, opened.dtype, ceilings, warmup, iterations, profile)
        on_ceilings(session)
        progress.stage("timing")
        start = time.monotonic()
        try:
            yield Run(session, record["rows"], progress)
            record["elapsed_seconds"] = time.monotonic() - start
            progress.stage("measuring the machine again")
            session.remeasure(record["rows"])
            record["ceilings"] = session.ceilings.to_dict()
            on_ceilings(session)
        finally:
            record["warnings"] = session.warnings(record["rows"])
            for warning in record["warnings"]:
                reporter.warn(warning)
        if plot is not None and any("skipped" not in row for row in record["rows"]):
            title = f"hstu {record['command']}: {record['device']['name']}, {record['device']['dtype']}"
            write_plot(plot, title, panels(record), tables(record), record)
        session.raise_failures()
        if all("skipped" in row for row in record["rows"]):
            reasons = dict.fromkeys(row["skipped"] for row in record["rows"])
            raise RunError(f"No case could run: {'; '.join(reasons)}.")


def dry_run(opened: Opened, rows: Iterable[dict[str, Any]]) -> None:
    """Print the cases and what they would cost, and what a run would leave out."""
    rows = list(rows)
    available = opened.backend.available_memory_bytes
    lacking = sum(row["memory_bytes"] > MEMORY_SHARE * available for row in rows)
    if lacking:
        text = f"{lacking} of {len(rows)} cases: {available / 1e9:,.1f} GB are available."
        opened.reporter.note(f"A run would skip {text}")
    if opened.backend.type == "cpu" and not opened.reporter.record["args"]["full"]:
        opened.reporter.note("A run measures this CPU first and may leave out more to be done in time; see --full.")
    with opened.reporter.running(lambda record: [_cost_table(record["rows"])]) as record:
        record["dry_run"] = True
        record["rows"] = rows


def overview(record: Mapping[str, Any]) -> Table:
    """Where and how the run was."""
    device, ceilings = record["device"], record.get("ceilings")
    title = f"hstu {record['command']}"
    if record["status"] != "valid":
        title += f" ({', '.join(record['reasons'])})"
    return key_value_table(
        title,
        {
            "Device": f"{device['name']} ({device['actual']}), {device['dtype']}",
            "Implementation": f"{device['impl']} ({device['impl_reason']})",
            **({"Appended by": f"{append['name']} ({append['reason']})"} if (append := record.get("append")) else {}),
            **({"Ceilings, measured": _rates(ceilings)} if ceilings else {}),
            **({"Time": _time(record)} if "elapsed_seconds" in record else {}),
            **({"Scaled": record["scaled"]} if record.get("scaled") else {}),
            **({"Warnings": "; ".join(record["warnings"])} if record.get("warnings") else {}),
        },
    )


def _time(record: Mapping[str, Any]) -> str:
    """How long the cases took, and were expected to."""
    estimate = f" ({record['estimated_seconds']:,.0f} s by estimate)" if "estimated_seconds" in record else ""
    return f"{record['elapsed_seconds']:,.0f} s{estimate}"


def _rates(ceilings: Mapping[str, Any]) -> str:
    """The measured ceilings in a line."""
    tiles = ceilings["tile_flops_per_s"]
    return (
        f"{ceilings['flops_per_s'] / 1e12:,.2f} TFLOP/s"
        + (f" (in tiles; a large product {ceilings['matmul_flops_per_s'] / 1e12:,.2f})" if tiles else "")
        + f", {ceilings['bytes_per_s'] / 1e9:,.1f} GB/s, "
        f"{ceilings['onload_bytes_per_s'] / 1e9:,.1f} GB/s from host memory"
    )


def published_name(record: Mapping[str, Any]) -> str:
    """How figures of the GPU that `--device` names are labelled: as its own, and in their dtype."""
    return f"{record['device']['requested'].upper()}, published, bf16"


def bar(speedup: float | None, limit: float | None) -> str:
    """A speed-up against its limit: full where it is reached."""
    if speedup is None or not limit:
        return ""
    filled = min(BAR_WIDTH, round(BAR_WIDTH * speedup / limit))
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def spread(latency: Mapping[str, Any]) -> str:
    """The median and the range of samples in milliseconds."""
    return with_range(latency["p50"], (latency["min"], latency["max"]))


def ratio(value: float | None) -> str:
    """A factor as tables show it."""
    return "-" if value is None else f"{value:.2f}x"


def speedup_text(median: float, limits: Sequence[float]) -> str:
    """A speed-up and its range over the rounds; the range alone is left out where it is a point."""
    low, high = limits
    return ratio(median) if low == high else f"{ratio(median)} ({low:.2f}-{high:.2f})"


def percent(value: float | None) -> str:
    """A share as tables show it."""
    return "-" if value is None else f"{value:.0%}"


UNITS = {"flops": ("GFLOP", 1e9), "bytes": ("MB moved", 1e6), "memory_bytes": ("MB of memory", 1e6)}
"""How the cost of a case is shown: header and divisor by field."""


def _cost_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every field of every case."""
    table = Table(title="The cases, not run", title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(UNITS[name][0] if name in UNITS else name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(format_value(v / UNITS[k][1] if k in UNITS else v) for k, v in row.items()))
    return table
