"""`hstu compare`: two saved records side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import InputError, RunError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "Example: hstu compare before.json after.json --fail-below 0.95"

SETTINGS = ("env", "device", "args", "model", "embedding", "page_size", "dataset", "batch_size", "scaled")
"""Parts of a record that decide what was measured."""

NEVER_COMPARED = ("output_json", "plot", "profile", "verbose", "format", "metadata", "predictions_out", "git_commit")
"""Settings that say where the result went, not what it is."""

ROW_KEYS = (
    "batch_size",
    "num_users",
    "history_length",
    "cached_length",
    "num_candidates",
    "seqlen",
    "num_layers",
    "cache_tier",
    "variant",
    "embedding",
    "impl",
)
"""Fields that name a row."""

MAY_DIFFER = ((), ("impl", "cache_tier"), ("impl", "cache_tier", "embedding"))
"""Fields in which the cases of two records may differ: the fewest that leave cases in common."""


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="The record to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The record to judge.")],
    fail_below: Annotated[
        float | None, typer.Option(min=0, metavar="RATIO", help="Exit 1 where B's speed over A's is below this.")
    ] = None,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Put two JSON records of the same command side by side; a ratio above 1 means that B is faster."""
    args = dict(locals())
    from hstu_cli.config import read_json_object
    from hstu_cli.report import Reporter, environment, parse_metadata

    records = []
    for path in (first, second):
        record = read_json_object(path)
        if "command" not in record or "schema_version" not in record:
            raise InputError(f"{path} is no record of hstu: it has no command or no schema_version.")
        if record["schema_version"] != 1:
            raise InputError(f"{path} has schema_version {record['schema_version']}; this version reads 1.")
        records.append(record)
    a, b = records
    if a["command"] != b["command"]:
        raise UsageError(f"{first} is of {a['command']} and {second} of {b['command']}: compare the same command.")
    reporter = Reporter(
        "compare",
        args,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=parse_metadata(metadata or []),
    )
    reporter.record |= {"env": environment(), "device": None, "compared": a["command"]}
    invalid = {}
    for path, record in zip((first, second), records, strict=True):
        if record.get("status") != "valid":
            invalid[path] = ", ".join(map(str, record.get("reasons") or ["no reason given"]))
            reporter.warn(f"{path} is {record.get('status')}: {invalid[path]}")
    ours, theirs = _cases(a, first), _cases(b, second)
    pairs = _pairs(ours, theirs)
    with reporter.running(_tables) as record:
        record["differences"] = _differences(a, b)
        record["rows"] = [
            {"case": case, "a_ms": ours[one], "b_ms": theirs[other], "speed_ratio": ours[one] / theirs[other]}
            for case, one, other in pairs
        ]
        record["only_in_a"] = [_name(key) for key in ours if key not in {one for _, one, _ in pairs}]
        record["only_in_b"] = [_name(key) for key in theirs if key not in {other for _, _, other in pairs}]
        if not pairs:
            raise RunError("The two records have no measured case in common.")
        if fail_below is not None:
            _judge(record, fail_below, invalid)


def _judge(record: Mapping[str, Any], fail_below: float, invalid: Mapping[Path, str]) -> None:
    """RunError where B is slower than it may be, lacks a case of A, or one of the records is not valid."""
    if invalid:
        raise RunError(f"{' and '.join(map(str, invalid))} cannot be judged: the run was not valid")
    if record["only_in_a"]:
        raise RunError(f"B lacks {len(record['only_in_a'])} of A's cases, {record['only_in_a'][0]} among them")
    slow = [row for row in record["rows"] if row["speed_ratio"] < fail_below]
    if slow:
        worst = min(slow, key=lambda row: row["speed_ratio"])
        raise RunError(
            f"B is below {fail_below:g} of A's speed in {len(slow)} of {len(record['rows'])} cases, "
            f"at worst {worst['speed_ratio']:.3f} in {worst['case']}"
        )


Key = tuple[tuple[str, Any], ...]
"""What names a case: fields of its row and their values."""


def _cases(record: Mapping[str, Any], path: Path) -> dict[Key, float]:
    """Median milliseconds of each measured case; `hstu infer` is one. InputError for a damaged record."""
    cases: dict[Key, float] = {}
    try:
        for row in record.get("rows", [record]):
            latency = row.get("total_latency_ms") or row.get("latency_ms") or {}
            key = tuple((name, row[name]) for name in ROW_KEYS if "rows" in record and row.get(name) is not None)
            if latency.get("p50"):
                cases[key or (("command", record["command"]),)] = float(latency["p50"])
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: its rows are no rows of hstu ({error}).") from error
    return cases


def _pairs(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> list[tuple[str, Key, Key]]:
    """Cases of both, in A's order: the same in all that names them, else in all but a part of `MAY_DIFFER`."""
    for ignored in MAY_DIFFER:
        a, b = ({_without(key, ignored): key for key in cases} for cases in (ours, theirs))
        if len(a) < len(ours) or len(b) < len(theirs):
            break  # several implementations in one record: whose is whose cannot be told
        pairs = [(_name(key), one, b[key]) for key, one in a.items() if key in b]
        if pairs:
            return pairs
    return []


def _without(key: Key, names: Sequence[str]) -> Key:
    return tuple((name, value) for name, value in key if name not in names)


def _name(key: Key) -> str:
    return ", ".join(value if name == "command" else f"{name} {value}" for name, value in key)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that differ, machine and versions first."""
    pairs = [(_flat(a.get(part), part), _flat(b.get(part), part)) for part in SETTINGS]
    return [
        {"setting": name, "a": one.get(name), "b": other.get(name)}
        for one, other in pairs
        for name in dict.fromkeys([*one, *other])
        if name.rpartition(".")[2] not in NEVER_COMPARED and one.get(name) != other.get(name)
    ]


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested settings by dotted name."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}").items()}
    return {name: value}


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.report import format_value

    title = "What differs" + ("" if record["status"] == "valid" else f" ({', '.join(record['reasons'])})")
    differences = Table("Setting", "A", "B", title=title, title_justify="left")
    for row in record["differences"]:
        differences.add_row(row["setting"], format_value(row["a"]), format_value(row["b"]))
    if not record["differences"]:
        differences.add_row("nothing", "", "")
    cases = Table("Case", title=f"hstu {record['compared']}", title_justify="left")
    for name in ("A (ms)", "B (ms)", "B's speed over A's"):
        cases.add_column(name, justify="right")
    for row in record["rows"]:
        cases.add_row(row["case"], format_value(row["a_ms"]), format_value(row["b_ms"]), f"{row['speed_ratio']:.3f}")
    for which in ("a", "b"):
        for case in record[f"only_in_{which}"]:
            cases.add_row(case, *(["-"] * 3), style="dim")
    return [differences, cases]
