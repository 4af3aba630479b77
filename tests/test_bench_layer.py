"""`hstu bench-layer`: its cases and their numbers, what it checks, draws and refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import failure_of, invoke, record_of

from hstu_cli.backend import Event
from hstu_cli.bench import block
from hstu_cli.bench import layer as bench_layer
from hstu_cli.bench import session as bench_session
from hstu_cli.bench.ceilings import Ceilings
from hstu_cli.bench.layer import LayerGrid, LayerGroup, scaled_grid
from hstu_cli.bench.published import published_layer
from hstu_cli.commands import bench
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels import layer
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.kvcache.transfers import TransferJob

FASTEST = choose_impl("auto", "cpu").name
ONE = ["--history", "48", "--candidates", "0", "--batch-size", "1"]
SMALL = ["bench-layer", "--config", "tiny", "--num-iters", "2"]
GRID = ["--history", "48,33", "--cached", "1/2,31/32,7", "--candidates", "0,5", "--batch-size", "1,3"]
MEASURED = {
    "latency_ms",
    "tflops",
    "roofline_fraction",
    "speedup_vs_uncached",
    "speedup_limit",
    "speedup_limit_roofline",
    "output_error",
    "published_ms",
}


def check_limits(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> None:
    """What the row says of its limits, computed again from its costs, the record's ceilings and its median."""

    def least_ms(prefix: str, onload_bytes: float) -> float:
        compute = row[f"{prefix}flops"] / ceilings["flops_per_s"]
        memory = row[f"{prefix}bytes"] / ceilings["bytes_per_s"]
        return 1e3 * max(compute, memory, onload_bytes / ceilings["onload_bytes_per_s"])

    least = least_ms("", row["onload_bytes"])
    assert least > 0
    assert row["roofline_fraction"] == pytest.approx(least / row["latency_ms"]["p50"])
    assert row["speedup_limit"] == pytest.approx(row["base_flops"] / row["flops"])
    assert row["speedup_limit_roofline"] == pytest.approx(least_ms("base_", 0) / least)


def test_every_combination_is_a_row() -> None:
    record = record_of(*SMALL, *GRID)
    rows = record["rows"]
    cached = {48: [0, 7, 24, 46], 33: [0, 7, 16, 31]}
    names = ("num_candidates", "batch_size", "history_length", "cached_length")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (c, b, n, m) for c in (0, 5) for b in (1, 3) for n in (48, 33) for m in cached[n]
    ]
    for row in rows:
        assert row.keys() >= MEASURED
        assert row["impl"] == FASTEST
        assert row["cache_tier"] == ("device" if row["cached_length"] else None)
        assert len(row["latency_ms"]["samples"]) == 2
        check_limits(row, record["ceilings"])
        assert row["output_error"] < 1e-5
        assert (row["speedup_vs_uncached"] == 1) == (row["cached_length"] == 0)
        assert row["published_ms"] is None
    assert record["ceilings"]["flops_per_s"] > 1e9
    assert (record["command"], record["status"], record["page_size"]) == ("bench-layer", "valid", 32)


@pytest.mark.parametrize("page_size", [1, 16])
def test_host_tier_and_the_eager_peer_compute_the_same(page_size: int) -> None:
    record = record_of(*SMALL, *GRID, "--cache-tier", "host", "--compare", "eager", "--page-size", page_size)
    rows = record["rows"]
    for row in rows:
        assert (row["onload_bytes"] > 0) == (row["cached_length"] > 0)
        check_limits(row, record["ceilings"])
    assert {row["impl"] for row in rows} == {FASTEST, "eager"}
    assert {row["cache_tier"] for row in rows} == {None, "host"}
    assert all(row["output_error"] < 1e-5 for row in rows)


def test_half_precision_has_a_budget_of_its_own() -> None:
    rows = record_of(*SMALL, *GRID, "--dtype", "bf16")["rows"]
    assert all(1e-4 < row["output_error"] < 0.05 for row in rows if not row["cached_length"])


@pytest.mark.parametrize("spoil", [lambda o: o * 1.5, lambda o: o * float("nan")], ids=["wrong", "nan"])
def test_a_wrong_output_invalidates_the_run(spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer.paged_attention
    monkeypatch.setattr(layer, "paged_attention", lambda *a, **k: spoil(right(*a, **k)))
    result = invoke(
        *SMALL, "--history", "48", "--cached", "1/2", "--candidates", "5", "--batch-size", "1", "--format", "json"
    )
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["status"] == "invalid"
    assert "cached 24: output error" in record["reasons"][0]
    assert len(record["rows"]) == 2


def test_an_uncached_output_that_rounding_cannot_explain_invalidates_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "jagged_attention", lambda q, *rest, **named: torch.randn_like(q))
    result = invoke(*SMALL, *ONE, "--cached", "0", "--format", "json")
    assert result.exit_code == 1
    assert "uncached: output error" in json.loads(result.stdout)["reasons"][0]


def test_pages_that_were_not_copied_from_the_host_invalidate_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "start_transfer", lambda *arguments, **options: TransferJob([Event()] * 2))
    result = invoke(*SMALL, *ONE, "--cached", "1/2", "--cache-tier", "host", "--format", "json")
    assert result.exit_code == 1
    assert "output error nan" in json.loads(result.stdout)["reasons"][0]


def test_the_limit_of_the_host_tier_counts_the_copy() -> None:
    def least(rate: float) -> float:
        return Ceilings(1e12, 1e12, None, 1e10, rate, 1, 1).least_ms(1e9, 1e6, onload_bytes=1e8)

    assert (least(1e9), least(1e15)) == (100.0, 1.0)
    group = LayerGroup(3, 48, 0, (0, 24))
    assert group.onload_bytes(MODEL_PRESETS["tiny"], 24, 2) == 3 * 24 * 2 * 2 * 64 * 2  # layers, k and v, width, bytes


def test_a_group_that_runs_out_of_memory_is_skipped_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    right = block.BlockWorkload.uncached

    def greedy(self, x, impl):
        if self.num_history == 33:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, x, impl)

    monkeypatch.setattr(block.BlockWorkload, "uncached", greedy)
    rows = record_of(*SMALL, "--history", "33,48", "--cached", "0", "--candidates", "0", "--batch-size", "1")["rows"]
    assert [row.get("skipped") for row in rows] == ["ran out of memory", None]


def test_an_unexpected_error_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = block.BlockWorkload.uncached

    def broken(self, x, impl):
        if self.num_history == 48:
            raise RuntimeError("a bug")
        return right(self, x, impl)

    monkeypatch.setattr(block.BlockWorkload, "uncached", broken)
    arguments = ["--history", "33,48", "--cached", "0", "--candidates", "0", "--batch-size", "1"]
    with pytest.raises(RuntimeError, match="a bug"):
        invoke(*SMALL, *arguments, "--output-json", tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["status"], record["reasons"]) == ("invalid", ["RuntimeError: a bug"])
    assert [row["history_length"] for row in record["rows"]] == [33]


def test_an_interruption_before_the_first_case_leaves_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_ceilings", interrupted)
    result = invoke(*SMALL, *ONE, "--format", "json")
    assert result.exit_code == 130
    record = json.loads(result.stdout)
    assert (record["reasons"], record["rows"]) == (["interrupted"], [])


def test_nothing_that_could_run_is_no_result() -> None:
    result = invoke(*SMALL, "--history", "999999", "--batch-size", "1000000", "--candidates", "0", "--format", "json")
    assert result.exit_code == 1
    assert "No case could run: needs about" in json.loads(result.stdout)["reasons"][0]


def test_a_profile_that_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "--profile" in failure_of(4, *SMALL, *ONE, "--profile", tmp_path / "file" / "traces")


def test_a_case_beyond_memory_is_a_row_with_its_reason() -> None:
    rows = record_of(
        *SMALL, "--history", "64", "--cached", "0", "--candidates", "0", "--batch-size", "2,1000000"
    )["rows"]  # fmt: skip
    assert [("skipped" in row) for row in rows] == [False, True]
    assert re.fullmatch(r"needs about [\d,.]+ GB, [\d,.]+ GB are available", rows[1]["skipped"])


def test_dry_run_lists_costs_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((bench, "measure_ceilings"), (bench_layer, "random_block"), (bench_session, "measure")):
        monkeypatch.setattr(module, name, None)  # who calls it fails
    record = record_of("bench-layer", "--dry-run")
    assert record["dry_run"] is True
    assert len(record["rows"]) == 6 * 6 * 2 * 4
    row = next(r for r in record["rows"] if (r["history_length"], r["cached_length"]) == (4096, 3968))
    assert row["speedup_limit"] == pytest.approx(22.4, abs=0.05)
    assert {"flops", "bytes", "memory_bytes"} <= row.keys()
    assert "latency_ms" not in row
    assert "GFLOP" in invoke("bench-layer", "--dry-run").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--history", "128,4096", "--cached", "3968"], "--cached 3968 is more than --history 128"),
        (["--history", "128", "--cached", "128"], "leaves nothing to compute"),
        (["--batch-size", "0"], "--batch-size takes numbers from 1 to 1,000,000, not 0"),
        (["--candidates", "-3"], "--candidates takes numbers from 0 to 1,000,000, not -3"),
        (["--history", "0"], "--history takes numbers from 1"),
        (["--history", "many"], "--history takes whole numbers"),
        (["--history", ""], "--history takes whole numbers"),
        (["--cached", "3/2"], "shares from 0 to 1"),
        (["--cached", "1/0"], "shares such as 31/32"),
        (["--cached", "-1"], "--cached takes tokens from 0"),
        (["--config", "huge"], "there is no preset of that name"),
        (["--device", "l21"], "There is no device 'l21'"),
        (["--cache-tier", "disk"], "device or host"),
        (["--compare", "keras"], "eager"),
        (["--dtype", "int8"], "There is no dtype"),
        (["--plot", "chart.gif"], ".png, .svg, .html"),
        (["--num-iters", "0"], "--num-iters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_grids_are_one_message(options: list[str], message: str) -> None:
    assert message in failure_of(2, "bench-layer", *options)


def test_a_preset_without_its_gpu_is_said_and_never_a_label() -> None:
    result = invoke(
        *SMALL, "--history", "8", "--candidates", "0", "--batch-size", "1", "--device", "b200", "--format", "json"
    )
    assert "has no B200" in result.stderr
    record = json.loads(result.stdout)
    assert record["device"]["actual"] == "cpu"
    assert "B200" not in record["device"]["name"]
    assert record["page_size"] == 128
    assert "--require-device" in failure_of(3, "bench-layer", "--device", "b200", "--require-device")


def test_a_preset_chooses_the_heads() -> None:
    model = record_of("bench-layer", "--dry-run", "--device", "b200")["model"]
    assert (model["num_heads"], model["head_dim"]) == (8, 128)
    model = record_of("bench-layer", "--dry-run", "--device", "l20")["model"]
    assert (model["num_heads"], model["head_dim"]) == (4, 256)


def test_published_figures_are_those_of_their_case_alone() -> None:
    assert published_layer("l20", 4096, 3968, 256, 8).latency_ms == 9.2
    assert published_layer("l20", 4096, 3968, 256, 8).speedup == pytest.approx(71.5 / 9.2)
    assert published_layer("b200", 4096, 3968, 0, 8) == published_layer("b200", 4096, 3968, 0, 8).__class__(None, 7.7)
    for other in (
        ("l20", 2048, 0, 256, 1),
        ("l20", 4096, 0, 256, 2),
        ("a100", 4096, 0, 256, 1),
        (None, 4096, 0, 256, 1),
    ):
        assert published_layer(*other).latency_ms is None


def test_the_default_grid_shrinks_until_it_fits_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CPU_SECONDS", 0.0)
    result = invoke(*SMALL, "--candidates", "0", "--cached", "0", "--format", "json")
    record = json.loads(result.stdout)
    assert "histories 128, candidates 0, batch sizes 1; --full runs everything" in record["scaled"]
    assert "--full" in result.stderr
    assert [(r["batch_size"], r["history_length"]) for r in record["rows"]] == [(1, 128)]


def test_what_the_user_chose_never_shrinks() -> None:
    grid = LayerGrid((8, 4), (0, Fraction(1, 2)), (0, 1), (2, 1))
    assert scaled_grid(grid, set(), 0, lambda group: 1.0) == grid
    assert scaled_grid(grid, {"batch_sizes"}, 0, lambda group: 1.0).batch_sizes == (1,)
    assert scaled_grid(grid, {"batch_sizes", "histories"}, 100, lambda group: 1.0) == grid


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_plots_are_files_of_their_kind(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"chart.{suffix}"
    record_of(*SMALL, "--history", "16", "--candidates", "0", "--batch-size", "1", "--plot", path)
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
        return
    text = content.decode()
    assert "<svg" in text
    assert re.search(r"candidates, batch size 1", text)
    if suffix == "html":
        assert "of roofline" in text
        assert "latency_ms" in text
        assert not re.search(r"(src|href)=\"https?:", text)


def test_a_plot_that_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    assert "cannot be written" in failure_of(4, "bench-layer", "--plot", tmp_path / "none" / "chart.png")


def test_a_profile_is_a_trace(tmp_path: Path) -> None:
    record_of(
        *SMALL, "--history", "16", "--cached", "1/2", "--candidates", "0", "--batch-size", "1", "--profile", tmp_path
    )
    [path] = tmp_path.glob("*.json")
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {f"{FASTEST}, cached 0", f"{FASTEST}, cached 8"} <= names
    assert any(name and name.startswith("aten::") for name in names)


def test_metadata_lands_in_the_record() -> None:
    record = record_of("bench-layer", "--dry-run", "--metadata", "ticket=7", "--metadata", "who=me=you")
    assert record["metadata"] == {"ticket": "7", "who": "me=you"}


def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "hstu_cli", *SMALL, "--history", "16,64", "--candidates", "0", "--batch-size", "1"]
    command += [
        "--profile",
        str(tmp_path / "traces"),
        "--num-iters",
        "4000",
        "--output-json",
        str(path),
        "--cached",
        "0",
    ]

    def first_group_is_done() -> bool:
        for trace in (tmp_path / "traces").glob("*history-64*"):  # traced after the first group was timed
            return trace.read_text().rstrip().endswith("}")
        return False

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not first_group_is_done():
            assert process.poll() is None
            time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted" in stdout
    record = json.loads(path.read_text())
    assert (record["status"], record["reasons"]) == ("invalid", ["interrupted"])
    assert [row["history_length"] for row in record["rows"]] == [16]


@pytest.mark.gpu
def test_every_case_is_right_on_a_gpu() -> None:
    arguments = ["--device", "cuda", "--history", "512,4096", "--batch-size", "2", "--cache-tier", "host"]
    rows = record_of("bench-layer", *arguments)["rows"]
    assert all(row["output_error"] < 0.05 for row in rows)


def test_ceilings_that_were_disturbed_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = Ceilings(1e6, 1e6, None, 1e15, 1e15, 1, 1), Ceilings(1e15, 1e15, None, 1e6, 1e6, 1, 1)
    for later, name in ((high, "better"), (low, "same")):
        measured = iter((low, later))
        monkeypatch.setattr(bench, "measure_ceilings", lambda *_, measured=measured: next(measured))
        monkeypatch.setattr(bench_session, "measure_ceilings", lambda *_, measured=measured: next(measured))
        record = record_of(*SMALL, *GRID)
        warned = any("of the measured ceilings" in warning for warning in record["warnings"])
        assert warned == (name == "same")
        assert record["ceilings"]["flops_per_s"] == later.flops_per_s
        assert record["ceilings"]["bytes_per_s"] == 1e15
        for row in record["rows"]:
            check_limits(row, record["ceilings"])
