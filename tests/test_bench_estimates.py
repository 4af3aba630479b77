"""How long a benchmark says that it takes on a CPU, and how long it does."""

import json
from pathlib import Path

import pytest
from support.cli import invoke

from hstu_cli.bench import ceilings
from hstu_cli.commands import bench
from hstu_cli.config import MODEL_PRESETS

LAYER = ["bench-layer", "--config", "tiny", "--num-iters", "1"]
E2E = ["bench-e2e", "--config", "tiny", "--num-iters", "1", "--history-step", "10", "--num-batches", "2"]
TOLD = "This takes about 0 minutes on this CPU, by estimate."


@pytest.mark.parametrize(
    "command",
    [
        [*LAYER, "--history", "16", "--cached", "0", "--candidates", "0", "--batch-size", "1"],
        [*LAYER, "--history", "16", "--cached", "0"],
        [*LAYER, "--history", "16", "--cached", "0", "--full"],
        [*E2E, "--num-users", "2"],
        [*E2E],
        [*E2E, "--full"],
    ],
    ids=["layer named", "layer cut", "layer full", "e2e named", "e2e cut", "e2e full"],
)
def test_a_run_that_is_too_long_even_so_is_told(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = invoke(*command, "--format", "json")
    assert TOLD not in quick.stderr
    assert 0 < json.loads(quick.stdout)["estimated_seconds"] < bench.CPU_SECONDS
    monkeypatch.setattr(bench, "CPU_SECONDS", 1e-12)
    result = invoke(*command, "--format", "json")
    assert result.stderr.count(TOLD) == 1
    record = json.loads(result.stdout)
    is_free = "--full" not in command and not {"--num-users", "--batch-size"} & set(command)
    assert ("scaled" in record) == is_free
    if "--history" in command:  # what was named stays, the other lists are cut
        assert {row["history_length"] for row in record["rows"]} == {16}
        assert len(record["rows"]) == (1 if is_free or "--batch-size" in command else 2 * 4)


@pytest.mark.parametrize(
    "command",
    [
        ["bench-layer", "--history", "256", "--cached", "1/2", "--candidates", "64", "--batch-size", "1"],
        ["bench-e2e", "--history-step", "128", "--num-batches", "2", "--candidates", "64", "--num-users", "1"],
    ],
    ids=["layer", "e2e"],
)
def test_an_estimate_is_about_what_the_run_takes(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Within a factor of five, whatever else the machine does, for layers as wide as those of the promise."""
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 1024)  # a rate like that of the full size
    config, path = tmp_path / "config.json", tmp_path / "record.json"
    config.write_text(json.dumps(MODEL_PRESETS["benchmark"].to_dict() | {"num_layers": 2}))
    result = invoke(*command, "--dtype", "fp32", "--num-iters", "3", "--config", config, "--output-json", path)
    record = json.loads(path.read_text())
    assert 1 / 5 < record["elapsed_seconds"] / record["estimated_seconds"] < 5
    assert f"{record['elapsed_seconds']:,.0f} s ({record['estimated_seconds']:,.0f} s by estimate)" in result.stdout
