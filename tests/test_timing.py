"""`measure()`: who runs when, what is paired with what, and what is said about noise."""

import subprocess
import sys
import time

import numpy as np
import pytest

from hstu_cli import timing
from hstu_cli.backend import Backend
from hstu_cli.timing import Case, CpuWatch, PairedRatio, latency_summary, measure, noise_warnings, paired_ratio


def test_cases_take_turns_step_by_step_and_warm_up_on_the_same_path() -> None:
    calls: list[str] = []

    def case(name: str) -> Case:
        steps = [lambda i=i: calls.append(f"{name}{i}") for i in range(2)]
        return Case(name, steps, lambda: calls.append(f"prepare {name}"))

    samples = measure([case("a"), case("b")], Backend(), warmup=1, iterations=2)
    one_round = ["prepare a", "prepare b", "a0", "b0", "a1", "b1"]
    assert calls == one_round * 3
    assert {name: values.shape for name, values in samples.items()} == {"a": (2, 2), "b": (2, 2)}
    assert all((values > 0).all() for values in samples.values())


def test_what_is_timed_is_the_step_alone() -> None:
    slow = Case("slow", [lambda: time.sleep(0.02)], lambda: time.sleep(0.05))
    fast = Case("fast", [lambda: None])
    samples = measure([slow, fast], Backend(), warmup=0, iterations=3)
    assert (samples["slow"] >= 20).all()
    assert (samples["slow"] < 50).any()
    assert (samples["fast"] < 20).any()


def test_cases_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure([Case("a", [lambda: None]), Case("b", [])], Backend(), warmup=0, iterations=1)


def test_a_ratio_is_the_median_of_paired_ratios() -> None:
    """A disturbance of one round that meets both cases does not change it."""
    one = np.array([[10.0, 10], [40, 40], [11, 11]])
    other = np.array([[5.0, 5], [20, 20], [5.5, 5.5]])
    assert paired_ratio(one, other) == PairedRatio(*[pytest.approx(2.0)] * 3)
    assert paired_ratio(np.array([[1.0], [2], [9]]), np.array([[1.0], [1], [1]])) == PairedRatio(2, 1, 9)


def test_a_summary_has_percentiles_and_all_samples() -> None:
    summary = latency_summary(np.arange(1.0, 101).reshape(10, 10))
    assert (summary["min"], summary["avg"], summary["max"]) == (1, 50.5, 100)
    assert [summary[f"p{p}"] for p in (50, 90, 95, 99)] == pytest.approx([50.5, 90.1, 95.05, 99.01])
    assert summary["samples"] == list(range(1, 101))


@pytest.mark.parametrize(
    ("samples", "warnings"),
    [
        ([10, 10.5, 11], []),
        ([10, 25, 26], ["machine busy: the median is more than 2 times the minimum in x"]),
        ([10, 10, 10, 50], ["outliers beyond 2 times the median in x (1)"]),
        ([0.1, 0.1], ["too short to trust (under 10 ms in all; raise --num-iters): x"]),
    ],
    ids=["quiet", "busy", "outlier", "short"],
)
def test_noise_is_named(samples: list[float], warnings: list[str]) -> None:
    assert noise_warnings({"x": np.array(samples)[:, None]}) == warnings


def test_many_noisy_cases_make_one_line() -> None:
    [warning] = noise_warnings({name: np.array([[0.1]]) for name in "abcde"})
    assert warning.endswith(": a; b and 3 more")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")
def test_cpu_seconds_tell_this_process_from_others() -> None:
    """Another process that computes for half a second counts as busy and not as this one; then this one does."""
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    before = timing._cpu_seconds()
    subprocess.run([sys.executable, "-c", burn], check=True)
    others = timing._cpu_seconds()
    start = time.process_time()
    while time.process_time() < start + 0.5:
        pass
    own = timing._cpu_seconds()
    (total, busy, ours), (later_total, later_busy, later_ours) = (
        [b - a for a, b in zip(*pair, strict=True)] for pair in ((before, others), (others, own))
    )
    grain = 0.05  # of ticks
    assert (ours < 0.25, later_ours > 0.5 - grain) == (True, True)
    assert min(busy, later_busy) > 0.5 - grain
    # On a machine without idle time they are the same, and Linux lets its count of waiting for disks go back.
    assert (total >= busy - grain, later_total >= later_busy - grain) == (True, True)


@pytest.mark.parametrize(
    ("end", "warnings"),
    [
        ((120.0, 61.0, 25.0), ["machine busy: other processes used 30% of the CPUs"]),
        ((120.0, 61.0, 29.0), []),  # of 20 seconds, 11 were busy, 9 of them ours: a tenth
        ((120.0, 61.0, 28.8), ["machine busy: other processes used 11% of the CPUs"]),
        ((100.9, 50.9, 20.0), []),  # shorter than a second
        (None, []),
    ],
    ids=["others", "a tenth", "just more", "short", "unknown"],
)
def test_other_processes_are_noticed(
    end: tuple[float, float, float] | None, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([(100.0, 50.0, 20.0), end])
    monkeypatch.setattr(timing, "_cpu_seconds", lambda: next(readings))
    assert CpuWatch().warnings() == warnings
