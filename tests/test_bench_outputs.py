"""Outputs of the benchmarks that a run would leave out or overwrite: a usage error instead of silence."""

import io
import json
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console
from support.cli import failure_of, invoke, record_of

from hstu_cli.backend import Backend
from hstu_cli.bench.session import MEMORY_SHARE
from hstu_cli.report import FILE_WIDTH

BENCHMARKS = ("bench-layer", "bench-e2e", "bench-fused")


@pytest.mark.parametrize("command", BENCHMARKS)
@pytest.mark.parametrize(
    ("option", "message"),
    [("--plot", "there is nothing to plot"), ("--profile", "there is nothing to trace")],
)
def test_a_dry_run_has_nothing_to_draw(tmp_path: Path, command: str, option: str, message: str) -> None:
    path = tmp_path / "out.html"
    assert f"{option} with --dry-run: nothing runs, so {message}." in failure_of(2, command, "--dry-run", option, path)
    assert not path.exists()


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_dry_run_has_a_record(tmp_path: Path, command: str) -> None:
    path = tmp_path / "record.json"
    result = invoke(command, "--dry-run", "--output-json", path)
    assert result.exit_code == 0, result.stderr
    record = json.loads(path.read_text())
    assert record["dry_run"]
    assert record["rows"]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_dry_run_says_what_a_run_would_leave_out(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cases that memory does not hold, how many; and that time is known to a run alone."""
    rows = record_of(command, "--dry-run", "--device", "cpu")["rows"]
    most = max(row["memory_bytes"] for row in rows)
    too_large = sum(row["memory_bytes"] == most for row in rows)
    monkeypatch.setattr(Backend, "available_memory_bytes", (most - 1) / MEMORY_SHARE)
    said = invoke(command, "--dry-run", "--device", "cpu").stdout
    assert f"A run would skip {too_large} of {len(rows)} cases" in said
    assert "may leave out more" in said
    monkeypatch.setattr(Backend, "available_memory_bytes", most / MEMORY_SHARE + 1)
    said = invoke(command, "--dry-run", "--device", "cpu", "--full").stdout
    assert "would skip" not in said
    assert "may leave out more" not in said


@pytest.mark.parametrize("command", BENCHMARKS)
def test_plot_and_record_are_two_files(tmp_path: Path, command: str) -> None:
    path = tmp_path / "out.svg"
    assert "name the same file" in failure_of(2, command, "--plot", path, "--output-json", path)
    linked = tmp_path / "link"
    linked.symlink_to(tmp_path)
    for other in (tmp_path / "." / "x" / ".." / path.name, linked / path.name):
        assert "name the same file" in failure_of(2, command, "--plot", path, "--output-json", other)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("bench-layer", ["--history", "4096", "--cached", "0", "--candidates", "256", "--batch-size", "1"]),
        ("bench-e2e", ["--num-users", "1", "--variants", "baseline"]),
    ],
)
def test_headers_in_a_pipe_are_whole(command: str, options: list[str]) -> None:
    """Of the widest table: with published figures and a long label, wide numbers and ranges."""
    module = import_module(f"hstu_cli.commands.{command.replace('-', '_')}")
    latency = {"p50": 123456.0, "min": 123000.0, "max": 129000.0}
    row = {
        "history_length": 1_000_000, "cached_length": 999_000, "num_candidates": 256, "batch_size": 8, "num_users": 8,
        "impl": "reference", "variant": "kvcache+graph", "embedding": "dynamicemb", "latency_ms": latency,
        "total_latency_ms": latency, "tflops": 1.234567, "roofline_fraction": 0.5, "speedup_limit": 22.4,
        "speedup_vs_uncached": 12.5, "speedup_vs_baseline": 12.5, "speedup_range": [11.25, 12.75],
        "published_ms": 9.25, "published_speedup": 7.75, "output_error": 0.0123, "max_abs_logit_difference": 0.0123,
    }  # fmt: skip
    record = record_of(command, *options, "--dry-run", "--device", "l40s") | {"rows": [row]}
    record["embeddings"] = [{"name": "torch"}, {"name": "dynamicemb"}]
    console = Console(width=FILE_WIDTH, file=io.StringIO())
    for table in module._tables(record):
        console.print(table)
    assert "…" not in console.file.getvalue()
