"""`hstu bench-fused`: its rows and their numbers, memory by variant, what it checks, draws and refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import failure_of, invoke, record_of

from hstu_cli.backend import Backend
from hstu_cli.bench import session, training_layer
from hstu_cli.bench.ceilings import Ceilings
from hstu_cli.bench.fused import peak_flops
from hstu_cli.bench.published import FUSED_CASE, published_fused_tflops
from hstu_cli.bench.training_layer import VARIANTS, TrainingWorkload
from hstu_cli.commands import bench, bench_fused
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.model.cost import SequenceShape, attention_flops, kept_bytes, linear_flops, training_flops

SHAPE = ["--embedding-dim", "64", "--num-heads", "2"]
SMALL = ["bench-fused", *SHAPE, "--num-iters", "2", "--batch-size", "3"]
MEASURED = {
    "forward_ms",
    "backward_ms",
    "latency_ms",
    "peak_memory_bytes",
    "tflops",
    "mfu",
    "output_error",
    "gradient_error",
    "published_tflops",
}
CONFIG = replace(MODEL_PRESETS["benchmark"], num_layers=3, hidden_dim=64, num_heads=2, head_dim=32, scaling_seqlen=2048)


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in bench_fused.SWITCHES:
        monkeypatch.delenv(switch, raising=False)


@pytest.mark.parametrize("lengths", ["--full-sequence", "--jagged"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_length_and_variant_is_a_row(dtype: str, lengths: str) -> None:
    record = record_of(*SMALL, 2, "--seqlens", "70,33", "--dtype", dtype, lengths)
    rows = record["rows"]
    assert [(row["seqlen"], row["variant"]) for row in rows] == [(n, v) for n in (70, 33) for v in VARIANTS]
    for row in rows:
        assert row.keys() >= MEASURED
        assert (row["num_layers"], row["batch_size"], row["impl"]) == (
            2,
            3,
            choose_impl("auto", "cpu", gradients=True).name,
        )
        assert len(row["latency_ms"]["samples"]) == 2
        for whole, forward, backward in zip(
            *(row[f"{part}_ms"]["samples"] for part in ("latency", "forward", "backward")), strict=True
        ):
            assert 0 < forward + backward <= whole
        assert row["output_error"] < (1e-5 if dtype == "fp32" else 0.05)
        assert row["gradient_error"] < (1e-4 if dtype == "fp32" else 0.2)
        assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / record["peak"]["flops_per_s"])
        assert row["num_tokens"] == 3 * row["seqlen"] if lengths == "--full-sequence" else row["num_tokens"] >= 3
        assert row["published_tflops"] is None
        assert (row["speedup_vs_baseline"] == 1) == (row["variant"] == "baseline")
    assert record["dropout"] == 0.2
    assert record["peak"]["source"].startswith("large matrix product")


def test_the_eager_peer_is_another_baseline() -> None:
    rows = record_of(*SMALL, "--seqlens", "40", "--compare", "eager")["rows"]
    assert [(row["variant"], row["impl"]) for row in rows][-1] == ("baseline", "eager")
    assert all(row["output_error"] < 1e-5 for row in rows)


def test_flops_are_three_times_linear_and_three_and_a_half_times_attention() -> None:
    shapes = [SequenceShape(100, 0, 0), SequenceShape(7, 0, 0)]
    pairs = 100 * 101 // 2 + 7 * 8 // 2
    assert training_flops(CONFIG, shapes) == 3 * (3 * linear_flops(CONFIG, 107) + 3.5 * attention_flops(CONFIG, pairs))


@pytest.mark.parametrize("impl", ["blocked", pytest.param("native", marks=pytest.mark.native)])
def test_each_recompute_lowers_the_peak_by_what_all_but_one_layer_no_longer_keep(impl: str) -> None:
    workload = TrainingWorkload(
        CONFIG,
        Backend(),
        torch.bfloat16,
        seqlen=400,
        batch_size=3,
        full=True,
        dropout=0.2,
        impl=impl,
        seed=0,
    )
    baseline, *peaks = (workload.memory(name).peak_bytes for name in VARIANTS)
    kept = [kept_bytes(CONFIG, 1200, 2, recompute, dropout=True) for recompute in list(VARIANTS.values())[1:]]
    freed = [before - after for before, after in pairwise(kept)]
    assert freed == [1200 * 2 * CONFIG.hidden_dim, 1200 * 2 * 4 * CONFIG.attention_dim]
    for (before, after), less in zip(pairwise(peaks), freed, strict=True):
        assert before - after >= (CONFIG.num_layers - 1) * less
    assert baseline > peaks[0]


def test_memory_of_a_pass_is_a_timeline_with_forward_and_backward() -> None:
    [row] = [
        row
        for row in record_of(*SMALL, "--seqlens", "48")["rows"]
        if row["variant"] == "optimized"
    ]  # fmt: skip
    timeline = row["memory_timeline"]
    moments, values = zip(*timeline["samples"], strict=True)
    assert max(values) == row["peak_memory_bytes"]
    assert values[0] == 0
    assert moments[0] < timeline["forward_end_ms"] < moments[-1]
    at_the_end_of_forward = [v for moment, v in timeline["samples"] if moment <= timeline["forward_end_ms"]][-1]
    config = replace(CONFIG, num_layers=1)
    kept = kept_bytes(config, 3 * 48, 4, "none", dropout=True)
    assert at_the_end_of_forward == kept  # less the input, which was there, and with the output


@pytest.mark.parametrize(
    ("switches", "variants"),
    [
        ({"RECOMPUTE_INPUT_SILU": "0"}, ["baseline", "optimized", "+layernorm_recompute"]),
        ({"RECOMPUTE_INPUT_LAYERNORM": "False"}, ["baseline", "optimized", "+silu_recompute"]),
        ({"RECOMPUTE_INPUT_LAYERNORM": "0", "RECOMPUTE_INPUT_SILU": "false"}, ["baseline", "optimized"]),
        ({"RECOMPUTE_INPUT_LAYERNORM": "1", "RECOMPUTE_INPUT_SILU": "True"}, list(VARIANTS)),
    ],
    ids=str,
)
def test_switches_in_the_environment_leave_variants_out(
    switches: dict[str, str], variants: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    rows = record_of("bench-fused", "--dry-run", "--seqlens", "8")["rows"]
    assert [row["variant"] for row in rows] == variants


def test_a_switch_that_says_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOMPUTE_INPUT_SILU", "perhaps")
    assert "RECOMPUTE_INPUT_SILU in the environment is 0 or 1" in failure_of(2, "bench-fused")


def test_dry_run_lists_the_published_workload() -> None:
    record = record_of("bench-fused", "--dry-run")
    assert [row["seqlen"] for row in record["rows"]] == [n for n in (1024, 2048, 4096, 8192) for _ in VARIANTS]
    assert {row["batch_size"] for row in record["rows"]} == {32}
    model = record["model"]
    assert (model["num_layers"], model["hidden_dim"], model["num_heads"], model["head_dim"]) == (1, 1024, 4, 256)
    assert record["rows"][0]["flops"] == pytest.approx(1.27e12, rel=0.01)  # 191 TFLOP/s in the 6.65 ms published


def test_published_rates_are_those_of_their_case_alone() -> None:
    assert published_fused_tflops("baseline", 1024, FUSED_CASE) == 195
    assert published_fused_tflops("optimized", 8192, FUSED_CASE) == 477
    assert published_fused_tflops("+silu_recompute", 2048, FUSED_CASE) == 320
    assert published_fused_tflops("optimized", 512, FUSED_CASE) is None
    assert published_fused_tflops("+layernorm_recompute", 1024, FUSED_CASE) is None
    for other in (
        {"dtype": torch.float16},
        {"batch_size": 8},
        {"batch_size": None},  # of random lengths
        {"num_layers": 3},
        {"embedding_dim": 512},
        {"num_heads": 8},
        {"head_dim": 128},
    ):
        assert published_fused_tflops("optimized", 1024, replace(FUSED_CASE, **other)) is None


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", (989.4e12, "data sheet of H100 SXM, dense")),
        ("NVIDIA H200", (989.4e12, "data sheet of H200 SXM, dense")),
        ("NVIDIA A100-PCIE-40GB", (312e12, "data sheet of A100, dense")),  # the same rate in either form
        ("NVIDIA L20", (119.5e12, "data sheet of L20, dense")),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H800", None),
    ],
)
def test_a_data_sheet_holds_for_its_own_form_of_a_gpu(device: str, peak: tuple[float, str] | None) -> None:
    class Named(Backend):
        type, device_name = "cuda", device

    ceilings = Ceilings(1e12, 2e12, None, 1e10, 1e10, 1, 1)
    assert peak_flops(session.BenchSession(Named(), torch.bfloat16, ceilings, 0, 1)) == (
        peak or (2e12, "large matrix product, measured before and after the cases")
    )


@pytest.mark.parametrize("spoiled", ["output", "gradient"])
def test_a_wrong_variant_invalidates_the_run(spoiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = training_layer.fused_hstu_layer

    def wrong(x: torch.Tensor, *arguments, **options) -> torch.Tensor:
        out = right(x, *arguments, **options)
        if options["recompute"] == "layernorm":
            return out * 1.5 if spoiled == "output" else out.detach() + 1.5 * (out - out.detach())
        return out

    monkeypatch.setattr(training_layer, "fused_hstu_layer", wrong)
    result = invoke(*SMALL, "--seqlens", "16", "--format", "json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["status"] == "invalid"
    assert f"16 tokens, +layernorm_recompute: {spoiled} error" in record["reasons"][0]
    assert "optimized" not in record["reasons"][0]
    assert len(record["rows"]) == 4


def test_a_length_beyond_memory_is_rows_with_their_reason() -> None:
    rows = record_of(*SMALL, "--seqlens", "16,1000000", "--batch-size", "100")["rows"]
    assert ["skipped" in row for row in rows] == [False] * 4 + [True] * 4
    assert re.fullmatch(r"needs about [\d,.]+ GB, [\d,.]+ GB are available", rows[-1]["skipped"])


def test_a_length_that_runs_out_of_memory_is_skipped_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TrainingWorkload.forward

    def greedy(self, name):
        if self.lengths[0] == 33:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, name)

    monkeypatch.setattr(TrainingWorkload, "forward", greedy)
    rows = record_of(*SMALL, "--seqlens", "33,16")["rows"]
    assert [row.get("skipped") for row in rows] == ["ran out of memory"] * 4 + [None] * 4


def test_the_default_run_shrinks_until_it_fits_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fused, "CPU_SECONDS", 0.0)
    result = invoke("bench-fused", *SHAPE, "--num-iters", "1", "--format", "json")
    record = json.loads(result.stdout)
    assert "batch size 1, sequences of 1024 tokens; --full runs everything" in record["scaled"]
    assert "--full" in result.stderr
    assert [(row["batch_size"], row["seqlen"]) for row in record["rows"]] == [(1, 1024)] * 4
    chosen = record_of(*SMALL, "--seqlens", "24,16")  # what the user chose stays
    assert [(row["batch_size"], row["seqlen"]) for row in chosen["rows"][::4]] == [(3, 24), (3, 16)]
    assert "scaled" not in chosen


def test_a_run_that_stays_long_says_how_long_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many layers are more than the smallest size makes up for; and what the user chose is not made smaller."""
    quick = invoke(*SMALL, "--seqlens", "16", "--format", "json")
    assert 0 < json.loads(quick.stdout)["estimated_seconds"] < bench_fused.CPU_SECONDS
    assert "by estimate" not in quick.stderr
    monkeypatch.setattr(bench_fused, "CPU_SECONDS", 1e-6)
    for options in (["--seqlens", "16"], ["--seqlens", "16", "--full"]):
        result = invoke(*SMALL, *options, "--format", "json")
        assert json.loads(result.stdout)["estimated_seconds"] > 0
        assert result.stderr.count("This takes about 0 minutes on this CPU, by estimate.") == 1
        assert [row["seqlen"] for row in json.loads(result.stdout)["rows"]] == [16] * 4


def test_mfu_is_of_the_better_product_before_and_after_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = session.measure_ceilings

    def faster(*arguments: Any) -> Ceilings:
        ceilings = measure(*arguments)
        return replace(ceilings, matmul_flops_per_s=100 * ceilings.matmul_flops_per_s)

    monkeypatch.setattr(session, "measure_ceilings", faster)  # the second time; the first is the command's
    record = record_of(*SMALL, "--seqlens", "16")
    peak = record["peak"]["flops_per_s"]
    assert peak == record["ceilings"]["matmul_flops_per_s"]
    for row in record["rows"]:
        assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / peak)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["0"], 2, "greater than or equal to 1"),
        (["many"], 2, "as an integer"),
        (["--seqlens", "1K"], 2, "--seqlens takes whole numbers separated by commas, not '1K'"),
        (["--seqlens", ""], 2, "--seqlens takes whole numbers"),
        (["--seqlens", "0"], 2, "--seqlens takes numbers from 1"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--num-heads", "3"], 2, "3 heads do not divide --embedding-dim 1024"),
        (["--dtype", "int8"], 2, "There is no dtype"),
        (["--dropout", "1"], 2, "--dropout takes a number from 0 to below 1"),
        (["--impl", "ascend"], 2, "runs on an NPU"),
        (["--impl", "reference"], 2, "--compare eager"),
        (["--compare", "keras"], 2, "--compare knows eager"),
        (["--plot", "chart.gif"], 2, ".png, .svg, .html"),
        (["--device", "b200", "--require-device"], 3, "--require-device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_message(options: list[str], code: int, message: str) -> None:
    assert message in failure_of(code, "bench-fused", *options)


def test_tables_and_plot_show_latency_memory_and_the_timeline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "fused.html"
    result = invoke(*SMALL, "--seqlens", "16", "--plot", path)
    assert result.exit_code == 0, result.stderr
    for text in ("Latency, ms", "Peak memory beside inputs and weights, MB", "Forward ms", "Backward ms", "MFU"):
        assert text in result.stdout
    page = path.read_text()
    assert "<svg" in page
    assert "memory_timeline" in page
    assert "Memory of live tensors, 16 tokens" in page


def test_a_profile_is_a_trace(tmp_path: Path) -> None:
    record_of(*SMALL, "--seqlens", "16", "--profile", tmp_path)
    [path] = tmp_path.glob("*.json")
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert set(VARIANTS) <= names


def test_an_interruption_before_the_first_length_leaves_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_ceilings", interrupted)
    result = invoke(*SMALL, "--format", "json")
    assert result.exit_code == 130
    record = json.loads(result.stdout)
    assert (record["reasons"], record["rows"]) == (["interrupted"], [])


def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path) -> None:
    path, traces = tmp_path / "record.json", tmp_path / "traces"
    options = ["--seqlens", "16,64", "--num-iters", "300", "--profile", str(traces), "--output-json", str(path)]
    command = [sys.executable, "-m", "hstu_cli", *SMALL, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(trace.read_text().rstrip().endswith("}") for trace in traces.glob("64*")):
            assert process.poll() is None
            time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    record = json.loads(path.read_text())
    assert (record["status"], record["reasons"]) == ("invalid", ["interrupted"])
    assert [row["seqlen"] for row in record["rows"]] == [16] * 4


@pytest.mark.gpu
def test_it_is_right_on_a_gpu() -> None:
    record = record_of("bench-fused", 2, "--device", "cuda", "--seqlens", "512,1000", "--batch-size", "4", "--jagged")
    assert all(row["output_error"] < 0.05 for row in record["rows"])
    assert all(row["gradient_error"] < 0.2 for row in record["rows"] if row["variant"] != "baseline")
