"""Latency samples and their summary."""

from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)


def latency_summary(samples_ms: Sequence[float]) -> dict[str, Any]:
    """`avg, p50, p90, p95, p99, min, max, samples` of latencies in milliseconds; None where there are none."""
    if not samples_ms:
        return dict.fromkeys(("avg", *(f"p{p}" for p in PERCENTILES), "min", "max")) | {"samples": []}
    values = np.asarray(samples_ms, dtype=np.float64)
    return {
        "avg": float(values.mean()),
        **{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES},
        "min": float(values.min()),
        "max": float(values.max()),
        "samples": [float(value) for value in values],
    }
