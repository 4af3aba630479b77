"""How everything here is timed: cases in turn, one sample each per round, and what to say about noise."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PERCENTILES = (50, 90, 95, 99)

BUSY_RATIO = 2.0
"""A median beyond so many times the minimum means that something else used the machine."""

OUTLIER_RATIO = 2.0
"""A sample beyond so many medians is an outlier."""

SHORT_RUN_MS = 10.0
"""Less than this in all says little: timers and schedulers have a grain of their own."""

OTHERS_SHARE = 0.1
"""Share of the CPUs that other processes may use before a run counts as disturbed."""


class Timer(Protocol):
    """A stretch of a device's work: begins when it is made."""

    def stop(self) -> None:
        """End of the stretch."""
        ...

    def elapsed_ms(self) -> float:
        """Its length, once the device is synchronised."""
        ...


class Clock(Protocol):
    """What `measure` needs of a backend."""

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        ...

    def start_timer(self) -> Timer:
        """Begin to time the work that is queued from now on."""
        ...


@dataclass(frozen=True, slots=True)
class Case:
    """Something to time: its steps one by one and in order, after an untimed preparation in each round."""

    name: str
    steps: Sequence[Callable[[], object]]
    prepare: Callable[[], object] = lambda: None


def measure(cases: Sequence[Case], clock: Clock, *, warmup: int, iterations: int) -> dict[str, np.ndarray]:
    """Milliseconds of each case, float64 [iterations, steps].

    The cases, of equally many steps, take turns step by step, so that a disturbance meets all of
    them: sample i of one and of another are a pair. Warm-up rounds run the very same path.
    """
    samples: dict[str, list[list[float]]] = {case.name: [] for case in cases}
    for iteration in range(-warmup, iterations):
        for case in cases:
            case.prepare()
        round_ms: dict[str, list[float]] = {case.name: [] for case in cases}
        for turn in zip(*(case.steps for case in cases), strict=True):
            for case, step in zip(cases, turn, strict=True):
                clock.synchronize()
                timer = clock.start_timer()
                step()
                timer.stop()
                clock.synchronize()
                round_ms[case.name].append(timer.elapsed_ms())
        if iteration >= 0:
            for name, values in round_ms.items():
                samples[name].append(values)
    return {name: np.asarray(values, dtype=np.float64) for name, values in samples.items()}


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """How many times as long one case took as another: the median of the rounds' ratios, and their range."""

    median: float
    low: float
    high: float


def paired_ratio(numerator_ms: np.ndarray, denominator_ms: np.ndarray) -> PairedRatio:
    """Ratio of two cases' times, each [iterations, steps], round by round."""
    ratios = numerator_ms.sum(axis=-1) / denominator_ms.sum(axis=-1)
    return PairedRatio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def latency_summary(samples_ms: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """`avg, p50, p90, p95, p99, min, max, samples` of latencies in milliseconds; None where there are none."""
    values = np.asarray(samples_ms, dtype=np.float64).ravel()
    if not len(values):
        return dict.fromkeys(("avg", *(f"p{p}" for p in PERCENTILES), "min", "max")) | {"samples": []}
    return {
        "avg": float(values.mean()),
        **{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES},
        "min": float(values.min()),
        "max": float(values.max()),
        "samples": [float(value) for value in values],
    }


BUSY = "machine busy"
"""How the warnings begin that make absolute times doubtful."""


def noise_warnings(samples: Mapping[str, np.ndarray]) -> list[str]:
    """What readers must know about the samples [iterations, steps] of some cases: one line for each kind of noise."""
    totals = {name: values.sum(axis=-1) for name, values in samples.items()}
    busy = [name for name, total in totals.items() if np.median(total) > BUSY_RATIO * total.min()]
    outliers = {name: int((total > OUTLIER_RATIO * np.median(total)).sum()) for name, total in totals.items()}
    outliers = {name: count for name, count in outliers.items() if count}
    short = [name for name, total in totals.items() if total.sum() < SHORT_RUN_MS]
    warnings = []
    if busy:
        warnings.append(f"{BUSY}: the median is more than {BUSY_RATIO:g} times the minimum in {some(busy)}")
    if outliers:
        named = [f"{name} ({count})" for name, count in outliers.items()]
        warnings.append(f"outliers beyond {OUTLIER_RATIO:g} times the median in {some(named)}")
    if short:
        warnings.append(f"too short to trust (under {SHORT_RUN_MS:g} ms in all; raise --num-iters): {some(short)}")
    return warnings


class CpuWatch:
    """How much of the CPUs other processes use between its making and a question."""

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def warnings(self) -> list[str]:
        """A line where others used a good part of the CPUs; none where the system does not tell."""
        end = _cpu_seconds()
        if self._start is None or end is None:
            return []
        total, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        share = (busy - own) / total if total > 1 else 0.0  # shorter than a second tells nothing
        return [f"{BUSY}: other processes used {share:.0%} of the CPUs"] if share > OTHERS_SHARE else []


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds of all CPUs together since boot, of those busy, and those of this process; None off Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]  # user nice system idle iowait ...
    per_second = os.sysconf("SC_CLK_TCK")
    own = os.times()
    idle = ticks[3] + ticks[4]
    return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, own.user + own.system


def some(names: Sequence[str], most: int = 2) -> str:
    """The first few of a list of names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more
