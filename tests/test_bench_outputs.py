"""Outputs of the benchmarks that a run would leave out or overwrite: a usage error instead of silence."""

import json
from pathlib import Path

import pytest
from support.cli import failure_of, invoke

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
def test_plot_and_record_are_two_files(tmp_path: Path, command: str) -> None:
    path = tmp_path / "out.svg"
    assert "name the same file" in failure_of(2, command, "--plot", path, "--output-json", path)
    linked = tmp_path / "link"
    linked.symlink_to(tmp_path)
    for other in (tmp_path / "." / "x" / ".." / path.name, linked / path.name):
        assert "name the same file" in failure_of(2, command, "--plot", path, "--output-json", other)
