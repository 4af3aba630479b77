"""Graphs on the stand-in for torch_npu, where nothing that is captured is computed before it is replayed."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.npu import STAND_IN, record, run_on_stand_in, why_no_stand_in

from hstu_cli.config import TASKS

pytestmark = pytest.mark.skipif(why_no_stand_in() is not None, reason=str(why_no_stand_in()))

DOCS = Path(__file__).parent.parent / "docs" / "npu.md"
STEPS = 30
INFER = ["infer", "--config", "tiny", "--steps", str(STEPS), "--batch-size", "16", "--format", "json"]
INFER += ["--device", "npu", "--dtype", "fp32"]
GRAPHS = ["--cuda-graph"]
HOST_TIER = ["--num-pages", "40", "--host-cache-gb", "0.01"]
E2E = ["bench-e2e", "--config", "tiny", "--num-iters", "1", "--num-iters-warmup", "0", "--device", "npu"]
E2E += ["--history-step", "8", "--num-batches", "3", "--candidates", "3", "--num-users", "1,2", "--format", "json"]

BENCHMARK_CAPTURES = """
from hstu_cli.bench.session import BenchSession
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.bench.e2e import GrowingUsers, run_e2e_benchmark
from hstu_cli.bench.ceilings import measure_ceilings
from hstu_cli.backend import NpuBackend
import torch
from torch_npu.graphs import NPUGraph
captures = []
def watched(self, group, cases, measure=BenchSession.measure):
    before = NPUGraph.num_captured
    samples = measure(self, group, cases)
    captures.append([before, NPUGraph.num_captured])
    return samples
BenchSession.measure = watched
backend = NpuBackend()
session = BenchSession(backend, torch.float32, measure_ceilings(backend, torch.float32), warmup=1, iterations=2)
rows = list(run_e2e_benchmark(
    session, MODEL_PRESETS["tiny"], [GrowingUsers(3, 40, 3, 4)], ["kvcache", "kvcache+graph"],
    impl="blocked", append_impl="torch", page_size=32, seed=0, embeddings=["torch"], preset=None,
))
result = [captures, rows[1]["cuda_graph"], rows[1]["max_abs_logit_difference"]]
"""

STALE_WEIGHTS = """
import numpy as np, torch
from hstu_cli.backend import NpuBackend
from hstu_cli.bench.e2e import benchmark_model
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.shaped_graphs import ShapedGraphRunner
from hstu_cli.model.tokens import UserRequest
from torch_npu.graphs import NPUGraph
config, backend = MODEL_PRESETS["tiny"], NpuBackend()
model, other = (benchmark_model(config, seed).to("npu") for seed in (0, 1))
cache = KVCacheManager(KVCacheConfig(40, 32), config, torch.float32, backend)
runner = ShapedGraphRunner(model.layers, cache, "blocked", 500, captured_at=1)
engine = InferenceEngine(model, "blocked", cache, graphs=runner)
def request(user):
    videos = np.random.default_rng(user).integers(0, 50, 9)
    return [UserRequest(user, np.zeros(config.num_context_tokens, np.int64), videos, videos, videos[:4])]
def error(user):
    expected = InferenceEngine(model, "blocked").step(request(user)).logits
    return float(np.linalg.norm(engine.step(request(user)).logits - expected) / np.linalg.norm(expected))
engine.step(request(0))
result = [error(1)]
captured = NPUGraph.num_captured
model.load_state_dict(other.state_dict())
result += [error(2), NPUGraph.num_captured - captured]
last = model.layers[-1].output  # one weight alone, and in other memory
last.weight = torch.nn.Parameter(2.0 * last.weight.detach())
result += [error(3), NPUGraph.num_captured - captured, runner.replays]
"""

JOBS: dict[str, dict[str, Any]] = {
    "without": {"args": [*INFER, "--predictions-out", "without.parquet"], "graphs": True},
    "one graph": {"args": [*INFER, *GRAPHS, "--predictions-out", "one graph.parquet"]},
    "a graph for each layer": {
        "args": [*INFER, *GRAPHS, *HOST_TIER, "--predictions-out", "a graph for each layer.parquet"]
    },
    "bf16, verified": {"args": [*INFER[:-2], *GRAPHS, *HOST_TIER, "--verify-cache", "7"]},
    "bench-e2e": {"args": E2E},
    "captures of bench-e2e": {"code": BENCHMARK_CAPTURES},
    "weights": {"code": STALE_WEIGHTS},
    "reference": {"args": [*INFER, *GRAPHS, "--impl", "reference"]},
    "unpadded": {"args": [*INFER, *GRAPHS], "unpadded": True},
    "no cache": {"args": [*INFER, *GRAPHS, "--no-kv-cache"]},
    "queue": {
        "code": "import os; os.environ['TASK_QUEUE_ENABLE'] = '2'\n"
        "from hstu_cli.backend import NpuBackend; result = NpuBackend().why_no_graphs()\n"
        "del os.environ['TASK_QUEUE_ENABLE']"
    },
    "env": {"args": ["env", "--format", "json"]},
}
REPLAYING = ["one graph", "a graph for each layer", "bf16, verified"]
for name in [*REPLAYING, "bench-e2e"]:
    JOBS[name]["watched"] = True
for job in JOBS.values():
    job["graphs"] = True

SETUP = """
import torch
from hstu_cli.backend import NpuBackend, upload
backend = NpuBackend()
pool = backend.graph_pool()
x = torch.arange(12.0).view(3, 4).to("npu")
y = torch.zeros(3, 4).to("npu")
index = torch.tensor([2, 0]).to("npu")
host = backend.host_tensor((3, 4), torch.float32)
def captured(work):
    graph = torch.npu.NPUGraph()
    with torch.npu.stream(torch.npu.Stream()):
        torch.npu.current_stream().wait_stream(torch.npu.default_stream())
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()
    return graph
"""

MISTAKES = {
    "a value that is read": "captured(lambda: x.sum().item())",
    "an index by a mask": "captured(lambda: x[y > 0])",
    "a size that follows from values": "captured(lambda: y.nonzero())",
    "a copy from the host": "captured(lambda: x.copy_(host))",
    "a copy from pinned memory": "captured(lambda: x.copy_(host, non_blocking=True))",
    "an upload": "captured(lambda: upload([torch.arange(3)], x.device))",
    "a copy to the host": "captured(lambda: x.cpu())",
    "a wait for the device": "captured(backend.synchronize)",
    "a wait for an event": "event = torch.npu.Event(); event.record(); captured(event.synchronize)",
    "a stream behind an event": "event = torch.npu.Event(); event.record(); captured(event.wait)",
    "a side stream": "captured(lambda: backend.submit_copy(lambda: y.copy_(x), to_host=False))",
    "a capture on the default stream": "torch.npu.NPUGraph().capture_begin()",
    "a replay within a capture": "graph = captured(lambda: y.copy_(x)); captured(graph.replay)",
    "a replay of nothing": "torch.npu.NPUGraph().replay()",
}

RESULTS = {
    "nothing is computed before a replay": (
        "graph = captured(lambda: y.copy_(x * 2)); before = y.sum().item(); graph.replay()\n"
        "result = [before, y.sum().item()]",
        [0.0, 132.0],
    ),
    "a replay reads what is there then": (
        "graph = captured(lambda: y.copy_(x.index_select(0, index).sum(0, keepdim=True).expand(3, 4)))\n"
        "graph.replay(); first = y[0].tolist(); x.mul_(10.0); index.fill_(1); graph.replay()\n"
        "result = [first, y[0].tolist()]",
        [[8, 10, 12, 14], [80, 100, 120, 140]],
    ),
    "several results": (
        "def norm():\n"
        "    out, mean, _ = torch.native_layer_norm(x, (4,), None, None, 1e-5)\n"
        "    y.copy_(out + mean)\n"
        "graph = captured(norm); graph.replay(); result = [round(v) for v in y.mean(1).tolist()]",
        [2, 6, 10],
    ),
    "what a graph leaves in its pool is gone when another replays": (
        "kept = []\n"
        "first = pool.capture(lambda: (kept.clear(), kept.append(x + 1), y.copy_(kept[0])))\n"
        "second = pool.capture(lambda: y.copy_(kept[0]))\n"
        "first.replay(); good = y.sum().item(); second.replay()\n"
        "result = [good, y.sum().item() == good]",
        [78.0, False],
    ),
    "memory of a pool is counted, and given back": (
        "graph = pool.capture(lambda: y.copy_(x + 1 + torch.ones_like(x)))\n"
        "held = pool.memory_bytes; del graph; pool.release(); result = [held > 0, pool.memory_bytes]",
        [True, 0],
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("npu")
    jobs = JOBS | {name: {"code": SETUP + code, "graphs": True} for name, code in MISTAKES.items()}
    jobs |= {name: {"code": SETUP + code, "graphs": True} for name, (code, _) in RESULTS.items()}
    found = dict(zip(jobs, run_on_stand_in(list(jobs.values()), home), strict=True))
    found["home"] = home
    return found


def logits(home: Path, name: str) -> np.ndarray:
    table = pq.read_table(home / f"{name}.parquet")
    return np.stack([table[f"logit_{task}"].to_numpy() for task in TASKS], 1)


@pytest.mark.parametrize("name", ["one graph", "a graph for each layer"])
def test_predictions_are_those_without_graphs(outcomes: dict[str, Any], name: str) -> None:
    """To the bit: one padded size or several, the products of a row are the same."""
    for each in ("without", name):
        record(outcomes[each])
    assert np.array_equal(logits(outcomes["home"], "without"), logits(outcomes["home"], name))


@pytest.mark.parametrize("name", REPLAYING)
def test_steps_are_replayed(outcomes: dict[str, Any], name: str) -> None:
    found = record(outcomes[name])
    graphs = found["cuda_graph"]
    assert (graphs["enabled"], graphs["reason"], graphs["left_out"]) == (True, "as requested", [])
    assert graphs["layerwise"] == (name != "one graph")
    assert graphs["captured_graphs"] == len(graphs["buckets"]) * (1 if name == "one graph" else 2)
    assert graphs["replays"] > found["num_batches"] / 2
    assert graphs["capture_ms"] > 0 < graphs["memory_bytes"]
    if "verified" in found["kv_cache"]:
        assert found["status"] == "valid"
        assert found["kv_cache"]["bytes_onloaded"] > 0


def test_a_replayed_step_waits_for_its_results_alone(outcomes: dict[str, Any]) -> None:
    """A capture makes the host wait: for an idle device before, and at the end of each round of captures."""
    found = record(outcomes["one graph"])
    waits = Counter()
    for where, count in outcomes["one graph"]["recorded"]["syncs"].items():
        waits[where.replace("hstu_cli/", "")] = count
    steps, graphs = found["num_batches"], found["cuda_graph"]["captured_graphs"]
    assert waits["copy to the host at model/engine.py:_score"] == steps + 1
    assert waits["synchronize at backend/streams.py:capture"] == graphs
    assert 2 * steps < waits["synchronize at backend/streams.py:synchronize"] <= 2 * steps + graphs
    assert {where.partition(" at ")[0] for where in waits} <= {"copy to the host", "copy from the host", "synchronize"}


@pytest.mark.parametrize("name", [*REPLAYING, "bench-e2e"])
def test_what_is_captured_is_on_the_list(outcomes: dict[str, Any], name: str) -> None:
    """The documentation's, which holds operators that torch_npu registers alone, and every other is a view of them."""
    section = re.search(r"## Operators\n(.*?)\n## ", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    documented = set(re.findall(r"```text\n(.*?)```", section[1], re.DOTALL)[0].split())
    recorded = {operator.removesuffix(".default") for operator in outcomes[name]["recorded"]["operators"]}
    assert recorded
    assert recorded - documented == set()
    listed = (STAND_IN / "npu_ops_2.13.0.txt").read_text(encoding="utf-8")
    assert {"bmm", "index_copy_", "minimum"} <= recorded & set(listed.splitlines())


def test_bench_e2e_has_a_row_with_graphs(outcomes: dict[str, Any]) -> None:
    rows = record(outcomes["bench-e2e"])["rows"]
    assert [row["variant"] for row in rows] == ["baseline", "kvcache", "kvcache+graph"] * 2
    assert not any("skipped" in row for row in rows)
    for row in (rows[2], rows[5]):
        assert (row["cuda_graph"]["replays"], row["cuda_graph"]["eager_steps"]) == (3, 0)
        assert row["cuda_graph"]["captured_graphs"] == len(row["cuda_graph"]["buckets"]) > 0
        assert row["max_abs_logit_difference"] < 0.1  # in bf16; the benchmark checks it against its own budget


def test_bench_e2e_captures_nothing_while_it_measures(outcomes: dict[str, Any]) -> None:
    assert outcomes["captures of bench-e2e"]["error"] is None, outcomes["captures of bench-e2e"]
    ((before, after),), graphs, difference = outcomes["captures of bench-e2e"]["result"]
    assert before == after
    assert [size["pages_each"] for size in graphs["buckets"]] == [0, 4]  # the first batch finds nothing cached
    assert (graphs["replays"], graphs["eager_steps"]) == (3 * (1 + 2), 0)
    assert difference < 1e-5


def test_weights_that_are_replaced_are_captured_anew(outcomes: dict[str, Any]) -> None:
    assert outcomes["weights"]["error"] is None, outcomes["weights"]
    first, in_place, none_new, replaced, captured, replays = outcomes["weights"]["result"]
    assert max(first, in_place, replaced) < 1e-5
    assert (none_new, captured, replays) == (0, 1, 3)


def test_without_being_asked_nothing_is_captured(outcomes: dict[str, Any]) -> None:
    graphs = record(outcomes["without"])["cuda_graph"]
    assert graphs["enabled"] is False
    assert graphs["reason"].startswith("auto: no NPU has run captured graphs yet")
    assert record(outcomes["env"])["cuda_graph"] == {"available": True, "reason": None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reference", "impl reference reads a batch's sizes on the host, so it cannot be captured; blocked can"),
        ("unpadded", "impl blocked reads a batch's sizes on the host"),
        ("no cache", "drop --no-kv-cache"),
    ],
)
def test_what_cannot_be_captured_is_refused(outcomes: dict[str, Any], name: str, message: str) -> None:
    assert outcomes[name]["exit_code"] == 2, outcomes[name]["stderr"]
    assert message in " ".join(outcomes[name]["stderr"].split())


def test_a_queue_that_rules_graphs_out_is_named(outcomes: dict[str, Any]) -> None:
    assert outcomes["queue"]["result"] == "torch_npu captures no graphs with TASK_QUEUE_ENABLE=2; set it to 1"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_refuses_what_cannot_be_captured(outcomes: dict[str, Any], mistake: str) -> None:
    assert outcomes[mistake]["error"] == "CaptureError", outcomes[mistake]


@pytest.mark.parametrize("name", RESULTS)
def test_the_stand_in_replays_on_the_same_memory(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes[name]["error"] is None, outcomes[name]
    assert outcomes[name]["result"] == RESULTS[name][1]
