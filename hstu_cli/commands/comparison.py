"""What `hstu compare` makes of two records: which cases are the same, what differs, and which case is slower."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_cli.errors import InputError
from hstu_cli.timing import BUSY, SHORT_RUN_MS

SETTINGS = (
    "env",
    "device",
    "args",
    "model",
    "embedding",
    "embeddings",
    "append",
    "kv_cache.append_impl",
    "kv_cache.append_reason",
    "page_size",
    "cuda_graph.enabled",
    "dataset",
    "batch_size",
    "dropout",
    "full_sequence",
    "scaled",
    "ceilings",
    "peak",
)
"""Parts of a record that decide what was measured, and by what it is judged."""

NEVER_COMPARED = ("output_json", "plot", "profile", "verbose", "format", "metadata", "predictions_out")
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

MAY_DIFFER = ("impl", "cache_tier", "embedding")
"""Fields in which the cases of two records may differ, where each record has one value of them."""

RATES = ("matmul_flops_per_s", "bytes_per_s")
"""Ceilings that none of our own code has a part in: how fast the machine was."""


Key = tuple[tuple[str, Any], ...]
"""What names a case: fields of its row and their values."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A case's time in milliseconds: median, fastest and slowest sample.

    too_few: why its samples alone say little, or None. speedup, speedup_range: over the case that it took turns with,
    median and range of the rounds' ratios; None where there was none, or where that is the case itself.
    """

    median_ms: float
    range_ms: tuple[float, float]
    too_few: str | None
    speedup: float | None
    speedup_range: tuple[float, float] | None


def cases(record: Mapping[str, Any], path: Path) -> dict[Key, Measured]:
    """Each measured case; `hstu infer` is one. InputError for a damaged record."""
    found: dict[Key, Measured] = {}
    try:
        for row in record.get("rows", [record]):
            latency = row.get("total_latency_ms") or row.get("latency_ms") or {}
            key = tuple((name, row[name]) for name in ROW_KEYS if "rows" in record and row.get(name) is not None)
            if latency.get("p50"):
                found[key or (("command", record["command"]),)] = _measured(row, latency)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: its rows are no rows of hstu ({error}).") from error
    return found


def _measured(row: Mapping[str, Any], latency: Mapping[str, Any]) -> Measured:
    """What a row of a record says of its case."""
    median = float(latency["p50"])
    samples = [float(value) for value in latency.get("samples") or ()]  # the summary on a terminal has none
    too_few = None
    if len(samples) == 1:
        too_few = "one sample tells nothing of noise"
    elif samples and sum(samples) < SHORT_RUN_MS:
        too_few = f"under {SHORT_RUN_MS:g} ms in all is too short to trust"
    ratios = row.get("speedup_range")
    speedup = row.get("speedup_vs_uncached", row.get("speedup_vs_baseline"))
    if speedup is None or not ratios or tuple(ratios) == (1.0, 1.0):
        speedup = ratios = None
    return Measured(
        median_ms=median,
        range_ms=(float(latency.get("min") or median), float(latency.get("max") or median)),
        too_few=too_few,
        speedup=None if speedup is None else float(speedup),
        speedup_range=None if ratios is None else (float(ratios[0]), float(ratios[1])),
    )


def dropped_fields(ours: Iterable[Key], theirs: Iterable[Key]) -> set[str]:
    """Fields that name no case here: those with one value in all of A and another one in all of B.

    A row without such a field (an uncached one has no tier) does not count. Where a record has several values, whose is
    whose cannot be told, so that the field keeps naming cases.
    """
    dropped = set()
    for field in MAY_DIFFER:
        one, other = ({value for key in keys for name, value in key if name == field} for keys in (ours, theirs))
        if len(one) <= 1 and len(other) <= 1 and one != other:
            dropped.add(field)
    return dropped


def without(key: Key, names: Iterable[str]) -> Key:
    """A case's key without some of its fields."""
    return tuple((name, value) for name, value in key if name not in names)


def case_name(key: Key) -> str:
    """A case as readers see it: its fields and their values."""
    return ", ".join(value if name == "command" else f"{name} {value}" for name, value in key)


def paired(ours: Mapping[Key, Measured], theirs: Mapping[Key, Measured]) -> dict[str, Any]:
    """The cases of both as `rows`, and the names of those that only one has, as `only_in_a` and `only_in_b`."""
    dropped = dropped_fields(ours, theirs)
    a, b = ({without(key, dropped): measured for key, measured in cases.items()} for cases in (ours, theirs))
    same_baseline = {"impl", "embedding"}.isdisjoint(dropped)
    return {
        "rows": [compared(case_name(key), a[key], b[key], same_baseline) for key in a if key in b],
        "only_in_a": [case_name(key) for key in ours if without(key, dropped) not in b],
        "only_in_b": [case_name(key) for key in theirs if without(key, dropped) not in a],
    }


def compared(case: str, a: Measured, b: Measured, same_baseline: bool) -> dict[str, Any]:
    """A case of both. Speed-ups over baselines of unlike kinds stand side by side, but have no ratio."""
    comparable = same_baseline and a.speedup and b.speedup
    return {
        "case": case,
        "a_ms": a.median_ms,
        "b_ms": b.median_ms,
        "a_range_ms": list(a.range_ms),
        "b_range_ms": list(b.range_ms),
        "ranges_overlap": a.range_ms[0] <= b.range_ms[1] and b.range_ms[0] <= a.range_ms[1],
        "speed_ratio": a.median_ms / b.median_ms,
        "fastest_ratio": a.range_ms[0] / b.range_ms[0],
        "a_speedup": a.speedup,
        "b_speedup": b.speedup,
        "a_speedup_range": a.speedup_range and list(a.speedup_range),
        "b_speedup_range": b.speedup_range and list(b.speedup_range),
        "speedup_ratio": b.speedup / a.speedup if comparable else None,
        "too_few": a.too_few or b.too_few,
    }


def machine_doubts(a: Mapping[str, Any], b: Mapping[str, Any], bar: float) -> list[str]:
    """What in the records makes times of two runs a poor witness: others at work, or a machine as slow as the cases."""
    busy = [
        name
        for name, record in (("A", a), ("B", b))
        if any(str(line).startswith(BUSY) for line in record.get("warnings") or [])
    ]
    doubts = [f"{' and '.join(busy)} had a busy machine"] if busy else []
    for name in RATES:
        before, after = _part(a, f"ceilings.{name}"), _part(b, f"ceilings.{name}")
        if before and after and after < bar * before:
            doubts.append(f"the machine's own {name} fell to {after / before:.3f} of A's")
    return doubts


def verdict(row: Mapping[str, Any], bar: float, doubts: Sequence[str]) -> dict[str, Any]:
    """Whether a case of B clears the bar: `passes`, `slower`, or `in doubt` with the reason why it may be no slower.

    Slower is what is below the bar in the median and in the fastest sample, which noise prolongs least, and, where both
    records have it, in the speed-up over the case that took turns with it: a slower machine meets both of those.
    """
    if row["speed_ratio"] >= bar:
        return {"verdict": "passes", "doubt": None}
    if row["too_few"]:
        doubt = row["too_few"]
    elif row["fastest_ratio"] >= bar:
        doubt = f"B's fastest sample has {row['fastest_ratio']:.3f} of the speed of A's"
    elif row["speedup_ratio"] is not None:
        held = f"its speed-up over the baseline of the same run has {row['speedup_ratio']:.3f} of A's"
        doubt = held if row["speedup_ratio"] >= bar else None
    else:
        doubt = "; ".join(doubts) or None
    return {"verdict": "in doubt" if doubt else "slower", "doubt": doubt}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that differ, machine and versions first."""
    pairs = [(_flat(_part(a, part), part), _flat(_part(b, part), part)) for part in SETTINGS]
    return [
        {"setting": name, "a": one.get(name), "b": other.get(name)}
        for one, other in pairs
        for name in dict.fromkeys([*one, *other])
        if name.rpartition(".")[2] not in NEVER_COMPARED and one.get(name) != other.get(name)
    ]


def _part(record: Mapping[str, Any], path: str) -> Any:
    """A part of a record by its dotted name; None where there is none."""
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested settings by dotted name; those of a list by their index."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}").items()}
    return {name: value}
