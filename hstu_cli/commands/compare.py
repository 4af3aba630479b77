"""`hstu compare`: two saved records side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import InputError, RunError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "Example: hstu compare before.json after.json --fail-below 0.95"


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="The record to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The record to judge.")],
    fail_below: Annotated[
        float | None,
        typer.Option(min=0, metavar="RATIO", help="Exit 1 where B's speed over A's is below this, beyond doubt."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --fail-below: a case in doubt, by noise or a slower machine, fails.")
    ] = False,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Put two JSON records of the same command side by side; a ratio above 1 means that B is faster."""
    args = dict(locals())
    from hstu_cli.commands import comparison
    from hstu_cli.report import Reporter, environment, parse_metadata

    if strict and fail_below is None:
        raise UsageError("--strict says how --fail-below judges: give both.")
    if output_json is not None and output_json.resolve() in (first.resolve(), second.resolve()):
        raise UsageError("--output-json names a record that is compared.")
    a, b = _read(first), _read(second)
    if a["command"] != b["command"]:
        raise UsageError(f"{first} is of {a['command']} and {second} of {b['command']}: compare the same command.")
    reporter = Reporter(
        "compare",
        args,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=parse_metadata(metadata or []),
    )
    files = ((first, a), (second, b))
    warnings = [line for path, record in files for line in _warnings(record, path)]
    for line in warnings:
        reporter.warn(line)
    reporter.record |= {"env": environment(), "device": None, "compared": a["command"], "warnings": warnings}
    ours, theirs = comparison.cases(a, first), comparison.cases(b, second)
    with reporter.running(_tables) as record:
        record["differences"] = comparison.differences(a, b)
        record |= comparison.paired(ours, theirs)
        if not record["rows"]:
            raise RunError("The two records have no measured case in common.")
        if fail_below is not None:
            doubts = comparison.machine_doubts(a, b, fail_below)
            for row in record["rows"]:
                row |= comparison.verdict(row, fail_below, doubts)
            if not strict and (in_doubt := _told_doubts(record["rows"], fail_below)):
                warnings.append(in_doubt)
                reporter.warn(in_doubt)
            invalid = [path for path, record in files if record.get("status") != "valid"]
            _judge(record, fail_below, strict, invalid)


def _read(path: Path) -> dict[str, Any]:
    """A record of hstu; InputError for any other file."""
    from hstu_cli.config import read_json_object

    record = read_json_object(path)
    if "command" not in record or "schema_version" not in record:
        raise InputError(f"{path} is no record of hstu: it has no command or no schema_version.")
    if record["schema_version"] != 1:
        raise InputError(f"{path} has schema_version {record['schema_version']}; this version reads 1.")
    for name in ("warnings", "reasons"):
        if not isinstance(record.get(name) or [], list):
            raise InputError(f"{path} is damaged: its {name} are no list.")
    return record


def _warnings(record: Mapping[str, Any], path: Path) -> list[str]:
    """What a record says against itself: that it is not valid, and its own warnings."""
    lines = [f"{path}: {line}" for line in record.get("warnings") or []]
    if record.get("status") != "valid":
        reasons = ", ".join(map(str, record.get("reasons") or ["no reason given"]))
        lines.insert(0, f"{path} is {record.get('status')}: {reasons}")
    return lines


def _told_doubts(rows: Sequence[Mapping[str, Any]], fail_below: float) -> str | None:
    """A warning of the cases that may be slower, or not; None where there are none."""
    doubtful = [row for row in rows if row["verdict"] == "in doubt"]
    if not doubtful:
        return None
    more = f", and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
    return (
        f"{len(doubtful)} of {len(rows)} cases are below {fail_below:g} of A's speed, but may be no slower: "
        f"{doubtful[0]['case']} ({doubtful[0]['doubt']}){more}; --strict lets them fail"
    )


def _judge(record: Mapping[str, Any], fail_below: float, strict: bool, invalid: Sequence[Path]) -> None:
    """RunError where B is slower than it may be, lacks a case of A, or one of the records is not valid."""
    if invalid:
        raise RunError(f"{' and '.join(map(str, invalid))} cannot be judged: the run was not valid")
    if record["only_in_a"]:
        raise RunError(f"B lacks {len(record['only_in_a'])} of A's cases, {record['only_in_a'][0]} among them")
    verdicts = ("slower", "in doubt") if strict else ("slower",)
    slow = [row for row in record["rows"] if row["verdict"] in verdicts]
    if slow:
        worst = min(slow, key=lambda row: row["speed_ratio"])
        raise RunError(
            f"B is below {fail_below:g} of A's speed in {len(slow)} of {len(record['rows'])} cases, "
            f"at worst {worst['speed_ratio']:.3f} in {worst['case']}"
        )


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.report import format_value, key_value_table

    lines = {
        "A": record["args"]["first"],
        "B": record["args"]["second"],
        **({"Failed": "; ".join(record["reasons"])} if record["reasons"] else {}),
        **({"Warnings": "\n".join(record["warnings"])} if record["warnings"] else {}),
    }
    differences = Table("Setting", "A", "B", title="What differs", title_justify="left")
    for row in record["differences"]:
        differences.add_row(row["setting"], format_value(row["a"]), format_value(row["b"]))
    if not record["differences"]:
        differences.add_row("nothing", "", "")
    return [key_value_table(f"hstu compare: {record['compared']}", lines), differences, *_case_tables(record)]


def _case_tables(record: Mapping[str, Any]) -> "list[Table]":
    """Times and speed-ups, a line for each case: what differs in their names are columns, the rest is a title."""
    from hstu_cli.report import with_range

    only = [(case, which) for which in ("a", "b") for case in record[f"only_in_{which}"]]
    cases = [dict(_fields(case)) for case in (*(row["case"] for row in record["rows"]), *(case for case, _ in only))]
    found: dict[str, dict[str, None]] = {}  # values of each field, in order
    for case in cases:
        for name, value in case.items():
            found.setdefault(name, {})[value] = None
    common = ", ".join(f"{name} {next(iter(values))}".strip() for name, values in found.items() if len(values) == 1)
    varying = [name for name, values in found.items() if len(values) > 1]
    times = _case_table(
        f"Times: {common}" if common else "Times",
        varying,
        "A: ms (range)",
        "B: ms (range)",
        "B's speed over A's",
        "Ranges",
        "Verdict",
    )
    speedups = _case_table(
        "Speed-ups over the baseline of the same run", varying, "A (range)", "B (range)", "B's over A's"
    )
    for row, case in zip(record["rows"], cases, strict=False):  # the other cases are in one record only
        start = [case.get(name, "") for name in varying]
        times.add_row(
            *start,
            with_range(row["a_ms"], row["a_range_ms"]),
            with_range(row["b_ms"], row["b_range_ms"]),
            f"{row['speed_ratio']:.3f}",
            "overlap" if row["ranges_overlap"] else "apart",
            row.get("verdict", "-"),
        )
        if row["a_speedup"] is not None or row["b_speedup"] is not None:
            speedups.add_row(
                *start,
                _speedup(row["a_speedup"], row["a_speedup_range"]),
                _speedup(row["b_speedup"], row["b_speedup_range"]),
                "-" if row["speedup_ratio"] is None else f"{row['speedup_ratio']:.3f}",
            )
    for (_, which), case in zip(only, cases[len(record["rows"]) :], strict=True):
        start = [case.get(name, "") for name in varying]
        times.add_row(*start, *(["-"] * 4), f"only in {which.upper()}", style="dim")
    return [times, speedups] if speedups.rows else [times]


def _case_table(title: str, fields: Sequence[str], *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in fields:
        table.add_column(name.removeprefix("num_").replace("_", " ").capitalize(), justify="right")
    for name in columns:
        table.add_column(name, justify="right", no_wrap="range" in name)
    return table


def _fields(case: str) -> Iterator[tuple[str, str]]:
    """Names and values of a case's name; `infer` has no value."""
    for part in case.split(", "):
        name, _, value = part.partition(" ")
        yield name, value


def _speedup(median: float | None, limits: Sequence[float] | None) -> str:
    from hstu_cli.report import with_range

    return "-" if median is None or limits is None else with_range(median, limits, "{:.2f}".format)
