"""`--cuda-graph` and `--append-impl`: what the record says, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from support.cli import failure_of, invoke, record_of
from support.graphs import GraphBackend, HostGraphRunner, RecordedPool

from hstu_cli.commands.infer import _graphs_label
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.kernels.append_pages import choose_append_impl
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.shaped_graphs import ShapedGraphRunner


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=12, num_events=60, num_items=100))
    return root


def infer(root: Path, *arguments: object) -> list[object]:
    return [
        "infer",
        "--config",
        "tiny",
        "--data-root",
        root,
        "--steps",
        3,
        "--batch-size",
        4,
        "--device",
        "cpu",
        *arguments,
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "auto: a CPU has no graphs to replay"),
        (["--no-cuda-graph"], "as requested"),
        (["--no-kv-cache"], "auto: a CPU has no graphs to replay"),
    ],
    ids=str,
)
def test_the_record_says_why_there_are_no_graphs(root: Path, options: list[str], reason: str) -> None:
    assert record_of(*infer(root, *options))["cuda_graph"] == {"enabled": False, "reason": reason}


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (3, ["--cuda-graph"], "--cuda-graph: a CPU has no graphs to replay"),
        (2, ["--cuda-graph", "--no-kv-cache"], "drop --no-kv-cache"),
        (2, ["--append-impl", "fast"], "There is no --append-impl 'fast'; choose from auto, "),
        (3, ["--append-impl", "flashinfer"], "FlashInfer runs on NVIDIA GPUs alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_message(root: Path, code: int, options: list[str], message: str) -> None:
    assert message in failure_of(code, *infer(root, *options))


def test_tables_show_both(root: Path) -> None:
    shown = " ".join(invoke(*infer(root)).stdout.split())
    assert "CUDA graphs" in shown
    assert "off (auto: a CPU has no graphs to replay)" in shown
    fastest = choose_append_impl("auto", "cpu", torch.float32)
    assert f"{fastest.name} ({fastest.reason})" in shown
    assert record_of(*infer(root, "--append-impl", "torch"))["kv_cache"]["append_reason"] == "as requested"
    cache = record_of(*infer(root, "--impl", "blocked"))["kv_cache"]
    assert (cache["append_impl"], cache["append_reason"]) == ("torch", "auto: as --impl blocked")


@pytest.mark.parametrize("command", ["bench-layer", "bench-e2e"])
def test_benchmarks_take_it_too(command: str) -> None:
    shape = {
        "bench-layer": ["--history", "8", "--cached", "4", "--candidates", "0", "--batch-size", "1"],
        "bench-e2e": ["--history-step", "4", "--num-batches", "2", "--candidates", "3", "--num-users", "1"],
    }[command]
    arguments = [command, "--config", "tiny", *shape, "--num-iters", "1", "--device", "cpu"]
    fastest = choose_append_impl("auto", "cpu", torch.float32)
    assert record_of(*arguments)["append"] == {"name": fastest.name, "reason": fastest.reason}
    followed = record_of(*arguments, "--impl", "reference")["append"]
    assert followed == {"name": "torch", "reason": "auto: as --impl reference"}
    assert "NVIDIA" in failure_of(3, *arguments, "--append-impl", "flashinfer")


@pytest.fixture
def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` is a CPU that keeps and repeats captured work; Triton's kernels run in the interpreter."""
    monkeypatch.setattr("hstu_cli.backend.choice.BACKENDS", (GraphBackend,))


IN_PADDING = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
"""Rows of padding hold anything; numpy, which the interpreter computes with, says so."""


@IN_PADDING
@pytest.mark.triton
@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_infer_replays_what_it_captured(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL_PRESETS["tiny"].to_dict() | {"max_history": 8, "max_candidates": 4}))
    options = ["--impl", "triton", "--append-impl", "triton", "--page-size", 16, "--verify-cache", 2, "--steps", 2]
    record = record_of(*infer(root, *options, "--config", config, "--batch-size", 3))
    graphs = record["cuda_graph"]
    assert (graphs["enabled"], graphs["reason"]) == (True, "auto: impl triton can be captured")
    assert graphs["buckets"] == [{"batch_size": 3, "num_tokens": 64}, {"batch_size": 3, "num_tokens": 3 * (6 + 16 + 4)}]
    assert (graphs["captured_graphs"], graphs["layerwise"], graphs["left_out"]) == (2, False, [])
    assert graphs["replays"] == record["num_batches"] == 2
    assert graphs["memory_bytes"] > 0
    assert record["kv_cache"]["append_impl"] == "triton"


@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_an_implementation_that_cannot_be_captured_is_refused_or_runs_without(root: Path) -> None:
    assert "impl blocked reads" in failure_of(2, *infer(root, "--impl", "blocked", "--cuda-graph"))
    record = record_of(*infer(root, "--impl", "blocked"))
    assert not record["cuda_graph"]["enabled"]
    assert "impl blocked reads" in record["cuda_graph"]["reason"]


E2E = ["bench-e2e", "--config", "tiny", "--history-step", "8", "--num-batches", "2", "--candidates", "4"]


@IN_PADDING
@pytest.mark.triton
@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_bench_e2e_times_graphs_of_its_own_size() -> None:
    options = [
        "--num-users",
        "2",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "1",
        "--page-size",
        "16",
        "--device",
        "cpu",
    ]
    rows = record_of(*E2E, *options, "--impl", "triton")["rows"]
    assert [row["variant"] for row in rows] == ["baseline", "kvcache", "kvcache+graph"]
    graphs = rows[2]["cuda_graph"]
    # The first batch has the six context tokens too.
    assert [bucket["num_tokens"] for bucket in graphs["buckets"]] == [2 * (8 + 4), 2 * (6 + 8 + 4)]
    assert (graphs["replays"], graphs["eager_steps"]) == (2 * 2, 0)
    assert rows[2]["max_abs_logit_difference"] < 1e-4
    assert "cuda_graph" not in rows[1]


@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_bench_e2e_says_why_a_variant_does_not_run() -> None:
    rows = record_of(*E2E, "--num-users", "1", "--num-iters", "1", "--impl", "blocked", "--device", "cpu")["rows"]
    assert "impl blocked reads" in rows[2]["skipped"]


@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_bench_e2e_skips_graphs_that_do_not_fit_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One user's graphs fit; the next workload's second bucket does not."""
    pool = RecordedPool(fails_at={4})
    monkeypatch.setattr(GraphBackend, "graph_pool", lambda self: pool)
    monkeypatch.setattr("hstu_cli.model.graphs.CAPTURABLE", ("blocked",))
    monkeypatch.setattr("hstu_cli.model.shaped_graphs.GraphRunner", HostGraphRunner)
    rows = record_of(*E2E, "--num-users", "1,2", "--num-iters", "1", "--impl", "blocked", "--device", "cpu")["rows"]
    assert [row.get("skipped") for row in rows] == [None] * 5 + ["ran out of memory"]
    assert [row["cuda_graph"]["eager_steps"] for row in rows if "cuda_graph" in row] == [0]


@pytest.mark.usefixtures("graphs_on_a_cpu")
@pytest.mark.parametrize("refused", [False, True], ids=["captured", "refused"])
def test_bench_e2e_on_padded_shapes(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """A device that captures by shape; one that refuses to costs no other row."""
    pool = RecordedPool(fails_at={1} if refused else set(), error=RuntimeError("no such operator\nin a graph"))
    monkeypatch.setattr(GraphBackend, "graph_pool", lambda self: pool)
    monkeypatch.setattr(GraphBackend, "few_shapes", True)
    rows = record_of(*E2E, "--num-users", "2", "--num-iters", "1", "--impl", "blocked", "--device", "cpu")["rows"]
    if refused:
        assert ["skipped" in row for row in rows] == [False, False, True]
        assert "captures no graph of a step: no such operator; run without graphs." in rows[2]["skipped"]
    else:
        assert (rows[2]["cuda_graph"]["eager_steps"], len(rows[2]["cuda_graph"]["buckets"])) == (0, 2)
        assert rows[2]["max_abs_logit_difference"] < 1e-4


@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_infer_captures_padded_shapes_outside_the_time_that_it_takes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphBackend, "few_shapes", True)
    pending: list[int] = []  # when a step begins, whose time is taken
    step = InferenceEngine.step

    def watched(engine: InferenceEngine, requests: object, *, use_cache: bool = True) -> object:
        pending.append(len(engine.graphs._pending))
        return step(engine, requests, use_cache=use_cache)

    monkeypatch.setattr(InferenceEngine, "step", watched)
    record = record_of(*infer(root, "--impl", "blocked", "--cuda-graph", "--steps", 12, "--batch-size", 2))
    graphs = record["cuda_graph"]
    assert graphs["captured_graphs"] > 0 < graphs["replays"]
    assert pending == [0] * (1 + 12)  # one to warm up
    assert graphs["replays"] + graphs["eager_steps"] == 12
    assert "steps_beyond" in graphs
    assert "steps without (as requested)" in " ".join(
        invoke(*infer(root, "--impl", "blocked", "--cuda-graph", "--steps", 12, "--batch-size", 2)).stdout.split()
    )


@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_each_shape_without_a_graph_is_told_apart(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of as many tokens too; and steps of shapes that came when there were graphs enough."""
    monkeypatch.setattr(GraphBackend, "few_shapes", True)
    arguments = infer(root, "--impl", "blocked", "--cuda-graph", "--steps", 24, "--batch-size", 2)
    pool = RecordedPool(fails_at=set(range(100)))
    monkeypatch.setattr(GraphBackend, "graph_pool", lambda self: pool)
    said = [line for line in invoke(*arguments).stderr.splitlines() if "Memory did not suffice for the graph" in line]
    assert len(set(said)) == len(said) > 1
    pool.fails_at = set()
    monkeypatch.setitem(ShapedGraphRunner.__init__.__kwdefaults__, "most_shapes", 1)
    shown = " ".join(invoke(*arguments).stdout.replace("│", " ").split())
    assert "of them beyond the most shapes (as requested)" in shown


def test_graphs_of_an_npu_are_not_called_cudas() -> None:
    for actual, label in (("cuda:0", "CUDA graphs"), ("cpu", "CUDA graphs"), ("npu:1", "Graphs")):
        assert _graphs_label({"actual": actual}) == label
