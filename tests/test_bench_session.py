"""What a benchmark's session says of the samples and rows of its cases."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import record_of

from hstu_cli.backend import DTYPES, Backend
from hstu_cli.bench.ceilings import Ceilings
from hstu_cli.bench.session import BenchSession, most_rounding
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.timing import Case

CEILINGS = Ceilings(1e12, 1e12, None, 1e10, 1e10, 1, 1)


class Clock(Backend):
    """A CPU whose timers tell the times that they are given, in order."""

    def __init__(self, times_ms: Sequence[float]) -> None:
        super().__init__()
        self.times_ms = iter(times_ms)

    def start_timer(self) -> "Clock":
        return self

    def stop(self) -> None:
        pass

    def elapsed_ms(self) -> float:
        return next(self.times_ms)


def session_of(base_ms: Sequence[float], own_ms: Sequence[float]) -> BenchSession:
    """A session that has timed two cases, `base` and `own`, of the group `g`."""
    times = [value for pair in zip(base_ms, own_ms, strict=True) for value in pair]
    session = BenchSession(Clock(times), torch.float32, CEILINGS, 0, len(base_ms))
    session.measure("g", [Case("base", [lambda: None]), Case("own", [lambda: None])])
    return session


def said_by(session: BenchSession, rows: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Its warnings, without that of other processes, which may be there."""
    return [warning for warning in session.warnings(rows) if "other processes" not in warning]


@pytest.mark.parametrize(
    ("base_ms", "own_ms", "speedup", "warnings"),
    [
        ([200, 210, 190], [100, 105, 95], 2.0, []),
        # Half of the rounds were disturbed, and those of `own` in another round than those of `base`.
        (
            [155, 180.5, 300],
            [100, 230.5, 193.5],
            1.55,
            ["speed-up and medians disagree about which case is faster: g, own: 1.55 in pairs, 0.93 of the medians"],
        ),
        ([100, 101, 99], [101, 99, 100], 0.990, []),  # as fast as one another
    ],
    ids=["agree", "contrary", "alike"],
)
def test_a_speedup_that_contradicts_the_medians_is_said(
    base_ms: list[float], own_ms: list[float], speedup: float, warnings: list[str]
) -> None:
    session = session_of(base_ms, own_ms)
    assert session.speedup("g", "base", "own").median == pytest.approx(speedup, abs=1e-3)
    assert said_by(session) == warnings


def test_a_single_sample_is_said() -> None:
    def is_said(session: BenchSession) -> bool:
        return any("a single sample of each case" in warning for warning in said_by(session))

    assert is_said(session_of([100], [50]))
    assert not is_said(session_of([100, 100], [50, 50]))


def test_a_speedup_beyond_both_limits_is_said_and_no_cause_is_claimed() -> None:
    row = {"batch_size": 2, "history_length": 48, "cached_length": 24, "impl": "native", "roofline_fraction": 1.5}
    rows = [
        row | {"speedup_vs_uncached": 419.0, "speedup_limit": 1.7, "speedup_limit_roofline": 1.2},
        row | {"speedup_vs_uncached": 1.5, "speedup_limit": 1.7, "speedup_limit_roofline": 1.2},
        {"num_users": 3, "batch_size": 3, "variant": "kvcache", "speedup_vs_baseline": 2.0, "speedup_limit": 2.0},
        {"seqlen": 64, "variant": "optimized", "speedup_vs_baseline": 9.0},  # has no limit
        {"num_users": 3, "skipped": "ran out of memory"},
    ]
    said = said_by(session_of([100, 100], [50, 50]), rows)
    assert said[-2:] == [
        "a case reached 150% of the measured ceilings",
        "speed-ups beyond both of their limits: 419.00, limit 1.70 (history 48, cached 24, batch 2, native)",
    ]
    assert said_by(session_of([100, 100], [50, 50]), [row | {"roofline_fraction": 1.0}]) == []


@pytest.mark.parametrize(
    ("dtype", "num_layers", "explained", "wrong"),
    [
        (torch.bfloat16, 8, 0.05, 0.06),
        (torch.bfloat16, 1, 0.019, 0.02),
        (torch.float16, 8, 0.006, 0.008),
        (torch.float32, 8, 9e-4, 1.1e-3),
        (torch.bfloat16, 8, 0.0, float("nan")),
    ],
    ids=str,
)
def test_an_error_is_wrong_where_the_layers_roundings_do_not_explain_it(
    dtype: torch.dtype, num_layers: int, explained: float, wrong: float
) -> None:
    session = BenchSession(Backend(), dtype, CEILINGS, 0, 1)
    assert session.check_rounding("g", explained, num_layers) == 2 * (explained + torch.finfo(dtype).eps)
    assert session.failures == []
    session.check_rounding("g", wrong, num_layers)
    assert len(session.failures) == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("num_layers", [1, 8])
def test_real_errors_are_far_from_what_is_wrong(dtype: str, num_layers: int, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL_PRESETS["tiny"].to_dict() | {"num_layers": num_layers}))
    grid = ["--history", "60,5", "--cached", "0", "--candidates", "0,9", "--batch-size", "1"]
    for seed in range(3):
        rows = record_of(
            "bench-layer", "--config", config, *grid, "--dtype", dtype, "--num-iters", "1", "--seed", seed
        )["rows"]
        assert all(row["output_error"] < most_rounding(DTYPES[dtype], num_layers) / 2 for row in rows)
